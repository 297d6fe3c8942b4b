"""Modules, found by name or for a stage."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Text, and_, any_, bindparam, or_, select
from sqlalchemy.dialects.postgresql import ARRAY

from database.errors import InvalidReferenceError, InvalidValueError
from database.models.module import ExecutionContext, Module, ModuleType
from database.models.persona import Persona
from database.repositories.loading import read, shape_of
from database.repositories.named import NamedRepository
from database.repositories.references import references
from database.session import tenant_of
from database.units import one_read

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["ModuleRepository"]

_SHAPE = shape_of(Module)
_IMMEDIATE = Module.execution_context == ExecutionContext.IMMEDIATE
_AFTERWARDS = Module.execution_context == ExecutionContext.POST_RESPONSE
_WITH_AI = Module.requires_ai_inference
_OF_STAGE: dict[int, Any] = {
    1: or_(Module.type == ModuleType.SIMPLE, and_(_IMMEDIATE, ~_WITH_AI), _AFTERWARDS),
    2: and_(_IMMEDIATE, _WITH_AI),
    4: and_(_AFTERWARDS, ~_WITH_AI),
    5: and_(_AFTERWARDS, _WITH_AI),
}
_FOR_STAGE = {
    stage: _SHAPE.select.where(
        Module.tenant_id == bindparam("tenant"), Module.is_active, condition
    ).order_by(Module.stage_priority, Module.name)
    for stage, condition in _OF_STAGE.items()
}
_NAMED = Module.name == any_(bindparam("names", type_=ARRAY(Text)))
_FOR_STAGE_OF_PERSONA = {stage: found.where(_NAMED) for stage, found in _FOR_STAGE.items()}
_TEMPLATE = select(Persona.template).where(
    Persona.tenant_id == bindparam("tenant"), Persona.id == bindparam("persona")
)


class ModuleRepository(NamedRepository[Module]):
    """The modules of a tenant. Their scripts are stored, never executed.

    Deleting a module deletes its states.
    """

    model = Module

    @classmethod
    def for_stage(
        cls, db: Session, stage: int, *, persona_id: UUID | str | None = None
    ) -> builtins.list[Module]:
        """Return the active modules of a stage, by stage_priority, then name.

        Args:
            db: The session.
            stage: 1, before the answer: those that are simple, or IMMEDIATE without AI, or
                POST_RESPONSE, whose states are shown. 2: IMMEDIATE with AI. After the answer,
                POST_RESPONSE: 4 without AI, 5 with AI.
            persona_id: Only those that the template of this persona itself refers to.

        Raises:
            InvalidReferenceError: There is no such persona in the tenant.
            InvalidValueError: There is no such stage.
        """
        if type(stage) is not int or stage not in _OF_STAGE:
            raise InvalidValueError("stage", "must be 1, 2, 4 or 5")
        parameters: dict[str, Any] = {"tenant": tenant_of(db)}
        if persona_id is None:
            return read(db, _SHAPE, _FOR_STAGE[stage], parameters)
        persona = {**parameters, "persona": cls._id(persona_id, "persona_id")}
        with one_read(db) as connection:
            template = connection.scalar(_TEMPLATE, persona)
        if template is None:
            raise InvalidReferenceError("persona_id")
        parameters["names"] = references(template)
        if not parameters["names"]:
            return []
        return read(db, _SHAPE, _FOR_STAGE_OF_PERSONA[stage], parameters)
