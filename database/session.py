"""Sessions of one tenant.

A session enters its tenant in two ways: every transaction begins with SET LOCAL (row-level security
sees it), and every ORM statement gets `tenant_id = :tenant` as a criterion.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import Connection, Engine, Insert, event, inspect
from sqlalchemy.orm import (
    ORMExecuteState,
    Session,
    SessionTransaction,
    with_loader_criteria,
)

from database.driver import driver_of
from database.errors import ConfigurationError, InvalidValueError
from database.models.base import TENANT_PATTERN, TenantModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.sql.base import ExecutableOption

__all__ = [
    "ALL_TENANTS",
    "Tenant",
    "TenantSession",
    "bind_tenant",
    "binding_of",
    "enter_tenant",
    "moving_to_tenant",
    "return_to_tenant",
    "tenant_of",
]


class AllTenants(Enum):
    """The type of `ALL_TENANTS`."""

    ALL_TENANTS = "all tenants"


ALL_TENANTS: Final = AllTenants.ALL_TENANTS
"""In place of a tenant: work across tenants, in the login role, as far as that role may."""

Tenant = str | Literal[AllTenants.ALL_TENANTS]

_TENANT = "database.tenant"


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
        default = bind.get_execution_options().get("tenant_id")
        if default is None:
            msg = "bind: must be an engine of create_database_engine(), or a connection of one"
            raise ConfigurationError(msg)
        bind_tenant(self, default if tenant_id is None else tenant_id)


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
    _refuse_within_transaction(db)
    db.expunge_all()
    db.info[_TENANT] = tenant_id


@contextmanager
def moving_to_tenant(db: Session, tenant_id: str) -> Iterator[None]:
    """Bind a session to a tenant, unless the block fails: then all stays as it was.

    Raises:
        ConfigurationError: The session is in a transaction of another tenant.
    """
    before = db.info.get(_TENANT)
    if before == tenant_id:
        yield
        return
    _refuse_within_transaction(db)
    left_behind = [row for row in db if inspect(row).identity[0] != tenant_id]
    db.info[_TENANT] = tenant_id
    try:
        yield
    except BaseException:
        db.info[_TENANT] = before
        raise
    for row in left_behind:
        db.expunge(row)


def _refuse_within_transaction(db: Session) -> None:
    if db.in_transaction():
        msg = "a session cannot change its tenant within a transaction"
        raise ConfigurationError(msg)


def binding_of(db: Session) -> Tenant:
    """Return the session's tenant, or `ALL_TENANTS`."""
    bound: Tenant = db.info[_TENANT]
    return bound


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
    autocommit = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
    if autocommit and session.info[_TENANT] is not ALL_TENANTS:
        msg = "a session of a tenant cannot work in autocommit: only a transaction has a tenant"
        raise ConfigurationError(msg)
    enter_tenant(session, connection)


def enter_tenant(session: Session, connection: Connection) -> None:
    """Let what follows in a connection's transaction work in the session's tenant."""
    tenant = session.info[_TENANT]
    driver_of(connection).enter(
        None if tenant is ALL_TENANTS else tenant, connection.get_execution_options()["app_role"]
    )


def return_to_tenant(session: Session) -> None:
    """Enter the session's tenant again when another session on its connection has left it."""
    bind = session.bind
    if isinstance(bind, Connection) and bind.in_transaction() and session.in_transaction():
        tenant = session.info.get(_TENANT)
        if driver_of(bind).tenant_id != (None if tenant is ALL_TENANTS else tenant):
            enter_tenant(session, bind)


@lru_cache(maxsize=1024)
def _criterion(tenant_id: str) -> ExecutableOption:
    return with_loader_criteria(
        TenantModel,
        lambda model: model.tenant_id == tenant_id,
        include_aliases=True,
    )


@event.listens_for(TenantSession, "do_orm_execute")
def _add_criterion(state: ORMExecuteState) -> None:
    return_to_tenant(state.session)
    tenant = state.session.info[_TENANT]
    # Statements of the repositories that name the tenant themselves say so: adding it costs 60 us.
    if (
        tenant is ALL_TENANTS
        or state.execution_options.get("names_tenant")
        or state.is_column_load
        or not (state.is_select or state.is_update or state.is_delete or _is_copy(state.statement))
    ):
        return
    state.statement = state.statement.options(_criterion(tenant))


def _is_copy(statement: object) -> bool:
    return isinstance(statement, Insert) and statement.select is not None


@event.listens_for(TenantSession, "before_flush")
def _stamp(session: Session, _context: object, _rows: object) -> None:
    """Give new rows the session's tenant, and refuse to write those of another one."""
    return_to_tenant(session)
    tenant = session.info[_TENANT]
    if tenant is ALL_TENANTS:
        return
    new = list(session.new)
    for row in new:
        if isinstance(row, TenantModel) and row.__dict__.get("tenant_id") is None:
            row.tenant_id = tenant
    for row in (*new, *session.dirty, *session.deleted):
        if isinstance(row, TenantModel) and row.tenant_id != tenant:
            raise InvalidValueError("tenant_id", "must be the session's tenant")
