"""`database users`."""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer

from database.cli.files import write_lines
from database.cli.naming import find_user, pages
from database.cli.options import AsJson, Limit, Output, Tenant, Yes, confirm, progress, session
from database.cli.output import print_record, print_rows

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from database.models import User

__all__ = ["app"]

app = typer.Typer(name="users", help="Look at users, delete them, make them administrators.")

User_ = Annotated[
    str, typer.Argument(metavar="USER", help="An id, an e-mail address, or provider:subject.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count.", show_default=False)]

_COLUMNS = ("id", "email", "identities", "username", "first_name", "is_admin", "created_at")


@app.command("list")
def list_(*, limit: Limit = None, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """List the users, newest first."""
    from database.repositories.user import UserRepository

    with session(tenant) as db:
        found = pages(UserRepository.list, db, limit=limit)
        rows = chain.from_iterable(_shown(db, page) for page in found)
        print_rows(rows, _COLUMNS, as_json=as_json)


@app.command()
def show(user: User_, *, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Show one user."""
    with session(tenant) as db:
        print_record(next(_shown(db, [find_user(db, user)])), as_json=as_json)


@app.command()
def delete(
    user: User_, *, yes: Yes = False, tenant: Tenant = None, as_json: AsJson = False
) -> None:
    """Delete a user, with all that they own."""
    from database.repositories.user import UserRepository

    with session(tenant) as db:
        found = find_user(db, user)
        confirm(f"Delete the user {user!r} and all that they own?", yes=yes)
        print_record({"deleted": int(UserRepository.delete(db, found.id))}, as_json=as_json)


@app.command()
def delete_non_admins(
    *, dry_run: DryRun = False, yes: Yes = False, tenant: Tenant = None, as_json: AsJson = False
) -> None:
    """Delete all users but the administrators.

    Each with all that they own.
    """
    from database.repositories.user import UserRepository

    with session(tenant) as db:
        count = UserRepository.count(db, is_admin=False)
        if dry_run:
            print_record({"would_delete": count}, as_json=as_json)
            return
        # Newest first, and begun before the question: who comes while it waits is not deleted.
        found = pages(UserRepository.list, db, is_admin=False)
        first = next(found, [])
        confirm(f"Delete {count} users who are no administrators, and all they own?", yes=yes)
        deleted = 0
        with progress("Deleting users", count) as advance:
            for page in chain([first], found):
                deleted += UserRepository.delete_non_admins(db, [user.id for user in page])
                advance(len(page))
        print_record({"deleted": deleted}, as_json=as_json)


@app.command()
def export(
    user: User_, *, output: Output = None, tenant: Tenant = None, as_json: AsJson = False
) -> None:
    """Write all that a user has as JSON lines.

    Key hashes are among it: treat it as a secret.
    """
    from database.repositories.user import UserRepository

    with session(tenant) as db:
        lines = UserRepository.export(db, find_user(db, user).id)
        write_lines(lines, output, "Exporting rows", as_json=as_json)


@app.command()
def erase(
    user: User_,
    *,
    dry_run: DryRun = False,
    yes: Yes = False,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Delete a user and every row about them.

    Tells how many rows of each table.
    """
    from database.repositories.user import UserRepository

    with session(tenant) as db:
        found = find_user(db, user)
        if not dry_run:
            confirm(f"Erase every row of the user {user!r}?", yes=yes)
        print_record(UserRepository.erase(db, found.id, dry_run=dry_run), as_json=as_json)


@app.command()
def make_admin(
    user: User_,
    *,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="Take the rights away instead.", show_default=False)
    ] = False,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Make a user an administrator."""
    from database.repositories.user import UserRepository

    with session(tenant) as db:
        changed = UserRepository.update(db, find_user(db, user).id, is_admin=not revoke)
        print_record(next(_shown(db, [changed])), as_json=as_json)


def _shown(db: "Session", users: list["User"]) -> Iterator[dict[str, Any]]:
    """Yield users with how others know them: some have no address."""
    from database.repositories.identity import IdentityRepository

    known: dict[Any, list[str]] = {user.id: [] for user in users}
    for identity in IdentityRepository.of_users(db, known):
        known[identity.user_id].append(f"{identity.provider}:{identity.subject}")
    for user in users:
        fields = {name: getattr(user, name) for name in user.to_dict()}
        yield {**fields, "identities": known[user.id]}
