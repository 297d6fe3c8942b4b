"""The statement that adds memories, numbered by their conversation's counter."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import BigInteger, TextClause, Uuid, bindparam, text

from database.errors import InvalidReferenceError
from database.models.base import uuid7
from database.models.memory import Memory
from database.repositories.loading import Shape, loaded, shape_of
from database.session import tenant_of
from database.types import Serialized, Timestamp, utcnow
from database.units import one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

__all__ = ["add_all"]

_COLUMNS = {
    "id": "uuid",
    "created_at": "timestamptz",
    "user_id": "uuid",
    "persona_id": "uuid",
    "first_message_id": "uuid",
    "content": "text",
    "memory_type": "text",
    "importance": "double precision",
    "metadata": "jsonb",
    "last_accessed_at": "timestamptz",
    "access_count": "integer",
    "first_position": "bigint",
    "last_position": "bigint",
    "message_count": "integer",
}
_NAMES = ", ".join(_COLUMNS)
# The conversation's counter goes up, which locks its row: no number is given twice.
_ADD = f"""
WITH conversation AS (
    UPDATE conversations
    SET last_sequence = greatest(last_sequence + :count, CAST(:highest AS bigint))
    WHERE tenant_id = :tenant AND id = :conversation
    RETURNING last_sequence - :count AS base
), added AS (
    INSERT INTO conversation_memory
        (tenant_id, updated_at, conversation_id, sequence, embedding, {_NAMES})
    SELECT :tenant, :now, :conversation, coalesce(sequence, base + number),
        CAST(embedding AS {{kind}}), {_NAMES}
    FROM conversation, jsonb_to_recordset(CAST(:rows AS jsonb)) AS item (
        number bigint, sequence bigint, embedding text,
        {", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())}
    )
)
SELECT base FROM conversation"""

# A JSON document holds at most 256 MB.
_MOST_ROWS = 2_000
_MOST_CHARACTERS = 16_000_000

_SHAPE: Shape[Memory] = shape_of(Memory, "conversation_id")


def add_all(
    db: Session, conversation: UUID, rows: Sequence[Mapping[str, Any]], kind: str
) -> list[Memory]:
    """Add checked memories, all or none; return them in order.

    Args:
        db: The session.
        conversation: Whose they are.
        rows: Values by attribute; `embedding` is pgvector's text. All have a `sequence`, or none.
        kind: The type of the embedding's column, vector or halfvec.
    """
    now = utcnow()
    filled = [{"id": uuid7(), "created_at": now, "last_accessed_at": now, **row} for row in rows]
    batches = list(_batches(filled))
    if len(batches) <= 1:
        return _add(db, conversation, filled, kind)
    with transaction(db):
        return [made for batch in batches for made in _add(db, conversation, batch, kind)]


def _add(
    db: Session, conversation: UUID, rows: Sequence[Mapping[str, Any]], kind: str
) -> list[Memory]:
    if not rows:
        return []
    now = utcnow()
    given = [row["sequence"] for row in rows if row.get("sequence") is not None]
    parameters = {
        "tenant": tenant_of(db),
        "conversation": conversation,
        "count": 0 if given else len(rows),
        "highest": max(given, default=None),
        "now": now,
        "rows": orjson.dumps([_plain(n, row) for n, row in enumerate(rows, 1)]).decode(),
    }
    with one_write(db) as connection:
        base = connection.scalar(_statement(kind), parameters)
    if base is None:
        raise InvalidReferenceError("conversation_id")
    names = [name for name in _SHAPE.names if name != "updated_at"]
    defaults = {"importance": 0.5, "access_count": 0, "metadata_": {}}
    values = []
    for number, row in enumerate(rows, 1):
        whole = {**defaults, "sequence": base + number, **row}
        values.append([_stored(whole.get(name)) for name in names])
    known = {
        "tenant_id": parameters["tenant"],
        "conversation_id": conversation,
        "updated_at": now,
    }
    return loaded(db, _SHAPE, names, values, known)


@cache
def _statement(kind: str) -> TextClause:
    return text(_ADD.replace("{kind}", kind)).bindparams(
        bindparam("conversation", type_=Uuid()),
        bindparam("now", type_=Timestamp()),
        bindparam("count", type_=BigInteger()),
        bindparam("highest", type_=BigInteger()),
    )


def _plain(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: row.get(name) for name in _COLUMNS}
    metadata = row.get("metadata_")
    plain["metadata"] = orjson.Fragment(b"{}" if metadata is None else metadata.data)
    plain["importance"] = row.get("importance", 0.5)
    plain["access_count"] = row.get("access_count", 0)
    return {
        **plain,
        "number": number,
        "sequence": row.get("sequence"),
        "embedding": row.get("embedding"),
    }


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    characters = 0
    for row in rows:
        if len(batch) == _MOST_ROWS or characters > _MOST_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(row)
        characters += len(row["content"]) + len(row.get("embedding") or "")
    if batch:
        yield batch


def _stored(value: Any) -> Any:
    return orjson.loads(value.data) if isinstance(value, Serialized) else value
