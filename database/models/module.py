"""Parts that a persona's template refers to by name."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import CheckConstraint, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from database.models.base import Str64, Str500, TenantModel, rule
from database.types import enum_type

__all__ = ["ExecutionContext", "Module", "ModuleType"]


class ModuleType(StrEnum):
    """Whether a module is text alone, or has a script."""

    SIMPLE = "simple"
    ADVANCED = "advanced"


class ExecutionContext(StrEnum):
    """When a module's script runs."""

    IMMEDIATE = "IMMEDIATE"
    POST_RESPONSE = "POST_RESPONSE"
    ON_DEMAND = "ON_DEMAND"


class Module(TenantModel):
    """A module; scripts are stored, never executed here."""

    __tablename__ = "modules"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        Index(None, "tenant_id", "created_at", "id"),
        CheckConstraint("name ~ '^[a-z][a-z0-9_]{0,49}$'", name="name"),
    )

    name: Mapped[Str64] = mapped_column(info=rule(pattern=r"^[a-z][a-z0-9_]{0,49}$"))
    description: Mapped[str | None] = mapped_column(default=None, repr=False)
    content: Mapped[str | None] = mapped_column(default=None, repr=False)
    type: Mapped[ModuleType] = mapped_column(
        enum_type(ModuleType, "type"),
        default=ModuleType.SIMPLE,
        server_default=text("'simple'"),
    )
    trigger_pattern: Mapped[Str500 | None] = mapped_column(default=None)
    script: Mapped[str | None] = mapped_column(default=None, repr=False)
    execution_context: Mapped[ExecutionContext] = mapped_column(
        enum_type(ExecutionContext, "execution_context"),
        default=ExecutionContext.ON_DEMAND,
        server_default=text("'ON_DEMAND'"),
    )
    requires_ai_inference: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    stage_priority: Mapped[int] = mapped_column(default=100, server_default=text("100"))
    script_analysis_metadata: Mapped[dict[str, Any] | None] = mapped_column(
        default=None, repr=False
    )
    is_active: Mapped[bool] = mapped_column(default=True, server_default=text("true"))
