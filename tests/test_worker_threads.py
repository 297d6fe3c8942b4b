"""Calls from asyncio: bounded by the pool, and never left half way."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest
from sqlalchemy.orm import sessionmaker

from database import (
    ConversationRepository,
    InvalidValueError,
    NotFoundError,
    SessionLocal,
    TenantSession,
    close_db,
    configure,
    get_engine,
    get_settings,
    transaction,
)
from database.integrations.worker_threads import in_worker_thread
from database.pool import create_database_engine

pytestmark = pytest.mark.anyio

WAIT = 20


class Gate:
    """Work that has begun and waits to be let through."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self, db: TenantSession) -> None:
        with transaction(db):
            ConversationRepository.create(db, "first")
            self.begun.release()
            assert self.opened.wait(WAIT)
            ConversationRepository.create(db, "second")

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=WAIT)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def checked_out() -> int:
    return get_engine().pool.checkedout()  # type: ignore[attr-defined, no-any-return]


def threads_of(tenant: str) -> list[str]:
    with SessionLocal(tenant_id=tenant) as db:
        return sorted(found.thread_id for found in ConversationRepository.list(db))


async def test_gives_a_session_of_the_tenant_in_another_thread(tenant: str) -> None:
    def work(db: TenantSession) -> int:
        ConversationRepository.create(db, "one")
        return threading.get_ident()

    assert await in_worker_thread(work, tenant_id=tenant) != threading.get_ident()
    assert threads_of(tenant) == ["one"]
    assert checked_out() == 0


async def test_errors_reach_the_caller(tenant: str) -> None:
    def fail(db: TenantSession) -> None:
        with transaction(db):
            ConversationRepository.create(db, "one")
            ConversationRepository.update(db, "none", title="x")

    with pytest.raises(NotFoundError):
        await in_worker_thread(fail, tenant_id=tenant)
    with pytest.raises(InvalidValueError, match="tenant_id"):
        await in_worker_thread(fail, tenant_id="no tenant!")
    assert threads_of(tenant) == []
    assert checked_out() == 0


async def test_context_variables_are_the_caller_s() -> None:
    span: ContextVar[str] = ContextVar("span")
    span.set("outer")
    assert await in_worker_thread(lambda _: span.get()) == "outer"


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancelled_call_waits_for_its_outcome(tenant: str, gate: Gate, times: int) -> None:
    call = asyncio.create_task(in_worker_thread(gate, tenant_id=tenant))
    await gate.has_begun()
    for _ in range(times):
        call.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not call.done()
    assert threads_of(tenant) == []
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert threads_of(tenant) == ["first", "second"]
    assert checked_out() == 0


async def test_a_timeout_waits_for_the_outcome_too(tenant: str, gate: Gate) -> None:
    async def expire(limit: asyncio.Timeout) -> None:
        await gate.has_begun()
        limit.reschedule(asyncio.get_running_loop().time())
        await asyncio.sleep(0.1)
        gate.opened.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            opening = asyncio.create_task(expire(limit))
            await in_worker_thread(gate, tenant_id=tenant)
    assert gate.opened.is_set()
    assert threads_of(tenant) == ["first", "second"]
    await opening


async def test_a_cancelled_call_that_failed_is_cancelled(tenant: str, gate: Gate) -> None:
    def fail(db: TenantSession) -> None:
        gate(db)
        raise AssertionError

    call = asyncio.create_task(in_worker_thread(fail, tenant_id=tenant))
    await gate.has_begun()
    call.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert checked_out() == 0


async def test_no_more_threads_than_the_pool_keeps_connections(
    tenant: str, worker_url: str
) -> None:
    configure(url=worker_url, pool_size=2, max_overflow=0, pool_timeout=0.1)
    at_once = threading.Semaphore(2)

    def work(db: TenantSession) -> None:
        assert at_once.acquire(blocking=False)
        ConversationRepository.list(db)
        at_once.release()

    await asyncio.gather(*(in_worker_thread(work, tenant_id=tenant) for _ in range(50)))


async def test_a_call_that_has_not_begun_never_happens(
    tenant: str, gate: Gate, worker_url: str
) -> None:
    configure(url=worker_url, pool_size=1)
    done: list[TenantSession] = []
    first = asyncio.create_task(in_worker_thread(gate, tenant_id=tenant))
    await gate.has_begun()
    second = asyncio.create_task(in_worker_thread(done.append, tenant_id=tenant))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert not first.done()
    gate.opened.set()
    await first
    await in_worker_thread(lambda _: None, tenant_id=tenant)
    assert done == []


def test_loops_share_the_threads_of_a_pool(tenant: str, worker_url: str) -> None:
    configure(url=worker_url, pool_size=1)

    async def which() -> int:
        return await in_worker_thread(lambda _: threading.get_ident(), tenant_id=tenant)

    with ThreadPoolExecutor(4) as threads:
        assert len({*threads.map(lambda _: asyncio.run(which()), range(4))}) == 1


async def test_an_engine_of_one_s_own(tenant: str, fresh_url: str) -> None:
    engine = create_database_engine(fresh_url, get_settings())
    own = sessionmaker(engine, class_=TenantSession)

    def work(db: TenantSession) -> object:
        ConversationRepository.create(db, "there")
        return db.get_bind()

    assert await in_worker_thread(work, tenant_id=tenant, sessions=own) is engine
    assert threads_of(tenant) == []
    with own(tenant_id=tenant) as db:
        assert ConversationRepository.get_by_thread_id(db, "there")
    engine.dispose()


async def test_goes_on_after_the_engine_is_closed(tenant: str) -> None:
    assert await in_worker_thread(lambda db: db.get_bind(), tenant_id=tenant) is get_engine()
    close_db()
    assert await in_worker_thread(lambda db: db.get_bind(), tenant_id=tenant) is get_engine()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_works_in_a_forked_child(tenant: str) -> None:
    async def create(thread: str) -> None:
        await in_worker_thread(
            lambda db: ConversationRepository.create(db, thread), tenant_id=tenant
        )

    asyncio.run(create("parent"))
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(asyncio.wait_for(create("child"), WAIT))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert threads_of(tenant) == ["child", "parent"]


def test_threads_end_with_their_engine(tenant: str, fresh_url: str) -> None:
    engine = create_database_engine(fresh_url, get_settings())
    own = sessionmaker(engine, class_=TenantSession)

    def thread(_: TenantSession) -> threading.Thread:
        return threading.current_thread()

    ended = asyncio.run(in_worker_thread(thread, tenant_id=tenant, sessions=own))
    assert ended.is_alive()
    engine.dispose()
    del engine, own
    deadline = time.monotonic() + WAIT
    while ended.is_alive():  # it may just be letting go of its call
        assert time.monotonic() < deadline
        gc.collect()
        ended.join(0.1)
