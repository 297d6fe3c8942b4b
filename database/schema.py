"""The schema's migrations, from a checkout or from the installed package alike."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psycopg
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from database.errors import (
    ConfigurationError,
    InvalidValueError,
    SchemaOutdatedError,
    TransientError,
)
from database.translate import translate
from database.units import translated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from sqlalchemy import Connection

    from database.settings import Settings

__all__ = [
    "ADVISORY_LOCK",
    "Revision",
    "alembic_config",
    "check_schema",
    "current_revision",
    "downgrade",
    "head_revision",
    "init_db",
    "installed_revision",
    "render_sql",
    "revisions",
    "upgrade",
]

ADVISORY_LOCK = 6_215_300_418
"""Who migrates a database holds this lock in it: any fixed number, the same for all."""

# Alembic keeps what it works on in a module, so in one process only one thread can migrate.
_one_thread = threading.Lock()


class Revision(NamedTuple):
    """A step of the schema's history."""

    revision: str
    follows: str | None
    description: str


def _script_location() -> Path:
    package = Path(__file__).parent
    shipped = package / "migrations"
    return shipped if shipped.is_dir() else package.parent / "alembic"


def alembic_config(settings: Settings | None = None, output: TextIO | None = None) -> Config:
    """Return a configuration for `alembic.command`.

    Args:
        settings: Which database; None is the process's configuration.
        output: Where SQL goes in offline mode; None is standard output.
    """
    config = Config(output_buffer=output)
    config.set_main_option("script_location", str(_script_location()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["settings"] = settings
    return config


def head_revision() -> str:
    """Return the revision that this version of the library needs."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert head is not None
    return head


def revisions() -> list[Revision]:
    """Return the schema's history, the newest revision first."""
    scripts = ScriptDirectory.from_config(alembic_config()).walk_revisions()
    return [Revision(s.revision, _parent(s.down_revision), s.doc) for s in scripts]


def _parent(down_revision: object) -> str | None:
    assert down_revision is None or isinstance(down_revision, str)
    return down_revision


def current_revision(connection: Connection) -> str | None:
    """Return the database's revision, or None before the first migration."""
    return MigrationContext.configure(connection).get_current_revision()


@contextmanager
def _migrating() -> Iterator[None]:
    """Turn the server's refusals into our errors, with the advice that a migration gives."""
    try:
        with _one_thread:
            yield
    except CommandError as error:
        raise ConfigurationError(str(error)) from error
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            said = error.orig.diag
            advice = said.message_hint or (
                "migrations need a login that owns the tables and may CREATE in their schema"
                " (DATABASE_MIGRATION_URL)"
            )
            raise ConfigurationError(f"{said.message_primary}. {advice}") from error
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            msg = (
                "another session keeps a lock on a table: the revision is rolled back; run it"
                " again when that session has ended, or raise DATABASE_LOCK_TIMEOUT"
            )
            raise TransientError(msg) from error
        known = translate(error)
        if isinstance(known, TransientError):
            raise known from error
        raise


def upgrade(revision: str = "head", *, settings: Settings | None = None) -> None:
    """Migrate up to a revision. Waits while another process migrates; each revision commits.

    Raises:
        ConfigurationError: There is no such revision, or the server's extensions or the login
            cannot do it; the text says what is lacking.
        TransientError: No server can be reached, or it holds a lock for too long.
    """
    with _migrating():
        command.upgrade(alembic_config(settings), revision)


def downgrade(revision: str, *, settings: Settings | None = None) -> None:
    """Migrate down to a revision; "base" removes every table and its data. Raises as `upgrade`."""
    with _migrating():
        command.downgrade(alembic_config(settings), revision)


def init_db() -> None:
    """Bring the configured database to the newest schema: the migrations, for development.

    Safe to call at every start, also by several processes at once. Raises as `upgrade` does.
    """
    upgrade()


def render_sql(revision: str, output: TextIO, *, settings: Settings | None = None) -> None:
    """Write the SQL of an upgrade from nothing, or of a span "from:to", without a database.

    Where "to" is older than "from", or a step such as -1, it is the SQL of a downgrade.

    Raises:
        ConfigurationError: There is no such revision.
        InvalidValueError: The span has no end, or ends where it begins.
    """
    config = alembic_config(settings, output)
    start, _, end = revision.rpartition(":")
    with _migrating():
        places = {"base": 0, **{r.revision: n for n, r in enumerate(revisions()[::-1], 1)}}
        start = _revision_named(start or "base")
        if end.startswith(("+", "-")):
            down = end.startswith("-")
        else:
            end = _revision_named(end)
            down = places[end] < places[start]
        if start == end:
            raise InvalidValueError("revision", "must go from one revision to another")
        migrate = command.downgrade if down else command.upgrade
        migrate(config, f"{start}:{end}", sql=True)


def _revision_named(name: str) -> str:
    if not name:
        raise InvalidValueError("revision", "must be REVISION or FROM:TO")
    found = ScriptDirectory.from_config(alembic_config()).get_revisions(name)
    return found[0].revision if found else "base"


def installed_revision() -> str | None:
    """Return the revision of the configured database, or None before the first migration.

    It looks as migrations do, with the owner's login where there is one.

    Raises:
        TransientError: No server can be reached.
    """
    from database.config import get_settings, get_url
    from database.pool import create_migration_engine

    settings = get_settings()
    url = settings.migration_url.get_secret_value() if settings.migration_url else get_url(settings)
    with translated(), create_migration_engine(url, settings).connect() as connection:
        return _revision_in(connection)


def check_schema() -> None:
    """Make sure that the configured database is at the revision this version needs.

    Raises:
        SchemaOutdatedError: It is not; the text says what to run.
    """
    from database.config import get_engine

    engine = get_engine().execution_options(isolation_level="AUTOCOMMIT")
    with translated(), engine.connect() as connection:
        found = _revision_in(connection)
    if found != head_revision():
        raise SchemaOutdatedError(found, head_revision())


def _revision_in(connection: Connection) -> str | None:
    exists = connection.scalar(text("SELECT to_regclass('alembic_version') IS NOT NULL"))
    return current_revision(connection) if exists else None
