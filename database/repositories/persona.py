"""Personas, and their templates rendered."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import Uuid, bindparam, text

from database.errors import NotFoundError
from database.models.persona import Persona
from database.repositories.named import NamedRepository
from database.repositories.rendering import Plan, load_sources, load_variables
from database.repositories.threads import conversation_id_of
from database.units import one_write

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["PersonaRepository"]

# The foreign keys would do it; Citus cannot.
_DELETE = text("""
WITH conversation AS (
    UPDATE conversations SET persona_id = NULL WHERE tenant_id = :tenant AND persona_id = :key
), memory AS (
    UPDATE conversation_memory SET persona_id = NULL WHERE tenant_id = :tenant AND persona_id = :key
)
DELETE FROM personas WHERE tenant_id = :tenant AND id = :key RETURNING id
""").bindparams(bindparam("key", type_=Uuid()))


class PersonaRepository(NamedRepository[Persona]):
    """The personas of a tenant.

    A `loop_frequency` belongs to an autonomous persona: to make one reactive, set it to None along
    with the mode.
    """

    model = Persona

    @classmethod
    def render(
        cls,
        db: Session,
        persona_id: UUID | str,
        *,
        conversation_id: UUID | str | None = None,
    ) -> str:
        r"""Return a persona's template with its modules and variables put in.

        `@name` becomes the content of the active simple module of that name, in which the same
        holds; `${name}` the value of a state of the conversation, text as it is, other JSON
        compact. `\@` and `\$` become `@` and `$`. What there is no such module or state for stays
        as it stands. Values are never looked through for references. Nothing is executed.

        A variable is the state of that key, of this persona or of none, or else a member of an
        object stored under the key "variables". Of several the persona's own counts, then the one
        executed last.

        Args:
            db: The session.
            persona_id: Whose.
            conversation_id: Whose states, by id or thread_id; None or an unknown one has none.

        Raises:
            NotFoundError: There is no such persona in the tenant.
            InvalidValueError: Modules refer to each other in a cycle, which it names, or the text
                would be longer than 10,000,000 characters.
        """
        persona = cls._id(persona_id, "persona_id")
        sources = load_sources(db, persona)
        if None not in sources:
            raise NotFoundError("Persona: no such row in this tenant")
        plan = Plan(sources)
        values = {}
        if conversation_id is not None and plan.variables:
            conversation = conversation_id_of(db, conversation_id)
            values = load_variables(db, persona, conversation, plan.variables)
        return plan.fill(values)

    @classmethod
    def delete(cls, db: Session, id: UUID | str, /) -> bool:  # noqa: A002
        """Delete a persona and its states; tell whether there was one.

        Conversations, messages and memories stay, without the persona.
        """
        with one_write(db) as connection:
            return connection.scalar(_DELETE, cls._key(db, id)) is not None
