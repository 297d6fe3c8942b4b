"""Calls of the library from asyncio: each in a worker thread, with a session of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary, finalize

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import QueuePool

from database.config import SessionLocal, get_engine, has_engine
from database.session import TenantSession

if TYPE_CHECKING:
    from database.session import Tenant

__all__ = ["Sessions", "in_worker_thread"]

T = TypeVar("T")

Sessions = Callable[..., TenantSession]
"""What makes sessions, as `SessionLocal` does: a sessionmaker of `TenantSession`."""

_WITHOUT_POOL = 8


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
    if sessions is not SessionLocal:
        bind = sessions().get_bind()
    elif has_engine():
        bind = get_engine()
    else:
        # It may have to start a server.
        bind = await asyncio.to_thread(get_engine)

    def run() -> T:
        with sessions(tenant_id=tenant_id) as db:
            return work(db)

    call = _Call(run)
    _threads_of(bind).take(call)
    return await call.outcome()


class _Call(Generic[T]):
    """A call of the running loop that a thread will make."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._context = copy_context()
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] = self._loop.create_future()
        self._claimed = Lock()
        self._ended = False
        self._result: T
        self._error: BaseException | None = None

    def make(self) -> None:
        """Make the call, unless it was cancelled."""
        if not self._claimed.acquire(blocking=False):
            return
        try:
            self._result = self._context.run(self._work)
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self._error = error
        # A loop that is closed has nobody who waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end)

    async def outcome(self) -> T:
        """Return or raise what the call does; if cancelled, when it has ended or will not begin."""
        try:
            await self._waiting
        except asyncio.CancelledError:
            if not self._claimed.acquire(blocking=False):
                await self._settled()
            raise
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its traceback leads here: a circle
        return self._result

    async def _settled(self) -> None:
        while not self._ended:
            self._waiting = self._loop.create_future()
            with suppress(asyncio.CancelledError):
                await self._waiting

    def _end(self) -> None:
        self._ended = True
        if not self._waiting.done():
            self._waiting.set_result(None)


class _Threads:
    """Threads for the calls of an engine; they end when it is gone.

    A ThreadPoolExecutor takes twice as long to hand a call over.
    """

    def __init__(self, size: int) -> None:
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._missing = [None] * size
        finalize(self, self._calls.put, None)

    def take(self, call: _Call[Any]) -> None:
        """Let a thread make a call as soon as one is free."""
        if self._missing:
            with suppress(IndexError):  # another loop's thread was faster
                self._missing.pop()
                Thread(target=_work, args=[self._calls], name="database", daemon=True).start()
        self._calls.put(call)


def _work(calls: SimpleQueue[_Call[Any] | None]) -> None:
    while (call := calls.get()) is not None:
        call.make()
        del call  # it may hold much, and the next one may be long in coming
    calls.put(None)


class _Process:
    """This process's threads: by engine, not by event loop, as all loops share an engine's pool."""

    threads: ClassVar[WeakKeyDictionary[Engine | Connection, _Threads]] = WeakKeyDictionary()
    lock = Lock()


def _threads_of(bind: Engine | Connection) -> _Threads:
    found = _Process.threads.get(bind)
    if found is None:
        with _Process.lock:
            found = _Process.threads.setdefault(bind, _Threads(_size(bind)))
    return found


def _size(bind: Engine | Connection) -> int:
    if isinstance(bind, Connection):
        return 1
    return bind.pool.size() if isinstance(bind.pool, QueuePool) else _WITHOUT_POOL


def _after_fork() -> None:
    # A child has the parent's queues, but none of its threads.
    _Process.lock = Lock()
    _Process.threads.clear()


os.register_at_fork(after_in_child=_after_fork)
