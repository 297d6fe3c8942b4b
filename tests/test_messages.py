"""Messages: order and bookkeeping of appends, idempotency, reads, and what entities are."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from datetime import UTC, datetime
from itertools import chain
from random import Random
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import QueuePool, inspect, text

from database import (
    AlreadyExistsError,
    ConversationRepository,
    InvalidReferenceError,
    InvalidValueError,
    Message,
    NotFoundError,
    Role,
    SessionLocal,
    TenantSession,
    get_engine,
    transaction,
)
from database import MessageRepository as Messages
from database.repositories import appending, histories
from tests.counting import counted_round_trips, counted_statements
from tests.threads import THREADS, in_threads

Unit = Callable[[TenantSession], AbstractContextManager[None]]
alone_and_in_a_unit = pytest.mark.parametrize(
    "unit", [lambda _: nullcontext(), transaction], ids=["alone", "in a unit"]
)


class Chat:
    """A conversation, what is said in it, and what a session sees that knows nothing of it."""

    def __init__(self, db: TenantSession, **fields: Any) -> None:
        made = ConversationRepository.create(db, **fields)
        self.db, self.id, self.thread_id = db, made.id, made.thread_id
        self.tenant = made.tenant_id

    def say(self, content: object = "hello", **fields: Any) -> Message:
        return Messages.append(self.db, self.id, **said(content, **fields))

    def say_all(self, messages: Iterable[Any]) -> list[Message]:
        rows = (m if isinstance(m, dict) else said(m) for m in messages)
        return Messages.append_many(self.db, self.id, rows)

    def stored(self) -> list[Message]:
        with SessionLocal(tenant_id=self.tenant) as fresh:
            return Messages.history(fresh, self.id)

    def row(self) -> dict[str, Any]:
        with SessionLocal(tenant_id=self.tenant) as fresh:
            return ConversationRepository.require(fresh, self.id).to_dict()

    def counted(self) -> tuple[int, int, str | None]:
        row = self.row()
        return row["message_count"], row["last_position"], row["last_message"]


@pytest.fixture
def chat(db: TenantSession) -> Chat:
    return Chat(db)


def said(content: object = "hello", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": str(content), **fields}


def everything() -> dict[str, Any]:
    """Every field that an append takes, with what must be cleaned."""
    names = ("thinking", "data_format", "run_id", "tool_call_id", "model", "idempotency_key")
    return dict.fromkeys(names, "\0\ud800") | {
        "id": uuid4(),
        "created_at": datetime(2020, 2, 29, 12, 30, 15, 123456, tzinfo=UTC),
        "updated_at": datetime(2021, 3, 1, 1, 2, 3, 4, tzinfo=UTC),
        "role": "tool",
        "content": "nul \0, surrogate \ud800, 🙂",
        "extra_data": {"b\0": ["\0", "\ud800"], "a": [1.5, None, True, {}], "c": float("nan")},
        "data": bytes(range(256)),
        "input_tokens": 2**31 - 1,
        "output_tokens": 0,
    }


def contents(messages: Iterable[Message]) -> list[str]:
    return [message.content for message in messages]


def positions(messages: Iterable[Message]) -> list[int]:
    return [message.position for message in messages]


def fields_of(message: Message) -> dict[str, tuple[type, Any]]:
    values = {a.key: message.__dict__[a.key] for a in Message.__mapper__.column_attrs}
    return {key: (type(value), value) for key, value in values.items()}


def connections_in_use() -> int:
    pool = get_engine().pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


# Appending


@alone_and_in_a_unit
def test_appends_are_numbered_and_counted(chat: Chat, unit: Unit) -> None:
    before = chat.row()
    with unit(chat.db):
        made = [chat.say("a"), *chat.say_all("bcd")]
        made.append(Messages.create(chat.db, conversation_id=chat.id, **said("é" * 300)))
    assert positions(made) == positions(chat.stored()) == [1, 2, 3, 4, 5]
    assert contents(made) == contents(chat.stored()) == ["a", "b", "c", "d", "é" * 300]
    assert chat.counted() == (5, 5, "é" * 200)
    after = chat.row()
    assert after["version"] == before["version"] + 3, "a bulk append is one change"
    assert after["updated_at"] == made[-1].updated_at.isoformat() > before["updated_at"]
    assert chat.say_all([]) == []
    assert chat.row() == after, "nothing appended, nothing changed"


@alone_and_in_a_unit
@pytest.mark.parametrize("count", [0, 1, 2])
def test_extending_stores_what_appending_does(db: TenantSession, unit: Unit, count: int) -> None:
    rows = [everything() | {"id": None, "idempotency_key": None} for _ in range(count)]
    found = []
    for write in (Messages.extend, Messages.append_many):
        chat = Chat(db)
        with unit(db):
            write(db, chat.id, rows)
        own = {"id": None, "conversation_id": None}
        found.append(([fields_of(m) | own for m in chat.stored()], chat.counted()))
    assert found[0] == found[1]
    assert len(found[0][0]) == count


def test_extending_appends_no_key_twice(chat: Chat) -> None:
    keyed = said("once", idempotency_key="k")
    Messages.extend(chat.db, chat.id, [keyed, keyed, said("c")])
    Messages.extend(chat.db, chat.id, [keyed])
    assert contents(chat.stored()) == ["once", "c"]


def test_extending_is_all_or_nothing(db: TenantSession) -> None:
    chat = Chat(db)
    taken = chat.say("taken")
    many = [said(str(n)) for n in range(5_001)]
    with pytest.raises(AlreadyExistsError):
        Messages.extend(db, chat.id, [*many, said("last", id=taken.id)])
    assert [m.content for m in chat.stored()] == ["taken"]
    Messages.extend(db, chat.id, many)
    assert [m.position for m in chat.stored()] == [*range(1, 5_003)]


@alone_and_in_a_unit
@pytest.mark.parametrize("make", [everything, said])
def test_what_is_returned_is_what_is_stored(
    db: TenantSession, unit: Unit, make: Callable[[], dict[str, Any]]
) -> None:
    for how in ("append", "append_many", "create", "known key"):
        chat, message = Chat(db), make()
        with unit(db):
            if how == "append":
                made = Messages.append(db, chat.id, **message)
            elif how == "create":
                made = Messages.create(db, conversation_id=chat.id, **message)
            else:
                made = Messages.append_many(db, chat.id, [message])[0]
            if how == "known key" and make is everything:
                db.expunge_all()
                made = Messages.append(db, chat.id, **message | {"id": None})
        (read,) = chat.stored()
        assert fields_of(made) == fields_of(read)
        if make is everything:
            for name in ("id", "created_at", "updated_at"):
                assert getattr(read, name) == message[name]
            assert chat.row()["updated_at"] > message["updated_at"].isoformat()
            assert read.content == "nul \ufffd, surrogate \ufffd, 🙂"
            assert read.extra_data["b\ufffd"] == ["\ufffd", "\ufffd"]  # type: ignore[index]
            assert read.data == bytes(range(256))
            assert [k for k, (_, v) in fields_of(read).items() if v is None] == ["parent_id"]


@pytest.mark.parametrize(
    "value", [None, 0, False, "", [], {}, "null", 1.5, -(2**63), [None, [""]], {"": {"a": None}}]
)
def test_extra_data_is_any_json(chat: Chat, value: Any) -> None:
    chat.say(extra_data=value)
    chat.say_all([said(extra_data=value)])
    Messages.update(chat.db, chat.say(extra_data={"a": 1}).id, extra_data=value)
    found = [message.extra_data for message in chat.stored()]
    assert [(type(f), f) for f in found] == [(type(value), value)] * 3


@alone_and_in_a_unit
def test_20_mb(chat: Chat, unit: Unit) -> None:
    """More than a socket takes at once: client and server must not wait for each other."""
    content, data = "wörter " * 2_500_000, bytes(range(256)) * 10_000
    with unit(chat.db):
        chat.say(content)
        chat.say_all([said(data=data)])
        chat.say(data=data)
    found = chat.stored()
    assert len(content.encode()) == 20_000_000
    assert found[0].content == content
    assert found[1].data == found[2].data == data


@alone_and_in_a_unit
@pytest.mark.parametrize("key", [None, "key"])
def test_many_are_appended_all_or_none(chat: Chat, unit: Unit, key: str | None) -> None:
    good = [said(id=UUID(int=1)), said(idempotency_key=key), *map(said, range(5))]
    bad: list[dict[str, Any]] = [
        {"role": "nobody"},
        {"content": None},
        {"position": 7},
        {"updated_at": datetime(2020, 1, 1)},  # noqa: DTZ001
        {"created_at": datetime(2020, 1, 1)},  # noqa: DTZ001
        {"input_tokens": -1},
        {"extra_data": object()},
        {"data": "text"},
        {"idempotency_key": ""},
        {"bogus": 1},
        {"id": UUID(int=1)},
    ]
    with unit(chat.db):
        for late in bad:
            error = AlreadyExistsError if "id" in late else InvalidValueError
            with pytest.raises(error, match=rf"^{next(iter(late))}: "):
                chat.say_all([*good, said() | late])
        chat.say("goes on")
    assert contents(chat.stored()) == ["goes on"]
    assert chat.counted() == (1, 1, "goes on")


def test_more_than_a_batch(chat: Chat) -> None:
    rows: list[Any] = list(range(5_500))
    clash = said(id=uuid4())
    with pytest.raises(AlreadyExistsError):
        chat.say_all([clash, *rows, clash])
    assert chat.counted() == (0, 0, None)
    with transaction(chat.db):
        chat.say("before")
        with pytest.raises(AlreadyExistsError):
            chat.say_all([clash, *rows, clash])
    with counted_statements() as statements:
        assert positions(chat.say_all(iter(rows))) == list(range(2, 5_502))
    assert len(statements) == 2
    assert contents(chat.stored()) == ["before", *map(str, rows)]
    assert positions(chat.stored()) == list(range(1, 5_502))
    assert chat.counted() == (5_501, 5_501, "5499")


def test_threads_append_without_gap_or_double(chat: Chat) -> None:
    def append(db: TenantSession, number: int) -> list[int]:
        text_ = str(number)
        return [
            Messages.append(db, chat.id, role="user", content=text_).position for _ in range(1_000)
        ]

    returned = in_threads(chat.tenant, append)
    assert all(got == sorted(got) for got in returned)
    assert sorted(chain(*returned)) == positions(chat.stored()) == list(range(1, 16_001))
    by = contents(chat.stored())
    assert all(by[position - 1] == str(n) for n, got in enumerate(returned) for position in got)
    assert chat.counted()[:2] == (16_000, 16_000)


# Idempotency


@alone_and_in_a_unit
@pytest.mark.parametrize("how", [Messages.append, Messages.create], ids=["append", "create"])
def test_a_known_key_appends_nothing(chat: Chat, unit: Unit, how: Callable[..., Message]) -> None:
    db, other = chat.db, Chat(chat.db)
    with unit(db):
        first = how(db, conversation_id=chat.id, **said("first", idempotency_key="k\0"))
        Messages.deactivate(db, chat.id)
        before = ConversationRepository.require(db, chat.id).to_dict()
        again = how(db, conversation_id=chat.id, **said("again", idempotency_key="k\0"))
        assert again is first
        assert (again.content, again.is_active) == ("first", False)
        assert ConversationRepository.require(db, chat.id).to_dict() == before
        how(db, conversation_id=other.id, **said("other", idempotency_key="k\0"))
    assert contents(other.stored()) == ["other"]
    assert chat.counted() == (0, 1, None)


@pytest.mark.parametrize("many", [False, True])
def test_one_key_from_many_threads_is_one_message(chat: Chat, *, many: bool) -> None:
    def append(db: TenantSession, number: int) -> UUID:
        message = said(number, idempotency_key="one")
        if many:
            return Messages.append_many(db, chat.id, [message])[0].id
        return Messages.append(db, chat.id, **message).id

    returned = in_threads(chat.tenant, append)
    assert returned == [message.id for message in chat.stored()] * THREADS
    assert chat.counted()[:2] == (1, 1)


def test_key_whose_message_is_deleted_meanwhile_is_free_again(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = chat.say("first", idempotency_key="key")
    real_read = histories.read_messages

    def read_too_late(*arguments: Any) -> list[Message]:
        with SessionLocal(tenant_id=chat.tenant) as somebody_else:
            Messages.delete(somebody_else, first.id)
        return real_read(*arguments)

    monkeypatch.setattr(appending, "read_messages", read_too_late)
    again = chat.say("again", idempotency_key="key")
    assert (again.content, again.position) == ("again", 2)
    assert contents(chat.stored()) == ["again"]


@alone_and_in_a_unit
def test_known_and_doubled_keys_in_a_bulk(chat: Chat, unit: Unit) -> None:
    b = {"idempotency_key": "b"}
    with unit(chat.db):
        old = chat.say("old", idempotency_key="a")
        new = said("new", idempotency_key="a")
        made = chat.say_all([said("b1", **b), "x", new, said("b2", **b), "y"])
        assert contents(made) == ["b1", "x", "old", "b1", "y"]
        assert made[2] is old
        assert chat.say_all([said("b3", **b)]) == [made[0]]
        one = said("one", id=uuid4(), idempotency_key="c")
        assert contents(chat.say_all([one, one | {"content": "two"}])) == ["one", "one"]
    assert contents(chat.stored()) == ["old", "b1", "x", "y", "one"]
    assert positions(chat.stored()) == [1, 2, 3, 4, 5]
    assert chat.counted() == (5, 5, "one")


def test_more_keys_and_ids_than_a_statement_has_parameters(chat: Chat) -> None:
    made = chat.say_all(said(idempotency_key=str(n % 10)) for n in range(66_000))
    assert len({message.id for message in made}) == chat.counted()[0] == 10
    assert Messages.deactivate(chat.db, chat.id, [uuid4() for _ in range(66_000)]) == 0


# Which conversation


def test_a_conversation_goes_by_id_or_thread(chat: Chat) -> None:
    db, named = chat.db, Chat(chat.db, thread_id="tü\0")
    shaped, disguised = Chat(db, thread_id=str(uuid4())), Chat(db, thread_id=str(named.id))
    names: list[tuple[UUID | str, Chat]] = [
        (chat.id, chat),
        (str(chat.id).upper(), chat),
        ("tü\0", named),
        (named.id, named),
        (shaped.thread_id, shaped),
        (str(shaped.id), shaped),
        (str(named.id), disguised),
        (disguised.id, disguised),
    ]
    for name, meant in names:
        one = Messages.append(db, name, role="user", content=str(name))
        two = Messages.append_many(db, name, [said(name)])[0]
        assert one.conversation_id == two.conversation_id == meant.id
        assert Messages.window(db, name, one.position, 99) == [one, two]
        assert Messages.history(db, name, limit=1) == [Messages.get_last(db, name)] == [two]
        assert list(Messages.iterate(db, name))[-1].id == two.id
        assert Messages.deactivate(db, name, [two.id]) == Messages.restore(db, name) == 1


def test_an_unknown_or_foreign_conversation(chat: Chat, other: TenantSession) -> None:
    mine = chat.say("mine")
    Chat(other, id=UUID(int=0))
    asked: list[tuple[TenantSession, UUID | str]] = [
        *((chat.db, name) for name in (uuid4(), "nothing", "")),
        *((other, name) for name in (chat.id, chat.thread_id, "nothing", str(uuid4()))),
    ]
    for db, name in asked:
        for row in (said(), said(idempotency_key="k")):
            for write in (
                lambda d, n, r: Messages.append(d, n, **r),
                lambda d, n, r: Messages.append_many(d, n, [r]),
                lambda d, n, r: Messages.create_many(d, [{"conversation_id": n, **r}]),
            ):
                with pytest.raises(InvalidReferenceError, match=r"^conversation_id: "):
                    write(db, name, row)
        assert Messages.history(db, name) == Messages.window(db, name, 0, 9) == []
        assert list(Messages.iterate(db, name)) == []
        assert Messages.get_last(db, name) is None
        for change in (Messages.deactivate, Messages.restore, Messages.purge, Messages.clear):
            assert change(db, name) == 0
        assert Messages.bodies(db, name) == []
        assert Messages.pop_last(db, name) is None
        assert connections_in_use() == 0
    assert Messages.get(other, mine.id) is None
    assert not Messages.delete(other, mine.id)
    with pytest.raises(NotFoundError):
        Messages.update(other, mine.id, content="yours")
    assert chat.counted() == (1, 1, "mine")


@pytest.mark.parametrize("value", [-1, True, "1", 1.0, 2**63, 10**30])
def test_numbers_are_checked(chat: Chat, value: Any) -> None:
    where = chat.db, chat.id
    calls: dict[str, Callable[[], object]] = {
        "limit": lambda: Messages.history(*where, limit=value),
        "before": lambda: Messages.history(*where, before=value),
        "after": lambda: Messages.history(*where, after=value),
        "start": lambda: Messages.window(*where, value, 5),
        "end": lambda: Messages.window(*where, 5, value),
        "batch_size": lambda: list(Messages.iterate(*where, batch_size=value)),
        "input_tokens": lambda: chat.say(input_tokens=value),
    }
    for field, call in calls.items():
        with pytest.raises(InvalidValueError, match=rf"^{field}: "):
            call()


def test_other_arguments_are_checked(chat: Chat) -> None:
    where = chat.db, chat.id
    number: Any = 5
    calls: list[tuple[str, Callable[[], object]]] = [
        ("limit", lambda: Messages.history(*where, limit=0)),
        ("batch_size", lambda: list(Messages.iterate(*where, batch_size=0))),
        ("conversation_id", lambda: Messages.history(chat.db, number)),
        ("conversation_id", lambda: Messages.create(chat.db, **said())),
        ("id", lambda: Messages.deactivate(*where, ["no id"])),
    ]
    for field, call in calls:
        with pytest.raises(InvalidValueError, match=rf"^{field}: "):
            call()
    assert Messages.history(*where, before=2**62, after=0, limit=2**62) == []


# Reading


place = st.integers(0, 15)
optional = st.none() | place


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(hidden=st.lists(st.booleans(), max_size=12), bounds=st.tuples(*[optional] * 3, place, place))
def test_reads_are_slices_of_a_list(db: TenantSession, hidden: list[bool], bounds: Any) -> None:
    chat = Chat(db)
    made = chat.say_all(range(len(hidden)))
    Messages.deactivate(db, chat.id, [m.id for m, hide in zip(made, hidden, strict=True) if hide])
    shown = [number for number, hide in enumerate(hidden, 1) if not hide]
    limit, before, after, start, end = bounds
    limit = limit or None
    expected = [
        p
        for p in shown
        if (-1 if after is None else after) < p < (99 if before is None else before)
    ]
    found = Messages.history(db, chat.id, limit=limit, before=before, after=after)
    assert positions(found) == (expected if limit is None else expected[-limit:])
    window = Messages.window(db, chat.id, start, end)
    assert positions(window) == [p for p in shown if start <= p <= end]
    assert positions(Messages.iterate(db, chat.id, batch_size=3)) == shown
    last = Messages.get_last(db, chat.id)
    assert (last and last.position) == (shown[-1] if shown else None)


@alone_and_in_a_unit
def test_iterate_holds_a_batch_in_memory(chat: Chat, unit: Unit) -> None:
    chat.say_all("x" * 10_000 for _ in range(1_000))
    with unit(chat.db), counted_statements() as statements:
        tracemalloc.start()
        try:
            found = Messages.iterate(chat.db, chat.id, batch_size=50)
            assert sum(len(message.content) for message in found) == 10_000_000
            assert tracemalloc.get_traced_memory()[1] < 3_000_000
        finally:
            tracemalloc.stop()
    assert len(statements) == 1


@pytest.mark.parametrize("state", ["alone", "in a unit", "after the caller's read"])
def test_iterate_while_the_session_writes(chat: Chat, state: str) -> None:
    chat.say_all(range(30))
    seen = []
    with transaction(chat.db) if state == "in a unit" else nullcontext():
        if state == "after the caller's read":
            chat.db.execute(text("SELECT 1"))
        for message in Messages.iterate(chat.db, chat.id, batch_size=7):
            seen.append(message.content)
            Messages.update(chat.db, message.id, content=f"{message.content}!")
            chat.say("later")
    assert seen == [str(n) for n in range(30)]
    assert contents(chat.stored()) == [f"{n}!" for n in range(30)] + ["later"] * 30
    assert connections_in_use() == 0


def test_iterate_holds_a_connection_until_it_is_closed(chat: Chat) -> None:
    chat.say_all(range(50))
    with closing(Messages.iterate(chat.db, chat.id, batch_size=5)) as messages:
        assert connections_in_use() == 0
        assert next(messages).content == "0"
        assert (connections_in_use(), chat.db.in_transaction()) == (1, False)
    assert connections_in_use() == 0
    assert len(list(Messages.iterate(chat.db, chat.id, batch_size=5))) == 50
    assert connections_in_use() == 0


def test_iterate_in_a_unit_uses_its_connection(chat: Chat) -> None:
    chat.say_all(range(50))
    with transaction(chat.db):
        with closing(Messages.iterate(chat.db, chat.id, batch_size=5)) as messages:
            next(messages).content = "changed"
            assert chat.say("mine").position == 51
            assert connections_in_use() == 1
        assert not chat.db.scalars(text("SELECT name FROM pg_cursors")).all()
        ends = [m.content for m in Messages.iterate(chat.db, chat.id) if m.position in {1, 51}]
        assert ends == ["changed", "mine"]


@pytest.mark.parametrize("undone", [TenantSession.rollback, TenantSession.begin_nested])
def test_iterate_closed_late_disturbs_nobody(chat: Chat, undone: Callable[..., Any]) -> None:
    """An exception's traceback keeps the iterator alive beyond the unit that it ended."""
    chat.say_all(range(50))
    savepoint = undone is TenantSession.begin_nested
    with transaction(chat.db) if savepoint else nullcontext():
        with pytest.raises(ZeroDivisionError), transaction(chat.db):
            messages = Messages.iterate(chat.db, chat.id, batch_size=5)
            next(messages)
            raise ZeroDivisionError
        with counted_round_trips() as trips, transaction(chat.db):
            chat.say("before")
            messages.close()
            chat.say("after")
    if not savepoint:
        assert trips.count == 3, "the connection was left alone"
    assert contents(chat.stored())[50:] == ["before", "after"]


