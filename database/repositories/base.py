"""What every repository can do, for any model."""

from __future__ import annotations

import builtins
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID

from sqlalchemy import (
    Select,
    bindparam,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)

from database.errors import InvalidValueError, NotFoundError
from database.models.base import TenantModel
from database.pagination import Page, decode_cursor, encode_cursor
from database.session import one_read, one_write, tenant_of, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy.orm import Session
    from sqlalchemy.sql.dml import ReturningDelete, ReturningInsert, ReturningUpdate

__all__ = ["MAX_PAGE", "Repository"]

MAX_PAGE = 1000

ModelT = TypeVar("ModelT", bound=TenantModel)

# The statements name the tenant themselves, and show what the database holds now: between two calls
# of an idle session others may have written.
OPTIONS: dict[str, Any] = {"names_tenant": True, "populate_existing": True}


class Repository(Generic[ModelT]):
    """Reads and writes rows of one model.

    Every call is atomic. Outside `transaction(db)` it is committed when it returns and leaves no
    connection checked out; inside, it is part of the unit.
    """

    model: type[ModelT]
    order: str = "id"
    """What lists are sorted by, newest first; ties by id."""

    @classmethod
    def create(cls, db: Session, *args: Any, **fields: Any) -> ModelT:
        """Insert a row and return it.

        Raises:
            InvalidValueError: A field is unknown, missing, or breaks its rule.
            AlreadyExistsError: A row with the same key exists.
            InvalidReferenceError: A row referred to does not exist in the tenant.
        """
        if args:
            raise InvalidValueError("create", "takes its fields by name")
        return cls._insert(db, fields)

    @classmethod
    def create_many(cls, db: Session, items: Iterable[Mapping[str, Any]]) -> builtins.list[ModelT]:
        """Insert rows, all or none; return them in order. Raises as `create` does."""
        rows = [cls._check(db, item) for item in items]
        if not rows:
            return []
        statement = insert(cls.model).returning(cls.model, sort_by_parameter_order=True)
        with transaction(db):
            return list(db.scalars(statement, rows))

    @classmethod
    def get(cls, db: Session, id: UUID | str, /) -> ModelT | None:  # noqa: A002
        """Return the row of an id, or None."""
        with one_read(db):
            return db.scalars(_by_id(cls.model), cls._key(db, id)).one_or_none()

    @classmethod
    def require(cls, db: Session, id: UUID | str, /) -> ModelT:  # noqa: A002
        """Return the row of an id.

        Raises:
            NotFoundError: There is none in the tenant.
        """
        return cls._found(cls.get(db, id))

    @classmethod
    def list(
        cls, db: Session, *, limit: int = 50, cursor: str | None = None, **filters: Any
    ) -> Page[ModelT]:
        """Return a page, newest first.

        Args:
            db: The session.
            limit: How many rows at most, 1 to 1,000.
            cursor: `next_cursor` of the page before.
            filters: Fields and the values they must have; None means any.

        Raises:
            InvalidValueError: The limit, the cursor or a filter is not valid.
        """
        return cls._page(db, limit, cursor, filters)

    @classmethod
    def update(cls, db: Session, id: UUID | str, /, *args: Any, **fields: Any) -> ModelT:  # noqa: A002
        """Change the given fields of a row and return it.

        Raises:
            NotFoundError: There is no such row in the tenant.
            InvalidValueError, AlreadyExistsError, InvalidReferenceError: As for `create`.
        """
        if args:
            raise InvalidValueError("update", "takes its fields by name")
        return cls._found(cls._update(db, cls._id(id), cls.model.id, fields))

    @classmethod
    def delete(cls, db: Session, id: UUID | str, /) -> bool:  # noqa: A002
        """Delete a row and all that it owns; tell whether there was one."""
        with one_write(db):
            return db.scalar(_delete(cls.model), cls._key(db, id)) is not None

    @classmethod
    def exists(cls, db: Session, id: UUID | str, /) -> bool:  # noqa: A002
        """Tell whether there is a row of an id."""
        with one_read(db):
            return db.scalar(_exists(cls.model), cls._key(db, id)) is not None

    @classmethod
    def count(cls, db: Session, **filters: Any) -> int:
        """Return how many rows have the given field values; None means any."""
        checked = cls._filters(db, filters)
        statement = _count(cls.model, tuple(checked))
        with one_read(db):
            return db.scalars(statement, {"tenant": tenant_of(db), **_named(checked)}).one()

    @classmethod
    def _check(
        cls, db: Session, fields: Mapping[str, Any], *, partial: bool = False
    ) -> dict[str, Any]:
        # pydantic takes 100 ms to import, and only writing needs it.
        from database.rules import check_fields

        policy = db.get_bind().get_execution_options()["unstorable"]
        return check_fields(cls.model, fields, policy, partial=partial)

    @classmethod
    def _insert(cls, db: Session, fields: Mapping[str, Any]) -> ModelT:
        values = cls._check(db, fields)
        with one_write(db):
            made: ModelT = db.scalars(_insert(cls.model), [values]).one()
            return made

    @classmethod
    def _update(
        cls, db: Session, key: Any, column: Any, fields: Mapping[str, Any]
    ) -> ModelT | None:
        if "id" in fields:
            raise InvalidValueError("id", "cannot be changed")
        values = cls._check(db, fields, partial=True)
        statement = _update(cls.model, column).values(values)
        with one_write(db):
            return db.scalars(statement, {"tenant": tenant_of(db), "key": key}).one_or_none()

    @classmethod
    def _page(
        cls,
        db: Session,
        limit: int,
        cursor: str | None,
        filters: Mapping[str, Any],
    ) -> Page[ModelT]:
        from database.rules import check_number

        check_number("limit", limit, 1, MAX_PAGE)
        checked = cls._filters(db, filters)
        name = f"{cls.model.__tablename__}.{cls.order}"
        parameters = {"tenant": tenant_of(db), "limit": limit + 1, **_named(checked)}
        if cursor is not None:
            parameters["after_value"], parameters["after_id"] = decode_cursor(name, cursor)
        statement = _listing(cls.model, cls.order, tuple(checked), after=cursor is not None)
        with one_read(db):
            rows = list(db.scalars(statement, parameters))
        if len(rows) <= limit:
            return Page(rows)
        last = rows[limit - 1]
        value = None if cls.order == "id" else getattr(last, cls.order)
        return Page(rows[:limit], encode_cursor(name, value, last.id))

    @classmethod
    def _filters(cls, db: Session, filters: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in filters.items() if value is not None}
        return cls._check(db, given, partial=True) if given else {}

    @classmethod
    def _key(cls, db: Session, id: UUID | str) -> dict[str, Any]:  # noqa: A002
        return {"tenant": tenant_of(db), "key": cls._id(id)}

    @staticmethod
    def _id(value: UUID | str) -> UUID:
        if isinstance(value, UUID):
            return value
        try:
            return UUID(value)
        except (ValueError, TypeError, AttributeError):
            raise InvalidValueError("id", "must be a UUID") from None

    @classmethod
    def _found(cls, row: ModelT | None) -> ModelT:
        if row is None:
            msg = f"{cls.model.__name__}: no such row in this tenant"
            raise NotFoundError(msg)
        return row


