"""Calls of two sessions at once, each begun when the one before it is known to wait or to hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg

from database import SessionLocal, TenantSession

if TYPE_CHECKING:
    from database.session import Tenant

T = TypeVar("T")

_WAITING = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"""


def until_waiting(login: psycopg.Connection, *calls: Future[Any]) -> None:
    """Wait until each of the calls waits for a lock that another session holds, or is done."""
    deadline = time.monotonic() + 30
    while True:
        found = login.execute(_WAITING).fetchone()
        assert found is not None
        if found[0] >= sum(not call.done() for call in calls):
            return
        assert time.monotonic() < deadline


def in_background(
    pool: ThreadPoolExecutor, tenant: Tenant, call: Callable[[TenantSession], T]
) -> Future[T]:
    """What the call returns, in a thread and a session of its own."""

    def run() -> T:
        with SessionLocal(tenant_id=tenant) as db:
            return call(db)

    return pool.submit(run)