# Changing


def test_deactivate_restore_purge(chat: Chat) -> None:
    db = chat.db
    _, b, c = chat.say_all("abc")
    foreign = Chat(db).say()
    before = chat.row()
    assert Messages.deactivate(db, chat.id, [c.id, str(b.id), c.id, foreign.id, uuid4()]) == 2
    assert contents(chat.stored()) == ["a"]
    assert chat.counted() == (1, 3, "a")
    after = chat.row()
    assert after["version"] > before["version"]
    assert after["updated_at"] > before["updated_at"]
    assert Messages.deactivate(db, chat.id, [c.id]) == Messages.deactivate(db, chat.id, []) == 0
    assert chat.row() == after, "nothing hidden, nothing changed"
    assert Messages.restore(db, chat.id, [b.id]) == 1
    assert chat.counted() == (2, 3, "b")
    assert chat.say("d").position == 4
    assert Messages.purge(db, chat.id) == 1
    assert Messages.purge(db, chat.id) == Messages.restore(db, chat.id) == 0
    assert positions(chat.stored()) == [1, 2, 4]
    assert Messages.deactivate(db, chat.id) == 3
    assert chat.counted() == (0, 4, None)
    assert Messages.restore(db, chat.id) == 3
    assert chat.counted() == (3, 4, "d")


