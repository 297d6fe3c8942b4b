"""Pages by key: each begins where the one before ended, at equal cost however far."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Generic, TypeVar
from uuid import UUID

import orjson

from database.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Page", "decode_cursor", "encode_cursor"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list.

    Attributes:
        items: The rows, in order.
        next_cursor: Where the next page begins; None after the last one. Opaque, safe in a URL.
    """

    items: list[T]
    next_cursor: str | None = None

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def encode_cursor(order: str, value: datetime | None, row_id: UUID) -> str:
    """Return the cursor that continues after a row.

    Args:
        order: What the list is, so that no other list takes the cursor.
        value: What the list is sorted by before the id; None when by the id alone.
        row_id: The row's id, which breaks ties.
    """
    data = orjson.dumps([order, value, row_id])
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decode_cursor(order: str, cursor: str) -> tuple[datetime | None, UUID]:
    """Return the sort value and the id in a cursor of the given list.

    Raises:
        InvalidValueError: It is no cursor, or one of another list.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        found, value, row_id = orjson.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        sort_value = None if value is None else datetime.fromisoformat(value)
        last_id = UUID(row_id)
    except (ValueError, TypeError, AttributeError, binascii.Error):
        raise InvalidValueError("cursor", "must be a next_cursor of this list") from None
    if order.endswith(".id"):
        fits = sort_value is None
    else:
        fits = sort_value is not None and sort_value.tzinfo is not None
    if found != order or not fits:
        raise InvalidValueError("cursor", "must be a next_cursor of this list")
    return sort_value, last_id
