"""The commands of the schema."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import database
from database import schema
from tests.cli import invoke, run_process
from tests.conftest import admin
from tests.running import execute

HEAD = schema.head_revision()
FIRST = schema.revisions()[-1].revision
LAST_BUT_ONE = schema.revisions()[1].revision


@pytest.fixture
def fresh(fresh_url: str) -> Iterator[psycopg.Connection]:
    database.configure(url=fresh_url)
    with admin(fresh_url) as connection:
        yield connection


@pytest.fixture
def empty(empty_url: str) -> str:
    database.configure(url=empty_url)
    return empty_url


def line_of_failure(*args: str) -> str:
    result = invoke(*args, status=1)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_from_nothing_and_back(empty: str) -> None:
    assert json.loads(invoke("current", "--json").stdout) == {"revision": None, "head": HEAD}
    assert "not the one needed" in line_of_failure("check")
    assert "not the one needed" in line_of_failure("users", "list")

    assert invoke("upgrade", FIRST).stdout == f"revision\t{FIRST}\n"
    assert f"at revision {FIRST}" in line_of_failure("check")
    assert json.loads(invoke("upgrade", "--json").stdout) == {"revision": HEAD}
    assert invoke("check").stdout == f"revision\t{HEAD}\nstatus\tok\n"
    assert invoke("users", "list", "--json").stdout == "[]\n"

    assert "--yes" in line_of_failure("downgrade", "base")
    assert invoke("downgrade", "-1", "--yes").stdout == f"revision\t{LAST_BUT_ONE}\n"
    assert invoke("upgrade", "+1").stdout == f"revision\t{HEAD}\n"
    assert invoke("downgrade", "base", "-y").stdout == "revision\t\n"


@pytest.mark.parametrize(
    "command",
    [
        ("upgrade", "x"),
        ("downgrade", "x", "--yes"),
        ("downgrade", "-9", "--yes"),
        ("sql", "x"),
        ("sql", "x:head"),
        ("sql", "head:x"),
        ("sql", "head:-9"),
        ("sql", "base:head:base"),
    ],
)
def test_unknown_revisions(fresh: psycopg.Connection, command: tuple[str, ...]) -> None:
    assert "revision" in line_of_failure(*command)
    assert invoke("current").stdout == f"revision\t{HEAD}\nhead\t{HEAD}\n"


def test_a_database_of_a_newer_version(fresh: psycopg.Connection) -> None:
    fresh.execute("UPDATE alembic_version SET version_num = 'newer'")
    assert "newer version of this library" in line_of_failure("check")
    assert "'newer'" in line_of_failure("upgrade")


def test_history_of_schema_needs_no_database() -> None:
    database.configure(url="postgresql://nobody@127.0.0.1:1/nowhere", connect_retries=0)
    rows = json.loads(invoke("history-of-schema", "--json").stdout)
    assert [row["revision"] for row in rows] == [r.revision for r in schema.revisions()]
    assert rows[0]["revision"] == HEAD
    assert rows[-1]["follows"] is None


def test_sql_is_what_a_database_needs(empty: str) -> None:
    whole = invoke("sql").stdout
    execute(empty, whole)
    assert invoke("check").stdout
    part = json.loads(invoke("sql", f"{FIRST}:head", "--json").stdout)["sql"]
    assert "CREATE TABLE users" in whole
    assert "CREATE TABLE users" not in part
    assert "CREATE FUNCTION" in part


def test_sql_of_the_way_back(fresh: psycopg.Connection, fresh_url: str) -> None:
    execute(fresh_url, invoke("sql", f"head:{LAST_BUT_ONE}").stdout)
    assert invoke("current").stdout == f"revision\t{LAST_BUT_ONE}\nhead\t{HEAD}\n"
    execute(fresh_url, invoke("sql", f"{LAST_BUT_ONE}:head").stdout)
    assert invoke("check").stdout
    execute(fresh_url, invoke("sql", "head:base").stdout)
    assert json.loads(invoke("current", "--json").stdout)["revision"] is None
    tables = fresh.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    assert tables == [("alembic_version",)]


@pytest.mark.parametrize(
    ("span", "same"),
    [
        ("base:head", "head"),
        (f"base:{FIRST}", FIRST),
        ("base:+1", "+1"),
        ("head:-1", f"{HEAD}:{LAST_BUT_ONE}"),
        (f"{FIRST[:5]}:head", f"{FIRST}:{HEAD}"),
    ],
)
def test_sql_of_the_same_span(span: str, same: str) -> None:
    assert "-- Running" in invoke("sql", span).stdout
    assert invoke("sql", span).stdout == invoke("sql", same).stdout


@pytest.mark.parametrize(
    ("span", "rule"),
    [
        ("base", "must go from one revision to another"),
        ("base:base", "must go from one revision to another"),
        (f"head:{HEAD}", "must go from one revision to another"),
        ("head:", "must be REVISION or FROM:TO"),
        ("", "must be REVISION or FROM:TO"),
    ],
)
def test_sql_of_a_span_without_a_way(span: str, rule: str) -> None:
    result = invoke("sql", span, status=2)
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == f"Error: Invalid value for 'REVISION': {rule}"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DROP INDEX ix_users_created_at_id", "missing index: ix_users_created_at_id"),
        ("ALTER TABLE users DROP CONSTRAINT uq_users_email", "missing constraint: uq_users_email"),
        ("ALTER TABLE users DROP COLUMN last_name", "missing column: users.last_name"),
        ("ALTER TABLE users ALTER username TYPE text", "different type: users.username"),
        ("DROP TABLE identities", "missing table: identities"),
    ],
)
def test_check_sees_what_is_missing(fresh: psycopg.Connection, damage: str, said: str) -> None:
    fresh.execute(damage)
    assert said in line_of_failure("check")


def test_check_leaves_alone_what_is_not_ours(fresh: psycopg.Connection) -> None:
    fresh.execute("CREATE TABLE theirs (id int)")
    fresh.execute("CREATE INDEX ix_theirs ON users (username)")
    fresh.execute("ALTER TABLE users ADD theirs int")
    assert invoke("check").stdout


def test_check_of_another_number_of_dimensions(short_vectors: None) -> None:
    assert invoke("check").stdout


def test_the_owner_migrates(empty_url: str, tmp_path: Path) -> None:
    nobody = "postgresql://nobody:hunter2@127.0.0.1:1/nowhere"
    for command in ("upgrade",), ("current",):
        done = run_process(*command, folder=tmp_path, url=nobody, DATABASE_MIGRATION_URL=empty_url)
        assert f"revision\t{HEAD}\n" in done.stdout
    done = run_process("check", folder=tmp_path, url=nobody, status=1)
    assert "no server" in done.stderr
    assert "hunter2" not in done.stderr


def test_migrations_of_an_installed_package(empty_url: str, tmp_path: Path) -> None:
    """As in a wheel: the package alone in a folder, with its migrations inside."""
    root = Path(database.__file__).parents[1]
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "database", tmp_path / "database", ignore=ignore)
    shutil.copytree(root / "alembic", tmp_path / "database" / "migrations", ignore=ignore)
    for command in ("upgrade",), ("check",), ("downgrade", "base", "--yes"), ("sql",):
        done = run_process(*command, folder=tmp_path, url=empty_url, PYTHONPATH=str(tmp_path))
        assert done.stdout
