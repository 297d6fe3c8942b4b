"""Memories: added and recalled, ours beside psycopg by hand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from random import Random
from typing import Any
from uuid import UUID

import orjson
import psycopg
from sqlalchemy import make_url
from uuid_utils.compat import uuid7

import database
from benchmarks.harness import Contender, repeat
from benchmarks.raw import Raw
from benchmarks.site import TENANT, Site, plain
from database import ConversationRepository, MemoryRepository, SessionLocal, UserRepository

__all__ = [
    "add_many",
    "recall_small",
    "recall_tenant",
    "recall_user",
]

DIMENSIONS = 384
MEMORIES = 100_000
_TENANTS, _OF_TENANT = 100, 500
_CLUSTERS = 200
_SMALL = "small-0"
_CANDIDATES = 100

_COLUMNS = "m.id, m.content, m.memory_type, m.importance, m.metadata, m.last_accessed_at"
_NEAREST = f"""
SELECT {_COLUMNS}, 1 - distance + power(0.5, extract(epoch FROM now() - m.last_accessed_at) / 5e5)
    + m.importance AS score
FROM (SELECT id, embedding <=> %(embedding)s::vector AS distance FROM conversation_memory
    WHERE tenant_id = %(tenant)s {{scope}}
    ORDER BY embedding <=> %(embedding)s::vector LIMIT {_CANDIDATES}) near
JOIN conversation_memory m ON m.tenant_id = %(tenant)s AND m.id = near.id
ORDER BY score DESC LIMIT 10"""
_EXACT = """
SELECT id FROM conversation_memory WHERE tenant_id = %(tenant)s {scope}
ORDER BY embedding <=> %(embedding)s::vector LIMIT 10"""
_ADD = """
INSERT INTO conversation_memory
    (tenant_id, id, conversation_id, sequence, content, importance, embedding)
VALUES (%s, %s, %s, %s, %s, %s, %s)"""


@dataclass(frozen=True)
class Store:
    """A database of memories: 100,000 in one tenant, 500 in each of 100 others."""

    url: str
    user: UUID
    """Whom one in 200 of the large tenant's memories is about."""
    built: float
    """How many seconds building the index took."""

    def use(self) -> None:
        database.configure(url=self.url, tenant_id=TENANT, embedding_dimensions=DIMENSIONS)

    @contextmanager
    def raw(self) -> Iterator[Raw]:
        with psycopg.connect(plain(self.url), autocommit=True) as connection:
            yield Raw(connection, TENANT, role="")


def vectors(count: int, seed: int) -> Iterator[list[float]]:
    """Yield unit vectors in clusters, as texts on some subjects have them."""
    centres = _centres()
    chosen = Random(seed)
    for _ in range(count):
        centre = centres[chosen.randrange(_CLUSTERS)]
        # Not a Gaussian for each number: that takes ten times as long.
        noise = chosen.randbytes(DIMENSIONS)
        vector = [c + (n - 127.5) / 1000 for c, n in zip(centre, noise, strict=True)]
        length = math.sqrt(sum(number * number for number in vector))
        yield [round(number / length, 6) for number in vector]


@cache
def _centres() -> list[list[float]]:
    chosen = Random(0)
    return [[chosen.gauss(0, 0.06) for _ in range(DIMENSIONS)] for _ in range(_CLUSTERS)]


def fill(url: str, memories: int, tenants: int) -> Store:
    """Fill a database, by COPY as the owner; build the index afterwards."""
    database.configure(url=url, tenant_id=TENANT, embedding_dimensions=DIMENSIONS)
    database.init_db()
    with SessionLocal() as db:
        users = [user.id for user in UserRepository.create_many(db, [{} for _ in range(200)])]
        conversation = ConversationRepository.create(db).id
    owners = {TENANT: conversation}
    for number in range(tenants):
        with SessionLocal(tenant_id=f"small-{number}") as db:
            owners[f"small-{number}"] = ConversationRepository.create(db).id
    columns = "tenant_id, id, conversation_id, user_id, sequence, content, importance, embedding"
    with psycopg.connect(plain(url), autocommit=True) as connection:
        index = connection.execute(
            "SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_conversation_memory_embedding'"
        ).fetchone()
        assert index
        connection.execute("DROP INDEX ix_conversation_memory_embedding")
        copying = f"COPY conversation_memory ({columns}) FROM STDIN".encode()
        with connection.cursor().copy(copying) as copy:
            for tenant, owner in owners.items():
                many = memories if tenant == TENANT else _OF_TENANT
                for number, vector in enumerate(vectors(many, hash(tenant) % 1000)):
                    user = users[number % len(users)] if tenant == TENANT else None
                    embedding = orjson.dumps(vector).decode()
                    content = f"Memory {number}"
                    copy.write_row(
                        (tenant, uuid7(), owner, user, number + 1, content, 0.5, embedding)
                    )
        connection.execute("SET maintenance_work_mem = '2GB'")
        started = time.perf_counter()
        connection.execute(index[0].encode())
        built = time.perf_counter() - started
        connection.execute("VACUUM ANALYZE conversation_memory")
    database.close_db()
    return Store(url, users[0], built)


