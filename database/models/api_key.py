"""Keys by which programs act for a user."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, LargeBinary, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from database.models.base import Str32, Str255, TenantModel, owned_by, rule

__all__ = ["ApiKey"]


class ApiKey(TenantModel):
    """A key, of which only the SHA-256 and a prefix to recognise it by are kept.

    `revoked_at` is when it ends: in the future while a rotated key has its grace.
    """

    __tablename__ = "api_keys"
    __table_args__ = (
        owned_by("user_id", "users"),
        UniqueConstraint("tenant_id", "key_hash"),
        Index(None, "tenant_id", "user_id"),
        CheckConstraint("octet_length(key_hash) = 32", name="key_hash"),
    )

    user_id: Mapped[UUID]
    name: Mapped[Str255 | None] = mapped_column(default=None)
    key_hash: Mapped[bytes] = mapped_column(
        LargeBinary, repr=False, info=rule(min_length=32, max_length=32)
    )
    prefix: Mapped[Str32]
    last_used_at: Mapped[datetime | None] = mapped_column(default=None)
    expires_at: Mapped[datetime | None] = mapped_column(default=None)
    revoked_at: Mapped[datetime | None] = mapped_column(default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the loaded fields, ready for JSON, without `key_hash`."""
        shown = super().to_dict()
        shown.pop("key_hash", None)
        return shown
