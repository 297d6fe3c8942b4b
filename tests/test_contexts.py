"""Contexts: stored by source, one and many, read, listed and deleted."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from database import (
    Context,
    InvalidValueError,
    SessionLocal,
    TenantSession,
    TransientError,
    User,
    UserRepository,
    configure,
    transaction,
)
from database import ContextRepository as Contexts
from database.repositories import storing
from tests.counting import counted_round_trips, counted_statements
from tests.test_conformance import idle, tenant_of
from tests.threads import THREADS, in_threads

LATER = datetime(2100, 1, 1, tzinfo=UTC)
Unit = Callable[[TenantSession], AbstractContextManager[None]]
alone_and_in_a_unit = pytest.mark.parametrize(
    "unit", [lambda _: nullcontext(), transaction], ids=["alone", "in a unit"]
)


@pytest.fixture
def user(db: TenantSession) -> User:
    return UserRepository.create(db)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(storing, "_MOST_ROWS", 10)
    return 10


def seen(db: TenantSession, **filters: Any) -> list[dict[str, Any]]:
    """What another session of the tenant finds, the newest first."""
    with SessionLocal(tenant_id=tenant_of(db)) as fresh:
        return [row.to_dict() for row in Contexts.list(fresh, limit=1000, **filters)]


def item(source: object, content: Any = 1, **fields: Any) -> dict[str, Any]:
    fields = {"context_type": "note", "content": content} | fields
    return fields | {"source_identifier": None if source is None else str(source)}


# One


@alone_and_in_a_unit
def test_a_source_is_stored_in_place(db: TenantSession, user: User, unit: Unit) -> None:
    with unit(db):
        first = Contexts.store(
            db,
            user.id,
            "note",
            {"a": 1},
            source_identifier="s",
            metadata={"m": 1},
            expires_at=LATER,
        )
        before = first.to_dict()
        assert first.inserted is True
        again = Contexts.store(db, str(user.id), "note", [2], source_identifier="s")
    assert again is first
    assert again.inserted is False
    (found,) = seen(db)
    assert found == again.to_dict()
    changed: dict[str, Any] = {"content": [2], "metadata": {}, "expires_at": None}
    assert found == before | changed | {"updated_at": again.updated_at.isoformat()}
    assert found["updated_at"] > before["updated_at"]
    assert (again.user_id, again.tenant_id) == (user.id, tenant_of(db))


def test_only_user_type_and_source_together_meet(db: TenantSession, user: User) -> None:
    other = UserRepository.create(db)
    keys = [(u, t, s) for u in (user, other) for t in "ab" for s in ("x", "X", "", None, None)]
    for u, t, s in keys:
        assert Contexts.store(db, u.id, t, 1, source_identifier=s).inserted is True
    assert Contexts.count(db) == len(keys)
    assert Contexts.count(db, user_id=user.id, context_type="a") == 5


VALUES: list[Any] = [
    *(None, False, True, 0, -0.0, "", [], {}, 1.5, 1e300, 2**63, -(2**63)),
    {"": {"b": [None, {"c": ["é", "한국어", "🙂", '"\\\n\t\u2028\x1f']}]}},
    [[[[[]]]]],
    "null",
]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_content_is_any_json(db: TenantSession, user: User, value: Any, many: bool) -> None:  # noqa: FBT001
    if many:
        Contexts.store_many(db, user.id, [item("s", value)])
    else:
        assert Contexts.store(db, user.id, "note", value).content == value
    (found,) = seen(db)
    assert (found["content"], type(found["content"]) is bool) == (value, type(value) is bool)
    query = text("SELECT content IS NULL FROM contexts WHERE user_id = :user")
    assert db.scalar(query, {"user": user.id}) is False


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("policy", ["replace", "error"])
def test_what_cannot_be_stored(worker_url: str, tenant: str, policy: str, many: bool) -> None:  # noqa: FBT001
    configure(url=worker_url, unstorable=policy)
    bad = {"a\0": ["\ud800", float("nan"), float("inf")]}
    with SessionLocal(tenant_id=tenant) as db:
        user = UserRepository.create(db).id
        given = item("s\0\ud800", bad, metadata={"m": "\0"})

        def store(**fields: Any) -> None:
            row = given | fields
            if many:
                Contexts.store_many(db, user, [row])
            else:
                Contexts.store(db, user, row.pop("context_type"), row.pop("content"), **row)

        if policy == "replace":
            store()
            (found,) = seen(db)
            assert found["content"] == {"a\ufffd": ["\ufffd", None, None]}
            assert found["source_identifier"] == "s\ufffd\ufffd"
            assert found["metadata"] == {"m": "\ufffd"}
            return
        good: dict[str, Any] = {"source_identifier": "s", "content": 1, "metadata": {}}
        for name in good:
            with pytest.raises(InvalidValueError, match=f"^{name}: "):
                store(**{key: value for key, value in good.items() if key != name})
        for content in ([float("nan")], {"a": float("-inf")}):
            with pytest.raises(InvalidValueError, match=r"^content: .*NaN"):
                store(**good | {"content": content})
        assert idle(db)
        assert seen(db) == []


def test_large_content(db: TenantSession, user: User) -> None:
    words = {str(n): f"{n:x}-𐌰𐌱{n}𐌲 http://{n}.example/{n}?q " * 20 for n in range(7000)}
    stored = Contexts.store(db, user.id, "note", words, source_identifier="s")
    assert len(str(words)) > 5_000_000
    Contexts.store_many(db, user.id, [item("t", "가나다라 " * 2_000_000), item("u", words)])
    with SessionLocal(tenant_id=tenant_of(db)) as fresh:
        assert Contexts.get_by_id(fresh, stored.id, user_id=user.id).content == words  # type: ignore[union-attr]
        assert Contexts.get(fresh, user.id, "note", "u").content == words  # type: ignore[union-attr]
        assert len(Contexts.get(fresh, user.id, "note", "t").content) == 10_000_000  # type: ignore[union-attr]


def test_words_of_the_greatest_size_fit_their_index(db: TenantSession, user: User) -> None:
    """A tsvector holds at most 1 MB: the first 100,000 characters must, whatever they are."""
    letters = [chr(0x12000 + n % 900) + chr(0x12000 + n // 900) for n in range(40_000)]
    for content in (
        "-".join(letters),
        " ".join(letters),
        "".join(map(chr, range(0x20000, 0x2A000))),
    ):
        Contexts.store(db, user.id, "note", content)
    assert Contexts.count(db) == 3


@alone_and_in_a_unit
def test_store_is_one_statement(db: TenantSession, user: User, unit: Unit) -> None:
    Contexts.store(db, user.id, "note", 0, source_identifier="s")
    with unit(db), counted_statements() as statements, counted_round_trips() as trips:
        db.connection() if unit is transaction else None
        for n in range(2):
            Contexts.store(db, user.id, "note", n, source_identifier="s")
    assert len(statements) == 2
    if unit is not transaction:
        assert trips.count == 2


def test_one_round_trip_reads(db: TenantSession, user: User) -> None:
    made = Contexts.store(db, user.id, "note", 0, source_identifier="s")
    calls: list[Callable[[], object]] = [
        lambda: Contexts.get(db, user.id, "note", "s"),
        lambda: Contexts.get(db, user.id, "note"),
        lambda: Contexts.get_by_id(db, made.id, user_id=user.id),
        lambda: Contexts.list(db, user_id=user.id, source_prefix="s").items,
        lambda: Contexts.store_many(db, user.id, []),
        lambda: Contexts.delete(db, made.id, user_id=user.id),
        lambda: Contexts.delete_by_type(db, user.id, "note"),
        lambda: Contexts.delete_all(db, user.id),
    ]
    for number, call in enumerate(calls):
        with counted_statements() as statements, counted_round_trips() as trips:
            call()
        assert (len(statements), trips.count) == ((0, 0) if number == 4 else (1, 1)), number
        assert idle(db)


def test_threads_storing_one_source_make_one_row(db: TenantSession, user: User) -> None:
    def store(session: TenantSession, number: int) -> Context:
        return Contexts.store(session, user.id, "note", number, source_identifier="s")

    made = in_threads(tenant_of(db), store)
    (found,) = seen(db)
    assert {str(row.id) for row in made} == {found["id"]}
    assert sum(row.inserted is True for row in made) == 1
    assert found["content"] in range(THREADS)
    assert found["updated_at"] == max(row.updated_at for row in made).isoformat()


# Many


def test_store_many_counts(db: TenantSession, user: User) -> None:
    Contexts.store_many(db, user.id, [item("old", 1), item(None, 1)])
    old = Contexts.get(db, user.id, "note", "old")
    assert old is not None
    before = old.to_dict()
    items = [
        item("old", 2, expires_at=LATER, metadata={"m": 1}),
        item("new"),
        item(None),
        item(None),
    ]
    stored = Contexts.store_many(db, str(user.id), iter(items))
    assert (stored.inserted, stored.updated) == (3, 1)
    after = next(row for row in seen(db) if row["source_identifier"] == "old")
    changed = {"content": 2, "metadata": {"m": 1}, "expires_at": LATER.isoformat()}
    assert after == before | changed | {"updated_at": after["updated_at"]}
    assert after["updated_at"] > before["updated_at"]
    assert (Contexts.count(db), idle(db)) == (5, True)
    stored = Contexts.store_many(db, user.id, [])
    assert (stored.inserted, stored.updated) == (0, 0)


def test_of_several_with_one_source_the_last_one_stays(
    db: TenantSession, user: User, small_pages: int
) -> None:
    items = [item(n % 7, n) for n in range(95)] + [
        item(n % 7, n, context_type="b") for n in range(9)
    ]
    stored = Contexts.store_many(db, user.id, items)
    assert (stored.inserted, stored.updated) == (14, 90)
    found = {(row["context_type"], row["source_identifier"]): row["content"] for row in seen(db)}
    assert found == {(i["context_type"], i["source_identifier"]): i["content"] for i in items}


@pytest.mark.parametrize("rows", [0, 1, 10, 11, 30, 95])
def test_store_many_is_one_statement_a_page(
    db: TenantSession, user: User, small_pages: int, rows: int
) -> None:
    with counted_statements() as statements:
        Contexts.store_many(db, user.id, (item(n) for n in range(rows)))
    assert len(statements) == -(-rows // small_pages)
    assert Contexts.count(db) == rows


BAD: dict[str, tuple[str, Any]] = {
    "type": ("context_type", item("x", context_type=5)),
    "missing": ("content", {"context_type": "note"}),
    "unknown": ("colour", item("x", colour="red")),
    "id": ("id", item("x", id=uuid4())),
    "user_id": ("user_id", item("x", user_id=uuid4())),
    "created_at": ("created_at", item("x", created_at=LATER)),
    "no mapping": ("items", 5),
    "text": ("items", "text"),
    "none": ("items", None),
    "pairs": ("items", [("context_type", "note")]),
}


@alone_and_in_a_unit
@pytest.mark.parametrize("bad", BAD)
def test_store_many_is_all_or_none(
    db: TenantSession, user: User, small_pages: int, bad: str, unit: Unit
) -> None:
    Contexts.store(db, user.id, "note", "old", source_identifier="3")
    field, row = BAD[bad]
    items = [*(item(n) for n in range(35)), row, item("y")]
    with unit(db):
        with pytest.raises(InvalidValueError) as caught:
            Contexts.store_many(db, user.id, items)
        kept = Contexts.store(db, user.id, "note", "after")
    assert caught.value.field == field
    assert idle(db)
    assert {row["content"] for row in seen(db)} == {"old", kept.content}


def test_an_error_of_the_generator_stores_nothing(
    db: TenantSession, user: User, small_pages: int
) -> None:
    def items() -> Iterator[dict[str, Any]]:
        yield from (item(n) for n in range(25))
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - it is the generator's own
        Contexts.store_many(db, user.id, items())
    assert idle(db)
    assert seen(db) == []
    for nothing in (None, 5):
        with pytest.raises(InvalidValueError, match=r"^items: "):
            Contexts.store_many(db, user.id, nothing)  # type: ignore[arg-type]


def test_store_many_in_bounded_memory(db: TenantSession, user: User) -> None:
    peaks = []
    for rows in (5_000, 50_000):
        items = (item(f"{rows} {n}", {"text": f"{n:05} " * 30}) for n in range(rows))
        tracemalloc.start()
        try:
            assert Contexts.store_many(db, user.id, items).inserted == rows
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 20_000_000
    assert peaks[1] < 1.3 * peaks[0], "ten times the items"


def test_large_items_make_small_pages(db: TenantSession, user: User) -> None:
    with counted_statements() as statements:
        Contexts.store_many(db, user.id, (item(n, "x" * 3_000_000) for n in range(7)))
    assert len(statements) == 3


@pytest.mark.parametrize("rows", [9, 60], ids=["a page", "pages"])
def test_concurrent_store_many_never_deadlock(
    db: TenantSession, user: User, small_pages: int, rows: int
) -> None:
    def store(session: TenantSession, number: int) -> int:
        order = range(rows) if number % 2 else range(rows)[::-1]
        rounds = 10
        return sum(
            Contexts.store_many(session, user.id, [item(n, number) for n in order]).inserted
            for _ in range(rounds)
        )

    assert sum(in_threads(tenant_of(db), store, 4)) == rows
    assert len({row["content"] for row in seen(db)}) == 1, "the last one's, all or none"


def test_stores_of_other_users_do_not_wait(db: TenantSession, user: User) -> None:
    other = UserRepository.create(db)
    with SessionLocal(tenant_id=tenant_of(db)) as second, transaction(db):
        Contexts.store_many(db, user.id, [item("a")])
        second.execute(text("SET lock_timeout = '1s'"))
        Contexts.store_many(second, other.id, [item("a")])
        Contexts.store(second, user.id, "note", 1, source_identifier="b")
        UserRepository.update(second, user.id, username="free")
        with pytest.raises(TransientError):
            second.execute(text("SET lock_timeout = '100ms'"))
            Contexts.store(second, user.id, "note", 1, source_identifier="a")


class Elsewhere(tzinfo):
    """A time zone of a library that orjson does not know."""

    def utcoffset(self, _: datetime | None) -> timedelta:
        return timedelta(hours=5, minutes=30)

    def dst(self, _: datetime | None) -> timedelta:
        return timedelta()

    def tzname(self, _: datetime | None) -> str:
        return "elsewhere"


@pytest.mark.parametrize(
    "zone", [UTC, timezone(timedelta(hours=-9)), Elsewhere()], ids=["utc", "west", "elsewhere"]
)
def test_expiry_in_any_time_zone(db: TenantSession, user: User, zone: tzinfo) -> None:
    at = datetime(2031, 2, 3, 4, 5, 6, 789, tzinfo=zone)
    Contexts.store(db, user.id, "note", 1, source_identifier="one", expires_at=at)
    Contexts.store_many(db, user.id, [item("many", expires_at=at)])
    for source in ("one", "many"):
        with SessionLocal(tenant_id=tenant_of(db)) as fresh:
            assert Contexts.get(fresh, user.id, "note", source).expires_at == at  # type: ignore[union-attr]
