"""The connection that holds back BEGIN until a statement takes it along, without SQLAlchemy."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import IsolationLevel, sql
from psycopg.pq import TransactionStatus
from sqlalchemy import make_url

from database import driver as driver_module
from database.driver import Connection, Cursor, ServerCursor, prelude
from tests.conftest import admin

IDLE, IN_UNIT, FAILED = (
    TransactionStatus.IDLE,
    TransactionStatus.INTRANS,
    TransactionStatus.INERROR,
)
ROLE = "database_app"
SAVEPOINT = b"here"
WHERE_AM_I = "SELECT current_user::text, current_setting('app.tenant_id', true)"
INSERT = "INSERT INTO users (id, email) VALUES (gen_random_uuid(), %s)"


class Slow(Connection):
    """A connection that sends what follows a statement when its answer has come already."""

    def send_control(self, statements: Iterable[bytes]) -> None:
        statements = tuple(statements)
        if statements and not statements[0].startswith((b"BEGIN", b"SET", b"SAVEPOINT")):
            time.sleep(0.05)
        super().send_control(statements)


def connect(url: str, kind: type[Connection] = Connection, **options: object) -> Connection:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = kind.connect(plain, autocommit=True, **options)  # type: ignore[arg-type]
    connection.cursor_factory = Cursor
    connection.server_cursor_factory = ServerCursor
    return connection


@pytest.fixture
def driver(worker_url: str) -> Iterator[Connection]:
    with connect(worker_url) as connection:
        yield connection


@pytest.fixture(params=[Connection, Slow], ids=["answers at the end", "answers in between"])
def either(worker_url: str, request: pytest.FixtureRequest) -> Iterator[Connection]:
    """Both orders in which the server's answers can come in."""
    with connect(worker_url, request.param) as connection:
        yield connection


def status(connection: Connection) -> TransactionStatus:
    return connection.info.transaction_status


def row(connection: Connection, query: str = WHERE_AM_I, *params: object) -> tuple[object, ...]:
    found: tuple[object, ...] | None = connection.execute(query, params).fetchone()
    assert found is not None
    return found


def emails(url: str, tenant: str) -> list[str]:
    """What has been committed."""
    with admin(url) as connection:
        query = "SELECT email FROM users WHERE tenant_id = %s ORDER BY email"
        return [email for (email,) in connection.execute(query, [tenant])]


def kill(url: str, connection: psycopg.Connection) -> None:
    with admin(url) as killer:
        killer.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])


def declare(connection: Connection) -> None:
    with connection.cursor("named") as cursor:
        cursor.execute("SELECT 1")


class Trips:
    count = 0


@contextmanager
def counted(connection: Connection) -> Iterator[Trips]:
    trips = Trips()
    with tempfile.TemporaryFile() as trace:
        connection.pgconn.trace(trace.fileno())
        try:
            yield trips
        finally:
            connection.pgconn.untrace()
        os.lseek(trace.fileno(), 0, os.SEEK_SET)
        trips.count = trace.read().count(b"ReadyForQuery")


# Entering a tenant


def test_begin_waits_for_the_first_statement(driver: Connection, tenant: str) -> None:
    with counted(driver) as trips:
        driver.begin(tenant, ROLE)
    assert (trips.count, status(driver)) == (0, IDLE)
    with counted(driver) as trips:
        assert row(driver) == (ROLE, tenant)
    assert (trips.count, status(driver)) == (1, IN_UNIT)
    with counted(driver) as trips:
        assert row(driver) == (ROLE, tenant)
    assert trips.count == 1
    driver.rollback()
    driver.end()
    assert row(driver)[0] != ROLE


