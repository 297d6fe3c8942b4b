"""Reading the messages of a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import bindparam, case, select

from database.models.message import Message
from database.repositories.loading import fetch, read, shape_of
from database.session import tenant_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

__all__ = ["BODIES", "MESSAGES", "OF_CONVERSATION", "Body", "read_bodies", "read_messages"]


class Body(NamedTuple):
    """What a framework needs of a message: its own form of it, or else the text.

    Attributes:
        content: The text; None where there is `data`.
    """

    position: int
    role: str
    content: str | None
    tool_call_id: str | None
    data: bytes | None
    data_format: str | None


MESSAGES = shape_of(Message, "conversation_id")
OF_CONVERSATION = (
    Message.tenant_id == bindparam("tenant"),
    Message.conversation_id == bindparam("conversation"),
)
BODIES = select(
    Message.position,
    Message.role,
    case((Message.data.is_(None), Message.content)),
    Message.tool_call_id,
    Message.data,
    Message.data_format,
)


def read_messages(
    db: Session, statement: Select[Any], conversation: UUID, parameters: Mapping[str, Any]
) -> list[Message]:
    """Run a statement made of `MESSAGES` over a conversation; return its messages in order."""
    bound = {"tenant": tenant_of(db), "conversation": conversation, **parameters}
    return read(db, MESSAGES, statement, bound, conversation_id=conversation)


def read_bodies(
    db: Session, statement: Select[Any], conversation: UUID, parameters: Mapping[str, Any]
) -> list[Body]:
    """Run a statement made of `BODIES` over a conversation."""
    bound = {"tenant": tenant_of(db), "conversation": conversation, **parameters}
    return [*map(Body._make, fetch(db, statement, bound))]
