"""What a field may hold, checked before anything is sent: from the columns, by pydantic."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Required
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    with_config,
)
from sqlalchemy import BigInteger, Column, Enum, Integer, LargeBinary, String
from sqlalchemy.dialects.postgresql import JSONB
from typing_extensions import TypedDict

from database.errors import InvalidValueError
from database.types import Serialized, Timestamp, Vector, clean_text, dump_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from database.models.base import TenantModel
    from database.types import Policy

__all__ = ["check_fields", "check_number"]

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
        checked = _adapter(model, partial).validate_python(values, context=policy)
    except ValidationError as error:
        raise _first(error) from None
    if "metadata" in checked:
        checked["metadata_"] = checked.pop("metadata")
    return checked


def check_number(field: str, value: object, least: int, most: int) -> int:
    """Return an argument that must be a whole number in [least, most].

    Raises:
        InvalidValueError: It is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise InvalidValueError(field, f"must be a whole number from {least} to {most}")
    return value


def _first(error: ValidationError) -> InvalidValueError:
    found = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, found["loc"])) or "values"
    ours = found.get("ctx", {}).get("error")
    if isinstance(ours, InvalidValueError):
        return ours
    return InvalidValueError(field, found["msg"])


@cache
def _adapter(model: type[TenantModel], partial_: bool) -> TypeAdapter[dict[str, Any]]:
    fields = {}
    for attribute in model.__mapper__.column_attrs:
        column = attribute.columns[0]
        if not isinstance(column, Column) or column.name == "tenant_id":
            continue
        optional = (
            partial_
            or column.nullable
            or column.default is not None
            or column.server_default is not None
            or column.name in ("id", "thread_id")
        )
        kind = _type(column)
        fields[column.name] = NotRequired[kind] if optional else Required[kind]  # type: ignore[valid-type]
    described = TypedDict(f"{model.__name__}Fields", fields)  # type: ignore[misc]
    return TypeAdapter(with_config(ConfigDict(strict=True, extra="forbid"))(described))


def _type(column: Column[Any]) -> Any:
    kind: Any
    rule: dict[str, Any] = dict(column.info.get("rule", {}))
    match column.type:
        case Enum(enum_class=values) if values is not None:
            kind = Annotated[values, Strict(strict=False)]
        case JSONB():
            return _json_type(column)
        case Vector():
            kind = Any
        case String():
            kind = Annotated[str, AfterValidator(partial(_clean, field=column.name))]
            if column.type.length is not None:
                rule.setdefault("max_length", column.type.length)
        case LargeBinary():
            kind = bytes
        case Timestamp():
            kind = AwareDatetime
        case BigInteger():
            rule = {"ge": -_BIG_INTEGER, "le": _BIG_INTEGER} | rule
            kind = int
        case Integer():
            rule = {"ge": -_INTEGER, "le": _INTEGER} | rule
            kind = int
        case other:
            kind = other.python_type
            if kind is UUID:
                kind = Annotated[UUID, Strict(strict=False)]
    # A field's constraints go to the type, not to the union with None.
    kind = Annotated[kind, Field(**rule)] if rule else kind
    return kind | None if column.nullable else kind


def _clean(value: str, info: ValidationInfo, *, field: str) -> str:
    return clean_text(value, field, info.context)


def _json_type(column: Column[Any]) -> Any:
    is_object = column.default is not None or column.server_default is not None

    def serialize(value: Any, info: ValidationInfo) -> Serialized | None:
        if value is None and column.nullable:
            return None
        if is_object and not isinstance(value, dict):
            raise InvalidValueError(column.name, "must be a JSON object")
        return Serialized(dump_json(value, column.name, info.context))

    return Annotated[Any, PlainValidator(serialize)]
