"""Users, found by their address or by an identity elsewhere; their settings, and all their data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Uuid, any_, bindparam, delete, false, func, select, update
from sqlalchemy.dialects.postgresql import ARRAY, insert

from database.models.conversation import Conversation
from database.models.user import User
from database.repositories import user_settings
from database.repositories.erasing import erase_user
from database.repositories.exporting import export_user
from database.repositories.links import detaching_forks
from database.repositories.loading import shape_of
from database.repositories.statements import OPTIONS
from database.repositories.user_identities import UserIdentities
from database.session import tenant_of
from database.types import check_text, utcnow
from database.units import one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping
    from uuid import UUID

    from pydantic import BaseModel
    from sqlalchemy.orm import Session

__all__ = ["UserRepository", "normalized_email"]

_BY_EMAIL = shape_of(User).select.where(
    User.tenant_id == bindparam("tenant"), User.email == bindparam("email")
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
# Locked, a conversation tells whether it was forked while this waited; a subquery would not.
_THEIRS = (
    select(Conversation.is_shared)
    .where(Conversation.tenant_id == bindparam("tenant"), Conversation.user_id == bindparam("key"))
    .order_by(Conversation.id)
    .with_for_update()
    .cte("theirs")
)
_DELETE_UNSHARED = (
    delete(User)
    .where(
        User.tenant_id == bindparam("tenant"),
        User.id == bindparam("key"),
        ~select(func.coalesce(func.bool_or(_THEIRS.c.is_shared), false())).scalar_subquery(),
    )
    .returning(User.id)
    .execution_options(synchronize_session=False, names_tenant=True)
)
_DELETE_MANY = (
    delete(User)
    .where(
        User.tenant_id == bindparam("tenant"),
        User.id == any_(bindparam("ids", type_=ARRAY(Uuid()))),
    )
    .execution_options(synchronize_session=False, names_tenant=True)
)


class UserRepository(UserIdentities):
    """The users of a tenant. Addresses are compared without case and surrounding blanks."""

    order = "created_at"

    @classmethod
    def get_by_email(cls, db: Session, email: str) -> User | None:
        """Return the user of an address, or None."""
        parameters = {"tenant": tenant_of(db), "email": normalized_email(email)}
        return cls._one(db, _BY_EMAIL, parameters)

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
    def get_settings(cls, db: Session, user_id: UUID | str) -> dict[str, Any]:
        """Return a user's settings.

        Raises:
            NotFoundError: There is no such user in the tenant.
        """
        return user_settings.get(db, cls._id(user_id, "user_id"))

    @classmethod
    def update_settings(
        cls,
        db: Session,
        user_id: UUID | str,
        changes: dict[str, Any],
        *,
        model: type[BaseModel] | None = None,
    ) -> dict[str, Any]:
        """Merge changes into a user's settings by JSON Merge Patch (RFC 7396), and return these.

        Objects are merged key by key, None deletes a key, all else replaces what was there. One
        statement: concurrent changes of different keys all survive.

        Args:
            db: The session.
            user_id: Whose settings.
            changes: A JSON object.
            model: What the merged settings must validate as. It takes one statement more, and
                locks the user.

        Raises:
            NotFoundError: There is no such user in the tenant.
            InvalidValueError: `changes` is no JSON object, or a setting breaks a rule of the model.
        """
        return user_settings.merge(db, cls._id(user_id, "user_id"), changes, model)

    @classmethod
    def touch(cls, db: Session, user_id: UUID | str) -> bool:
        """Set `last_active_at` to now; tell whether there is such a user."""
        with one_write(db):
            parameters = {**cls._key(db, user_id), "now": utcnow()}
            return db.scalar(_TOUCH, parameters) is not None

    @classmethod
    def delete(cls, db: Session, id: UUID | str, /) -> bool:  # noqa: A002
        """Delete a user and all that they own; tell whether there was one.

        What other users' forks share of it goes too.

        Raises:
            TransientError: As `erase`.
        """
        parameters = cls._key(db, id)
        with one_write(db) as connection:
            if connection.scalar(_DELETE_UNSHARED, parameters) is not None:
                return True
        with transaction(db), detaching_forks(db, [parameters["key"]]):
            return super().delete(db, id)

    @classmethod
    def delete_non_admins(cls, db: Session, ids: Iterable[UUID | str]) -> int:
        """Delete those of the given users who are no administrators; return how many.

        Who has become an administrator since is kept.

        Raises:
            TransientError: As `erase`.
        """
        users = [cls._id(id_) for id_ in ids]
        with transaction(db), detaching_forks(db, users, admins=False) as found:
            parameters = {"tenant": tenant_of(db), "ids": found}
            return db.connection().execute(_DELETE_MANY, parameters).rowcount

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
