"""The statements that store contexts: inserted, or in the place of those with the same source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from database.models.base import uuid7
from database.models.context import Context
from database.repositories.loading import Shape, loaded, shape_of
from database.session import tenant_of
from database.types import Timestamp, utcnow
from database.units import one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from uuid import UUID

    from sqlalchemy.orm import Session

__all__ = ["Stored", "store_all", "store_one"]


@dataclass(frozen=True, slots=True)
class Stored:
    """What storing many contexts did.

    Attributes:
        inserted: How many are new.
        updated: How many took the place of an old one, or were replaced by a later one themselves.
    """

    inserted: int
    updated: int


_COLUMNS = {
    "id": "uuid",
    "context_type": "text",
    "source_identifier": "text",
    "content": "jsonb",
    "metadata": "jsonb",
    "expires_at": "timestamptz",
}
_NAMES = ", ".join(_COLUMNS)
# The older of two writers may be the one that waited for the other.
_IN_PLACE = """
ON CONFLICT (tenant_id, user_id, context_type, source_identifier) DO UPDATE SET
    content = excluded.content, metadata = excluded.metadata, expires_at = excluded.expires_at,
    updated_at = greatest(contexts.updated_at, excluded.updated_at)
"""
_STORE = text(
    f"INSERT INTO contexts (tenant_id, user_id, created_at, updated_at, {_NAMES})"
    f" VALUES (:tenant, :user, :now, :now, {', '.join(f':{name}' for name in _COLUMNS)})"
    f" {_IN_PLACE} RETURNING id, created_at, updated_at"
).bindparams(
    bindparam("id", type_=Uuid()),
    bindparam("user", type_=Uuid()),
    bindparam("now", type_=Timestamp()),
    bindparam("content", type_=JSONB()),
    bindparam("metadata", type_=JSONB()),
    bindparam("expires_at", type_=Timestamp()),
)
# One JSON document in place of thousands of parameters: 0.5 x the time of executemany. The lock is
# for stores of several pages, which could wait for each other: of a user's there is one at a time.
_STORE_MANY = text(f"""
WITH alone AS MATERIALIZED (
    SELECT pg_advisory_xact_lock(hashtextextended(concat(CAST(:tenant AS text), :user), 0))
), item AS MATERIALIZED (
    SELECT * FROM jsonb_to_recordset(CAST(:rows AS jsonb))
        AS item ({", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())})
), stored AS (
    INSERT INTO contexts (tenant_id, user_id, created_at, updated_at, {_NAMES})
    SELECT :tenant, :user, :now, :now, id, context_type, source_identifier,
        coalesce(content, 'null'), metadata, expires_at
    FROM alone CROSS JOIN item
    {_IN_PLACE} RETURNING id
)
SELECT count(*) FROM stored JOIN item USING (id)""").bindparams(
    bindparam("user", type_=Uuid()),
    bindparam("now", type_=Timestamp()),
)

# A JSON document holds at most 256 MB.
_MOST_ROWS = 2_000
_MOST_CHARACTERS = 8_000_000

_SHAPE: Shape[Context] = shape_of(Context)
_RETURNED = ("id", "created_at", "updated_at", "inserted")


def store_one(db: Session, row: Mapping[str, Any]) -> Context:
    """Store a checked context; return it."""
    now = utcnow()
    new = uuid7()
    parameters = {
        "source_identifier": None,
        "expires_at": None,
        **row,
        "tenant": tenant_of(db),
        "user": row["user_id"],
        "id": new,
        "now": now,
    }
    with one_write(db) as connection:
        id_, created_at, updated_at = connection.execute(_STORE, parameters).one()
    known = {
        "tenant_id": parameters["tenant"],
        "user_id": row["user_id"],
        "context_type": row["context_type"],
        "source_identifier": parameters["source_identifier"],
        "content": orjson.loads(row["content"].data),
        "metadata_": orjson.loads(row["metadata"].data),
        "expires_at": parameters["expires_at"],
    }
    values = (id_, created_at, updated_at, id_ == new)
    (stored,) = loaded(db, _SHAPE, _RETURNED, [values], known)
    return stored


def store_all(db: Session, user: UUID, rows: Iterable[Mapping[str, Any]]) -> Stored:
    """Store checked contexts, all or none; count those inserted and updated."""
    inserted = total = 0
    with transaction(db):
        for page, size in _pages(rows):
            parameters = {
                "tenant": tenant_of(db),
                "user": user,
                "now": utcnow(),
                "rows": (b"[%b]" % b",".join(page)).decode(),
            }
            inserted += db.connection().scalar(_STORE_MANY, parameters)
            total += size
    return Stored(inserted, total - inserted)


def _pages(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[bytes], int]]:
    """Yield rows as JSON for a statement each, and how many rows they stand for.

    A statement cannot update a row twice, so of several with one source the last one stands; and
    they go in one order, or a unit that stores one by one in that order could wait for it too.
    """
    page: dict[tuple[str, str], bytes] = {}
    count = characters = 0
    for row in rows:
        id_ = uuid7()
        source = row.get("source_identifier")
        # Those without a source never meet.
        key = (row["context_type"], str(id_) if source is None else f"={source}")
        page[key] = _serialized(row, id_)
        count += 1
        characters += len(page[key])
        if len(page) == _MOST_ROWS or characters > _MOST_CHARACTERS:
            yield [page[key] for key in sorted(page)], count
            page, count, characters = {}, 0, 0
    if page:
        yield [page[key] for key in sorted(page)], count


def _serialized(row: Mapping[str, Any], id_: UUID) -> bytes:
    plain = {name: row.get(name) for name in _COLUMNS}
    plain["id"] = id_
    for name in ("content", "metadata"):
        plain[name] = orjson.Fragment(row[name].data)
    return orjson.dumps(plain)
