"""The server's extensions that the schema needs, and what a database lacks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import Text

from database.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Connection

__all__ = ["NEEDED", "check_extensions", "installed_extensions", "lacking"]

NEEDED: dict[str, tuple[int, ...]] = {"vector": (0, 8), "pg_trgm": (), "btree_gin": ()}
"""Each extension, and the lowest version that will do."""

_INSTALLED = text("SELECT extname, extversion FROM pg_extension")
_OFFERED = text(
    "SELECT name, default_version FROM pg_available_extensions WHERE name = ANY(:names)"
).bindparams(bindparam("names", type_=ARRAY(Text())))


def check_extensions(connection: Connection) -> None:
    """Make sure that a database has what the migrations need, or that they can create it.

    Raises:
        ConfigurationError: It does not; the text says what is needed, what was found, what to run.
    """
    if wrong := list(lacking(connection, may_create=True)):
        raise ConfigurationError("; ".join(wrong))


def installed_extensions(connection: Connection) -> dict[str, str]:
    """Return the version of each extension that a database has."""
    return {row.extname: row.extversion for row in connection.execute(_INSTALLED)}


def lacking(
    connection: Connection,
    needed: Mapping[str, tuple[int, ...]] = NEEDED,
    *,
    may_create: bool = False,
) -> Iterator[str]:
    """Yield what is wrong with a database's extensions, and what to run.

    Args:
        connection: To the database.
        needed: The extensions, and their lowest versions.
        may_create: Whether one that is only to be created is right.
    """
    installed = installed_extensions(connection)
    offered: dict[str, str] = {
        row.name: row.default_version
        for row in connection.execute(_OFFERED, {"names": list(needed)})
    }
    for name, least in needed.items():
        found, offer = installed.get(name), offered.get(name)
        is_offered = offer is not None and _version(offer) >= least
        if _version(found) >= least if found is not None else may_create and is_offered:
            continue
        wanted = f"{name} {'.'.join(map(str, least))} or newer" if least else name
        run = f"ALTER EXTENSION {name} UPDATE" if found else f"CREATE EXTENSION {name}"
        first = "" if is_offered else "install it on the server, then "
        yield (
            f"the extension {wanted} is needed, this database has {found or 'none'} and the server"
            f" offers {offer or 'none'}: {first}run {run}"
        )


def _version(said: str) -> tuple[int, ...]:
    return tuple(int(part) for part in said.split(".") if part.isdecimal())
