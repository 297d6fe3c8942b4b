"""Databases made for short vectors, and memories in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from sqlalchemy import text

from database import Memory, SessionLocal, TenantSession
from database import MemoryRepository as Memories
from database.schema import upgrade
from database.settings import Settings
from tests.conftest import database_of
from tests.test_conformance import tenant_of


@contextmanager
def database_for(server: str, dimensions: int) -> Iterator[str]:
    """The URL of a database migrated for vectors of so many dimensions."""
    with database_of(server, None) as url:
        upgrade(settings=Settings(url=url, embedding_dimensions=dimensions, _env_file=None))
        yield url


def at(degrees: float, length: float = 1) -> list[float]:
    """A vector whose cosine similarity to `at(0)` is that of the angle."""
    radians = math.radians(degrees)
    return [length * math.cos(radians), length * math.sin(radians), 0]


def seen(db: TenantSession, **filters: Any) -> list[Memory]:
    """What another session of the tenant finds, by sequence."""
    with SessionLocal(tenant_id=tenant_of(db)) as fresh:
        return sorted(Memories.list(fresh, limit=1000, **filters), key=lambda found: found.sequence)


def embedding_of(db: TenantSession, id_: UUID) -> list[float] | None:
    """What is stored."""
    with SessionLocal(tenant_id=tenant_of(db)) as fresh:
        return Memories.require(fresh, id_).embedding


def age(db: TenantSession, memory: Memory, **fields: Any) -> None:
    """Change a row behind the repository's back, so that its updated_at stays."""
    names = ", ".join(f"{name} = :{name}" for name in fields)
    db.execute(
        text(f"UPDATE conversation_memory SET {names} WHERE id = :id"), fields | {"id": memory.id}
    )
    db.commit()
