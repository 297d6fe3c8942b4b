"""What a conversation's row says of its messages, brought up to date when they change in place."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Uuid, bindparam, func, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY

from database.models.conversation import Conversation
from database.models.message import Message
from database.repositories.loading import read, shape_of
from database.repositories.paths import HEAD, along, path_to
from database.session import tenant_of
from database.types import utcnow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from uuid import UUID

    from sqlalchemy import ScalarSelect, Update
    from sqlalchemy.orm import Session
    from sqlalchemy.sql.dml import ReturningUpdate

__all__ = [
    "PREVIEW",
    "correct_counts",
    "lock",
    "lock_forks",
    "locked_forks",
    "move_head",
    "recount",
]

PREVIEW = 200
"""How many characters of the newest message a conversation shows."""

_SHAPE = shape_of(Conversation)
_THE_CONVERSATION = (
    Conversation.tenant_id == bindparam("tenant"),
    Conversation.id == bindparam("conversation"),
)
_LOCK = _SHAPE.select.where(*_THE_CONVERSATION).with_for_update(of=Conversation)
_MOVE_HEAD = (
    update(Conversation)
    .where(*_THE_CONVERSATION)
    .values(head_id=bindparam("head"), is_branched=True)
    .execution_options(synchronize_session=False, names_tenant=True)
)
_FORKS = text("""
WITH RECURSIVE fork AS (
    SELECT fork.id, 1 AS depth FROM conversations AS fork
    JOIN messages AS shared ON shared.tenant_id = :tenant AND shared.id = fork.forked_at_id
    WHERE fork.tenant_id = :tenant AND shared.conversation_id = ANY(:conversations)
    UNION
    SELECT later.id, fork.depth + 1 FROM fork
    JOIN messages AS shared ON shared.tenant_id = :tenant AND shared.conversation_id = fork.id
    JOIN conversations AS later ON later.tenant_id = :tenant AND later.forked_at_id = shared.id
) CYCLE id SET is_again USING way
SELECT id FROM fork WHERE id <> ALL(:conversations) GROUP BY id ORDER BY max(depth), id
""").bindparams(bindparam("conversations", type_=ARRAY(Uuid())))
_BRANCHED = (
    select(Conversation.id)
    .where(
        Conversation.tenant_id == bindparam("tenant"),
        Conversation.user_id == bindparam("user"),
        Conversation.is_branched,
    )
    .execution_options(names_tenant=True)
)


def lock(db: Session, conversation: UUID) -> Conversation | None:
    """Lock a conversation until the transaction ends, as every append does, and return it."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation}
    return next(iter(read(db, _SHAPE, _LOCK, parameters)), None)


def move_head(db: Session, conversation: UUID, head: UUID | None) -> None:
    """Let the history of a locked conversation end with a message; it is a branched one then."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation, "head": head}
    db.execute(_MOVE_HEAD, parameters)


def locked_forks(db: Session, conversations: Sequence[UUID]) -> Iterator[Conversation]:
    """Lock the forks of locked conversations, then theirs, each by id; yield each."""
    parameters = {"tenant": tenant_of(db), "conversations": conversations}
    seen: set[UUID] = set()
    # Again, until there is no other one: a fork that was deleted while this waited for its lock has
    # left what it shared to forks of its own.
    forks = _FORKS.columns(id=Uuid())
    while new := [id_ for id_ in db.scalars(forks, parameters) if id_ not in seen]:
        seen.update(new)
        yield from filter(None, (lock(db, fork) for fork in new))


def lock_forks(db: Session, conversation: UUID) -> None:
    """Lock the forks of a locked conversation, and theirs: they may link to its messages."""
    for _ in locked_forks(db, [conversation]):
        pass


def recount(db: Session, conversation: UUID, *, forks: bool = True) -> None:
    """Bring count and preview in line with the active messages of a locked conversation's history.

    So with those of its forks, which may show the same messages.
    """
    parameters = {"tenant": tenant_of(db), "conversation": conversation, "now": utcnow()}
    shared = db.execute(_recounting(branched=False), parameters).scalar_one_or_none()
    if shared is None:
        shared = db.execute(_recounting(branched=True), parameters).scalar_one_or_none()
    if shared and forks:
        for fork in locked_forks(db, [conversation]):
            recount(db, fork.id, forks=False)


def correct_counts(db: Session, user: UUID) -> None:
    """Bring a user's conversations in line that count other messages than they show.

    Forks do that were imported without what they share. When they changed, and how often, stays.
    """
    for conversation in db.scalars(_BRANCHED, {"tenant": tenant_of(db), "user": user}).all():
        db.execute(_correcting(), {"tenant": tenant_of(db), "conversation": conversation})


@cache
def _recounting(*, branched: bool) -> ReturningUpdate[bool]:
    count, preview = _shown(branched=branched)
    return (
        update(Conversation)
        .where(*_THE_CONVERSATION, Conversation.is_branched.is_(branched))
        .values(message_count=count, last_message=preview, updated_at=bindparam("now"))
        .returning(Conversation.is_shared)
        .execution_options(synchronize_session=False, names_tenant=True)
    )


@cache
def _correcting() -> Update:
    count, preview = _shown(branched=True)
    kept = {"updated_at": Conversation.updated_at, "version": Conversation.version}
    return (
        update(Conversation)
        .where(*_THE_CONVERSATION, Conversation.message_count != count)
        .values(message_count=count, last_message=preview, **kept)
        .execution_options(synchronize_session=False, names_tenant=True)
    )


def _shown(*, branched: bool) -> tuple[ScalarSelect[int], ScalarSelect[str]]:
    """Return how many messages a conversation's history has, and the preview of the newest."""
    messages = select(Message.content, Message.position).where(Message.is_active)
    if branched:
        where, part = along(path_to(HEAD), messages)
        shown: Any = select(part.c.content, part.c.position).select_from(where).subquery()
    else:
        shown = messages.where(
            Message.tenant_id == bindparam("tenant"),
            Message.conversation_id == bindparam("conversation"),
        ).subquery()
    newest = select(func.left(shown.c.content, PREVIEW)).order_by(shown.c.position.desc()).limit(1)
    count = select(func.count()).select_from(shown)
    return count.scalar_subquery(), newest.scalar_subquery()
