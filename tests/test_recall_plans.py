"""Recall among many memories: completeness, accuracy, and which scans serve it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import numpy as np
import psycopg
import pytest
from sqlalchemy import text

import database
from database import (
    ConversationRepository,
    SessionLocal,
    TenantSession,
    UserRepository,
    get_engine,
    transaction,
)
from database import MemoryRepository as Memories
from database.repositories import recalling
from tests.conftest import admin
from tests.test_search_plans import listening
from tests.vectors import database_for

DIMENSIONS = 16
ROWS = 5_000
USERS = 50
FAR = 30
BY_RELEVANCE = (1.0, 0.0, 0.0)


class Filled(NamedTuple):
    """A database with the memories of two tenants, and those of one of them."""

    url: str
    users: list[UUID]
    chat: UUID
    rows: list[dict[str, Any]]
    queries: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def filled(server: str) -> Iterator[Filled]:
    chance = np.random.default_rng(7)
    centres = chance.normal(size=(60, DIMENSIONS))

    def near(count: int) -> Any:
        chosen = chance.integers(len(centres), size=count)
        return centres[chosen] + 0.25 * chance.normal(size=(count, DIMENSIONS))

    with database_for(server, DIMENSIONS) as url:
        database.configure(url=url, embedding_dimensions=DIMENSIONS)
        for name in ("b", "a"):
            with SessionLocal(tenant_id=name) as db:
                users = [UserRepository.create(db).id for _ in range(USERS + 1)]
                chat = ConversationRepository.create(db).id
                rows = [
                    {
                        "content": f"common words w{n} rare{n:05}thing",
                        "embedding": vector.tolist(),
                        "user_id": users[n % USERS],
                        "memory_type": "rare" if n % 250 == 0 else f"type {n % 2}",
                    }
                    for n, vector in enumerate(near(ROWS))
                ]
                # As far away from the queries as can be.
                far = -centres[0] + 0.01 * chance.normal(size=(FAR, DIMENSIONS))
                rows += [
                    {"content": f"far {n}", "embedding": v.tolist(), "user_id": users[-1]}
                    for n, v in enumerate(far)
                ]
                Memories.add_many(db, chat, random.Random(3).sample(rows, len(rows)))
        with admin(url) as login:
            login.execute("VACUUM ANALYZE")
        database.close_db()
        yield Filled(url, users, chat, rows, near(40))


@pytest.fixture(autouse=True)
def configured(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    database.configure(url=filled.url, embedding_dimensions=DIMENSIONS)
    yield
    database.close_db()


@pytest.fixture
def tenant() -> str:
    return "a"


@pytest.fixture(params=[0, 10**6], ids=["by the index", "exactly"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(recalling, "FEW", request.param)
    return int(request.param)


def nearest(filled: Filled, query: Any, count: int, **filters: Any) -> list[str]:
    """The contents of the nearest memories, by brute force."""
    rows = [row for row in filled.rows if all(row.get(k) == v for k, v in filters.items())]
    vectors = np.array([row["embedding"] for row in rows])
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1)
    return [rows[n]["content"] for n in np.argsort(-cosines)[:count]]


def recalled(db: TenantSession, query: Any, **given: Any) -> list[str]:
    found = Memories.recall(db, embedding=query, weights=BY_RELEVANCE, touch=False, **given)
    return [one.memory.content for one in found]


SETTINGS: dict[str, list[str]] = {
    "none": [],
    "user": ["user_id"],
    "type": ["memory_type"],
    "user and type": ["user_id", "memory_type"],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_recall_at_10(db: TenantSession, filled: Filled, few: int, setting: str) -> None:
    hits = 0
    for n, query in enumerate(filled.queries):
        given = {"user_id": filled.users[n], "memory_type": f"type {n % 2}"}
        filters = {name: given[name] for name in SETTINGS[setting]}
        found = recalled(db, query, **filters)
        expected = nearest(filled, query, 10, **filters)
        assert len(found) == 10
        if few:
            assert found == expected
        hits += len({*found} & {*expected})
    assert hits / (10 * len(filled.queries)) >= 0.98


@pytest.mark.parametrize("limit", [1, 10, 20, 30, 1000])
def test_a_filter_never_costs_results(
    db: TenantSession, filled: Filled, few: int, limit: int
) -> None:
    away = -np.mean([row["embedding"] for row in filled.rows[-FAR:]], axis=0)
    for query in (away, filled.queries[0]):
        assert len(recalled(db, query, user_id=filled.users[-1], limit=limit)) == min(limit, FAR)
        found = recalled(db, query, memory_type="rare", limit=limit)
        assert found == nearest(filled, query, limit, memory_type="rare")
        assert len(recalled(db, query, conversation_id=filled.chat, limit=limit)) == limit
        both = Memories.recall(
            *(db,), embedding=query, text="far", user_id=filled.users[-1], limit=limit, touch=False
        )
        assert len(both) == min(limit, FAR)


def test_what_the_index_misses_is_found_exactly(
    db: TenantSession, filled: Filled, plans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an index with many more memories than a scan of it looks at gives up early."""
    monkeypatch.setattr(recalling, "FEW", 0)
    query = filled.queries[0]
    with transaction(db):
        db.execute(text("SET LOCAL hnsw.max_scan_tuples = 1"))
        db.execute(text("SET LOCAL enable_sort = off"))
        plans.clear()
        for limit in (10, 30):
            found = recalled(db, query, memory_type="rare", limit=limit)
            assert found == nearest(filled, query, limit, memory_type="rare")
    plan = plan_of(plans)
    assert "Index Scan using ix_conversation_memory_embedding" in plan, plan
    assert "CTE every" in plan


