"""Sessions of one tenant, and units of work on them.

A session enters its tenant in two ways: every transaction begins with SET LOCAL (row-level security
sees it), and every ORM statement gets `tenant_id = :tenant` as a criterion.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from random import uniform
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import (
    ORMExecuteState,
    Session,
    SessionTransaction,
    SessionTransactionOrigin,
    with_loader_criteria,
)

from database.errors import ConfigurationError, InvalidValueError, TransientError
from database.models.base import TENANT_PATTERN, TenantModel
from database.translate import translate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.sql.base import ExecutableOption

    from database.driver import Connection as Driver

__all__ = [
    "ALL_TENANTS",
    "Tenant",
    "TenantSession",
    "bind_tenant",
    "one_read",
    "one_write",
    "run_in_transaction",
    "tenant_of",
    "transaction",
    "translated",
]

T = TypeVar("T")


class AllTenants(Enum):
    """The type of `ALL_TENANTS`."""

    ALL_TENANTS = "all tenants"


ALL_TENANTS: Final = AllTenants.ALL_TENANTS
"""In place of a tenant: work across tenants, in the login role, as far as that role may."""

Tenant = str | Literal[AllTenants.ALL_TENANTS]

_TENANT = "database.tenant"
_OWNED = "database.transaction"
_SAVEPOINT = b"database_call"


class TenantSession(Session):
    """A session that belongs to one tenant.

    Args:
        tenant_id: The tenant; None is the default of the engine, `ALL_TENANTS` no single one.
        bind: An engine or connection; None is the process's engine.
        options: As for `sqlalchemy.orm.Session`.
    """

    def __init__(
        self,
        bind: Engine | Connection | None = None,
        *,
        tenant_id: Tenant | None = None,
        expire_on_commit: bool = False,
        **options: Any,
    ) -> None:
        if bind is None:
            from database.config import get_engine

            bind = get_engine()
        super().__init__(bind, expire_on_commit=expire_on_commit, **options)
        if tenant_id is None:
            tenant_id = bind.get_execution_options().get("tenant_id")
            if tenant_id is None:
                msg = "bind: must be an engine of create_database_engine(), or a connection of one"
                raise ConfigurationError(msg)
        bind_tenant(self, tenant_id)


def bind_tenant(db: Session, tenant_id: Tenant) -> None:
    """Make a session work in a tenant from its next transaction on.

    Raises:
        InvalidValueError: The tenant's name does not match the pattern.
        ConfigurationError: The session is in a transaction.
    """
    if tenant_id is not ALL_TENANTS and not (
        isinstance(tenant_id, str) and re.fullmatch(TENANT_PATTERN, tenant_id)
    ):
        raise InvalidValueError("tenant_id", f"must match {TENANT_PATTERN}")
    if db.in_transaction():
        msg = "a session cannot change its tenant within a transaction"
        raise ConfigurationError(msg)
    db.expunge_all()
    db.info[_TENANT] = tenant_id


def tenant_of(db: Session) -> str:
    """Return the session's tenant.

    Raises:
        ConfigurationError: It works across tenants, where a call needs one.
    """
    tenant: Tenant | None = db.info.get(_TENANT)
    if not isinstance(tenant, str):
        msg = "this call needs a session of one tenant"
        raise ConfigurationError(msg)
    return tenant


@event.listens_for(TenantSession, "after_begin")
def _enter_tenant(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    if transaction.nested:
        return
    tenant = session.info[_TENANT]
    _driver(connection).enter(
        None if tenant is ALL_TENANTS else tenant, connection.get_execution_options()["app_role"]
    )


@lru_cache(maxsize=1024)
def _criterion(tenant_id: str) -> ExecutableOption:
    return with_loader_criteria(
        TenantModel,
        lambda model: model.tenant_id == tenant_id,
        include_aliases=True,
    )


@event.listens_for(TenantSession, "do_orm_execute")
def _add_criterion(state: ORMExecuteState) -> None:
    tenant = state.session.info[_TENANT]
    # Statements of the repositories that name the tenant themselves say so: adding it costs 60 us.
    if (
        tenant is ALL_TENANTS
        or state.execution_options.get("names_tenant")
        or state.is_column_load
        or not (state.is_select or state.is_update or state.is_delete)
    ):
        return
    state.statement = state.statement.options(_criterion(tenant))


def _driver(connection: Connection) -> Driver:
    return connection.connection.driver_connection  # type: ignore[return-value]


@contextmanager
def translated() -> Iterator[None]:
    """Turn a driver's error into one of ours, where there is one."""
    try:
        yield
    except DBAPIError as error:
        known = translate(error)
        if known is None:
            raise
        raise known from error
    except PoolTimeoutError as error:
        msg = "no connection of the pool became free within pool_timeout"
        raise TransientError(msg) from error


