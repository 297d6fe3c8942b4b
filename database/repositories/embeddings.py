"""Embeddings as pgvector reads them, checked against what the database was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

import orjson
from sqlalchemy import text

from database.errors import ConfigurationError, InvalidValueError
from database.units import one_read

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

__all__ = ["check_dimensions", "column_type", "vector_text"]

# pgvector indexes `vector` up to 2,000 dimensions, `halfvec` up to 4,000.
_INDEXED_AS_VECTOR = 2000
# The length of a vector is computed in single precision: beyond these it is infinite or zero.
_RANGES = {"vector": (1e-15, 1e15), "halfvec": (1e-7, 65504.0)}

_DIMENSIONS = text(
    "SELECT atttypmod FROM pg_attribute"
    " WHERE attrelid = to_regclass('conversation_memory') AND attname = 'embedding'"
)


def column_type(db: Session) -> str:
    """Return the type of the column of embeddings."""
    return "vector" if _dimensions(db) <= _INDEXED_AS_VECTOR else "halfvec"


def vector_text(db: Session, numbers: list[float], field: str = "embedding") -> str:
    """Return the text of a checked vector.

    Raises:
        InvalidValueError: It has not the configured dimensions, is zero, or out of range.
    """
    expected = _dimensions(db)
    if len(numbers) != expected:
        raise InvalidValueError(field, f"must have {expected} dimensions, not {len(numbers)}")
    if not any(numbers):
        raise InvalidValueError(field, "must not be all zeros: it has no direction")
    least, most = _RANGES[column_type(db)]
    if not least <= max(map(abs, numbers)) <= most:
        raise InvalidValueError(field, f"must have its largest number from {least:g} to {most:g}")
    return orjson.dumps(numbers).decode()


def check_dimensions(db: Session) -> None:
    """Look once for each engine whether its database was migrated with the configured dimensions.

    Raises:
        ConfigurationError: It was not.
    """
    engine = db.get_bind().engine
    if engine in _checked:
        return
    with one_read(db) as connection:
        found = connection.scalar(_DIMENSIONS)
    if found is None:
        # There is no such table, which the statement to come will say.
        return
    if found != _dimensions(db):
        msg = (
            f"DATABASE_EMBEDDING_DIMENSIONS is {_dimensions(db)}, but the database was migrated"
            f" with {found}"
        )
        raise ConfigurationError(msg)
    _checked.add(engine)


def _dimensions(db: Session) -> int:
    dimensions: int = db.get_bind().get_execution_options()["embedding_dimensions"]
    return dimensions


_checked: WeakSet[Engine] = WeakSet()
