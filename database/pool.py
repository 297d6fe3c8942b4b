"""Building an engine: connections with retries, a pool that notices dead ones, tenants at BEGIN."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
import psycopg
from psycopg.types.string import StrDumperUnknown
from sqlalchemy import Engine, NullPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, InvalidatePoolError

from database.driver import Connection, Cursor, ServerCursor, driver_of
from database.errors import ConfigurationError, TransientError
from database.types import clean_text, dump_json

if TYPE_CHECKING:
    import sqlalchemy
    from pydantic import SecretStr
    from sqlalchemy import URL
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry

    from database.settings import Settings

__all__ = ["create_database_engine", "create_migration_engine", "parse_url"]

logger = logging.getLogger(__name__)

_PASSING_REFUSALS = ("starting up", "shutting down", "recovery", "too many", "remaining connection")


def parse_url(text: str) -> URL:
    """Return the URL of a PostgreSQL database, with the driver this library uses.

    Raises:
        ConfigurationError: It is no such URL. The text is not shown: it can hold a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        msg = "DATABASE_URL: must look like postgresql://user:password@host:5432/name"
        raise ConfigurationError(msg) from None
    if "@" in (url.host or ""):
        # What stands before it is the end of a password.
        msg = "DATABASE_URL: an @ in the user or password must be written as %40"
        raise ConfigurationError(msg)
    if url.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        msg = "DATABASE_URL: must begin with postgresql:// (the driver is always psycopg)"
        raise ConfigurationError(msg)
    return url.set(drivername="postgresql+psycopg")


def create_database_engine(url: str, settings: Settings) -> Engine:
    """Return an engine whose transactions begin in the settings' tenant and role.

    Its connections are made when first needed. Sessions put their own tenant in the place of the
    default one.
    """
    where = parse_url(url)
    engine = create_engine(
        where,
        # The driver must not send BEGIN itself: ours rides with the first statement.
        isolation_level="AUTOCOMMIT",
        pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
        pool_timeout=settings.pool_timeout,
        pool_recycle=settings.pool_recycle,
        echo=settings.echo,
        hide_parameters=True,
        json_serializer=partial(dump_json, policy=settings.unstorable),
        json_deserializer=orjson.loads,
        execution_options={
            "tenant_id": settings.tenant_id,
            "app_role": settings.app_role,
            "unstorable": settings.unstorable,
            "embedding_dimensions": settings.embedding_dimensions,
            "development_api_key": _development_api_key(settings),
        },
        connect_args=_connect_args(settings, where),
    )
    event.listen(engine, "do_connect", partial(_do_connect, settings))
    event.listen(engine, "begin", _begin)
    event.listen(engine, "commit", _end)
    event.listen(engine, "rollback", _end)
    event.listen(engine, "checkin", _checkin)
    event.listen(engine, "handle_error", _hide_values)
    if settings.pool_pre_ping:
        event.listen(engine, "checkout", _checkout)
    return engine


def _development_api_key(settings: Settings) -> SecretStr | None:
    # The settings refuse one in production already; a copy of them with changes is not checked.
    return None if settings.environment == "production" else settings.development_api_key


def create_migration_engine(url: str, settings: Settings) -> Engine:
    """Return an engine that stays in the login role, waits without timeouts, and keeps nothing."""
    where = parse_url(url)
    arguments = _connect_args(settings, where) | {
        "autocommit": False,
        "application_name": f"{settings.application_name} migrations",
    }
    arguments.pop("options", None)
    engine = create_engine(where, poolclass=NullPool, hide_parameters=True, connect_args=arguments)
    event.listen(engine, "do_connect", partial(_do_connect, settings))
    return engine


def _connect_args(settings: Settings, url: URL) -> dict[str, Any]:
    timeouts = {
        "statement_timeout": settings.statement_timeout,
        "idle_in_transaction_session_timeout": settings.idle_in_transaction_timeout,
    }
    limits = (f"-c {name}={round(seconds * 1000)}" for name, seconds in timeouts.items() if seconds)
    # What is given here takes the place of the URL's own options, such as its search_path.
    options = " ".join([*url.normalized_query.get("options", ()), *limits])
    arguments = {
        "autocommit": True,
        "application_name": settings.application_name,
        "connect_timeout": settings.connect_timeout,
        "prepare_threshold": settings.prepare_threshold,
        # A network that drops idle connections is noticed within about a minute.
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        # Also when something was on its way, which puts keepalives off: else after 15 minutes.
        "tcp_user_timeout": 60_000,
        "sslmode": settings.sslmode,
        "options": options,
    }
    return {key: value for key, value in arguments.items() if value or key == "prepare_threshold"}


