"""What a field may hold, checked before anything is sent: from the columns, by pydantic."""

from __future__ import annotations

from contextlib import suppress
from functools import cache, partial
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Required
from uuid import UUID

import orjson
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    with_config,
)
from sqlalchemy import BigInteger, Column, Enum, Integer, String, Uuid
from sqlalchemy.dialects.postgresql import JSONB
from typing_extensions import TypedDict

from database.errors import InvalidValueError
from database.types import Serialized, Timestamp, Vector, check_time, clean_text, dump_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from database.models.base import TenantModel
    from database.types import Policy

__all__ = ["check_fields", "check_number", "refusal_of"]

_RULES = {"missing": "must be given", "extra_forbidden": "is not a field"}
_INTEGER = 2**31 - 1
_BIG_INTEGER = 2**63 - 1


def check_fields(
    model: type[TenantModel],
    values: Mapping[str, Any],
    policy: Policy,
    *,
    partial: bool = False,
) -> dict[str, Any]:
    """Return values for a statement, by attribute: cleaned, JSON serialised.

    Args:
        model: Whose fields they are.
        values: By the field's public name; `metadata` is the column of that name.
        policy: What to do with text that PostgreSQL cannot store.
        partial: Whether fields without a default may be missing, as in an update.

    Raises:
        InvalidValueError: A field is unknown, missing, or breaks its rule.
    """
    try:
        checked = _adapter(model, optional=partial).validate_python(values, context=policy)
    except ValidationError as error:
        raise _first(error) from None
    if "metadata" in checked:
        checked["metadata_"] = checked.pop("metadata")
    return checked


def refusal_of(
    model: type[BaseModel], value: Mapping[str, Any], field: str
) -> InvalidValueError | None:
    """Return why a JSON object is not what a pydantic model takes; None if it is.

    It names the first member that breaks a rule.

    Raises:
        InvalidValueError: `model` is no model.
    """
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise InvalidValueError("model", "must be a class of pydantic's BaseModel")
    try:
        # Read as JSON, a strict model takes timestamps and enums written as text.
        model.model_validate_json(orjson.dumps(value))
    except ValidationError as error:
        return _first(error, field)
    return None


def check_number(field: str, value: object, least: int, most: int) -> int:
    """Return an argument that must be a whole number in [least, most].

    Raises:
        InvalidValueError: It is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise InvalidValueError(field, f"must be a whole number from {least} to {most}")
    return value


def _first(error: ValidationError, *within: str) -> InvalidValueError:
    found = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, (*within, *found["loc"]))) or "values"
    ours = found.get("ctx", {}).get("error")
    if isinstance(ours, InvalidValueError):
        return ours
    return InvalidValueError(field, _RULES.get(found["type"], found["msg"]))


@cache
def _adapter(model: type[TenantModel], *, optional: bool) -> TypeAdapter[dict[str, Any]]:
    fields = {}
    for attribute in model.__mapper__.column_attrs:
        column = attribute.columns[0]
        if not isinstance(column, Column) or column.name == "tenant_id":
            continue
        may_be_missing = (
            optional
            or column.nullable
            or column.default is not None
            or column.server_default is not None
            or column.name in ("id", "thread_id")
        )
        kind = _type(column)
        fields[column.name] = NotRequired[kind] if may_be_missing else Required[kind]
    described = TypedDict(f"{model.__name__}Fields", fields)  # type: ignore[misc]
    strict = with_config(ConfigDict(strict=True, extra="forbid"))
    return TypeAdapter(strict(described))  # type: ignore[arg-type]


def _type(column: Column[Any]) -> Any:
    if isinstance(column.type, JSONB):
        return _json_type(column)
    kind, rule = _plain_type(column)
    # A field's constraints go to the type, not to the union with None.
    rule |= column.info.get("rule", {})
    kind = Annotated[kind, Field(**rule)] if rule else kind
    if isinstance(column.type, String) and not isinstance(column.type, Enum):
        # Before the rules: pydantic itself refuses lone surrogates.
        kind = Annotated[kind, BeforeValidator(partial(_clean, field=column.name))]
    return kind | None if column.nullable else kind


def _plain_type(column: Column[Any]) -> tuple[Any, dict[str, Any]]:  # noqa: PLR0911 - a table
    match column.type:
        case Enum(enum_class=values) if values is not None:
            return Annotated[values, Strict(strict=False)], {}
        case String(length=length):
            return str, {} if length is None else {"max_length": length}
        case Timestamp():
            readable = AfterValidator(partial(check_time, field=column.name))
            return Annotated[AwareDatetime, readable], {}
        case BigInteger():
            return int, {"ge": -_BIG_INTEGER, "le": _BIG_INTEGER}
        case Integer():
            return int, {"ge": -_INTEGER, "le": _INTEGER}
        case Uuid():
            return Annotated[UUID, Strict(strict=False)], {}
        case Vector():
            return Annotated[Any, PlainValidator(partial(_check_vector, field=column.name))], {}
        case other:
            return other.python_type, {}


def _clean(value: Any, info: ValidationInfo, *, field: str) -> Any:
    return clean_text(value, field, _policy(info)) if isinstance(value, str) else value


def _check_vector(value: Any, *, field: str) -> list[float]:
    # A NumPy array, or whatever else can become a list.
    numbers = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(numbers, list | tuple) and numbers:
        kinds = set(map(type, numbers))
        if bool not in kinds and all(issubclass(kind, Real) for kind in kinds):
            with suppress(OverflowError):
                floats = list(map(float, numbers))
                if all(map(isfinite, floats)):
                    return floats
    raise InvalidValueError(field, "must be a sequence of finite numbers")


def _policy(info: ValidationInfo) -> Policy:
    assert info.context is not None
    return info.context  # type: ignore[no-any-return]


def _json_type(column: Column[Any]) -> Any:
    is_object = column.default is not None or column.server_default is not None

    def serialize(value: Any, info: ValidationInfo) -> Serialized | None:
        if value is None and column.nullable:
            return None
        if is_object and not isinstance(value, dict):
            raise InvalidValueError(column.name, "must be a JSON object")
        return Serialized(dump_json(value, column.name, _policy(info)))

    return Annotated[Any, PlainValidator(serialize)]
