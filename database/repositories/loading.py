"""Entities of a session made straight from rows: SQLAlchemy's loader, without its generality.

What the loader does for each query and row, for relationships, inheritance and events that our
models do not have, costs more than the queries themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy import Enum, inspect, select
from sqlalchemy.orm.attributes import instance_state

from database.driver import driver_of
from database.models.base import TenantModel
from database.undoing import touched_in
from database.units import one_read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

__all__ = ["Shape", "fetch", "loaded", "read", "shape_of"]

ModelT = TypeVar("ModelT", bound=TenantModel)


@dataclass(frozen=True, slots=True)
class Shape(Generic[ModelT]):
    """What to select of a model, the id first, and how to make entities of it.

    Attributes:
        model: The model.
        names: The attributes, in the order of the columns.
        select: Selects them; the caller adds tenant, conditions and order.
    """

    model: type[ModelT]
    names: tuple[str, ...]
    select: Select[Any]
    enums: tuple[tuple[str, Mapping[str, Any]], ...]
    new_instance: Callable[[], ModelT]


@cache
def shape_of(model: type[ModelT], *known: str) -> Shape[ModelT]:
    """Return the shape of a model without deferred columns, and without those known anyway.

    Parsing a UUID is what a row costs most: what all rows have in common need not be read.
    """
    mapper = inspect(model)
    attributes = [
        attribute
        for attribute in mapper.column_attrs
        if not attribute.deferred and attribute.key not in ("tenant_id", *known)
    ]
    columns = {attribute.key: attribute.columns[0] for attribute in attributes}
    enums = tuple(
        (name, {member.value: member for member in column.type.enum_class})
        for name, column in columns.items()
        if isinstance(column.type, Enum) and column.type.enum_class is not None
    )
    selected = select(*columns.values())
    make: Callable[[], Any] = mapper.class_manager.new_instance
    return Shape(model, tuple(columns), selected, enums, make)


def read(
    db: Session,
    shape: Shape[ModelT],
    statement: Select[Any],
    parameters: Mapping[str, Any],
    **known: Any,
) -> list[ModelT]:
    """Run a statement made of the shape's; return its entities in order.

    Args:
        db: The session.
        shape: What the statement selects.
        statement: Takes the parameter `tenant`.
        parameters: The other ones, and `tenant`.
        known: The values of the columns that the shape leaves out.
    """
    rows = fetch(db, statement, parameters)
    return loaded(db, shape, shape.names, rows, {"tenant_id": parameters["tenant"], **known})


def fetch(
    db: Session, statement: Any, parameters: Mapping[str, Any], *, in_binary: bool = False
) -> Sequence[Any]:
    """Run a statement that reads; return its rows as the driver gives them.

    In binary, large columns of bytes take half the time.
    """
    with one_read(db) as connection:
        if in_binary:
            driver_of(connection).answer_in_binary()
        result = connection.execute(statement, parameters)
        assert result.cursor is not None
        rows = result.cursor.fetchall()
        result.close()
        return rows


def loaded(
    db: Session,
    shape: Shape[ModelT],
    names: Sequence[str],
    rows: Iterable[Sequence[Any]],
    known: Mapping[str, Any],
) -> list[ModelT]:
    """Return the session's entities of rows: new ones, or those it has, brought up to date.

    Args:
        db: The session; the entities are persistent in it.
        shape: Of what model.
        names: The attributes of the rows, the id first.
        rows: The values, as the database has them.
        known: What all rows have in common; with `names` all columns that the shape has.
    """
    entities = []
    tenant = known["tenant_id"]
    identities = db.identity_map
    touched = touched_in(db)
    for row in rows:
        key = (shape.model, (tenant, row[0]), None)
        found = identities.get(key)
        entity = found or shape.new_instance()
        state = instance_state(entity)
        if found is not None and touched is not None:
            touched.keep(state)
        values = entity.__dict__
        values.update(zip(names, row, strict=True))
        values.update(known)
        for name, members in shape.enums:
            values[name] = members[values[name]]
        if found is None:
            state.key = key
            state.session_id = db.hash_key
            identities.add(state)
            if touched is not None:
                touched.note(state)
        else:
            # Ends what was expired or changed before, as the loader's populate_existing does.
            state._commit_all(values, identities)  # noqa: SLF001
        entities.append(entity)
    return entities
