"""The other side: psycopg by hand, the same statements in the same kind of transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from psycopg.types.json import Jsonb
from sqlalchemy.dialects.postgresql.psycopg import dialect
from uuid_utils.compat import uuid7

from database.repositories.appending import APPEND
from database.repositories.bookkeeping import PREVIEW

if TYPE_CHECKING:
    import psycopg

__all__ = ["BY_EMAIL", "HISTORY", "LAST", "PAGE", "PAGE_AFTER", "Raw"]

Row = tuple[Any, ...]

# Exactly what the library sends.
_COMPILED = APPEND.compile(dialect=dialect())  # type: ignore[no-untyped-call]
_APPEND = str(_COMPILED)
_NOTHING = dict.fromkeys(_COMPILED.params)
LAST = """
SELECT * FROM messages WHERE tenant_id = %s AND conversation_id = %s AND is_active
ORDER BY position DESC LIMIT %s"""
HISTORY = """
SELECT * FROM messages WHERE tenant_id = %s AND conversation_id = %s AND is_active
ORDER BY position"""
_CONVERSATIONS = """
SELECT c.*, (SELECT u.email FROM users u WHERE u.tenant_id = c.tenant_id AND u.id = c.user_id)
FROM conversations c WHERE c.tenant_id = %s AND c.user_id = %s"""
_IN_ORDER = " ORDER BY c.updated_at DESC, c.id DESC LIMIT %s"
PAGE = _CONVERSATIONS + _IN_ORDER
PAGE_AFTER = _CONVERSATIONS + " AND (c.updated_at, c.id) < (%s, %s)" + _IN_ORDER
BY_EMAIL = "SELECT * FROM users WHERE tenant_id = %s AND email = %s"
_COUNT_UP = """
UPDATE conversations
SET last_position = last_position + %s, message_count = message_count + %s,
    last_message = %s, updated_at = %s, version = version + 1
WHERE tenant_id = %s AND id = %s RETURNING last_position"""
_INSERT = """
INSERT INTO messages (tenant_id, id, created_at, updated_at, conversation_id, position, role,
    content, extra_data, model, input_tokens, output_tokens)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"""


class Raw:
    """A connection in driver autocommit, with transactions written out."""

    def __init__(
        self, connection: psycopg.Connection, tenant: str, *, role: str = "database_app"
    ) -> None:
        self.connection = connection
        self.tenant = tenant
        # In the login role, which owns the tables, there is no row-level security.
        enter = f"SET LOCAL ROLE {role or 'NONE'}; SET LOCAL app.tenant_id = '{tenant}'"
        # One message of the simple protocol; never prepared, for it is several statements.
        self._begin = f"BEGIN; {enter}"
        self._steps = ["BEGIN", *enter.split("; ")]

    def fetch(self, statement: str, parameters: Any) -> list[Row]:
        """Run one statement in its own transaction: three round trips."""
        cursor = self.connection.cursor()
        cursor.execute(self._begin, prepare=False)
        rows = cursor.execute(statement, parameters).fetchall()
        self.connection.commit()
        return rows

    def fetch_in_pipeline(self, statement: str, parameters: Any) -> list[Row]:
        """Run the same in one round trip."""
        with self.connection.pipeline():
            for step in self._steps:
                self.connection.execute(step)
            cursor = self.connection.execute(statement, parameters)
            self.connection.execute("COMMIT")
        return cursor.fetchall()

    def execute_many(self, statement: str, rows: Sequence[Any]) -> None:
        """Run a statement for many rows, which psycopg pipelines, in one transaction."""
        cursor = self.connection.cursor()
        cursor.execute(self._begin, prepare=False)
        cursor.executemany(statement, rows)
        self.connection.commit()

    def append(self, conversation: UUID, message: dict[str, Any]) -> list[Row]:
        return self.fetch(_APPEND, self._appended(conversation, message))

    def append_in_pipeline(self, conversation: UUID, message: dict[str, Any]) -> list[Row]:
        return self.fetch_in_pipeline(_APPEND, self._appended(conversation, message))

    def append_many(self, conversation: UUID, messages: Sequence[dict[str, Any]]) -> None:
        """Append by executemany, which psycopg pipelines."""
        now = datetime.now(UTC)
        count, preview = len(messages), messages[-1]["content"][:PREVIEW]
        cursor = self.connection.cursor()
        cursor.execute(self._begin, prepare=False)
        counted = (count, count, preview, now, self.tenant, conversation)
        [(last,)] = cursor.execute(_COUNT_UP, counted)
        cursor.executemany(
            _INSERT,
            [
                (
                    self.tenant,
                    uuid7(),
                    now,
                    now,
                    conversation,
                    position,
                    message["role"],
                    message["content"],
                    Jsonb(message["extra_data"]) if "extra_data" in message else None,
                    message.get("model"),
                    message.get("input_tokens"),
                    message.get("output_tokens"),
                )
                for position, message in enumerate(messages, last - count + 1)
            ],
        )
        self.connection.commit()

    def _appended(self, conversation: UUID, message: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC)
        extra = message.get("extra_data")
        return {
            **_NOTHING,
            **message,
            "extra_data": None if extra is None else Jsonb(extra),
            "tenant": self.tenant,
            "id": uuid7(),
            "created_at": now,
            "updated_at": now,
            "conversation": conversation,
            "preview": message["content"][:PREVIEW],
            "now": now,
            "count": 1,
        }
