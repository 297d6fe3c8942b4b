"""Conversations that a persona opens, with its first message, in one statement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    DateTime,
    Text,
    Uuid,
    bindparam,
    func,
    insert,
    literal,
    literal_column,
    select,
)

from database.models.base import uuid7
from database.models.conversation import Conversation
from database.models.message import Message, Role
from database.models.persona import Persona
from database.models.user import User
from database.repositories.bookkeeping import PREVIEW
from database.repositories.loading import Shape, loaded, shape_of
from database.session import tenant_of
from database.types import utcnow
from database.units import one_write

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session

__all__ = ["EMAIL_OF_WRITTEN", "open_conversation"]

# The names of the columns, not the columns: RETURNING has no FROM that they could be found in.
EMAIL_OF_WRITTEN = (
    select(User.email)
    .where(
        User.tenant_id == literal_column("conversations.tenant_id"),
        User.id == literal_column("conversations.user_id"),
    )
    .scalar_subquery()
)

_TIME = DateTime(timezone=True)
_SAID = {
    "tenant_id": Persona.tenant_id,
    "id": bindparam("first_id", type_=Uuid()),
    "created_at": bindparam("said_at", type_=_TIME),
    "updated_at": bindparam("said_at", type_=_TIME),
    "conversation_id": bindparam("opened", type_=Uuid()),
    "position": literal(1),
    "role": literal(Role.ASSISTANT.value, Text()),
    "content": Persona.first_message,
}
# The message before its conversation: a statement's foreign keys are looked at in the end.
_SPOKEN = (
    insert(Message.__table__)  # type: ignore[arg-type]
    .from_select(
        list(_SAID),
        select(*_SAID.values()).where(
            Persona.tenant_id == bindparam("tenant"),
            Persona.id == bindparam("persona", type_=Uuid()),
            Persona.first_message.is_not(None),
        ),
        include_defaults=False,
    )
    .returning(Message.__table__.c.content)
    .cte("spoken")
)
_COUNT = select(func.count()).select_from(_SPOKEN).scalar_subquery()
_SHAPE: Shape[Conversation] = shape_of(Conversation)
_NAMES = tuple(name for name in _SHAPE.names if name != "user_email")
_OPEN = (
    insert(Conversation.__table__)  # type: ignore[arg-type]
    .values(
        message_count=_COUNT,
        last_position=_COUNT,
        last_message=func.coalesce(
            select(func.left(_SPOKEN.c.content, PREVIEW)).scalar_subquery(),
            bindparam("preview", type_=Text()),
        ),
    )
    .returning(
        *(Conversation.__mapper__.column_attrs[name].columns[0] for name in _NAMES),
        EMAIL_OF_WRITTEN,
    )
)


def open_conversation(db: Session, values: Mapping[str, Any]) -> Conversation:
    """Insert a conversation of checked values, and what its persona says first."""
    now = utcnow()
    tenant = tenant_of(db)
    row = {"id": uuid7(), "created_at": now, "updated_at": now, **values}
    if "metadata_" in row:
        row["metadata"] = row.pop("metadata_")
    parameters = {
        "tenant": tenant,
        "tenant_id": tenant,
        "persona": row["persona_id"],
        "opened": row["id"],
        "first_id": uuid7(),
        "said_at": row["created_at"],
        "preview": row.pop("last_message", None),
        **row,
    }
    with one_write(db) as connection:
        found = connection.execute(_OPEN, parameters).one()
    (made,) = loaded(db, _SHAPE, (*_NAMES, "user_email"), [found], {"tenant_id": tenant})
    return made
