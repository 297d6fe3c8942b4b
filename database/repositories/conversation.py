"""Conversations, found by thread or by user."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import bindparam, func, select
from sqlalchemy.dialects.postgresql import insert

from database.errors import InvalidReferenceError, InvalidValueError
from database.models.base import uuid7
from database.models.conversation import Conversation
from database.models.user import User
from database.repositories.base import MAX_PAGE
from database.repositories.conversation_branches import LINKS, MANAGED, ConversationBranches
from database.repositories.forking import delete_conversation, purge_shared
from database.repositories.loading import read, shape_of
from database.repositories.opening import EMAIL_OF_WRITTEN, open_conversation
from database.repositories.statements import OPTIONS
from database.repositories.user import UserRepository, normalized_email
from database.session import tenant_of
from database.types import check_text
from database.units import one_read, one_write

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy.orm import Session

    from database.pagination import Page

__all__ = ["ConversationRepository"]

_USER = (
    select(User.id)
    .where(User.tenant_id == bindparam("tenant"), User.email == bindparam("email"))
    .scalar_subquery()
)
_SHAPE = shape_of(Conversation)
_BY_THREAD = _SHAPE.select.where(
    Conversation.tenant_id == bindparam("tenant"), Conversation.thread_id == bindparam("thread")
)
_BY_EMAIL = (
    _SHAPE.select.where(
        Conversation.tenant_id == bindparam("tenant"), Conversation.user_id == _USER
    )
    .order_by(Conversation.updated_at.desc(), Conversation.id.desc())
    .limit(bindparam("limit"))
    .offset(bindparam("offset"))
)
_COUNT_BY_EMAIL = (
    select(func.count())
    .select_from(Conversation)
    .where(Conversation.tenant_id == bindparam("tenant"), Conversation.user_id == _USER)
    .execution_options(**OPTIONS)
)
_INSERT_NEW = (
    insert(Conversation)
    .on_conflict_do_nothing(index_elements=["tenant_id", "thread_id"])
    .returning(Conversation, EMAIL_OF_WRITTEN)
    .execution_options(**OPTIONS)
)


class ConversationRepository(ConversationBranches):
    """The conversations of a tenant, lists newest activity first.

    `update` and `delete` take a thread_id (text) or an id (UUID).
    """

    @classmethod
    def create(
        cls,
        db: Session,
        thread_id: str | None = None,
        user_email: str | None = None,
        title: str | None = None,
        last_message: str | None = None,
        *,
        user_id: UUID | str | None = None,
        persona_id: UUID | str | None = None,
        **fields: Any,
    ) -> Conversation:
        """Insert a conversation; with a persona that speaks first, its message too: one statement.

        Args:
            db: The session.
            thread_id: The application's name for it, 1 to 255 characters; None is the new id.
            user_email: Whose it is, by address, of a user that exists; or
            user_id: by id.
            title: At most 500 characters.
            last_message: A preview, until messages are appended.
            persona_id: Who answers.
            fields: provider_type, provider_config, metadata, scope, expires_at, and for imports
                id, created_at, updated_at.

        Raises:
            AlreadyExistsError: The thread_id is taken.
            InvalidReferenceError: No such user or persona in the tenant.
            InvalidValueError: A field breaks its rule.
        """
        cls._refuse(fields, LINKS)
        values = cls._values(
            db, thread_id, user_email, user_id, title=title, last_message=last_message, **fields
        )
        if persona_id is None:
            return cls._insert(db, values)
        return open_conversation(db, cls._check(db, {**values, "persona_id": persona_id}))

    @classmethod
    def create_many(
        cls, db: Session, items: Iterable[Mapping[str, Any]]
    ) -> builtins.list[Conversation]:
        """Insert conversations, all or none; return them in order. Raises as `create` does."""
        given = [dict(item) for item in items]
        for item in given:
            cls._refuse(item, LINKS)
        return super().create_many(db, given)

    @classmethod
    def get_by_thread_id(cls, db: Session, thread_id: str) -> Conversation | None:
        """Return the conversation of a thread, or None."""
        parameters = {"tenant": tenant_of(db), "thread": check_text("thread_id", thread_id)}
        return cls._one(db, _BY_THREAD, parameters)

    @classmethod
    def get_or_create(
        cls,
        db: Session,
        thread_id: str,
        user_email: str | None = None,
        title: str | None = None,
        last_message: str | None = None,
        *,
        user_id: UUID | str | None = None,
    ) -> Conversation:
        """Return the conversation of a thread, made if there was none, also by concurrent calls.

        Raises:
            InvalidReferenceError: It must be made, and there is no such user.
            InvalidValueError: A field breaks its rule.
        """
        found = cls.get_by_thread_id(db, thread_id)
        if found is not None:
            return found
        values = cls._check(
            db,
            cls._values(db, thread_id, user_email, user_id, title=title, last_message=last_message),
        )
        with one_write(db):
            row = db.execute(_INSERT_NEW, [values]).one_or_none()
            if row is not None:
                return cls._complete(row)
        # Another call has made it since.
        return cls._found(cls.get_by_thread_id(db, thread_id))

    @classmethod
    def get_by_user_email(
        cls, db: Session, user_email: str, limit: int = 50, offset: int = 0
    ) -> builtins.list[Conversation]:
        """Return a user's conversations, newest activity first.

        The cost grows with `offset`; `list_by_user` pages at equal cost.
        """
        from database.rules import check_number

        parameters = {
            "tenant": tenant_of(db),
            "email": normalized_email(user_email),
            "limit": check_number("limit", limit, 1, MAX_PAGE),
            "offset": check_number("offset", offset, 0, 2**31),
        }
        return read(db, _SHAPE, _BY_EMAIL, parameters)

    @classmethod
    def list_by_user(
        cls, db: Session, user_id: UUID | str, *, limit: int = 50, cursor: str | None = None
    ) -> Page[Conversation]:
        """Return a page of a user's conversations, newest activity first."""
        return cls._page(db, limit, cursor, {"user_id": cls._id(user_id)})

    @classmethod
    def list_by_persona(
        cls, db: Session, persona_id: UUID | str, *, limit: int = 50, cursor: str | None = None
    ) -> Page[Conversation]:
        """Return a page of a persona's conversations, newest activity first."""
        return cls._page(db, limit, cursor, {"persona_id": cls._id(persona_id, "persona_id")})

    @classmethod
    def count_by_user(cls, db: Session, user_email: str) -> int:
        """Return how many conversations a user has; 0 for an unknown address."""
        parameters = {"tenant": tenant_of(db), "email": normalized_email(user_email)}
        with one_read(db):
            return db.scalars(_COUNT_BY_EMAIL, parameters).one()

    @classmethod
    def update(
        cls,
        db: Session,
        thread_id: str | UUID,
        title: str | None = None,
        last_message: str | None = None,
        **fields: Any,
    ) -> Conversation:
        """Change fields of a conversation and return it; a None title or preview stays as it is.

        Args:
            db: The session.
            thread_id: Its thread (text) or its id (UUID).
            title: At most 500 characters.
            last_message: The preview.
            fields: user_id, persona_id, provider_type, provider_config, metadata, scope,
                expires_at.

        Raises:
            NotFoundError: There is no such conversation in the tenant.
            InvalidValueError: A field breaks its rule, or is not the caller's to set.
        """
        cls._refuse(fields, MANAGED)
        given = {"title": title, "last_message": last_message}
        fields.update({name: value for name, value in given.items() if value is not None})
        if isinstance(thread_id, UUID):
            return super().update(db, thread_id, **fields)
        key = check_text("thread_id", thread_id)
        return cls._found(cls._update(db, key, Conversation.thread_id, fields))

    @classmethod
    def delete(cls, db: Session, thread_id: str | UUID) -> bool:
        """Delete a conversation by thread (text) or id (UUID), with all that it owns.

        Messages that forks show stay: they become the forks' own.
        """
        if isinstance(thread_id, UUID):
            return delete_conversation(db, "id", thread_id)
        return delete_conversation(db, "thread_id", check_text("thread_id", thread_id))

    @classmethod
    def purge_expired(cls, db: Session, *, batch_size: int = 1000, dry_run: bool = False) -> int:
        """Delete the expired conversations but for what forks show; return how many.

        As for contexts; those whose messages forks show go one by one, each waiting for its locks.
        """
        purged = super().purge_expired(db, batch_size=batch_size, dry_run=dry_run)
        return purged if dry_run else purged + purge_shared(db)

    @classmethod
    def _values(
        cls,
        db: Session,
        thread_id: str | None,
        user_email: str | None,
        user_id: UUID | str | None,
        **fields: Any,
    ) -> dict[str, Any]:
        if user_email is not None:
            if user_id is not None:
                raise InvalidValueError("user_email", "must not be given together with user_id")
            user = UserRepository.get_by_email(db, user_email)
            if user is None:
                raise InvalidReferenceError("user_email")
            user_id = user.id
        return {**fields, "user_id": user_id, "thread_id": thread_id}

    @classmethod
    def _check(
        cls, db: Session, fields: Mapping[str, Any], *, partial: bool = False
    ) -> dict[str, Any]:
        if not partial and fields.get("thread_id") is None:
            id_ = fields.get("id", uuid7())
            fields = {**fields, "id": id_, "thread_id": str(id_)}
        return super()._check(db, fields, partial=partial)
