"""What the commands have in common: the tenant, JSON, and asking before they destroy."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from database.cli.errors import CommandError

if TYPE_CHECKING:
    from database.session import TenantSession

__all__ = ["AsJson", "Limit", "Output", "Tenant", "Yes", "confirm", "progress", "session"]


def _or_before(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Take an option that was given before the command, the nearest one."""
    outer = ctx.parent
    while value in (None, False) and outer is not None:
        value, outer = outer.params.get(str(param.name)), outer.parent
    return value


Tenant = Annotated[
    str | None,
    typer.Option(
        "--tenant",
        metavar="NAME",
        help="Whose rows; else DATABASE_TENANT_ID.",
        callback=_or_before,
        show_default=False,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON.", callback=_or_before, show_default=False)
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="How many at most.", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Where to; else standard output.", show_default=False
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.", show_default=False)]


@contextmanager
def session(tenant: str | None) -> Iterator["TenantSession"]:
    """Open a session of a tenant; None is the configured one."""
    from database.config import get_db_session

    with get_db_session(tenant_id=tenant) as db:
        yield db


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is destroyed.

    Raises:
        CommandError: The answer is no, or nobody can answer.
    """
    if yes:
        return
    if not (sys.stdin and sys.stdin.isatty()):
        raise CommandError(f"{question} Nobody can answer here: give --yes")
    typer.echo(f"{question} [y/N] ", err=True, nl=False)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was done")


@contextmanager
def progress(
    what: str, total: int | None = None, *, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show a bar, if standard error is a terminal; yields what counts steps done."""
    if not (shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)
