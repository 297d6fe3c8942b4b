"""How Alembic reaches the database: one process migrates at a time, and no lock is waited for long.

The login is DATABASE_MIGRATION_URL, or DATABASE_URL: the owner of the tables, not the application's
role. Behind PgBouncer it must be the server's own address: the lock belongs to a server session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alembic import context
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.dialects.postgresql.base import ischema_names

from database.config import get_settings, get_url
from database.engine import parse_url
from database.models import Base
from database.types import Vector

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from database.settings import Settings

# Any fixed number; all processes that migrate this schema must use the same.
ADVISORY_LOCK = 6_215_300_418

# So that `alembic check` knows the type it reads from the database.
ischema_names["vector"] = Vector
ischema_names["halfvec"] = Vector


def _options(settings: Settings) -> dict[str, object]:
    # The revisions read these: what a database is made with is chosen where it is made.
    context.config.attributes["app_role"] = settings.app_role
    context.config.attributes["embedding_dimensions"] = settings.embedding_dimensions
    return {
        "target_metadata": Base.metadata,
        "transaction_per_migration": True,
        "compare_server_default": True,
    }


def _migrate(connection: Connection, settings: Settings) -> None:
    milliseconds = round(settings.lock_timeout * 1000)
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
    connection.execute(text(f"SET lock_timeout = {milliseconds}"))
    if settings.statement_timeout:
        milliseconds = round(settings.statement_timeout * 1000)
        connection.execute(text(f"SET statement_timeout = {milliseconds}"))
    connection.commit()
    try:
        context.configure(connection=connection, **_options(settings))
        with context.begin_transaction():
            context.run_migrations()
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": ADVISORY_LOCK})
        connection.commit()


def _run() -> None:
    settings = context.config.attributes.get("settings") or get_settings()
    if context.is_offline_mode():
        context.configure(dialect_name="postgresql", literal_binds=True, **_options(settings))
        with context.begin_transaction():
            context.run_migrations()
        return
    url = settings.migration_url.get_secret_value() if settings.migration_url else get_url(settings)
    engine = create_engine(
        parse_url(url),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={"application_name": f"{settings.application_name} migrations"},
    )
    with engine.connect() as connection:
        _migrate(connection, settings)


_run()
