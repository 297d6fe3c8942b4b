"""Whether the database can be reached, is at the right schema, and keeps tenants apart."""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Engine, QueuePool, text
from sqlalchemy.exc import SQLAlchemyError

from database.config import get_engine
from database.errors import DatabaseError
from database.units import translated

__all__ = ["check_connection"]

_SERVER = text(
    "SELECT current_database() AS database, current_setting('server_version') AS version,"
    " to_regclass('alembic_version') IS NOT NULL AS migrated"
)
# Row-level security holds back a role that neither owns the tables nor may bypass it.
_ENFORCED = text(
    "SELECT coalesce(bool_and(row_security_active(t.oid)), false) FROM pg_class t"
    " WHERE t.oid IN (to_regclass('users'), to_regclass('conversations'), to_regclass('messages'))"
)


def check_connection() -> dict[str, Any]:
    """Look at the configured database, for a health endpoint or a start-up log; never raises.

    Returns:
        status: "healthy", or "unhealthy" when it cannot be reached or is at another schema.
        message: What is the matter, without passwords.
        database, version, host, port: Where; the version is the server's. None if unknown.
        pool: size, checked_out, overflow.
        revision, head: The schema's revision, and the one that this version needs.
        row_level_security: Whether it is enforced for the role that sessions work in.
    """
    report: dict[str, Any] = dict.fromkeys(
        ("database", "version", "host", "port", "pool", "revision", "head", "row_level_security")
    )
    try:
        engine = get_engine()
        report |= _where(engine.url) | {"pool": _pool(engine)}
        with translated():
            report |= _look(engine)
    except DatabaseError as error:
        return {"status": "unhealthy", "message": str(error), **report}
    except SQLAlchemyError as error:
        # The name alone: a driver's text can hold values.
        return {"status": "unhealthy", "message": type(error).__name__, **report}
    if report["revision"] != report["head"]:
        found = report["revision"] or "none"
        message = f"the schema is at revision {found}, not {report['head']}: alembic upgrade head"
        return {"status": "unhealthy", "message": message, **report}
    if not report["row_level_security"]:
        message = "row-level security is not enforced for the role that sessions work in"
        return {"status": "healthy", "message": message, **report}
    return {"status": "healthy", "message": "ok", **report}


def _where(url: URL) -> dict[str, Any]:
    port = url.port or url.query.get("port", 5432)
    return {
        "database": url.database,
        "host": url.host or url.query.get("host"),
        "port": int(port) if isinstance(port, str) and port.isdecimal() else port,
    }


def _pool(engine: Engine) -> dict[str, int]:
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    return {
        "size": pool.size(),
        "checked_out": pool.checkedout(),
        "overflow": max(pool.overflow(), 0),
    }


def _look(engine: Engine) -> dict[str, Any]:
    from database.schema import current_revision, head_revision

    found: dict[str, Any] = {"head": head_revision()}
    # First as the login itself: the role may not exist before the first migration.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        found |= connection.execute(_SERVER).mappings().one()
        if found.pop("migrated"):
            found["revision"] = current_revision(connection)
    if found.get("revision") == found["head"]:
        with engine.connect() as connection:
            found["row_level_security"] = connection.scalar(_ENFORCED)
    return found
