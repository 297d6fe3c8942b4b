"""All commands, and the options that may also stand before them."""

import typer

from database.cli.errors import Commands
from database.cli.options import AsJson, Tenant

__all__ = ["app"]

app = typer.Typer(
    cls=Commands,
    # Plain help and plain usage errors: the same on a terminal and in a pipe.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


@app.callback()
def database(*, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Look after the database of an LLM application: DATABASE_URL, or the embedded server."""
