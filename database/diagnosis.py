"""What is the matter with a database: more than a health endpoint should ask at each call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import TextClause, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import Text

from database.config import get_engine, get_settings
from database.errors import DatabaseError
from database.extensions import NEEDED, installed_extensions, lacking
from database.health import check_connection
from database.models import Base
from database.types import Vector
from database.units import translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sqlalchemy import Connection

__all__ = ["Finding", "diagnose", "differences"]

Status = Literal["ok", "warning", "failure"]

# Below these nothing is worth a warning.
_LARGE_ROWS = 10_000
_LARGE_BYTES = 2**20
_DEAD_ROWS = 1_000
_DEAD_SHARE = 0.2


def _about_tables(statement: str) -> TextClause:
    """Return a statement about the tables of ours that there are, as `ours(relid)`."""
    ours = "WITH ours AS (SELECT to_regclass(name) AS relid FROM unnest(:tables) AS name) "
    tables = bindparam("tables", list(Base.metadata.tables), type_=ARRAY(Text()))
    return text(ours + statement).bindparams(tables)


_ROOM = text(
    "SELECT CAST(current_setting('max_connections') AS int)"
    " - CAST(current_setting('superuser_reserved_connections') AS int) AS room,"
    " (SELECT sum(numbackends) FROM pg_stat_database) AS used"
)
# Each permissive policy opens a table further: one without the tenant opens it to all.
_OPEN = _about_tables(
    "SELECT t.relname FROM ours JOIN pg_class t ON t.oid = ours.relid"
    " LEFT JOIN pg_policy p ON p.polrelid = t.oid AND p.polpermissive"
    " GROUP BY t.oid, t.relname HAVING NOT row_security_active(t.oid) OR count(p.oid) = 0"
    " OR bool_or("
    " pg_get_expr(p.polqual, t.oid) NOT LIKE '%app.tenant_id%'"
    " OR pg_get_expr(p.polwithcheck, t.oid) NOT LIKE '%app.tenant_id%') ORDER BY t.relname"
)
_VISIBLE = text(
    " UNION ALL ".join(
        f"SELECT '{table}' WHERE EXISTS (SELECT FROM {table})" for table in Base.metadata.tables
    )
)
_INVALID = _about_tables(
    "SELECT i.relname FROM ours JOIN pg_index x ON x.indrelid = ours.relid"
    " JOIN pg_class i ON i.oid = x.indexrelid WHERE NOT x.indisvalid ORDER BY i.relname"
)
_MISSING_FUNCTIONS = text(
    "SELECT name FROM unnest(ARRAY['merge_patch', 'search_contexts', 'search_messages',"
    " 'recall_memories']) AS name WHERE NOT EXISTS (SELECT FROM pg_proc"
    " WHERE proname = name AND pg_function_is_visible(oid)) ORDER BY name"
)
_UNUSED = _about_tables(
    "SELECT i.indexrelname FROM ours JOIN pg_stat_user_indexes i USING (relid)"
    " JOIN pg_stat_user_tables t USING (relid) JOIN pg_index x ON x.indexrelid = i.indexrelid"
    f" WHERE i.idx_scan = 0 AND NOT x.indisunique AND t.n_live_tup >= {_LARGE_ROWS}"
    f" AND pg_relation_size(x.indexrelid) >= {_LARGE_BYTES} ORDER BY i.indexrelname"
)
_DEAD = _about_tables(
    "SELECT t.relname AS name, t.n_dead_tup AS dead FROM ours"
    " JOIN pg_stat_user_tables t USING (relid)"
    f" WHERE t.n_dead_tup >= {_DEAD_ROWS}"
    f" AND t.n_dead_tup > {_DEAD_SHARE} * (t.n_live_tup + t.n_dead_tup) ORDER BY t.relname"
)


class Finding(NamedTuple):
    """What one check has found."""

    check: str
    status: Status
    message: str


def diagnose() -> Iterator[Finding]:
    """Yield what each check of the configured database finds; never raises, shows no password.

    Any login that sessions can use may run it; it writes nothing. Where the database cannot be
    reached, or its schema is at another revision, the checks that need it are left out.
    """
    report = check_connection()
    if report["version"] is None:
        yield Finding("connection", "failure", report["message"])
        return
    where = f"{report['database']} at {report['host']}:{report['port']}"
    yield Finding("connection", "ok", f"{where}, PostgreSQL {report['version']}")
    yield _checked("pool", _pool)
    yield _checked("extensions", _extensions)
    if report["revision"] != report["head"]:
        yield Finding("revision", "failure", report["message"])
        return
    yield Finding("revision", "ok", report["revision"])
    yield _checked("row-level security", _row_level_security)
    yield _checked("tables and indexes", _tables_and_indexes)
    yield _checked("unused indexes", _unused_indexes)
    yield _checked("dead rows", _dead_rows)


def differences() -> list[str]:
    """Return what the configured database lacks of this version's tables, columns and indexes.

    What it has besides, such as an application's own tables and indexes, is no difference.

    Raises:
        TransientError: No server can be reached.
    """
    ischema_names["vector"] = ischema_names["halfvec"] = Vector
    options = {"compare_server_default": True, "include_name": _is_ours}
    with _as_login() as connection:
        context = MigrationContext.configure(connection, opts=options)
        found = compare_metadata(context, Base.metadata)
    return [_named(one) for one in _flat(found) if not one[0].startswith("remove_")]


def _checked(name: str, check: Callable[[], tuple[Status, str]]) -> Finding:
    try:
        with translated():
            return Finding(name, *check())
    except DatabaseError as error:
        return Finding(name, "failure", str(error))
    except DBAPIError as error:
        return Finding(name, "failure", type(error.orig).__name__)


def _pool() -> tuple[Status, str]:
    settings = get_settings()
    ours = settings.pool_size + settings.max_overflow
    with _as_login() as connection:
        room, used = connection.execute(_ROOM).one()
    message = f"up to {ours} connections a process; the server takes {room}, {used} are in use"
    return ("warning" if ours > room else "ok"), message


def _extensions() -> tuple[Status, str]:
    with _as_login() as connection:
        if wrong := list(lacking(connection)):
            return "failure", "; ".join(wrong)
        installed = installed_extensions(connection)
    return "ok", ", ".join(f"{name} {installed[name]}" for name in NEEDED)


def _row_level_security() -> tuple[Status, str]:
    # As sessions work: in the application's role, in a tenant that has no rows.
    engine = get_engine().execution_options(tenant_id=f"nobody-{uuid4().hex}")
    with engine.connect() as connection:
        unguarded = list(connection.scalars(_OPEN))
        visible = list(connection.scalars(_VISIBLE))
    if not get_settings().app_role and unguarded:
        return "warning", "not enforced: DATABASE_APP_ROLE is empty"
    if visible:
        return "failure", f"a tenant sees other tenants' rows of {', '.join(visible)}"
    if unguarded:
        return "failure", f"not enforced on {', '.join(unguarded)}"
    return "ok", f"enforced on {len(Base.metadata.tables)} tables"


def _tables_and_indexes() -> tuple[Status, str]:
    found = differences()
    with _as_login() as connection:
        found += [f"invalid index: {name}" for name in connection.scalars(_INVALID)]
        found += [f"missing function: {name}" for name in connection.scalars(_MISSING_FUNCTIONS)]
    return ("failure", "; ".join(found)) if found else ("ok", "as this version needs them")


def _unused_indexes() -> tuple[Status, str]:
    with _as_login() as connection:
        unused = list(connection.scalars(_UNUSED))
    if unused:
        return "warning", f"never used since statistics began: {', '.join(unused)}"
    return "ok", "none of large tables"


def _dead_rows() -> tuple[Status, str]:
    with _as_login() as connection:
        rows = connection.execute(_DEAD).all()
    if rows:
        listed = ", ".join(f"{row.dead} in {row.name}" for row in rows)
        return "warning", f"{listed}: VACUUM, and see that autovacuum runs"
    return "ok", "few"


def _as_login() -> Connection:
    """Connect without entering the application's role, which sees the same of the catalogs."""
    return get_engine().connect().execution_options(isolation_level="AUTOCOMMIT")


def _is_ours(name: str | None, kind: str, _parents: object) -> bool:
    return kind != "table" or name in Base.metadata.tables


def _flat(found: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the differences one by one: those of a column come in a list."""
    for one in found:
        if isinstance(one, list):
            yield from one
        else:
            yield one


def _named(difference: tuple[Any, ...]) -> str:
    """Return a difference in words: of add_index and an Index, modify_type and names, or such."""
    kind, *about = difference
    names = [part if isinstance(part, str) else getattr(part, "name", None) for part in about]
    said = ".".join(str(name) for name in names[:3] if name)
    verb = str(kind).replace("add_", "missing ").replace("modify_", "different ").replace("_", " ")
    return f"{verb}: {said}"