def test_nothing_is_left_after_a_commit(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    driver.execute(INSERT, ["a@b.c"])
    driver.commit()
    driver.end()
    assert driver.tenant_id is None
    user, found = row(driver)
    assert user != ROLE
    assert not found


def test_what_began_is_forgotten_at_the_end(
    driver: Connection, tenant: str, worker_url: str
) -> None:
    for prepare in (driver.finish_with_next, lambda: driver.guard_next(SAVEPOINT)):
        driver.begin(tenant, ROLE)
        prepare()
        driver.end()
        assert row(driver)[0] != ROLE
        assert status(driver) is IDLE
    assert emails(worker_url, tenant) == []


def test_without_a_role_only_the_tenant_is_set(driver: Connection, tenant: str) -> None:
    login = driver.info.user
    driver.begin(tenant, "")
    assert row(driver) == (login, tenant)


def test_across_tenants_the_login_role_stays(driver: Connection) -> None:
    driver.begin(None, ROLE)
    user, found = row(driver)
    assert (user, found or "") == (driver.info.user, "")
    assert status(driver) is IN_UNIT
    assert driver.tenant_id is None


def test_another_tenant_before_the_first_statement(driver: Connection, tenant: str) -> None:
    notices = noticed(driver)
    driver.begin("first", ROLE)
    driver.enter(tenant, ROLE)
    with counted(driver) as trips:
        assert row(driver) == (ROLE, tenant)
    assert trips.count == 1
    assert driver.tenant_id == tenant
    assert notices == []


def test_another_tenant_within_the_transaction(driver: Connection, tenant: str) -> None:
    notices = noticed(driver)
    driver.begin("first", ROLE)
    assert row(driver) == (ROLE, "first")
    driver.enter(tenant, ROLE)
    assert row(driver) == (ROLE, tenant)
    driver.enter(None, ROLE)
    assert row(driver)[0] == driver.info.user
    driver.enter("third", ROLE)
    assert row(driver) == (ROLE, "third")
    assert notices == []


def test_a_tenant_entered_after_a_savepoint_ends_with_it(driver: Connection, tenant: str) -> None:
    driver.begin("outer", ROLE)
    driver.execute("SAVEPOINT s")
    driver.enter(tenant, ROLE)
    assert row(driver) == (ROLE, tenant)
    driver.execute("ROLLBACK TO s")
    assert row(driver) == (ROLE, "outer")


def noticed(connection: Connection) -> list[str | None]:
    found: list[str | None] = []
    connection.add_notice_handler(lambda notice: found.append(notice.message_primary))
    return found


@pytest.mark.parametrize(
    "level", [IsolationLevel.SERIALIZABLE, IsolationLevel.REPEATABLE_READ], ids=lambda v: v.name
)
def test_an_isolation_level_of_its_own(
    driver: Connection, tenant: str, level: IsolationLevel, worker_url: str
) -> None:
    """SQLAlchemy turns the driver's autocommit off for it: nothing may run before BEGIN."""
    driver.autocommit = False
    driver.isolation_level = level
    notices = noticed(driver)
    expected = level.name.replace("_", " ").lower()
    driver.begin("other", ROLE)
    driver.enter(tenant, ROLE)
    assert row(driver, "SHOW transaction_isolation") == (expected,)
    assert row(driver) == (ROLE, tenant)
    driver.enter("third", ROLE)
    assert row(driver) == (ROLE, "third")
    driver.rollback()
    driver.end()

    driver.begin(tenant, ROLE)
    driver.finish_with_next()
    driver.execute(INSERT, ["a@b.c"])
    assert status(driver) is IDLE
    driver.end()
    assert emails(worker_url, tenant) == ["a@b.c"]

    driver.begin(tenant, ROLE)
    driver.guard_next(SAVEPOINT)
    with pytest.raises(psycopg.errors.UniqueViolation):
        driver.execute(INSERT, ["a@b.c"])
    driver.undo(SAVEPOINT)
    assert row(driver, "SHOW transaction_isolation") == (expected,)
    assert notices == []


def test_with_an_isolation_level_the_role_holds_from_the_first_statement(
    driver: Connection, tenant: str
) -> None:
    driver.autocommit = False
    driver.isolation_level = IsolationLevel.SERIALIZABLE
    for _ in range(8):
        driver.begin(tenant, ROLE)
        assert row(driver) == (ROLE, tenant)
        driver.commit()
        driver.end()


# A unit of one statement


def test_commit_rides_along(driver: Connection, tenant: str, worker_url: str) -> None:
    driver.begin(tenant, ROLE)
    driver.finish_with_next()
    with counted(driver) as trips:
        driver.execute(INSERT, ["a@b.c"])
    assert (trips.count, status(driver)) == (1, IDLE)
    assert emails(worker_url, tenant) == ["a@b.c"]


@pytest.mark.parametrize(
    "send",
    [
        lambda c: c.execute(INSERT, ["second@b.c"]),
        lambda c: c.cursor().executemany(INSERT, [["second@b.c"]]),
        lambda c: c.cursor().copy("COPY users TO STDOUT"),
        lambda c: next(c.cursor().stream("SELECT 1")),
        declare,
    ],
    ids=["execute", "executemany", "copy", "stream", "server cursor"],
)
def test_a_second_statement_is_refused(
    driver: Connection, tenant: str, worker_url: str, send: Callable[[Connection], object]
) -> None:
    """It would run outside the transaction, in the login role."""
    driver.begin(tenant, ROLE)
    driver.finish_with_next()
    driver.execute(INSERT, ["first@b.c"])
    with pytest.raises(psycopg.ProgrammingError, match="second"):
        send(driver)
    assert emails(worker_url, tenant) == ["first@b.c"]
    driver.end()
    assert row(driver)[0] != ROLE


@pytest.mark.parametrize(
    "send",
    [
        lambda c: c.cursor().copy("COPY users TO STDOUT"),
        lambda c: next(c.cursor().stream("SELECT 1")),
        declare,
    ],
    ids=["copy", "stream", "server cursor"],
)
def test_what_cannot_ride_in_a_pipeline_cannot_be_a_unit_of_one_statement(
    driver: Connection, tenant: str, send: Callable[[Connection], object]
) -> None:
    driver.begin(tenant, ROLE)
    driver.finish_with_next()
    with pytest.raises(psycopg.ProgrammingError, match="several"):
        send(driver)
    assert status(driver) is IDLE


# The savepoint around one statement


def test_a_guarded_statement_costs_one_round_trip(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    driver.guard_next(SAVEPOINT)
    with counted(driver) as trips:
        driver.execute(INSERT, ["a@b.c"])
    assert (trips.count, status(driver)) == (1, IN_UNIT)
    with pytest.raises(psycopg.errors.InvalidSavepointSpecification):
        driver.execute("ROLLBACK TO here")


def test_an_undone_statement_leaves_the_unit_usable(
    either: Connection, tenant: str, worker_url: str
) -> None:
    either.begin(tenant, ROLE)
    either.execute(INSERT, ["a@b.c"])
    for _ in range(3):
        either.guard_next(SAVEPOINT)
        with pytest.raises(psycopg.errors.UniqueViolation):
            either.execute(INSERT, ["a@b.c"])
        assert status(either) is FAILED
        either.undo(SAVEPOINT)
        assert status(either) is IN_UNIT
    either.guard_next(SAVEPOINT)
    either.execute(INSERT, ["b@b.c"])
    assert row(either) == (ROLE, tenant)
    either.commit()
    assert emails(worker_url, tenant) == ["a@b.c", "b@b.c"]


def test_the_first_statement_can_be_undone(
    either: Connection, tenant: str, worker_url: str
) -> None:
    either.begin(tenant, ROLE)
    either.guard_next(SAVEPOINT)
    with pytest.raises(psycopg.errors.CheckViolation):
        either.execute(INSERT, ["no address"])
    either.undo(SAVEPOINT)
    assert row(either) == (ROLE, tenant)
    either.execute(INSERT, ["a@b.c"])
    either.commit()
    assert emails(worker_url, tenant) == ["a@b.c"]


def test_nothing_is_undone_when_nothing_was_sent(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    driver.guard_next(SAVEPOINT)
    driver.undo(SAVEPOINT)
    assert row(driver) == (ROLE, tenant)
    with pytest.raises(psycopg.errors.InvalidSavepointSpecification):
        driver.execute("RELEASE here")


def test_a_statement_that_cannot_be_sent_leaves_no_savepoint(
    driver: Connection, tenant: str
) -> None:
    driver.begin(tenant, ROLE)
    driver.guard_next(SAVEPOINT)
    with pytest.raises(psycopg.ProgrammingError, match="adapt"):
        driver.execute(INSERT, [object()])
    driver.undo(SAVEPOINT)
    assert row(driver) == (ROLE, tenant)
    with pytest.raises(psycopg.errors.InvalidSavepointSpecification):
        driver.execute("RELEASE here")


def test_undo_after_success_changes_nothing(
    driver: Connection, tenant: str, worker_url: str
) -> None:
    """A body that fails after its statement: the savepoint is gone, the statement stays."""
    driver.begin(tenant, ROLE)
    driver.guard_next(SAVEPOINT)
    driver.execute(INSERT, ["a@b.c"])
    driver.undo(SAVEPOINT)
    driver.execute(INSERT, ["b@b.c"])
    driver.commit()
    assert emails(worker_url, tenant) == ["a@b.c", "b@b.c"]


def test_what_fails_before_the_savepoint_keeps_its_error(either: Connection, tenant: str) -> None:
    either.begin(tenant, "no_such_role")
    either.guard_next(SAVEPOINT)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="no_such_role"):
        either.execute(INSERT, ["a@b.c"])
    either.undo(SAVEPOINT)
    assert status(either) is FAILED
    either.rollback()
    either.end()
    assert row(either)[0] != ROLE


# Errors

ERRORS = {
    "unique": (INSERT, ["taken@b.c"], psycopg.errors.UniqueViolation),
    "check": (INSERT, ["no address"], psycopg.errors.CheckViolation),
    "syntax": ("SELEC 1", None, psycopg.errors.SyntaxError),
    "division": ("SELECT 1 / %s", [0], psycopg.errors.DivisionByZero),
    "timeout": ("SELECT pg_sleep(5)", None, psycopg.errors.QueryCanceled),
    "missing table": ("SELECT * FROM no_such_table", None, psycopg.errors.UndefinedTable),
    "policy": (
        "INSERT INTO users (tenant_id, id) VALUES ('foreign', gen_random_uuid())",
        None,
        psycopg.errors.InsufficientPrivilege,
    ),
}


@pytest.mark.parametrize("mode", ["first", "later", "only", "guarded"])
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_the_statements_own(
    either: Connection, tenant: str, worker_url: str, case: str, mode: str
) -> None:
    """However the answers come in, never that of the statements around it."""
    query, params, expected = ERRORS[case]
    either.execute("SET statement_timeout = 200")
    either.begin(tenant, ROLE)
    either.execute(INSERT, ["taken@b.c"])
    if mode in ("first", "only"):
        either.commit()
        either.end()
        either.begin(tenant, ROLE)
    if mode == "only":
        either.finish_with_next()
    if mode == "guarded":
        either.guard_next(SAVEPOINT)
    with pytest.raises(psycopg.Error) as raised:
        either.execute(query, params)
    assert raised.type is expected
    assert status(either) is FAILED
    if mode == "guarded":
        either.undo(SAVEPOINT)
        assert row(either) == (ROLE, tenant)
        either.commit()
    else:
        either.rollback()
    either.end()
    assert emails(worker_url, tenant) == ([] if mode == "later" else ["taken@b.c"])
    either.begin(tenant, ROLE)
    assert row(either) == (ROLE, tenant)


@pytest.mark.parametrize("mode", ["several", "only", "guarded"])
def test_a_role_that_does_not_exist(either: Connection, tenant: str, mode: str) -> None:
    either.begin(tenant, "no_such_role")
    if mode == "only":
        either.finish_with_next()
    if mode == "guarded":
        either.guard_next(SAVEPOINT)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="no_such_role"):
        either.execute(WHERE_AM_I)
    either.rollback()
    either.end()
    assert row(either)[0] == either.info.user


def test_an_error_that_is_handled_elsewhere_is_not_raised_again(
    either: Connection, tenant: str
) -> None:
    try:
        raise KeyError  # noqa: TRY301 - what matters is that an error is being handled
    except KeyError:
        either.begin(tenant, ROLE)
        either.finish_with_next()
        with pytest.raises(psycopg.errors.SyntaxError):
            either.execute("SELEC 1")


@pytest.mark.parametrize("mode", ["first", "later", "only", "guarded"])
def test_a_killed_backend(driver: Connection, tenant: str, worker_url: str, mode: str) -> None:
    driver.begin(tenant, ROLE)
    if mode == "later":
        driver.execute(INSERT, ["a@b.c"])
    if mode == "only":
        driver.finish_with_next()
    if mode == "guarded":
        driver.guard_next(SAVEPOINT)
    kill(worker_url, driver)
    with pytest.raises(psycopg.OperationalError):
        driver.execute(INSERT, ["b@b.c"])
    if mode == "guarded":
        driver.undo(SAVEPOINT)
    assert not driver.is_alive()
    assert emails(worker_url, tenant) == []


@pytest.mark.parametrize("mode", ["first", "only", "guarded"])
def test_a_backend_killed_while_it_works(
    driver: Connection, tenant: str, worker_url: str, mode: str
) -> None:
    driver.begin(tenant, ROLE)
    if mode == "only":
        driver.finish_with_next()
    if mode == "guarded":
        driver.guard_next(SAVEPOINT)
    killer = threading.Timer(0.2, kill, [worker_url, driver])
    killer.start()
    with pytest.raises(psycopg.OperationalError):
        driver.execute("INSERT INTO users (id) SELECT gen_random_uuid() FROM pg_sleep(10)")
    killer.join()
    assert driver.broken or driver.closed
    assert emails(worker_url, tenant) == []


# Many rows


def test_executemany_in_a_tenant(driver: Connection, tenant: str, worker_url: str) -> None:
    driver.begin(tenant, ROLE)
    cursor = driver.cursor()
    cursor.executemany(INSERT, [[f"{n:03}@b.c"] for n in range(100)])
    assert cursor.rowcount == 100
    assert status(driver) is IN_UNIT
    driver.commit()
    assert len(emails(worker_url, tenant)) == 100


def test_executemany_returns_its_rows(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    cursor = driver.cursor()
    cursor.executemany(
        f"{INSERT} RETURNING email", [[f"{n}@b.c"] for n in range(50)], returning=True
    )
    found = [cursor.fetchone()]
    while cursor.nextset():
        found.append(cursor.fetchone())
    assert found == [(f"{n}@b.c",) for n in range(50)]


@pytest.mark.parametrize("bad", [0, 7, 19])
@pytest.mark.parametrize("mode", ["first", "only", "guarded"])
def test_executemany_all_or_none(
    either: Connection, tenant: str, worker_url: str, mode: str, bad: int
) -> None:
    rows = [[f"{n:02}@b.c"] for n in range(20)]
    rows[bad] = ["no address"]
    either.begin(tenant, ROLE)
    if mode == "only":
        either.finish_with_next()
    if mode == "guarded":
        either.guard_next(SAVEPOINT)
    with pytest.raises(psycopg.errors.CheckViolation):
        either.cursor().executemany(INSERT, rows)
    if mode == "guarded":
        either.undo(SAVEPOINT)
        assert row(either, "SELECT count(*) FROM users") == (0,)
        either.commit()
    else:
        either.rollback()
    assert emails(worker_url, tenant) == []


def test_executemany_as_the_only_statement(
    driver: Connection, tenant: str, worker_url: str
) -> None:
    driver.begin(tenant, ROLE)
    driver.finish_with_next()
    driver.cursor().executemany(INSERT, [["a@b.c"], ["b@b.c"]])
    assert status(driver) is IDLE
    assert emails(worker_url, tenant) == ["a@b.c", "b@b.c"]


def test_executemany_of_nothing(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    driver.cursor().executemany(INSERT, [])
    assert row(driver) == (ROLE, tenant)


# What cannot ride in a pipeline


def test_copy_is_in_the_tenant(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    with driver.cursor().copy(f"COPY ({WHERE_AM_I}) TO STDOUT") as copy:
        assert list(copy.rows()) == [(ROLE, tenant)]
    driver.rollback()


def test_copy_can_be_the_second_statement(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    driver.execute("CREATE TEMP TABLE numbers (n integer) ON COMMIT DROP")
    with driver.cursor().copy("COPY numbers FROM STDIN") as copy:
        for n in range(1000):
            copy.write_row([n])
    assert row(driver, "SELECT sum(n) FROM numbers") == (499_500,)


def test_copy_into_a_table_is_refused_in_the_role(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    copy = driver.cursor().copy("COPY users (id) FROM STDIN")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="row-level security"):
        copy.__enter__()


def test_streams_are_in_the_tenant(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    assert list(driver.cursor().stream(WHERE_AM_I)) == [(ROLE, tenant)]
    assert list(driver.cursor().stream(WHERE_AM_I)) == [(ROLE, tenant)]


def test_server_cursors_are_in_the_tenant(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    with driver.cursor("named") as cursor:
        cursor.execute(f"{WHERE_AM_I} FROM generate_series(1, 1000)")
        assert set(cursor) == {(ROLE, tenant)}
    assert status(driver) is IN_UNIT


def test_statements_between_the_batches_of_a_server_cursor(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    with driver.cursor("named") as cursor:
        cursor.execute("SELECT generate_series(1, 300)")
        seen = []
        while batch := cursor.fetchmany(100):
            seen += batch
            driver.guard_next(SAVEPOINT)
            with pytest.raises(psycopg.errors.CheckViolation):
                driver.execute(INSERT, ["no address"])
            driver.undo(SAVEPOINT)
    assert len(seen) == 300


def test_a_pipeline_of_the_callers_own(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    with driver.pipeline():
        cursors = [driver.execute(WHERE_AM_I) for _ in range(3)]
    assert [cursor.fetchone() for cursor in cursors] == [(ROLE, tenant)] * 3
    assert status(driver) is IN_UNIT


def test_a_pipeline_of_the_callers_own_around_a_large_statement(
    driver: Connection, tenant: str
) -> None:
    """The next statement ends the round trip of one that is not sent to its end yet."""
    driver.begin(tenant, ROLE)
    driver.execute("SET LOCAL statement_timeout = 20000")
    with driver.pipeline():
        large = driver.execute("SELECT length(%s::text)", ["x" * 20_000_000])
        driver.guard_next(SAVEPOINT)
        small = driver.execute(WHERE_AM_I)
    assert (large.fetchone(), small.fetchone()) == ((20_000_000,), (ROLE, tenant))


# Whether a pooled connection still lives


def test_a_fresh_connection_is_alive(driver: Connection) -> None:
    driver.mark_released()
    with counted(driver) as trips:
        assert driver.is_alive()
    assert trips.count == 0
    assert row(driver, "SELECT 1") == (1,)


def test_a_closed_connection_is_not_alive(driver: Connection) -> None:
    driver.close()
    assert not driver.is_alive()


def test_a_killed_connection_is_noticed_without_a_round_trip(
    driver: Connection, worker_url: str
) -> None:
    driver.mark_released()
    kill(worker_url, driver)
    assert not driver.is_alive()


def test_a_long_idle_connection_is_asked(
    driver: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "_PING_AFTER_IDLE_SECONDS", -1)
    driver.mark_released()
    with counted(driver) as trips:
        assert driver.is_alive()
    assert trips.count == 1
    assert status(driver) is IDLE


def test_a_connection_that_the_network_has_dropped_in_silence(
    driver: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()

    def refuse() -> None:
        theirs.recv(1)
        theirs.close()

    with ours:
        ours.setblocking(False)
        driver.mark_released()
        os.dup2(ours.fileno(), driver.fileno())
        middlebox = threading.Thread(target=refuse)
        middlebox.start()
        assert driver.is_alive(), "nothing tells, so soon"
        monkeypatch.setattr(driver_module, "_PING_AFTER_IDLE_SECONDS", -1)
        assert not driver.is_alive()
        middlebox.join()


def test_asking_whether_it_lives_sends_nothing_that_waits(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    assert driver.is_alive()
    assert status(driver) is IDLE
    assert row(driver) == (ROLE, tenant)


# Logs


def test_no_log_shows_a_servers_error(
    driver: Connection, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an earlier statement, when a later one cannot be sent."""
    driver.begin(tenant, ROLE)
    with pytest.raises(psycopg.ProgrammingError, match="cannot adapt"):
        driver.cursor().executemany("SELECT %s::boolean", [["secret"], [object()]])
    driver.rollback()
    driver.end()
    with pytest.raises(KeyError), driver.pipeline():
        driver.execute("SELECT %s::boolean", ["secret"])
        raise KeyError
    assert caplog.records == []
    assert row(driver)[0] != ROLE


# Prepared statements


@pytest.fixture
def preparing(worker_url: str) -> Iterator[Connection]:
    """A connection that prepares a statement at its third use."""
    with connect(worker_url, prepare_threshold=2) as connection:
        yield connection


def prepared(connection: Connection) -> int:
    count = "SELECT count(*) FROM pg_prepared_statements"
    found: tuple[int] | None = connection.execute(count, prepare=False).fetchone()
    assert found is not None
    return found[0]


def test_statements_are_prepared_within_pipelines(
    preparing: Connection, tenant: str, worker_url: str
) -> None:
    for n in range(10):
        preparing.begin(tenant, ROLE)
        preparing.finish_with_next()
        preparing.execute(INSERT, [f"{n}@b.c"])
        preparing.end()
    assert prepared(preparing) == 1
    assert len(emails(worker_url, tenant)) == 10


def test_statements_are_prepared_within_savepoints(preparing: Connection, tenant: str) -> None:
    preparing.begin(tenant, ROLE)
    for n in range(10):
        preparing.guard_next(SAVEPOINT)
        preparing.execute(INSERT, [f"{n}@b.c"])
    for _ in range(5):
        preparing.guard_next(SAVEPOINT)
        with pytest.raises(psycopg.errors.UniqueViolation):
            preparing.execute(INSERT, ["3@b.c"])
        preparing.undo(SAVEPOINT)
    assert row(preparing, "SELECT count(*) FROM users") == (10,)


def test_a_statement_whose_preparing_failed_can_be_used_later(
    preparing: Connection, tenant: str
) -> None:
    """The server never saw it: the driver must not believe that it is prepared."""
    for _ in range(2):
        preparing.begin(tenant, ROLE)
        preparing.finish_with_next()
        preparing.execute(WHERE_AM_I)
        preparing.end()
    preparing.begin(tenant, "no_such_role")
    preparing.finish_with_next()
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        preparing.execute(WHERE_AM_I)
    preparing.rollback()
    preparing.end()
    for _ in range(4):
        preparing.begin(tenant, ROLE)
        assert row(preparing) == (ROLE, tenant)
        preparing.commit()
        preparing.end()


@pytest.mark.parametrize("statement", ["DEALLOCATE ALL", "DISCARD ALL"])
def test_prepared_statements_thrown_away(
    preparing: Connection, tenant: str, statement: str
) -> None:
    for _ in range(2):
        for _ in range(5):
            preparing.begin(tenant, ROLE)
            preparing.finish_with_next()
            preparing.execute(WHERE_AM_I)
            preparing.end()
        assert prepared(preparing) == 1
        preparing.execute(statement)


def test_a_plan_that_no_longer_fits_fails_once(
    preparing: Connection, worker_url: str, tenant: str
) -> None:
    table = sql.Identifier(f"changing_{uuid4().hex}")
    query = sql.SQL("SELECT * FROM {}").format(table)
    with admin(worker_url) as other:
        other.execute(sql.SQL("CREATE TABLE {} (n integer)").format(table))

        def read() -> object:
            preparing.begin(tenant, "")
            preparing.finish_with_next()
            try:
                return preparing.execute(query).fetchall()
            except psycopg.Error:
                preparing.rollback()
                raise
            finally:
                preparing.end()

        for _ in range(5):
            assert read() == []
        other.execute(sql.SQL("ALTER TABLE {} ADD COLUMN m integer").format(table))
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="result type"):
            read()
        for _ in range(5):
            assert read() == []
        other.execute(sql.SQL("DROP TABLE {}").format(table))


@pytest.mark.parametrize("kind", [Connection, Slow])
def test_a_failed_preparing_that_only_a_savepoint_undoes(
    worker_url: str, tenant: str, kind: type[Connection]
) -> None:
    table = sql.Identifier(f"moving_{uuid4().hex}")
    query = sql.SQL("SELECT * FROM {}").format(table)
    away = sql.SQL("ALTER TABLE {} RENAME TO moved").format(table)
    back = sql.SQL("ALTER TABLE moved RENAME TO {}").format(table)
    with admin(worker_url) as other, connect(worker_url, kind, prepare_threshold=2) as driver:
        other.execute(sql.SQL("CREATE TABLE {} (n integer)").format(table))
        for _ in range(2):
            driver.execute(query)
        other.execute(away)
        driver.begin(tenant, "")
        driver.guard_next(SAVEPOINT)
        with pytest.raises(psycopg.errors.UndefinedTable):
            driver.execute(query)
        driver.undo(SAVEPOINT)
        other.execute(back)
        for _ in range(4):
            driver.guard_next(SAVEPOINT)
            assert driver.execute(query).fetchall() == []
        assert prepared(driver) == 1
        driver.commit()
        driver.end()
        other.execute(sql.SQL("DROP TABLE {}").format(table))


def test_a_statement_that_fails_stays_prepared(preparing: Connection, tenant: str) -> None:
    preparing.begin(tenant, ROLE)
    assert row(preparing, "SELECT 1 / %s", 1) == (1,)
    for _ in range(10):
        preparing.guard_next(SAVEPOINT)
        with pytest.raises(psycopg.errors.DivisionByZero):
            preparing.execute("SELECT 1 / %s", [0])
        preparing.undo(SAVEPOINT)
    assert prepared(preparing) == 1


def test_never_preparing(worker_url: str, tenant: str) -> None:
    with connect(worker_url, prepare_threshold=None) as connection:
        for _ in range(10):
            connection.begin(tenant, ROLE)
            connection.finish_with_next()
            connection.execute(WHERE_AM_I)
            connection.end()
        assert prepared(connection) == 0


# Notices, sizes, names


def test_notices_come_through_a_pipeline(driver: Connection, tenant: str) -> None:
    notices = noticed(driver)
    driver.begin(tenant, ROLE)
    driver.finish_with_next()
    driver.execute("DO $$ BEGIN RAISE NOTICE 'hello'; END $$")
    assert notices == ["hello"]


def test_large_results_and_large_parameters(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    rows = driver.execute("SELECT n, repeat('x', 100) FROM generate_series(1, 50000) n").fetchall()
    assert len(rows) == 50_000
    driver.guard_next(SAVEPOINT)
    big = "é" * 8_000_000
    assert row(driver, "SELECT length(%s::text)", big) == (8_000_000,)
    driver.guard_next(SAVEPOINT)
    cursor = driver.cursor()
    cursor.executemany("SELECT %s::text", [["y" * 10_000]] * 500, returning=True)
    assert cursor.fetchone() == ("y" * 10_000,)


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(tenant=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_tenant_is_only_a_value(driver: Connection, tenant: str) -> None:
    """Sessions allow few characters; the driver must be safe with all of them."""
    driver.begin(tenant, "")
    assert row(driver)[1] == tenant
    driver.rollback()
    driver.end()


@pytest.mark.parametrize(
    "tenant", ["o'brien", "a\\", "\\'; DROP TABLE users --", "mieter-ü-租户-🙂", "a\nb", "$$", "%s"]
)
def test_tenants_are_quoted(driver: Connection, tenant: str) -> None:
    driver.begin(tenant, ROLE)
    assert row(driver) == (ROLE, tenant)


def test_roles_are_quoted(driver: Connection, worker_url: str, tenant: str) -> None:
    role = f'rôle "{uuid4().hex}"; \'x'
    with admin(worker_url) as connection:
        connection.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
        try:
            driver.begin(tenant, role)
            assert row(driver) == (role, tenant)
            driver.rollback()
        finally:
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def test_the_prelude_is_one_statement_a_message() -> None:
    assert prelude(None, ROLE) == ()
    assert prelude("acme", "") == (b"SET LOCAL app.tenant_id = 'acme'",)
    assert prelude("acme", ROLE) == (
        b'SET LOCAL ROLE "database_app"',
        b"SET LOCAL app.tenant_id = 'acme'",
    )