@alone_and_in_a_unit
def test_pop_last_and_clear(chat: Chat, unit: Unit) -> None:
    db = chat.db
    _, _, c, d = chat.say_all([said(n, data=n.encode(), role="tool") for n in "abcd"])
    Messages.deactivate(db, chat.id, [d.id])
    expected = fields_of(c)
    with unit(db):
        popped = Messages.pop_last(db, chat.id)
        assert popped
        assert fields_of(popped) == expected
        assert popped not in db
        assert (Messages.pop_last(db, chat.thread_id, before=2) or d).content == "a"
        assert Messages.pop_last(db, chat.id, before=2) is None
    assert contents(chat.stored()) == ["b"]
    assert chat.counted() == (1, 4, "b")
    with suppress(ZeroDivisionError), unit(db), transaction(db):
        assert Messages.pop_last(db, chat.id)
        assert Messages.clear(db, chat.id) == 1
        raise ZeroDivisionError
    assert contents(chat.stored()) == ["b"]
    with unit(db):
        assert Messages.clear(db, chat.id) == 2, "the hidden one too"
        assert Messages.clear(db, chat.id) == 0
    assert Messages.restore(db, chat.id) == 0
    assert chat.counted() == (0, 4, None)
    assert chat.say("e").position == 5
    assert connections_in_use() == 0


