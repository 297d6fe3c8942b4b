"""How users are known elsewhere."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

from sqlalchemy import Uuid, any_, bindparam, delete, update
from sqlalchemy.dialects.postgresql import ARRAY

from database.models.identity import Identity
from database.repositories.base import Repository
from database.repositories.loading import read, shape_of
from database.repositories.statements import OPTIONS
from database.session import tenant_of
from database.types import check_text
from database.units import one_write

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    from sqlalchemy.orm import Session

__all__ = ["IdentityRepository"]

_IS_SUBJECT = (
    Identity.tenant_id == bindparam("tenant"),
    Identity.provider == bindparam("known_provider"),
    Identity.subject == bindparam("known_subject"),
)
_BY_SUBJECT = shape_of(Identity).select.where(*_IS_SUBJECT)
_OF_USERS = (
    shape_of(Identity)
    .select.where(
        Identity.tenant_id == bindparam("tenant"),
        Identity.user_id == any_(bindparam("users", type_=ARRAY(Uuid()))),
    )
    .order_by(Identity.created_at, Identity.id)
)
_SET_DATA = (
    update(Identity)
    .where(*_IS_SUBJECT)
    .values(data=bindparam("new_data", type_=Identity.data.type))
    .returning(Identity)
    .execution_options(synchronize_session=False, **OPTIONS)
)
_UNLINK = (
    delete(Identity)
    .where(*_IS_SUBJECT)
    .returning(Identity.id)
    .execution_options(synchronize_session=False, names_tenant=True)
)


class IdentityRepository(Repository[Identity]):
    """The identities of a tenant's users; `create(db, user_id=...)` links one more to a user."""

    model = Identity

    @classmethod
    def get_by_subject(cls, db: Session, provider: str, subject: str) -> Identity | None:
        """Return what a provider knows under a subject, or None."""
        return cls._one(db, _BY_SUBJECT, _key(db, provider, subject))

    @classmethod
    def of_users(cls, db: Session, user_ids: Iterable[UUID | str]) -> builtins.list[Identity]:
        """Return all identities of some users, the oldest first."""
        users = [cls._id(user_id, "user_ids") for user_id in user_ids]
        return read(db, shape_of(Identity), _OF_USERS, {"tenant": tenant_of(db), "users": users})

    @classmethod
    def set_data(
        cls, db: Session, provider: str, subject: str, data: dict[str, Any]
    ) -> Identity | None:
        """Replace what a provider says about a subject; return the identity, or None."""
        parameters: dict[str, Any] = _key(db, provider, subject)
        parameters["new_data"] = cls._check(db, {"data": data}, partial=True)["data"]
        with one_write(db):
            return db.scalars(_SET_DATA, parameters).one_or_none()

    @classmethod
    def unlink(cls, db: Session, provider: str, subject: str) -> bool:
        """Delete an identity, not its user; tell whether there was one."""
        parameters = _key(db, provider, subject)
        with one_write(db):
            return db.scalar(_UNLINK, parameters) is not None


def _key(db: Session, provider: str, subject: str) -> dict[str, str]:
    return {
        "tenant": tenant_of(db),
        "known_provider": check_text("provider", provider),
        "known_subject": check_text("subject", subject),
    }
