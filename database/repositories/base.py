"""What every repository can do, for any model."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar
from uuid import UUID

from sqlalchemy.orm.attributes import set_committed_value

from database.errors import InvalidValueError, NotFoundError
from database.models.base import TenantModel
from database.pagination import Page, decode_cursor, encode_cursor
from database.repositories.loading import read, shape_of
from database.repositories.statements import (
    checking_id,
    counting,
    deleting_by_id,
    inserting,
    listing,
    selecting_by_id,
    updating_by,
)
from database.session import tenant_of
from database.units import one_read, one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import Row, Select
    from sqlalchemy.orm import Session
    from sqlalchemy.sql.dml import ReturningInsert

__all__ = ["MAX_PAGE", "Repository"]

MAX_PAGE = 1000

ModelT = TypeVar("ModelT", bound=TenantModel)


class Repository(Generic[ModelT]):
    """Reads and writes rows of one model.

    Every call is atomic. Outside `transaction(db)` it is committed when it returns and leaves no
    connection checked out; inside, it is part of the unit.
    """

    model: type[ModelT]
    order: str = "id"
    """What lists are sorted by, newest first; ties by id."""
    computed: ClassVar[dict[str, Any]] = {}
    """The model's attributes that are no columns, as expressions for RETURNING."""

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
        tenant_of(db)
        rows = [cls._check(db, item) for item in items]
        if not rows:
            return []
        with transaction(db):
            return [cls._complete(row) for row in db.execute(cls._inserting(), rows)]

    @classmethod
    def get(cls, db: Session, id: UUID | str, /) -> ModelT | None:  # noqa: A002
        """Return the row of an id, or None."""
        return cls._one(db, selecting_by_id(cls.model), cls._key(db, id))

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
            return db.scalar(deleting_by_id(cls.model), cls._key(db, id)) is not None

    @classmethod
    def exists(cls, db: Session, id: UUID | str, /) -> bool:  # noqa: A002
        """Tell whether there is a row of an id."""
        with one_read(db):
            return db.scalar(checking_id(cls.model), cls._key(db, id)) is not None

    @classmethod
    def count(cls, db: Session, **filters: Any) -> int:
        """Return how many rows have the given field values; None means any."""
        checked = cls._filters(db, filters)
        statement = counting(cls.model, tuple(checked))
        with one_read(db):
            return db.scalars(statement, {"tenant": tenant_of(db), **_named(checked)}).one()

    @classmethod
    def _one(
        cls, db: Session, statement: Select[Any], parameters: Mapping[str, Any]
    ) -> ModelT | None:
        """Return the row that a statement made of the model's shape finds, or None."""
        return next(iter(read(db, shape_of(cls.model), statement, parameters)), None)

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
        tenant_of(db)
        values = cls._check(db, fields)
        with one_write(db):
            return cls._complete(db.execute(cls._inserting(), [values]).one())

    @classmethod
    def _update(
        cls, db: Session, key: Any, column: Any, fields: Mapping[str, Any]
    ) -> ModelT | None:
        if "id" in fields:
            raise InvalidValueError("id", "cannot be changed")
        values = cls._check(db, fields, partial=True)
        statement = updating_by(cls.model, column, *cls.computed.values()).values(values)
        with one_write(db):
            row = db.execute(statement, {"tenant": tenant_of(db), "key": key}).one_or_none()
            return None if row is None else cls._complete(row)

    @classmethod
    def _inserting(cls) -> ReturningInsert[Any]:
        return inserting(cls.model, *cls.computed.values())

    @classmethod
    def _complete(cls, row: Row[Any]) -> ModelT:
        """Return the entity of a written row, with what RETURNING computed for it."""
        made: ModelT = row[0]
        for name, value in zip(cls.computed, tuple(row)[1:], strict=True):
            set_committed_value(made, name, value)
        return made

    @classmethod
    def _page(
        cls,
        db: Session,
        limit: int,
        cursor: str | None,
        filters: Mapping[str, Any],
        *conditions: Any,
        order: str | None = None,
        **bound: Any,
    ) -> Page[ModelT]:
        from database.rules import check_number

        check_number("limit", limit, 1, MAX_PAGE)
        checked = cls._filters(db, filters)
        order = order or cls.order
        name = f"{cls.model.__tablename__}.{order}"
        parameters = {"tenant": tenant_of(db), "limit": limit + 1, **_named(checked), **bound}
        if cursor is not None:
            parameters["after_value"], parameters["after_id"] = decode_cursor(name, cursor)
        after = cursor is not None
        statement = listing(cls.model, order, tuple(checked), *conditions, after=after)
        rows = read(db, shape_of(cls.model), statement, parameters)
        if len(rows) <= limit:
            return Page(rows)
        last = rows[limit - 1]
        value = None if order == "id" else getattr(last, order)
        return Page(rows[:limit], encode_cursor(name, value, last.id))

    @classmethod
    def _filters(cls, db: Session, filters: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in filters.items() if value is not None}
        return cls._check(db, given, partial=True) if given else {}

    @classmethod
    def _key(cls, db: Session, id: UUID | str) -> dict[str, Any]:  # noqa: A002
        return {"tenant": tenant_of(db), "key": cls._id(id)}

    @staticmethod
    def _id(value: UUID | str, field: str = "id") -> UUID:
        if isinstance(value, UUID):
            return value
        try:
            return UUID(value)
        except (ValueError, TypeError, AttributeError):
            raise InvalidValueError(field, "must be a UUID") from None

    @classmethod
    def _found(cls, row: ModelT | None) -> ModelT:
        if row is None:
            msg = f"{cls.model.__name__}: no such row in this tenant"
            raise NotFoundError(msg)
        return row


def _named(filters: Mapping[str, Any]) -> dict[str, Any]:
    return {f"filter_{name}": value for name, value in filters.items()}
