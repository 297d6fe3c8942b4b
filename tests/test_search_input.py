"""Search: any input at all, conditions against a model of them, and SQL that stays data."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from database import ContextRepository as Contexts
from database import (
    ConversationRepository,
    InvalidValueError,
    SearchPage,
    TenantSession,
    UserRepository,
)
from database import MessageRepository as Messages
from tests.test_conformance import idle

examples = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

texts = st.text(st.characters(exclude_categories=[]))  # lone surrogates and NUL as well
numbers = st.integers(-(2**70), 2**70) | st.floats() | st.integers(-3, 12)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
odd = st.sampled_from([object(), b"x", {1}, datetime(2026, 1, 1), UTC, 10**400, 1j, (), ("",)])  # noqa: DTZ001
anything = values | odd
OPERATORS = ["eq", "ne", "gt", "gte", "lt", "lte", "in", "contains", "exists"]
members = texts | st.lists(texts | st.just("metadata"), max_size=3).map(tuple) | st.integers()
wheres = st.dictionaries(
    members,
    anything | st.dictionaries(st.sampled_from(OPERATORS) | texts, anything, max_size=3),
    max_size=3,
)
queries = texts | st.lists(
    st.sampled_from([*"\"-|&!():*\\'<>%_$", "OR", "-", "word", "한국", "🎉", " ", "\n", "  "])
).map("".join)


@pytest.fixture
def filled(db: TenantSession) -> TenantSession:
    user = UserRepository.create(db).id
    chat = ConversationRepository.create(db, user_id=user, thread_id="t").id
    for content in ("word 한국", {"a": [1, "🎉"]}):
        Contexts.store(db, user, "note", content)
        Messages.append(db, chat, role="user", content=str(content), extra_data=content)
    return db


@given(query=queries | odd, mode=st.sampled_from(["text", "substring"]))
@example(query="x" * 1001, mode="text")
@example(query="x" * 100_000, mode="substring")
@example(query="ა" * 1000, mode="text")
@example(query="🎉 " * 500, mode="text")
@example(query="OR 🎉" * 200, mode="text")
@example(query="-" * 1000, mode="text")
@example(query="(" * 1000, mode="substring")
@examples
def test_any_query(filled: TenantSession, query: Any, mode: Any) -> None:
    marks = ("<", ">")
    for call in (
        lambda: Contexts.search(filled, None, query, mode=mode, highlight=marks),
        lambda: Messages.search(filled, query, mode=mode, highlight=marks),
    ):
        assert_answer(
            filled, call, {"query"}, invalid=not isinstance(query, str) or len(query) > 1000
        )


def assert_answer(
    db: TenantSession,
    call: Callable[[], SearchPage[Any]],
    fields: set[str],
    *,
    invalid: bool | None = None,
) -> None:
    answer: object
    try:
        answer = call()
    except InvalidValueError as error:
        answer = error
    assert idle(db)
    if invalid is not None:
        assert isinstance(answer, InvalidValueError) is invalid
    if isinstance(answer, InvalidValueError):
        assert answer.field.split(".", maxsplit=1)[0] in fields
    else:
        assert isinstance(answer, SearchPage)


@given(where=wheres | anything)
@example(where=[])
@example(where={"a": {"contains": "x" * 100_000}})
@example(where={"a": {"contains": [1] * 100_000}})
@example(where={"a": {"contains": {str(n): n for n in range(900)}}})
@example(where={"a": "x" * 1_000_000})
@example(where={".".join("a" * 50_000): 1})
@example(where={".".join("a" * 100): {"contains": {"a": [[{}]]}}})
@example(where={str(n): {"contains": [n] * 1000} for n in range(100)})
@example(where={"a": {"in": ["x" * 10_000] * 100}})
@example(where={"a": 2**1023})
@example(where={"a": -(10**400)})
@examples
def test_any_where(filled: TenantSession, where: Any) -> None:
    for call in (
        lambda: Contexts.search(filled, None, None, where=where),
        lambda: Messages.search(filled, None, where=where),
    ):
        assert_answer(filled, call, {"where"})


ARGUMENTS = {
    "mode": anything,
    "limit": anything,
    "cursor": anything,
    "highlight": anything | st.tuples(anything, anything),
    "since": anything,
    "until": anything,
    "context_type": anything,
    "user_id": anything,
    "role": anything,
    "conversation_id": anything,
}


@given(data=st.data(), query=st.sampled_from(["word", "", None]))
@examples
def test_any_argument(filled: TenantSession, data: st.DataObject, query: str | None) -> None:
    name = data.draw(st.sampled_from(sorted(ARGUMENTS)))
    value = data.draw(ARGUMENTS[name])
    given: dict[str, Any] = {name: value}
    if name not in ("role", "conversation_id"):
        options: dict[str, Any] = {"user_id": None, name: value}
        user = options.pop("user_id")
        assert_answer(filled, lambda: Contexts.search(filled, user, query, **options), {name})
    if name != "context_type":
        assert_answer(filled, lambda: Messages.search(filled, query, **given), {name})


@pytest.mark.parametrize("query", ["x", "", None])
@pytest.mark.parametrize("mode", ["TEXT", "regex", None, 5, []])
def test_modes_are_two(db: TenantSession, query: str | None, mode: Any) -> None:
    assert_answer(db, lambda: Contexts.search(db, None, query, mode=mode), {"mode"}, invalid=True)


# Conditions


class Kind(int, Enum):
    ONE = 1


class Word(StrEnum):
    A = "a"


ROWS: list[Any] = [
    *(
        {"n": n}
        for n in (9, 10, 5, 5.0, -1, 2**63, 0.1, "9", "10", None, True, False, [9], {"x": 9})
    ),
    *({"n": s} for s in ("", "a", "abc", "B", "é", "a.b", 'q"\\', "^a.c$", ["a", "b", 5], [["a"]])),
    *(
        {},
        [],
        "text",
        5,
        None,
        {"m": {"d.e": 1, "n": {"n": 9}}},
        {"n": {"a": [1, {"b": 2}], "c": "x"}},
    ),
]
MISSING = object()


def kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return type(value).__name__
    return "number" if isinstance(value, int | float) else type(value).__name__


def at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name, MISSING) if isinstance(value, dict) else MISSING
    return value


def same(value: Any, operand: Any) -> bool:
    return kind(value) == kind(operand) and bool(value == operand)


def holds(value: Any, operand: Any) -> bool:
    if isinstance(operand, dict):
        return isinstance(value, dict) and all(
            holds(value.get(key, MISSING), item) for key, item in operand.items()
        )
    if isinstance(operand, list):
        return isinstance(value, list) and all(
            any(holds(item, one) for item in value) for one in operand
        )
    return same(value, operand)


def matches(value: Any, operator: str, operand: Any) -> bool:  # noqa: PLR0911 - a table
    if operator == "exists":
        return (value is not MISSING) is operand
    if operator == "in":
        return any(same(value, one) for one in operand)
    if operator == "contains":
        if isinstance(operand, dict | list):
            return holds(value, operand)
        inside = isinstance(value, list) and any(same(item, operand) for item in value)
        return inside or (isinstance(operand, str) and isinstance(value, str) and operand in value)
    if kind(value) != kind(operand) or isinstance(operand, dict | list):
        return False
    if operator in ("eq", "ne"):
        return (value == operand) is (operator == "eq")
    if operand is None:
        return operator in ("gte", "lte")
    order: dict[str, Callable[[Any, Any], bool]] = {
        "gt": lambda a, b: a > b,
        "gte": lambda a, b: a >= b,
        "lt": lambda a, b: a < b,
        "lte": lambda a, b: a <= b,
    }
    return order[operator](value, operand)


plain = st.sampled_from(
    [9, 10, 5, 5.0, 0.1, 2**63, -1, None, True, False, "", "a", "9", "10", "b", "."]
)
operands = st.one_of(
    st.tuples(st.sampled_from(["eq", "ne", "gt", "gte", "lt", "lte"]), plain),
    st.tuples(st.just("in"), st.lists(plain, max_size=4)),
    st.tuples(st.just("exists"), st.booleans()),
    st.tuples(
        st.just("contains"),
        plain | st.lists(plain, max_size=2) | st.dictionaries(st.sampled_from("axbn"), plain),
    ),
    st.tuples(
        st.just("contains"), st.sampled_from([[["a"]], {"a": [{"b": 2}]}, {"a": []}, [], {}])
    ),
)
paths = st.sampled_from([("n",), ("m",), ("m", "d.e"), ("m", "n", "n"), ("n", "a"), ("zz",)])


@pytest.fixture
def rows(db: TenantSession) -> TenantSession:
    user = UserRepository.create(db).id
    for number, content in enumerate(ROWS):
        metadata = {"v": content}
        Contexts.store(db, user, "x", content, source_identifier=str(number), metadata=metadata)
    return db


@given(
    conditions=st.lists(st.tuples(paths, operands), min_size=1, max_size=3), prefix=st.booleans()
)
@example(conditions=[(("n",), ("lt", 10))], prefix=False)
@example(conditions=[(("n",), ("eq", 5))], prefix=True)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_conditions_are_as_their_model(rows: TenantSession, conditions: Any, prefix: bool) -> None:  # noqa: FBT001
    where: dict[Any, dict[str, Any]] = {}
    for path, (operator, operand) in conditions:
        where.setdefault(("metadata", "v", *path) if prefix else path, {})[operator] = operand
    chosen = [(path[2:] if prefix else path, of) for path, of in where.items()]
    expected = {
        number
        for number, content in enumerate(ROWS)
        if all(
            matches(at(content, path), operator, operand)
            for path, of in chosen
            for operator, operand in of.items()
        )
    }
    found = Contexts.search(rows, None, None, where=where, limit=1000)
    assert {int(str(row.source_identifier)) for row in found} == expected


def test_forms_of_conditions(rows: TenantSession) -> None:
    def found(where: Any) -> list[Any]:
        return [row.content for row in Contexts.search(rows, None, None, where=where)][::-1]

    assert found({"n": 5}) == [{"n": 5}, {"n": 5.0}]
    assert found({"n": {"gt": 5, "lt": 10}}) == [{"n": 9}]
    assert found({"m.n.n": 9}) == found({("m", "d.e"): 1}) == found({"metadata.v.m.n.n": 9}) != []
    assert found({"m.d.e": 1}) == []
    assert found({"n": 2**63}) == [{"n": 2**63}]
    assert found({"n": {"contains": 2**70}}) == found({"n": 2**70}) == []
    assert found({"n": Kind.ONE}) == []
    assert found({"n": {"gte": Kind.ONE, "lt": 9}}) == [{"n": 5}, {"n": 5.0}]
    assert found({"n": Word.A}) == [{"n": "a"}]
    assert {"n": "abc"} in found({"n": {"ne": Word.A}})
    assert found({"n": {"in": {9, "a"}}}) == [{"n": 9}, {"n": "a"}]
    assert found({"n": {"in": []}}) == []
    assert len(found({})) == len(found(None)) == len(ROWS)


@pytest.mark.parametrize(
    "where",
    [
        *([], "", 0, "x", 5, {"": 1}, {"a..b": 1}, {(): 1}, {("a", 5): 1}, {5: 1}, {"a": {}}),
        *({"a": {"like": 1}}, {"a": {"$gt": 1}}, {"a": {5: 1}}, {"a": [1]}, {"a": {"gt": [1]}}),
        *(
            {"a": {"gt": {}}},
            {"a": math.nan},
            {"a": {"lt": math.inf}},
            {"a": {"in": 5}},
            {"a": object()},
        ),
        *({"a": {"in": "abc"}}, {"a": {"in": [[]]}}, {"a": {"exists": 1}}, {"a": {"exists": None}}),
        *({"a": {"contains": {1: 2}}}, {"a": {"contains": [object()]}}, {"a": {"in": [1] * 101}}),
        *({"a": 2**1024}, {str(n): n for n in range(101)}, {("a",) * 101: 1}),
    ],
)
def test_conditions_that_are_none(db: TenantSession, where: Any) -> None:
    for call in (
        lambda: Contexts.search(db, None, None, where=where),
        lambda: Messages.search(db, "", where=where),
    ):
        assert_answer(db, call, {"where"}, invalid=True)
