"""The pieces of work: each yields its contenders, ours and raw psycopg, ready to run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from uuid import UUID

from benchmarks import raw
from benchmarks.harness import Contender, repeat
from benchmarks.raw import Raw
from benchmarks.site import EMAIL, TENANT, THREADS, Site, messages, plain
from database import ConversationRepository, MessageRepository, UserRepository

__all__ = [
    "append",
    "bulk",
    "get_or_create",
    "importing",
    "last",
    "listing",
    "threads",
    "whole",
]

_ONE = messages(2)[1]
_PAGE = 50
_BASE = "import sqlalchemy.orm, sqlalchemy.dialects.postgresql.psycopg, psycopg"


@contextmanager
def append(site: Site) -> Iterator[list[Contender]]:
    mine, other = site.raw(), cycle(site.theirs)
    own = cycle(site.ours)

    def per_call() -> None:
        with site.session() as fresh:
            MessageRepository.append(fresh, next(own), **_ONE)

    with site.session() as db:
        yield [
            Contender("ours", repeat(lambda: MessageRepository.append(db, next(own), **_ONE))),
            Contender("raw", repeat(lambda: mine.append(next(other), _ONE))),
            Contender("ours, a session each time", repeat(per_call)),
            Contender(
                "raw in one pipeline", repeat(lambda: mine.append_in_pipeline(next(other), _ONE))
            ),
        ]


@contextmanager
def last(site: Site) -> Iterator[list[Contender]]:
    mine = site.raw()
    with site.session() as db:

        def ours(conversation: UUID) -> Callable[[int], None]:
            return repeat(lambda: MessageRepository.history(db, conversation, limit=_PAGE))

        def theirs(conversation: UUID) -> Callable[[int], None]:
            return repeat(lambda: mine.fetch(raw.LAST, (TENANT, conversation, _PAGE)))

        wanted = (TENANT, site.history, _PAGE)
        yield [
            Contender("ours", ours(site.history)),
            Contender("raw", theirs(site.history)),
            Contender("ours, no metadata", ours(site.text)),
            Contender("raw, no metadata", theirs(site.text)),
            Contender(
                "raw in one pipeline", repeat(lambda: mine.fetch_in_pipeline(raw.LAST, wanted))
            ),
        ]


@contextmanager
def whole(site: Site) -> Iterator[list[Contender]]:
    mine = site.raw()
    with site.session() as db:

        def ours(conversation: UUID) -> Callable[[int], None]:
            return repeat(lambda: MessageRepository.history(db, conversation))

        def theirs(conversation: UUID) -> Callable[[int], None]:
            return repeat(lambda: mine.fetch(raw.HISTORY, (TENANT, conversation)))

        yield [
            Contender("ours", ours(site.history)),
            Contender("raw", theirs(site.history)),
            Contender("ours, no metadata", ours(site.text)),
            Contender("raw, no metadata", theirs(site.text)),
        ]


@contextmanager
def bulk(site: Site) -> Iterator[list[Contender]]:
    mine, many = site.raw(), messages(site.scaled(10_000))
    with site.session() as db:
        yield [
            Contender(
                "ours",
                repeat(lambda: MessageRepository.append_many(db, site.ours[0], many)),
            ),
            Contender("raw", repeat(lambda: mine.append_many(site.theirs[0], many))),
        ]


@contextmanager
def listing(site: Site) -> Iterator[list[Contender]]:
    mine = site.raw()
    with site.session() as db:
        cursor, last = None, None
        for _ in range(site.scaled(100) - 1):
            page = ConversationRepository.list_by_user(db, site.user, limit=_PAGE, cursor=cursor)
            cursor, last = page.next_cursor, page.items[-1]
        assert last is not None
        first = (TENANT, site.user, _PAGE)
        later = (TENANT, site.user, last.updated_at, last.id, _PAGE)

        def page_from(start: str | None) -> Callable[[], object]:
            return lambda: ConversationRepository.list_by_user(
                db, site.user, limit=_PAGE, cursor=start
            )

        yield [
            Contender("ours, page 1", repeat(page_from(None))),
            Contender("raw, page 1", repeat(lambda: mine.fetch(raw.PAGE, first))),
            Contender("ours, page 100", repeat(page_from(cursor))),
            Contender("raw, page 100", repeat(lambda: mine.fetch(raw.PAGE_AFTER, later))),
        ]


@contextmanager
def get_or_create(site: Site) -> Iterator[list[Contender]]:
    mine = site.raw()
    with site.session() as db:
        yield [
            Contender("ours", repeat(lambda: UserRepository.get_or_create(db, EMAIL))),
            Contender("raw", repeat(lambda: mine.fetch(raw.BY_EMAIL, (TENANT, EMAIL)))),
        ]


@contextmanager
def threads(site: Site) -> Iterator[list[Contender]]:
    from psycopg_pool import ConnectionPool

    def in_threads(call: Callable[[int, int], None]) -> Callable[[int], float]:
        def run(times: int) -> float:
            each = -(-times // THREADS)
            started = time.perf_counter()
            list(workers.map(call, range(THREADS), [each] * THREADS))
            return (time.perf_counter() - started) * times / (each * THREADS)

        return run

    with (
        ThreadPoolExecutor(THREADS) as workers,
        ConnectionPool(
            plain(site.url), min_size=THREADS, max_size=THREADS, kwargs={"autocommit": True}
        ) as pool,
    ):
        sessions = [site.session() for _ in range(THREADS)]

        def ours(thread: int, times: int) -> None:
            for _ in range(times):
                MessageRepository.append(sessions[thread], site.ours[thread], **_ONE)

        def ours_per_call(thread: int, times: int) -> None:
            for _ in range(times):
                with site.session() as db:
                    MessageRepository.append(db, site.ours[thread], **_ONE)

        def theirs(thread: int, times: int) -> None:
            for _ in range(times):
                with pool.connection() as connection:
                    Raw(connection, TENANT).append(site.theirs[thread], _ONE)

        yield [
            Contender("ours", in_threads(ours)),
            Contender("raw", in_threads(theirs)),
            Contender("ours, a session each time", in_threads(ours_per_call)),
        ]


@contextmanager
def importing(site: Site) -> Iterator[list[Contender]]:
    with tempfile.TemporaryDirectory() as compiled:
        # The first import compiles; in containers the others often do too, and that is not wanted.
        environment = dict(os.environ)
        if site.scale == 1:
            environment["PYTHONPYCACHEPREFIX"] = compiled
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        def fresh(statement: str) -> Callable[[int], float]:
            timed = f"from time import perf_counter as t; s = t(); {statement}; print(t() - s)"
            command = [sys.executable, "-c", timed]

            def run(times: int) -> float:
                found = (
                    subprocess.check_output(command, env=environment)  # noqa: S603
                    for _ in range(times)
                )
                return sum(map(float, found))

            return run

        yield [
            Contender("ours", fresh("import database")),
            Contender("ours, all names", fresh("from database import *")),
            Contender("raw", fresh(_BASE)),
        ]
