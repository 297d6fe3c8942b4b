"""Deleting all that a user has, with a receipt."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from database.errors import NotFoundError
from database.repositories.links import detaching_forks
from database.repositories.ownership import (
    OWNED,
    elsewhere,
    has_elsewhere,
    inside,
    statement,
)
from database.session import tenant_of
from database.units import one_read, transaction

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from sqlalchemy import TextClause
    from sqlalchemy.orm import Session

__all__ = ["erase_user"]


def erase_user(db: Session, user: UUID, *, dry_run: bool) -> dict[str, int]:
    """Delete, or only count, the rows of a user; return how many by table."""
    parameters = {"tenant": tenant_of(db), "user": user}
    if dry_run:
        with one_read(db) as connection:
            return _receipt(connection.execute(_counting(), parameters).one())
    # It locks the user and all of theirs that owns other rows, each in a statement of its own: what
    # a statement waited for, it does not see. Behind these locks nobody can add to what is deleted.
    with transaction(db), detaching_forks(db, [user]):
        return _receipt(db.execute(_deleting(), parameters).one())


def _receipt(counts: tuple[int, ...]) -> dict[str, int]:
    rows = dict(zip(OWNED, counts, strict=True))
    if not rows["users"]:
        msg = "User: no such row in this tenant"
        raise NotFoundError(msg)
    return rows


@cache
def _counting() -> TextClause:
    return statement(
        "SELECT "
        + ", ".join(
            " + ".join(
                f"(SELECT count(*) FROM {table} AS item"
                f" WHERE item.tenant_id = :tenant AND {condition})"
                for condition in _conditions(table)
            )
            for table in OWNED
        )
    )


@cache
def _deleting() -> TextClause:
    """Delete from all tables at once: what cascades are left finds nothing to do."""
    parts = {
        f"{table}_{number}": (table, condition)
        for table in reversed(OWNED)
        for number, condition in enumerate(_conditions(table))
    }
    deletes = (
        f"{name} AS (DELETE FROM {table} AS item"
        f" WHERE item.tenant_id = :tenant AND {condition} RETURNING 1)"
        for name, (table, condition) in parts.items()
    )
    counts = (
        " + ".join(f"(SELECT count(*) FROM {name})" for name, part in parts.items() if part[0] == t)
        for t in OWNED
    )
    return statement(f"WITH {', '.join(deletes)} SELECT {', '.join(counts)}")


def _conditions(table: str) -> Iterator[str]:
    # Apart, for an OR would keep both from using their index. No row fulfils both.
    yield inside(table, "item")
    if has_elsewhere(table):
        yield elsewhere(table, "item")