def test_threads_pop_each_message_once(chat: Chat) -> None:
    chat.say_all(map(str, range(THREADS * 2)))
    popped = in_threads(
        chat.tenant, lambda db, _: [Messages.pop_last(db, chat.id) for _ in range(3)]
    )
    found = [message.content for messages in popped for message in messages if message]
    assert sorted(map(int, found)) == [*range(THREADS * 2)]
    assert chat.counted() == (0, THREADS * 2, None)


def test_update_and_delete(chat: Chat) -> None:
    db, (a, b) = chat.db, chat.say_all("ab")
    version = chat.row()["version"]
    assert Messages.update(db, str(b.id), content="B" * 300, role="tool") is b
    assert (b.content, b.role, b.position) == ("B" * 300, Role.TOOL, 2)
    assert chat.counted() == (2, 2, "B" * 200)
    assert Messages.update(db, a.id, model="m", data=b"\0").data == b"\0"
    assert chat.row()["version"] == version + 1, "only the new content changed the conversation"
    for field in ("position", "conversation_id", "is_active", "parent_id", "id"):
        with pytest.raises(InvalidValueError, match=rf"^{field}: "):
            Messages.update(db, a.id, **{field: getattr(b, field)})
    assert list(map(fields_of, chat.stored())) == list(map(fields_of, [a, b]))
    gone = b.id
    assert Messages.delete(db, gone)
    assert not Messages.delete(db, gone)
    assert chat.counted() == (1, 2, "a")
    assert chat.say("c").position == 3, "positions are not given twice"
    for fields in ({"content": "x"}, {"model": "x"}):
        with pytest.raises(NotFoundError):
            Messages.update(db, gone, **fields)


