"""Running a search: hits from a function that may use the indexes, and a page of their rows.

Row-level security keeps text operators from every GIN index. So the hits come from functions of the
tables' owner, which answer for the session's tenant alone; the rows are read like any others.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy import Integer, Text, Uuid, bindparam, cast, column, func
from sqlalchemy.dialects.postgresql import REAL

from database.errors import InvalidValueError
from database.models.base import TenantModel
from database.pagination import SearchPage, decode_cursor, encode_cursor
from database.repositories.highlighting import Highlighter
from database.repositories.loading import fetch, loaded, shape_of
from database.repositories.queries import parse_query
from database.session import tenant_of
from database.types import Timestamp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Select
    from sqlalchemy.orm import Session
    from sqlalchemy.types import TypeEngine

    from database.repositories.queries import Mode

__all__ = ["Search", "check_time"]

ModelT = TypeVar("ModelT", bound=TenantModel)

_RANKED = 1000
"""How many hits are ranked, the newest: ranking one parses its text again, 20 us and more."""

_FILTERS: dict[str, TypeEngine[Any]] = {
    "since": Timestamp(),
    "until": Timestamp(),
    "words": Text(),
    "pattern": Text(),
    "ranked": Integer(),
    "after_rank": REAL(),
    "after_id": Uuid(),
    "limit": Integer(),
}


class Search(Generic[ModelT]):
    """The search in one table.

    Args:
        model: What is found.
        filters: The parameters of the table's own, as its search function takes them.
        text_of: What a row shows of itself in a snippet.
        escaped_json: Whether the text that is searched is that of JSON.
    """

    def __init__(
        self,
        model: type[ModelT],
        filters: Mapping[str, TypeEngine[Any]],
        text_of: Callable[[ModelT], str],
        *,
        escaped_json: bool = False,
    ) -> None:
        self._shape = shape_of(model)
        self._text_of = text_of
        self._escaped_json = escaped_json
        self._order = f"{model.__tablename__}.rank"
        self._filters = filters
        self._statement = self._selecting(model, {**filters, **_FILTERS})

    @staticmethod
    def _selecting(
        model: type[TenantModel], parameters: Mapping[str, TypeEngine[Any]]
    ) -> Select[Any]:
        # The casts tell the function's types also for None.
        arguments = (cast(bindparam(name), type_) for name, type_ in parameters.items())
        function = getattr(func, f"search_{model.__tablename__}")
        hits = function(cast(bindparam("tenant"), Text()), *arguments).table_valued(
            column("id", Uuid()), column("rank", REAL()), name="hits"
        )
        return (
            shape_of(model)
            .select.add_columns(hits.c.rank)
            .join(hits, hits.c.id == model.id)
            .where(model.tenant_id == bindparam("tenant"))
            .order_by(hits.c.rank.desc(), hits.c.id.desc())
        )

    def run(
        self,
        db: Session,
        query: str | None,
        filters: Mapping[str, Any],
        *,
        mode: Mode,
        since: datetime | None,
        until: datetime | None,
        highlight: tuple[str, str] | None,
        limit: int,
        cursor: str | None,
    ) -> SearchPage[ModelT]:
        """Return a page of hits: best first, newer first among equals."""
        from database.repositories.base import MAX_PAGE
        from database.rules import check_number

        # Without a query too the mode must be one.
        parsed = parse_query("" if query is None else query, mode, escaped_json=self._escaped_json)
        rank, last = (None, None) if cursor is None else decode_cursor(self._order, cursor)
        parameters = {
            **dict.fromkeys(self._filters),
            **filters,
            "tenant": tenant_of(db),
            "since": check_time("since", since),
            "until": check_time("until", until),
            "words": parsed.words,
            "pattern": parsed.pattern,
            "ranked": _RANKED,
            "after_rank": rank,
            "after_id": last,
            "limit": check_number("limit", limit, 1, MAX_PAGE) + 1,
        }
        highlighter = None
        if highlight is not None:
            highlighter = Highlighter(parsed.terms, mode, highlight)
        if query is not None and parsed.is_empty:
            return SearchPage([])
        rows = fetch(db, self._statement, parameters)
        shown = loaded(
            db,
            self._shape,
            self._shape.names,
            (row[:-1] for row in rows[:limit]),
            {"tenant_id": parameters["tenant"]},
        )
        ranks = [row[-1] for row in rows[:limit]]
        return SearchPage(
            shown,
            encode_cursor(self._order, ranks[-1], shown[-1].id) if len(rows) > limit else None,
            ranks,
            [highlighter.snippet(self._text_of(row)) for row in shown] if highlighter else [],
        )


def check_time(field: str, value: object) -> datetime | None:
    """Return an argument that must be a time with its zone, or None.

    Raises:
        InvalidValueError: It is neither.
    """
    if value is None or (isinstance(value, datetime) and value.tzinfo is not None):
        return value
    raise InvalidValueError(field, "must be a datetime with a time zone")
