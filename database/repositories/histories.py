"""Reading the messages of a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam

from database.models.message import Message
from database.repositories.loading import read, shape_of
from database.session import tenant_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

__all__ = ["MESSAGES", "OF_CONVERSATION", "read_messages"]

MESSAGES = shape_of(Message, "conversation_id")
OF_CONVERSATION = (
    Message.tenant_id == bindparam("tenant"),
    Message.conversation_id == bindparam("conversation"),
)


def read_messages(
    db: Session, statement: Select[Any], conversation: UUID, parameters: Mapping[str, Any]
) -> list[Message]:
    """Run a statement made of `MESSAGES` over a conversation; return its messages in order."""
    bound = {"tenant": tenant_of(db), "conversation": conversation, **parameters}
    return read(db, MESSAGES, statement, bound, conversation_id=conversation)
