"""Modules: found by name, for a stage, in pages; and personas and modules in what they share."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from database import (
    AlreadyExistsError,
    ExecutionContext,
    InvalidReferenceError,
    InvalidValueError,
    Module,
    ModuleRepository,
    ModuleType,
    NotFoundError,
    PersonaRepository,
    StateRepository,
    TenantSession,
    get_engine,
)
from database.pagination import encode_cursor
from tests.counting import counted_round_trips, counted_statements
from tests.factories import ConversationFactory, ModuleFactory, PersonaFactory, StateFactory

both = pytest.mark.parametrize(
    ("repository", "factory"),
    [(PersonaRepository, PersonaFactory), (ModuleRepository, ModuleFactory)],
    ids=["personas", "modules"],
)


def idle(db: TenantSession) -> bool:
    return not db.in_transaction() and get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def names_of(rows: Any) -> list[str]:
    return [row.name for row in rows]


# CRUD


def test_module_crud(db: TenantSession) -> None:
    made = ModuleRepository.create(db, name="mood")
    assert made.type is ModuleType.SIMPLE
    assert made.execution_context is ExecutionContext.ON_DEMAND
    assert (made.requires_ai_inference, made.stage_priority, made.is_active) == (False, 100, True)
    assert (made.content, made.description, made.script) == (None, None, None)
    changed = ModuleRepository.update(
        db,
        made.id,
        type="advanced",
        execution_context="POST_RESPONSE",
        script="state['x'] = 1",
        script_analysis_metadata={"ok": True},
    )
    db.expunge_all()
    found = ModuleRepository.require(db, made.id)
    assert found.to_dict() == changed.to_dict()
    assert found.type is ModuleType.ADVANCED
    assert found.execution_context is ExecutionContext.POST_RESPONSE
    assert (found.name, found.stage_priority) == ("mood", 100)
    with pytest.raises(AlreadyExistsError, match=r"^name"):
        ModuleRepository.create(db, name="mood")
    assert ModuleRepository.delete(db, made.id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Mood"),
        ("name", ""),
        ("name", "a" * 51),
        ("name", None),
        ("type", "SIMPLE"),
        ("type", "other"),
        ("execution_context", "immediate"),
        ("execution_context", None),
        ("stage_priority", "1"),
        ("stage_priority", 2**31),
        ("trigger_pattern", "x" * 501),
        ("requires_ai_inference", "yes"),
    ],
)
def test_bad_modules(db: TenantSession, field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        ModuleRepository.create(db, **{"name": "a", field: value})
    assert caught.value.field == field
    assert ModuleRepository.count(db) == 0


def test_deleting_a_module_deletes_its_states(db: TenantSession) -> None:
    module, other = ModuleFactory(db=db), ModuleFactory(db=db)
    chat = ConversationFactory(db=db).id
    for owner in (module.id, other.id, None):
        StateFactory(db=db, conversation_id=chat, module_id=owner)
    with counted_round_trips() as trips:
        assert ModuleRepository.delete(db, module.id)
    assert trips.count == 1
    assert {state.module_id for state in StateRepository.get_all(db, chat)} == {other.id, None}


def test_scripts_are_stored_as_they_are(db: TenantSession) -> None:
    script = "raise SystemExit\n${x} @a \\@b %s :tenant"
    module = ModuleFactory(db=db, type="advanced", script=script)
    db.expunge_all()
    assert ModuleRepository.require(db, module.id).script == script


# Lists


def test_list_filters(db: TenantSession) -> None:
    PersonaFactory(db=db, name="on", mode="autonomous")
    PersonaFactory(db=db, name="off", mode="autonomous", is_active=False)
    PersonaFactory(db=db, name="still")
    ModuleFactory(db=db, name="text")
    ModuleFactory(db=db, name="script", type="advanced")
    ModuleFactory(db=db, name="old", type="advanced", is_active=False)
    for repository, filters, expected in (
        (PersonaRepository, {}, ["still", "off", "on"]),
        (PersonaRepository, {"mode": "autonomous"}, ["off", "on"]),
        (PersonaRepository, {"mode": "autonomous", "active_only": True}, ["on"]),
        (PersonaRepository, {"active_only": True}, ["still", "on"]),
        (PersonaRepository, {"is_active": False}, ["off"]),
        (PersonaRepository, {"order": "name"}, ["off", "on", "still"]),
        (ModuleRepository, {"type": ModuleType.ADVANCED}, ["old", "script"]),
        (ModuleRepository, {"type": "advanced", "active_only": True}, ["script"]),
        (ModuleRepository, {"type": None}, ["old", "script", "text"]),
        (ModuleRepository, {"order": "name", "active_only": True}, ["script", "text"]),
    ):
        with counted_round_trips() as trips, counted_statements() as statements:
            page = repository.list(db, **filters)
        assert names_of(page) == expected
        assert (trips.count, len(statements)) == (1, 1)
    for bad in ("reactive ", "REACTIVE"):
        with pytest.raises(InvalidValueError, match=r"^mode: "):
            PersonaRepository.list(db, mode=bad)


@both
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_pages_by_name(db: TenantSession, repository: Any, factory: Any, limit: int) -> None:
    made = [factory(db=db, name=f"n{n * 7 % 10}") for n in range(10)]
    factory(db=db, name="off", is_active=False)
    rows, cursor = [], None
    while True:
        page = repository.list(db, limit=limit, cursor=cursor, order="name", active_only=True)
        rows += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    assert rows == sorted(made, key=lambda row: row.name)


def test_pages_by_any_name(db: TenantSession) -> None:
    names = ["é", "Ada", "ada", "2026-01-01T00:00:00+00:00", "a b", "🙂", "' OR 1", "null", "5"]
    for name in names:
        PersonaFactory(db=db, name=name)
    expected = names_of(PersonaRepository.list(db, order="name"))
    assert sorted(expected) == sorted(names)
    found, cursor = [], None
    for _ in names:
        page = PersonaRepository.list(db, limit=1, cursor=cursor, order="name")
        found += names_of(page)
        cursor = page.next_cursor
    assert (found, cursor) == (expected, None)


@both
def test_a_cursor_belongs_to_its_order(db: TenantSession, repository: Any, factory: Any) -> None:
    for _ in range(3):
        factory(db=db)
    for order, other in (("name", "created_at"), ("created_at", "name")):
        cursor = repository.list(db, limit=1, order=order).next_cursor
        with pytest.raises(InvalidValueError, match=r"^cursor: "):
            repository.list(db, cursor=cursor, order=other)
    table = repository.model.__tablename__
    for value in (None, 5, "a\0"):
        with pytest.raises(InvalidValueError, match=r"^cursor: "):
            cursor = encode_cursor(f"{table}.name", value, uuid4())
            repository.list(db, cursor=cursor, order="name")


@both
def test_bad_lists(db: TenantSession, repository: Any, factory: Any) -> None:
    for field, bad in (
        ("order", {"order": "id"}),
        ("order", {"order": None}),
        ("active_only", {"active_only": True, "is_active": False}),
        ("colour", {"colour": "red"}),
    ):
        with pytest.raises(InvalidValueError) as caught:
            repository.list(db, **bad)
        assert caught.value.field == field


# By names


@both
def test_get_by_name(
    db: TenantSession, other: TenantSession, repository: Any, factory: Any
) -> None:
    made = factory(db=db, name="a", is_active=False)
    factory(db=other, name="theirs")
    with counted_round_trips() as trips:
        assert repository.get_by_name(db, "a") is made
    assert trips.count == 1
    assert idle(db)
    for name in ("b", "A", "", "theirs", "a\0", "x" * 999, "\ud800"):
        assert repository.get_by_name(db, name) is None
    with pytest.raises(InvalidValueError, match=r"^name: "):
        repository.get_by_name(db, None)


@both
def test_modules_by_names(
    db: TenantSession, other: TenantSession, repository: Any, factory: Any
) -> None:
    made = {name: factory(db=db, name=name) for name in ("a", "b", "c")}
    factory(db=other, name="theirs")
    with counted_round_trips() as trips, counted_statements() as statements:
        found = repository.get_many_by_names(db, iter(["c", "a", "c"]))
    assert found == [made["c"], made["a"], made["c"]]
    assert (trips.count, len(statements)) == (1, 1)
    with pytest.raises(NotFoundError, match=r"theirs, x$") as caught:
        repository.get_many_by_names(db, ["a", "theirs", "x", "theirs"])
    assert caught.value.names == ("theirs", "x")
    assert idle(db)
    unknown = [f"n{n}" for n in range(70_000)]
    with pytest.raises(NotFoundError, match=r"n19 and 69980 more$") as caught:
        repository.get_many_by_names(db, unknown)
    assert caught.value.names == tuple(unknown)
    with counted_statements() as statements:
        assert repository.get_many_by_names(db, []) == []
        for bad in ("abc", ["a", None], [5]):
            with pytest.raises(InvalidValueError, match=r"^names: "):
                repository.get_many_by_names(db, bad)
    assert statements == []


# For a stage


@pytest.fixture
def every_kind(db: TenantSession) -> list[Module]:
    kinds = [
        (kind, context, ai)
        for kind in ModuleType
        for context in ExecutionContext
        for ai in (False, True)
    ]
    return [
        ModuleFactory(
            db=db,
            name=f"m{number}",
            type=kind,
            execution_context=context,
            requires_ai_inference=ai,
            is_active=active,
            stage_priority=number * 5 % 3,
        )
        for number, (kind, context, ai, active) in enumerate(
            (*one, active) for one in kinds for active in (True, False)
        )
    ]


def belongs(module: Module, stage: int) -> bool:
    """The rules, as the system that we replace has them."""
    immediate = module.execution_context == "IMMEDIATE"
    afterwards = module.execution_context == "POST_RESPONSE"
    ai = module.requires_ai_inference
    rules = {
        1: module.type == "simple" or (immediate and not ai) or afterwards,
        2: immediate and ai,
        4: afterwards and not ai,
        5: afterwards and ai,
    }
    return module.is_active and rules[stage]


@pytest.mark.parametrize("stage", [1, 2, 4, 5])
def test_modules_for_a_stage(
    db: TenantSession, other: TenantSession, every_kind: list[Module], stage: int
) -> None:
    ModuleFactory(db=other)
    expected = sorted(
        (module for module in every_kind if belongs(module, stage)),
        key=lambda module: (module.stage_priority, module.name),
    )
    assert expected
    with counted_round_trips() as trips, counted_statements() as statements:
        assert ModuleRepository.for_stage(db, stage) == expected
    assert (trips.count, len(statements)) == (1, 1)

    template = "".join(rf"(@{module.name}) " for module in every_kind[::3])
    template += " ".join(rf"\@{module.name}" for module in every_kind)
    persona = PersonaFactory(db=db, template=template).id
    with counted_round_trips() as trips, counted_statements() as statements:
        found = ModuleRepository.for_stage(db, stage, persona_id=persona)
    assert found == [module for module in expected if module in every_kind[::3]]
    assert (trips.count, len(statements)) == (2, 2)
    assert idle(db)


def test_a_stage_of_a_persona_without_references(db: TenantSession) -> None:
    ModuleFactory(db=db, name="a", content="@b")
    ModuleFactory(db=db, name="b")
    silent = PersonaFactory(db=db, template=r"\@a a@b")
    with counted_statements() as statements:
        assert ModuleRepository.for_stage(db, 1, persona_id=str(silent.id)) == []
    assert len(statements) == 1
    direct = PersonaFactory(db=db, template="@a")
    assert names_of(ModuleRepository.for_stage(db, 1, persona_id=direct.id)) == ["a"]


def test_bad_stages(db: TenantSession, other: TenantSession) -> None:
    for stage in (0, 3, 6, "1", 1.0, True, None):
        with pytest.raises(InvalidValueError, match=r"^stage: "):
            ModuleRepository.for_stage(db, stage)  # type: ignore[arg-type]
    for persona in (uuid4(), PersonaFactory(db=other).id):
        with pytest.raises(InvalidReferenceError) as caught:
            ModuleRepository.for_stage(db, 1, persona_id=persona)
        assert caught.value.field == "persona_id"
    with pytest.raises(InvalidValueError, match=r"^persona_id: "):
        ModuleRepository.for_stage(db, 1, persona_id="Ada")
    assert idle(db)
