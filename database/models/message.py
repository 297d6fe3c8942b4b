"""What was said in a conversation."""

from __future__ import annotations

from enum import StrEnum
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, LargeBinary, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from database.models.base import (
    BigInt,
    Json,
    Str64,
    Str255,
    TenantModel,
    owned_by,
    refers_to,
    rule,
)
from database.models.searchable import words_of_text
from database.types import enum_type

__all__ = ["Message", "Role"]


class Role(StrEnum):
    """Who speaks."""

    USER = "user"
    ASSISTANT = "assistant"
    SYSTEM = "system"
    TOOL = "tool"


class Message(TenantModel):
    """A message; `position` numbers the messages of its conversation from 1, without gaps.

    `parent_id` None means that it follows the message before it by position; it is set where a
    message follows another one, as the first of a branch does, and is its own id where it follows
    none though others are before it.
    """

    __tablename__ = "messages"
    __table_args__ = (
        owned_by("conversation_id", "conversations"),
        refers_to("parent_id", "messages"),
        UniqueConstraint("tenant_id", "conversation_id", "position"),
        Index(None, "tenant_id", "parent_id", postgresql_where=text("parent_id IS NOT NULL")),
        Index(
            "ix_messages_branches",
            "tenant_id",
            "conversation_id",
            "position",
            postgresql_where=text("parent_id IS NOT NULL"),
        ),
        Index(
            "uq_messages_idempotency_key",
            "tenant_id",
            "conversation_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        # An expression, not a stored column: rows stay narrow, and appends cheaper.
        Index(
            "ix_messages_text",
            "tenant_id",
            text(words_of_text("content")),
            postgresql_using="gin",
        ),
        CheckConstraint("position > 0", name="position"),
        CheckConstraint("input_tokens >= 0", name="input_tokens"),
        CheckConstraint("output_tokens >= 0", name="output_tokens"),
    )

    conversation_id: Mapped[UUID]
    parent_id: Mapped[UUID | None] = mapped_column(default=None, repr=False)
    position: Mapped[BigInt] = mapped_column(info=rule(ge=1))
    role: Mapped[Role] = mapped_column(enum_type(Role, "role"))
    content: Mapped[str] = mapped_column(repr=False)
    thinking: Mapped[str | None] = mapped_column(default=None, repr=False)
    extra_data: Mapped[Json | None] = mapped_column(default=None, repr=False)
    data: Mapped[bytes | None] = mapped_column(LargeBinary, default=None, repr=False)
    data_format: Mapped[Str64 | None] = mapped_column(default=None)
    run_id: Mapped[Str255 | None] = mapped_column(default=None)
    tool_call_id: Mapped[Str255 | None] = mapped_column(default=None)
    model: Mapped[Str255 | None] = mapped_column(default=None)
    input_tokens: Mapped[int | None] = mapped_column(default=None, info=rule(ge=0))
    output_tokens: Mapped[int | None] = mapped_column(default=None, info=rule(ge=0))
    is_active: Mapped[bool] = mapped_column(default=True, server_default=text("true"))
    idempotency_key: Mapped[Str255 | None] = mapped_column(default=None, info=rule(min_length=1))
