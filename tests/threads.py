"""Calls of many threads at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

from database import SessionLocal, TenantSession

T = TypeVar("T")

THREADS = 16


def in_threads(
    tenant: str, call: Callable[[TenantSession, int], T], count: int = THREADS
) -> list[T]:
    """What the call returns in threads that start together, each with a session of its own."""
    together = Barrier(count)

    def run(number: int) -> T:
        with SessionLocal(tenant_id=tenant) as db:
            together.wait(30)
            return call(db, number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
