"""How a driver's error becomes one of ours: by SQLSTATE and constraint, never by its text."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import CheckConstraint, Index
from sqlalchemy.sql.schema import ColumnCollectionConstraint

from database.errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConflictError,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    SchemaOutdatedError,
    TransientError,
)
from database.models.base import Base

if TYPE_CHECKING:
    from psycopg.errors import Diagnostic
    from sqlalchemy.exc import DBAPIError

__all__ = ["translate"]

_TRANSIENT = {
    "40001": "the transaction met a concurrent one: run it again",
    "40P01": "the transaction met a deadlock: run it again",
    "55P03": "a lock could not be had in time",
    "57014": "the statement took longer than statement_timeout",
    "53300": "the server has no connection left",
    "57P01": "the server closed the connection",
    "57P02": "the server closed the connection",
    "57P03": "the server is starting or stopping",
    "25P03": "the transaction was idle for too long",
}
_VALUE_RULES = {
    "22000": "does not fit its column",
    "22001": "is too long for its column",
    "22003": "is out of range",
    "22007": "is no date or time",
    "22008": "is out of range",
    "22021": "must not contain NUL",
    "2201B": "is no regular expression that the server takes",
    "22P02": "has the wrong form",
    "22P05": "must not contain NUL",
    "54000": "is too large",
    "54001": "is nested too deeply",
}
# pgvector's: a vector of another dimension. It names no column.
_VALUE_FIELDS = {"22000": "embedding"}
_MISSING = ("42P01", "42703", "42883", "42704", "22023")


def translate(error: DBAPIError) -> DatabaseError | None:  # noqa: C901, PLR0911 - a table
    """Return our error for a driver's one, or None for what is unknown."""
    original = error.orig
    if not isinstance(original, psycopg.Error):
        return None
    state = original.sqlstate or ""
    field = _field(original.diag)
    match state:
        case "23505":
            return AlreadyExistsError(field)
        case "23503":
            return InvalidReferenceError(field)
        case "23514":
            return InvalidValueError(field, _rule(original.diag))
        case "23502":
            return InvalidValueError(original.diag.column_name or field, "must not be None")
        case "23P01" | "21000":
            return ConflictError(f"{field}: conflicts with another row")
        case "42501":
            return _not_allowed(original.diag)
        case _ if state in _VALUE_RULES:
            value = original.diag.column_name or _VALUE_FIELDS.get(state, "value")
            return InvalidValueError(value, _VALUE_RULES[state])
        case _ if state in _TRANSIENT:
            return TransientError(_TRANSIENT[state])
        case _ if state in _MISSING:
            return _schema_outdated()
        case _ if error.connection_invalidated:
            return TransientError(
                "the connection was lost: what was not committed is undone; whether a commit"
                " that was under way took effect is not known"
            )
        case _:
            return None


def _not_allowed(diagnostic: Diagnostic) -> DatabaseError:
    if diagnostic.source_function == "ExecWithCheckOptions":
        return InvalidValueError("tenant_id", "must be the session's tenant")
    return ConfigurationError(
        "the login role lacks a permission: run the migrations as the tables' owner, and grant it"
        " the application's role (GRANT database_app TO <login>)"
    )


def _schema_outdated() -> SchemaOutdatedError:
    from database.schema import head_revision

    return SchemaOutdatedError(None, head_revision())


def _field(diagnostic: Diagnostic) -> str:
    name = diagnostic.constraint_name or ""
    # On Citus a shard's constraint has the shard's number behind its name.
    return _fields().get(name) or _fields().get(re.sub(r"_\d{5,}$", "", name)) or name or "value"


def _rule(diagnostic: Diagnostic) -> str:
    table = Base.metadata.tables.get(diagnostic.table_name or "")
    for constraint in () if table is None else table.constraints:
        if constraint.name == diagnostic.constraint_name and "rule" in constraint.info:
            return str(constraint.info["rule"])
    return "breaks a rule of its column"


@cache
def _fields() -> dict[str, str]:
    """Map each constraint's name to the fields that it is about."""
    fields = {}
    for table in Base.metadata.tables.values():
        for constraint in (*table.constraints, *table.indexes):
            assert isinstance(constraint, ColumnCollectionConstraint | Index)
            if isinstance(constraint, CheckConstraint):
                about = str(constraint.name).removeprefix(f"ck_{table.name}_")
            else:
                about = ", ".join(c.name for c in constraint.columns if c.name != "tenant_id")
            fields[str(constraint.name)] = about
        fields[f"pk_{table.name}"] = "id"
        fields[f"ck_{table.name}_tenant_id"] = "tenant_id"
    return fields
