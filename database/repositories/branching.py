"""Branches of a conversation: which there are, and where its history goes on."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from sqlalchemy import BigInteger, Uuid, bindparam, func, select, text, true
from sqlalchemy.dialects.postgresql import ARRAY

from database.errors import InvalidValueError, NotFoundError
from database.models.message import Message
from database.repositories.bookkeeping import PREVIEW, lock, move_head, recount
from database.repositories.histories import (
    MESSAGES,
    OF_CONVERSATION,
    read_history,
    read_messages,
    read_path,
)
from database.repositories.links import before, is_followed, unlink
from database.repositories.loading import read, shape_of
from database.repositories.paths import shared_ranges
from database.session import tenant_of
from database.types import Timestamp, utcnow
from database.units import one_read, transaction

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy.orm import Session

    from database.models.conversation import Conversation

__all__ = [
    "Branch",
    "branch_at",
    "branches_of",
    "locked",
    "message_id_of",
    "message_in",
    "newest_after",
    "newest_of",
    "newest_shown",
    "pop",
    "segments_of",
]

_SHAPE = shape_of(Message)
_BY_ID = _SHAPE.select.where(
    Message.tenant_id == bindparam("tenant"), Message.id == bindparam("id")
)
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

_END = 2**62
_SHARED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A way that a conversation's history has gone.

    Attributes:
        head: Its newest message.
        start: The position of the first message that is its own.
        parent_id: What that follows; None if nothing.
        is_active: Whether the history ends with it.
    """

    head: Message
    start: int
    parent_id: UUID | None
    is_active: bool


class _Segment(NamedTuple):
    """Messages that follow one another by position, and what the first of them follows."""

    start: int
    end: int
    parent_id: UUID | None = None
    parent_conversation: UUID | None = None
    parent_position: int = 0


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
    if newest := _newest_in(db, conversation.id, ranges):
        return newest[-1]
    if is_shared and conversation.forked_at_id is not None:
        return message_in(db, conversation, conversation.forked_at_id)
    return message


def branches_of(db: Session, conversation: Conversation) -> list[Branch]:
    """Return the branches of a conversation, the newest first."""
    heads: list[tuple[Message, int, UUID | None]] = []
    segments = segments_of(db, conversation.id)
    found = _newest_in(db, conversation.id, [(one.start, one.end) for one in segments])
    # Where later segments go on from: the last place in each segment, and in what a fork shares.
    continued: dict[int, int] = {}
    for number, segment in reversed([*enumerate(segments)]):
        newest = found.pop() if found and found[-1].position >= segment.start else None
        if newest is not None and continued.get(number, 0) < newest.position:
            heads.append((newest, segment.start, segment.parent_id))
        elif newest is None and number not in continued:
            continue
        place = _SHARED
        if segment.parent_conversation == conversation.id:
            place = bisect(segments, segment.parent_position, key=attrgetter("start")) - 1
        continued[place] = max(continued.get(place, 0), segment.parent_position)
    if conversation.forked_at_id is not None:
        heads += _shared_branch(db, conversation, continued.get(_SHARED, 0))
    active = _active_head(db, conversation, [head.id for head, *_ in heads])
    return [
        Branch(head=head, start=start, parent_id=parent, is_active=head.id == active)
        for head, start, parent in heads
    ]


def _shared_branch(
    db: Session, conversation: Conversation, continued: int
) -> Iterator[tuple[Message, int, None]]:
    """Yield the newest of what a fork shares, unless its own messages go on from there."""
    ranges = shared_ranges(db, conversation.id)
    if not ranges or continued >= ranges[0].end:
        return
    for head in read_path(db, ranges[0].last_id, {"limit": 1}):
        if head.position > continued:
            yield head, next(part.start for part in ranges if part.holds(head)), None


def _active_head(db: Session, conversation: Conversation, heads: Sequence[UUID]) -> UUID | None:
    """Return which of the heads of branches, the newest first, the history ends with."""
    if not conversation.is_branched:
        return heads[0] if heads else None
    if conversation.head_id is None or conversation.head_id in heads:
        return conversation.head_id
    # It is hidden, or the history was taken back to it.
    return next((shown.id for shown in read_path(db, conversation.head_id, {"limit": 1})), None)


def newest_of(db: Session, conversation: Conversation) -> UUID | None:
    """Return the newest message that a conversation has or, as a fork, shares."""
    newest = _newest_in(db, conversation.id, [(1, _END)])
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


def segments_of(db: Session, conversation: UUID) -> list[_Segment]:
    """Return the segments of a conversation's own messages, in order; they leave no gap."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation}
    with one_read(db) as connection:
        rows = connection.execute(_SEGMENTS, parameters).all()
    starts = [(1, None, None, None), *rows] if not rows or rows[0][0] > 1 else rows
    ends = [start - 1 for start, *_ in starts[1:]] + [_END]
    return [
        _Segment(start, end, parent, place, position or 0)
        for (start, parent, place, position), end in zip(starts, ends, strict=True)
    ]


def _newest_in(db: Session, conversation: UUID, spans: Sequence[tuple[int, int]]) -> list[Message]:
    """Return the newest active message of each span of positions that has one, in order."""
    if not spans:
        return []
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    found = read_messages(db, _NEWEST_IN, conversation, {"starts": starts, "ends": ends})
    return sorted(found, key=lambda message: message.position)
