"""The command line, run in this process or as one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import QueuePool
from typer.testing import CliRunner, Result

from database import TenantSession, get_engine
from database.cli.app import app
from database.session import tenant_of

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable, "-W", "error"]
DATABASE = [*PYTHON, "-m", "database"]


def run(db: TenantSession, *args: str, status: int = 0) -> Result:
    """Run a command in the session's tenant."""
    return invoke(*args, "--tenant", tenant_of(db), status=status)


def invoke(*args: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, args, prog_name="database")
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == status, result.output
    pool = get_engine().pool
    assert isinstance(pool, QueuePool)
    assert pool.checkedout() == 0
    return result


def table(db: TenantSession, *args: str) -> list[dict[str, str]]:
    """What a command prints in a pipe, by column."""
    heads, *rows = [line.split("\t") for line in run(db, *args).stdout.splitlines()]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def record(db: TenantSession, *args: str) -> dict[str, str]:
    lines = run(db, *args).stdout.splitlines()
    return dict(line.split("\t") for line in lines)


def answer(db: TenantSession, *args: str, status: int = 0) -> Any:
    return json.loads(run(db, *args, "--json", status=status).stdout)


def refusal(db: TenantSession, *args: str) -> str:
    """The one line that says why a command did nothing."""
    result = run(db, *args, status=1)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line.removeprefix("database: ")


def environment(url: str | None = None, **more: str) -> dict[str, str]:
    """A process's environment that has nothing of ours but this database."""
    given = {k: v for k, v in os.environ.items() if not k.startswith("DATABASE_")}
    given |= {"PYTHONPATH": str(ROOT), "DATABASE_CONNECT_RETRIES": "1"}
    return given | ({} if url is None else {"DATABASE_URL": url}) | more


def run_process(
    *args: str, folder: Path, url: str | None = None, status: int = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*DATABASE, *args],
        cwd=folder,
        env=environment(url, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done
