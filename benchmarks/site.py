"""The databases that are measured: an own embedded server, migrated and filled by the library."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import psycopg
from sqlalchemy import make_url

import database
from benchmarks.raw import Raw
from database import (
    ConversationRepository,
    MessageRepository,
    SessionLocal,
    TenantSession,
    UserRepository,
    embedded,
)

if TYPE_CHECKING:
    from database.embedded import EmbeddedServer

__all__ = ["EMAIL", "TENANT", "THREADS", "Site", "filled", "messages", "plain", "serving", "sites"]

T = TypeVar("T")

TENANT = "bench"
EMAIL = "ada@example.com"
THREADS = 8
"""Also the size of the pools."""

_CONVERSATIONS = 10_000
_HISTORY = 1_000
_SENTENCE = "The quick brown fox jumps over the lazy dog while the kettle sings in the kitchen. "


@dataclass
class Site:
    """A filled database, reached through the library and by plain psycopg."""

    url: str
    user: UUID
    """The owner of 10,000 conversations, without messages."""
    history: UUID
    """A conversation of 1,000 messages, half of them with metadata."""
    text: UUID
    """One of 1,000 messages without any."""
    ours: list[UUID]
    """Conversations that the library appends to; as many are for the others."""
    theirs: list[UUID]
    spare: str
    """The URL of an empty database."""
    scale: float = 1
    """Which share of these numbers there really is: less shows whether all works run."""
    _open: list[psycopg.Connection] = field(default_factory=list, init=False)
    _filled: dict[str, Any] = field(default_factory=dict, init=False)

    def use(self) -> None:
        """Make this the library's database, in this process."""
        database.configure(url=self.url, tenant_id=TENANT, pool_size=THREADS, max_overflow=0)

    def session(self) -> TenantSession:
        return SessionLocal()

    def raw(self, tenant: str = TENANT, *, role: str = "database_app") -> Raw:
        self._open.append(psycopg.connect(plain(self.url), autocommit=True))
        return Raw(self._open[-1], tenant, role=role)

    def scaled(self, count: int) -> int:
        """Return how many there are here of what there are so many of at full size."""
        return round(count * self.scale)

    def filled(self, name: str, fill: Callable[[], T]) -> T:
        """Fill what only some of the works need, the first time that one of them does."""
        if name not in self._filled:
            self._filled[name] = fill()
        found: T = self._filled[name]
        return found

    def close(self) -> None:
        database.close_db()
        for connection in self._open:
            connection.close()


def messages(count: int) -> list[dict[str, Any]]:
    """Return messages as an application has them: 80 to 650 characters, answers with metadata."""
    return [
        {"role": "user", "content": _SENTENCE * (1 + number % 4)}
        if number % 2 == 0
        else {
            "role": "assistant",
            "content": _SENTENCE * (2 + number % 7),
            "extra_data": _metadata(number),
            "model": "some-model-1",
            "input_tokens": 1200 + number,
            "output_tokens": 300,
        }
        for number in range(count)
    ]


def plain(url: str) -> str:
    """Return a URL as libpq reads it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def serving() -> Iterator[tuple[EmbeddedServer, psycopg.Connection]]:
    """Yield an own server, which does nothing in the background, and a connection to it."""
    folder = Path(tempfile.gettempdir()) / f"database-bench-{os.getpid()}"
    server = embedded.start(folder)
    try:
        with psycopg.connect(plain(server.url()), autocommit=True) as admin:
            # What the server does in the background would fall on one contender or the other.
            for setting in (
                "autovacuum = off",
                "max_wal_size = '4GB'",
                "checkpoint_timeout = 3600",
            ):
                admin.execute(f"ALTER SYSTEM SET {setting}")
            admin.execute("SELECT pg_reload_conf()")
            yield server, admin
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def sites() -> Iterator[tuple[Site, Site, str]]:
    """Yield two equal sites, synchronous_commit off and on, and the URL of an empty database."""
    with serving() as (server, admin):
        admin.execute("CREATE DATABASE fast")
        admin.execute("CREATE DATABASE spare")
        fast = filled(server.url("fast"), server.url("spare"))
        admin.execute("CREATE DATABASE safe TEMPLATE fast")
        admin.execute("CREATE DATABASE peers")
        admin.execute("ALTER DATABASE fast SET synchronous_commit = off")
        admin.execute("ALTER DATABASE peers SET synchronous_commit = off")
        safe = replace(fast, url=server.url("safe"))
        yield fast, safe, server.url("peers")
        fast.close()
        safe.close()


def filled(url: str, spare: str, scale: float = 1) -> Site:
    """Migrate and fill a database, and return its site."""
    database.configure(url=url, tenant_id=TENANT)
    database.init_db()
    newest = datetime.now(UTC)
    with SessionLocal() as db:
        user = UserRepository.get_or_create(db, EMAIL).id
        listed = [
            {
                "user_id": user,
                "thread_id": f"thread-{number}",
                "title": f"Conversation {number}",
                "updated_at": newest - timedelta(minutes=number),
            }
            for number in range(round(_CONVERSATIONS * scale))
        ]
        for start in range(0, len(listed), 1000):
            ConversationRepository.create_many(db, listed[start : start + 1000])
        others = [ConversationRepository.create(db).id for _ in range(130)]
        history, text, *appended = others
        many = messages(round(_HISTORY * scale))
        MessageRepository.append_many(db, history, many)
        MessageRepository.append_many(
            db, text, [{"role": one["role"], "content": one["content"]} for one in many]
        )
    database.close_db()
    with psycopg.connect(plain(url), autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
    return Site(url, user, history, text, appended[::2], appended[1::2], spare, scale)


def _metadata(number: int) -> dict[str, Any]:
    """Return what providers tell of an answer: about 1 KB."""
    return {
        "finish_reason": "stop",
        "response_id": f"resp-{number:032x}",
        "latency_ms": 1840.25 + number,
        "usage": {
            "prompt_tokens": 1200 + number,
            "completion_tokens": 300,
            "details": {"cached_tokens": 1024, "reasoning_tokens": 128, "audio_tokens": 0},
        },
        "sources": [
            {
                "url": f"https://example.com/documents/{number}/{source}",
                "title": f"Document {source} about kettles and foxes",
                "score": 0.91 - source / 10,
                "excerpt": _SENTENCE,
            }
            for source in range(4)
        ],
    }
