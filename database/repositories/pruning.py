"""Deleting a branch: the messages that lead to its end and to nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Uuid, any_, bindparam, delete, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY

from database.models.message import Message
from database.repositories.histories import OF_CONVERSATION
from database.repositories.segments import segments_of
from database.session import tenant_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

    from database.models.conversation import Conversation

__all__ = ["prune"]

_BETWEEN = Message.position.between(bindparam("start"), bindparam("end"))
_POSITIONS = select(Message.position).where(
    *OF_CONVERSATION, Message.id == any_(bindparam("ids", type_=ARRAY(Uuid())))
)
# To where forks can go back: what they share ends there, or goes on with a message of their own.
_FORKED = text("""
SELECT position FROM messages AS item
WHERE tenant_id = :tenant AND conversation_id = :conversation
    AND (EXISTS (SELECT FROM conversations WHERE tenant_id = :tenant AND forked_at_id = item.id)
        OR EXISTS (SELECT FROM messages AS later WHERE later.tenant_id = :tenant
            AND later.parent_id = item.id AND later.conversation_id <> :conversation))
""").bindparams(bindparam("conversation", type_=Uuid()))
_LAST = select(func.max(Message.position)).where(*OF_CONVERSATION, _BETWEEN)
_DELETE = (
    delete(Message)
    .where(*OF_CONVERSATION, _BETWEEN)
    .execution_options(synchronize_session=False, names_tenant=True)
)


def prune(db: Session, conversation: Conversation, head: Message, keep: Sequence[UUID]) -> int:
    """Delete what leads only to a head of a locked conversation; return how many messages.

    Its history stays, what forks show, and what leads to the messages to keep.
    """
    if head.conversation_id != conversation.id:
        return 0
    bound = {"tenant": tenant_of(db), "conversation": conversation.id}
    segments = segments_of(db, conversation.id)
    kept = {*db.scalars(_POSITIONS, {**bound, "ids": [*keep, conversation.head_id]})}
    if conversation.is_shared:
        kept |= {*db.scalars(_FORKED, bound)}
    deleted, end = 0, head.position
    while end:
        segment = next(one for one in segments if one.start <= end <= one.end)
        parents = {s.parent_position for s in segments if s.parent_conversation == conversation.id}
        within = [place for place in kept | parents if segment.start <= place <= segment.end]
        start = max(within, default=segment.start - 1) + 1
        last = db.scalar(_LAST, {**bound, "start": segment.start, "end": segment.end})
        if start > end or last != end:
            break
        span = {"start": start, "end": end}
        deleted += db.connection().execute(_DELETE, {**bound, **span}).rowcount
        if start > segment.start:
            break
        segments.remove(segment)
        is_own = segment.parent_conversation == conversation.id
        end = segment.parent_position if is_own else 0
    return deleted
