"""Contexts: long-term notes about a user, stored by source and searched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, Uuid, bindparam, delete, func
from sqlalchemy.dialects.postgresql import JSONPATH

from database.errors import InvalidValueError
from database.models.context import Context
from database.repositories.conditions import json_paths
from database.repositories.expiring import ExpiringRepository
from database.repositories.highlighting import texts_of_json
from database.repositories.loading import shape_of
from database.repositories.searching import Search
from database.repositories.storing import Stored, store_all, store_one
from database.session import tenant_of
from database.units import one_write

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from database.pagination import Page, SearchPage
    from database.repositories.queries import Mode

__all__ = ["ContextRepository"]

_MANAGED = ("user_id", "id", "created_at", "updated_at")

_OF_USER = (Context.tenant_id == bindparam("tenant"), Context.user_id == bindparam("user"))
_OF_TYPE = (*_OF_USER, Context.context_type == bindparam("type"))
_NEWEST = (
    shape_of(Context)
    .select.where(*_OF_TYPE)
    .order_by(Context.updated_at.desc(), Context.id.desc())
    .limit(1)
)
_OF_SOURCE = _NEWEST.where(Context.source_identifier == bindparam("source"))
_BY_ID = shape_of(Context).select.where(*_OF_USER, Context.id == bindparam("id"))
_WITH_PREFIX = func.starts_with(Context.source_identifier, bindparam("prefix", type_=Text()))
_DELETE = delete(Context).execution_options(synchronize_session=False, names_tenant=True)
_SEARCH = Search(
    Context,
    {"user": Uuid(), "type": Text(), "content": JSONPATH(), "metadata": JSONPATH()},
    lambda context: " ".join(texts_of_json(context.content)),
    escaped_json=True,
)


class ContextRepository(ExpiringRepository[Context]):
    """The contexts of a tenant's users, lists last stored first."""

    model = Context
    order = "updated_at"

    @classmethod
    def store(
        cls,
        db: Session,
        user_id: UUID | str,
        context_type: str,
        content: Any,
        *,
        source_identifier: str | None = None,
        metadata: dict[str, Any] | None = None,
        expires_at: datetime | None = None,
    ) -> Context:
        """Store a context in one statement: a new one, or in the place of its source's old one.

        Args:
            db: The session.
            user_id: Whose.
            context_type: 1 to 64 characters.
            content: Any JSON value.
            source_identifier: Where it comes from, at most 255 characters: unique for the user and
                type. Without one a context is always new.
            metadata: What is known about it.
            expires_at: When `purge_expired` may delete it.

        Returns:
            The context; `inserted` tells whether it is new. In place of an old one it keeps id and
            created_at.

        Raises:
            InvalidReferenceError: There is no such user in the tenant.
            InvalidValueError: A field breaks its rule.
        """
        given = {
            "context_type": context_type,
            "content": content,
            "source_identifier": source_identifier,
            "metadata": metadata,
            "expires_at": expires_at,
        }
        return store_one(db, cls._row(db, user_id, given))

    @classmethod
    def store_many(
        cls, db: Session, user_id: UUID | str, items: Iterable[Mapping[str, Any]]
    ) -> Stored:
        """Store contexts, all or none, thousands with a statement, in bounded memory.

        Args:
            db: The session.
            user_id: Whose.
            items: Of each the arguments of `store`, by name; may be a generator. Of several with
                one type and source the last one stays.

        Returns:
            How many were inserted and updated.

        Raises:
            As `store`. Nothing is stored then.
        """
        user = cls._id(user_id, "user_id")
        if not isinstance(items, Iterable):
            raise InvalidValueError("items", "must be mappings")
        return store_all(db, user, (cls._row(db, user, item) for item in items))

    @classmethod
    def get(
        cls,
        db: Session,
        user_id: UUID | str,
        context_type: str | None = None,
        source_identifier: str | None = None,
    ) -> Context | None:
        """Return a user's context of a type and source, or None.

        Without a source it is the last stored one of the type; without a type, `user_id` is the id
        of the context itself, as in all repositories.
        """
        if context_type is None:
            if source_identifier is not None:
                raise InvalidValueError("context_type", "must be given with a source")
            return super().get(db, user_id)
        parameters = cls._key_of_type(db, user_id, context_type)
        if source_identifier is None:
            return cls._one(db, _NEWEST, parameters)
        given = {"source_identifier": source_identifier}
        parameters["source"] = cls._check(db, given, partial=True)["source_identifier"]
        return cls._one(db, _OF_SOURCE, parameters)

    @classmethod
    def get_by_id(cls, db: Session, id: UUID | str, *, user_id: UUID | str) -> Context | None:  # noqa: A002
        """Return the context of an id if it belongs to the user, else None."""
        return cls._one(db, _BY_ID, {**cls._key_of_user(db, user_id), "id": cls._id(id)})

    @classmethod
    def list(
        cls,
        db: Session,
        *,
        limit: int = 50,
        cursor: str | None = None,
        source_prefix: str | None = None,
        **filters: Any,
    ) -> Page[Context]:
        """Return a page, last stored first.

        Args:
            db: The session.
            limit: How many at most, 1 to 1,000.
            cursor: `next_cursor` of the page before.
            source_prefix: How the source begins, literally.
            filters: Fields and the values they must have, such as user_id and context_type; None
                means any.

        Raises:
            InvalidValueError: The limit, the cursor or a filter is not valid.
        """
        if source_prefix is None:
            return cls._page(db, limit, cursor, filters)
        given = {"source_identifier": source_prefix}
        try:
            prefix = cls._check(db, given, partial=True)["source_identifier"]
        except InvalidValueError as error:
            raise InvalidValueError("source_prefix", error.rule) from None
        return cls._page(db, limit, cursor, filters, _WITH_PREFIX, prefix=prefix)

    @classmethod
    def search(
        cls,
        db: Session,
        user_id: UUID | str | None,
        query: str | None,
        *,
        mode: Mode = "text",
        context_type: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        where: Mapping[str | tuple[str, ...], Any] | None = None,
        highlight: tuple[str, str] | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> SearchPage[Context]:
        """Return a page of the contexts that a query finds, best first, then newest.

        Args:
            db: The session.
            user_id: Whose; None is the whole tenant.
            query: At most 1,000 characters. With mode "text" words as in a web search: all must
                occur, "in quotes" as a phrase, OR between alternatives, minus before what must not
                occur. With mode "substring" the characters as they stand, upper or lower case. An
                empty query finds nothing, None everything.
            mode: How.
            context_type: Only of this type.
            since: Only those stored at this time or later.
            until: Only those stored before this time.
            where: Conditions on content and metadata, such as `{"stars": {"gte": 10},
                "metadata.language": "en"}`. Operators: eq, ne, gt, gte, lt, lte, in, contains,
                exists. A value of another type never matches.
            highlight: What to put before and after hits, for snippets.
            limit: How many at most, 1 to 1,000.
            cursor: `next_cursor` of the page before.

        Raises:
            InvalidValueError: An argument is not valid.
        """
        filters: dict[str, Any] = dict(
            json_paths({} if where is None else where, ("content", "metadata"))
        )
        filters["user"] = None if user_id is None else cls._id(user_id, "user_id")
        if context_type is not None:
            checked = cls._check(db, {"context_type": context_type}, partial=True)
            filters["type"] = checked["context_type"]
        return _SEARCH.run(
            db,
            query,
            filters,
            mode=mode,
            since=since,
            until=until,
            highlight=highlight,
            limit=limit,
            cursor=cursor,
        )

    @classmethod
    def delete(cls, db: Session, id: UUID | str, *, user_id: UUID | str | None = None) -> bool:  # noqa: A002
        """Delete a context, of the user if one is given; tell whether there was one."""
        if user_id is None:
            return super().delete(db, id)
        statement = _DELETE.where(*_OF_USER, Context.id == bindparam("id"))
        parameters = {**cls._key_of_user(db, user_id), "id": cls._id(id)}
        with one_write(db) as connection:
            return connection.execute(statement, parameters).rowcount > 0

    @classmethod
    def delete_by_type(cls, db: Session, user_id: UUID | str, context_type: str) -> int:
        """Delete a user's contexts of a type; return how many."""
        parameters = cls._key_of_type(db, user_id, context_type)
        with one_write(db) as connection:
            return connection.execute(_DELETE.where(*_OF_TYPE), parameters).rowcount

    @classmethod
    def delete_all(cls, db: Session, user_id: UUID | str) -> int:
        """Delete all contexts of a user; return how many."""
        parameters = cls._key_of_user(db, user_id)
        with one_write(db) as connection:
            return connection.execute(_DELETE.where(*_OF_USER), parameters).rowcount

    @classmethod
    def _row(cls, db: Session, user_id: UUID | str, given: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            raise InvalidValueError("items", "must be mappings")
        for name in _MANAGED:
            if name in given:
                raise InvalidValueError(name, "is set by the repository")
        metadata = given.get("metadata")
        fields = {**given, "metadata": {} if metadata is None else metadata, "user_id": user_id}
        checked = cls._check(db, fields)
        return {"metadata": checked.pop("metadata_"), **checked}

    @classmethod
    def _key_of_user(cls, db: Session, user_id: UUID | str) -> dict[str, Any]:
        return {"tenant": tenant_of(db), "user": cls._id(user_id, "user_id")}

    @classmethod
    def _key_of_type(cls, db: Session, user_id: UUID | str, context_type: str) -> dict[str, Any]:
        checked = cls._check(db, {"context_type": context_type}, partial=True)
        return {**cls._key_of_user(db, user_id), "type": checked["context_type"]}
