"""Settings of users: merged in the database, so that concurrent changes all survive."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from enum import StrEnum
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator

import database
from database import (
    ConfigurationError,
    DatabaseError,
    InvalidValueError,
    NotFoundError,
    SessionLocal,
    TenantSession,
    User,
    UserRepository,
    get_engine,
    transaction,
)
from tests.counting import counted_round_trips, counted_statements


class Theme(StrEnum):
    LIGHT = "light"
    DARK = "dark"


class Mail(BaseModel):
    model_config = ConfigDict(strict=True)

    weekly: bool = False
    since: date | None = None


class Preferences(BaseModel):
    model_config = ConfigDict(extra="forbid")

    theme: Theme = Theme.LIGHT
    size: int = Field(12, ge=6, le=72)
    mail: Mail = Mail()


class Needy(BaseModel):
    name: str

    @field_validator("name")
    @classmethod
    def _fail(cls, _: str) -> str:
        raise ZeroDivisionError


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


def idle(db: TenantSession) -> bool:
    return not db.in_transaction() and get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def stored(user: User) -> Any:
    with SessionLocal(tenant_id=user.tenant_id) as db:
        return UserRepository.require(db, user.id).settings


@pytest.fixture
def user(db: TenantSession) -> User:
    return UserRepository.create(db, settings={"theme": "dark", "mail": {"weekly": True}})


def test_get_settings(db: TenantSession, user: User) -> None:
    assert UserRepository.get_settings(db, user.id) == {"theme": "dark", "mail": {"weekly": True}}
    assert UserRepository.get_settings(db, str(UserRepository.create(db).id)) == {}
    with counted_round_trips() as trips:
        UserRepository.get_settings(db, user.id)
    assert trips.count == 1
    assert idle(db)


def test_update_settings(db: TenantSession, user: User) -> None:
    before = user.updated_at
    changes = {"size": 14, "mail": {"since": "2026-01-01"}, "theme": None}
    with counted_round_trips() as trips, counted_statements() as statements:
        found = UserRepository.update_settings(db, user.id, changes)
    assert (trips.count, len(statements)) == (1, 1)
    assert found == {"size": 14, "mail": {"weekly": True, "since": "2026-01-01"}}
    assert found == stored(user) == user.settings == UserRepository.get_settings(db, user.id)
    assert user.updated_at > before
    assert idle(db)
    # What the caller does with it is no change of the row.
    found["mail"]["weekly"] = False
    assert user.settings["mail"]["weekly"] is True
    assert UserRepository.update_settings(db, user.id, {}) == stored(user)


# RFC 7396, appendix A, as far as objects are patched by objects.
RFC_7396: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), RFC_7396)
def test_the_examples_of_the_rfc(db: TenantSession, target: Any, patch: Any, result: Any) -> None:
    user = UserRepository.create(db, settings=target)
    assert UserRepository.update_settings(db, user.id, patch) == result


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab\\\"'%:é😀", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("abc%:"), json_values, max_size=4)


def merged(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        result[key] = merged(result.get(key), value)
        if value is None:
            del result[key]
    return result


@given(target=objects, patch=objects)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_objects(db: TenantSession, target: Any, patch: Any) -> None:
    user = UserRepository.create(db, settings=target)
    assert UserRepository.update_settings(db, user.id, patch) == merged(target, patch)
    assert stored(user) == merged(target, patch)


@pytest.mark.parametrize(
    "changes",
    [None, 5, "theme", [], [("theme", "dark")], b"{}", {1: 2}, {"a": {2: 3}}, {"a": object()}],
)
def test_what_is_no_json_object(db: TenantSession, user: User, changes: Any) -> None:
    for model in (None, Preferences):
        with pytest.raises(InvalidValueError) as caught:
            UserRepository.update_settings(db, user.id, changes, model=model)
        assert caught.value.field == "changes"
    assert idle(db)
    assert stored(user) == {"theme": "dark", "mail": {"weekly": True}}


def test_what_json_of_postgresql_cannot_hold(
    db: TenantSession, user: User, worker_url: str
) -> None:
    found = UserRepository.update_settings(db, user.id, {"a\x00": ["\ud800", float("nan")]})
    assert found["a\ufffd"] == ["\ufffd", None]
    database.configure(url=worker_url, unstorable="error")
    with SessionLocal(tenant_id=user.tenant_id) as strict:
        for value in ("\x00", "\ud800", float("inf"), {"\x00": 1}):
            with pytest.raises(InvalidValueError, match=r"^changes: must not contain"):
                UserRepository.update_settings(strict, user.id, {"b": value})
    assert "b" not in stored(user)


def test_no_such_user(db: TenantSession, other: TenantSession, user: User) -> None:
    id_ = user.id
    for session, unknown in ((db, uuid4()), (other, id_)):
        with pytest.raises(NotFoundError):
            UserRepository.get_settings(session, unknown)
        for model in (None, Preferences):
            with pytest.raises(NotFoundError):
                UserRepository.update_settings(session, unknown, {"size": 20}, model=model)
        assert idle(session)
    with pytest.raises(InvalidValueError, match=r"^user_id: must be a UUID"):
        UserRepository.get_settings(db, "x")
    assert UserRepository.get_settings(db, id_) == {"theme": "dark", "mail": {"weekly": True}}
    with SessionLocal(tenant_id=database.ALL_TENANTS) as across:
        with pytest.raises(ConfigurationError):
            UserRepository.get_settings(across, id_)
        with pytest.raises(ConfigurationError):
            UserRepository.update_settings(across, id_, {})


# Checked by a model


def test_settings_that_a_model_takes(db: TenantSession, user: User) -> None:
    changes = {"size": 20, "mail": {"since": "2026-01-01"}}
    with counted_statements() as statements:
        found = UserRepository.update_settings(db, user.id, changes, model=Preferences)
    assert len(statements) == 2
    expected = {"theme": "dark", "size": 20, "mail": {"weekly": True, "since": "2026-01-01"}}
    assert found == stored(user) == user.settings == expected
    assert idle(db)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"theme": "secret"}, "settings.theme"),
        ({"size": 5}, "settings.size"),
        ({"mail": {"weekly": "secret"}}, "settings.mail.weekly"),
        ({"mail": [1]}, "settings.mail"),
        ({"colour": "secret"}, "settings.colour"),
    ],
)
def test_settings_that_a_model_refuses(
    db: TenantSession, user: User, changes: dict[str, Any], field: str
) -> None:
    before = UserRepository.require(db, user.id).to_dict()
    with pytest.raises(InvalidValueError) as caught:
        UserRepository.update_settings(db, user.id, changes | {"new": 1}, model=Preferences)
    assert caught.value.field in (field, "settings.new")
    with pytest.raises(InvalidValueError, match=f"^{field}: ") as caught:
        UserRepository.update_settings(db, user.id, changes, model=Preferences)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None
    assert idle(db)
    assert UserRepository.require(db, before["id"]).to_dict() == before


def test_the_merged_settings_are_checked(db: TenantSession, user: User) -> None:
    UserRepository.update_settings(db, user.id, {"colour": "red"})
    with pytest.raises(InvalidValueError, match=r"^settings\.colour: is not a field$"):
        UserRepository.update_settings(db, user.id, {"size": 20}, model=Preferences)
    change = {"size": 20, "colour": None}
    assert UserRepository.update_settings(db, user.id, change, model=Preferences)["size"] == 20


def test_a_refusal_within_a_unit(db: TenantSession, user: User) -> None:
    with transaction(db):
        UserRepository.update_settings(db, user.id, {"size": 20})
        with pytest.raises(InvalidValueError, match=r"settings\.size"):
            UserRepository.update_settings(db, user.id, {"size": 500}, model=Preferences)
        assert user.settings["size"] == 20
        UserRepository.update_settings(db, user.id, {"theme": "light"}, model=Preferences)
    assert stored(user) == {"theme": "light", "size": 20, "mail": {"weekly": True}}


@pytest.mark.parametrize("model", [dict, Preferences(), "Preferences", TenantSession])
def test_what_is_no_model(db: TenantSession, user: User, model: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^model: "):
        UserRepository.update_settings(db, user.id, {"size": 20}, model=model)
    assert "size" not in stored(user)


def test_a_model_that_fails(db: TenantSession, user: User) -> None:
    with pytest.raises(ZeroDivisionError):
        UserRepository.update_settings(db, user.id, {"name": "x"}, model=Needy)
    assert idle(db)
    with pytest.raises(InvalidValueError, match=r"^settings\.name: must be given$"):
        UserRepository.update_settings(db, user.id, {"x": 1}, model=Needy)
    assert stored(user) == {"theme": "dark", "mail": {"weekly": True}}


# Concurrently


@pytest.mark.parametrize("model", [None, Open])
def test_concurrent_changes_of_different_keys_survive(
    user: User, model: type[BaseModel] | None
) -> None:
    ready = threading.Barrier(8)

    def change(worker: int) -> None:
        with SessionLocal(tenant_id=user.tenant_id) as session:
            ready.wait()
            for n in range(5):
                changes = {f"top-{worker}-{n}": n, "mail": {f"inner-{worker}-{n}": n}}
                UserRepository.update_settings(session, user.id, changes, model=model)

    with ThreadPoolExecutor(8) as pool:
        for call in [pool.submit(change, worker) for worker in range(8)]:
            call.result()
    found = stored(user)
    assert len(found) == 2 + 8 * 5
    assert len(found["mail"]) == 1 + 8 * 5


def test_deep_and_wide_settings(db: TenantSession, user: User) -> None:
    deep: dict[str, Any] = {"end": 1}
    for _ in range(200):
        deep = {"a": deep}
    assert UserRepository.update_settings(db, user.id, deep)["a"] == deep["a"]
    wide = {f"key {n}": "x" * 100 for n in range(2000)}
    assert UserRepository.update_settings(db, user.id, wide).items() >= wide.items()
    too_deep = json.loads("[" * 300 + "]" * 300)
    with pytest.raises(DatabaseError, match=r"^changes: "):
        UserRepository.update_settings(db, user.id, {"b": too_deep})
