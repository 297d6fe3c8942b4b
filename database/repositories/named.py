"""Repositories of what a tenant calls by name."""

from __future__ import annotations

import builtins
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import Text, any_, bindparam
from sqlalchemy.dialects.postgresql import ARRAY

from database.errors import InvalidValueError, NotFoundError
from database.models.module import Module
from database.models.persona import Persona
from database.repositories import references
from database.repositories.base import Repository
from database.repositories.loading import read, shape_of
from database.session import tenant_of
from database.types import check_text, clean_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

    from database.pagination import Page

__all__ = ["NamedRepository"]

NamedT = TypeVar("NamedT", Persona, Module)

_SHOWN = 20


class NamedRepository(Repository[NamedT]):
    """A repository of rows with a name, unique in the tenant, that may be switched off."""

    order = "created_at"

    references = staticmethod(references.references)

    @classmethod
    def list(
        cls,
        db: Session,
        *,
        limit: int = 50,
        cursor: str | None = None,
        order: Literal["created_at", "name"] = "created_at",
        active_only: bool = False,
        **filters: Any,
    ) -> Page[NamedT]:
        """Return a page, newest first or by name.

        Args:
            db: The session.
            limit: How many at most, 1 to 1,000.
            cursor: `next_cursor` of the page before, in the same order.
            order: "created_at" is newest first, "name" from A to Z.
            active_only: Without those that are switched off.
            filters: Fields and the values they must have; None means any.

        Raises:
            InvalidValueError: The limit, the cursor, the order or a filter is not valid.
        """
        if order not in ("created_at", "name"):
            raise InvalidValueError("order", "must be created_at or name")
        if active_only:
            if filters.get("is_active") is not None:
                raise InvalidValueError("active_only", "must not be given together with is_active")
            filters["is_active"] = True
        return cls._page(db, limit, cursor, filters, order=order)

    @classmethod
    def get_by_name(cls, db: Session, name: str) -> NamedT | None:
        """Return the row of a name, active or not, or None."""
        parameters = {"tenant": tenant_of(db), "name": check_text("name", name)}
        return cls._one(db, _by_name(cls.model), parameters)

    @classmethod
    def get_many_by_names(cls, db: Session, names: Iterable[str]) -> builtins.list[NamedT]:
        """Return the row of each name in one query, active or not, in the order of the names.

        Raises:
            NotFoundError: There is none of some name; its `names` are all of these.
            InvalidValueError: `names` is one text, or holds something else than texts.
        """
        if isinstance(names, str):
            raise InvalidValueError("names", "must be a list of names")
        wanted = [clean_text(check_text("names", name)) for name in names]
        if not wanted:
            return []
        parameters = {"tenant": tenant_of(db), "names": wanted}
        rows = read(db, shape_of(cls.model), _by_names(cls.model), parameters)
        found = {row.name: row for row in rows}
        missing = tuple(dict.fromkeys(name for name in wanted if name not in found))
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            shown = ", ".join(name[:64] for name in missing[:_SHOWN])
            error = NotFoundError(f"{cls.model.__name__}: not in this tenant: {shown}{more}")
            error.names = missing
            raise error
        return [found[name] for name in wanted]


@cache
def _by_name(model: type[Persona | Module]) -> Select[Any]:
    return shape_of(model).select.where(
        model.tenant_id == bindparam("tenant"), model.name == bindparam("name")
    )


@cache
def _by_names(model: type[Persona | Module]) -> Select[Any]:
    return shape_of(model).select.where(
        model.tenant_id == bindparam("tenant"),
        # An array is one parameter; a statement takes at most 65,535.
        model.name == any_(bindparam("names", type_=ARRAY(Text))),
    )