def _named(filters: Mapping[str, Any]) -> dict[str, Any]:
    return {f"filter_{name}": value for name, value in filters.items()}


# Building a statement costs about 100 us, more than its query: each is built once.


@cache
def _insert(model: type[ModelT]) -> ReturningInsert[ModelT]:
    return insert(model).returning(model).execution_options(**OPTIONS)


@cache
def _by_id(model: type[ModelT]) -> Select[ModelT]:
    return (
        select(model)
        .where(model.tenant_id == bindparam("tenant"), model.id == bindparam("key"))
        .execution_options(**OPTIONS)
    )


@cache
def _exists(model: type[ModelT]) -> Select[Any]:
    return (
        select(model.id)
        .where(model.tenant_id == bindparam("tenant"), model.id == bindparam("key"))
        .execution_options(**OPTIONS)
    )


@cache
def _delete(model: type[ModelT]) -> ReturningDelete[UUID]:
    return (
        delete(model)
        .where(model.tenant_id == bindparam("tenant"), model.id == bindparam("key"))
        .returning(model.id)
        .execution_options(synchronize_session=False, names_tenant=True)
    )


@cache
def _update(model: type[ModelT], column: Any) -> ReturningUpdate[ModelT]:
    return (
        update(model)
        .where(model.tenant_id == bindparam("tenant"), column == bindparam("key"))
        .returning(model)
        .execution_options(synchronize_session=False, **OPTIONS)
    )


@cache
def _count(model: type[ModelT], filters: tuple[str, ...]) -> Select[int]:
    return (
        select(func.count())
        .select_from(model)
        .where(model.tenant_id == bindparam("tenant"), *_conditions(model, filters))
        .execution_options(**OPTIONS)
    )


@cache
def _listing(
    model: type[ModelT], order: str, filters: tuple[str, ...], *, after: bool
) -> Select[ModelT]:
    column = getattr(model, order)
    statement = (
        select(model)
        .where(model.tenant_id == bindparam("tenant"), *_conditions(model, filters))
        .limit(bindparam("limit"))
        .execution_options(**OPTIONS)
    )
    if order == "id":
        statement = statement.order_by(model.id.desc())
        return statement.where(model.id < bindparam("after_id")) if after else statement
    statement = statement.order_by(column.desc(), model.id.desc())
    if not after:
        return statement
    key = tuple_(
        bindparam("after_value", type_=column.type), bindparam("after_id", type_=model.id.type)
    )
    return statement.where(tuple_(column, model.id) < key)


def _conditions(model: type[ModelT], filters: tuple[str, ...]) -> list[Any]:
    return [getattr(model, name) == bindparam(f"filter_{name}") for name in filters]
