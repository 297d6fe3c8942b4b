"""Where the history of a conversation goes on."""

from __future__ import annotations

from bisect import bisect
from operator import itemgetter
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import Uuid, bindparam, text

from database.errors import InvalidValueError, NotFoundError
from database.models.message import Message
from database.repositories.bookkeeping import PREVIEW, lock, move_head, recount
from database.repositories.histories import (
    read_history,
)
from database.repositories.links import before, is_followed, unlink
from database.repositories.loading import read, shape_of
from database.repositories.paths import shared_ranges
from database.repositories.segments import END, newest_in, segments_of
from database.session import tenant_of
from database.types import Timestamp, utcnow
from database.units import transaction

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from database.models.conversation import Conversation

__all__ = [
    "branch_at",
    "locked",
    "message_id_of",
    "message_in",
    "newest_after",
    "newest_of",
    "newest_shown",
    "pop",
]

_SHAPE = shape_of(Message)
_BY_ID = _SHAPE.select.where(
    Message.tenant_id == bindparam("tenant"), Message.id == bindparam("id")
)
_POP = text(f"""
WITH popped AS (DELETE FROM messages WHERE tenant_id = :tenant AND id = :id)
UPDATE conversations
SET message_count = message_count - 1, updated_at = :now, version = version + 1, last_message = (
    SELECT left(content, {PREVIEW}) FROM messages
    WHERE tenant_id = :tenant AND conversation_id = :conversation AND is_active AND id <> :id
    ORDER BY position DESC LIMIT 1)
WHERE tenant_id = :tenant AND id = :conversation
""").bindparams(
    bindparam("id", type_=Uuid()),
    bindparam("conversation", type_=Uuid()),
    bindparam("now", type_=Timestamp()),
)


def locked(db: Session, conversation: UUID) -> Conversation:
    """Lock a conversation until the transaction ends and return it.

    Raises:
        NotFoundError: There is none.
    """
    found = lock(db, conversation)
    if found is None:
        msg = "Conversation: no such row in this tenant"
        raise NotFoundError(msg)
    return found


def message_in(
    db: Session, conversation: Conversation, at: Message | UUID | str | int, field: str = "at"
) -> Message:
    """Return a message that a conversation has, or that it shares as a fork.

    Args:
        db: The session.
        conversation: Which.
        at: The message, its id, or its position in the history.
        field: What an error names.

    Raises:
        NotFoundError: The conversation has no such message.
        InvalidValueError: It is none of these.
    """
    if isinstance(at, int) and not isinstance(at, bool):
        found = read_history(db, conversation.id, {"start": at, "end": at})
    else:
        parameters = {"tenant": tenant_of(db), "id": message_id_of(at, field)}
        found = read(db, _SHAPE, _BY_ID, parameters)
    for message in found:
        if message.conversation_id == conversation.id:
            return message
        # What it shares now: a fork's entity may be older than the deletion of what it began with.
        if conversation.forked_at_id is not None and any(
            part.holds(message) for part in shared_ranges(db, conversation.id)
        ):
            return message
    msg = f"{field}: the conversation has no such message"
    raise NotFoundError(msg)


def message_id_of(message: object, field: str) -> UUID:
    """Return the id of a message given by itself or by its id.

    Raises:
        InvalidValueError: It is neither.
    """
    if isinstance(message, Message):
        return message.id
    if isinstance(message, UUID):
        return message
    try:
        return UUID(message)  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError):
        raise InvalidValueError(field, "must be a message or its UUID") from None


def branch_at(db: Session, conversation: UUID, at: Message | UUID | str | int | None) -> None:
    """Let the history end with a message that the conversation has; with None it is empty."""
    with transaction(db):
        found = locked(db, conversation)
        head = None if at is None else message_in(db, found, at)
        _end_with(db, found, head)


def _end_with(db: Session, conversation: Conversation, head: Message | None) -> None:
    is_newest = head is not None and head.position == conversation.last_position
    if conversation.is_branched or not is_newest:
        move_head(db, conversation.id, head.id if head else None)
        recount(db, conversation.id, forks=False)


def newest_shown(db: Session, conversation: UUID) -> Message | None:
    """Return the newest active message of a conversation's history, or None."""
    return next(iter(read_history(db, conversation, {"limit": 1})), None)


def newest_after(db: Session, conversation: UUID, through: Message | UUID | str | int) -> None:
    """Let the history run through a message, up to the newest that came of it."""
    with transaction(db):
        found = locked(db, conversation)
        message = message_in(db, found, through, "message_id")
        _end_with(db, found, _descendant(db, found, message))


def _descendant(db: Session, conversation: Conversation, message: Message) -> Message:
    is_shared = message.conversation_id != conversation.id
    ranges: list[tuple[int, int]] = []
    for segment in segments_of(db, conversation.id):
        if segment.start <= message.position <= segment.end and not is_shared:
            ranges.append((message.position, segment.end))
        elif segment.parent_conversation == conversation.id:
            n = bisect(ranges, segment.parent_position, key=itemgetter(0)) - 1
            if n >= 0 and segment.parent_position <= ranges[n][1]:
                ranges.append((segment.start, segment.end))
        elif is_shared and segment.parent_position >= message.position:
            # What a fork shares is one way: all that comes later on it came of the message.
            ranges.append((segment.start, segment.end))
    if newest := newest_in(db, conversation.id, ranges):
        return newest[-1]
    if is_shared and conversation.forked_at_id is not None:
        return message_in(db, conversation, conversation.forked_at_id)
    return message


def newest_of(db: Session, conversation: Conversation) -> UUID | None:
    """Return the newest message that a conversation has or, as a fork, shares."""
    newest = newest_in(db, conversation.id, [(1, END)])
    return newest[0].id if newest else conversation.forked_at_id


def pop(db: Session, conversation: Conversation, newest: Message) -> None:
    """Take the newest message off the history of a locked conversation.

    It is deleted where nothing else shows it.
    """
    if (
        newest.conversation_id != conversation.id
        or conversation.is_shared
        or (conversation.is_branched and is_followed(db, newest.id))
    ):
        move_head(db, conversation.id, before(db, newest.id))
        recount(db, conversation.id, forks=False)
        return
    if conversation.is_branched:
        unlink(db, newest.id)
    parameters = {"tenant": tenant_of(db), "conversation": conversation.id, "now": utcnow()}
    db.execute(_POP, {**parameters, "id": newest.id})
    if conversation.is_branched:
        recount(db, conversation.id)
