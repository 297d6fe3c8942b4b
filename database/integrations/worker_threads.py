"""Calls of the library from asyncio: each in a worker thread, with a session of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, ClassVar, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import QueuePool

from database.config import SessionLocal, has_engine
from database.session import TenantSession

if TYPE_CHECKING:
    from database.session import Tenant

__all__ = ["Sessions", "in_worker_thread"]

T = TypeVar("T")

Sessions = Callable[..., TenantSession]
"""What makes sessions, as `SessionLocal` does: a sessionmaker of `TenantSession`."""

_WITHOUT_POOL = 8


class _Process:
    """This process's threads: by engine, not by event loop, as all loops share an engine's pool."""

    executors: ClassVar[WeakKeyDictionary[Engine | Connection, ThreadPoolExecutor]] = (
        WeakKeyDictionary()
    )
    lock = threading.Lock()


async def in_worker_thread(
    work: Callable[[TenantSession], T],
    *,
    tenant_id: Tenant | None = None,
    sessions: Sessions = SessionLocal,
) -> T:
    """Return what `work` returns, given a new session in a worker thread.

    An engine has as many threads as its pool keeps connections; more calls wait, holding nothing.
    A cancelled call that has begun waits for its outcome before it raises: nothing of it happens
    later. One that has not begun never does.

    Args:
        work: Must not keep the session.
        tenant_id: As for `SessionLocal`.
        sessions: Where the session comes from.
    """
    if sessions is SessionLocal and not has_engine():
        # It may have to start a server.
        await asyncio.to_thread(SessionLocal)
    db = sessions(tenant_id=tenant_id)

    def run() -> T:
        with db:
            return work(db)

    begun = _executor(db.get_bind()).submit(copy_context().run, run)
    try:
        return await asyncio.wrap_future(begun)
    except asyncio.CancelledError:
        await _settled(begun)
        raise


async def _settled(begun: Future[T]) -> None:
    """Wait for a call's end, however often this is cancelled meanwhile."""
    while not begun.done():
        try:
            await asyncio.wait([_unbound(begun)])
        except asyncio.CancelledError:
            continue


def _unbound(begun: Future[T]) -> asyncio.Future[None]:
    """Return a future that is done when the call is, and whose end says nothing of it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    begun.add_done_callback(lambda _: loop.call_soon_threadsafe(_finish, done))
    return done


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _executor(bind: Engine | Connection) -> ThreadPoolExecutor:
    found = _Process.executors.get(bind)
    if found is None:
        with _Process.lock:
            made = ThreadPoolExecutor(_size(bind), "database")
            found = _Process.executors.setdefault(bind, made)
    return found


def _size(bind: Engine | Connection) -> int:
    if isinstance(bind, Connection):
        return 1
    return bind.pool.size() if isinstance(bind.pool, QueuePool) else _WITHOUT_POOL


def _after_fork() -> None:
    # A child has the parent's executors, but none of their threads.
    _Process.lock = threading.Lock()
    _Process.executors.clear()


os.register_at_fork(after_in_child=_after_fork)
