"""The command line: `database --help`, with the extra `cli`.

Nothing here holds SQL. What talks to the database is imported when a command runs, so that help
comes at once.
"""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper

__all__ = ["main"]


def main() -> None:
    """Run the command that the process's arguments name, and exit."""
    # Each attempt to connect would be a line; the error after the last one is enough.
    logging.getLogger("database.pool").setLevel(logging.ERROR)
    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal shows what it can; programs get UTF-8.
        encoding = None if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        from database.cli.app import app

        app(prog_name="database")
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit("database: the command line needs the extra: pip install 'llm-database[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
