"""Users found by an identity elsewhere, or made together with one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam

from database.errors import AlreadyExistsError, InvalidReferenceError
from database.models.identity import Identity
from database.models.user import User
from database.repositories.base import Repository
from database.repositories.identity import IdentityRepository
from database.repositories.loading import shape_of
from database.session import tenant_of
from database.types import check_text, utcnow
from database.units import transaction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from sqlalchemy.orm import Session

    from database.pagination import Page

__all__ = ["UserIdentities"]

_BY_IDENTITY = (
    shape_of(User)
    .select.join(Identity, (Identity.tenant_id == User.tenant_id) & (Identity.user_id == User.id))
    .where(
        Identity.tenant_id == bindparam("tenant"),
        Identity.provider == bindparam("provider"),
        Identity.subject == bindparam("subject"),
    )
)


class UserIdentities(Repository[User]):
    """What `UserRepository` does by identities."""

    model = User

    @classmethod
    def get_by_identity(cls, db: Session, provider: str, subject: str) -> User | None:
        """Return the user whom a provider knows under a subject, or None."""
        parameters = {
            "tenant": tenant_of(db),
            "provider": check_text("provider", provider),
            "subject": check_text("subject", subject),
        }
        return cls._one(db, _BY_IDENTITY, parameters)

    @classmethod
    def get_or_create_by_identity(
        cls,
        db: Session,
        provider: str,
        subject: str,
        *,
        email: str | None = None,
        username: str | None = None,
        first_name: str | None = None,
        last_name: str | None = None,
        data: dict[str, Any] | None = None,
        link_to: UUID | str | None = None,
    ) -> User:
        """Return the user of an identity, made together with it if there was none.

        What is given of a known user, and the identity's `data`, replaces what is stored;
        `last_active_at` is set. An equal address alone never links an identity to a user.

        Args:
            db: The session.
            provider: Who knows the user.
            subject: As whom; text, also where it is a number.
            email: The user's address.
            username: The user's name for others.
            first_name: The first name.
            last_name: The last name.
            data: What else the provider says.
            link_to: The user that an unknown identity is linked to, instead of a new one.

        Raises:
            AlreadyExistsError: The address, or with `link_to` the identity, belongs to another
                user.
            InvalidReferenceError: `link_to` is no user of the tenant.
            InvalidValueError: A field breaks its rule.
        """
        given = {
            "email": email,
            "username": username,
            "first_name": first_name,
            "last_name": last_name,
        }
        fields: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        fields["last_active_at"] = utcnow()
        owner = None if link_to is None else cls._id(link_to, "link_to")
        identity = {"provider": provider, "subject": subject, "data": data}
        known = cls._refresh(db, identity, fields, owner)
        if known is not None:
            return known
        try:
            return cls._link(db, identity, fields, owner)
        except AlreadyExistsError:
            # Of the identity, or of the address that another call made together with it.
            known = cls._refresh(db, identity, fields, owner)
            if known is None:
                raise
            return known

    @classmethod
    def list_identities(
        cls, db: Session, provider: str, *, limit: int = 50, cursor: str | None = None
    ) -> Page[Identity]:
        """Return a page of the identities of a provider, newest first."""
        named = check_text("provider", provider)
        return IdentityRepository.list(db, limit=limit, cursor=cursor, provider=named)

    @classmethod
    def _refresh(
        cls,
        db: Session,
        identity: Mapping[str, Any],
        fields: Mapping[str, Any],
        owner: UUID | None,
    ) -> User | None:
        """Bring a known identity and its user up to date; None when it is unknown."""
        provider, subject, data = identity["provider"], identity["subject"], identity["data"]
        if data is None:
            found = cls.get_by_identity(db, provider, subject)
            return None if found is None else cls._renew(db, found.id, fields, owner)
        with transaction(db):
            known = IdentityRepository.set_data(db, provider, subject, data)
            return None if known is None else cls._renew(db, known.user_id, fields, owner)

    @classmethod
    def _renew(
        cls, db: Session, user_id: UUID, fields: Mapping[str, Any], owner: UUID | None
    ) -> User:
        if owner not in (None, user_id):
            raise AlreadyExistsError("provider, subject")
        return cls.update(db, user_id, **fields)

    @classmethod
    def _link(
        cls,
        db: Session,
        identity: Mapping[str, Any],
        fields: Mapping[str, Any],
        owner: UUID | None,
    ) -> User:
        """Make an identity, of a new user or of its owner."""
        with transaction(db):
            if owner is None:
                user = cls.create(db, **fields)
            elif (found := cls._update(db, owner, User.id, fields)) is not None:
                user = found
            else:
                raise InvalidReferenceError("link_to")
            given = {name: value for name, value in identity.items() if value is not None}
            IdentityRepository.create(db, user_id=user.id, **given)
            return user