def test_few_is_the_bound(db: TenantSession, filled: Filled, plans: list[str]) -> None:
    assert recalling.FEW == 2_000
    for count, index in ((2_000, False), (2_001, True)):
        chat = ConversationRepository.create(db).id
        rows = ({"content": "x", "embedding": row["embedding"]} for row in filled.rows[:count])
        Memories.add_many(db, chat, rows)
        plans.clear()
        recalled(db, filled.queries[0], conversation_id=chat, limit=25)
        # The planner may sort those of a conversation rather than walk the index.
        assert ("LIMIT p_candidates\n        ) near" in "\n".join(plans)) is index
        ConversationRepository.delete(db, chat)


# Plans


@pytest.fixture
def plans(db: TenantSession) -> Iterator[list[str]]:
    with get_engine().connect().execution_options(isolation_level="AUTOCOMMIT") as login:
        for setting in (
            "LOAD 'auto_explain'",
            "SET auto_explain.log_min_duration = 0",
            "SET auto_explain.log_nested_statements = on",
            "SET auto_explain.log_level = notice",
        ):
            login.execute(text(setting))
    found: list[str] = []
    with listening(db, found):
        yield found


def plan_of(plans: list[str]) -> str:
    found = "\n".join(plans)
    plans.clear()
    return found


@pytest.mark.parametrize("calls", [1, 8], ids=["first", "prepared"])
def test_the_vector_index_is_used(
    db: TenantSession, filled: Filled, plans: list[str], calls: int
) -> None:
    for query in filled.queries[:calls]:
        plans.clear()
        recalled(db, query)
    plan = plan_of(plans)
    assert "Index Scan using ix_conversation_memory_embedding" in plan, plan
    assert "Seq Scan on conversation_memory t" not in plan
    assert "CTE every" not in plan
    assert "CTE these" not in plan


@pytest.mark.parametrize("calls", [1, 8], ids=["first", "prepared"])
def test_few_are_scanned_exactly(
    db: TenantSession, filled: Filled, plans: list[str], calls: int
) -> None:
    for _ in range(calls):
        plans.clear()
        recalled(db, filled.queries[0], user_id=filled.users[3])
    plan = plan_of(plans)
    assert "CTE these" in plan, plan
    assert "ix_conversation_memory_user_id" in plan
    assert "ix_conversation_memory_embedding" not in plan
    assert "Seq Scan on conversation_memory t" not in plan


@pytest.mark.parametrize("calls", [1, 8], ids=["first", "prepared"])
def test_the_text_index_is_used(db: TenantSession, plans: list[str], calls: int) -> None:
    for n in range(calls):
        plans.clear()
        (found,) = Memories.recall(db, text=f"rare{127 + n:05}thing")
        assert found.memory.content.startswith(f"common words w{127 + n} ")
    plan = plan_of(plans)
    assert "Bitmap Index Scan on ix_conversation_memory_text" in plan, plan
    assert "Seq Scan on conversation_memory t" not in plan


# The function itself

CALL = text(
    "SELECT count(*) FROM recall_memories(:tenant, NULL, NULL, NULL, NULL,"
    " CAST(:vector AS vector), :words, NULL, 100, :few)"
)


@pytest.mark.parametrize("few", [0, 2000], indirect=False)
def test_the_function_answers_for_the_sessions_tenant(
    db: TenantSession, filled: Filled, few: int
) -> None:
    for vector, words in ((str(filled.rows[0]["embedding"]), None), (None, "common")):
        given = {"vector": vector, "words": words, "few": few}
        assert db.scalar(CALL, given | {"tenant": "a"}) == 100
        for tenant in ("b", "", None, "A"):
            assert db.scalar(CALL, given | {"tenant": tenant}) == 0


def test_only_the_applications_role_may_call_it(filled: Filled) -> None:
    nobody = f"nobody_{uuid4().hex[:12]}"
    with admin(filled.url) as login:
        login.execute(f"CREATE ROLE {nobody}")
        try:
            login.execute(f"SET ROLE {nobody}")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                login.execute(
                    "SELECT recall_memories('a', NULL, NULL, NULL, NULL, NULL, 'x', NULL, 1, 1)"
                )
            login.execute("RESET ROLE")
            role, config = login.execute(
                "SELECT prosecdef, array_to_string(proconfig, ' ') FROM pg_proc"
                " WHERE proname = 'recall_memories'"
            ).fetchone() or (None, "")
        finally:
            login.execute("RESET ROLE")
            login.execute(f"DROP ROLE {nobody}")
    assert role is True
    assert "search_path=pg_catalog, " in config
    assert config.count("pg_temp") == 1
