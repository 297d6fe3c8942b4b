"""`database keys`."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from database.cli.naming import every, find_user
from database.cli.options import AsJson, Limit, Tenant, Yes, confirm, session
from database.cli.output import print_record, print_rows, warn
from database.cli.users import User_

if TYPE_CHECKING:
    from database.repositories.api_key import NewApiKey

__all__ = ["app"]

app = typer.Typer(name="keys", help="Make API keys, and end them.")

Key = Annotated[str, typer.Argument(metavar="KEY", help="The key's id, as `list` shows it.")]

_COLUMNS = (
    "id",
    "prefix",
    "name",
    "user_id",
    "created_at",
    "last_used_at",
    "expires_at",
    "revoked_at",
)


@app.command()
def create(
    user: User_,
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="What to call it.", show_default=False)
    ] = None,
    days: Annotated[
        float | None,
        typer.Option("--days", min=0, help="Until it expires; else never.", show_default=False),
    ] = None,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Make a key for a user, and show it: this once."""
    from database.repositories.api_key import ApiKeyRepository

    expires_at = None if days is None else _in_days(days)
    with session(tenant) as db:
        found = find_user(db, user)
        made = ApiKeyRepository.create(db, found.id, name=name, expires_at=expires_at)
        _print_new(made, as_json=as_json)


@app.command("list")
def list_(
    user: Annotated[
        str | None, typer.Argument(metavar="USER", help="Whose; else everybody's.")
    ] = None,
    *,
    limit: Limit = None,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """List the keys, newest first, without what they are."""
    from database.repositories.api_key import ApiKeyRepository

    with session(tenant) as db:
        owner = None if user is None else find_user(db, user).id
        keys = every(ApiKeyRepository.list, db, limit=limit, user_id=owner)
        print_rows(keys, _COLUMNS, as_json=as_json)


@app.command()
def revoke(key: Key, *, yes: Yes = False, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Refuse a key from now on, for good."""
    from database.repositories.api_key import ApiKeyRepository

    with session(tenant) as db:
        found = ApiKeyRepository.require(db, key)
        confirm(f"Revoke the key {found.prefix}...?", yes=yes)
        ApiKeyRepository.revoke(db, found.id)
        print_record(ApiKeyRepository.require(db, found.id), as_json=as_json)


@app.command()
def rotate(
    key: Key,
    *,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Hours the old key is still accepted.")
    ] = 24,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Make a key in place of another one, and show it: this once."""
    from database.repositories.api_key import ApiKeyRepository

    with session(tenant) as db:
        made = ApiKeyRepository.rotate(db, key, grace=_hours(grace))
        _print_new(made, as_json=as_json)


def _in_days(days: float) -> datetime:
    try:
        return datetime.now(UTC) + timedelta(days=days)
    except (OverflowError, ValueError):
        raise typer.BadParameter("ends after the year 9999", param_hint="--days") from None


def _hours(hours: float) -> timedelta:
    try:
        return timedelta(hours=hours)
    except (OverflowError, ValueError):
        raise typer.BadParameter("is too long", param_hint="--grace") from None


def _print_new(made: "NewApiKey", *, as_json: bool) -> None:
    shown: dict[str, Any] = {"secret": made.secret, **made.api_key.to_dict()}
    print_record(shown, as_json=as_json)
    warn("Keep the secret: it is not stored, and cannot be shown again.")
