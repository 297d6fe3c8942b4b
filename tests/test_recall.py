"""Recalling memories: by vector, by text, by both; scores and their parts; what is touched."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from database import (
    ConversationRepository,
    InvalidValueError,
    TenantSession,
    transaction,
)
from database import MemoryRepository as Memories
from tests.counting import counted_round_trips, counted_statements
from tests.factories import ConversationFactory, PersonaFactory, UserFactory
from tests.test_conformance import idle, tenant_of
from tests.threads import THREADS, in_threads
from tests.vectors import age, at, seen

if TYPE_CHECKING:
    from database.repositories.recalling import Recalled

HOUR = timedelta(hours=1)
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
BY_RELEVANCE = (1.0, 0.0, 0.0)
ABOUT: list[dict[str, Any]] = [
    {"embedding": at(0)},
    {"text": "tea"},
    {"embedding": at(0), "text": "tea"},
    {},
]


pytestmark = pytest.mark.usefixtures("short_vectors")


@pytest.fixture
def chat(db: TenantSession) -> Any:
    return ConversationFactory(db=db).id


def contents(found: list[Recalled]) -> list[str]:
    return [one.memory.content for one in found]


def fill(db: TenantSession, chat: Any, rows: dict[str, Any], **fields: Any) -> dict[str, Any]:
    items = [{"content": name, "embedding": vector} | fields for name, vector in rows.items()]
    return {memory.content: memory for memory in Memories.add_many(db, chat, items)}


# Relevance


def test_by_vector(db: TenantSession, chat: Any) -> None:
    degrees = (0, 10, 45, 89, 91, 120, 180)
    fill(db, chat, {str(n): at(-n, length=n + 1) for n in reversed(degrees)} | {"none": None})
    found = Memories.recall(db, embedding=at(0, 7), weights=BY_RELEVANCE)
    assert contents(found) == [str(n) for n in degrees]
    for one, n in zip(found, degrees, strict=True):
        cosine = at(n)[0]
        assert one.parts.similarity == pytest.approx(cosine, abs=1e-6)
        assert one.parts.relevance == one.score == pytest.approx(max(cosine, 0), abs=1e-6)
        assert one.parts.text_rank is None
    assert contents(Memories.recall(db, embedding=at(0), weights=BY_RELEVANCE, limit=6)) == (
        [str(n) for n in degrees[:6]]
    )


@pytest.mark.parametrize("touch", [True, False])
def test_min_similarity(db: TenantSession, chat: Any, touch: bool) -> None:  # noqa: FBT001
    fill(db, chat, {str(n): at(n) for n in (0, 59, 61, 180)} | {"tea": None, "green tea": at(70)})

    def found(least: float, **given: Any) -> set[str]:
        recalled = Memories.recall(db, embedding=at(0), min_similarity=least, touch=touch, **given)
        return set(contents(recalled))

    assert found(0.5) == {"0", "59"}
    assert found(-1) == {"0", "59", "61", "180", "green tea"}
    assert found(0.5, text="tea") == {"0", "59"}
    assert found(0.3, text="tea") == {"0", "59", "61", "green tea"}


TEXTS = {
    "the old harbour at night": ["harbour", "HARBOUR night", '"old harbour"', "harbour -day"],
    "나는 서울에서 일합니다": ["서울", "일합니다"],
    "東京で寿司を食べた": ["寿司", '"東京で"'],
    "party 🎉 on friday": ["🎉", "party 🎉", "zebra or 🎉"],
    "naïve café": ["café"],
}


@pytest.mark.parametrize("content", TEXTS)
def test_by_text(db: TenantSession, chat: Any, content: str) -> None:
    fill(db, chat, dict.fromkeys([*TEXTS, "harbour day"]))
    for query in TEXTS[content]:
        found = contents(Memories.recall(db, text=query))
        assert set(found) - {"harbour day"} == {content}, query
        assert ("harbour day" in found) == (query == "harbour")


def test_texts_are_ranked(db: TenantSession, chat: Any) -> None:
    fill(db, chat, dict.fromkeys(["tea", "tea tea tea and more", "none", "tea or tea", "x tea x"]))
    for query in ("tea", "tea -coffee"):
        found = Memories.recall(db, text=query, weights=BY_RELEVANCE)
        ranks = [one.parts.text_rank for one in found]
        assert all(ranks)
        assert ranks == sorted(ranks, key=float, reverse=True)  # type: ignore[arg-type]
        assert contents(found)[:2] == ["tea tea tea and more", "tea or tea"]
        for one in found:
            assert one.parts.relevance == pytest.approx(one.parts.text_rank / ranks[0])  # type: ignore[operator]
            assert one.parts.similarity is None
        assert 0 < found[-1].parts.relevance < found[0].parts.relevance == 1
    assert [one.parts.relevance for one in Memories.recall(db, text="-coffee")] == [0] * 5


def test_both_are_fused_by_rank(db: TenantSession, chat: Any) -> None:
    fill(
        *(db, chat),
        {
            "tea tea tea tea": at(20),  # first by text, second by vector
            "tea": at(90),  # third by text, fourth by vector
            "water": at(0),  # first by vector
            "milk": at(50),  # third by vector
            "tea and tea": None,  # second by text
        },
    )
    found = Memories.recall(db, embedding=at(0), text="tea", weights=BY_RELEVANCE)
    best = 2 / 61
    expected = {
        "tea tea tea tea": (1 / 61 + 1 / 62) / best,
        "tea": (1 / 63 + 1 / 64) / best,
        "water": 1 / 61 / best,
        "tea and tea": 1 / 62 / best,
        "milk": 1 / 63 / best,
    }
    assert contents(found) == list(expected)
    for one in found:
        assert one.score == one.parts.relevance == pytest.approx(expected[one.memory.content])
        assert (one.parts.text_rank is None) == ("tea" not in one.memory.content)
        assert (one.parts.similarity is None) == (one.memory.content == "tea and tea")
    fill(db, chat, {"tea tea tea tea tea": at(0)})
    first, *_ = Memories.recall(db, embedding=at(0), text="tea", weights=BY_RELEVANCE)
    assert first.parts.relevance == pytest.approx(1)


def test_an_empty_text(db: TenantSession, chat: Any) -> None:
    fill(db, chat, {"a": at(0), "b": at(9)})
    for empty in ("", "  ", '""', "-", "!?", "\ufe0f"):
        assert Memories.recall(db, text=empty) == []
        found = Memories.recall(db, text=empty, embedding=at(0), weights=BY_RELEVANCE)
        assert contents(found) == ["a", "b"]
        assert found[0].parts.relevance == pytest.approx(1)


@pytest.mark.parametrize("touch", [True, False])
def test_by_neither(db: TenantSession, chat: Any, touch: bool) -> None:  # noqa: FBT001
    for n in range(120):
        made = Memories.add(db, chat, content=str(n), importance=n / 120)
        age(db, made, last_accessed_at=LONG_AGO - n * HOUR)
    found = Memories.recall(db, weights=(0, 1, 0), limit=5, touch=touch)
    assert contents(found) == ["0", "1", "2", "3", "4"]
    assert {one.parts.relevance for one in found} == {0}
    assert all(one.parts.similarity is one.parts.text_rank is None for one in found)


def test_the_last_accessed_come_first(db: TenantSession, chat: Any) -> None:
    now = datetime.now(UTC)
    for n in (3, 1, 4, 2):
        age(db, Memories.add(db, chat, content=str(n)), last_accessed_at=now - n * HOUR)
    found = Memories.recall(db, touch=False)
    assert contents(found) == ["1", "2", "3", "4"]


# Recency and weights


@pytest.mark.parametrize("half_life", [timedelta(minutes=7), HOUR, timedelta(days=99)])
def test_recency_halves(db: TenantSession, chat: Any, half_life: timedelta) -> None:
    now = datetime.now(UTC)
    for n in range(4):
        made = Memories.add(db, chat, content=str(n))
        age(db, made, last_accessed_at=now - n * half_life)
    age(db, Memories.add(db, chat, content="future"), last_accessed_at=now + HOUR)
    age(
        db,
        Memories.add(db, chat, content="ancient"),
        last_accessed_at=max(now - 5000 * half_life, LONG_AGO),
    )
    found = Memories.recall(db, weights=(0, 1, 0), half_life=half_life)
    recencies = {one.memory.content: one.parts.recency for one in found}
    assert recencies["future"] == 1
    assert 0 < recencies["ancient"] < 0.125
    for n in range(4):
        assert recencies[str(n)] == pytest.approx(0.5**n, rel=0.1)
    assert contents(found) == ["future", "0", "1", "2", "3", "ancient"]


WEIGHTS = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2, 7.25), [3, 0, 1], (1e9, 1e-9, 0)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_score_is_the_weighted_sum(db: TenantSession, chat: Any, weights: Any) -> None:
    for n in range(30):
        vector = at(7 * n) if n % 5 else None
        fields: dict[str, Any] = {"embedding": vector, "importance": n * 11 % 30 / 29}
        made = Memories.add(db, chat, content=f"tea {'tea ' * (n % 3)}" if n % 2 else "x", **fields)
        age(db, made, last_accessed_at=datetime.now(UTC) - n * 13 % 30 * HOUR)
    for about in ABOUT:
        found = Memories.recall(
            db, **about, weights=weights, limit=25, half_life=9 * HOUR, touch=False
        )
        assert len(found) >= 15
        for one in found:
            parts = (one.parts.relevance, one.parts.recency, one.parts.importance)
            assert all(0 <= part <= 1 for part in parts)
            products = [weight * part for weight, part in zip(weights, parts, strict=True)]
            assert one.score == pytest.approx(sum(products))
            assert one.parts.importance == one.memory.importance
        scores = [one.score for one in found]
        assert scores == sorted(scores, reverse=True)


# Filters and limits


def test_filters(db: TenantSession) -> None:
    chats = [ConversationRepository.create(db, thread_id=f"thread {n}") for n in range(2)]
    users = [UserFactory(db=db).id for _ in range(2)]
    personas = [PersonaFactory(db=db).id for _ in range(2)]
    made = []
    for n in range(16):
        fields: dict[str, Any] = {
            "conversation_id": chats[n % 2].id,
            "user_id": users[n // 2 % 2],
            "persona_id": personas[n // 4 % 2],
            "memory_type": f"type {n // 8}",
        }
        row = {"content": "tea", "embedding": at(n)} | fields
        made.append((Memories.create(db, **row).id, fields))
    wanted = {
        "conversation_id": "thread 1",
        "user_id": str(users[0]),
        "persona_id": personas[1],
        "memory_type": "type 0",
    }
    is_it = {**wanted, "conversation_id": chats[1].id, "user_id": users[0]}
    for chosen in range(16):
        names = [name for n, name in enumerate(wanted) if chosen >> n & 1]
        expected = {id_ for id_, f in made if all(f[name] == is_it[name] for name in names)}
        for about in ABOUT:
            found = Memories.recall(db, **about, limit=16, **{name: wanted[name] for name in names})
            assert {one.memory.id for one in found} == expected
    for nothing in ({"user_id": uuid4()}, {"memory_type": "type 2"}, {"conversation_id": "x"}):
        assert Memories.recall(db, embedding=at(0), **nothing) == []


def test_limit(db: TenantSession, chat: Any) -> None:
    rows = [{"content": "tea", "embedding": at(n / 10)} for n in range(1200)]
    Memories.add_many(db, chat, rows)
    for about in ABOUT:
        for limit in (1, 10, 1000):
            assert len(Memories.recall(db, **about, limit=limit)) == limit


# Touching


@pytest.mark.parametrize("about", ABOUT, ids=str)
def test_touch(db: TenantSession, chat: Any, about: dict[str, Any]) -> None:
    made = [Memories.add(db, chat, content=f"tea {n}", embedding=at(n)) for n in range(5)]
    for memory in made:
        age(db, memory, last_accessed_at=LONG_AGO)
    before = [memory.to_dict() for memory in seen(db)]
    plain = Memories.recall(db, **about, limit=3, touch=False)
    assert [memory.to_dict() for memory in seen(db)] == before
    start = datetime.now(UTC)
    for count in (1, 2):
        with counted_statements() as statements, counted_round_trips() as trips:
            found = Memories.recall(db, **about, limit=3)
        assert (len(statements), trips.count) == (1, 1)
        assert idle(db)
        assert len(found) == 3
        for one in found:
            assert one.memory.access_count == count
            assert one.memory.last_accessed_at >= start
        if count == 1:
            assert contents(found) == contents(plain)
            assert all(one.parts.recency < 1e-30 for one in found), "before the access"
        else:
            assert all(one.parts.recency > 0.99 for one in found if one.memory.access_count > 1)
    touched = {one.memory.id: one.memory.to_dict() for one in found}
    for memory, old in zip(seen(db), before, strict=True):
        assert memory.to_dict() == touched.get(memory.id, old)
        assert memory.updated_at.isoformat() == old["updated_at"]


def test_touch_in_a_unit(db: TenantSession, chat: Any) -> None:
    fill(db, chat, {"a": at(0)}, access_count=2**31 - 2)
    with pytest.raises(ZeroDivisionError), transaction(db):
        assert Memories.recall(db, embedding=at(0))[0].memory.access_count == 2**31 - 1
        raise ZeroDivisionError
    assert seen(db)[0].access_count == 2**31 - 2
    for _ in range(2):
        assert Memories.recall(db, embedding=at(0))[0].memory.access_count == 2**31 - 1


def test_threads_touch_each_memory_exactly(db: TenantSession, chat: Any) -> None:
    fill(db, chat, {f"tea {n}": at(n) for n in range(20)})
    rounds = 8

    def call(session: TenantSession, number: int) -> None:
        given: dict[str, Any] = {"embedding": at(0 if number % 2 else 20), "weights": BY_RELEVANCE}
        for _ in range(rounds):
            assert len(Memories.recall(session, **given, limit=20)) == 20

    in_threads(tenant_of(db), call)
    assert [memory.access_count for memory in seen(db)] == [THREADS * rounds] * 20


# Refused

BAD: dict[str, list[Any]] = {
    "weights": [
        *((1, 1), (1, 1, 1, 1), (), None, 5, "111", {1, 2, 3}, (0, 0, 0), [0, 0.0, -0.0]),
        *((-1, 1, 1), (1, float("nan"), 1), (1, 1, float("inf")), (1, 1, "1"), (True, 1, 1)),
        *((1, None, 1), (10**400, 1, 1), (1e300, 1, 1), (1, 1e-300, 1)),
    ],
    "half_life": [timedelta(), -HOUR, 5, 5.0, None, "1h"],
    "min_similarity": [-1.01, 1.01, float("nan"), float("inf"), 10**400, "0.5", True],
    "limit": [0, -1, 1001, "5", True, 5.0, None],
    "text": [5, b"tea", ["tea"], "x" * 1001],
    "embedding": [[1, 2], "123", [0, 0, 0], [float("nan"), 1, 1]],
    "user_id": ["x", 5],
    "persona_id": ["x", 5],
    "conversation_id": [5, b"x"],
    "memory_type": [5, "x" * 65],
}


@pytest.mark.parametrize("field", BAD)
def test_no_recall(db: TenantSession, chat: Any, field: str) -> None:
    fill(db, chat, {"tea": at(0)})
    for value in BAD[field]:
        with pytest.raises(InvalidValueError) as caught:
            Memories.recall(db, **{"embedding": at(0), "text": "tea", field: value})
        assert caught.value.field == field, value
        assert idle(db)
    for about in ({"text": "tea"}, {}):
        with pytest.raises(InvalidValueError, match=r"^min_similarity: needs an embedding"):
            Memories.recall(db, min_similarity=0.5, **about)  # type: ignore[arg-type]
    assert seen(db)[0].access_count == 0


@given(
    text=st.text(max_size=80) | st.text(alphabet="\"'-|&!<>()*:\\ orORaé🎉\ufe0f서", max_size=40)
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text(db: TenantSession, text: str) -> None:
    if Memories.count(db) == 0:
        fill(db, ConversationFactory(db=db).id, {"a é 🎉 서울": at(0), "b": at(3)})
    calls: list[Callable[[], list[Recalled]]] = [
        lambda: Memories.recall(db, text=text),
        lambda: Memories.recall(db, text=text, embedding=at(0)),
    ]
    for call in calls:
        assert {one.memory.content for one in call()} <= {"a é 🎉 서울", "b"}
        assert idle(db)
