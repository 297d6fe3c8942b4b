"""How Alembic reaches the database: one process migrates at a time, and no lock is waited for long.

The login is DATABASE_MIGRATION_URL, or DATABASE_URL: the owner of the tables, not the application's
role. Behind PgBouncer it must be the server's own address: the lock belongs to a server session.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from alembic import command, context
from sqlalchemy import text
from sqlalchemy.dialects.postgresql.base import ischema_names

from database.config import get_settings, get_url
from database.extensions import check_extensions
from database.models import Base
from database.pool import create_migration_engine
from database.schema import ADVISORY_LOCK
from database.types import Vector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from database.settings import Settings

logger = logging.getLogger("alembic.runtime.migration")

# So that `alembic check` knows the type it reads from the database.
ischema_names["vector"] = Vector
ischema_names["halfvec"] = Vector


def _configure(settings: Settings, **where: Any) -> None:
    # The revisions read these: what a database is made with is chosen where it is made.
    context.config.attributes["app_role"] = settings.app_role
    context.config.attributes["embedding_dimensions"] = settings.embedding_dimensions
    context.configure(
        target_metadata=Base.metadata,
        transaction_per_migration=True,
        compare_server_default=True,
        **where,
    )


def _timeouts(settings: Settings) -> Iterator[str]:
    yield f"SET lock_timeout = {round(settings.lock_timeout * 1000)}"
    if settings.statement_timeout:
        yield f"SET statement_timeout = {round(settings.statement_timeout * 1000)}"


def _wait_for_turn(connection: Connection) -> None:
    """Take the lock that the session keeps until it ends, however it ends.

    Asks again and again: whoever waits inside pg_advisory_lock() has a snapshot open, for which a
    CREATE INDEX CONCURRENTLY of the process that migrates would wait in turn.
    """
    free = text("SELECT pg_try_advisory_lock(:key)").bindparams(key=ADVISORY_LOCK)
    told = False
    while not connection.scalar(free):
        connection.commit()
        if not told:
            logger.info("Waiting for another process that migrates this database")
            told = True
        time.sleep(0.1)
    connection.commit()


def _is_upgrade() -> bool:
    # An env.py is not told what it was called for; the function that lists the steps has that name.
    steps = context.get_context().opts["fn"]
    return bool(steps.__name__ == command.upgrade.__name__)


def _migrate(connection: Connection, settings: Settings) -> None:
    _wait_for_turn(connection)
    _configure(settings, connection=connection)
    if _is_upgrade():
        check_extensions(connection)
    for statement in _timeouts(settings):
        connection.execute(text(statement))
    connection.commit()
    with context.begin_transaction():
        context.run_migrations()


def _render(settings: Settings) -> None:
    # With the driver's own style of parameters every % would be written twice.
    style = {"paramstyle": "named"}
    _configure(settings, dialect_name="postgresql", literal_binds=True, dialect_opts=style)
    with context.begin_transaction():
        for statement in _timeouts(settings):
            context.execute(statement)
        context.run_migrations()


def _run() -> None:
    settings = context.config.attributes.get("settings") or get_settings()
    if context.config.cmd_opts is not None:  # from the command line: tell what is done
        logging.basicConfig(format="%(message)s")
        logger.setLevel(logging.INFO)
    if context.is_offline_mode():
        _render(settings)
        return
    url = settings.migration_url.get_secret_value() if settings.migration_url else get_url(settings)
    with create_migration_engine(url, settings).connect() as connection:
        _migrate(connection, settings)


_run()
