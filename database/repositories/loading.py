"""Messages of a session made straight from rows: SQLAlchemy's loader, without its generality.

Reading a history is the most frequent thing that a chat application does. What the loader does for
each query and row, for relationships, inheritance and events that messages do not have, costs more
than the query itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, select
from sqlalchemy.orm.attributes import instance_state

from database.models.message import Message, Role
from database.session import tenant_of
from database.units import one_read

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

__all__ = ["MESSAGES", "loaded", "read"]

# The tenant and the conversation are known, and parsing a UUID is what a row costs most.
_KNOWN = ("tenant_id", "conversation_id")
_COLUMNS = [column for column in Message.__table__.columns if column.name not in _KNOWN]
_NAMES = tuple(column.name for column in _COLUMNS)
_ROLES = {role.value: role for role in Role}
_new_instance = inspect(Message).class_manager.new_instance

MESSAGES: Select[Any] = select(*_COLUMNS)
"""Selects what `read` needs; the caller adds tenant, conversation and order."""


def read(
    db: Session, statement: Select[Any], conversation: UUID, parameters: Mapping[str, Any]
) -> list[Message]:
    """Run a statement made of `MESSAGES` over a conversation; return its messages in order."""
    tenant = tenant_of(db)
    bound = {"tenant": tenant, "conversation": conversation, **parameters}
    with one_read(db) as connection:
        result = connection.execute(statement, bound)
        assert result.cursor is not None
        rows = result.cursor.fetchall()
        result.close()
        return loaded(db, _NAMES, rows, {"tenant_id": tenant, "conversation_id": conversation})


def loaded(
    db: Session, names: Sequence[str], rows: Iterable[Sequence[Any]], known: Mapping[str, Any]
) -> list[Message]:
    """Return the session's entities of rows: new ones, or those it has, brought up to date.

    Args:
        db: The session; the entities are persistent in it.
        names: The columns of the rows, the id first.
        rows: The values, as the database has them.
        known: What all rows have in common; with `names` all columns of a message.
    """
    messages = []
    tenant = known["tenant_id"]
    identities = db.identity_map
    for row in rows:
        key = (Message, (tenant, row[0]), None)
        found = identities.get(key)
        message = found or _new_instance()
        values = message.__dict__
        values.update(zip(names, row, strict=True))
        values.update(known)
        values["role"] = _ROLES[values["role"]]
        if found is None:
            state = instance_state(message)
            state.key = key
            state.session_id = db.hash_key
            identities.add(state)
        else:
            # Ends what was expired or changed before, as the loader's populate_existing does.
            instance_state(message)._commit_all(values, identities)  # noqa: SLF001
        messages.append(message)
    return messages
