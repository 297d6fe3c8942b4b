"""Units of work: who commits, and when.

A repository call outside a unit is one by itself, and leaves the session idle. Only this module and
`get_db_session` commit or roll back.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from random import uniform
from typing import TYPE_CHECKING, TypeVar

import psycopg
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransactionOrigin

from database.driver import driver_of
from database.errors import InvalidValueError, TransientError
from database.session import return_to_tenant
from database.translate import translate
from database.undoing import keep_untouched, putting_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from database.session import Tenant, TenantSession

__all__ = ["is_owned", "one_read", "one_write", "run_in_transaction", "transaction", "translated"]

T = TypeVar("T")

_OWNED = "database.transaction"
_SAVEPOINT = b"database_call"


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


def is_owned(db: Session) -> bool:
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
    another is a savepoint, so that its error can be caught and the outer unit go on. What the
    session had begun to do before the unit is committed with it, and survives its error. After an
    error the rows read before the unit are as they were, without a connection; those that it has
    written, or read first, and all after a failed flush, may be read again when looked at.

    Raises:
        TransientError: A deadlock, a serialization failure or a lost connection.
    """
    with translated():
        if is_owned(db):
            db.connection()  # as in one_read
            with putting_back(db), db.begin_nested():
                yield
            return
        db.info[_OWNED] = True
        try:
            with _behind_others(db) if db.in_transaction() else _first(db):
                yield
        finally:
            del db.info[_OWNED]


@contextmanager
def _first(db: Session) -> Iterator[None]:
    """Make the unit a transaction of its own."""
    with putting_back(db):
        try:
            yield
            db.commit()
        except BaseException:
            keep_untouched(db)
            db.rollback()
            raise


@contextmanager
def _behind_others(db: Session) -> Iterator[None]:
    """Make the unit the end of a transaction that the session has begun already."""
    db.connection()  # as in one_read
    try:
        with putting_back(db), db.begin_nested():
            yield
        db.commit()
    except BaseException:
        if not _is_usable(db):
            db.rollback()
        raise


@contextmanager
def one_read(db: Session) -> Iterator[Connection]:
    """Run one statement that reads; a session that was idle is idle again afterwards.

    The body must execute exactly one statement and fetch its result.
    """
    with translated():
        if db.in_transaction() or _OWNED in db.info:
            # Before the flush, which forgets what is pending when there is no connection for it.
            connection = db.connection()
            # What the caller has added or changed counts; an idle session has nothing such.
            db.flush()
            return_to_tenant(db)
            yield connection
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
        if is_owned(db):
            with _guarded(db) as connection:
                yield connection
        elif db.in_transaction():
            try:
                with _guarded(db) as connection:
                    yield connection
                db.commit()
            except BaseException:
                if not _is_usable(db):
                    db.rollback()
                raise
        else:
            with _alone(db) as connection:
                yield connection


@contextmanager
def _alone(db: Session) -> Iterator[Connection]:
    try:
        if isinstance(db.get_bind(), Engine):
            connection = db.connection()
            driver_of(connection).finish_with_next()
            yield connection
        else:
            # It has joined a connection's transaction, which is not this call's to end or to break.
            with _guarded(db) as connection:
                yield connection
        db.commit()
    except BaseException:
        if (current := db.get_transaction()) is not None:
            # Not db.rollback(): it expires all rows that the session holds, and the next look at
            # one would begin a transaction.
            current.close()
        raise


@contextmanager
def _guarded(db: Session) -> Iterator[Connection]:
    # As in one_read.
    connection = db.connection()
    # Pending objects go first: the savepoint is for the one statement that follows.
    db.flush()
    return_to_tenant(db)
    driver = driver_of(connection)
    driver.guard_next(_SAVEPOINT)
    try:
        yield connection
    except BaseException:
        driver.undo(_SAVEPOINT)
        raise


def _is_usable(db: Session) -> bool:
    """Tell whether the session can go on in its transaction after an error was undone."""
    return db.is_active and not (db.in_transaction() and db.connection().invalidated)


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
        except TransientError as error:
            if attempt == attempts or not _is_collision(error):
                raise
            time.sleep(uniform(0, 0.02 * 2**attempt))  # noqa: S311 - spreads writers, no secret
    raise AssertionError


def _is_collision(error: TransientError) -> bool:
    """Tell whether the server undid the work for a concurrent one's sake: so nothing happened.

    After a lost connection the work may be committed all the same.
    """
    cause = error.__cause__
    return isinstance(cause, DBAPIError) and isinstance(
        cause.orig, psycopg.errors.SerializationFailure | psycopg.errors.DeadlockDetected
    )
