"""What a conversation's row says of its messages, brought up to date when they change in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, func, select, update

from database.models.conversation import Conversation
from database.models.message import Message
from database.session import tenant_of
from database.types import utcnow

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

__all__ = ["PREVIEW", "lock", "recount"]

PREVIEW = 200
"""How many characters of the newest message a conversation shows."""

_THE_CONVERSATION = (
    Conversation.tenant_id == bindparam("tenant"),
    Conversation.id == bindparam("conversation"),
)
_ITS_MESSAGES = (
    (Message.tenant_id == Conversation.tenant_id)
    & (Message.conversation_id == Conversation.id)
    & Message.is_active
)
_LOCK = (
    select(Conversation.id)
    .where(*_THE_CONVERSATION)
    .with_for_update()
    .execution_options(names_tenant=True)
)
_RECOUNT = (
    update(Conversation)
    .where(*_THE_CONVERSATION)
    .values(
        message_count=select(func.count()).where(_ITS_MESSAGES).scalar_subquery(),
        last_message=select(func.left(Message.content, PREVIEW))
        .where(_ITS_MESSAGES)
        .order_by(Message.position.desc())
        .limit(1)
        .scalar_subquery(),
        updated_at=bindparam("now"),
    )
    .execution_options(synchronize_session=False, names_tenant=True)
)


def lock(db: Session, conversation: UUID) -> None:
    """Lock a conversation until the transaction ends, as every append does."""
    db.execute(_LOCK, {"tenant": tenant_of(db), "conversation": conversation})


def recount(db: Session, conversation: UUID) -> None:
    """Bring count and preview of a locked conversation in line with its active messages."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation, "now": utcnow()}
    db.execute(_RECOUNT, parameters)
