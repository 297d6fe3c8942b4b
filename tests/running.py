"""The examples, run as a user runs them: each as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def in_order(output: str, parts: tuple[str, ...]) -> bool:
    places = [output.find(part) for part in parts]
    return -1 not in places and places == sorted(places)
