"""The command line as a process: help, pipes, terminals, signals and statuses."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

import database
from database import TenantSession, UserRepository
from database.session import tenant_of
from tests.cli import DATABASE, PYTHON, answer, environment, invoke, run_process
from tests.conftest import admin
from tests.running import read_until

MISSING = """
import sys
sys.modules["typer"] = None
from database.cli import main
main()
"""
HEAVY = """
import sys
from database.cli import main
sys.argv = ["database", *{args!r}]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
heavy = ("sqlalchemy", "psycopg", "alembic", "rich", "pydantic_ai", "langchain_core", "agents")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


@pytest.fixture
def many(db: TenantSession) -> int:
    """More users than a pipe's buffer takes."""
    return len(UserRepository.create_many(db, [{"username": "x" * 200} for _ in range(1500)]))


@contextmanager
def in_terminal(
    *args: str, url: str, folder: Path, columns: int = 40
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A command all of whose streams are a terminal, and that terminal's other end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*DATABASE, *args],
        cwd=folder,
        env=environment(url, COLUMNS=str(columns), TERM="xterm"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        yield ours, process
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize(
    "args", [(), ("users",), ("users", "list"), ("upgrade",), ("doctor",), ("history", "export")]
)
def test_help_imports_nothing_heavy(args: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [*PYTHON, "-c", HEAVY.format(args=(*args, "--help"))],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stderr == "[]\n"
    assert done.stdout.startswith("Usage: ")
    assert "\x1b" not in done.stdout


def test_every_command_has_both_options_and_help() -> None:
    def commands(*path: str) -> Iterator[str]:
        lines = invoke(*path, "--help").stdout.split("Commands:\n")
        if len(lines) == 1:
            yield lines[0]
        for line in "".join(lines[1:]).splitlines():
            if line.startswith("  ") and not line.startswith("   "):
                yield from commands(*path, line.split()[0])

    found = list(commands())
    assert len(found) >= 25
    for help_ in found:
        assert "--tenant NAME" in help_
        assert "--json" in help_


def test_options_before_the_command(db: TenantSession) -> None:
    UserRepository.create(db, username="ada")
    tenant = tenant_of(db)
    before = invoke("--tenant", tenant, "--json", "users", "list").stdout
    assert json.loads(before) == answer(db, "users", "list") != []
    nearer = invoke("--tenant", "other", "--json", "users", "--tenant", tenant, "list")
    assert nearer.stdout == before
    nearest = invoke("users", "--json", "--tenant", "other", "list", "--tenant", tenant)
    assert nearest.stdout == before


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("tenant", ["", "a b", "x" * 65, "-x"])
def test_tenants_that_cannot_be(tenant: str, before: bool) -> None:  # noqa: FBT001
    option = (f"--tenant={tenant}",)
    args = (*option, "users", "list") if before else ("users", "list", *option)
    result = invoke(*args, status=1)
    assert result.stderr.startswith("database: tenant_id: must match")
    assert result.stdout == ""


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("users",),
        ("users", "nonsense"),
        ("users", "show"),
        ("users", "list", "--limit", "0"),
        ("users", "list", "--limit", "x"),
        ("users", "list", "extra"),
        ("history", "show", "--limit", "-1"),
        ("downgrade",),
        ("--nonsense",),
    ],
)
def test_usage_errors(args: tuple[str, ...]) -> None:
    assert "Usage: database" in invoke(*args, status=2).stderr


def test_a_pipe_that_closes(db: TenantSession, worker_url: str, many: int, tmp_path: Path) -> None:
    command = " ".join([*DATABASE, "users", "list", "--tenant", tenant_of(db)])
    done = subprocess.run(
        ["sh", "-c", f"({command}; echo $? >status) | head -1"],
        cwd=tmp_path,
        env=environment(worker_url),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("id\temail\t")
    assert (tmp_path / "status").read_text() == "141\n"


def test_a_pipe_that_closes_before_a_failure(tmp_path: Path) -> None:
    command = " ".join([*DATABASE, "doctor"])
    done = subprocess.run(
        ["sh", "-c", f"({command}; echo $? >status) | true"],
        cwd=tmp_path,
        env=environment("postgresql://127.0.0.1:1/nowhere"),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stderr == ""
    assert (tmp_path / "status").read_text() == "141\n"


def test_a_pipe_gets_whole_lines_without_colours(
    db: TenantSession, worker_url: str, many: int, tmp_path: Path
) -> None:
    args = ("users", "list", "--tenant", tenant_of(db))
    done = run_process(*args, folder=tmp_path, url=worker_url, COLUMNS="20", FORCE_COLOR="1")
    heads, *rows = done.stdout.splitlines()
    assert len(rows) == many
    assert {row.count("\t") for row in rows} == {heads.count("\t")}
    assert all("x" * 200 in row for row in rows)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("as_json", [True, False])
def test_programs_get_utf_8(
    db: TenantSession,
    worker_url: str,
    tmp_path: Path,
    as_json: bool,  # noqa: FBT001
) -> None:
    UserRepository.create(db, username="Grüße 🎈")
    args = ("users", "list", "--tenant", tenant_of(db), *(["--json"] if as_json else []))
    done = run_process(*args, folder=tmp_path, url=worker_url, PYTHONIOENCODING="ascii")
    assert "Grüße 🎈" in done.stdout


def test_a_disk_that_is_full(db: TenantSession, worker_url: str, many: int, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*DATABASE, "users", "list", "--tenant", tenant_of(db)],
            cwd=tmp_path,
            env=environment(worker_url),
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "database: No space left on device\n")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_shows_whole_values(
    db: TenantSession, worker_url: str, tmp_path: Path, columns: int
) -> None:
    user = UserRepository.create(db, username="y" * 60 + "\x1b[2J")
    args = ("users", "list", "--tenant", tenant_of(db))
    with in_terminal(*args, url=worker_url, folder=tmp_path, columns=columns) as started:
        terminal, process = started
        shown = read_until(terminal, None)
        assert process.wait(20) == 0
    assert "\x1b[2J" not in shown
    assert shown.count("y") == 60
    assert "…" not in shown
    assert (str(user.id) in shown) == (columns >= 80)


def test_a_terminal_is_asked(db: TenantSession, worker_url: str, tmp_path: Path) -> None:
    user = UserRepository.create(db, email="ada@example.com")
    args = ("users", "delete", "ada@example.com", "--tenant", tenant_of(db))
    for said, status in ("n\n", 1), ("\n", 1), ("\x04", 1), ("yes\n", 0):
        assert UserRepository.exists(db, user.id)
        with in_terminal(*args, url=worker_url, folder=tmp_path) as (terminal, process):
            assert "Delete the user 'ada@example.com'" in read_until(terminal, b"[y/N]")
            os.write(terminal, said.encode())
            rest = read_until(terminal, None)
            assert process.wait(20) == status, rest
        assert ("nothing was done" in rest) == (status == 1)
    assert not UserRepository.exists(db, user.id)


def test_a_bar_on_a_terminal(db: TenantSession, worker_url: str, many: int, tmp_path: Path) -> None:
    args = ("users", "delete-non-admins", "--yes", "--tenant", tenant_of(db))
    with in_terminal(*args, url=worker_url, folder=tmp_path) as (terminal, process):
        shown = read_until(terminal, None)
        assert process.wait(20) == 0
    assert "Deleting users" in shown
    assert f"deleted {many}" in shown
    assert UserRepository.count(db) == 0


def wait_for_lock(connection: psycopg.Connection) -> None:
    waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass"
    deadline = time.monotonic() + 30
    while connection.execute(waiting).fetchone() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_interrupted(fresh_url: str, tmp_path: Path) -> None:
    with admin(fresh_url) as holder, admin(fresh_url) as looking, holder.transaction():
        holder.execute("LOCK TABLE users")
        process = subprocess.Popen(
            [*DATABASE, "users", "list"],
            cwd=tmp_path,
            env=environment(fresh_url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        wait_for_lock(looking)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 130


def test_interrupted_at_a_question(db: TenantSession, worker_url: str, tmp_path: Path) -> None:
    UserRepository.create(db)
    args = ("users", "delete-non-admins", "--tenant", tenant_of(db))
    with in_terminal(*args, url=worker_url, folder=tmp_path) as (terminal, process):
        read_until(terminal, b"[y/N]")
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in read_until(terminal, None)
        assert process.wait(20) == 130
    assert UserRepository.count(db) == 1


def test_an_export_that_is_interrupted(fresh_url: str, tmp_path: Path) -> None:
    database.configure(url=fresh_url)
    with database.get_db_session() as db:
        UserRepository.create(db, email="ada@example.com")
    with admin(fresh_url) as holder, admin(fresh_url) as looking, holder.transaction():
        # The export reads it after the users: the file has been begun.
        holder.execute("LOCK TABLE identities")
        process = subprocess.Popen(
            # Without warnings as errors: that the server's cursor was not closed is one.
            [sys.executable, "-m", "database", "users", "export", "ada@example.com", "-o", "a"],
            cwd=tmp_path,
            env=environment(fresh_url),
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        deadline = time.monotonic() + 30
        while not list(tmp_path.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
        while looking.execute(waiting).fetchone() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:hunter2@127.0.0.1:1/chat", "no server can be reached at 127.0.0.1:1"),
        ("postgresql://me:hunter2@nowhere.invalid/chat", "no server can be reached"),
        ("mysql://me:hunter2@127.0.0.1/chat", "must begin with postgresql://"),
        ("hunter2", "must look like postgresql://"),
    ],
)
def test_no_server(url: str, said: str, tmp_path: Path) -> None:
    done = run_process("users", "list", folder=tmp_path, url=url, status=1)
    (line,) = done.stderr.splitlines()
    assert said in line
    assert "hunter2" not in line
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["upgrade", "current", "check"])
def test_no_server_for_the_schema(command: str, tmp_path: Path) -> None:
    url = "postgresql://me:hunter2@127.0.0.1:1/chat"
    done = run_process(command, folder=tmp_path, url=url, status=1)
    assert done.stderr == "database: DATABASE_URL: no server can be reached at 127.0.0.1:1\n"


def test_a_setting_that_is_wrong(tmp_path: Path) -> None:
    done = run_process("users", "list", folder=tmp_path, status=1, DATABASE_POOL_SIZE="many")
    (line,) = done.stderr.splitlines()
    assert line.startswith("database: DATABASE_POOL_SIZE:")


def test_what_the_server_says_is_one_line(fresh_url: str, tmp_path: Path) -> None:
    with admin(fresh_url) as connection:
        connection.execute("REVOKE SELECT ON users FROM database_app")
    done = run_process("users", "list", folder=tmp_path, url=fresh_url, status=1)
    assert len(done.stderr.splitlines()) == 1
    assert "permission" in done.stderr


def test_without_the_extra(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISSING],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "database: the command line needs the extra: pip install 'llm-database[cli]'"
    ]
