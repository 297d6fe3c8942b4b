"""Whose a row is: which tables hold a user's data, and the conditions that find it there.

Erasing, exporting and importing all go by what is said here. A test fails for a table that is in
neither list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import Table, Uuid, bindparam, text

from database.models.base import Base

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import TextClause

__all__ = [
    "OWNED",
    "SHARED",
    "Reference",
    "about_user",
    "columns_of",
    "elsewhere",
    "found_by",
    "has_elsewhere",
    "inside",
    "own",
    "owners_of",
    "references_of",
    "statement",
    "unclassified",
]

SHARED = ("personas", "modules")
"""Tables of the tenant's own rows, to which a user's rows refer."""

OWNED = (
    "users",
    "identities",
    "api_keys",
    "contexts",
    "conversations",
    "messages",
    "conversation_states",
    "conversation_memory",
)
"""Tables of users' rows, owners before what they own: the order in which rows can be inserted.

Which row is whose follows from the foreign keys that cascade.
"""


class Reference(NamedTuple):
    """A column that refers to a table."""

    column: str
    table: str


def unclassified(tables: Iterable[Table]) -> set[str]:
    """Return the tables of which nothing is said here, or that no cascade leads to from a user."""
    unknown = set()
    for table in tables:
        reached = table.name == "users" or any(True for _ in _cascades(table, OWNED))
        if table.name not in SHARED and not (table.name in OWNED and reached):
            unknown.add(table.name)
    return unknown


def columns_of(table: str) -> list[str]:
    """Return all columns but the tenant."""
    return [c.name for c in Base.metadata.tables[table].columns if c.name != "tenant_id"]


def references_of(table: str, targets: Iterable[str]) -> list[Reference]:
    """Return the references to some tables that are not the owner's."""
    owners = owners_of(table)
    keys = _references(Base.metadata.tables[table], targets)
    return [reference for reference, _ in keys if reference not in owners]


def owners_of(table: str) -> list[Reference]:
    """Return the references to the rows that a row goes with."""
    return list(_cascades(Base.metadata.tables[table], OWNED))


def about_user(table: str) -> str | None:
    """Return the column that holds the user's id, if there is one."""
    if table == "users":
        return "id"
    return next((owner.column for owner in owners_of(table) if owner.table == "users"), None)


def has_elsewhere(table: str) -> bool:
    """Tell whether rows about a user can belong to what another user owns."""
    return about_user(table) is not None and _through(table) is not None


def found_by(table: str) -> str:
    """Return the column by which a user's rows are found in a table."""
    through = _through(table)
    column = through.column if through else about_user(table)
    assert column is not None
    return column


def inside(table: str, row: str) -> str:
    """Return the condition for a row that the user owns, whomever it is about.

    Args:
        table: The row's table.
        row: Its alias in the statement, which has the parameters `tenant` and `user`.
    """
    through = _through(table)
    if through is None:
        return f"{row}.{about_user(table)} = :user"
    return f"{row}.{through.column} IN ({_ids(through.table)})"


def own(table: str, row: str) -> str:
    """Return the condition for a row that the user owns, and that is about nobody else."""
    if not has_elsewhere(table):
        return inside(table, row)
    about = f"{row}.{about_user(table)}"
    return f"{inside(table, row)} AND ({about} = :user OR {about} IS NULL)"


def elsewhere(table: str, row: str) -> str:
    """Return the condition for a row about the user that belongs to what another user owns."""
    return f"{row}.{about_user(table)} = :user AND ({inside(table, row)}) IS NOT TRUE"


def statement(sql: str) -> TextClause:
    """Return a statement that may have the parameters `tenant` and `user`."""
    made = text(sql)
    return made.bindparams(bindparam("user", type_=Uuid())) if ":user" in sql else made


def _ids(table: str) -> str:
    row = f"its_{table}"
    return f"SELECT id FROM {table} AS {row} WHERE {row}.tenant_id = :tenant AND {own(table, row)}"


def _through(table: str) -> Reference | None:
    return next((owner for owner in owners_of(table) if owner.table != "users"), None)


def _cascades(table: Table, targets: Iterable[str]) -> Iterable[Reference]:
    return (reference for reference, rule in _references(table, targets) if rule == "CASCADE")


def _references(table: Table, targets: Iterable[str]) -> list[tuple[Reference, str | None]]:
    """Return the references to some tables, in the order of the columns, and what deletes do."""
    found = []
    for column in table.columns:
        for key in column.foreign_keys:
            target = key.target_fullname.split(".")[0]
            if column.name != "tenant_id" and target in targets:
                found.append((Reference(column.name, target), key.ondelete))
    return found
