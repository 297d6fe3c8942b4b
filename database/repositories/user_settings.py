"""A user's settings: read, and merged by JSON Merge Patch in the database."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, func, select, update

from database.errors import InvalidValueError, NotFoundError
from database.models.user import User
from database.repositories.statements import OPTIONS
from database.session import tenant_of
from database.types import Serialized, dump_json
from database.units import one_read, one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from pydantic import BaseModel
    from sqlalchemy.orm import Session

__all__ = ["get", "merge"]

_IS_USER = (User.tenant_id == bindparam("tenant"), User.id == bindparam("key"))
_MERGED = func.merge_patch(
    User.settings, bindparam("changes", type_=User.settings.type), type_=User.settings.type
)
_GET = select(User.settings).where(*_IS_USER).execution_options(**OPTIONS)
_LOCK_AND_MERGE = (
    select(_MERGED).where(*_IS_USER).with_for_update(key_share=True).execution_options(**OPTIONS)
)
_MERGE = (
    update(User)
    .where(*_IS_USER)
    .values(settings=_MERGED)
    .returning(User)
    .execution_options(synchronize_session=False, **OPTIONS)
)


def get(db: Session, user_id: UUID) -> dict[str, Any]:
    """Return the settings of a user, as `UserRepository.get_settings` says."""
    with one_read(db):
        found = db.scalars(_GET, {"tenant": tenant_of(db), "key": user_id}).one_or_none()
    return _required(found)


def merge(
    db: Session, user_id: UUID, changes: dict[str, Any], model: type[BaseModel] | None
) -> dict[str, Any]:
    """Merge changes into the settings, as `UserRepository.update_settings` says."""
    policy = db.get_bind().get_execution_options()["unstorable"]
    if not isinstance(changes, dict):
        raise InvalidValueError("changes", "must be a JSON object")
    parameters = {
        "tenant": tenant_of(db),
        "key": user_id,
        "changes": Serialized(dump_json(changes, "changes", policy)),
    }
    if model is None:
        return _merge(db, parameters)
    # pydantic takes 100 ms to import.
    from database.rules import refusal_of

    with transaction(db):
        with one_read(db):
            merged = _required(db.scalars(_LOCK_AND_MERGE, parameters).one_or_none())
        refusal = refusal_of(model, merged, "settings")
        if refusal is None:
            return _merge(db, parameters)
    # Not within the unit, which has changed nothing: to undo it would expire the session's rows.
    raise refusal


def _merge(db: Session, parameters: Mapping[str, Any]) -> dict[str, Any]:
    with one_write(db):
        user = db.scalars(_MERGE, parameters).one_or_none()
    # A copy: what the caller does with it must not look like a change of the row.
    return deepcopy(_required(None if user is None else user.settings))


def _required(settings: dict[str, Any] | None) -> dict[str, Any]:
    if settings is None:
        raise NotFoundError("User: no such row in this tenant")
    return settings
