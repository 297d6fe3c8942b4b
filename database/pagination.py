"""Pages by key: each begins where the one before ended, at equal cost however far."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Generic, TypeVar
from uuid import UUID

import orjson

from database.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Page", "SearchPage", "decode_cursor", "encode_cursor"]

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


@dataclass(frozen=True, slots=True)
class SearchPage(Page[T]):
    """A part of what a search found.

    Attributes:
        ranks: How well each item fits, by ts_rank; 0 where hits are not ranked: without words, and
            for all but the newest 1,000.
        snippets: Of each item a short piece with the hits marked, if they were asked for.
    """

    ranks: list[float] = field(default_factory=list)
    snippets: list[str] = field(default_factory=list)


def encode_cursor(order: str, value: datetime | float | str | None, row_id: UUID) -> str:
    """Return the cursor that continues after a row.

    Args:
        order: What the list is, so that no other list takes the cursor: table and sort key.
        value: What the list is sorted by before the id: a time, for "rank" a number, for "name"
            text; None when by the id alone.
        row_id: The row's id, which breaks ties.
    """
    data = orjson.dumps([order, value, row_id])
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decode_cursor(order: str, cursor: str) -> tuple[datetime | float | str | None, UUID]:
    """Return the sort value and the id in a cursor of the given list.

    Raises:
        InvalidValueError: It is no cursor, or one of another list.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        found, value, row_id = orjson.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        is_time = isinstance(value, str) and not order.endswith(".name")
        sort_value = datetime.fromisoformat(value) if is_time else value
        last_id = UUID(row_id)
    except (ValueError, TypeError, AttributeError, binascii.Error):
        raise InvalidValueError("cursor", "must be a next_cursor of this list") from None
    if order.endswith(".id"):
        fits = sort_value is None
    elif order.endswith(".rank"):
        fits = isinstance(sort_value, float) and 0 <= sort_value <= 1
    elif order.endswith(".name"):
        fits = isinstance(sort_value, str) and "\0" not in sort_value
    else:
        fits = isinstance(sort_value, datetime) and sort_value.tzinfo is not None
    if found != order or not fits:
        raise InvalidValueError("cursor", "must be a next_cursor of this list")
    return sort_value, last_id
