"""What is kept of a conversation once its messages are too many."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from database.models.base import BigInt, Str64, TenantModel, owned_by, refers_to, rule
from database.models.searchable import words_of_text
from database.types import Vector, utcnow

__all__ = ["Memory"]


class Memory(TenantModel):
    """A memory; `sequence` numbers those of one conversation, `importance` lies in [0, 1].

    `first_position` and `last_position` are the range of messages it was made of. The embedding is
    loaded only on request.
    """

    __tablename__ = "conversation_memory"
    __table_args__ = (
        owned_by("conversation_id", "conversations"),
        owned_by("user_id", "users"),
        refers_to("persona_id", "personas"),
        refers_to("first_message_id", "messages"),
        UniqueConstraint("tenant_id", "conversation_id", "sequence"),
        Index(None, "tenant_id", "user_id"),
        Index(None, "tenant_id", "persona_id", postgresql_where=text("persona_id IS NOT NULL")),
        Index(
            None,
            "tenant_id",
            "first_message_id",
            postgresql_where=text("first_message_id IS NOT NULL"),
        ),
        Index(
            "ix_conversation_memory_embedding",
            "embedding",
            postgresql_using="hnsw",
            postgresql_ops={"embedding": "vector_cosine_ops"},
        ),
        Index(
            "ix_conversation_memory_text",
            "tenant_id",
            text(words_of_text("content")),
            postgresql_using="gin",
        ),
        CheckConstraint("importance >= 0 AND importance <= 1", name="importance"),
        CheckConstraint("sequence > 0", name="sequence"),
        CheckConstraint("access_count >= 0", name="access_count"),
        CheckConstraint("message_count >= 0", name="message_count"),
        CheckConstraint(
            "num_nonnulls(first_position, last_position) <> 1"
            " AND first_position > 0 AND first_position <= last_position",
            name="range",
        ),
        # Room on each page for the versions that counting accesses makes: without it each of them
        # is a new entry in all indexes, and one of HNSW costs a millisecond.
        {"postgresql_with": {"fillfactor": 80}},
    )

    conversation_id: Mapped[UUID]
    user_id: Mapped[UUID | None] = mapped_column(default=None)
    persona_id: Mapped[UUID | None] = mapped_column(default=None)
    first_message_id: Mapped[UUID | None] = mapped_column(default=None, repr=False)
    sequence: Mapped[BigInt] = mapped_column(info=rule(ge=1))
    content: Mapped[str] = mapped_column(repr=False)
    memory_type: Mapped[Str64 | None] = mapped_column(default=None)
    importance: Mapped[float] = mapped_column(
        default=0.5, server_default=text("0.5"), info=rule(ge=0, le=1)
    )
    embedding: Mapped[list[float] | None] = mapped_column(
        Vector(), default=None, repr=False, deferred=True
    )
    metadata_: Mapped[dict[str, Any]] = mapped_column(
        "metadata", default_factory=dict, server_default=text("'{}'::jsonb"), repr=False
    )
    last_accessed_at: Mapped[datetime] = mapped_column(
        default_factory=utcnow, server_default=text("now()"), repr=False
    )
    access_count: Mapped[int] = mapped_column(default=0, server_default=text("0"), repr=False)
    first_position: Mapped[BigInt | None] = mapped_column(default=None, repr=False)
    last_position: Mapped[BigInt | None] = mapped_column(default=None, repr=False)
    message_count: Mapped[int | None] = mapped_column(default=None, repr=False)
