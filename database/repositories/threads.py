"""Conversations named by their id or by their thread."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import bindparam, select

from database.errors import InvalidValueError
from database.models.base import uuid7
from database.models.conversation import Conversation
from database.session import tenant_of
from database.units import one_read

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["conversation_id_of"]

# Not the nil UUID, which an import may bring along.
_NOWHERE = uuid7()
_RESOLVE = (
    select(Conversation.id)
    .where(
        Conversation.tenant_id == bindparam("tenant"),
        (Conversation.thread_id == bindparam("thread")) | (Conversation.id == bindparam("id")),
    )
    # A thread may bear the name of another conversation's id.
    .order_by((Conversation.thread_id == bindparam("thread")).desc())
)


def conversation_id_of(db: Session, conversation_id: UUID | str) -> UUID:
    """Return the id of a conversation given by id, or by its id's text or thread_id in one query.

    For a text that names none it is an id that none has.

    Raises:
        InvalidValueError: It is neither a UUID nor text.
    """
    if isinstance(conversation_id, UUID):
        return conversation_id
    if not isinstance(conversation_id, str):
        raise InvalidValueError("conversation_id", "must be a UUID or a thread_id")
    try:
        candidate: UUID | None = UUID(conversation_id)
    except ValueError:
        candidate = None
    parameters = {"tenant": tenant_of(db), "thread": conversation_id, "id": candidate}
    with one_read(db) as connection:
        found = connection.scalar(_RESOLVE, parameters)
    return found or candidate or _NOWHERE
