"""What of a conversation is in memories already, and what comes next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Uuid, any_, bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY

from database.models.memory import Memory
from database.models.message import Message
from database.repositories.histories import MESSAGES, OF_CONVERSATION, read_messages
from database.repositories.loading import shape_of
from database.session import tenant_of
from database.units import one_read

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

__all__ = ["RECENT", "MemoryStatus", "covered", "status", "window"]


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """How much of a conversation is in memories.

    Attributes:
        memories: How many there are.
        messages: How many active messages the conversation has.
        covered: How many of these are in the range of a memory.
        last_position: The last position that is in one; 0 if none is.
        next_sequence: The number of the next memory.
    """

    memories: int
    messages: int
    covered: int
    last_position: int
    next_sequence: int


RECENT = (
    shape_of(Memory)
    .select.where(
        Memory.tenant_id == bindparam("tenant"), Memory.conversation_id == bindparam("conversation")
    )
    .order_by(Memory.sequence.desc())
    .limit(bindparam("limit"))
)
"""Selects the newest memories of a conversation, as the model's shape."""

_IN_A_MEMORY = (
    select(Memory.id)
    .where(
        Memory.tenant_id == Message.tenant_id,
        Memory.conversation_id == Message.conversation_id,
        Message.position.between(Memory.first_position, Memory.last_position),
    )
    .exists()
)
_COVERED = select(Message.id).where(
    *OF_CONVERSATION,
    Message.id == any_(bindparam("ids", type_=ARRAY(Uuid()))),
    _IN_A_MEMORY,
)
_WINDOW = (
    MESSAGES.select.where(*OF_CONVERSATION, Message.is_active)
    .order_by(Message.position.desc())
    .limit(bindparam("limit"))
    .offset(bindparam("offset"))
)
_STATUS = text("""
SELECT (SELECT count(*) FROM conversation_memory m
        WHERE m.tenant_id = c.tenant_id AND m.conversation_id = c.id),
    c.message_count,
    (SELECT count(*) FROM messages t
        WHERE t.tenant_id = c.tenant_id AND t.conversation_id = c.id AND t.is_active AND EXISTS (
            SELECT FROM conversation_memory m
            WHERE m.tenant_id = t.tenant_id AND m.conversation_id = t.conversation_id
            AND t.position BETWEEN m.first_position AND m.last_position)),
    coalesce((SELECT max(m.last_position) FROM conversation_memory m
        WHERE m.tenant_id = c.tenant_id AND m.conversation_id = c.id), 0),
    c.last_sequence + 1
FROM conversations c WHERE c.tenant_id = :tenant AND c.id = :conversation""").bindparams(
    bindparam("conversation", type_=Uuid())
)


def covered(db: Session, conversation: UUID, ids: Sequence[UUID]) -> set[UUID]:
    """Return those of the messages that are in the range of a memory."""
    if not ids:
        return set()
    parameters = {"tenant": tenant_of(db), "conversation": conversation, "ids": list(ids)}
    with one_read(db) as connection:
        return set(connection.scalars(_COVERED, parameters))


def window(db: Session, conversation: UUID, start: int, end: int) -> list[Message]:
    """Return the active messages from the `start`-th to the `end`-th newest, oldest first."""
    from database.rules import check_number

    first = check_number("start", start, 1, 2**31)
    last = check_number("end", end, first, 2**31)
    found = read_messages(
        db, _WINDOW, conversation, {"limit": last - first + 1, "offset": first - 1}
    )
    return found[::-1]


def status(db: Session, conversation: UUID) -> MemoryStatus | None:
    """Return the status of a conversation, or None if there is none such."""
    with one_read(db) as connection:
        parameters = {"tenant": tenant_of(db), "conversation": conversation}
        row = connection.execute(_STATUS, parameters).one_or_none()
    return None if row is None else MemoryStatus(*row)
