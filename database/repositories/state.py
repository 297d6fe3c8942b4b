"""States: what modules remember, set by key and compared by version."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from database.errors import ConflictError, InvalidValueError
from database.models.state import State
from database.repositories import state_statements
from database.repositories.base import Repository
from database.repositories.loading import fetch, loaded
from database.repositories.state_keys import (
    ALL,
    KEY,
    LATEST,
    NAMES,
    WITH_NAMES,
    clearing,
    deleting,
    getting,
)
from database.repositories.threads import conversation_id_of
from database.session import tenant_of
from database.types import utcnow
from database.units import one_write

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from sqlalchemy.orm import Session

    from database.repositories.storing import Stored

__all__ = ["StateRepository"]

_OPTIONAL = (*KEY[:-1], "execution_metadata", "executed_at")


class StateRepository(Repository[State]):
    """The states of a tenant's conversations.

    A state has a key, unique in the conversation together with persona, module and stage, where
    None is a value like others: the state of no persona is another one than a persona's. A
    conversation is given by its id or, at the cost of a query more, by its thread_id. One that
    there is not has no states.
    """

    model = State

    @classmethod
    def set(
        cls,
        db: Session,
        conversation_id: UUID | str,
        key: str,
        value: Any,
        *,
        persona_id: UUID | str | None = None,
        module_id: UUID | str | None = None,
        execution_stage: str | None = None,
        execution_metadata: Any = None,
        executed_at: datetime | None = None,
    ) -> State:
        """Set a state, be it there or not, in one statement that concurrent calls can share.

        Args:
            db: The session.
            conversation_id: Whose.
            key: 1 to 255 characters.
            value: Any JSON value, None too.
            persona_id: Of this persona.
            module_id: Of this module.
            execution_stage: Of this stage, at most 32 characters.
            execution_metadata: Any JSON value, about this value: the old one's goes.
            executed_at: When the value was found; None is now.

        Returns:
            The state. Its version is 1 when it is new, and else one more than before.

        Raises:
            InvalidReferenceError: There is no such conversation, persona or module in the tenant.
            InvalidValueError: A field breaks its rule.
        """
        given = {
            "persona_id": persona_id,
            "module_id": module_id,
            "execution_stage": execution_stage,
            "execution_metadata": execution_metadata,
            "executed_at": executed_at,
        }
        return state_statements.put(db, cls._row(db, conversation_id, key, value, given))

    @classmethod
    def set_many(
        cls, db: Session, conversation_id: UUID | str, items: Iterable[Mapping[str, Any]]
    ) -> Stored:
        """Set states of a conversation, all or none, thousands with a statement.

        Args:
            db: The session.
            conversation_id: Whose.
            items: Of each the arguments of `set`, by name. Of several with one key the last stands.

        Returns:
            How many are new, and how many took the place of others.

        Raises:
            As `set`. Nothing is written then.
        """
        conversation = conversation_id_of(db, conversation_id)
        rows = [cls._row_of_item(db, conversation, item) for item in items]
        return state_statements.put_all(db, conversation, rows)

    @classmethod
    def compare_and_set(
        cls,
        db: Session,
        conversation_id: UUID | str,
        key: str,
        value: Any,
        *,
        expected_version: int,
        **options: Any,
    ) -> State:
        """Set a state if nobody has changed it meanwhile, in one statement.

        The other arguments and errors are those of `set`.

        Args:
            db: The session.
            conversation_id: Whose.
            key: Which.
            value: Any JSON value.
            expected_version: The version that it must have; 0 if there must be none.
            options: As for `set`.

        Raises:
            ConflictError: It has another version, or is not there, or is there already.
        """
        from database.rules import check_number

        version = check_number("expected_version", expected_version, 0, 2**31 - 2)
        row = cls._row(db, conversation_id, key, value, options)
        if version == 0:
            state = state_statements.add(db, row)
        else:
            state = state_statements.replace(db, row, version)
        if state is None:
            raise ConflictError(f"state_key: the state is not at version {version}")
        return state

    @classmethod
    def merge(
        cls,
        db: Session,
        conversation_id: UUID | str,
        key: str,
        changes: Mapping[str, Any],
        **options: Any,
    ) -> State:
        """Merge changes into a state's object in the database: concurrent ones all survive.

        JSON Merge Patch (RFC 7396): None deletes a key, objects merge, all else replaces. A state
        that is not there, or is no object, is first an empty one. `changes` is a JSON object; the
        other arguments and the errors are those of `set`.
        """
        if not isinstance(changes, dict):
            raise InvalidValueError("changes", "must be a JSON object")
        return state_statements.merge(db, cls._row(db, conversation_id, key, changes, options))

    @classmethod
    def get(
        cls, db: Session, conversation_id: UUID | str, key: str | None = None, **options: Any
    ) -> State | None:
        """Return the state of a key, or None.

        Without a key, `conversation_id` is the id of the state itself, as in all repositories.
        `options` are persona_id, module_id and execution_stage: None, the default, is none.

        Raises:
            InvalidValueError: An argument is not valid.
        """
        if key is None:
            if options:
                raise InvalidValueError("key", "must be given")
            return super().get(db, conversation_id)
        missing, parameters = cls._key_of(db, conversation_id, key, options)
        return cls._one(db, getting(missing), parameters)

    @classmethod
    def get_all(cls, db: Session, conversation_id: UUID | str) -> builtins.list[State]:
        """Return the states of a conversation in one query, those executed last first.

        Each has the names of its module and its persona as `module_name` and `persona_name`.
        """
        conversation = conversation_id_of(db, conversation_id)
        known = {"tenant_id": tenant_of(db), "conversation_id": conversation}
        parameters = {"tenant": known["tenant_id"], "of_conversation": conversation}
        return loaded(db, WITH_NAMES, NAMES, fetch(db, ALL, parameters), known)

    @classmethod
    def latest_for_module(
        cls, db: Session, conversation_id: UUID | str, module_id: UUID | str
    ) -> State | None:
        """Return the state of a module that was executed last in a conversation, or None."""
        parameters = {
            "tenant": tenant_of(db),
            "of_module_id": cls._id(module_id, "module_id"),
            "of_conversation": conversation_id_of(db, conversation_id),
        }
        return cls._one(db, LATEST, parameters)

    @classmethod
    def delete(
        cls, db: Session, conversation_id: UUID | str, key: str | None = None, **options: Any
    ) -> bool:
        """Delete the state of a key, or without one that of an id; tell whether there was one.

        The arguments are those of `get`.
        """
        if key is None:
            if options:
                raise InvalidValueError("key", "must be given")
            return super().delete(db, conversation_id)
        missing, parameters = cls._key_of(db, conversation_id, key, options)
        with one_write(db) as connection:
            return connection.execute(deleting(missing), parameters).rowcount > 0

    @classmethod
    def clear(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        persona_id: UUID | str | None = None,
        module_id: UUID | str | None = None,
    ) -> int:
        """Delete a conversation's states, or only a persona's or module's; return how many."""
        given = {"persona_id": persona_id, "module_id": module_id}
        only = {name: cls._id(id_, name) for name, id_ in given.items() if id_ is not None}
        parameters = {
            "tenant": tenant_of(db),
            "of_conversation": conversation_id_of(db, conversation_id),
            **{f"of_{name}": id_ for name, id_ in only.items()},
        }
        with one_write(db) as connection:
            return connection.execute(clearing(tuple(only)), parameters).rowcount

    @classmethod
    def _row(
        cls,
        db: Session,
        conversation_id: UUID | str,
        key: str,
        value: Any,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return all columns that a write sets, checked."""
        for name in options:
            if name not in _OPTIONAL:
                raise InvalidValueError(name, "is not an argument")
        given = {name: value for name, value in options.items() if value is not None}
        given |= {
            "state_key": key,
            "state_value": value,
            "conversation_id": conversation_id_of(db, conversation_id),
        }
        defaults = {**dict.fromkeys(_OPTIONAL), "executed_at": utcnow()}
        return defaults | cls._check(db, given)

    @classmethod
    def _row_of_item(cls, db: Session, conversation: UUID, item: Any) -> dict[str, Any]:
        if not isinstance(item, Mapping):
            raise InvalidValueError("items", "must be mappings")
        options = dict(item)
        for name in ("key", "value"):
            if name not in options:
                raise InvalidValueError(f"state_{name}", "must be given")
        return cls._row(db, conversation, options.pop("key"), options.pop("value"), options)

    @classmethod
    def _key_of(
        cls, db: Session, conversation_id: UUID | str, key: str, options: Mapping[str, Any]
    ) -> tuple[frozenset[str], dict[str, Any]]:
        """Return which parts of a key are none, and the parameters for the others."""
        for name in options:
            if name not in KEY[:-1]:
                raise InvalidValueError(name, "is not an argument")
        given = {name: value for name, value in options.items() if value is not None}
        checked = cls._check(db, {**given, "state_key": key}, partial=True)
        parameters = {
            "tenant": tenant_of(db),
            "of_conversation": conversation_id_of(db, conversation_id),
            **{f"of_{name}": value for name, value in checked.items()},
        }
        return frozenset(KEY).difference(checked), parameters
