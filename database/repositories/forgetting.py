"""Memories that fade and go."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Double, Uuid, bindparam, text

from database.errors import InvalidValueError
from database.session import tenant_of
from database.types import Timestamp, utcnow
from database.units import one_read, one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from uuid import UUID

    from sqlalchemy import TextClause
    from sqlalchemy.orm import Session
    from sqlalchemy.types import TypeEngine

__all__ = ["clear", "decay", "forget"]

_RESTART = text(
    "UPDATE conversations SET last_sequence = 0 WHERE tenant_id = :tenant AND id = :conversation"
).bindparams(bindparam("conversation", type_=Uuid()))
_CLEAR = text(
    "DELETE FROM conversation_memory WHERE tenant_id = :tenant AND conversation_id = :conversation"
).bindparams(bindparam("conversation", type_=Uuid()))
# The least positive number: PostgreSQL refuses products that would round to zero.
_LEAST = 1e-100


def clear(db: Session, conversation: UUID) -> int:
    """Delete the memories of a conversation and begin to number anew; return how many."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation}
    # Two statements: the second must see what was added while the first waited for the lock.
    with transaction(db):
        with one_write(db) as connection:
            connection.execute(_RESTART, parameters)
        with one_write(db) as connection:
            return connection.execute(_CLEAR, parameters).rowcount


def decay(
    db: Session, older_than: timedelta, factor: float, scope: Mapping[str, UUID], batch_size: int
) -> int:
    """Multiply the importance of what was not accessed for a while, in batches."""
    if not isinstance(older_than, timedelta) or older_than < timedelta():
        raise InvalidValueError("older_than", "must be a timedelta that is not negative")
    now = utcnow()
    try:
        before = now - older_than
    except OverflowError:
        raise InvalidValueError("older_than", "is too long") from None
    share = _share("factor", factor)
    parameters = {"before": before, "factor": share if share >= _LEAST else 0.0, "now": now}
    change = _Change(
        "UPDATE conversation_memory m SET updated_at = :now, importance ="
        f" CASE WHEN importance >= {_LEAST} THEN importance * :factor ELSE 0 END FROM",
        # What has decayed by this call carries its time, and is not found again.
        "last_accessed_at < :before AND updated_at < :now",
        "last_accessed_at",
    )
    return _in_batches(db, change, {**scope, **parameters}, scope, batch_size)


def forget(
    db: Session, below: float, scope: Mapping[str, UUID], batch_size: int, *, dry_run: bool
) -> int:
    """Delete what is less important than a limit, in batches; or only count it."""
    parameters = {**scope, "below": _share("below", below)}
    change = _Change("DELETE FROM conversation_memory m USING", "importance < :below", "importance")
    if not dry_run:
        return _in_batches(db, change, parameters, scope, batch_size)
    where = _where(change.chosen, scope)
    statement = _bound(f"SELECT count(*) FROM conversation_memory WHERE {where}")
    with one_read(db) as connection:
        return int(connection.scalar(statement, {**parameters, "tenant": tenant_of(db)}) or 0)


class _Change(NamedTuple):
    """What is done to which memories, in which order."""

    statement: str
    chosen: str
    order: str


def _in_batches(
    db: Session,
    change: _Change,
    parameters: Mapping[str, Any],
    scope: Iterable[str],
    batch_size: int,
) -> int:
    from database.rules import check_number

    size = check_number("batch_size", batch_size, 1, 100_000)
    statement = _bound(
        "WITH batch AS MATERIALIZED (SELECT id FROM conversation_memory"
        f" WHERE {_where(change.chosen, scope)} ORDER BY {change.order}, id LIMIT :batch"
        f" FOR NO KEY UPDATE SKIP LOCKED) {change.statement} batch"
        " WHERE m.tenant_id = :tenant AND m.id = batch.id"
    )
    values = {**parameters, "tenant": tenant_of(db), "batch": size}
    total = 0
    while True:
        with one_write(db) as connection:
            count = connection.execute(statement, values).rowcount
        total += count
        if count < size:
            return total


def _where(chosen: str, scope: Iterable[str]) -> str:
    return " AND ".join(["tenant_id = :tenant", chosen, *(f"{name} = :{name}" for name in scope)])


def _bound(statement: str) -> TextClause:
    types: dict[str, TypeEngine[Any]] = {
        "before": Timestamp(),
        "now": Timestamp(),
        "factor": Double(),
        "below": Double(),
        "user_id": Uuid(),
        "conversation_id": Uuid(),
    }
    used = [name for name in types if f":{name}" in statement]
    found = (bindparam(name, type_=types[name]) for name in used)
    return text(statement).bindparams(*found)


def _share(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidValueError(field, "must be a number from 0 to 1")
    return float(value)
