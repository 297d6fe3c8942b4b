"""The statements that write states: each finds its state by the whole key, and counts it up."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import TextClause, Uuid, bindparam, text, update
from sqlalchemy.dialects.postgresql import JSONB

from database.models.base import uuid7
from database.models.state import State
from database.repositories.loading import Shape, loaded, shape_of
from database.repositories.state_keys import KEY, of_key
from database.repositories.storing import Stored
from database.session import tenant_of
from database.types import Serialized, Timestamp, utcnow
from database.units import one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from uuid import UUID

    from sqlalchemy.orm import Session
    from sqlalchemy.sql.dml import ReturningUpdate
    from sqlalchemy.types import TypeEngine

__all__ = ["add", "merge", "put", "put_all", "replace"]

_COLUMNS = {
    "id": "uuid",
    "persona_id": "uuid",
    "module_id": "uuid",
    "execution_stage": "text",
    "state_key": "text",
    "state_value": "jsonb",
    "execution_metadata": "jsonb",
    "executed_at": "timestamptz",
}
_NAMES = ", ".join(_COLUMNS)
_TYPES: dict[str, TypeEngine[Any]] = {
    "id": Uuid(),
    "conversation_id": Uuid(),
    "persona_id": Uuid(),
    "module_id": Uuid(),
    "state_value": JSONB(),
    "execution_metadata": JSONB(none_as_null=True),
    "executed_at": Timestamp(),
    "now": Timestamp(),
}
_INTO = f"""
INSERT INTO conversation_states
    (tenant_id, conversation_id, created_at, updated_at, {_NAMES})"""
_CONFLICT = """
ON CONFLICT
    (tenant_id, conversation_id, persona_id, module_id, execution_stage, state_key)"""
# The older of two writers may be the one that waited for the other.
_IN_PLACE = f"""{_CONFLICT} DO UPDATE SET
    execution_metadata = excluded.execution_metadata, executed_at = excluded.executed_at,
    updated_at = greatest(conversation_states.updated_at, excluded.updated_at),
    version = conversation_states.version + 1,
    state_value = """
_RETURNED = ("id", "created_at", "updated_at", "version", "state_value")


def _one_row(value: str, conflict: str) -> TextClause:
    values = ", ".join(value if name == "state_value" else f":{name}" for name in _COLUMNS)
    statement = text(
        f"{_INTO} VALUES (:tenant, :conversation_id, :now, :now, {values})"
        f" {conflict} RETURNING {', '.join(_RETURNED)}"
    )
    return statement.bindparams(*(bindparam(name, type_=kind) for name, kind in _TYPES.items()))


_PUT = _one_row(":state_value", f"{_IN_PLACE} excluded.state_value")
_ADD = _one_row(":state_value", f"{_CONFLICT} DO NOTHING")
_MERGE = _one_row(
    "merge_patch('{}', :state_value)",
    f"{_IN_PLACE} merge_patch(conversation_states.state_value, :state_value)",
)
# One JSON document in place of thousands of parameters, as for contexts.
_PUT_MANY = text(f"""
WITH item AS MATERIALIZED (
    SELECT * FROM jsonb_to_recordset(CAST(:rows AS jsonb))
        AS item ({", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())})
), put AS ({_INTO}
    SELECT :tenant, :conversation_id, :now, :now,
        {_NAMES.replace("state_value", "coalesce(state_value, 'null')")}
    FROM item {_IN_PLACE} excluded.state_value
    RETURNING id
)
SELECT count(*) FROM put JOIN item USING (id)""").bindparams(
    bindparam("conversation_id", type_=Uuid()),
    bindparam("now", type_=Timestamp()),
)

# A JSON document holds at most 256 MB.
_MOST_ROWS = 2_000
_MOST_CHARACTERS = 8_000_000

_SHAPE: Shape[State] = shape_of(State)


def put(db: Session, row: Mapping[str, Any]) -> State:
    """Set a state of checked fields, be it there or not."""
    state = _run(db, _PUT, row)
    assert state is not None
    return state


def add(db: Session, row: Mapping[str, Any]) -> State | None:
    """Insert a state of checked fields; None if there is one of its key."""
    return _run(db, _ADD, row)


def merge(db: Session, row: Mapping[str, Any]) -> State:
    """Apply a JSON Merge Patch to a state, to an empty object if there is none."""
    state = _run(db, _MERGE, row)
    assert state is not None
    return state


def replace(db: Session, row: Mapping[str, Any], version: int) -> State | None:
    """Set the state if it has this version; else None."""
    missing = frozenset(name for name in KEY if row[name] is None)
    names = ("state_value", "execution_metadata", "executed_at")
    parameters = {
        **{f"new_{name}": row[name] for name in names},
        **{f"of_{name}": row[name] for name in KEY if name not in missing},
        "of_conversation": row["conversation_id"],
        "of_version": version,
        "tenant": tenant_of(db),
    }
    with one_write(db) as connection:
        found = connection.execute(_replacing(missing), parameters).one_or_none()
    return None if found is None else _entity(db, row, found)


@cache
def _replacing(missing: frozenset[str]) -> ReturningUpdate[Any]:
    return (
        update(State)
        .where(*of_key(missing), State.version == bindparam("of_version"))
        .values(
            state_value=bindparam("new_state_value", type_=_TYPES["state_value"]),
            execution_metadata=bindparam(
                "new_execution_metadata", type_=_TYPES["execution_metadata"]
            ),
            executed_at=bindparam("new_executed_at", type_=_TYPES["executed_at"]),
        )
        .returning(*(getattr(State, name) for name in _RETURNED))
        .execution_options(synchronize_session=False, names_tenant=True)
    )


def put_all(db: Session, conversation: UUID, rows: Iterable[Mapping[str, Any]]) -> Stored:
    """Set states of checked fields, all or none; count those inserted and updated."""
    # A statement cannot update a row twice, so of several with one key the last one stands; and all
    # writers take the keys in one order, or two could wait for each other.
    total, last = 0, {}
    for row in rows:
        last[tuple((row[name] is not None, str(row[name])) for name in KEY)] = row
        total += 1
    pages = list(_pages(last[key] for key in sorted(last)))
    inserted = 0
    with transaction(db) if len(pages) > 1 else nullcontext():
        for page in pages:
            parameters = {
                "tenant": tenant_of(db),
                "conversation_id": conversation,
                "now": utcnow(),
                "rows": (b"[%b]" % b",".join(page)).decode(),
            }
            with one_write(db) as connection:
                inserted += connection.scalar(_PUT_MANY, parameters)
    return Stored(inserted, total - inserted)


def _pages(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[bytes]]:
    page: list[bytes] = []
    characters = 0
    for row in rows:
        plain = {name: row[name] for name in _COLUMNS if name != "id"}
        for name, value in plain.items():
            if isinstance(value, Serialized):
                plain[name] = orjson.Fragment(value.data)
        page.append(orjson.dumps({"id": uuid7(), **plain}))
        characters += len(page[-1])
        if len(page) == _MOST_ROWS or characters > _MOST_CHARACTERS:
            yield page
            page, characters = [], 0
    if page:
        yield page


def _run(db: Session, statement: TextClause, row: Mapping[str, Any]) -> State | None:
    parameters = {**row, "tenant": tenant_of(db), "id": uuid7(), "now": utcnow()}
    with one_write(db) as connection:
        found = connection.execute(statement, parameters).one_or_none()
    return None if found is None else _entity(db, row, found)


def _entity(db: Session, row: Mapping[str, Any], found: Any) -> State:
    metadata = row["execution_metadata"]
    known = {
        **row,
        "tenant_id": tenant_of(db),
        "execution_metadata": None if metadata is None else orjson.loads(metadata.data),
    }
    del known["state_value"]
    (state,) = loaded(db, _SHAPE, _RETURNED, [found], known)
    return state
