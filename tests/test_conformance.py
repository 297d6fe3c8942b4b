"""What all repositories promise alike; a new one joins by one line in `CASES`."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from database import (
    AlreadyExistsError,
    ApiKeyRepository,
    ContextRepository,
    ConversationRepository,
    DatabaseError,
    IdentityRepository,
    InvalidValueError,
    MemoryRepository,
    MessageRepository,
    ModuleRepository,
    NotFoundError,
    PersonaRepository,
    Repository,
    SessionLocal,
    StateRepository,
    TenantModel,
    TenantSession,
    UserRepository,
    get_engine,
    transaction,
)
from tests import factories
from tests.factories import fields_of


class Case(NamedTuple):
    """A repository, and of its fields those to change and those to find a row by."""

    repository: type[Repository[Any]]
    factory: Any
    update: dict[str, Any]
    filter: dict[str, Any]

    def make(self, db: TenantSession, count: int = 1, **fields: Any) -> list[Any]:
        return self.make_of(db, [fields_of(self.factory, db, **fields) for _ in range(count)])

    def make_of(self, db: TenantSession, rows: Iterable[dict[str, Any]]) -> list[Any]:
        made: list[Any] = self.repository.create_many(db, rows)
        return [getattr(one, "api_key", one) for one in made]

    def newest_first(self, rows: list[Any]) -> list[Any]:
        return sorted(rows, key=lambda row: (getattr(row, self.repository.order), row.id))[::-1]


CASES = [
    Case(UserRepository, factories.UserFactory, {"first_name": "Ada"}, {"username": "ada"}),
    Case(IdentityRepository, factories.IdentityFactory, {"data": {"a": 1}}, {"provider": "x"}),
    Case(ApiKeyRepository, factories.ApiKeyFactory, {"name": "ci"}, {"name": "other"}),
    Case(ConversationRepository, factories.ConversationFactory, {"title": "b"}, {"title": "a"}),
    Case(MessageRepository, factories.MessageFactory, {"content": "b"}, {"role": "tool"}),
    Case(ContextRepository, factories.ContextFactory, {"content": [1]}, {"context_type": "x"}),
    Case(PersonaRepository, factories.PersonaFactory, {"template": "b"}, {"mode": "autonomous"}),
    Case(ModuleRepository, factories.ModuleFactory, {"content": "b"}, {"type": "advanced"}),
    Case(StateRepository, factories.StateFactory, {"state_value": 2}, {"execution_stage": "x"}),
    Case(MemoryRepository, factories.MemoryFactory, {"importance": 0.9}, {"memory_type": "x"}),
]

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(params=CASES, ids=lambda case: case.repository.model.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def other_case(case: Case) -> Case:
    return CASES[CASES.index(case) - 1]


def tenant_of(db: TenantSession) -> str:
    return str(db.info["database.tenant"])


def idle(db: TenantSession) -> bool:
    return not db.in_transaction() and get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def stored(db: TenantSession, row: TenantModel) -> dict[str, Any] | None:
    """What another session of the tenant finds: so it was committed."""
    repository = next(c.repository for c in CASES if c.repository.model is type(row))
    with SessionLocal(tenant_id=tenant_of(db)) as session:
        found = repository.get(session, row.id)
        return None if found is None else dict(found.to_dict())


def all_of(case: Case, db: TenantSession, limit: int, **filters: Any) -> list[Any]:
    rows, cursor = [], None
    while True:
        page = case.repository.list(db, limit=limit, cursor=cursor, **filters)
        assert len(page) <= limit
        rows += page.items
        cursor = page.next_cursor
        if cursor is None:
            return rows


def test_every_repository_is_here() -> None:
    assert {case.repository.model for case in CASES} == {
        mapper.class_ for mapper in TenantModel.registry.mappers
    }


def test_create(case: Case, db: TenantSession) -> None:
    made = case.factory(db=db)
    assert isinstance(made, case.repository.model)
    assert made.tenant_id == tenant_of(db)
    assert stored(db, made) == made.to_dict()
    assert case.repository.require(db, made.id) is made
    assert case.repository.require(db, str(made.id)) is made
    assert case.repository.exists(db, made.id)
    assert case.repository.count(db) == 1


def test_create_with_a_known_id(case: Case, db: TenantSession) -> None:
    made = case.factory(db=db)
    with pytest.raises(AlreadyExistsError) as caught:
        case.factory(db=db, id=made.id)
    assert caught.value.key == "id"
    assert case.repository.count(db) == 1


def test_update(case: Case, db: TenantSession) -> None:
    made, bystander = case.make(db, 2)
    before, untouched = made.to_dict(), bystander.to_dict()
    changed = case.repository.update(db, made.id, **case.update)
    assert changed is made
    assert changed.updated_at.isoformat() > before["updated_at"]
    expected = before | case.update | {"updated_at": changed.updated_at.isoformat()}
    if "version" in before:
        expected["version"] = changed.version
        assert changed.version > before["version"]
    assert stored(db, made) == changed.to_dict() == expected
    if case.repository is not MessageRepository:
        assert stored(db, bystander) == untouched


def test_update_of_an_id_is_refused(case: Case, db: TenantSession) -> None:
    made = case.factory(db=db)
    with pytest.raises(InvalidValueError, match=r"^id: "):
        case.repository.update(db, made.id, id=uuid4())
    assert stored(db, made) == made.to_dict()


def test_delete(case: Case, db: TenantSession) -> None:
    made, bystander = case.make(db, 2)
    assert case.repository.delete(db, made.id) is True
    assert stored(db, made) is None
    assert case.repository.delete(db, made.id) is False
    assert not case.repository.exists(db, made.id)
    assert stored(db, bystander) is not None


def test_unknown_id(case: Case, db: TenantSession) -> None:
    case.factory(db=db)
    assert_unknown(case, db, uuid4())
    assert case.repository.count(db) == 1


def test_row_of_another_tenant(case: Case, db: TenantSession, other: TenantSession) -> None:
    made = case.factory(db=db)
    assert_unknown(case, other, made.id)
    assert case.repository.count(other) == 0
    assert case.repository.list(other).items == []
    assert stored(db, made) == made.to_dict()


def assert_unknown(case: Case, db: TenantSession, id_: UUID) -> None:
    assert case.repository.get(db, id_) is None
    assert case.repository.exists(db, id_) is False
    assert case.repository.delete(db, id_) is False
    with pytest.raises(NotFoundError):
        case.repository.require(db, id_)
    with pytest.raises(NotFoundError):
        case.repository.update(db, id_, **case.update)


def test_tenants_may_use_the_same_id(case: Case, db: TenantSession, other: TenantSession) -> None:
    made = case.factory(db=db)
    twin = case.factory(db=other, id=made.id)
    assert case.repository.delete(other, twin.id)
    assert stored(db, made) == made.to_dict()


def test_create_many(case: Case, db: TenantSession) -> None:
    rows = [fields_of(case.factory, db, id=uuid4()) for _ in range(20)]
    made = case.make_of(db, iter(rows))
    assert [row.id for row in made] == [row["id"] for row in rows]
    assert [stored(db, row) for row in made[::7]] == [row.to_dict() for row in made[::7]]
    assert case.repository.create_many(db, []) == []


@pytest.mark.parametrize("place", [0, 2, 4])
def test_create_many_is_all_or_none(case: Case, db: TenantSession, place: int) -> None:
    there = case.factory(db=db)
    rows = [fields_of(case.factory, db) for _ in range(5)]
    rows[place]["id"] = there.id
    with pytest.raises(AlreadyExistsError):
        case.repository.create_many(db, rows)
    assert case.repository.count(db) == 1
    del rows[place]["id"]
    assert len(case.repository.create_many(db, rows)) == 5


@pytest.mark.parametrize("limit", [1, 3, 12, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_pages_are_the_list(case: Case, db: TenantSession, ties: bool, limit: int) -> None:  # noqa: FBT001
    same = {case.repository.order: NOON} if ties and case.repository.order != "id" else {}
    made = case.make(db, 12, **same)
    assert all_of(case, db, limit) == case.newest_first(made)


def test_pages_while_rows_come_and_go(case: Case, db: TenantSession) -> None:
    same = {} if case.repository.order == "id" else {case.repository.order: NOON}
    made = case.newest_first(case.make(db, 9, **same))
    first = case.repository.list(db, limit=3)
    case.make(db, 4, **same)
    case.factory(db=db)
    # The row that the cursor stands on may go too.
    for gone in (made[2], made[5]):
        case.repository.delete(db, gone.id)
    second = case.repository.list(db, limit=3, cursor=first.next_cursor)
    third = case.repository.list(db, limit=3, cursor=second.next_cursor)
    assert [*first, *second, *third] == made[:5] + made[6:]
    assert third.next_cursor is None


def test_filters(case: Case, db: TenantSession) -> None:
    case.make(db, 3)
    matching = case.make(db, 3, **case.filter)
    assert all_of(case, db, 2, **case.filter) == case.newest_first(matching)
    assert case.repository.count(db, **case.filter) == 3
    assert case.repository.count(db, **dict.fromkeys(case.filter)) == 6
    assert case.repository.list(db, id=uuid4(), **case.filter).items == []
    for call in (case.repository.list, case.repository.count):
        with pytest.raises(InvalidValueError, match=r"^colour: "):
            call(db, colour="red")


@pytest.mark.parametrize("limit", [0, -1, 1001, "5", True, 5.0, None])
def test_limit(case: Case, db: TenantSession, limit: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        case.repository.list(db, limit=limit)
    assert caught.value.field == "limit"


def test_cursor_of_another_list(case: Case, db: TenantSession) -> None:
    other_case(case).make(db, 2)
    cursor = other_case(case).repository.list(db, limit=1).next_cursor
    assert cursor is not None
    with pytest.raises(InvalidValueError) as caught:
        case.repository.list(db, cursor=cursor)
    assert caught.value.field == "cursor"


def encoded(value: object) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(value)).decode().rstrip("=")


# A cursor that passes must be one of this list: no text drawn here is.
json_values = st.none() | st.booleans() | st.integers(-9, 9) | st.text() | st.datetimes().map(str)
garbage = st.one_of(
    st.text(),
    st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True),
    st.lists(json_values, max_size=4).map(encoded),
    st.dictionaries(st.text(), json_values, max_size=4).map(encoded),
    st.builds(
        lambda name, value: encoded([f"users.{name}", value, str(UUID(int=1))]),
        st.sampled_from(["id", "created_at", "updated_at"]),
        # None and naive times are no values of created_at; the latter of no list at all.
        st.none() | st.datetimes().map(str) | st.text(),
    ),
    st.sampled_from([5, b"", [], object()]),
)


@given(cursor=garbage)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_garbage_is_no_cursor(db: TenantSession, cursor: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        UserRepository.list(db, cursor=cursor)
    assert caught.value.field == "cursor"
    assert idle(db)


@contextmanager
def undone_unit(db: TenantSession) -> Iterator[None]:
    with suppress(ZeroDivisionError), transaction(db):
        yield
        raise ZeroDivisionError


def test_unit_of_several_calls(case: Case, db: TenantSession) -> None:
    kept, dropped = case.make(db, 2)
    before = kept.to_dict()
    with undone_unit(db):
        made = case.factory(db=db)
        case.repository.update(db, kept.id, **case.update)
        assert case.repository.delete(db, dropped.id)
        # The unit sees its own work.
        assert case.repository.exists(db, made.id)
        assert case.repository.count(db) == 2
    assert stored(db, kept) == before
    assert stored(db, dropped) is not None
    assert case.repository.count(db) == 2
    with transaction(db):
        made = case.factory(db=db)
        case.repository.delete(db, dropped.id)
        case.repository.update(db, made.id, **case.update)
        assert stored(db, made) is None
    assert stored(db, made) == made.to_dict()
    assert stored(db, dropped) is None


def test_error_within_a_unit(case: Case, db: TenantSession) -> None:
    with transaction(db):
        first = case.factory(db=db)
        with pytest.raises(AlreadyExistsError):
            case.factory(db=db, id=first.id)
        with undone_unit(db):
            undone = case.factory(db=db)
        second = case.factory(db=db)
    assert stored(db, first) is not None
    assert stored(db, undone) is None
    assert stored(db, second) is not None


def test_to_dict(case: Case, db: TenantSession) -> None:
    made = case.factory(db=db)
    shown = made.to_dict()
    assert orjson.loads(orjson.dumps(shown)) == shown
    columns = {column.name for column in case.repository.model.__table__.columns}
    assert shown.keys() - {"user_email"} == columns - {"embedding", "key_hash"}


def test_every_call_leaves_the_session_idle(case: Case, db: TenantSession) -> None:
    repository, taken = case.repository, case.factory(db=db).id
    fields = fields_of(case.factory, db)
    calls: dict[str, Callable[[], Any]] = {
        "create": lambda: repository.create(db, **fields),
        "create with a taken id": lambda: case.factory(db=db, id=taken),
        "create of nothing known": lambda: repository.create(db, nonsense=1),
        "create_many": lambda: case.make(db, 3),
        "create_many with a taken id": lambda: case.make(db, 2, id=taken),
        "get": lambda: repository.get(db, taken),
        "get of no id": lambda: repository.get(db, "x"),
        "require": lambda: repository.require(db, uuid4()),
        "list": lambda: [row.to_dict() for row in repository.list(db, limit=2)],
        "list by nothing known": lambda: repository.list(db, nonsense=1),
        "count": lambda: repository.count(db),
        "exists": lambda: repository.exists(db, taken),
        "update": lambda: repository.update(db, taken, **case.update).to_dict(),
        "update of an unknown id": lambda: repository.update(db, uuid4(), **case.update),
        "update of nothing known": lambda: repository.update(db, taken, nonsense=1),
        "delete": lambda: repository.delete(db, taken),
        "delete of an unknown id": lambda: repository.delete(db, uuid4()),
    }
    failed = set()
    for name, call in calls.items():
        try:
            call()
        except DatabaseError:
            failed.add(name)
        assert idle(db), name
    assert failed == {name for name in calls if " " in name or name == "require"} - {
        "delete of an unknown id"
    }
