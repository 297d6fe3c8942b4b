"""The branches of a conversation: where each ends, and which of them the history shows."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from database.repositories.histories import read_path
from database.repositories.paths import shared_ranges
from database.repositories.segments import newest_in, segments_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

    from database.models.conversation import Conversation
    from database.models.message import Message

__all__ = ["Branch", "branches_of"]

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


def branches_of(db: Session, conversation: Conversation) -> list[Branch]:
    """Return the branches of a conversation, the newest first."""
    heads: list[tuple[Message, int, UUID | None]] = []
    segments = segments_of(db, conversation.id)
    found = newest_in(db, conversation.id, [(one.start, one.end) for one in segments])
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
            starts = (part.start for part in ranges if part.holds(head))
            yield head, next(starts, ranges[0].start), None


def _active_head(db: Session, conversation: Conversation, heads: Sequence[UUID]) -> UUID | None:
    """Return which of the heads of branches, the newest first, the history ends with."""
    if not conversation.is_branched:
        return heads[0] if heads else None
    if conversation.head_id is None or conversation.head_id in heads:
        return conversation.head_id
    # It is hidden, or the history was taken back to it.
    return next((shown.id for shown in read_path(db, conversation.head_id, {"limit": 1})), None)