@contextmanager
def recall_tenant(site: Site) -> Iterator[list[Contender]]:
    yield from _recall(site, TENANT, "", lambda _: {})


@contextmanager
def recall_user(site: Site) -> Iterator[list[Contender]]:
    yield from _recall(
        site, TENANT, "AND user_id = %(user)s", lambda store: {"user_id": store.user}
    )


@contextmanager
def recall_small(site: Site) -> Iterator[list[Contender]]:
    yield from _recall(site, _SMALL, "", lambda _: {})


def _recall(
    site: Site, tenant: str, scope: str, filters: Callable[[Store], dict[str, Any]]
) -> Iterator[list[Contender]]:
    store = site.filled(
        "memories", lambda: fill(site.spare, site.scaled(MEMORIES), site.scaled(_TENANTS))
    )
    store.use()
    statement = _NEAREST.format(scope=scope)
    asked = list(vectors(50, 12345))
    texts = [orjson.dumps(vector).decode() for vector in asked]
    chosen = Random(6)
    with store.raw() as raw, SessionLocal(tenant_id=tenant) as db:
        # The hand-written SQL needs it too, and sends it with the statement.
        raw.connection.execute("SET hnsw.iterative_scan = 'strict_order'")
        options = filters(store)

        def ours(**more: Any) -> Callable[[int], None]:
            return repeat(
                lambda: MemoryRepository.recall(
                    db, embedding=chosen.choice(asked), **options, **more
                )
            )

        def theirs() -> object:
            parameters = {"tenant": tenant, "user": store.user, "embedding": chosen.choice(texts)}
            return raw.fetch(statement, parameters)

        share = _quality(store, db, asked, options)
        print(f"recall@10 in {tenant}{' of a user' if scope else ''}: {share:.3f}")
        yield [
            Contender("ours", ours(touch=False)),
            Contender("ours, touching", ours()),
            Contender("raw", repeat(theirs)),
        ]
    database.close_db()


def _quality(
    store: Store, db: database.TenantSession, asked: list[list[float]], options: dict[str, Any]
) -> float:
    """Return which share of the ten nearest memories, by exact comparison, is recalled."""
    found = total = 0
    condition = "AND user_id = %(user)s" if options else ""
    tenant = db.info["database.tenant"]
    with store.raw() as raw:
        exact = raw.connection
        exact.execute("SET enable_indexscan = off")
        for vector in asked:
            parameters = {
                "tenant": tenant,
                "user": store.user,
                "embedding": orjson.dumps(vector).decode(),
            }
            rows = exact.execute(_EXACT.format(scope=condition).encode(), parameters).fetchall()
            recalled = MemoryRepository.recall(
                db, embedding=vector, weights=(1, 0, 0), touch=False, **options
            )
            found += len({row[0] for row in rows} & {one.memory.id for one in recalled})
            total += len(rows)
    return found / total


@contextmanager
def add_many(site: Site) -> Iterator[list[Contender]]:
    # Not where 100,000 are already: each would take ten times as long, nearly all of it the index.
    with _empty_database(site) as url:
        store = fill(url, memories=0, tenants=0)
        store.use()
        many = list(vectors(site.scaled(10_000), 99))
        now = datetime.now(UTC)
        with store.raw() as raw, SessionLocal() as db:
            mine = ConversationRepository.create(db).id
            numbers = iter(range(1, 10_000_000))
            other = ConversationRepository.create(db).id
            text = f"Memory of {now}"

            def theirs() -> None:
                rows = [
                    (TENANT, uuid7(), other, next(numbers), text, 0.5, orjson.dumps(v).decode())
                    for v in many
                ]
                raw.execute_many(_ADD, rows)

            items = [{"content": text, "embedding": vector} for vector in many]
            yield [
                Contender("ours", repeat(lambda: MemoryRepository.add_many(db, mine, items))),
                Contender("raw", repeat(theirs)),
            ]
        database.close_db()


@contextmanager
def _empty_database(site: Site) -> Iterator[str]:
    name = f"adding_{uuid7().hex}"
    with psycopg.connect(plain(site.url), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
        try:
            yield make_url(site.url).set(database=name).render_as_string(hide_password=False)
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
