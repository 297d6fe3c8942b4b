"""Sessions of the OpenAI Agents SDK: ours beside its own SQLAlchemySession, both from asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any
from uuid import uuid4

from benchmarks.harness import Contender
from benchmarks.site import THREADS, Site, messages

__all__ = ["THEIRS", "add_many", "add_one", "last"]

THEIRS = "SQLAlchemySession"

_HISTORY = 1_000
_SESSIONS = 64
_LAST = 50

Call = Callable[[int], Awaitable[object]]
"""What a task does once, given its number."""


@contextmanager
def add_one(site: Site) -> Iterator[list[Contender]]:
    (item,) = _items(2)[1:]

    def adding(sessions: list[Any]) -> Call:
        # Each task has sessions of its own, so that none waits for another one's row.
        turns = [cycle(sessions[task::THREADS]) for task in range(THREADS)]
        return lambda task: next(turns[task]).add_items([item])

    with _measuring(site, adding, _SESSIONS) as contenders:
        yield contenders


@contextmanager
def last(site: Site) -> Iterator[list[Contender]]:
    def reading(sessions: list[Any]) -> Call:
        return lambda task: sessions[task].get_items(_LAST)

    with _measuring(site, reading, THREADS, _items(_HISTORY)) as contenders:
        yield contenders


@contextmanager
def add_many(site: Site) -> Iterator[list[Contender]]:
    many = _items(10_000)

    def adding(sessions: list[Any]) -> Call:
        return lambda task: sessions[task].add_items(many)

    with _measuring(site, adding, THREADS) as contenders:
        yield contenders


@contextmanager
def _measuring(
    site: Site,
    make: Callable[[list[Any]], Call],
    sessions: int,
    filled: list[dict[str, Any]] | None = None,
) -> Iterator[list[Contender]]:
    """Yield ours and theirs, each by one task and by eight, with sessions that exist."""
    from agents.extensions.memory import SQLAlchemySession
    from sqlalchemy import make_url
    from sqlalchemy.ext.asyncio import create_async_engine

    from database.integrations.openai_agents import DatabaseSession

    url = make_url(site.url).set(drivername="postgresql+psycopg")
    engine = create_async_engine(url, pool_size=THREADS, max_overflow=0)
    ours = [DatabaseSession(str(uuid4())) for _ in range(sessions)]
    theirs = [
        SQLAlchemySession(str(uuid4()), engine=engine, create_tables=True) for _ in range(sessions)
    ]

    async def fill() -> None:
        for session in (*ours, *theirs):
            await session.add_items(filled or _items(2))
            await session.get_items(1)

    with asyncio.Runner() as runner:
        runner.run(fill())
        yield [
            Contender(f"{name}{suffix}", _runs(runner, make(group), tasks))
            for name, group in (("ours", ours), (THEIRS, theirs))
            for suffix, tasks in (("", 1), (", 8 tasks", THREADS))
        ]
        runner.run(engine.dispose())


def _runs(runner: asyncio.Runner, call: Call, tasks: int) -> Callable[[int], float]:
    async def one(task: int, times: int) -> None:
        for _ in range(times):
            await call(task)

    async def together(times: int) -> float:
        started = time.perf_counter()
        await asyncio.gather(*(one(task, times) for task in range(tasks)))
        return time.perf_counter() - started

    def run(times: int) -> float:
        each = -(-times // tasks)
        return runner.run(together(each)) * times / (each * tasks)

    return run


def _items(count: int) -> list[dict[str, Any]]:
    """Return what a run stores: the users' input as it was given, answers as the API gives them."""
    return [
        {
            "id": f"msg_{number:048x}",
            "content": [
                {
                    "annotations": [],
                    "text": one["content"],
                    "type": "output_text",
                    "logprobs": [],
                }
            ],
            "role": "assistant",
            "status": "completed",
            "type": "message",
        }
        if one["role"] == "assistant"
        else one
        for number, one in enumerate(messages(count))
    ]
