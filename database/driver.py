"""psycopg connections on which BEGIN, tenant and COMMIT ride along with statements.

The connections are in driver autocommit. Beginning a transaction sends nothing: the BEGIN and the
two SET LOCAL of its tenant wait, and travel in one pipeline with the first statement. A unit known
to be a single statement takes its COMMIT along as well: one round trip altogether.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import psycopg
from psycopg import generators, sql
from psycopg._preparing import Prepare
from psycopg.pq import TransactionStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    import sqlalchemy
    from psycopg._queries import PostgresQuery
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

__all__ = ["Connection", "driver_of", "prelude"]

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


class Pipeline(psycopg.Pipeline):
    """A pipeline that ends with its Sync, and raises its first error.

    psycopg's own sends a Flush behind the Sync when the results come in two reads: a message, which
    to the server ends the waiting that idle_in_transaction_session_timeout limits. And of two reads
    it raises the second one's error, that of the statements behind the failed one.
    """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            super().__exit__(kind, error, trace)
            return
        try:
            # psycopg would log an earlier statement's error, whose text may hold what rows hold.
            with suppress(psycopg.Error):
                self.sync()
        finally:
            self._exit(error)

    def _exit_gen(self) -> PQGen[None]:
        yield from self._sync_gen()

    def _sync_gen(self) -> PQGen[None]:
        self._enqueue_sync()
        try:
            yield from self._communicate_gen()
        except psycopg.Error:
            with suppress(psycopg.Error):
                yield from self._rest_gen()
            raise
        yield from self._rest_gen()

    def _rest_gen(self) -> PQGen[None]:
        # psycopg would wait for results though the end of a large statement is not sent yet: both
        # sides would wait for ever.
        yield from generators.send(self.pgconn)
        yield from self._fetch_gen(flush=False)


class Preparing(psycopg.Cursor[Any]):
    """What psycopg takes for the cursor of the answer to the preparing of a statement."""

    def _set_results(self, results: list[PGresult]) -> None:
        pass


class Connection(psycopg.Connection[Any]):
    """A connection that holds back control statements until the next statement takes them along."""

    _before: tuple[bytes, ...] = ()
    _after: bytes | None = None
    _spent: bool = False
    _guarded: bool = False
    _in_binary: bool = False
    _released_at: float = 0.0
    ended: int = 0
    tenant_id: str | None = None

    def begin(self, tenant_id: str | None, role: str) -> None:
        """Begin a transaction of a tenant with the next statement; sends nothing yet."""
        # With an isolation level of its own the connection is not in the driver's autocommit.
        start = b"BEGIN" if self.autocommit else self._get_tx_start_command()
        self._before = (start, *prelude(tenant_id, role))
        self._after = None
        self._spent = False
        self.tenant_id = tenant_id

    def enter(self, tenant_id: str | None, role: str) -> None:
        """Work in another tenant for the rest of the transaction."""
        if self._before and self._before[0].startswith(b"BEGIN"):
            self.begin(tenant_id, role)
        else:
            out = (b"SET LOCAL ROLE NONE", b"SET LOCAL app.tenant_id = ''")
            self._before = prelude(tenant_id, role) or out
            self.tenant_id = tenant_id

    def finish_with_next(self) -> None:
        """Let the next statement be the transaction's only one: COMMIT rides behind it."""
        self._after = b"COMMIT"

    def guard_next(self, savepoint: bytes) -> None:
        """Put the next statement between SAVEPOINT and RELEASE, in its own round trip."""
        self._before += (b"SAVEPOINT " + savepoint,)
        self._after = b"RELEASE " + savepoint

    def answer_in_binary(self) -> None:
        """Let the rows of the next statement come in binary, which bytes take half the time in."""
        self._in_binary = True

    def is_to_answer_in_binary(self) -> bool:
        """Tell whether that was asked for since the last statement."""
        asked, self._in_binary = self._in_binary, False
        return asked

    def undo(self, savepoint: bytes) -> None:
        """Roll back to the savepoint if the statement it guarded was not sent, or has failed."""
        self._after = None
        begin = b"SAVEPOINT " + savepoint
        if begin in self._before:
            self._before = tuple(waiting for waiting in self._before if waiting != begin)
        elif self._guarded or self.info.transaction_status == TransactionStatus.INERROR:
            # What failed before the savepoint, or with the connection, fails here too: that error
            # is on its way already.
            with suppress(psycopg.Error), self.pipeline():
                self.send_control((b"ROLLBACK TO " + savepoint, b"RELEASE " + savepoint))
        self._guarded = False

    def end(self) -> None:
        """Forget what waits: the transaction is over."""
        self.ended += 1
        self._before = ()
        self._after = None
        self._spent = False
        self._guarded = False
        self._in_binary = False
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

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        """Send the block's statements in one round trip; raise what the first failed one raises."""
        self._check_connection_ok()
        if self._pipeline is None:
            self._pipeline = Pipeline(self)
        with super().pipeline() as pipeline:
            yield pipeline

    @contextmanager
    def sending(self, before: tuple[bytes, ...], after: bytes | None) -> Iterator[None]:
        """Send the block's statements between others, all in one round trip."""
        self._guarded = after is not None and after.startswith(b"RELEASE")
        if before and not self.autocommit:
            # The driver sends a BEGIN of its own unless it sees that a transaction has begun.
            with self.pipeline():
                self.send_control(before)
            before = ()
        with self.pipeline():
            self.send_control(before)
            yield
            if after is not None:
                self.send_control((after,))
        self._guarded = False

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

    def expect_prepared(self, name: bytes, query: PostgresQuery) -> None:
        """Look at the answer to the preparing sent last: else psycopg takes it for done."""
        if self._pipeline is not None:
            noted = (self._prepared.key(query), Prepare.SHOULD, name)
            self._pipeline.result_queue[-1] = (Preparing(self), noted)

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