CHANGES: list[Callable[[TenantSession, UUID, list[UUID]], object]] = [
    lambda db, id_, _: Messages.append(db, id_, **said("new")),
    lambda db, id_, _: Messages.append(db, id_, **said(idempotency_key="known")),
    lambda db, id_, _: Messages.append_many(db, id_, [said("a"), said("b")]),
    lambda db, id_, _: Messages.extend(db, id_, [said("a")]),
    lambda db, id_, _: Messages.extend(db, id_, [said("a"), said("b")]),
    lambda db, _, shown: Messages.update(db, shown[0], content="changed"),
    lambda db, _, shown: Messages.update(db, shown[-1], model="m"),
    lambda db, _, shown: Messages.delete(db, shown[0]),
    Messages.deactivate,
    lambda db, id_, _: Messages.restore(db, id_),
    lambda db, id_, _: Messages.purge(db, id_),
    lambda db, id_, _: Messages.pop_last(db, id_),
    lambda db, id_, _: Messages.clear(db, id_),
]


def test_changes_of_all_kinds_at_once(chat: Chat) -> None:
    """They wait for one another at the conversation: none dies of a deadlock."""

    def change(db: TenantSession, number: int) -> None:
        chosen = Random(number)
        for _ in range(15):
            shown = [message.id for message in Messages.history(db, chat.id, limit=4)]
            with suppress(NotFoundError):
                chosen.choice(CHANGES)(db, chat.id, shown or [uuid4()])

    in_threads(chat.tenant, change)
    left = chat.stored()
    count, last_position, preview = chat.counted()
    assert (count, preview) == (len(left), left[-1].content if left else None)
    assert len(set(positions(left))) == len(left)
    assert last_position >= max(positions(left), default=0)


