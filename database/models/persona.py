"""Characters that an assistant plays."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import CheckConstraint, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from database.models.base import Str32, Str255, Str500, TenantModel, rule
from database.types import enum_type

__all__ = ["Persona", "PersonaMode"]


class PersonaMode(StrEnum):
    """Whether a persona only answers, or also acts by itself."""

    REACTIVE = "reactive"
    AUTONOMOUS = "autonomous"


class Persona(TenantModel):
    """A persona: its prompt template, and what it says first."""

    __tablename__ = "personas"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        Index(None, "tenant_id", "created_at", "id"),
        CheckConstraint("name <> ''", name="name"),
        CheckConstraint(
            "loop_frequency IS NULL OR (mode = 'autonomous'"
            r" AND loop_frequency ~ '^[0-9]+(\.[0-9]+)?$' AND loop_frequency ~ '[1-9]')",
            name="loop_frequency",
            info={"rule": "must be a positive number, of an autonomous persona"},
        ),
    )

    name: Mapped[Str255] = mapped_column(info=rule(min_length=1))
    description: Mapped[str | None] = mapped_column(default=None, repr=False)
    template: Mapped[str] = mapped_column(repr=False)
    mode: Mapped[PersonaMode] = mapped_column(
        enum_type(PersonaMode, "mode"),
        default=PersonaMode.REACTIVE,
        server_default=text("'reactive'"),
    )
    loop_frequency: Mapped[Str32 | None] = mapped_column(
        default=None, info=rule(pattern=r"^(?:0*[1-9]\d*(?:\.\d+)?|0+\.\d*[1-9]\d*)$")
    )
    first_message: Mapped[str | None] = mapped_column(default=None, repr=False)
    image_path: Mapped[Str500 | None] = mapped_column(default=None)
    extra_data: Mapped[dict[str, Any] | None] = mapped_column(default=None, repr=False)
    is_active: Mapped[bool] = mapped_column(default=True, server_default=text("true"))
