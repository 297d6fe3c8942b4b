"""All commands, and the options that may also stand before them."""

import typer

from database.cli import conversations, history, keys, schema, stats, users
from database.cli.errors import Commands
from database.cli.options import AsJson, Tenant

__all__ = ["app"]

app = typer.Typer(
    cls=Commands,
    help="Look after the database of an LLM application: DATABASE_URL, or the embedded server.",
    # Plain help and plain usage errors: the same on a terminal and in a pipe.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def common(*, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Take the options that every command has before the command."""


app.callback()(common)
for group in (users, keys, history, conversations):
    group.app.callback()(common)
    app.add_typer(group.app, no_args_is_help=True)
app.command()(stats.stats)
app.command()(schema.upgrade)
# A step such as -1 is no option.
app.command(context_settings={"ignore_unknown_options": True})(schema.downgrade)
app.command()(schema.current)
app.command()(schema.history_of_schema)
app.command()(schema.check)
app.command()(schema.sql)
app.command()(schema.doctor)
