"""Pydantic AI's own JSON of its values, exact for any text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError
from pydantic_ai.messages import ModelMessagesTypeAdapter
from pydantic_core import PydanticSerializationError

from database.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import TypeAdapter
    from pydantic_ai.messages import ModelMessage

__all__ = ["FORMAT", "dump", "dump_message", "parse", "parse_message", "parse_messages"]

T = TypeVar("T")

FORMAT = "pydantic-ai/1"
"""The `data_format` of messages: of one message what `ModelMessagesTypeAdapter` makes of it."""


def dump(adapter: TypeAdapter[T], value: T, field: str) -> bytes:
    """Return the JSON of a value.

    Raises:
        InvalidValueError: It has none.
    """
    try:
        try:
            return adapter.dump_json(value)
        except PydanticSerializationError:
            # Of lone surrogates. The standard library escapes them; those in keys are replaced.
            return json.dumps(adapter.dump_python(value, mode="json")).encode()
    except (PydanticSerializationError, TypeError, ValueError):
        # Not the cause: it shows contents.
        raise InvalidValueError(field, "must be serialisable by Pydantic AI") from None


def parse(adapter: TypeAdapter[T], data: bytes) -> T:
    """Return the value that `dump` made JSON of.

    Raises:
        ValueError, RecursionError: It is no such JSON. The text shows contents.
    """
    try:
        return adapter.validate_json(data)
    except ValidationError:
        if b"\\ud" not in data:
            raise
        return adapter.validate_python(json.loads(data))


def dump_message(message: ModelMessage, field: str) -> bytes:
    """Return the JSON of a message, as `dump` does."""
    return dump(ModelMessagesTypeAdapter, [message], field)[1:-1]


def parse_message(data: bytes) -> ModelMessage:
    """Return the message of its JSON; raise as `parse` does."""
    # One by one is as fast as all at once, and says which one is corrupt.
    (message,) = parse(ModelMessagesTypeAdapter, b"[%b]" % data)
    return message


def parse_messages(data: Sequence[bytes | None]) -> list[ModelMessage] | None:
    """Return the messages of their JSON; None if one has to be looked at by itself."""
    validate = ModelMessagesTypeAdapter.validate_json
    try:
        # As fast as all at once, which would take the memory twice.
        return [message for one in data for (message,) in (validate(b"[%b]" % (one or b"")),)]
    except (ValueError, RecursionError):
        return None