def _do_connect(
    settings: Settings,
    dialect: object,  # noqa: ARG001
    record: ConnectionPoolEntry,  # noqa: ARG001
    args: tuple[Any, ...],
    arguments: dict[str, Any],
) -> Connection:
    connection = _connect(settings, *args, **arguments)
    connection.cursor_factory = Cursor
    connection.server_cursor_factory = ServerCursor

    class CleanText(StrDumperUnknown):
        def dump(self, obj: str) -> Any:
            return super().dump(clean_text(obj, policy=settings.unstorable))

    connection.adapters.register_dumper(str, CleanText)
    return connection


def _connect(settings: Settings, *args: Any, **arguments: Any) -> Connection:
    # tenacity takes 40 ms to import; most programs connect at once, after this.
    from tenacity import (
        Retrying,
        before_sleep_log,
        retry_if_exception,
        stop_after_attempt,
        wait_exponential,
        wait_random,
    )

    retrying = Retrying(
        retry=retry_if_exception(_is_worth_another_try),
        stop=stop_after_attempt(settings.connect_retries + 1),
        wait=wait_exponential(multiplier=0.1, max=4) + wait_random(0, 1),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
    try:
        return retrying(Connection.connect, *args, **arguments)
    except psycopg.OperationalError as error:
        raise _connection_error(error, arguments) from None


def _is_worth_another_try(error: BaseException) -> bool:
    return isinstance(error, psycopg.OperationalError) and not _is_refusal(error)


def _is_refusal(error: psycopg.OperationalError) -> bool:
    """Tell whether the server answered, and said no: to the password, the user, the database.

    libpq gives no SQLSTATE for a connection that never was, so its text has to tell.
    """
    text = str(error)
    return ("FATAL" in text and not any(word in text for word in _PASSING_REFUSALS)) or (
        error.pgconn is not None and bool(error.pgconn.needs_password)
    )


def _connection_error(
    error: psycopg.OperationalError, arguments: dict[str, Any]
) -> ConfigurationError | TransientError:
    host = arguments.get("host") or "the local socket"
    port = arguments.get("port") or 5432
    if _is_refusal(error):
        return ConfigurationError(
            f"DATABASE_URL: the server at {host}:{port} refuses user {arguments.get('user')!r},"
            f" its password or database {arguments.get('dbname')!r}"
        )
    return TransientError(f"DATABASE_URL: no server can be reached at {host}:{port}")


def _begin(connection: sqlalchemy.Connection) -> None:
    options = connection.get_execution_options()
    if options.get("isolation_level") == "AUTOCOMMIT":
        return
    driver_of(connection).begin(options["tenant_id"], options["app_role"])


def _end(connection: sqlalchemy.Connection) -> None:
    if not connection.invalidated:
        driver_of(connection).end()


def _hide_values(context: ExceptionContext) -> None:
    """Leave out of an error's text what shows rows: DETAIL, and the values that data errors quote.

    hide_parameters keeps the parameters out; these come from the server.
    """
    error = context.original_exception
    if not isinstance(error, psycopg.Error) or error.sqlstate is None:
        return
    said = error.diag
    # Without a position it is no complaint about the statement, but about a tsquery or a jsonpath.
    quotes = error.sqlstate.startswith("22") or (
        error.sqlstate == "42601" and said.statement_position is None
    )
    parts = (None if quotes else said.message_primary, said.message_hint)
    text = "; ".join(filter(None, parts)) or "the message is hidden: it can quote values"
    error.args = (text,)
    if context.sqlalchemy_exception is not None:
        context.sqlalchemy_exception.args = (f"(psycopg.errors.{type(error).__name__}) {text}",)


def _checkin(driver: Connection | None, record: ConnectionPoolEntry) -> None:  # noqa: ARG001
    if driver is not None:
        driver.end()
        driver.mark_released()


def _checkout(driver: Connection, *_: object) -> None:
    if not driver.is_alive():
        # Invalidates all older connections: what killed one, a restart say, killed the others.
        raise InvalidatePoolError
