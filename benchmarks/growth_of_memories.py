"""How recalling grows with the memories: `python -m benchmarks.growth_of_memories 10000 100000`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import psycopg

import database
from benchmarks.harness import Contender, Effort, measure, repeat
from benchmarks.memories import DIMENSIONS, Store, fill, vectors
from benchmarks.report import table
from benchmarks.site import plain, serving
from database import MemoryRepository, SessionLocal

__all__: list[str] = []

_HALF = f"""
CREATE INDEX half ON conversation_memory
USING hnsw ((embedding::halfvec({DIMENSIONS})) halfvec_cosine_ops)"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.growth_of_memories", description=__doc__)
    parser.add_argument("sizes", type=int, nargs="+", help="how many memories")
    sizes = sorted(parser.parse_args().sizes)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    columns = []
    with serving() as (server, admin):
        for size in sizes:
            print(f"measuring: {size:,}", file=sys.stderr)
            name = f"growth_{size}"
            admin.execute(f"CREATE DATABASE {name}".encode())
            store = fill(server.url(name), size, tenants=0)
            columns.append({**_recalls(store), **_indexes(store)})
            database.close_db()
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
    rows: list[tuple[str, ...]] = [("memories", *(f"{size:,}" for size in sizes))]
    rows += [(name, *(column[name] for column in columns)) for name in columns[0]]
    print(table(rows))


def _recalls(store: Store) -> dict[str, str]:
    store.use()
    asked = cycle(vectors(50, 12345))
    with SessionLocal() as db:

        def recalling(**options: Any) -> Callable[[int], None]:
            return repeat(
                lambda: MemoryRepository.recall(db, embedding=next(asked), touch=False, **options)
            )

        contenders = [
            Contender("recall 10 of all", recalling()),
            Contender("recall 10 of one user's in 200", recalling(user_id=store.user)),
        ]
        timings = measure(contenders, Effort(10, 50))
    return {one.name: f"{timings.median(one.name) * 1e3:,.1f} ms" for one in contenders}


def _indexes(store: Store) -> dict[str, str]:
    with psycopg.connect(plain(store.url), autocommit=True) as connection:
        connection.execute("SET maintenance_work_mem = '2GB'")
        started = time.perf_counter()
        connection.execute(_HALF.encode())
        half = time.perf_counter() - started
        sizes = connection.execute(
            "SELECT pg_relation_size('ix_conversation_memory_embedding'), pg_relation_size('half')"
        ).fetchone()
    assert sizes
    return {
        "index of vector": f"{sizes[0] / 2**20:,.0f} MB",
        "  built in": f"{store.built:,.0f} s",
        "index of halfvec": f"{sizes[1] / 2**20:,.0f} MB",
        "  half built in": f"{half:,.0f} s",
    }


if __name__ == "__main__":
    main()
