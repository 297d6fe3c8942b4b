"""All that a user has, as lines of JSON.

PostgreSQL makes the JSON, so that every number, timestamp and vector comes back as it was. A row
refers to rows that come before it or after it in the same export, or to nothing.
"""

from __future__ import annotations

from contextlib import closing
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Engine

from database.errors import NotFoundError
from database.repositories.ownership import (
    OWNED,
    SHARED,
    columns_of,
    elsewhere,
    found_by,
    has_elsewhere,
    own,
    references_of,
    statement,
)
from database.session import TenantSession
from database.units import is_owned, translated

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from uuid import UUID

    from sqlalchemy import TextClause
    from sqlalchemy.orm import Session

__all__ = ["HEADER", "PARTS", "Part", "export_user"]

HEADER = {"format": "database-user-export", "version": 1}
_HEADER = '{"format":"database-user-export","version":1}\n'

_CURSOR = {"yield_per": 100}
_SNAPSHOT = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}

_KNOWN = statement("SELECT 1 FROM users WHERE tenant_id = :tenant AND id = :user")


class Part(NamedTuple):
    """Rows of one table that stand together in an export."""

    table: str
    elsewhere: bool = False
    """Whether they are about the user but belong to what another user owns."""


PARTS = (
    *map(Part, (*SHARED, *OWNED)),
    *(Part(table, elsewhere=True) for table in OWNED if has_elsewhere(table)),
)
"""The parts of an export, in its order."""


def export_user(db: Session, tenant: str, user: UUID) -> Generator[str, None, None]:
    """Yield the header and the rows of a user."""
    parameters = {"tenant": tenant, "user": user}
    bind = db.get_bind()
    if is_owned(db) or not isinstance(bind, Engine):
        with translated():
            db.flush()
            yield from _lines(db, parameters)
        return
    with translated(), TenantSession(bind, tenant_id=tenant) as own_session:
        own_session.connection(execution_options=_SNAPSHOT)
        yield from _lines(own_session, parameters)


def _lines(db: Session, parameters: dict[str, Any]) -> Iterator[str]:
    if db.scalar(_KNOWN, parameters) is None:
        msg = "User: no such row in this tenant"
        raise NotFoundError(msg)
    yield _HEADER
    for part in PARTS:
        mark = ',"elsewhere":true' if part.elsewhere else ""
        selecting = _selecting(part)
        with closing(db.scalars(selecting, parameters, execution_options=_CURSOR)) as rows:
            for row in rows:
                yield f'{{"table":"{part.table}","row":{_on_one_line(row)}{mark}}}\n'


def _on_one_line(line: str) -> str:
    """Escape what JSON may hold as it is, but str.splitlines() takes for the end of a line."""
    if line.isascii():
        return line
    for end in ("\x85", "\u2028", "\u2029"):
        line = line.replace(end, f"\\u{ord(end):04x}")
    return line


@cache
def _selecting(part: Part) -> TextClause:
    table = part.table
    if table in SHARED:
        condition, order = _referred_to(table), "item.id"
    else:
        condition = _condition(part, "item")
        order = f"item.{found_by(table)}, item.id"
    kept = {r.column: _kept(table, *r) for r in references_of(table, OWNED)}
    columns = ", ".join(kept.get(name, f"item.{name}") for name in columns_of(table))
    # Sorted before the JSON is made: large values are then still pointers.
    return statement(f"""
SELECT CAST(row_to_json(line) AS text)
FROM (
    SELECT {columns} FROM {table} AS item
    WHERE item.tenant_id = :tenant AND {condition}
    ORDER BY {order}
) AS line""")


def _condition(part: Part, row: str) -> str:
    return elsewhere(part.table, row) if part.elsewhere else own(part.table, row)


def _kept(table: str, column: str, target: str) -> str:
    """Leave out a reference to what is not exported, as if that were deleted."""
    kept = (
        f"(SELECT target.id FROM {target} AS target WHERE target.tenant_id = :tenant"
        f" AND target.id = item.{column} AND {own(target, 'target')})"
    )
    if (table, column) == ("messages", "parent_id"):
        # Without its link a message would follow the one before it by position; so it follows none.
        kept = f"CASE WHEN item.{column} IS NOT NULL THEN coalesce({kept}, item.id) END"
    return f"{kept} AS {column}"


def _referred_to(table: str) -> str:
    referring = (
        f"SELECT part.{reference.column} FROM {part.table} AS part"
        f" WHERE part.tenant_id = :tenant AND {_condition(part, 'part')}"
        for part in PARTS
        if part.table in OWNED
        for reference in references_of(part.table, [table])
    )
    return f"item.id IN ({' UNION '.join(referring)})"
