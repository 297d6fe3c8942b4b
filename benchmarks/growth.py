"""How the cost of a search grows with the contexts: `python -m benchmarks.growth 10000 100000`."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from random import Random
from typing import Any
from uuid import UUID

import database
from benchmarks.harness import Contender, Effort, measure, repeat
from benchmarks.notes import RARE, fill, note
from benchmarks.report import table
from benchmarks.site import serving
from database import ContextRepository, SessionLocal, UserRepository

__all__: list[str] = []

_TENANT = "notes"
_SEARCHES: dict[str, dict[str, Any]] = {
    "a user's, rare word": {"query": RARE},
    "the tenant's, rare word": {"query": RARE, "user_id": None},
    "the tenant's, a word in every fifth": {"query": "common", "user_id": None},
    "a user's, substring": {"query": "arewor", "mode": "substring"},
    "the tenant's, substring": {"query": "arewor", "mode": "substring", "user_id": None},
    "the tenant's, a member equal": {
        "query": None,
        "user_id": None,
        "where": {"title": "Note 4711"},
    },
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.growth", description=__doc__)
    parser.add_argument("sizes", type=int, nargs="+", help="how many contexts")
    sizes = sorted(parser.parse_args().sizes)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    searches: list[tuple[str, ...]] = [("search", *(f"{size:,}" for size in sizes))]
    memory: list[tuple[str, ...]] = [("work", "contexts", "time", "memory")]
    with serving() as (server, admin):
        measured = []
        for size in sizes:
            name = f"growth_{size}"
            admin.execute(f"CREATE DATABASE {name}".encode())
            measured.append(_searches(server.url(name), size))
            if size == sizes[-1]:
                memory += _memory(server.url(name), size)
            database.close_db()
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
    searches += [(name, *(_shown(one[name]) for one in measured)) for name in _SEARCHES]
    print(table(searches), table(memory), sep="\n\n")


def _searches(url: str, size: int) -> dict[str, float]:
    print(f"filling: {size:,}", file=sys.stderr)
    database.configure(url=url, tenant_id=_TENANT)
    database.init_db()
    user = fill(url, _TENANT, size)
    with SessionLocal() as db:

        def searching(options: dict[str, Any]) -> Callable[[], object]:
            return lambda: ContextRepository.search(db, **{"user_id": user, **options})

        contenders = [Contender(name, repeat(searching(o))) for name, o in _SEARCHES.items()]
        timings = measure(contenders, Effort(10, 50))
    return {name: timings.median(name) for name in _SEARCHES}


def _memory(url: str, size: int) -> list[tuple[str, ...]]:
    """Store and export as many contexts of one user, each in a process of its own."""
    rows: list[tuple[str, ...]] = []
    for name, work in (("store_many", _store), ("export", _export)):
        print(f"measuring: {name} of {size:,}", file=sys.stderr)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            seconds, peak = process.submit(work, url, size).result()
        rows.append((name, f"{size:,}", f"{seconds:,.0f} s", f"{peak:,.0f} MB"))
    return rows


def _store(url: str, size: int) -> tuple[float, float]:
    chosen = Random(4)
    items = (
        {"context_type": "note", "content": note(n, chosen), "source_identifier": str(n)}
        for n in range(size)
    )
    with _user(url) as (db, user):
        return _measured(lambda: ContextRepository.store_many(db, user, items))


def _export(url: str, _: int) -> tuple[float, float]:
    with _user(url) as (db, user):
        return _measured(lambda: sum(map(len, UserRepository.export(db, user))))


@contextmanager
def _user(url: str) -> Iterator[tuple[database.TenantSession, UUID]]:
    database.configure(url=url, tenant_id="memory")
    with SessionLocal() as db:
        yield db, UserRepository.get_or_create(db, "ada@example.com").id


def _measured(work: Callable[[], object]) -> tuple[float, float]:
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


if __name__ == "__main__":
    main()
