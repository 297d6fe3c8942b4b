"""States: set by key, compared by version, merged, listed with names, and kept apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import chain
from random import Random
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from database import (
    ALL_TENANTS,
    ConflictError,
    ConversationRepository,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    ModuleRepository,
    PersonaRepository,
    SessionLocal,
    State,
    Stored,
    TenantSession,
    get_engine,
    transaction,
)
from database import StateRepository as States
from database.repositories.state_keys import KEY, getting
from tests.counting import counted_round_trips, counted_statements
from tests.factories import ConversationFactory, ModuleFactory, PersonaFactory
from tests.threads import in_threads

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
JSON_VALUES: list[Any] = [None, True, 0, -1.5, "", "text", [], [None], {}, {"a": {"b": [1]}}]


def idle(db: TenantSession) -> bool:
    return not db.in_transaction() and get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.fixture
def chat(db: TenantSession) -> UUID:
    found: UUID = ConversationFactory(db=db, thread_id="thread").id
    return found


@pytest.fixture
def owners(db: TenantSession) -> dict[str, Any]:
    """A whole key but for conversation and key."""
    return {
        "persona_id": PersonaFactory(db=db, name="Ada").id,
        "module_id": ModuleFactory(db=db, name="mood").id,
        "execution_stage": "stage4",
    }


def stored(db: TenantSession, state: State) -> dict[str, Any]:
    """What another session of the tenant finds."""
    with SessionLocal(tenant_id=state.tenant_id) as other:
        return States.require(other, state.id).to_dict()


def part_keys(owners: dict[str, Any]) -> list[dict[str, Any]]:
    """All eight combinations of given and missing parts of the key."""
    names = list(owners)
    return [
        {name: owners[name] for bit, name in enumerate(names) if number >> bit & 1}
        for number in range(8)
    ]


# set


def test_states_upsert(db: TenantSession, chat: UUID, owners: dict[str, Any]) -> None:
    with counted_round_trips() as trips, counted_statements() as statements:
        state = States.set(
            db, chat, "k", {"n": 1}, **owners, execution_metadata={"ms": 3}, executed_at=NOON
        )
    assert (trips.count, len(statements)) == (1, 1)
    assert idle(db)
    assert (state.conversation_id, state.state_key, state.state_value) == (chat, "k", {"n": 1})
    assert {name: getattr(state, name) for name in owners} == owners
    assert (state.execution_metadata, state.executed_at) == ({"ms": 3}, NOON)
    assert (state.version, stored(db, state)) == (1, state.to_dict())

    before = state.to_dict()
    again = States.set(db, str(chat), "k", "new", **owners)
    assert again is state
    assert (again.state_value, again.version, again.execution_metadata) == ("new", 2, None)
    assert again.updated_at.isoformat() > before["updated_at"]
    assert again.executed_at > NOON
    assert again.created_at.isoformat() == before["created_at"]
    assert stored(db, state) == again.to_dict()


@pytest.mark.parametrize("value", JSON_VALUES, ids=str)
def test_any_json_value(db: TenantSession, chat: UUID, value: Any) -> None:
    States.set(db, chat, "one", value)
    States.set_many(db, chat, [{"key": "many", "value": value}])
    States.compare_and_set(db, chat, "compared", value, expected_version=0)
    States.compare_and_set(db, chat, "compared", value, expected_version=1)
    db.expunge_all()
    for state in States.get_all(db, chat):
        assert state.state_value == value
        assert type(state.state_value) is type(value)
    assert States.count(db) == 3
    with SessionLocal(tenant_id=str(db.info["database.tenant"])) as session:
        kinds = session.execute(text("SELECT count(state_value) FROM conversation_states"))
        assert kinds.scalar_one() == 3, "null is JSON's, not SQL's"


def test_each_part_of_the_key_counts(db: TenantSession, chat: UUID, owners: dict[str, Any]) -> None:
    keys = part_keys(owners)
    for number, key in enumerate(keys):
        assert States.set(db, chat, "k", number, **key).version == 1
    for number, key in enumerate(keys):
        assert States.set(db, chat, "k", -number, **key).version == 2
    db.expunge_all()
    for number, key in enumerate(keys):
        found = States.get(db, chat, "k", **key)
        assert found is not None
        assert found.state_value == -number
        assert States.get(db, chat, "other", **key) is None
    for number, key in enumerate(keys):
        changed = States.compare_and_set(db, chat, "k", number, expected_version=2, **key)
        assert (changed.state_value, changed.version) == (number, 3)
    assert [States.delete(db, chat, "k", **key) for key in keys] == [True] * 8
    assert [States.delete(db, chat, "k", **key) for key in keys] == [False] * 8
    assert States.count(db) == 0


def test_set_within_a_unit(db: TenantSession, chat: UUID) -> None:
    with pytest.raises(ZeroDivisionError), transaction(db):
        States.set(db, chat, "k", 1)
        raise ZeroDivisionError
    assert States.get(db, chat, "k") is None
    with transaction(db):
        States.set(db, chat, "k", 1)
        with pytest.raises(InvalidReferenceError):
            States.set(db, chat, "k", 2, module_id=uuid4())
        States.set(db, chat, "k", 3)
    found = States.get(db, chat, "k")
    assert found is not None
    assert (found.state_value, found.version) == (3, 2)


def test_threads_set_the_same_and_different_keys(
    db: TenantSession, chat: UUID, tenant: str, owners: dict[str, Any]
) -> None:
    def work(session: TenantSession, number: int) -> list[int]:
        States.set(session, chat, f"own {number}", number, **owners)
        versions = [States.set(session, chat, "same", [number, i]).version for i in range(5)]
        shared = [{"key": f"many {i}", "value": number} for i in range(20)]
        Random(number).shuffle(shared)
        States.set_many(session, chat, shared)
        return versions

    versions = in_threads(tenant, work)
    assert sorted(chain.from_iterable(versions)) == list(range(1, 81))
    states = {state.state_key: state for state in States.get_all(db, chat)}
    assert len(states) == 16 + 1 + 20
    assert states["same"].version == 80
    assert {states[f"many {i}"].version for i in range(20)} == {16}
    assert [states[f"own {i}"].state_value for i in range(16)] == list(range(16))


# set_many


def test_set_many(db: TenantSession, chat: UUID, owners: dict[str, Any]) -> None:
    kept = States.set(db, chat, "old", 1)
    items: list[dict[str, Any]] = [
        {"key": "old", "value": 2, "executed_at": NOON},
        {"key": "new", "value": None, **owners, "execution_metadata": [1]},
        {"key": "new", "value": "of none"},
        {"key": "new", "value": "last", **owners},
        {"key": "new", "value": "of no stage", "module_id": str(owners["module_id"])},
        {"key": "new", "value": "of a stage called None", "execution_stage": "None"},
    ]
    with counted_round_trips() as trips, counted_statements() as statements:
        assert States.set_many(db, chat, iter(items)) == Stored(inserted=4, updated=2)
    assert (trips.count, len(statements)) == (1, 1)
    assert idle(db)
    found = States.get(db, chat, "new", **owners)
    assert found is not None
    assert (found.state_value, found.version, found.execution_metadata) == ("last", 1, None)
    old = States.get(db, chat, "old")
    assert old is kept
    assert (kept.state_value, kept.version, kept.executed_at) == (2, 2, NOON)
    assert States.count(db) == 5
    assert States.set_many(db, chat, []) == Stored(0, 0)


def test_set_many_in_pages(db: TenantSession, chat: UUID) -> None:
    items = [{"key": f"k{number % 4100}", "value": number} for number in range(4200)]
    with counted_statements() as statements:
        assert States.set_many(db, "thread", items) == Stored(4100, 100)
    assert len(statements) == 1 + 3
    found = States.get(db, chat, "k7")
    assert found is not None
    assert found.state_value == 4107


def test_set_many_is_all_or_none(db: TenantSession, chat: UUID) -> None:
    good = [{"key": f"k{number}", "value": number} for number in range(2500)]
    for bad in ({"key": "z", "value": 1, "module_id": uuid4()}, {"key": "", "value": 1}):
        with pytest.raises(DatabaseError):
            States.set_many(db, chat, [*good, bad])
        assert States.count(db) == 0
        assert idle(db)


# get, get_all, latest_for_module


def test_get(db: TenantSession, chat: UUID) -> None:
    made = States.set(db, chat, "k", 1)
    for conversation, statements in ((chat, 1), (str(chat), 2), ("thread", 2)):
        with counted_statements() as sent:
            assert States.get(db, conversation, "k") is made
        assert len(sent) == statements
    assert States.get(db, made.id) is made
    assert States.get(db, str(made.id)) is made
    assert States.get(db, chat) is None
    assert States.get(db, uuid4(), "k") is None
    assert States.get(db, "nowhere", "k") is None
    with pytest.raises(InvalidValueError, match=r"^key: "):
        States.get(db, chat, execution_stage="stage4")
    with pytest.raises(InvalidValueError, match=r"^colour: "):
        States.get(db, chat, "k", colour="red")


def test_states_with_the_names_of_their_modules(
    db: TenantSession, chat: UUID, owners: dict[str, Any]
) -> None:
    States.set(db, ConversationFactory(db=db).id, "elsewhere", 0)
    for number, key in enumerate(part_keys(owners)):
        when = NOON + timedelta(seconds=number * 7 % 8)
        States.set(db, chat, f"k{number}", number, **key, executed_at=when)
    db.expunge_all()
    with counted_round_trips() as trips, counted_statements() as statements:
        states = States.get_all(db, chat)
    assert (trips.count, len(statements)) == (1, 1)
    assert idle(db)
    assert [state.executed_at for state in states] == [
        NOON + timedelta(seconds=n) for n in range(7, -1, -1)
    ]
    for state in states:
        assert state.module_name == ("mood" if state.module_id else None)
        assert state.persona_name == ("Ada" if state.persona_id else None)
        assert state.to_dict() == stored(db, state)
    assert States.get_all(db, "thread") == states
    assert States.get_all(db, "nowhere") == States.get_all(db, uuid4()) == []


def test_the_plan_of_get_uses_the_whole_key(db: TenantSession, chat: UUID) -> None:
    States.set_many(db, chat, [{"key": f"k{i}", "value": i} for i in range(3000)])
    with SessionLocal(tenant_id=ALL_TENANTS) as owner:
        owner.execute(text("ANALYZE conversation_states"))
        owner.commit()
    # Those with an owner may go by its own index, as long as the owners are few.
    for key in ({}, {"execution_stage": "stage4"}):
        missing = frozenset(KEY).difference(key, ["state_key"])
        sql = str(getting(missing))
        sql = sql.replace(":tenant", f"'{db.info['database.tenant']}'")
        for name, value in {"conversation": chat, "state_key": "k7", **key}.items():
            sql = sql.replace(f":of_{name}", f"'{value}'")
        plan = "\n".join(db.scalars(text(f"EXPLAIN {sql}")))
        db.rollback()
        condition = re.search("Index Cond: (.*)", plan)
        assert condition, plan
        assert all(name in condition[1] for name in ("conversation_id", *KEY)), plan


def test_latest_state_for_a_module(db: TenantSession, chat: UUID, owners: dict[str, Any]) -> None:
    module = owners["module_id"]
    assert States.latest_for_module(db, chat, module) is None
    for number, stage in enumerate(["stage4", "stage5", None]):
        when = NOON + timedelta(hours=number % 2)
        States.set(db, chat, "k", number, module_id=module, execution_stage=stage, executed_at=when)
    States.set(db, chat, "k", "of none")
    States.set(db, ConversationFactory(db=db).id, "k", "elsewhere", module_id=module)
    with counted_round_trips() as trips, counted_statements() as statements:
        found = States.latest_for_module(db, chat, module)
    assert (trips.count, len(statements)) == (1, 1)
    assert found is not None
    assert found.state_value == 1
    assert States.latest_for_module(db, "thread", str(module)) is found
    with pytest.raises(InvalidValueError, match=r"^module_id: "):
        States.latest_for_module(db, chat, "mood")


# compare_and_set


def test_compare_and_set(db: TenantSession, chat: UUID) -> None:
    with counted_round_trips() as trips, counted_statements() as statements:
        state = States.compare_and_set(db, chat, "k", "a", expected_version=0)
        States.compare_and_set(db, chat, "k", "b", expected_version=1, executed_at=NOON)
    assert (trips.count, len(statements)) == (2, 2)
    assert (state.state_value, state.version, state.executed_at) == ("b", 2, NOON)
    assert stored(db, state) == state.to_dict()
    for stale in (0, 1, 3):
        with counted_statements() as statements, pytest.raises(ConflictError, match="version"):
            States.compare_and_set(db, chat, "k", "c", expected_version=stale)
        assert len(statements) == 1
        assert idle(db)
    assert stored(db, state) == state.to_dict()
    for unknown in (1, 2):
        with pytest.raises(ConflictError):
            States.compare_and_set(db, chat, "other", "c", expected_version=unknown)
    assert States.count(db) == 1


@pytest.mark.parametrize("version", [-1, 1.0, "1", None, True, 2**31])
def test_expected_version_is_a_number(db: TenantSession, chat: UUID, version: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^expected_version: "):
        States.compare_and_set(db, chat, "k", 1, expected_version=version)
    assert States.count(db) == 0


def test_threads_count_by_compare_and_set(db: TenantSession, chat: UUID, tenant: str) -> None:
    def increment(session: TenantSession, _: int) -> int:
        conflicts = 0
        for _ in range(3):
            while True:
                state = States.get(session, chat, "counter")
                version, value = (state.version, state.state_value) if state else (0, 0)
                try:
                    States.compare_and_set(
                        session, chat, "counter", value + 1, expected_version=version
                    )
                    break
                except ConflictError:
                    conflicts += 1
        return conflicts

    in_threads(tenant, increment, 32)
    found = States.get(db, chat, "counter")
    assert found is not None
    assert (found.state_value, found.version) == (96, 96)


# update by merge, delete, clear


def test_update_by_json_merge(db: TenantSession, chat: UUID, owners: dict[str, Any]) -> None:
    with counted_round_trips() as trips, counted_statements() as statements:
        state = States.merge(db, chat, "k", {"a": 1, "b": {"c": None, "d": 2}}, **owners)
        States.merge(db, chat, "k", {"a": None, "b": {"e": [None]}}, **owners, executed_at=NOON)
    assert (trips.count, len(statements)) == (2, 2)
    assert (state.state_value, state.version) == ({"b": {"d": 2, "e": [None]}}, 2)
    assert state.executed_at == NOON
    assert stored(db, state) == state.to_dict()
    assert States.merge(db, chat, "k", {}, **owners).version == 3
    States.set(db, chat, "text", "text")
    assert States.merge(db, chat, "text", {"x": 1}).state_value == {"x": 1}
    changes: Any
    for changes in (None, [], "x", 1):
        with pytest.raises(InvalidValueError, match=r"^changes: "):
            States.merge(db, chat, "k", changes)
    assert States.update(db, state.id, state_value=[1]).state_value == [1]


def test_threads_merge(db: TenantSession, chat: UUID, tenant: str) -> None:
    in_threads(tenant, lambda session, n: States.merge(session, chat, "k", {str(n): n}))
    found = States.get(db, chat, "k")
    assert found is not None
    assert found.state_value == {str(n): n for n in range(16)}


def test_delete(db: TenantSession, chat: UUID) -> None:
    first, second = (States.set(db, chat, key, 1) for key in "ab")
    with counted_round_trips() as trips:
        assert States.delete(db, chat, "a") is True
    assert trips.count == 1
    assert States.delete(db, "thread", "a") is False
    assert States.get(db, first.id) is None
    assert States.delete(db, second.id) is True
    assert States.delete(db, uuid4(), "b") is False
    with pytest.raises(InvalidValueError, match=r"^key: "):
        States.delete(db, chat, persona_id=uuid4())


def test_clear(db: TenantSession, chat: UUID, owners: dict[str, Any]) -> None:
    other = ConversationFactory(db=db).id
    States.set(db, other, "k", 0)

    def fill() -> None:
        for key in part_keys(owners):
            States.set(db, chat, "k", 1, **key)

    fill()
    with counted_round_trips() as trips, counted_statements() as statements:
        assert States.clear(db, chat) == 8
    assert (trips.count, len(statements)) == (1, 1)
    fill()
    assert States.clear(db, chat, persona_id=owners["persona_id"]) == 4
    assert States.clear(db, chat, module_id=str(owners["module_id"])) == 2
    assert States.clear(db, "thread") == 2
    assert States.clear(db, "nowhere") == States.clear(db, uuid4()) == 0
    assert States.count(db) == 1


# Owners


def test_states_go_with_their_owners(db: TenantSession, chat: UUID, owners: dict[str, Any]) -> None:
    for key in part_keys(owners):
        States.set(db, chat, "k", 1, **key)
    assert ModuleRepository.delete(db, owners["module_id"])
    assert States.count(db) == 4
    assert PersonaRepository.delete(db, owners["persona_id"])
    assert States.count(db) == 2
    assert ConversationRepository.delete(db, chat)
    assert States.count(db) == 0


WRITES: dict[str, Callable[..., Any]] = {
    "set": lambda db, chat, **key: States.set(db, chat, "k", 1, **key),
    "set_many": lambda db, chat, **key: States.set_many(
        db, chat, [{"key": "a", "value": 1}, {"key": "k", "value": 1, **key}]
    ),
    "compare_and_set": lambda db, chat, **key: States.compare_and_set(
        db, chat, "k", 1, expected_version=0, **key
    ),
    "merge": lambda db, chat, **key: States.merge(db, chat, "k", {}, **key),
}


@pytest.mark.parametrize("write", WRITES)
def test_unknown_and_foreign_owners(
    db: TenantSession, other: TenantSession, chat: UUID, write: str
) -> None:
    foreign = {
        "persona_id": PersonaFactory(db=other).id,
        "module_id": ModuleFactory(db=other).id,
    }
    for field, id_ in foreign.items():
        for value in (id_, uuid4(), str(uuid4())):
            with pytest.raises(InvalidReferenceError) as caught:
                WRITES[write](db, chat, **{field: value})
            assert caught.value.field == field
    theirs = ConversationFactory(db=other, thread_id="theirs").id
    for conversation in (theirs, "theirs", uuid4(), "nowhere", ""):
        with pytest.raises(InvalidReferenceError) as caught:
            WRITES[write](db, conversation)
        assert caught.value.field == "conversation_id"
    assert idle(db)
    assert States.count(db) == States.count(other) == 0


def test_another_tenants_states_are_out_of_reach(
    db: TenantSession, other: TenantSession, chat: UUID, owners: dict[str, Any]
) -> None:
    state = States.set(db, chat, "k", 1, module_id=owners["module_id"])
    before = stored(db, state)
    key = {"module_id": owners["module_id"]}
    assert States.get(other, chat, "k", **key) is None
    assert States.get_all(other, chat) == []
    assert States.latest_for_module(other, chat, owners["module_id"]) is None
    assert States.delete(other, chat, "k", **key) is False
    assert States.clear(other, chat) == 0
    with pytest.raises(ConflictError):
        States.compare_and_set(other, chat, "k", 2, expected_version=1, **key)
    # The same ids in another tenant are other rows.
    ConversationFactory(db=other, id=chat)
    States.set(other, chat, "k", 5)
    assert States.get(db, chat, "k") is None
    assert stored(db, state) == before


BAD: list[tuple[str, dict[str, Any]]] = [
    ("state_key", {"key": ""}),
    ("state_key", {"key": "x" * 256}),
    ("state_key", {"key": None}),
    ("state_key", {"key": 5}),
    ("state_value", {"value": object()}),
    ("state_value", {"value": {1, 2}}),
    ("state_value", {"value": {1: 2}}),
    ("state_value", {"value": 2**64}),
    ("persona_id", {"persona_id": "Ada"}),
    ("module_id", {"module_id": 5}),
    ("execution_stage", {"execution_stage": "x" * 33}),
    ("execution_stage", {"execution_stage": 4}),
    ("execution_metadata", {"execution_metadata": object()}),
    ("executed_at", {"executed_at": datetime(2026, 1, 1)}),  # noqa: DTZ001
    ("executed_at", {"executed_at": "today"}),
    ("version", {"version": 7}),
    ("id", {"id": uuid4()}),
    ("colour", {"colour": "red"}),
]


@pytest.mark.parametrize(("field", "bad"), BAD)
def test_bad_input(db: TenantSession, chat: UUID, field: str, bad: dict[str, Any]) -> None:
    item = {"key": "k", "value": 1, **bad}
    options = {name: value for name, value in item.items() if name not in ("key", "value")}
    calls: list[Callable[[], Any]] = [
        lambda: States.set_many(db, chat, [{"key": "a", "value": 1}, item]),
        lambda: States.compare_and_set(
            db, chat, item["key"], item["value"], expected_version=0, **options
        ),
    ]
    if field not in ("version", "id", "colour"):
        calls.append(lambda: States.set(db, chat, item["key"], item["value"], **options))
    with counted_statements() as statements:
        for call in calls:
            with pytest.raises(InvalidValueError) as caught:
                call()
            assert caught.value.field == field
    assert statements == []
    assert idle(db)


def test_bad_items(db: TenantSession, chat: UUID) -> None:
    for items, field in (
        ([5], "items"),
        ("k", "items"),
        ([{"key": "k"}], "state_value"),
        ([{"value": 1}], "state_key"),
    ):
        with pytest.raises(InvalidValueError) as caught:
            States.set_many(db, chat, items)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(InvalidValueError, match=r"^conversation_id: "):
        States.set(db, 5, "k", 1)  # type: ignore[arg-type]
    assert States.count(db) == 0
