"""The migrations, on real databases: what they make, what they leave, and who may run them."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg import sql
from sqlalchemy import create_engine, make_url

import database
from database import (
    ConfigurationError,
    SchemaOutdatedError,
    SessionLocal,
    TransientError,
    UserRepository,
    check_connection,
)
from database.models import Base, Memory
from database.schema import (
    ADVISORY_LOCK,
    alembic_config,
    check_schema,
    downgrade,
    head_revision,
    upgrade,
)
from database.settings import Settings
from database.types import Vector
from tests.conftest import admin, database_of
from tests.running import execute

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "alembic/versions").glob("*.py"))
REVISIONS = [
    script.revision
    for script in reversed(list(ScriptDirectory.from_config(alembic_config()).walk_revisions()))
]

EXTENSIONS = ("vector", "pg_trgm", "btree_gin")


def settings(url: str, **values: Any) -> Settings:
    return Settings(url=url, _env_file=None, **values)


# --- what a schema holds, as the server itself tells it -------------------------------------------

HERE = "current_schema()::regnamespace"
NOT_ALEMBICS = "c.relname !~ '^alembic_version'"
TABLES = f"c.relnamespace = {HERE} AND c.relkind IN ('r', 'p', 'v', 'm') AND {NOT_ALEMBICS}"


def own(catalog: str, row: str) -> str:
    """The condition that a row of a catalog is no part of an extension."""
    return (
        f"NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = '{catalog}'::regclass"
        f" AND d.objid = {row}.oid AND d.deptype = 'e')"
    )


CATALOGS = {
    "relations": f"""
        SELECT c.relname, c.relkind, c.relpersistence, c.reloptions FROM pg_class c
        WHERE c.relnamespace = {HERE} AND c.relkind <> 'i' AND {NOT_ALEMBICS}
        AND {own("pg_class", "c")}""",
    "columns": f"""
        SELECT c.relname, rank() OVER (PARTITION BY c.oid ORDER BY a.attnum), a.attname,
               format_type(a.atttypid, a.atttypmod), a.attnotnull,
               pg_get_expr(d.adbin, d.adrelid), a.attgenerated, a.attidentity,
               (SELECT collname FROM pg_collation WHERE oid = a.attcollation)
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE {TABLES} AND NOT a.attisdropped AND {own("pg_class", "c")}""",
    "constraints": f"""
        SELECT c.relname, k.conname, k.contype, pg_get_constraintdef(k.oid, true),
               k.condeferrable, k.condeferred, k.convalidated
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid WHERE {TABLES}""",
    "indexes": f"""
        SELECT c.relname, i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid, 0, true),
               pg_get_expr(i.indpred, i.indrelid), i.indisunique, i.indnullsnotdistinct,
               i.indisvalid
        FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE {TABLES}""",
    "functions": rf"""
        SELECT p.oid::regprocedure::text,
               regexp_replace(pg_get_functiondef(p.oid),
                   format('(%s\.|, ''?%s''?)', current_schema(), current_schema()), '', 'g')
        FROM pg_proc p
        WHERE p.pronamespace = {HERE} AND p.prokind IN ('f', 'p') AND {own("pg_proc", "p")}""",
    "triggers": f"""
        SELECT c.relname, pg_get_triggerdef(t.oid, true), t.tgenabled
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
        WHERE {TABLES} AND NOT t.tgisinternal""",
    "types": f"""
        SELECT t.typname, t.typtype FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
        WHERE t.typnamespace = {HERE} AND t.typelem = 0 AND (c.oid IS NULL OR {NOT_ALEMBICS})
        AND {own("pg_type", "t")}""",
    "policies": """
        SELECT tablename, policyname, permissive, roles, cmd, qual, with_check FROM pg_policies
        WHERE schemaname = current_schema()""",
    "row security": f"""
        SELECT c.relname, c.relforcerowsecurity FROM pg_class c
        WHERE {TABLES} AND c.relrowsecurity""",
    "grants": f"""
        SELECT c.relname, g.grantee::regrole::text, g.privilege_type, g.is_grantable
        FROM pg_class c, aclexplode(c.relacl) g
        WHERE c.relnamespace = {HERE} AND g.grantee <> c.relowner AND {own("pg_class", "c")}""",
    "schema grants": f"""
        SELECT g.grantee::regrole::text, g.privilege_type
        FROM pg_namespace n, aclexplode(n.nspacl) g WHERE n.oid = {HERE}""",
    "default privileges": """
        SELECT a.defaclobjtype, g.grantee::regrole::text, g.privilege_type
        FROM pg_default_acl a, aclexplode(a.defaclacl) g""",
}

# Whatever `Base.metadata.create_all()` does not make of the models.
NOT_IN_THE_MODELS = {
    "functions",
    "policies",
    "row security",
    "grants",
    "schema grants",
    "default privileges",
}

Snapshot = dict[str, list[tuple[Any, ...]]]


def snapshot(url: str) -> Snapshot:
    with admin(url) as connection:
        return {
            name: sorted(connection.execute(query.encode()).fetchall(), key=repr)
            for name, query in CATALOGS.items()
        }


def assert_same(found: Snapshot, expected: Snapshot, *, but: set[str] | None = None) -> None:
    for name in CATALOGS.keys() - (but or set()):
        assert found[name] == expected[name], name


def revision_of(url: str) -> str | None:
    with admin(url) as connection:
        row = connection.execute("SELECT to_regclass('alembic_version')").fetchone()
        if row == (None,):
            return None
        found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(found[0]) if found else None


def rendered(configuration: Settings, revision: str = "head") -> str:
    output = io.StringIO()
    run = command.downgrade if ":base" in revision else command.upgrade
    run(alembic_config(configuration, output), revision, sql=True)
    return output.getvalue()


# --- roles, which belong to the whole server ------------------------------------------------------


@contextmanager
def role_of(server: str, attributes: str | None) -> Iterator[str]:
    """A role's name, the role itself if attributes are given; dropped when it owns nothing more."""
    name = f"test_{uuid4().hex[:12]}"
    with admin(server) as connection:
        if attributes is not None:
            connection.execute(f"CREATE ROLE {name} {attributes}".encode())
        try:
            yield name
        finally:
            connection.execute(f"DROP ROLE IF EXISTS {name}".encode())


