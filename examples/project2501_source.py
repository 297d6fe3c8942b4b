"""The database of Project 2501, as it is read: one snapshot of whichever schema it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.datetime import TimestampLoader, TimestamptzLoader
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

if TYPE_CHECKING:
    from psycopg.abc import Buffer

Fields = dict[str, Any]

CHILDREN = ("messages", "conversation_states", "conversation_memory")
OTHER_NAMES = {"conversation_memories": "conversation_memory"}  # what its code calls a table
COLUMNS = {  # that are read, as far as they are there; besides ids and timestamps
    "personas": "name description template mode loop_frequency first_message image_path extra_data"
    " is_active",
    "modules": "name description content type trigger_pattern script execution_context"
    " requires_ai_inference stage_priority script_analysis_metadata is_active",
    "conversations": "title persona_id provider_type provider_config",
    "messages": "role content thinking extra_data input_tokens output_tokens",
    "conversation_states": "persona_id module_id execution_stage state_key state_value variables"
    " execution_metadata executed_at",
    "conversation_memory": "persona_id content compressed_content memory_type importance embedding"
    " metadata last_accessed access_count first_message_id memory_sequence original_message_range"
    " message_count_at_compression",
}
ORDER = {  # as far as there are such columns; with a minus the newest first
    "personas": "created_at id",
    "modules": "created_at id",
    "conversations": "id",
    "messages": "conversation_id created_at id",
    "conversation_states": "conversation_id -executed_at -updated_at -created_at -id",
    "conversation_memory": "conversation_id memory_sequence created_at id",
}
EVERYWHERE = ("id", "conversation_id", "created_at", "updated_at")
COLUMNS_OF_ALL = (
    "SELECT table_name, column_name, data_type FROM information_schema.columns"
    " WHERE table_schema = current_schema() ORDER BY table_name, ordinal_position"
)
FETCHED_ROWS = 200


UNREADABLE = object()
"""A time that Python has none for: an infinite one, or one beyond its calendar."""


class ReadableTime(TimestampLoader):
    """Reads a timestamp, or `UNREADABLE`."""

    def load(self, data: Buffer) -> Any:
        """Return the value."""
        try:
            return super().load(data)
        except psycopg.DataError:
            return UNREADABLE


class ReadableTimeWithZone(TimestamptzLoader):
    """Reads a timestamptz, or `UNREADABLE`."""

    def load(self, data: Buffer) -> Any:
        """Return the value."""
        try:
            return super().load(data)
        except psycopg.DataError:
            return UNREADABLE


class SourceError(Exception):
    """The source cannot be read, or is none."""


class Source:
    """One snapshot of the old database; which tables and columns it has."""

    def __init__(self, url: str) -> None:
        self.connection = connected(url)
        self.names: dict[str, str] = {}  # what the tables are called there
        self.columns: dict[str, list[str]] = {}
        self.naive: list[str] = []
        try:
            self._find_columns()
        except psycopg.Error as error:
            self.connection.close()
            raise SourceError(type(error).__name__) from None
        except SourceError:
            self.connection.close()
            raise

    def _find_columns(self) -> None:
        ids = set()
        for name, column, kind in self.connection.execute(COLUMNS_OF_ALL):
            table = OTHER_NAMES.get(name, name)
            if table not in COLUMNS:
                continue
            if column == "tenant_id":
                raise SourceError("is a database of this library, not of Project 2501")
            if self.names.setdefault(table, name) != name:
                raise SourceError(f"has both {self.names[table]} and {name}")
            if column in EVERYWHERE or column in COLUMNS[table].split():
                self.columns.setdefault(table, []).append(column)
                if kind == "timestamp without time zone":
                    self.naive.append(f"{name}.{column}")
                elif kind == "uuid":
                    ids.add((table, column))
        if not self.names:
            raise SourceError("has no table of Project 2501")
        needed = {(table, "id") for table in self.names}
        needed |= {(table, "conversation_id") for table in CHILDREN if table in self.names}
        for table, column in sorted(needed - ids):
            raise SourceError(f"{self.names[table]} has no {column} of type uuid")

    def count(self) -> int:
        """Return how many rows there are."""
        counts = (
            sql.SQL("(SELECT count(*) FROM {})").format(sql.Identifier(name))
            for name in self.names.values()
        )
        row = self.connection.execute(sql.SQL("SELECT {}").format(sql.SQL(" + ").join(counts)))
        return sum(count for (count,) in row)

    def rows(self, table: str) -> Iterator[Fields]:
        """Yield the rows of a table in its order, by a cursor of the server."""
        if table not in self.names:
            return
        order = [name for name in ORDER[table].split() if name.lstrip("-") in self.columns[table]]
        statement = sql.SQL("SELECT {} FROM {} ORDER BY {}").format(
            sql.SQL(", ").join(map(sql.Identifier, self.columns[table])),
            sql.Identifier(self.names[table]),
            sql.SQL(", ").join(
                sql.SQL("{} DESC NULLS LAST" if name.startswith("-") else "{}").format(
                    sql.Identifier(name.lstrip("-"))
                )
                for name in order
            ),
        )
        with self.connection.cursor(f"read_{table}", row_factory=dict_row) as cursor:
            cursor.itersize = FETCHED_ROWS
            yield from cursor.execute(statement)


def connected(url: str) -> psycopg.Connection:
    """Return a connection that only reads, and sees one snapshot."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise SourceError("must be a PostgreSQL URL") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres") or "@" in (parsed.host or ""):
        raise SourceError("must be a PostgreSQL URL, its password percent-encoded")
    plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        connection = psycopg.connect(plain, client_encoding="utf8")
    except psycopg.Error as error:
        reason = next(iter(str(error).splitlines()), "no connection")
        if parsed.password:
            reason = reason.replace(str(parsed.password), "***")
        raise SourceError(reason) from None
    connection.adapters.register_loader("timestamp", ReadableTime)
    connection.adapters.register_loader("timestamptz", ReadableTimeWithZone)
    connection.read_only = True
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    return connection


class Children:
    """The rows of a table, taken conversation by conversation: both come in the order of ids."""

    def __init__(self, rows: Iterator[Fields], orphan: Callable[[Fields], None]) -> None:
        self.rows = rows
        self.orphan = orphan
        self.next = next(rows, None)

    def of(self, conversation: UUID) -> Iterator[Fields]:
        """Yield those of a conversation; those in front of them have none."""
        while (row := self.next) and row["conversation_id"] is not None:
            if row["conversation_id"] > conversation:
                return
            self.next = next(self.rows, None)
            if row["conversation_id"] == conversation:
                yield row
            else:
                self.orphan(row)

    def drain(self) -> None:
        """Take those that are left: they have no conversation."""
        while row := self.next:
            self.next = next(self.rows, None)
            self.orphan(row)