def _is_owned(db: Session) -> bool:
    """Tell whether somebody around this call ends the transaction.

    Being in a transaction says nothing: any read of the caller begins one.
    """
    current = db.get_transaction()
    return (
        _OWNED in db.info
        or db.in_nested_transaction()
        or (current is not None and current.origin is SessionTransactionOrigin.BEGIN)
    )


@contextmanager
def transaction(db: Session) -> Iterator[None]:
    """Make one unit of several calls: all of them happen, or none.

    The outermost unit of a session commits at its end and rolls back on an error; one within
    another is a savepoint, so that its error can be caught and the outer unit go on.

    Raises:
        TransientError: A deadlock, a serialization failure or a lost connection.
    """
    with translated():
        if _is_owned(db):
            with db.begin_nested():
                yield
            return
        db.info[_OWNED] = True
        try:
            yield
            db.commit()
        except BaseException:
            db.rollback()
            raise
        finally:
            del db.info[_OWNED]


@contextmanager
def one_read(db: Session) -> Iterator[Connection]:
    """Run one statement that reads; a session that was idle is idle again afterwards.

    The body must execute exactly one statement and fetch its result.
    """
    with translated():
        if db.in_transaction() or _OWNED in db.info:
            yield db.connection()
        else:
            with _alone(db) as connection:
                yield connection


@contextmanager
def one_write(db: Session) -> Iterator[Connection]:
    """Run one statement that writes: committed, or within a unit guarded by a savepoint.

    Both cost no round trip more than the statement. The body must execute exactly one statement and
    fetch its result.
    """
    with translated():
        if _is_owned(db):
            with _guarded(db) as connection:
                yield connection
        elif db.in_transaction():
            with transaction(db):
                yield db.connection()
        else:
            with _alone(db) as connection:
                yield connection


@contextmanager
def _alone(db: Session) -> Iterator[Connection]:
    try:
        connection = db.connection()
        _driver(connection).finish_with_next()
        yield connection
        db.commit()
    except BaseException:
        db.rollback()
        raise


@contextmanager
def _guarded(db: Session) -> Iterator[Connection]:
    # Pending objects go first: the savepoint is for the one statement that follows.
    db.flush()
    connection = db.connection()
    driver = _driver(connection)
    driver.guard_next(_SAVEPOINT)
    try:
        yield connection
    except BaseException:
        driver.undo(_SAVEPOINT)
        raise


def run_in_transaction(
    fn: Callable[[TenantSession], T], *, attempts: int = 3, tenant_id: Tenant | None = None
) -> T:
    """Run a whole unit, again when it fails by a deadlock or a serialization failure.

    Each attempt gets a new session; `fn` must do nothing that cannot be repeated.

    Args:
        fn: The unit; gets the session, inside `transaction(db)`.
        attempts: How often at most.
        tenant_id: As for `get_db_session`.

    Returns:
        What `fn` returned in the attempt that was committed.

    Raises:
        TransientError: The last attempt failed too.
    """
    if attempts < 1:
        raise InvalidValueError("attempts", "must be at least 1")
    from database.config import SessionLocal

    for attempt in range(1, attempts + 1):
        try:
            with SessionLocal(tenant_id=tenant_id) as db, transaction(db):
                return fn(db)
        except TransientError:
            if attempt == attempts:
                raise
            time.sleep(uniform(0, 0.02 * 2**attempt))  # noqa: S311 - spreads writers, no secret
    raise AssertionError
