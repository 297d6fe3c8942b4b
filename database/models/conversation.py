"""Threads of messages."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, UniqueConstraint, select, text
from sqlalchemy.orm import Mapped, column_property, mapped_column

from database.models.base import (
    BigInt,
    Str64,
    Str255,
    Str500,
    TenantModel,
    owned_by,
    refers_to,
    rule,
)
from database.models.user import User

__all__ = ["Conversation"]


class Conversation(TenantModel):
    """A conversation; `thread_id` is the application's own name for it, by default its id.

    `message_count`, `last_position`, `last_message` and `updated_at` follow its messages,
    `last_sequence` its memories.

    As long as it is not `is_branched`, its history is all its messages by position. From then on
    the history ends with the message `head_id`, which the next one follows; None: it is empty.
    A fork begins with the history of another conversation up to the message `forked_at_id`;
    `is_shared` tells that forks may show this one's messages.
    `scope` is whose or where it is, for the application to list by: a channel, a project.
    """

    __tablename__ = "conversations"
    __table_args__ = (
        owned_by("user_id", "users"),
        refers_to("persona_id", "personas"),
        refers_to("head_id", "messages"),
        refers_to("forked_at_id", "messages"),
        UniqueConstraint("tenant_id", "thread_id"),
        Index(None, "tenant_id", "user_id", "updated_at", "id"),
        Index(None, "tenant_id", "updated_at", "id"),
        Index(None, "tenant_id", "persona_id", postgresql_where=text("persona_id IS NOT NULL")),
        Index(None, "tenant_id", "head_id", postgresql_where=text("head_id IS NOT NULL")),
        Index(
            None,
            "tenant_id",
            "forked_at_id",
            postgresql_where=text("forked_at_id IS NOT NULL"),
        ),
        Index(
            None,
            "tenant_id",
            "scope",
            "updated_at",
            "id",
            postgresql_where=text("scope IS NOT NULL"),
        ),
        Index(None, "tenant_id", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
        CheckConstraint("thread_id <> ''", name="thread_id"),
        CheckConstraint("message_count >= 0", name="message_count"),
        CheckConstraint("last_position >= 0", name="last_position"),
    )

    thread_id: Mapped[Str255] = mapped_column(default=None, info=rule(min_length=1))
    user_id: Mapped[UUID | None] = mapped_column(default=None)
    persona_id: Mapped[UUID | None] = mapped_column(default=None)
    title: Mapped[Str500 | None] = mapped_column(default=None)
    last_message: Mapped[str | None] = mapped_column(default=None, repr=False)
    message_count: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    last_position: Mapped[BigInt] = mapped_column(default=0, server_default=text("0"))
    last_sequence: Mapped[BigInt] = mapped_column(default=0, server_default=text("0"), repr=False)
    head_id: Mapped[UUID | None] = mapped_column(default=None)
    version: Mapped[int] = mapped_column(
        default=1, server_default=text("1"), onupdate=text("version + 1")
    )
    provider_type: Mapped[Str64 | None] = mapped_column(default=None)
    provider_config: Mapped[dict[str, Any] | None] = mapped_column(default=None, repr=False)
    metadata_: Mapped[dict[str, Any]] = mapped_column(
        "metadata", default_factory=dict, server_default=text("'{}'::jsonb"), repr=False
    )
    expires_at: Mapped[datetime | None] = mapped_column(default=None)
    scope: Mapped[Str255 | None] = mapped_column(default=None, info=rule(min_length=1))
    is_branched: Mapped[bool] = mapped_column(
        default=False, server_default=text("false"), repr=False
    )
    is_shared: Mapped[bool] = mapped_column(default=False, server_default=text("false"), repr=False)
    forked_at_id: Mapped[UUID | None] = mapped_column(default=None, repr=False)

    if TYPE_CHECKING:
        user_email: Mapped[str | None] = mapped_column(init=False)

    def __post_init__(self) -> None:
        self.thread_id = self.thread_id or str(self.id)


Conversation.user_email = column_property(
    select(User.email)
    .where(User.tenant_id == Conversation.tenant_id, User.id == Conversation.user_id)
    .correlate_except(User)
    .scalar_subquery()
)
