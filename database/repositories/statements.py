"""The statements that all repositories use, for any model.

Building a statement costs about 100 us, more than its query: each is built once.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Select, bindparam, delete, func, insert, select, tuple_, update

from database.models.base import TenantModel
from database.repositories.loading import shape_of

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.sql.dml import ReturningDelete, ReturningInsert, ReturningUpdate

__all__ = [
    "OPTIONS",
    "checking_id",
    "counting",
    "deleting_by_id",
    "inserting",
    "listing",
    "selecting_by_id",
    "updating_by",
]

ModelT = TypeVar("ModelT", bound=TenantModel)

# The statements name the tenant themselves, and show what the database holds now: between two calls
# of an idle session others may have written.
OPTIONS: dict[str, Any] = {"names_tenant": True, "populate_existing": True}


@cache
def inserting(model: type[TenantModel], *computed: Any) -> ReturningInsert[Any]:
    """Inserts one row or many; returns them in order, and what is computed for each."""
    return (
        insert(model)
        .returning(model, *computed, sort_by_parameter_order=True)
        .execution_options(**OPTIONS)
    )


@cache
def selecting_by_id(model: type[TenantModel]) -> Select[Any]:
    """Selects the row of an id, as the model's shape."""
    return shape_of(model).select.where(
        model.tenant_id == bindparam("tenant"), model.id == bindparam("key")
    )


@cache
def checking_id(model: type[ModelT]) -> Select[Any]:
    """Selects the id, if there is such a row."""
    return (
        select(model.id)
        .where(model.tenant_id == bindparam("tenant"), model.id == bindparam("key"))
        .execution_options(**OPTIONS)
    )


@cache
def deleting_by_id(model: type[ModelT]) -> ReturningDelete[UUID]:
    """Deletes the row of an id and returns the id."""
    return (
        delete(model)
        .where(model.tenant_id == bindparam("tenant"), model.id == bindparam("key"))
        .returning(model.id)
        .execution_options(synchronize_session=False, names_tenant=True)
    )


@cache
def updating_by(model: type[TenantModel], column: Any, *computed: Any) -> ReturningUpdate[Any]:
    """Updates the row that has a key in a column; returns it, and what is computed for it."""
    return (
        update(model)
        .where(model.tenant_id == bindparam("tenant"), column == bindparam("key"))
        .returning(model, *computed)
        .execution_options(synchronize_session=False, **OPTIONS)
    )


@cache
def counting(model: type[ModelT], filters: tuple[str, ...]) -> Select[int]:
    """Counts the rows with given values."""
    return (
        select(func.count())
        .select_from(model)
        .where(model.tenant_id == bindparam("tenant"), *_conditions(model, filters))
        .execution_options(**OPTIONS)
    )


@cache
def listing(
    model: type[TenantModel], order: str, filters: tuple[str, ...], *conditions: Any, after: bool
) -> Select[Any]:
    """Selects a page, as the model's shape, from the start or after a row.

    Newest first, but names from A to Z.
    """
    column = getattr(model, order)
    statement = (
        shape_of(model)
        .select.where(
            model.tenant_id == bindparam("tenant"), *_conditions(model, filters), *conditions
        )
        .limit(bindparam("limit"))
    )
    if order == "id":
        statement = statement.order_by(model.id.desc())
        return statement.where(model.id < bindparam("after_id")) if after else statement
    if order == "name":
        statement = statement.order_by(column, model.id)
    else:
        statement = statement.order_by(column.desc(), model.id.desc())
    if not after:
        return statement
    key = tuple_(
        bindparam("after_value", type_=column.type), bindparam("after_id", type_=model.id.type)
    )
    row = tuple_(column, model.id)
    return statement.where(row > key if order == "name" else row < key)


def _conditions(model: type[ModelT], filters: tuple[str, ...]) -> list[Any]:
    return [getattr(model, name) == bindparam(f"filter_{name}") for name in filters]
