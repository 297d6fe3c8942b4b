"""People who talk to an application."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from database.models.base import Str255, TenantModel, rule

__all__ = ["User"]


class User(TenantModel):
    """A user of one tenant; `email` is unique in it, stored in lower case."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("tenant_id", "email"),
        CheckConstraint("email = lower(email) AND position('@' in email) > 1", name="email"),
        Index(None, "tenant_id", "created_at", "id"),
    )

    email: Mapped[Str255 | None] = mapped_column(
        default=None, info=rule(pattern=r"^[^@\s]+@[^@\s]+$")
    )
    username: Mapped[Str255 | None] = mapped_column(default=None)
    first_name: Mapped[Str255 | None] = mapped_column(default=None)
    last_name: Mapped[Str255 | None] = mapped_column(default=None)
    is_admin: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    is_active: Mapped[bool] = mapped_column(default=True, server_default=text("true"))
    settings: Mapped[dict[str, Any]] = mapped_column(
        default_factory=dict, server_default=text("'{}'::jsonb"), repr=False
    )
    last_active_at: Mapped[datetime | None] = mapped_column(default=None)
