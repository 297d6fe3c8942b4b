"""How a command ends: errors as one line, a broken pipe silently, Ctrl-C with 130."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup

__all__ = ["CommandError", "Commands"]

FAILED, INTERRUPTED, BROKEN_PIPE = 1, 130, 141


class CommandError(Exception):
    """What was asked for cannot be done; the text is the line that the user sees."""


class Commands(TyperGroup):
    """The outermost group: whatever its commands raise ends here."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Raises:
            typer.Exit: It ended, with another status than 0.
        """
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # Not later: there nobody would handle what goes wrong.
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _drop_output()
            raise typer.Exit(BROKEN_PIPE) from None
        except Exception as error:
            line = _line_of(error)
            if line is None:
                raise
            typer.echo(f"{ctx.info_name}: {line}", err=True)
            raise typer.Exit(FAILED) from None


def _drop_output() -> None:
    """Keep the interpreter from trying once more, at its end, to write what nobody reads."""
    with suppress(OSError):  # in tests there is no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _line_of(error: Exception) -> str | None:
    """Return what to tell the user; None for what is not theirs to mend, as a bug is."""
    if isinstance(error, CommandError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        name = "" if error.filename is None else f"{error.filename}: "
        return f"{name}{error.strerror or type(error).__name__}"
    if "sqlalchemy" not in sys.modules:
        return None  # It cannot be any of these, and help is not to import them.
    from sqlalchemy.exc import DBAPIError

    from database.errors import DatabaseError

    if isinstance(error, DatabaseError):
        return " ".join(str(error).split())
    if isinstance(error, DBAPIError):
        # Its text shows no values: the engine hides them.
        return " ".join(str(error.orig).split())
    return None