@pytest.fixture
def login(server: str) -> Iterator[str]:
    """An ordinary login, with its own name as its password. Ask for it before role and database."""
    with role_of(server, "LOGIN") as name:
        with admin(server) as connection:
            connection.execute(f"ALTER ROLE {name} PASSWORD '{name}'".encode())
        yield name


@pytest.fixture
def role(server: str) -> Iterator[str]:
    """The name of an application role that does not exist yet. Ask for it before the database."""
    with role_of(server, None) as name:
        yield name


def as_login(url: str, name: str) -> str:
    return make_url(url).set(username=name, password=name).render_as_string(hide_password=False)


def own_database(url: str, name: str) -> None:
    with admin(url) as connection:
        connection.execute(
            sql.SQL("ALTER DATABASE {} OWNER TO {}").format(
                sql.Identifier(make_url(url).database or ""), sql.Identifier(name)
            )
        )


def hinted(error: ConfigurationError) -> str:
    """The SQL that an error tells an administrator to run."""
    found = re.search(r"administrator must run[^:]*: (.*;)", str(error))
    assert found, error
    return found[1]


# --- the files ------------------------------------------------------------------------------------


def test_one_head_one_root_no_branches() -> None:
    scripts = ScriptDirectory.from_config(alembic_config())
    assert scripts.get_heads() == [head_revision()]
    assert scripts.get_bases() == REVISIONS[:1]
    assert len(REVISIONS) == len(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files(file: Path) -> None:
    assert re.fullmatch(r"20\d{6}_[012]\d[0-5]\d_[a-z0-9_]+\.py", file.name)
    imported = {
        name
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    # Models change; what a revision has done does not.
    assert {name.partition(".")[0] for name in imported} <= {
        "__future__",
        "alembic",
        "sqlalchemy",
        *sys.stdlib_module_names,
    }


def test_order_of_files_is_order_of_revisions() -> None:
    found = [re.search(r'^revision = "(\w+)"$', file.read_text(), re.MULTILINE) for file in FILES]
    assert [match and match[1] for match in found] == REVISIONS


def test_new_revision(tmp_path: Path, fresh_url: str) -> None:
    shutil.copytree(ROOT / "alembic", tmp_path / "alembic")
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    config = Config(tmp_path / "alembic.ini", stdout=io.StringIO())
    config.attributes["settings"] = settings(fresh_url)
    command.revision(config, "Add a thing", autogenerate=True)
    (new,) = (tmp_path / "alembic/versions").glob("*_add_a_thing.py")
    test_files(new)
    assert new.read_text().count("    pass") == 2  # models and migrations agree
    command.upgrade(config, "head")
    assert revision_of(fresh_url) not in REVISIONS
    command.downgrade(config, "-1")
    assert revision_of(fresh_url) == REVISIONS[-1]


# --- up and down ----------------------------------------------------------------------------------


def test_each_revision_up_down_up(role: str, empty_url: str) -> None:
    configuration = settings(empty_url, app_role=role)
    empty = snapshot(empty_url)
    for before, revision in zip(["base", *REVISIONS], REVISIONS, strict=False):
        old = snapshot(empty_url)
        upgrade(revision, settings=configuration)
        new = snapshot(empty_url)
        assert new != old
        downgrade(before, settings=configuration)
        assert_same(snapshot(empty_url), old)
        upgrade(revision, settings=configuration)
        assert_same(snapshot(empty_url), new)
    assert revision_of(empty_url) == head_revision()
    downgrade("base", settings=configuration)
    left = snapshot(empty_url)
    assert_same(left, empty)
    assert [name for name in CATALOGS if left[name]] == ["schema grants"]  # public's own


def test_upgrading_again_changes_nothing(fresh_url: str) -> None:
    before = snapshot(fresh_url)
    upgrade(settings=settings(fresh_url))
    assert snapshot(fresh_url) == before


def test_downgrade_without_the_role(server: str, empty_url: str) -> None:
    with role_of(server, None) as role:
        upgrade(settings=settings(empty_url, app_role=role))
        execute(empty_url, f"DROP OWNED BY {role}")
    downgrade("base", settings=settings(empty_url, app_role=role))
    assert snapshot(empty_url)["relations"] == []


# --- models and migrations ------------------------------------------------------------------------


def test_check_is_clean(fresh_url: str) -> None:
    command.check(alembic_config(settings(fresh_url)))


@pytest.mark.parametrize(
    "change",
    [
        "DROP INDEX ix_users_created_at_id",
        "ALTER TABLE users ALTER username TYPE text",
        "ALTER TABLE conversation_memory ADD other vector(3)",
        "ALTER TABLE conversations ALTER version SET DEFAULT 2",
    ],
)
def test_check_sees(change: str, fresh_url: str) -> None:
    execute(fresh_url, change)
    with pytest.raises(CommandError, match="New upgrade operations detected"):
        command.check(alembic_config(settings(fresh_url)))


def test_models_and_migrations_make_the_same(
    fresh_url: str, empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The models leave open how many dimensions there are; the settings of a migration decide.
    dimensions = Settings.model_fields["embedding_dimensions"].default
    monkeypatch.setattr(Memory.__table__.c.embedding, "type", Vector(dimensions))
    with admin(empty_url) as connection:
        for name in EXTENSIONS:
            connection.execute(f"CREATE EXTENSION {name}".encode())
    engine = create_engine(empty_url.replace("postgresql://", "postgresql+psycopg://"))
    Base.metadata.create_all(engine)
    engine.dispose()
    migrated = snapshot(fresh_url)
    assert_same(migrated, snapshot(empty_url), but=NOT_IN_THE_MODELS)
    assert {row[0] for row in migrated["relations"]} == Base.metadata.tables.keys()
    for name in ("columns", "constraints", "indexes"):
        assert {row[0] for row in migrated[name]} == Base.metadata.tables.keys()


# --- offline --------------------------------------------------------------------------------------


def test_rendered_sql_makes_the_same(empty_url: str, fresh_url: str) -> None:
    offline = Settings(environment="production", _env_file=None)
    script = rendered(offline)
    assert script.startswith("SET lock_timeout = 10000;")
    assert script.rstrip().endswith("COMMIT;")
    assert "%%" not in script
    execute(empty_url, script)
    assert_same(snapshot(empty_url), snapshot(fresh_url))
    assert revision_of(empty_url) == head_revision()
    command.check(alembic_config(settings(empty_url)))

    execute(empty_url, rendered(offline, f"{head_revision()}:base"))
    assert snapshot(empty_url)["relations"] == []


def test_rendered_sql_has_the_settings() -> None:
    script = rendered(
        Settings(
            app_role="chat_app",
            embedding_dimensions=3072,
            lock_timeout=2.5,
            statement_timeout=60,
            _env_file=None,
        )
    )
    assert "SET lock_timeout = 2500;" in script
    assert "SET statement_timeout = 60000;" in script
    assert "halfvec(3072)" in script
    assert "CREATE ROLE chat_app NOLOGIN" in script
    assert "database_app" not in script


def test_without_a_role_there_are_no_role_statements(empty_url: str) -> None:
    configuration = settings(empty_url, app_role="")
    assert not re.search("ROLE|GRANT|PRIVILEGES", rendered(configuration))
    upgrade(settings=configuration)
    made = snapshot(empty_url)
    assert (made["grants"], made["default privileges"]) == ([], [])
    assert len(made["row security"]) == len(made["policies"]) == len(Base.metadata.tables)
    downgrade("base", settings=configuration)
    assert snapshot(empty_url)["relations"] == []


# --- the command line -----------------------------------------------------------------------------


def alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("alembic"), *arguments],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def test_command_line(empty_url: str) -> None:
    done = alembic(empty_url, "upgrade", "head")
    assert f"-> {head_revision()}" in done.stderr
    assert alembic(empty_url, "current").stdout.strip() == f"{head_revision()} (head)"
    assert f"<base> -> {REVISIONS[0]}" in alembic(empty_url, "history").stdout
    assert "No new upgrade operations" in alembic(empty_url, "check").stdout


# --- several at once ------------------------------------------------------------------------------

TOGETHER = """
import logging, os, sys, traceback
import database, database.models
from database.schema import head_revision
head_revision()
logging.basicConfig(format="%(process)d: %(message)s")
logging.getLogger("alembic.runtime.migration").setLevel(logging.INFO)
children = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        try:
            database.init_db()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def test_ten_processes_on_one_empty_database(empty_url: str, fresh_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TOGETHER],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": empty_url},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    workers = re.findall(r"^(\d+): Running upgrade", done.stderr, re.MULTILINE)
    assert len(workers) == len(REVISIONS)
    assert len(set(workers)) == 1
    assert len(re.findall(r"^\d+: Waiting for another process", done.stderr, re.MULTILINE)) > 1
    assert_same(snapshot(empty_url), snapshot(fresh_url))


def wait_until_waiting(connection: psycopg.Connection, *kinds: str) -> None:
    """Wait for a migration that waits: for a "Lock", or between two attempts to be the one."""
    deadline = time.monotonic() + 20
    while not connection.execute(
        "SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'database migrations' AND wait_event_type = ANY (%s)",
        [list(kinds)],
    ).fetchall():
        assert time.monotonic() < deadline, f"no migration waits for {kinds}"
        time.sleep(0.02)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def test_killed_process_leaves_the_database_to_the_next(
    empty_url: str, fresh_url: str, thread: ThreadPoolExecutor
) -> None:
    with admin(empty_url) as watcher, admin(empty_url) as blocker:
        with blocker.transaction():
            blocker.execute("CREATE EXTENSION btree_gin")
            with subprocess.Popen(
                [sys.executable, "-m", "alembic", "upgrade", "head"],
                cwd=ROOT,
                env={**os.environ, "DATABASE_URL": empty_url, "DATABASE_LOCK_TIMEOUT": "60"},
                stderr=subprocess.DEVNULL,
            ) as victim:
                wait_until_waiting(watcher, "Lock")
                next_one = thread.submit(upgrade, settings=settings(empty_url))
                wait_until_waiting(watcher, "Client")
                time.sleep(0.3)
                victim.kill()
            assert not next_one.done()
        next_one.result(timeout=30)
    assert_same(snapshot(empty_url), snapshot(fresh_url))


def test_waiting_for_ones_turn_is_not_limited_and_disturbs_nobody(
    fresh_url: str, thread: ThreadPoolExecutor
) -> None:
    with admin(fresh_url) as other, admin(fresh_url) as watcher:
        other.execute("SELECT pg_advisory_lock(%s)", [ADVISORY_LOCK])
        impatient = settings(fresh_url, lock_timeout=0.1, statement_timeout=0.5)
        run = thread.submit(upgrade, settings=impatient)
        wait_until_waiting(watcher, "Client", "Lock")
        time.sleep(0.3)
        # Waits for every snapshot that is older than it is.
        other.execute("CREATE INDEX CONCURRENTLY ix_new ON messages (tenant_id, model)")
        time.sleep(1)
        assert not run.done()
        other.execute("SELECT pg_advisory_unlock(%s)", [ADVISORY_LOCK])
        run.result(timeout=20)


def test_lock_timeout(fresh_url: str, thread: ThreadPoolExecutor) -> None:
    configuration = settings(fresh_url, lock_timeout=0.3)
    downgrade(REVISIONS[0], settings=configuration)  # each revision is a transaction of its own
    before = snapshot(fresh_url)
    with admin(fresh_url) as reader, reader.transaction():
        reader.execute("SELECT FROM conversations")
        start = time.monotonic()
        with pytest.raises(TransientError, match="DATABASE_LOCK_TIMEOUT"):
            thread.submit(downgrade, "base", settings=configuration).result(timeout=10)
        assert 0.3 <= time.monotonic() - start < 5
    assert snapshot(fresh_url) == before
    assert revision_of(fresh_url) == REVISIONS[0]
    downgrade("base", settings=configuration)


def test_statement_timeout(fresh_url: str, thread: ThreadPoolExecutor) -> None:
    configuration = settings(fresh_url, statement_timeout=0.3)
    with admin(fresh_url) as reader, reader.transaction():
        reader.execute("SELECT FROM conversations")
        with pytest.raises(TransientError, match="statement_timeout"):
            thread.submit(downgrade, "base", settings=configuration).result(timeout=10)


@pytest.mark.parametrize("statement", ["CREATE ROLE {role} NOLOGIN", "GRANT {role} TO {login}"])
def test_another_database_of_the_server_is_migrated(
    server: str, thread: ThreadPoolExecutor, statement: str
) -> None:
    with (
        role_of(server, "LOGIN CREATEROLE") as login,
        role_of(server, None) as role,
        database_of(server, None) as url,
    ):
        execute(server, f"ALTER ROLE {login} PASSWORD '{login}'")
        own_database(url, login)
        for name in EXTENSIONS:
            execute(url, f"CREATE EXTENSION {name}")
        with admin(as_login(server, login)) as other, admin(url) as watcher:
            if statement.startswith("GRANT"):
                other.execute(f"CREATE ROLE {role}".encode())
            with other.transaction():
                other.execute(statement.format(role=role, login=login).encode())
                configuration = settings(as_login(url, login), app_role=role)
                run = thread.submit(upgrade, settings=configuration)
                wait_until_waiting(watcher, "Lock")
            run.result(timeout=20)


def test_threads_of_one_process(server: str, thread: ThreadPoolExecutor) -> None:
    with database_of(server, None) as one, database_of(server, None) as two:
        barrier = threading.Barrier(2)

        def run(url: str) -> None:
            barrier.wait()
            upgrade(settings=settings(url))

        for done in [thread.submit(run, url) for url in (one, two)]:
            done.result(timeout=30)
        assert_same(snapshot(one), snapshot(two))


# --- what services see of an old schema -----------------------------------------------------------


@pytest.mark.parametrize("role_exists", [True, False])
def test_empty_database(role: str, empty_url: str, *, role_exists: bool) -> None:
    if role_exists:
        execute(empty_url, f"CREATE ROLE {role}")
    database.configure(url=empty_url, app_role=role)
    with pytest.raises(SchemaOutdatedError, match="alembic upgrade head") as caught:
        check_schema()
    assert (caught.value.found, caught.value.needed) == (None, head_revision())
    with (
        SessionLocal() as db,
        pytest.raises(SchemaOutdatedError, match=r"alembic upgrade head.*init_db\(\)"),
    ):
        UserRepository.create(db, email="a@example.com")
    database.init_db()
    check_schema()
    with SessionLocal() as db:
        UserRepository.create(db, email="a@example.com")


def test_outdated_database(fresh_url: str) -> None:
    execute(fresh_url, "ALTER TABLE users DROP last_active_at")
    execute(fresh_url, "UPDATE alembic_version SET version_num = 'older'")
    database.configure(url=fresh_url)
    with pytest.raises(SchemaOutdatedError, match=r"at revision older.*alembic upgrade head"):
        check_schema()
    with (
        SessionLocal() as db,
        pytest.raises(SchemaOutdatedError, match="alembic upgrade head") as caught,
    ):
        UserRepository.create(db, email="a@example.com")
    # A failed call does not ask for the revision, and so claims none.
    assert caught.value.found is None
    assert "none" not in str(caught.value)
    report = check_connection()
    assert (report["status"], report["revision"]) == ("unhealthy", "older")


# --- logins and roles -----------------------------------------------------------------------------


def test_role_may_read_and_write_rows_and_nothing_more(fresh_url: str) -> None:
    with admin(fresh_url) as connection:
        row = connection.execute("SELECT current_setting('server_version_num')::int").fetchone()
        assert row
        allowed = {"SELECT", "INSERT", "UPDATE", "DELETE"}
        privileges = allowed | {"TRUNCATE", "REFERENCES", "TRIGGER"}
        if row[0] >= 170000:
            privileges |= {"MAINTAIN"}
        for table in Base.metadata.tables:
            granted = {
                privilege
                for privilege in privileges
                if connection.execute(
                    "SELECT has_table_privilege('database_app', %s, %s)", [table, privilege]
                ).fetchone()
                == (True,)
            }
            assert granted == allowed, table
        row = connection.execute(
            "SELECT rolcanlogin, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb FROM pg_roles"
            " WHERE rolname = 'database_app'"
        ).fetchone()
        assert row == (False,) * 5
        connection.execute("SET ROLE database_app")
        connection.execute("SELECT FROM alembic_version")
        for statement in (
            "TRUNCATE users CASCADE",
            "CREATE TABLE mine (id int)",
            "ALTER TABLE users ADD mine int",
            "DROP TABLE users CASCADE",
            "ALTER TABLE users DISABLE ROW LEVEL SECURITY",
            "DROP POLICY tenant_isolation ON users",
            "CREATE INDEX ON users (email)",
            "CREATE TRIGGER mine BEFORE INSERT ON users EXECUTE FUNCTION suppress_redundant()",
            "UPDATE alembic_version SET version_num = 'x'",
            "DROP TABLE alembic_version",
            "CREATE SCHEMA mine",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())


def test_role_may_use_tables_that_are_added_later(fresh_url: str) -> None:
    with admin(fresh_url) as connection:
        connection.execute("CREATE TABLE invoices (id bigserial, total int)")
        connection.execute("SET ROLE database_app")
        connection.execute("INSERT INTO invoices (total) VALUES (1)")
        connection.execute("UPDATE invoices SET total = 2")
        assert connection.execute("SELECT id, total FROM invoices").fetchall() == [(1, 2)]
        connection.execute("DELETE FROM invoices")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("TRUNCATE invoices")


def test_login_that_may_do_nothing(login: str, role: str, empty_url: str) -> None:
    configuration = settings(as_login(empty_url, login), app_role=role)
    with pytest.raises(ConfigurationError, match=r"permission denied for schema.*MIGRATION_URL"):
        upgrade(settings=configuration)


def test_ordinary_login_that_an_administrator_has_prepared(
    login: str, role: str, empty_url: str, fresh_url: str
) -> None:
    """Follow the errors' advice until there is none left."""
    configuration = settings(as_login(empty_url, login), app_role=role)
    own_database(empty_url, login)
    advice = []
    for _ in range(3):
        try:
            upgrade(settings=configuration)
        except ConfigurationError as error:
            assert revision_of(empty_url) is None
            advice.append(hinted(error))
            execute(empty_url, advice[-1])
        else:
            break
    grants = f"GRANT {role} TO {login}; GRANT USAGE ON SCHEMA public TO {role};"
    assert advice == [
        " ".join(f"CREATE EXTENSION IF NOT EXISTS {name};" for name in EXTENSIONS),
        f"CREATE ROLE {role} NOLOGIN; {grants}",
    ]
    granted = {"grants", "schema grants", "default privileges"}
    assert_same(snapshot(empty_url), snapshot(fresh_url), but=granted)

    database.configure(url=configuration.url.get_secret_value(), app_role=role)  # type: ignore[union-attr]
    check_schema()
    with SessionLocal() as db:
        UserRepository.create(db, email="a@example.com")
    report = check_connection()
    assert (report["message"], report["row_level_security"]) == ("ok", True)
    downgrade("base", settings=configuration)
    assert snapshot(empty_url)["relations"] == []


def test_role_that_exists_but_may_not_be_entered(login: str, role: str, empty_url: str) -> None:
    own_database(empty_url, login)
    for name in EXTENSIONS:
        execute(empty_url, f"CREATE EXTENSION {name}")
    execute(empty_url, f"CREATE ROLE {role}")
    configuration = settings(as_login(empty_url, login), app_role=role)
    with pytest.raises(ConfigurationError) as caught:
        upgrade(settings=configuration)
    assert hinted(caught.value).startswith(f"GRANT {role} TO {login};")
    assert "DATABASE_APP_ROLE" in str(caught.value)


def test_schema_that_belongs_to_somebody_else(login: str, role: str, empty_url: str) -> None:
    with admin(empty_url) as connection:
        for statement in (
            *(f"CREATE EXTENSION {name}" for name in EXTENSIONS),
            f"CREATE ROLE {role}",
            f"GRANT {role} TO {login}",
            "CREATE SCHEMA chat",
            f"GRANT USAGE, CREATE ON SCHEMA chat TO {login}",
        ):
            connection.execute(statement.encode())
    url = make_url(as_login(empty_url, login)).update_query_pairs(
        [("options", "-csearch_path=chat,public")]
    )
    configuration = settings(url.render_as_string(hide_password=False), app_role=role)
    with pytest.raises(ConfigurationError) as caught:
        upgrade(settings=configuration)
    assert f"GRANT USAGE ON SCHEMA chat TO {role};" in hinted(caught.value)
    execute(empty_url, hinted(caught.value))
    upgrade(settings=configuration)


def test_migration_url_is_the_owners(login: str, role: str, empty_url: str) -> None:
    nowhere = "postgresql://nobody@127.0.0.1:1/none"
    upgrade(settings=settings(nowhere, migration_url=empty_url, app_role=role))
    execute(empty_url, f"GRANT {role} TO {login}")
    service = as_login(empty_url, login)
    with admin(service) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("ALTER TABLE users ADD mine int")
    database.configure(url=service, migration_url=empty_url, app_role=role)
    check_schema()
    with SessionLocal() as db:
        UserRepository.create(db, email="a@example.com")
    assert check_connection()["message"] == "ok"
    database.init_db()


# --- what the settings choose ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimensions", "kind"),
    [(384, "vector"), (2000, "vector"), (2001, "halfvec"), (3072, "halfvec")],
)
def test_embedding_dimensions(dimensions: int, kind: str, empty_url: str) -> None:
    configuration = settings(empty_url, embedding_dimensions=dimensions)
    upgrade(settings=configuration)
    made = snapshot(empty_url)
    types = {row[2]: row[3] for row in made["columns"] if row[0] == "conversation_memory"}
    assert types["embedding"] == f"{kind}({dimensions})"
    definitions = {row[1]: row[2] for row in made["indexes"]}
    assert definitions["ix_conversation_memory_embedding"].endswith(
        f"USING hnsw (embedding {kind}_cosine_ops)"
    )
    command.check(alembic_config(configuration))


@pytest.mark.parametrize("options", ["-csearch_path=chat,public", "-csearch_path=chat"])
def test_other_schema(options: str, empty_url: str, fresh_url: str) -> None:
    execute(empty_url, "CREATE SCHEMA chat")
    url = make_url(empty_url).update_query_pairs([("options", options)])
    there = url.render_as_string(hide_password=False)
    upgrade(settings=settings(there))
    command.check(alembic_config(settings(there)))
    assert_same(snapshot(there), snapshot(fresh_url), but={"schema grants"})
    assert snapshot(empty_url)["relations"] == []
    database.configure(url=there, statement_timeout=30)
    check_schema()
    with SessionLocal() as db:
        UserRepository.create(db, email="a@example.com")
    assert check_connection()["message"] == "ok"
    downgrade("base", settings=settings(there))
    assert snapshot(there)["relations"] == []
