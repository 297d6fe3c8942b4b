"""Column types, and what is done to values that PostgreSQL cannot store.

PostgreSQL refuses NUL and lone surrogates in text, and NaN and Infinity in JSON. The policy
"replace" puts U+FFFD for the former and null for the latter; "error" raises InvalidValueError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

import orjson
from sqlalchemy import DateTime, Dialect, Enum
from sqlalchemy.types import TypeDecorator, UserDefinedType

from database.errors import InvalidValueError

__all__ = [
    "Policy",
    "Serialized",
    "Timestamp",
    "Vector",
    "check_text",
    "check_time",
    "clean_text",
    "dump_json",
    "enum_type",
    "utcnow",
]

Policy = Literal["replace", "error"]

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


def utcnow() -> datetime:
    """Return the present time in UTC, time zone included."""
    return datetime.now(UTC)


def check_text(field: str, value: object) -> str:
    """Return an argument that must be text.

    Raises:
        InvalidValueError: It is not.
    """
    if not isinstance(value, str):
        raise InvalidValueError(field, "must be text")
    return value


def clean_text(value: str, field: str = "text", policy: Policy = "replace") -> str:
    """Return text that PostgreSQL can store.

    Raises:
        InvalidValueError: The text holds NUL or a lone surrogate and the policy is "error".
    """
    if value.isascii():
        if "\x00" not in value:
            return value
    elif not _UNSTORABLE.search(value):
        return value
    if policy == "error":
        raise InvalidValueError(field, "must not contain NUL or lone surrogates")
    return _UNSTORABLE.sub("\ufffd", value)


@dataclass(frozen=True, slots=True)
class Serialized:
    """A JSON value that is text already, so that it is serialised only once."""

    data: bytes


def dump_json(value: object, field: str = "JSON", policy: Policy = "replace") -> bytes:
    """Serialise a value for a JSONB column.

    Besides JSON's own types, what orjson knows is taken: datetimes, UUIDs, enums, dataclasses.

    Raises:
        InvalidValueError: The value is not JSON, or unstorable under the policy "error".
    """
    if isinstance(value, Serialized):
        return value.data
    try:
        data = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        data = _dump_cleaned(value, field, policy, error)
    else:
        if b"\\u0000" in data and _ESCAPED_NUL.search(data):
            data = _dump_cleaned(value, field, policy, None)
    if policy == "error" and _has_nonfinite(value):
        raise InvalidValueError(field, "must not contain NaN or Infinity")
    return data


def _dump_cleaned(value: object, field: str, policy: Policy, error: TypeError | None) -> bytes:
    try:
        return orjson.dumps(_cleaned(value, field, policy), option=orjson.OPT_SERIALIZE_NUMPY)
    except (TypeError, RecursionError):
        # The cause's text can name a value's type but never shows the value.
        rule = "must be JSON: text keys, numbers of at most 64 bits, at most 250 levels"
        raise InvalidValueError(field, rule) from error


def _cleaned(value: object, field: str, policy: Policy) -> object:
    if isinstance(value, str):
        return clean_text(value, field, policy)
    if isinstance(value, dict):
        return {
            _cleaned(key, field, policy): _cleaned(item, field, policy)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_cleaned(item, field, policy) for item in value]
    return value


def _has_nonfinite(value: object) -> bool:
    if isinstance(value, float):
        return value != value or value in (float("inf"), float("-inf"))  # noqa: PLR0124
    if isinstance(value, dict):
        return any(map(_has_nonfinite, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_nonfinite, value))


def check_time(value: datetime, field: str) -> datetime:
    """Return a datetime that can be stored and read again.

    Raises:
        InvalidValueError: It is naive, so that its time zone would be a guess, or in UTC beyond
            Python's calendar: then no row with it could be read.
    """
    if value.tzinfo is None:
        raise InvalidValueError(field, "must have a time zone")
    try:
        value.astimezone(UTC)
    except OverflowError:
        raise InvalidValueError(field, "must be from the years 1 to 9999 in UTC") from None
    return value


class Timestamp(TypeDecorator[datetime]):
    """A timestamptz of times that can be read again, as `check_time` says."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return the value, if it can be read again."""
        return None if value is None else check_time(value, "datetime")


def enum_type(values: type[StrEnum], name: str) -> Enum:
    """Return the type of a column that stores an enum by value, as text with a CHECK.

    Args:
        values: The enum.
        name: The column, by which the CHECK is named.
    """
    return Enum(
        values,
        name=name,
        native_enum=False,
        create_constraint=True,
        length=32,
        values_callable=lambda kind: [item.value for item in kind],
    )


class Vector(UserDefinedType[Sequence[float]]):
    """A pgvector column: `vector(n)`, or `halfvec(n)` above 2,000 dimensions.

    Takes a sequence of floats or a NumPy array; gives a list of floats.
    """

    cache_ok = True

    def __init__(self, dimensions: int | None = None, *, half: bool = False) -> None:
        self.dimensions = dimensions
        self.half = half

    def get_col_spec(self, **_: Any) -> str:
        """Return the column's type in SQL."""
        name = "halfvec" if self.half else "vector"
        return name if self.dimensions is None else f"{name}({self.dimensions})"

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], str | None]:  # noqa: ARG002
        """Return what makes pgvector's text of a vector."""

        def process(value: Any) -> str | None:
            if value is None:
                return None
            return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()

        return process

    def result_processor(
        self,
        dialect: Dialect,  # noqa: ARG002
        coltype: object,  # noqa: ARG002
    ) -> Callable[[Any], list[float] | None]:
        """Return what reads pgvector's text."""

        def process(value: str | None) -> list[float] | None:
            return None if value is None else list(map(float, orjson.loads(value)))

        return process
