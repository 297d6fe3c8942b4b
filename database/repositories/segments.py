"""Segments of a conversation: its messages as far as each follows the one in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from sqlalchemy import BigInteger, Uuid, bindparam, func, select, text, true
from sqlalchemy.dialects.postgresql import ARRAY

from database.models.message import Message
from database.repositories.histories import MESSAGES, OF_CONVERSATION, read_messages
from database.session import tenant_of
from database.units import one_read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

__all__ = ["END", "Segment", "newest_in", "segments_of"]

_SPANS = (
    func.unnest(
        bindparam("starts", type_=ARRAY(BigInteger)), bindparam("ends", type_=ARRAY(BigInteger))
    )
    .table_valued("start", "end", name="span")
    .render_derived()
)
_NEWEST = (
    MESSAGES.select.where(
        *OF_CONVERSATION, Message.is_active, Message.position.between(_SPANS.c.start, _SPANS.c.end)
    )
    .order_by(Message.position.desc())
    .limit(1)
    .lateral("newest")
)
_NEWEST_IN = select(*_NEWEST.c).select_from(_SPANS.join(_NEWEST, true()))
_SEGMENTS = text("""
SELECT first.position, before.id, before.conversation_id, before.position
FROM messages AS first
LEFT JOIN messages AS before
    ON before.tenant_id = :tenant AND before.id = first.parent_id AND before.id <> first.id
WHERE first.tenant_id = :tenant AND first.conversation_id = :conversation
    AND first.parent_id IS NOT NULL
ORDER BY first.position
""").bindparams(bindparam("conversation", type_=Uuid()))

END = 2**62
"""Behind every position."""


class Segment(NamedTuple):
    """Messages that follow one another by position, and what the first of them follows."""

    start: int
    end: int
    parent_id: UUID | None = None
    parent_conversation: UUID | None = None
    parent_position: int = 0


def segments_of(db: Session, conversation: UUID) -> list[Segment]:
    """Return the segments of a conversation's own messages, in order; they leave no gap."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation}
    with one_read(db) as connection:
        rows = connection.execute(_SEGMENTS, parameters).all()
    starts = [(1, None, None, None), *rows] if not rows or rows[0][0] > 1 else rows
    ends = [start - 1 for start, *_ in starts[1:]] + [END]
    return [
        Segment(start, end, parent, place, position or 0)
        for (start, parent, place, position), end in zip(starts, ends, strict=True)
    ]


def newest_in(db: Session, conversation: UUID, spans: Sequence[tuple[int, int]]) -> list[Message]:
    """Return the newest active message of each span of positions that has one, in order."""
    if not spans:
        return []
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    found = read_messages(db, _NEWEST_IN, conversation, {"starts": starts, "ends": ends})
    return sorted(found, key=lambda message: message.position)
