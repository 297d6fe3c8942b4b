"""Memories: added, numbered, changed, and gone with what they belong to."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from threading import Thread
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from database import (
    AlreadyExistsError,
    ConversationRepository,
    InvalidReferenceError,
    InvalidValueError,
    MessageRepository,
    NotFoundError,
    PersonaRepository,
    SessionLocal,
    TenantSession,
    UserRepository,
    transaction,
)
from database import MemoryRepository as Memories
from database.repositories import remembering
from tests.counting import counted_round_trips, counted_statements
from tests.factories import (
    ConversationFactory,
    MemoryFactory,
    MessageFactory,
    PersonaFactory,
    UserFactory,
)
from tests.test_conformance import idle, tenant_of
from tests.threads import THREADS, in_threads
from tests.vectors import embedding_of, seen

OLD = datetime(2020, 2, 3, 4, 5, 6, 789, tzinfo=UTC)


pytestmark = pytest.mark.usefixtures("short_vectors")


@pytest.fixture
def chat(db: TenantSession) -> Any:
    return ConversationFactory(db=db).id


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembering, "_MOST_ROWS", 10)


def items(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"content": f"c{n}", "embedding": [1, n, 0]} | fields for n in range(count)]


# Adding


def test_a_memory_has_every_field(db: TenantSession, chat: Any) -> None:
    user, persona = UserFactory(db=db).id, PersonaFactory(db=db).id
    message = MessageFactory(db=db, conversation_id=chat)
    given: dict[str, Any] = {
        "id": uuid4(),
        "content": "likes tea \x00",
        "importance": 0.25,
        "memory_type": "fact",
        "user_id": user,
        "persona_id": persona,
        "metadata": {"a": [None, {"b": "é\x00"}]},
        "first_message_id": message.id,
        "first_position": 1,
        "last_position": 11,
        "message_count": 9,
        "sequence": 5,
        "created_at": OLD,
        "last_accessed_at": OLD + timedelta(days=1),
        "access_count": 4,
    }
    made = Memories.add(db, chat, embedding=[0.5, -2, 0], **given)
    (found,) = seen(db)
    shown = found.to_dict()
    assert made.to_dict() == shown
    expected = given | {"content": "likes tea \ufffd", "metadata": {"a": [None, {"b": "é\ufffd"}]}}
    assert {name: getattr(found, f"{name}_" if name == "metadata" else name) for name in given} == (
        expected
    )
    assert (found.conversation_id, found.tenant_id) == (chat, tenant_of(db))
    assert abs(found.updated_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert idle(db)


def test_defaults(db: TenantSession, chat: Any) -> None:
    made = [
        Memories.add(db, chat, content="a"),
        Memories.add(db, chat, content="a", metadata=None, user_id=None, embedding=None),
        *Memories.add_many(db, chat, [{"content": "a"}, {"content": "a", "user_id": None}]),
    ]
    for memory, found in zip(made, seen(db), strict=True):
        assert memory.to_dict() == found.to_dict()
        assert (found.importance, found.metadata_, found.access_count) == (0.5, {}, 0)
        assert found.memory_type is None
        assert found.user_id is None
        assert found.first_position is None
        assert found.created_at == found.last_accessed_at
        assert embedding_of(db, found.id) is None


class Elsewhere(tzinfo):
    """A time zone of a library that orjson does not know."""

    def utcoffset(self, _: datetime | None) -> timedelta:
        return timedelta(hours=5, minutes=30)

    def dst(self, _: datetime | None) -> timedelta:
        return timedelta()

    def tzname(self, _: datetime | None) -> str:
        return "elsewhere"


def test_any_time_zone(db: TenantSession, chat: Any) -> None:
    at = OLD.astimezone(Elsewhere())
    assert Memories.add(db, chat, content="a", created_at=at).created_at == OLD
    assert seen(db)[0].created_at == OLD


def test_numbers_continue(db: TenantSession, chat: Any) -> None:
    for n in range(1, 4):
        assert Memories.next_sequence(db, chat) == n
        assert Memories.add(db, chat, content="a").sequence == n
    assert [m.sequence for m in Memories.add_many(db, chat, iter(items(3)))] == [4, 5, 6]
    with transaction(db):
        assert Memories.add(db, chat, content="a").sequence == 7
        assert Memories.add(db, chat, content="a").sequence == 8
    Memories.delete(db, seen(db)[-1].id)
    assert Memories.add(db, chat, content="a").sequence == 9
    assert Memories.add(db, ConversationFactory(db=db).id, content="a").sequence == 1


def test_an_undone_number_is_given_again(db: TenantSession, chat: Any) -> None:
    with pytest.raises(ZeroDivisionError), transaction(db):
        Memories.add(db, chat, content="a")
        raise ZeroDivisionError
    with pytest.raises(InvalidReferenceError):
        Memories.add(db, chat, content="a", user_id=uuid4())
    assert Memories.add(db, chat, content="a").sequence == 1


def test_given_numbers(db: TenantSession, chat: Any) -> None:
    imported = [{"content": "a", "sequence": n} for n in (7, 3, 9)]
    assert [m.sequence for m in Memories.add_many(db, chat, imported)] == [7, 3, 9]
    assert Memories.add(db, chat, content="a", sequence=5).sequence == 5
    assert Memories.add(db, chat, content="a").sequence == 10
    for again in ([{"content": "a", "sequence": 3}], [{"content": "a", "sequence": 20}] * 2):
        with pytest.raises(AlreadyExistsError) as caught:
            Memories.add_many(db, chat, again)
        assert caught.value.key == "conversation_id, sequence"
    with pytest.raises(InvalidValueError, match=r"^sequence: .* all .* none"):
        Memories.add_many(db, chat, [*imported, {"content": "a"}])
    assert [m.sequence for m in seen(db)] == [3, 5, 7, 9, 10]


def test_threads_number_without_gap_or_double(db: TenantSession, chat: Any) -> None:
    def add(session: TenantSession, number: int) -> list[int]:
        one = [Memories.add(session, chat, content="a").sequence for _ in range(4)]
        return one + [m.sequence for m in Memories.add_many(session, chat, items(number % 4))]

    given = sorted(n for made in in_threads(tenant_of(db), add) for n in made)
    assert given == list(range(1, len(given) + 1)) == [m.sequence for m in seen(db)]
    assert len(given) == 4 * THREADS + sum(n % 4 for n in range(THREADS))


@pytest.mark.parametrize("count", [1, 10, 2000])
def test_adding_is_one_round_trip(db: TenantSession, chat: Any, count: int) -> None:
    Memories.add(db, chat, content="a", embedding=[1, 0, 0])  # looks for the dimensions
    with counted_statements() as statements, counted_round_trips() as trips:
        Memories.add_many(db, chat, items(count))
    assert (len(statements), trips.count) == (1, 1)
    with counted_statements() as statements, counted_round_trips() as trips:
        Memories.add(db, chat, content="a", embedding=[1, 0, 0])
        assert Memories.add_many(db, chat, []) == []
    assert (len(statements), trips.count) == (1, 1)


def test_batches(db: TenantSession, chat: Any, small_batches: None) -> None:
    made = Memories.add_many(db, chat, items(35))
    assert [(m.sequence, m.content) for m in made] == [(n + 1, f"c{n}") for n in range(35)]
    assert [m.to_dict() for m in made] == [m.to_dict() for m in seen(db)]
    with transaction(db):
        with pytest.raises(InvalidReferenceError, match="user_id"):
            Memories.add_many(db, chat, [*items(25), {"content": "a", "user_id": uuid4()}])
        Memories.add(db, chat, content="after")
    assert [m.sequence for m in seen(db)] == list(range(1, 37))
    assert idle(db)


def test_a_conversation_by_its_thread(db: TenantSession) -> None:
    chat = ConversationRepository.create(db, thread_id="thread 7")
    assert Memories.add(db, "thread 7", content="a").conversation_id == chat.id
    assert Memories.add(db, str(chat.id), content="a").sequence == 2
    assert len(Memories.recent(db, "thread 7")) == Memories.clear(db, "thread 7") == 2
    for call in (Memories.recent, lambda db, id_: list(Memories.covers(db, id_, [uuid4()]))):
        assert call(db, "thread 8") == []


# Refused


def test_references(db: TenantSession, other: TenantSession, chat: Any) -> None:
    made = Memories.add(db, chat, content="a")
    targets: dict[str, Any] = {
        "user_id": UserFactory,
        "persona_id": PersonaFactory,
        "first_message_id": MessageFactory,
    }
    for field, factory in targets.items():
        for id_ in (uuid4(), factory(db=other).id):
            for call in (
                lambda given: Memories.add(db, chat, content="b", **given),
                lambda given: Memories.add_many(db, chat, [*items(2), {"content": "b"} | given]),
                lambda given: Memories.update(db, made.id, **given),
            ):
                with pytest.raises(InvalidReferenceError) as caught:
                    call({field: id_})
                assert caught.value.field == field
    for id_ in (uuid4(), "no thread", ConversationFactory(db=other).id):
        with pytest.raises(InvalidReferenceError, match="conversation_id"):
            Memories.add(db, id_, content="b")
    assert [m.to_dict() for m in seen(db)] == [made.to_dict()]
    assert idle(db)


BAD: dict[str, list[Any]] = {
    "importance": [-0.01, 1.01, float("nan"), float("inf"), 10**400, "0.5", True, None],
    "memory_type": ["x" * 65, 5],
    "content": [None, 5],
    "user_id": ["x", 5],
    "metadata": [None, [], "a", {1: 2}],
    "sequence": [0, -1, 1.5, 2**63],
    "access_count": [-1, 2**31],
    "message_count": [-1],
    "created_at": [datetime(2020, 1, 1), "2020"],  # noqa: DTZ001
    "conversation_id": [uuid4()],
    "updated_at": [OLD],
    "tenant_id": ["other"],
    "colour": ["red"],
}


@pytest.mark.parametrize("field", BAD)
def test_no_value(db: TenantSession, chat: Any, field: str) -> None:
    for value in BAD[field]:
        with pytest.raises(InvalidValueError) as caught:
            Memories.add_many(db, chat, [{"content": "a"}, {"content": "a", field: value}])
        assert caught.value.field == field
        assert idle(db)
    assert seen(db) == []


@pytest.mark.parametrize("given", [None, 5, "text", [None], [5], ["text"], [{}]])
def test_no_items(db: TenantSession, chat: Any, given: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^(items|content): "):
        Memories.add_many(db, chat, given)
    assert Memories.next_sequence(db, chat) == 1


@pytest.mark.parametrize("first", [(3, None), (None, 3), (3, 2), (0, 2), (-1, 1)])
def test_no_range(db: TenantSession, chat: Any, first: Any) -> None:
    with pytest.raises(InvalidValueError):
        Memories.add(db, chat, content="a", first_position=first[0], last_position=first[1])
    assert seen(db) == []


# Changed, and gone


def test_update(db: TenantSession, chat: Any) -> None:
    made = Memories.add(db, chat, content="a", metadata={"a": 1})
    Memories.update(db, made.id, content="b", metadata={"b": 1}, importance=1, memory_type=None)
    (found,) = seen(db)
    assert (found.content, found.metadata_, found.importance) == ("b", {"b": 1}, 1)
    for field in ("sequence", "conversation_id"):
        with pytest.raises(InvalidValueError, match=f"^{field}: "):
            Memories.update(db, made.id, **{field: getattr(made, field)})
    with pytest.raises(NotFoundError):
        Memories.update(db, uuid4(), embedding=[1, 0, 0])


def test_what_goes_with_what(db: TenantSession, chat: Any) -> None:
    message = MessageFactory(db=db, conversation_id=chat).id
    user, persona = UserFactory(db=db).id, PersonaFactory(db=db).id
    refers: dict[str, Any] = {"first_message_id": message, "persona_id": persona}
    Memories.add(db, chat, content="kept", **refers)
    Memories.add(db, chat, content="the user's", user_id=user, **refers)
    assert PersonaRepository.delete(db, persona)
    assert MessageRepository.delete(db, message)
    assert [(m.persona_id, m.first_message_id) for m in seen(db)] == [(None, None)] * 2
    assert UserRepository.delete(db, user)
    assert [m.content for m in seen(db)] == ["kept"]
    assert ConversationRepository.delete(db, chat)
    assert seen(db) == []


def test_clear_begins_anew(db: TenantSession, chat: Any) -> None:
    Memories.add_many(db, chat, items(3))
    kept = MemoryFactory(db=db)
    assert Memories.clear(db, chat) == 3
    assert Memories.clear(db, chat) == Memories.clear(db, uuid4()) == 0
    assert Memories.add(db, chat, content="a").sequence == 1
    assert {m.id for m in seen(db)} >= {kept.id}


def test_clear_takes_what_is_being_added(db: TenantSession, chat: Any) -> None:
    cleared = []

    def clear() -> None:
        with SessionLocal(tenant_id=tenant_of(db)) as session:
            cleared.append(Memories.clear(session, chat))

    Memories.add(db, chat, content="a")
    with transaction(db):
        Memories.add(db, chat, content="b")
        thread = Thread(target=clear)
        thread.start()
        waiting = text(
            "SELECT count(*) FROM pg_locks WHERE NOT granted"
            " AND transactionid = pg_current_xact_id()::xid"
        )
        while not db.scalar(waiting):
            thread.join(0.01)
            assert thread.is_alive()
    thread.join()
    assert cleared == [2]
    assert [Memories.add(db, chat, content="c").sequence for _ in range(3)] == [1, 2, 3]
