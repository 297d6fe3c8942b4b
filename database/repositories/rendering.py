"""Templates with their modules and variables put in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import Text, Uuid, any_, bindparam, or_, select, text
from sqlalchemy.dialects.postgresql import ARRAY

from database.errors import InvalidValueError
from database.models.state import State
from database.repositories.loading import fetch
from database.repositories.references import Part, parts_of
from database.session import tenant_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from uuid import UUID

    from sqlalchemy.orm import Session

__all__ = ["MAX_RENDERED", "Plan", "load_sources", "load_variables"]

MAX_RENDERED = 10_000_000
"""How many characters a template may become; each piece of it counts as one more."""

_VARIABLES = "variables"

# All that a template may need, however deeply nested, in one statement. What it takes for a
# reference may be an escaped one or an address: it finds too much, never too little. OFFSET 0 keeps
# the planner from reading all modules again for each level, where it has no statistics.
_SOURCES = text(r"""
WITH RECURSIVE source (name, content) AS (
    SELECT CAST(NULL AS text), template FROM personas WHERE tenant_id = :tenant AND id = :persona
    UNION
    SELECT found.name, found.content
    FROM source
    CROSS JOIN LATERAL (
        SELECT DISTINCT substring(left(piece, 50) FROM '^[a-z][a-z0-9_]*') AS name
        FROM string_to_table(source.content, '@') AS piece
    ) AS used
    CROSS JOIN LATERAL (
        SELECT CAST(module.name AS text) AS name, module.content FROM modules AS module
        WHERE module.tenant_id = :tenant AND module.name = used.name
            AND module.is_active AND module.type = 'simple'
        OFFSET 0
    ) AS found
)
SELECT name, content FROM source""").bindparams(bindparam("persona", type_=Uuid()))
_VALUES = (
    select(State.state_key, State.state_value)
    .where(
        State.tenant_id == bindparam("tenant"),
        State.conversation_id == bindparam("conversation"),
        or_(State.persona_id == bindparam("persona"), State.persona_id.is_(None)),
        State.state_key == any_(bindparam("keys", type_=ARRAY(Text))),
    )
    .order_by(State.persona_id.is_not(None), State.executed_at, State.id)
)


def load_sources(db: Session, persona: UUID) -> dict[str | None, str]:
    """Return the contents of the modules that may be needed by name, the template under None."""
    rows = fetch(db, _SOURCES, {"tenant": tenant_of(db), "persona": persona})
    return {name: content or "" for name, content in rows}


def load_variables(
    db: Session, persona: UUID, conversation: UUID, names: Collection[str]
) -> dict[str, str]:
    """Return the texts of those of the variables that a conversation's states have."""
    parameters = {
        "tenant": tenant_of(db),
        "conversation": conversation,
        "persona": persona,
        "keys": [*names, _VARIABLES],
    }
    rows = fetch(db, _VALUES, parameters)
    found: dict[str, Any] = {}
    for key, value in rows:
        if key == _VARIABLES and isinstance(value, dict):
            found |= value
    found |= dict(map(tuple, rows))
    return {name: _shown(found[name]) for name in names if name in found}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


class Plan:
    """A template and the modules that it really uses, those used by others first.

    Attributes:
        variables: The names of the variables, those of the modules too.

    Raises:
        InvalidValueError: A module refers to itself, directly or by others.
    """

    def __init__(self, sources: Mapping[str | None, str]) -> None:
        self._parts: dict[str | None, list[Part]] = {}
        self._order: list[str | None] = []
        self.variables: set[str] = set()
        # No recursion: modules may be nested more deeply than calls.
        path: dict[str | None, Iterator[str]] = {None: self._enter(None, sources)}
        while path:
            name, uses = path.popitem()
            used = next(uses, None)
            if used is None:
                self._order.append(name)
                continue
            path[name] = uses
            if used in path:
                names = [str(one) for one in path]
                cycle = " -> ".join([*names[names.index(used) :], used])
                raise InvalidValueError("content", f"modules must not refer to themselves: {cycle}")
            if used not in self._parts:
                path[used] = self._enter(used, sources)

    def _enter(self, name: str | None, sources: Mapping[str | None, str]) -> Iterator[str]:
        parts = []
        for part in parts_of(sources[name]):
            if part.variable is not None:
                self.variables.add(part.variable)
            # A reference to what is not there is text.
            known = part.module is None or part.module in sources
            parts.append(part if known else Part(part.text))
        self._parts[name] = parts
        return iter(dict.fromkeys(part.module for part in parts if part.module is not None))

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the text with values for variables; what has none stays as it stands.

        Raises:
            InvalidValueError: It would be longer than `MAX_RENDERED`.
        """
        self._check_length(values)
        pieces = []
        open_ = [iter(self._parts[None])]
        while open_:
            for part in open_[-1]:
                if part.module is not None:
                    open_.append(iter(self._parts[part.module]))
                    break
                pieces.append(_filled(part, values))
            else:
                open_.pop()
        return "".join(pieces)

    def _check_length(self, values: Mapping[str, str]) -> None:
        # Ten modules that use the next one ten times each are a text of 10,000,000,000 pieces.
        lengths: dict[str | None, int] = {}
        for name in self._order:
            lengths[name] = sum(
                1 + (len(_filled(part, values)) if part.module is None else lengths[part.module])
                for part in self._parts[name]
            )
        if lengths[None] > MAX_RENDERED:
            rule = f"must become at most {MAX_RENDERED:,} characters"
            raise InvalidValueError("template", rule)


def _filled(part: Part, values: Mapping[str, str]) -> str:
    return part.text if part.variable is None else values.get(part.variable, part.text)
