"""The process's configuration, its engine, and sessions on it.

Nothing is read or opened at import: the first session does that.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from sqlalchemy.orm import sessionmaker

from database.session import TenantSession
from database.units import translated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import Engine

    from database.session import Tenant
    from database.settings import Settings

__all__ = [
    "SessionLocal",
    "close_db",
    "configure",
    "get_db",
    "get_db_session",
    "get_engine",
    "get_settings",
    "get_url",
    "has_engine",
]

logger = logging.getLogger(__name__)


class _Process:
    """What this process has made of its configuration so far."""

    settings: Settings | None = None
    engine: Engine | None = None
    announced: ClassVar[set[Path]] = set()
    lock = threading.RLock()


def configure(**settings: object) -> Settings:
    """Replace the configuration; fields not given come from the environment.

    The present engine is disposed of: sessions made before keep it, new ones get a new one.

    Args:
        settings: Fields of `Settings`, for example ``url="postgresql://localhost/chat"``.

    Raises:
        ConfigurationError: A field is unknown or its value not allowed.
    """
    from database.settings import load_settings

    loaded = load_settings(**settings)
    with _Process.lock:
        close_db()
        _Process.settings = loaded
    return loaded


def get_settings() -> Settings:
    """Return the configuration, reading the environment when there is none yet."""
    with _Process.lock:
        return _Process.settings or configure()


def get_url(settings: Settings) -> str:
    """Return where the database is; without a URL, start or join the embedded server.

    Raises:
        ConfigurationError: No URL, and either production or no embedded server installed.
    """
    if settings.url is not None:
        return settings.url.get_secret_value()
    if settings.environment == "production":
        from database.errors import ConfigurationError

        msg = "DATABASE_URL: must be set in production"
        raise ConfigurationError(msg)
    from database import embedded

    server = embedded.start(settings.data_dir)
    if server.data_dir not in _Process.announced:
        _Process.announced.add(server.data_dir)
        logger.warning("DATABASE_URL is not set: the data is in %s", server.data_dir)
    return server.url()


def get_engine() -> Engine:
    """Return the process's engine, made on the first call; also `database.engine`."""
    engine = _Process.engine
    if engine is not None:
        return engine
    from database.pool import create_database_engine

    with _Process.lock:
        if _Process.engine is None:
            settings = get_settings()
            _Process.engine = create_database_engine(get_url(settings), settings)
        return _Process.engine


def has_engine() -> bool:
    """Tell whether the process has its engine already, so that a session is made at once."""
    return _Process.engine is not None


def close_db() -> None:
    """Close the pool's connections; the next session opens new ones."""
    with _Process.lock:
        if _Process.engine is not None:
            _Process.engine.dispose()
            _Process.engine = None


def _after_fork() -> None:
    # The parent's connections are not the child's to use, nor to close.
    _Process.lock = threading.RLock()
    if _Process.engine is not None:
        _Process.engine.dispose(close=False)


os.register_at_fork(after_in_child=_after_fork)

SessionLocal = sessionmaker(class_=TenantSession, expire_on_commit=False)
"""Makes sessions: `SessionLocal()`, `SessionLocal(tenant_id="acme")`."""


def get_db() -> Iterator[TenantSession]:
    """Yield a session and close it: FastAPI's `Depends(get_db)`.

    Between repository calls the session holds no connection, so a request may wait for a model.
    """
    with SessionLocal() as db:
        yield db


@contextmanager
def get_db_session(*, tenant_id: Tenant | None = None) -> Iterator[TenantSession]:
    """Yield a session; commit at the end, roll back on an error, close in any case.

    Args:
        tenant_id: The tenant; None is `DATABASE_TENANT_ID`, `ALL_TENANTS` works across tenants.
    """
    with SessionLocal(tenant_id=tenant_id) as db:
        try:
            yield db
            with translated():
                db.commit()
        except BaseException:
            db.rollback()
            raise
