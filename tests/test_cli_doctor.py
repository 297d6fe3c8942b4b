"""`database doctor`, and what it asks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

import database
from database.diagnosis import diagnose
from tests.cli import invoke
from tests.conftest import admin

CHECKS = [
    "connection",
    "pool",
    "extensions",
    "revision",
    "row-level security",
    "tables and indexes",
    "unused indexes",
    "dead rows",
]


@pytest.fixture
def fresh(fresh_url: str) -> Iterator[psycopg.Connection]:
    database.configure(url=fresh_url)
    with admin(fresh_url) as connection:
        yield connection


@pytest.fixture
def app_url(fresh: psycopg.Connection, fresh_url: str) -> Iterator[str]:
    """The login of an application: it owns nothing."""
    name = f"app_{uuid4().hex[:12]}"
    role = sql.Identifier(name)
    fresh.execute(
        sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'hunter2' IN ROLE database_app").format(role)
    )
    url = make_url(fresh_url).set(username=name, password="hunter2")
    yield url.render_as_string(hide_password=False)
    database.close_db()
    fresh.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role).as_string())


def findings(*, status: int = 0) -> dict[str, tuple[str, str]]:
    result = invoke("doctor", "--json", status=status)
    assert "hunter2" not in result.output
    return {
        found["check"]: (found["status"], found["message"]) for found in json.loads(result.stdout)
    }


def without_failure(name: str, found: dict[str, tuple[str, str]]) -> None:
    assert [check for check in CHECKS if found[check][0] != "ok"] == [name]


def test_a_sound_database(fresh: psycopg.Connection) -> None:
    found = findings()
    assert list(found) == CHECKS
    assert {status for status, _ in found.values()} == {"ok"}
    assert invoke("doctor").stdout.splitlines()[0] == "check\tstatus\tmessage"


def test_as_an_application_that_owns_nothing(app_url: str) -> None:
    database.configure(url=app_url)
    found = findings()
    assert {status for status, _ in found.values()} == {"ok"}


def test_nobody_is_there() -> None:
    database.configure(url="postgresql://me:hunter2@127.0.0.1:1/chat", connect_retries=0)
    ((check, (status, message)),) = findings(status=1).items()
    assert (check, status) == ("connection", "failure")
    assert "127.0.0.1:1" in message


def test_before_the_first_migration(empty_url: str) -> None:
    database.configure(url=empty_url)
    found = findings(status=1)
    assert list(found) == CHECKS[:4]
    assert found["revision"][0] == "failure"
    assert "vector 0.8 or newer is needed, this database has none" in found["extensions"][1]


def test_more_connections_than_the_server_takes(fresh_url: str) -> None:
    database.configure(url=fresh_url, pool_size=5000)
    found = findings()
    assert found["pool"][0] == "warning"
    assert "up to 5020 connections" in found["pool"][1]


def test_an_extension_that_is_gone(fresh: psycopg.Connection) -> None:
    fresh.execute("DROP EXTENSION pg_trgm CASCADE")
    found = findings(status=1)
    status, message = found["extensions"]
    assert status == "failure"
    assert re.fullmatch(
        r"the extension pg_trgm is needed, this database has none and the server offers \d.*:"
        r" run CREATE EXTENSION pg_trgm",
        message,
    )
    assert "missing index" in found["tables and indexes"][1]


@pytest.mark.parametrize(
    "hole",
    [
        "ALTER TABLE contexts DISABLE ROW LEVEL SECURITY",
        "CREATE POLICY open ON contexts FOR SELECT USING (true)",
        "CREATE POLICY open ON contexts FOR INSERT WITH CHECK (true)",
        "ALTER POLICY tenant_isolation ON contexts USING (true)",
        "DROP POLICY tenant_isolation ON contexts",
    ],
)
def test_a_hole_in_row_level_security(fresh: psycopg.Connection, hole: str) -> None:
    fresh.execute(hole)
    found = findings(status=1)
    assert found["row-level security"] == ("failure", "not enforced on contexts")


def test_rows_that_another_tenant_sees(fresh: psycopg.Connection) -> None:
    with database.get_db_session(tenant_id="acme") as db:
        database.UserRepository.create(db)
    # It names the tenant, and is open all the same.
    fresh.execute(
        "CREATE POLICY open ON users USING (current_setting('app.tenant_id', true) IS NOT NULL)"
    )
    found = findings(status=1)
    assert found["row-level security"] == ("failure", "a tenant sees other tenants' rows of users")


def test_row_level_security_that_was_switched_off(fresh_url: str) -> None:
    database.configure(url=fresh_url, app_role="")
    assert findings()["row-level security"][0] == "warning"


def test_a_missing_index(fresh: psycopg.Connection) -> None:
    fresh.execute("DROP INDEX ix_users_created_at_id")
    found = findings(status=1)
    assert found["tables and indexes"] == ("failure", "missing index: ix_users_created_at_id")
    without_failure("tables and indexes", found)


def test_a_missing_function(fresh: psycopg.Connection) -> None:
    fresh.execute("DROP FUNCTION search_messages")
    found = findings(status=1)
    assert "missing function: search_messages" in found["tables and indexes"][1]


def test_an_invalid_index(fresh: psycopg.Connection) -> None:
    fresh.execute(
        "INSERT INTO users (tenant_id, id) SELECT 'a', gen_random_uuid() FROM generate_series(1, 2)"
    )
    with pytest.raises(psycopg.errors.UniqueViolation):
        fresh.execute("CREATE UNIQUE INDEX CONCURRENTLY ix_mine ON users (is_admin)")
    assert findings(status=1)["tables and indexes"] == ("failure", "invalid index: ix_mine")


def test_an_unused_index(fresh: psycopg.Connection) -> None:
    fresh.execute("CREATE INDEX ix_mine ON users (username)")
    fresh.execute(
        "INSERT INTO users (tenant_id, id, username)"
        " SELECT 'a', gen_random_uuid(), repeat(md5(n::text), 3) FROM generate_series(1, 40000) n"
    )
    fresh.execute("ANALYZE users")
    status, message = findings()["unused indexes"]
    assert status == "warning"
    assert "ix_mine" in message
    assert "pk_users" not in message  # larger than it, but there for another reason
    fresh.execute("SELECT count(*) FROM users WHERE username = 'x'")
    fresh.execute("SELECT pg_stat_force_next_flush()")
    fresh.execute("SELECT 1")
    assert "ix_mine" not in findings()["unused indexes"][1]


def test_dead_rows(fresh: psycopg.Connection) -> None:
    fresh.execute("ALTER TABLE users SET (autovacuum_enabled = off)")
    fresh.execute(
        "INSERT INTO users (tenant_id, id)"
        " SELECT 'a', gen_random_uuid() FROM generate_series(1, 1500)"
    )
    fresh.execute("DELETE FROM users")
    fresh.execute("SELECT pg_stat_force_next_flush()")
    fresh.execute("SELECT 1")
    status, message = findings()["dead rows"]
    assert (status, message[:13]) == ("warning", "1500 in users")
    fresh.execute("VACUUM users")
    assert findings()["dead rows"][0] == "ok"


def test_it_leaves_no_connection_checked_out(fresh: psycopg.Connection) -> None:
    for _ in diagnose():
        pool = database.get_engine().pool
        assert pool.checkedout() == 0  # type: ignore[attr-defined]
