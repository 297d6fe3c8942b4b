"""psycopg connections on which BEGIN, tenant and COMMIT ride along with statements.

The connections are in driver autocommit. Beginning a transaction sends nothing: the BEGIN and the
two SET LOCAL of its tenant wait, and travel in one pipeline with the first statement. A unit known
to be a single statement takes its COMMIT along as well: one round trip altogether.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Connection", "prelude"]

_PING_AFTER_IDLE_SECONDS = 30.0


@lru_cache(maxsize=4096)
def prelude(tenant_id: str | None, role: str) -> tuple[bytes, ...]:
    """Return the statements that enter a tenant's transaction, BEGIN excluded.

    Args:
        tenant_id: The tenant, or None to stay in the login role, across all tenants.
        role: The role that row-level security applies to; empty to stay in the login role.
    """
    if tenant_id is None:
        return ()
    # Literals, not set_config(): only SET LOCAL reaches the workers of a Citus cluster.
    tenant = sql.SQL("SET LOCAL app.tenant_id = {}").format(sql.Literal(tenant_id))
    if not role:
        return (tenant.as_bytes(None),)
    enter = sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role))
    return (enter.as_bytes(None), tenant.as_bytes(None))


class Connection(psycopg.Connection[Any]):
    """A connection that holds back control statements until the next statement takes them along."""

    _before: tuple[bytes, ...] = ()
    _after: bytes | None = None
    _spent: bool = False
    _released_at: float = 0.0
    tenant_id: str | None = None

    def begin(self, tenant_id: str | None, role: str) -> None:
        """Begin a transaction of a tenant with the next statement; sends nothing yet."""
        # With an isolation level of its own the driver is not in autocommit and sends BEGIN itself.
        start = (b"BEGIN",) if self.autocommit else ()
        self._before = start + prelude(tenant_id, role)
        self._after = None
        self._spent = False
        self.tenant_id = tenant_id

    def enter(self, tenant_id: str | None, role: str) -> None:
        """Work in another tenant for the rest of the transaction."""
        if b"BEGIN" in self._before or not self.autocommit:
            self.begin(tenant_id, role)
        else:
            self._before = prelude(tenant_id, role) or (b"SET LOCAL ROLE NONE",)
            self.tenant_id = tenant_id

    def finish_with_next(self) -> None:
        """Let the next statement be the transaction's only one: COMMIT rides behind it."""
        self._after = b"COMMIT"

    def guard_next(self, savepoint: bytes) -> None:
        """Put the next statement between SAVEPOINT and RELEASE, in its own round trip."""
        self._before += (b"SAVEPOINT " + savepoint,)
        self._after = b"RELEASE " + savepoint

    def undo(self, savepoint: bytes) -> None:
        """Roll back to the savepoint if the statement it guarded has failed."""
        self._after = None
        if self.info.transaction_status == TransactionStatus.INERROR:
            with self.pipeline():
                self.send_control((b"ROLLBACK TO " + savepoint, b"RELEASE " + savepoint))

    def end(self) -> None:
        """Forget what waits: the transaction is over."""
        self._before = ()
        self._after = None
        self._spent = False
        self.tenant_id = None

    def take(self) -> tuple[tuple[bytes, ...], bytes | None]:
        """Return the statements to send before and after the next one, and forget them."""
        if self._spent:
            msg = "a transaction of one statement was given a second one"
            raise psycopg.ProgrammingError(msg)
        before, after = self._before, self._after
        self._before, self._after = (), None
        self._spent = after == b"COMMIT"
        return before, after

    def send_waiting(self) -> None:
        """Send what waits now, for statements that cannot ride in a pipeline."""
        before, after = self.take()
        if after is not None:
            msg = "this statement needs a transaction of several statements"
            raise psycopg.ProgrammingError(msg)
        if before:
            with self.pipeline():
                self.send_control(before)

    def send_control(self, statements: Iterable[bytes]) -> None:
        """Add statements without results to the pipeline that this connection is in."""
        for statement in statements:
            # What psycopg's own transaction() does in a pipeline: it queues and sends nothing yet,
            # where a cursor would look at the socket for each statement.
            for _ in self._exec_command(statement):
                pass

    def mark_released(self) -> None:
        """Remember when the pool got the connection back."""
        self._released_at = time.monotonic()

    def is_alive(self) -> bool:
        """Tell whether the server still holds this idle connection.

        A server that closes a connection says so on its socket, which costs no round trip to see.
        A network that drops it silently does not, so long-idle connections are pinged.
        """
        if self.closed:
            return False
        idle = time.monotonic() - self._released_at
        try:
            # The first one may read the server's goodbye, the second one the end behind it.
            self.pgconn.consume_input()
            self.pgconn.consume_input()
            if idle > _PING_AFTER_IDLE_SECONDS:
                psycopg.Cursor(self).execute(b"", prepare=False)
        except psycopg.Error:
            return False
        return not self.broken


class Cursor(psycopg.Cursor[Any]):
    """A cursor whose statements take along what waits on their connection."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        connection: Connection = self._conn  # type: ignore[assignment]
        before, after = connection.take()
        if not before and after is None:
            return super().execute(query, params, **options)
        with connection.pipeline():
            connection.send_control(before)
            super().execute(query, params, **options)
            if after is not None:
                connection.send_control((after,))
        return self

    def executemany(self, query: Any, params_seq: Any, *, returning: bool = False) -> None:
        connection: Connection = self._conn  # type: ignore[assignment]
        before, after = connection.take()
        with connection.pipeline():
            connection.send_control(before)
            super().executemany(query, params_seq, returning=returning)
            if after is not None:
                connection.send_control((after,))

    def copy(self, statement: Any, params: Any = None, **options: Any) -> Any:
        connection: Connection = self._conn  # type: ignore[assignment]
        connection.send_waiting()
        return super().copy(statement, params, **options)

    def stream(self, query: Any, params: Any = None, **options: Any) -> Any:
        connection: Connection = self._conn  # type: ignore[assignment]
        connection.send_waiting()
        return super().stream(query, params, **options)


class ServerCursor(psycopg.ServerCursor[Any]):
    """A server-side cursor; its DECLARE cannot ride in a pipeline."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        connection: Connection = self._conn  # type: ignore[assignment]
        connection.send_waiting()
        return super().execute(query, params, **options)