def driver_of(connection: sqlalchemy.Connection) -> Connection:
    """Return the driver's connection behind SQLAlchemy's."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, Connection)
    return driver


class Cursor(psycopg.Cursor[Any]):
    """A cursor whose statements take along what waits on their connection."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        connection: Connection = self._conn  # type: ignore[assignment]
        if connection.is_to_answer_in_binary():
            options["binary"] = True
        before, after = connection.take()
        if not before and after is None:
            return super().execute(query, params, **options)
        with connection.sending(before, after):
            super().execute(query, params, **options)
        return self

    def executemany(self, query: Any, params_seq: Any, *, returning: bool = False) -> None:
        connection: Connection = self._conn  # type: ignore[assignment]
        before, after = connection.take()
        with connection.sending(before, after):
            super().executemany(query, params_seq, returning=returning)

    def copy(self, statement: Any, params: Any = None, **options: Any) -> Any:
        connection: Connection = self._conn  # type: ignore[assignment]
        connection.send_waiting()
        return super().copy(statement, params, **options)

    def stream(self, query: Any, params: Any = None, **options: Any) -> Any:
        connection: Connection = self._conn  # type: ignore[assignment]
        connection.send_waiting()
        return super().stream(query, params, **options)

    def _send_prepare(self, name: bytes, query: PostgresQuery) -> None:
        super()._send_prepare(name, query)
        connection: Connection = self._conn  # type: ignore[assignment]
        connection.expect_prepared(name, query)


class ServerCursor(psycopg.ServerCursor[Any]):
    """A server-side cursor; its DECLARE cannot ride in a pipeline."""

    _transaction: int | None = None

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        connection: Connection = self._conn  # type: ignore[assignment]
        connection.send_waiting()
        self._transaction = connection.ended
        return super().execute(query, params, **options)

    def close(self) -> None:
        connection: Connection = self._conn  # type: ignore[assignment]
        if self._transaction != connection.ended:
            # It went with its transaction, and the connection may be somebody else's by now.
            psycopg.Cursor.close(self)
            return
        # It may have gone with a savepoint, and closing it again would abort the transaction: so
        # psycopg asks first, as it does for cursors that it has not declared itself.
        self._described = False
        super().close()
