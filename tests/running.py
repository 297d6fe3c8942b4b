"""What users run, as they run it: examples, each as a process of its own, and scripts of SQL."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import admin

ROOT = Path(__file__).parents[1]


def run_example(
    name: str, folder: Path, url: str, *, columns: int = 100
) -> subprocess.CompletedProcess[str]:
    """Run an example; it must read no `.env` of ours, and any warning fails it."""
    given = {k: v for k, v in os.environ.items() if not k.startswith("DATABASE_")}
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / name],
        cwd=folder,
        env=given
        | {"DATABASE_URL": url, "DATABASE_CONNECT_RETRIES": "0", "PYTHONPATH": str(ROOT)}
        | {"COLUMNS": str(columns), "NO_COLOR": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def execute(url: str, script: str) -> None:
    with admin(url) as connection:
        # As psql sends them: outside a transaction each statement alone.
        for part in re.split(r"(?ms)^(BEGIN;.*?^COMMIT;)$", script):
            for statement in [part] if part.startswith("BEGIN;") else part.split(";\n"):
                connection.execute(statement.encode())


def in_order(output: str, parts: tuple[str, ...]) -> bool:
    places = [output.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


def environment(url: str, **more: str) -> dict[str, str]:
    """The variables of an example that uses a database, and nothing else of ours."""
    given = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DATABASE_") and name not in ("FORCE_COLOR", "TTY_COMPATIBLE")
    }
    known = {"DATABASE_URL": url, "DATABASE_CONNECT_RETRIES": "0", "PYTHONPATH": str(ROOT)}
    return given | known | {"COLUMNS": "100"} | more


def read_until(terminal: int, end: bytes | None) -> str:
    """What a terminal shows, until it shows something, or until its program has ended."""
    shown = b""
    while end is None or end not in shown:
        assert select.select([terminal], [], [], 60)[0], shown
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # nobody has it open any more
            break
    return shown.decode()


def end_of(url: str, application: str) -> None:
    """Wait until the server knows that a client is gone: its last COMMIT may be on its way."""
    query = "SELECT 1 FROM pg_stat_activity WHERE application_name = %s"
    with admin(url) as connection:
        while connection.execute(query, [application]).fetchone():
            time.sleep(0.01)


PEAK = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(status)
"""


def most_megabytes(command: Sequence[str], folder: Path, url: str, status: int = 0) -> int:
    """Run a job; return the most memory it had.

    By way of a small process: a child's figure starts with what its parent has.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *command],
        cwd=folder,
        env=environment(url),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return int(done.stdout)
