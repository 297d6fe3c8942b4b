"""What modules remember between turns."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from database.models.base import Str32, Str255, TenantModel, owned_by, rule
from database.types import utcnow

__all__ = ["State"]


class State(TenantModel):
    """A value of a conversation.

    Unique by conversation, persona, module, stage and key, where None counts as a value.
    """

    __tablename__ = "conversation_states"
    __table_args__ = (
        owned_by("conversation_id", "conversations"),
        owned_by("persona_id", "personas"),
        owned_by("module_id", "modules"),
        UniqueConstraint(
            "tenant_id",
            "conversation_id",
            "persona_id",
            "module_id",
            "execution_stage",
            "state_key",
            name="uq_conversation_states_key",
            postgresql_nulls_not_distinct=True,
        ),
        Index(None, "tenant_id", "persona_id", postgresql_where=text("persona_id IS NOT NULL")),
        Index(None, "tenant_id", "module_id", postgresql_where=text("module_id IS NOT NULL")),
        CheckConstraint("state_key <> ''", name="state_key"),
        CheckConstraint("version > 0", name="version"),
    )

    conversation_id: Mapped[UUID]
    persona_id: Mapped[UUID | None] = mapped_column(default=None)
    module_id: Mapped[UUID | None] = mapped_column(default=None)
    execution_stage: Mapped[Str32 | None] = mapped_column(default=None)
    state_key: Mapped[Str255] = mapped_column(info=rule(min_length=1))
    state_value: Mapped[Any] = mapped_column(JSONB(none_as_null=False), repr=False)
    execution_metadata: Mapped[dict[str, Any] | None] = mapped_column(default=None, repr=False)
    executed_at: Mapped[datetime] = mapped_column(
        default_factory=utcnow, server_default=text("now()")
    )
    version: Mapped[int] = mapped_column(
        default=1, server_default=text("1"), onupdate=text("version + 1"), info=rule(ge=1)
    )

    module_name: ClassVar[str | None] = None
    persona_name: ClassVar[str | None] = None
    """Of a state that `get_all` returned: the names of its module and its persona."""
