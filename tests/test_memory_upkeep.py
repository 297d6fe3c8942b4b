"""Memories: what a compressor asks for, decay and forgetting, and tenants kept apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from database import (
    ConversationRepository,
    InvalidValueError,
    NotFoundError,
    SessionLocal,
    TenantSession,
    TransientError,
    transaction,
)
from database import MemoryRepository as Memories
from database import MessageRepository as Messages
from tests.conftest import admin
from tests.counting import counted_round_trips, counted_statements
from tests.factories import ConversationFactory, UserFactory
from tests.test_conformance import idle, tenant_of
from tests.threads import in_threads
from tests.vectors import age, seen

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


pytestmark = pytest.mark.usefixtures("short_vectors")


@pytest.fixture
def chat(db: TenantSession) -> Any:
    return ConversationFactory(db=db).id


def talk(db: TenantSession, chat: Any, count: int) -> list[Any]:
    rows = ({"role": "user", "content": str(n)} for n in range(1, count + 1))
    return [message.id for message in Messages.append_many(db, chat, rows)]


def fill(db: TenantSession, chat: Any, *importances: float, **fields: Any) -> list[Any]:
    items = [{"content": "a", "importance": value} | fields for value in importances]
    return Memories.add_many(db, chat, items)


def importances(db: TenantSession) -> list[float]:
    return [memory.importance for memory in seen(db)]


# Compressing


def test_recent(db: TenantSession, chat: Any) -> None:
    Memories.add_many(db, chat, [{"content": "a", "sequence": n} for n in (8, 1, 9, 4, 2, 3)])
    Memories.add(db, ConversationFactory(db=db).id, content="b")
    assert [m.sequence for m in Memories.recent(db, chat)] == [9, 8, 4, 3, 2]
    assert [m.sequence for m in Memories.recent(db, str(chat), 1)] == [9]
    assert len(Memories.recent(db, chat, limit=1000)) == 6
    for limit in (0, -1, 1001, "5", True, None):
        with pytest.raises(InvalidValueError, match=r"^limit: "):
            Memories.recent(db, chat, limit)  # type: ignore[arg-type]


def test_covers(db: TenantSession, other: TenantSession, chat: Any) -> None:
    ids = talk(db, chat, 30)
    elsewhere = ConversationFactory(db=db).id
    there = talk(db, elsewhere, 5)
    assert Memories.covers(db, chat, ids) == set()
    for first, last in ((3, 5), (5, 8), (20, 20)):
        Memories.add(db, chat, content="a", first_position=first, last_position=last)
    Memories.add(db, chat, content="without a range", first_message_id=ids[0])
    inside = {ids[n - 1] for n in (3, 4, 5, 6, 7, 8, 20)}
    assert Memories.covers(db, chat, ids) == inside
    assert Memories.covers(db, str(chat), [str(ids[3]), ids[0], there[3], uuid4()]) == {ids[3]}
    assert Memories.covers(db, elsewhere, [*ids, *there]) == Memories.covers(db, chat, []) == set()
    assert Memories.covers(other, chat, ids) == set()
    for bad in (None, 5, "text", ["text"], [None]):
        with pytest.raises(InvalidValueError, match=r"^message_ids: "):
            Memories.covers(db, chat, bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "bounds", "expected"),
    [
        (50, {}, range(16, 27)),
        (30, {}, range(1, 7)),
        (25, {}, [1]),
        (24, {}, []),
        (0, {}, []),
        (50, {"start": 1, "end": 1}, [50]),
        (50, {"start": 2, "end": 4}, [47, 48, 49]),
        (5, {"start": 1, "end": 2**31}, range(1, 6)),
    ],
)
def test_window(
    db: TenantSession, chat: Any, count: int, bounds: dict[str, int], expected: Any
) -> None:
    talk(db, chat, count)
    assert [int(m.content) for m in Memories.window(db, chat, **bounds)] == list(expected)


def test_window_leaves_inactive_messages_out(db: TenantSession, chat: Any) -> None:
    Messages.deactivate(db, chat, talk(db, chat, 40)[-10:-4])
    found = [int(m.content) for m in Memories.window(db, chat)]
    assert found == list(range(1, 11))


@pytest.mark.parametrize(
    ("start", "end", "field"),
    [
        *((0, 5, "start"), (5, 4, "end"), (-1, 5, "start"), (1, 2**40, "end")),
        *((True, 5, "start"), ("1", 5, "start"), (1, None, "end"), (1.0, 5, "start")),
    ],
)
def test_no_window(db: TenantSession, chat: Any, start: Any, end: Any, field: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}: "):
        Memories.window(db, chat, start, end)


def test_status(db: TenantSession, other: TenantSession, chat: Any) -> None:
    def found() -> tuple[int, ...]:
        status = Memories.status(db, chat)
        return (
            *(status.memories, status.messages, status.covered),
            *(status.last_position, status.next_sequence),
        )

    assert found() == (0, 0, 0, 0, 1)
    ids = talk(db, chat, 30)
    for first, last in ((1, 11), (9, 15)):
        Memories.add(db, chat, content="a", first_position=first, last_position=last)
    Memories.add(db, chat, content="a")
    assert found() == (3, 30, 15, 15, 4)
    Messages.deactivate(db, chat, [ids[2], ids[29]])
    assert found() == (3, 28, 14, 15, 4)
    Memories.delete(db, seen(db)[-1].id)
    assert (*found()[:1], Memories.next_sequence(db, chat)) == (2, 4)
    Memories.clear(db, chat)
    assert found() == (0, 28, 0, 0, 1)
    for call in (Memories.status, Memories.next_sequence):
        for session, id_ in ((db, uuid4()), (db, "no thread"), (other, chat)):
            with pytest.raises(NotFoundError):
                call(session, id_)


def test_round_trips(db: TenantSession, chat: Any) -> None:
    ids = talk(db, chat, 30)
    fill(db, chat, 0.1, 0.2, first_position=1, last_position=5)
    calls: dict[str, Callable[[], Any]] = {
        "recent": lambda: Memories.recent(db, chat),
        "covers": lambda: Memories.covers(db, chat, ids),
        "window": lambda: Memories.window(db, chat),
        "next_sequence": lambda: Memories.next_sequence(db, chat),
        "status": lambda: Memories.status(db, chat),
        "decay": lambda: Memories.decay(db, timedelta(), 0.5),
        "forget, dry": lambda: Memories.forget(db, 0.5, dry_run=True),
        "forget": lambda: Memories.forget(db, 0.07),
    }
    for name, call in calls.items():
        with counted_statements() as statements, counted_round_trips() as trips:
            assert call()
        assert (len(statements), trips.count) == (1, 1), name
        assert idle(db)
    with counted_statements() as statements:
        Memories.clear(db, chat)
    assert len(statements) == 2
    assert idle(db)


# Decay


def test_decay(db: TenantSession, chat: Any) -> None:
    memories = fill(db, chat, 0.8, 0.8, 0.8)
    now = datetime.now(UTC)
    age(db, memories[0], last_accessed_at=now - 3 * DAY)
    age(db, memories[1], last_accessed_at=now - 1.5 * DAY)
    assert Memories.decay(db, 2 * DAY, 0.5) == 1
    assert importances(db) == [0.4, 0.8, 0.8]
    assert Memories.decay(db, DAY, 0.5) == 2, "each call again"
    assert importances(db) == [0.2, 0.4, 0.8]
    first, _, last = seen(db)
    assert first.updated_at > memories[0].updated_at
    assert (first.last_accessed_at, last.updated_at) == (now - 3 * DAY, memories[2].updated_at)
    assert Memories.decay(db, timedelta(), 1) == 3
    assert Memories.decay(db, timedelta(), 0) == 3
    assert importances(db) == [0, 0, 0]
    assert idle(db)


def test_decay_of_some(db: TenantSession, chat: Any) -> None:
    user = UserFactory(db=db).id
    fill(db, chat, 0.8)
    fill(db, chat, 0.8, user_id=user)
    fill(db, ConversationFactory(db=db).id, 0.6, user_id=user)
    assert Memories.decay(db, timedelta(), 0.5, user_id=str(user), conversation_id=chat) == 1
    assert sorted(importances(db)) == [0.4, 0.6, 0.8]
    assert Memories.decay(db, timedelta(), 0.5, user_id=user) == 2
    assert Memories.forget(db, 0.25, user_id=user, conversation_id=str(chat)) == 1
    assert Memories.forget(db, 1, conversation_id=chat) == 1
    assert importances(db) == [0.3]
    nobodies: list[dict[str, Any]] = [{"user_id": uuid4()}, {"conversation_id": "no thread"}]
    for nobody in nobodies:
        assert Memories.decay(db, timedelta(), 0, **nobody) == 0
        assert Memories.forget(db, 1, **nobody) == 0


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_batches_decay_each_memory_once(db: TenantSession, chat: Any, batch_size: int) -> None:
    fill(db, chat, *[0.8] * 7, last_accessed_at=LONG_AGO)
    with counted_statements() as statements:
        assert Memories.decay(db, DAY, 0.5, batch_size=batch_size) == 7
    assert importances(db) == [0.4] * 7
    assert len(statements) == 7 // batch_size + 1
    with transaction(db):
        assert Memories.decay(db, DAY, 0.5, batch_size=batch_size) == 7
        assert Memories.forget(db, 0.5, batch_size=batch_size) == 7
        db.rollback()
    assert importances(db) == [0.4] * 7


@pytest.mark.parametrize("importance", [0.5, 1e-99, 1e-200, 5e-324])
@pytest.mark.parametrize("factor", [1e-3, 1e-200, 5e-324, 0])
def test_what_has_all_but_faded(
    db: TenantSession, chat: Any, importance: float, factor: float
) -> None:
    fill(db, chat, importance)
    for _ in range(3):
        assert Memories.decay(db, timedelta(), factor) == 1
    assert importances(db)[0] == pytest.approx(importance * factor**3)
    assert len(Memories.recall(db, weights=(0, 1e-9, 1e-9), half_life=timedelta.resolution)) == 1


def test_threads_decay_each_memory_exactly_as_often(db: TenantSession, chat: Any) -> None:
    fill(db, chat, *[1.0] * 20, last_accessed_at=LONG_AGO)
    counts = in_threads(
        tenant_of(db), lambda session, _: Memories.decay(session, DAY, 0.5, batch_size=6)
    )
    found = importances(db)
    assert sum(counts) == sum(round(-math.log2(value)) for value in found)


@pytest.mark.parametrize("name", ["decay", "forget"])
def test_locked_memories_are_passed_over(db: TenantSession, chat: Any, name: str) -> None:
    locked = fill(db, chat, *[0.2] * 6, last_accessed_at=LONG_AGO)[:2]
    call: Callable[[TenantSession], int] = {
        "decay": lambda session: Memories.decay(session, DAY, 0.5, batch_size=2),
        "forget": lambda session: Memories.forget(session, 0.5, batch_size=2),
    }[name]
    with SessionLocal(tenant_id=tenant_of(db)) as second, transaction(db):
        for memory in locked:
            Memories.update(db, memory.id, content="b")
        second.execute(text("SET lock_timeout = '1s'"))
        second.commit()
        assert call(second) == 4
    assert importances(db) == ([0.2] * 2 + [0.1] * 4 if name == "decay" else [0.2] * 2)


@contextmanager
def unchangeable(url: str, id_: Any) -> Iterator[None]:
    with admin(url) as login:
        login.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"
        )
        login.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE OR DELETE ON conversation_memory"
            f" FOR EACH ROW WHEN (old.id = '{id_}') EXECUTE FUNCTION refuse()"
        )
        yield
        login.execute("DROP FUNCTION refuse CASCADE")


@pytest.mark.parametrize("name", ["decay", "forget"])
def test_batches_are_committed_one_by_one(
    db: TenantSession, chat: Any, small_url: str, name: str
) -> None:
    """The fourth memory cannot change: what came before it stays done."""
    memories = fill(db, chat, 0.1, 0.1, 0.1, 0.2, 0.2)
    for n, memory in enumerate(memories):
        age(db, memory, last_accessed_at=LONG_AGO + n * DAY)
    with unchangeable(small_url, memories[3].id), pytest.raises(TransientError):
        if name == "decay":
            Memories.decay(db, DAY, 0.5, batch_size=2)
        else:
            Memories.forget(db, 0.5, batch_size=2)
    assert importances(db) == ([0.05] * 2 if name == "decay" else []) + [0.1, 0.2, 0.2]
    assert idle(db)


# Forgetting


def test_forget(db: TenantSession, chat: Any) -> None:
    fill(db, chat, 0.1, 0.5, 0.3, 0.29, 1)
    assert Memories.forget(db, 0, dry_run=True) == Memories.forget(db, 0) == 0
    assert Memories.forget(db, 0.3, dry_run=True) == 2
    assert importances(db) == [0.1, 0.5, 0.3, 0.29, 1]
    assert Memories.forget(db, 0.3) == 2
    assert importances(db) == [0.5, 0.3, 1]
    assert Memories.forget(db, 1) == 2
    assert Memories.add(db, chat, content="a").sequence == 6
    assert idle(db)


@pytest.mark.parametrize("batch_size", [1, 3, 6, 1000])
def test_forget_in_batches(db: TenantSession, chat: Any, batch_size: int) -> None:
    fill(db, chat, *[0.1] * 6, 0.9)
    with counted_statements() as statements:
        assert Memories.forget(db, 0.5, batch_size=batch_size) == 6
    assert len(statements) == 6 // batch_size + 1
    assert importances(db) == [0.9]


SHARES: list[Any] = [-0.1, 1.1, float("nan"), float("inf"), 10**400, "0.5", True, None]


@pytest.mark.parametrize("share", SHARES)
def test_no_share(db: TenantSession, chat: Any, share: Any) -> None:
    fill(db, chat, 0.1)
    with pytest.raises(InvalidValueError, match=r"^factor: "):
        Memories.decay(db, timedelta(), share)
    for dry_run in (True, False):
        with pytest.raises(InvalidValueError, match=r"^below: "):
            Memories.forget(db, share, dry_run=dry_run)
    assert importances(db) == [0.1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("older_than", value) for value in (-DAY, 5, None, timedelta.max)]
    + [("batch_size", value) for value in (0, -1, 100_001, True, "5", None)]
    + [("user_id", "x"), ("user_id", 5), ("conversation_id", 5)],
)
def test_no_upkeep(db: TenantSession, chat: Any, field: str, value: Any) -> None:
    fill(db, chat, 0.1)
    given: dict[str, Any] = {"older_than": timedelta(), "factor": 0.5, field: value}
    with pytest.raises(InvalidValueError, match=f"^{field}: "):
        Memories.decay(db, **given)
    if field != "older_than":
        with pytest.raises(InvalidValueError, match=f"^{field}: "):
            Memories.forget(db, 0.5, **{field: value})
    assert importances(db) == [0.1]
    assert idle(db)


# Tenants


def test_another_tenant_sees_and_changes_nothing(db: TenantSession, other: TenantSession) -> None:
    chat = ConversationRepository.create(db, thread_id="thread")
    ids, user = talk(db, chat.id, 40), UserFactory(db=db).id
    made = Memories.add(
        *(db, chat.id),
        content="tea",
        embedding=[1, 0, 0],
        importance=0.1,
        user_id=user,
        first_position=1,
        last_position=40,
        last_accessed_at=LONG_AGO,
    )
    for id_ in (chat.id, "thread"):
        assert Memories.recent(other, id_) == []
        assert Memories.window(other, id_) == []
        assert Memories.covers(other, id_, ids) == set()
        assert Memories.clear(other, id_) == 0
        for scope in ({"conversation_id": id_}, {"user_id": user}, {}):
            assert Memories.decay(other, DAY, 0.5, **scope) == 0
            assert Memories.forget(other, 1, **scope) == Memories.forget(
                other, 1, dry_run=True, **scope
            )
            for about in ({"embedding": [1, 0, 0]}, {"text": "tea"}, {}):
                assert Memories.recall(other, **about, **scope) == []
    assert Memories.forget(other, 1, dry_run=True) == 0
    with pytest.raises(NotFoundError):
        Memories.update(other, made.id, embedding=[1, 0, 0])
    assert [m.to_dict() for m in seen(db)] == [made.to_dict()]
    assert Memories.next_sequence(db, chat.id) == 2
