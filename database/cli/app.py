"""All commands, and the options that may also stand before them."""

import typer

from database.cli import conversations, history, keys, schema, stats, users
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


app.add_typer(users.app, name="users", no_args_is_help=True)
app.add_typer(keys.app, name="keys", no_args_is_help=True)
app.add_typer(history.app, name="history", no_args_is_help=True)
app.add_typer(conversations.app, name="conversations", no_args_is_help=True)
app.command()(stats.stats)
app.command()(schema.upgrade)
# A step such as -1 is no option.
app.command(context_settings={"ignore_unknown_options": True})(schema.downgrade)
app.command()(schema.current)
app.command()(schema.history_of_schema)
app.command()(schema.check)
app.command()(schema.sql)
app.command()(schema.doctor)
