"""How a user is known elsewhere."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from database.models.base import Str64, Str255, TenantModel, owned_by, rule

__all__ = ["Identity"]


class Identity(TenantModel):
    """A user's subject at a provider: a Google `sub`, a Telegram id; text, whatever its size."""

    __tablename__ = "identities"
    __table_args__ = (
        owned_by("user_id", "users"),
        UniqueConstraint("tenant_id", "provider", "subject"),
        Index(None, "tenant_id", "user_id"),
        CheckConstraint("provider <> ''", name="provider"),
        CheckConstraint("subject <> ''", name="subject"),
    )

    user_id: Mapped[UUID]
    provider: Mapped[Str64] = mapped_column(info=rule(min_length=1))
    subject: Mapped[Str255] = mapped_column(info=rule(min_length=1))
    data: Mapped[dict[str, Any]] = mapped_column(
        default_factory=dict, server_default=text("'{}'::jsonb"), repr=False
    )
