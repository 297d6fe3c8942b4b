"""Users, found by their address or by an identity elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, select, update
from sqlalchemy.dialects.postgresql import insert

from database.errors import AlreadyExistsError
from database.models.identity import Identity
from database.models.user import User
from database.repositories.base import Repository
from database.repositories.erasing import erase_user
from database.repositories.exporting import export_user
from database.repositories.identity import IdentityRepository
from database.repositories.statements import OPTIONS
from database.session import tenant_of
from database.types import check_text, utcnow
from database.units import one_read, one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping
    from uuid import UUID

    from sqlalchemy.orm import Session

__all__ = ["UserRepository", "normalized_email"]

_BY_EMAIL = (
    select(User)
    .where(User.tenant_id == bindparam("tenant"), User.email == bindparam("email"))
    .execution_options(**OPTIONS)
)
_BY_IDENTITY = (
    select(User)
    .join(Identity, (Identity.tenant_id == User.tenant_id) & (Identity.user_id == User.id))
    .where(
        Identity.tenant_id == bindparam("tenant"),
        Identity.provider == bindparam("provider"),
        Identity.subject == bindparam("subject"),
    )
    .execution_options(**OPTIONS)
)
_INSERT_NEW = (
    insert(User)
    .on_conflict_do_nothing(index_elements=["tenant_id", "email"])
    .returning(User)
    .execution_options(**OPTIONS)
)
_TOUCH = (
    update(User)
    .where(User.tenant_id == bindparam("tenant"), User.id == bindparam("key"))
    .values(last_active_at=bindparam("now"), updated_at=bindparam("now"))
    .returning(User.id)
    .execution_options(synchronize_session=False, names_tenant=True)
)


class UserRepository(Repository[User]):
    """The users of a tenant. Addresses are compared without case and surrounding blanks."""

    model = User
    order = "created_at"

    @classmethod
    def get_by_email(cls, db: Session, email: str) -> User | None:
        """Return the user of an address, or None."""
        with one_read(db):
            parameters = {"tenant": tenant_of(db), "email": normalized_email(email)}
            return db.scalars(_BY_EMAIL, parameters).one_or_none()

    @classmethod
    def get_or_create(cls, db: Session, email: str) -> User:
        """Return the user of an address, made if there was none; safe against concurrent calls.

        Raises:
            InvalidValueError: `email` is no address.
        """
        found = cls.get_by_email(db, email)
        if found is not None:
            return found
        values = cls._check(db, {"email": email})
        with one_write(db):
            made = db.scalars(_INSERT_NEW, [values]).one_or_none()
        # None: another call made it since.
        return made or cls._found(cls.get_by_email(db, email))

    @classmethod
    def get_by_identity(cls, db: Session, provider: str, subject: str) -> User | None:
        """Return the user whom a provider knows under a subject, or None."""
        parameters = {
            "tenant": tenant_of(db),
            "provider": check_text("provider", provider),
            "subject": check_text("subject", subject),
        }
        with one_read(db):
            return db.scalars(_BY_IDENTITY, parameters).one_or_none()

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
    ) -> User:
        """Return the user of an identity, made together with it if there was none.

        A known user's fields are brought up to date with those given, and `last_active_at` is set.
        An equal address alone never links an identity to a user: `IdentityRepository.create` does.

        Raises:
            AlreadyExistsError: The address belongs to another user.
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
        found = cls.get_by_identity(db, provider, subject)
        if found is None:
            try:
                with transaction(db):
                    made = cls.create(db, **fields)
                    IdentityRepository.create(
                        db, user_id=made.id, provider=provider, subject=subject, data=data or {}
                    )
                    return made
            except AlreadyExistsError as error:
                found = cls.get_by_identity(db, provider, subject)
                if found is None or error.key == "email":
                    raise
        return cls.update(db, found.id, **fields)

    @classmethod
    def touch(cls, db: Session, user_id: UUID | str) -> bool:
        """Set `last_active_at` to now; tell whether there is such a user."""
        with one_write(db):
            parameters = {**cls._key(db, user_id), "now": utcnow()}
            return db.scalar(_TOUCH, parameters) is not None

    @classmethod
    def erase(cls, db: Session, user_id: UUID | str, *, dry_run: bool = False) -> dict[str, int]:
        """Delete a user with all their rows, and the memories of them in others' conversations.

        Locks the user and their conversations: concurrent calls that add to them wait, and then
        find nothing to add to.

        Args:
            db: The session.
            user_id: Who.
            dry_run: Whether to count the rows and delete none.

        Returns:
            How many rows of each table; 0 included.

        Raises:
            NotFoundError: There is no such user in the tenant.
            TransientError: A concurrent unit held what this one waited for, and the reverse.
        """
        return erase_user(db, cls._id(user_id), dry_run=dry_run)

    @classmethod
    def export(cls, db: Session, user_id: UUID | str) -> Generator[str, None, None]:
        """Yield all that a user has as lines of JSON, for `file.writelines` and `import_`.

        Each ends with a newline and holds no other end of a line. First comes a header, then a line
        a row: the personas and modules referred to, the user, what they own, owners first. Memories
        of them in others' conversations come last, marked `elsewhere`; memories of others in their
        conversations are left out, and references to any such row are null.

        Outside a unit it reads one snapshot, through a session of its own that holds one connection
        until the iterator ends or is closed; inside, what the unit sees. Keys are exported as
        hashes: treat the file as a secret.

        Raises:
            NotFoundError: There is no such user in the tenant; raised with the first line.
        """
        return export_user(db, tenant_of(db), cls._id(user_id))

    @classmethod
    def import_(cls, db: Session, lines: Iterable[str]) -> dict[str, int]:
        """Insert what `export` gave into the session's tenant, all or nothing; ids are kept.

        The rows become the user's, an administrator's rights and keys included: import no file that
        others may have changed. Rows of the tenant's other users it can neither change nor reach.
        Personas and modules that are there by id stay as they are. Memories marked `elsewhere` are
        left out where their conversation is not in the tenant.

        Args:
            db: The session; it is in a transaction until the lines end.
            lines: With or without newlines, for example a file.

        Returns:
            How many rows were written to each table; 0 included.

        Raises:
            InvalidValueError: A line has the wrong form or comes at the wrong place, or a column
                breaks its rule.
            AlreadyExistsError: A row has the id or the key of one in the tenant.
            InvalidReferenceError: A row refers to one that is neither the user's nor shared.
        """
        # Few programs need it, nor what it imports.
        from database.repositories.importing import import_user

        return import_user(db, lines)

    @classmethod
    def _check(
        cls, db: Session, fields: Mapping[str, Any], *, partial: bool = False
    ) -> dict[str, Any]:
        if isinstance(email := fields.get("email"), str):
            fields = {**fields, "email": email.strip().lower()}
        return super()._check(db, fields, partial=partial)


def normalized_email(email: object) -> str:
    """Return an address as it is stored and compared.

    Raises:
        InvalidValueError: It is no text.
    """
    return check_text("email", email).strip().lower()