def test_create_many_goes_to_many_conversations(chat: Chat) -> None:
    other = Chat(chat.db)
    items = [{"conversation_id": c.id, **said(n)} for n, c in enumerate([chat, other] * 2)]
    assert positions(Messages.create_many(chat.db, items)) == [1, 1, 2, 2]
    assert contents(other.stored()) == ["1", "3"]
    with pytest.raises(InvalidReferenceError):
        Messages.create_many(chat.db, [*items, {"conversation_id": uuid4(), **said()}])
    assert chat.counted() == (2, 2, "2")


# Entities


@pytest.mark.parametrize("how", ["append", "append_many", "history"])
def test_changed_entities_are_stored(chat: Chat, how: str) -> None:
    made = chat.say_all("b")[0] if how == "append_many" else chat.say("b")
    if how == "history":
        chat.db.expunge_all()
        (made,) = Messages.history(chat.db, chat.id)
    assert inspect(made).persistent
    made.content, made.extra_data = "changed", {"n": 1}
    chat.db.commit()
    (found,) = chat.stored()
    assert (found.content, found.extra_data, found.id) == ("changed", {"n": 1}, made.id)


def test_history_brings_entities_up_to_date(chat: Chat) -> None:
    db, made = chat.db, chat.say("a")
    with SessionLocal(tenant_id=chat.tenant) as session:
        Messages.update(session, made.id, content="b", thinking="hm")
    assert made.content == "a"
    assert Messages.history(db, chat.id) == [made]
    assert (made.content, made.thinking) == ("b", "hm")
    db.expire(made)
    Messages.history(db, chat.id)
    assert not inspect(made).expired_attributes
    with counted_statements() as statements:
        assert made.content == "b"
    assert statements == []
    made.content = "local"
    assert contents(Messages.history(db, chat.id)) == ["local"], "as one writes, one reads"
    assert not db.is_modified(made)
    db.rollback()
    assert contents(Messages.history(db, chat.id)) == ["b"]
    assert fields_of(made) == fields_of(chat.stored()[0])


def test_pending_objects_are_flushed_before_a_read(chat: Chat) -> None:
    with transaction(chat.db):
        pending = Message(conversation_id=chat.id, position=1, role=Role.USER, content="pending")
        chat.db.add(pending)
        assert Messages.history(chat.db, chat.id) == [pending]
    assert contents(chat.stored()) == ["pending"]


@pytest.mark.parametrize("field", ["last_position", "message_count", "version"])
def test_what_appends_count_on_is_not_the_callers(db: TenantSession, field: str) -> None:
    conversation = ConversationRepository.create(db)
    Messages.append(db, conversation.id, role="user", content="one")
    zero: dict[str, Any] = {field: 0}
    for key in (conversation.id, conversation.thread_id):
        with pytest.raises(InvalidValueError, match=field):
            ConversationRepository.update(db, key, **zero)
    assert Messages.append(db, conversation.id, role="user", content="two").position == 2
