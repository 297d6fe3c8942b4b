"""The statements that read an export's lines, check whose their rows are, and write them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sqlalchemy.dialects.postgresql import JSONB

from database.models.base import Base
from database.repositories.ownership import (
    OWNED,
    SHARED,
    Reference,
    about_user,
    columns_of,
    elsewhere,
    found_by,
    own,
    owners_of,
    references_of,
    statement,
)

if TYPE_CHECKING:
    from sqlalchemy import TextClause

    from database.repositories.exporting import Part

__all__ = ["inserting", "later_references", "referencing"]


@cache
def later_references(table: str) -> list[Reference]:
    """Return the references to rows that an export has only further down."""
    after = OWNED[OWNED.index(table) :] if table in OWNED else ()
    return references_of(table, after)


@cache
def inserting(part: Part) -> TextClause:
    """Insert the rows of a part, without the references that must wait."""
    table = part.table
    later = {reference.column for reference in later_references(table)}
    columns = [column for column in columns_of(table) if column not in later]
    conflict = "ON CONFLICT (tenant_id, id) DO NOTHING" if table in SHARED else ""
    return _reading(
        table,
        _checks(part),
        f"INSERT INTO {table} (tenant_id, {', '.join(columns)})"
        f" SELECT :tenant, {', '.join(_value(table, column) for column in columns)}"
        f" FROM line WHERE {_wanted(part)} {conflict} RETURNING 1",
    )


@cache
def referencing(reference: Reference) -> TextClause:
    """Set the references of rows that were inserted without."""
    column, table = reference
    (target,) = (later.table for later in later_references(table) if later.column == column)
    return _reading(
        table,
        {column: _refers_to_own(column, target)},
        f"UPDATE {table} AS item SET {column} = line.{column} FROM line"
        " WHERE item.tenant_id = :tenant AND item.id = line.id AND misplaced IS NULL RETURNING 1",
    )


def _reading(table: str, checks: dict[str, str], write: str) -> TextClause:
    """Return a statement that reads lines, checks their rows, and writes those that pass.

    Args:
        table: Whose rows they are.
        checks: By column, what a row must fulfil; without them a file could give a user what is
            another one's in the tenant.
        write: What to do with the rows of `line` that are not `misplaced`.

    Returns:
        It has one row: how many were written; the first that fails a check, and its column.
    """
    failing = "".join(f" WHEN ({check}) IS NOT TRUE THEN '{c}'" for c, check in checks.items())
    misplaced = f"CASE{failing} END" if failing else "NULL"
    return statement(f"""
WITH line AS (
    SELECT item.*, line_number, {misplaced} AS misplaced
    FROM json_array_elements(CAST(:lines AS json)) WITH ORDINALITY AS given (line, line_number),
        json_populate_record(NULL::{table}, given.line -> 'row') AS item
),
written AS ({write})
SELECT (SELECT count(*) FROM written), (
    SELECT json_build_array(line_number, misplaced) FROM line
    WHERE misplaced IS NOT NULL ORDER BY line_number LIMIT 1
)""")


def _checks(part: Part) -> dict[str, str]:
    table = part.table
    if table in SHARED:
        return {}
    later = later_references(table)
    checks = {
        reference.column: _refers_to_own(*reference)
        for reference in references_of(table, OWNED)
        if reference not in later
    }
    if part.elsewhere and (about := about_user(table)):
        return {about: elsewhere(table, "item"), **checks}
    return {found_by(table): own(table, "item"), **checks}


def _wanted(part: Part) -> str:
    if not part.elsewhere:
        return "misplaced IS NULL"
    # What the other user owns may be missing in this tenant: then so is this.
    owners = (owner for owner in owners_of(part.table) if owner.table != "users")
    return "misplaced IS NULL" + "".join(
        f" AND {column} IN (SELECT id FROM {table} WHERE tenant_id = :tenant)"
        for column, table in owners
    )


def _refers_to_own(column: str, target: str) -> str:
    return (
        f"item.{column} IS NULL OR EXISTS (SELECT FROM {target} AS target"
        f" WHERE target.tenant_id = :tenant AND target.id = item.{column}"
        f" AND {own(target, 'target')})"
    )


def _value(table: str, column: str) -> str:
    kind = Base.metadata.tables[table].columns[column].type
    if isinstance(kind, JSONB) and not kind.none_as_null:
        # Where None is a value, JSON's null.
        return f"coalesce(line.{column}, 'null')"
    return f"line.{column}"
