"""A real PostgreSQL, migrated once, and a tenant of its own for every test.

Tests commit for real; what keeps them apart is what keeps applications' tenants apart.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url

import database
from database import TenantSession, embedded
from database.schema import upgrade
from database.settings import Settings


def settings_for(url: str) -> Settings:
    return Settings(url=url, _env_file=None)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a server where databases can be made."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    started = embedded.start(Path(tempfile.gettempdir()) / f"database-tests-{os.getuid()}")
    with admin(started.url()) as connection:
        # Nobody needs these data after a power cut.
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    yield started.url()
    started.stop()


@contextmanager
def admin(url: str) -> Iterator[psycopg.Connection]:
    """A plain connection of the login role, in autocommit."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        yield connection


def in_database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def template(server: str, testrun_uid: str) -> Iterator[str]:
    """The name of a migrated database; the first worker makes it for all."""
    name = f"template_{testrun_uid[:12]}"
    users = int(testrun_uid[:12], 16)
    with admin(server) as user, admin(server) as connection:
        user.execute("SELECT pg_advisory_lock_shared(%s)", [users])
        connection.execute("SELECT pg_advisory_lock(1)")
        exists = connection.execute(
            "SELECT 1 FROM pg_database WHERE datname = %s", [name]
        ).fetchone()
        if not exists:
            connection.execute(f'CREATE DATABASE "{name}"')
            upgrade(settings=settings_for(in_database(server, name)))
        connection.execute("SELECT pg_advisory_unlock(1)")
        yield name
        user.execute("SELECT pg_advisory_unlock_shared(%s)", [users])
        # The last worker drops it: others may need it yet.
        last = user.execute("SELECT pg_try_advisory_lock(%s)", [users]).fetchone()
        if last == (True,):
            connection.execute(f'DROP DATABASE IF EXISTS "{name}"')


@contextmanager
def database_of(server: str, template: str | None) -> Iterator[str]:
    """The URL of a new database, a copy of the template if there is one."""
    name = f"test_{uuid4().hex[:12]}"
    with admin(server) as connection:
        copy = f' TEMPLATE "{template}"' if template else ""
        connection.execute("SELECT pg_advisory_lock(1)")
        connection.execute(f'CREATE DATABASE "{name}"{copy}')
    try:
        yield in_database(server, name)
    finally:
        with admin(server) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def worker_url(server: str, template: str) -> Iterator[str]:
    """The URL of this worker's database."""
    with database_of(server, template) as url:
        yield url


@pytest.fixture
def fresh_url(server: str, template: str) -> Iterator[str]:
    """The URL of a migrated database that only this test uses."""
    with database_of(server, template) as url:
        yield url


@pytest.fixture
def empty_url(server: str) -> Iterator[str]:
    """The URL of a database without any table."""
    with database_of(server, None) as url:
        yield url


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Children can be interrupted: they would ignore SIGINT with us, when run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def configured(worker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library, configured for this worker's database and by nothing else."""
    for name in os.environ:
        if name.startswith("DATABASE_"):
            monkeypatch.delenv(name)
    database.configure(url=worker_url)
    yield
    database.close_db()


@pytest.fixture(scope="session")
def small_url(server: str) -> Iterator[str]:
    """The URL of this worker's database for vectors of three dimensions."""
    with database_of(server, None) as url:
        upgrade(settings=Settings(url=url, embedding_dimensions=3, _env_file=None))
        yield url


@pytest.fixture
def short_vectors(configured: None, small_url: str) -> None:
    """The library, configured for that one instead."""
    database.configure(url=small_url, embedding_dimensions=3)


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test has."""
    return f"tenant-{uuid4().hex[:12]}"


@pytest.fixture
def db(configured: None, tenant: str) -> Iterator[TenantSession]:
    """A session of the test's tenant."""
    with database.SessionLocal(tenant_id=tenant) as session:
        yield session


@pytest.fixture
def other(configured: None) -> Iterator[TenantSession]:
    """A session of another tenant."""
    with database.SessionLocal(tenant_id=f"other-{uuid4().hex[:12]}") as session:
        yield session
