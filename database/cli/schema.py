"""The commands of the schema; they concern all tenants of a database.

They take --tenant all the same: a script can give the same options to every command.
"""
# ruff: noqa: ARG001

import sys
from io import StringIO
from typing import Annotated

import typer

from database.cli.errors import CommandError
from database.cli.options import AsJson, Tenant, Yes, confirm
from database.cli.output import print_record, print_rows

__all__ = ["check", "current", "doctor", "downgrade", "history_of_schema", "sql", "upgrade"]

UpTo = Annotated[
    str, typer.Argument(metavar="REVISION", help="Up to which; a step such as +1 too.")
]


def upgrade(revision: UpTo = "head", *, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Migrate to the newest schema, or to a revision."""
    from database import schema

    schema.upgrade(revision)
    print_record({"revision": schema.installed_revision()}, as_json=as_json)


def downgrade(
    revision: Annotated[
        str, typer.Argument(metavar="REVISION", help="Down to which; base, or a step such as -1.")
    ],
    *,
    yes: Yes = False,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Migrate back to an older schema.

    What it has no place for is lost.
    """
    from database import schema

    confirm(f"Take the schema back to {revision}, and lose what is stored in what goes?", yes=yes)
    schema.downgrade(revision)
    print_record({"revision": schema.installed_revision()}, as_json=as_json)


def current(*, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Show the revision, and the one needed."""
    from database import schema

    found = {"revision": schema.installed_revision(), "head": schema.head_revision()}
    print_record(found, as_json=as_json)


def history_of_schema(*, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """List all revisions, the newest first.

    No database is needed.
    """
    from database import schema

    rows = (revision._asdict() for revision in schema.revisions())
    print_rows(rows, schema.Revision._fields, as_json=as_json)


def check(*, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Make sure that the schema is as needed.

    Exits with 1 when its revision, a table or an index is not what this version needs.
    """
    from database import schema
    from database.diagnosis import differences

    schema.check_schema()
    if lacks := differences():
        raise CommandError(f"the tables are not as this version needs them: {'; '.join(lacks)}")
    print_record({"revision": schema.head_revision(), "status": "ok"}, as_json=as_json)


def sql(
    revision: Annotated[
        str,
        typer.Argument(
            metavar="REVISION",
            help="Up to which; from:to for a part, or for the way back, as in head:base.",
        ),
    ] = "head",
    *,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Print the migrations as SQL.

    For an administrator to run; no database is needed.
    """
    from database import schema
    from database.errors import InvalidValueError

    script = StringIO()
    try:
        schema.render_sql(revision, script)
    except InvalidValueError as error:
        raise typer.BadParameter(error.rule, param_hint="'REVISION'") from None
    if as_json:
        print_record({"sql": script.getvalue()}, as_json=True)
    else:
        sys.stdout.write(script.getvalue())


def doctor(*, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Look for what is wrong with the database.

    Exits with 1 when something must be mended. Writes nothing.
    """
    from database.diagnosis import Finding, diagnose

    findings = list(diagnose())
    print_rows((found._asdict() for found in findings), Finding._fields, as_json=as_json)
    if any(found.status == "failure" for found in findings):
        raise typer.Exit(1)
