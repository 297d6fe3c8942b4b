"""Long-term notes about a user."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, UniqueConstraint, literal_column, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from database.models.base import Str64, Str255, TenantModel, owned_by, rule
from database.models.searchable import words_of_json

__all__ = ["Context"]


class Context(TenantModel):
    """A note of a type; one with a source is unique in (user, type, source)."""

    __tablename__ = "contexts"
    __table_args__ = (
        owned_by("user_id", "users"),
        UniqueConstraint(
            "tenant_id",
            "user_id",
            "context_type",
            "source_identifier",
            name="uq_contexts_source",
        ),
        Index(None, "tenant_id", "user_id", "updated_at", "id"),
        Index(None, "tenant_id", "updated_at", "id"),
        Index(None, "tenant_id", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
        Index(
            "ix_contexts_content",
            "tenant_id",
            "user_id",
            "content",
            postgresql_using="gin",
            postgresql_ops={"content": "jsonb_path_ops"},
        ),
        Index(
            "ix_contexts_substring",
            "tenant_id",
            "user_id",
            literal_column("(content::text)").label("content_text"),
            postgresql_using="gin",
            postgresql_ops={"content_text": "gin_trgm_ops"},
        ),
        Index(
            "ix_contexts_text",
            "tenant_id",
            "user_id",
            text(words_of_json("content")),
            postgresql_using="gin",
        ),
        CheckConstraint("context_type <> ''", name="context_type"),
    )

    user_id: Mapped[UUID]
    context_type: Mapped[Str64] = mapped_column(info=rule(min_length=1))
    source_identifier: Mapped[Str255 | None] = mapped_column(default=None)
    content: Mapped[Any] = mapped_column(JSONB(none_as_null=False), repr=False)
    metadata_: Mapped[dict[str, Any]] = mapped_column(
        "metadata", default_factory=dict, server_default=text("'{}'::jsonb"), repr=False
    )
    expires_at: Mapped[datetime | None] = mapped_column(default=None)

    inserted: ClassVar[bool | None] = None
    """Of a context that `store` returned: whether it is new, and not in the place of an old one."""
