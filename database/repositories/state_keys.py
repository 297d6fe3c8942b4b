"""The statements that find states, each built once."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete

from database.models.module import Module
from database.models.persona import Persona
from database.models.state import State
from database.repositories.loading import Shape, shape_of

if TYPE_CHECKING:
    from sqlalchemy import Delete, Select

__all__ = [
    "ALL",
    "KEY",
    "LATEST",
    "NAMES",
    "WITH_NAMES",
    "clearing",
    "deleting",
    "getting",
    "of_key",
]

KEY = ("persona_id", "module_id", "execution_stage", "state_key")
"""What names a state within its conversation."""

_OF_CONVERSATION = (
    State.tenant_id == bindparam("tenant"),
    State.conversation_id == bindparam("of_conversation"),
)
_NEWEST = (State.executed_at.desc(), State.id.desc())

LATEST = (
    shape_of(State)
    .select.where(*_OF_CONVERSATION, State.module_id == bindparam("of_module_id"))
    .order_by(*_NEWEST)
    .limit(1)
)
WITH_NAMES: Shape[State] = shape_of(State, "conversation_id")
NAMES = (*WITH_NAMES.names, "module_name", "persona_name")
"""The attributes of what `ALL` selects."""
ALL = (
    WITH_NAMES.select.add_columns(Module.name, Persona.name)
    .outerjoin(Module, (Module.tenant_id == State.tenant_id) & (Module.id == State.module_id))
    .outerjoin(Persona, (Persona.tenant_id == State.tenant_id) & (Persona.id == State.persona_id))
    .where(*_OF_CONVERSATION)
    .order_by(*_NEWEST)
)


def of_key(missing: frozenset[str]) -> tuple[Any, ...]:
    """Return the conditions on a state's key, of which the missing parts are NULL.

    IS NOT DISTINCT FROM would do for all, but uses no index.
    """
    return (
        *_OF_CONVERSATION,
        *(
            getattr(State, name).is_(None)
            if name in missing
            else getattr(State, name) == bindparam(f"of_{name}")
            for name in KEY
        ),
    )


@cache
def getting(missing: frozenset[str]) -> Select[Any]:
    """Selects the state of a key, as the model's shape."""
    return shape_of(State).select.where(*of_key(missing))


@cache
def deleting(missing: frozenset[str]) -> Delete:
    """Deletes the state of a key."""
    return delete(State).where(*of_key(missing)).execution_options(names_tenant=True)


@cache
def clearing(names: tuple[str, ...]) -> Delete:
    """Deletes the states of a conversation that have given values."""
    only = (getattr(State, name) == bindparam(f"of_{name}") for name in names)
    return delete(State).where(*_OF_CONVERSATION, *only).execution_options(names_tenant=True)
