"""Users by what others know them as: found, made once, linked on request, brought up to date."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest

import database
from database import (
    AlreadyExistsError,
    ConfigurationError,
    DatabaseError,
    Identity,
    IdentityRepository,
    InvalidReferenceError,
    InvalidValueError,
    SessionLocal,
    TenantSession,
    User,
    UserRepository,
    get_engine,
    transaction,
)
from tests.counting import counted_round_trips, counted_statements

GOOGLE = "110169484474386276334"
TELEGRAM = str(2**63 - 1)

find = UserRepository.get_by_identity
find_or_make = UserRepository.get_or_create_by_identity


def idle(db: TenantSession) -> bool:
    return not db.in_transaction() and get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def identity_of(db: TenantSession, provider: str, subject: str) -> Identity:
    found = IdentityRepository.get_by_subject(db, provider, subject)
    assert found is not None
    return found


# Made and found


def test_the_identities_of_users(db: TenantSession, other: TenantSession) -> None:
    ada = find_or_make(db, "google", GOOGLE)
    bob = find_or_make(db, "telegram", TELEGRAM)
    nobody = UserRepository.create(db)
    find_or_make(db, "telegram", "1", link_to=ada.id)
    stranger = find_or_make(other, "google", GOOGLE)
    known = IdentityRepository.of_users(db, [bob.id, str(ada.id), nobody.id, stranger.id, ada.id])
    assert idle(db)
    assert [(i.user_id, i.subject) for i in known] == [
        (ada.id, GOOGLE),
        (bob.id, TELEGRAM),
        (ada.id, "1"),
    ]
    assert IdentityRepository.of_users(db, []) == []
    with pytest.raises(InvalidValueError, match="user_ids"):
        IdentityRepository.of_users(db, ["x"])


def test_an_identity_makes_its_user_once(db: TenantSession) -> None:
    data = {"chat_id": 2**53}
    user = find_or_make(db, "google", GOOGLE, email="Ada@Example.com", username="ada", data=data)
    assert (user.email, user.username) == ("ada@example.com", "ada")
    assert user.last_active_at is not None
    assert user.is_active
    assert find(db, "google", GOOGLE) is user
    assert find_or_make(db, "google", GOOGLE) is user
    assert identity_of(db, "google", GOOGLE).data == data
    assert (UserRepository.count(db), IdentityRepository.count(db)) == (1, 1)
    assert idle(db)


@pytest.mark.parametrize("subject", [GOOGLE, TELEGRAM, "-1001234567890", "0042", "é😀", "x" * 255])
def test_subjects_round_trip(db: TenantSession, subject: str) -> None:
    user = find_or_make(db, "telegram", subject)
    db.expunge_all()
    found = find(db, "telegram", subject)
    assert found is not None
    assert found.id == user.id
    assert identity_of(db, "telegram", subject).subject == subject


def test_providers_do_not_mix(db: TenantSession, other: TenantSession) -> None:
    made = [find_or_make(db, "google", "1"), find_or_make(db, "telegram", "1")]
    made += [find_or_make(db, "google", "2"), find_or_make(other, "google", "1")]
    assert len({user.id for user in made}) == 4
    assert find(other, "telegram", "1") is None


CALLS: dict[str, Callable[[TenantSession, Any, Any], Any]] = {
    "find": find,
    "find or make": find_or_make,
    "with data": lambda db, p, s: find_or_make(db, p, s, data={"a": 1}),
    "by subject": IdentityRepository.get_by_subject,
    "set data": lambda db, p, s: IdentityRepository.set_data(db, p, s, {}),
    "unlink": IdentityRepository.unlink,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [2**63 - 1, 5, None, True, b"1", uuid4()])
def test_an_identity_is_text(db: TenantSession, call: str, value: Any) -> None:
    for field, arguments in (("subject", ("telegram", value)), ("provider", (value, "1"))):
        with pytest.raises(InvalidValueError) as caught:
            CALLS[call](db, *arguments)
        assert (caught.value.field, caught.value.rule) == (field, "must be text")
    assert idle(db)
    assert UserRepository.count(db) == 0


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("provider", {"provider": ""}),
        ("provider", {"provider": "x" * 65}),
        ("subject", {"subject": ""}),
        ("subject", {"subject": "x" * 256}),
        ("email", {"email": "nobody"}),
        ("username", {"username": 5}),
        ("data", {"data": [1]}),
        ("data", {"data": {1: 2}}),
        ("link_to", {"link_to": "x"}),
    ],
)
def test_bad_values(db: TenantSession, field: str, given: dict[str, Any]) -> None:
    for known in (False, True):
        if known:
            find_or_make(db, "google", "1")
        count = UserRepository.count(db)
        with pytest.raises(InvalidValueError) as caught:
            find_or_make(db, **{"provider": "google", "subject": "1"} | given)
        assert caught.value.field == field
        assert idle(db)
        assert UserRepository.count(db) == IdentityRepository.count(db) == count


# Brought up to date


def test_a_known_user_is_brought_up_to_date(db: TenantSession) -> None:
    user = find_or_make(db, "google", "1", email="a@example.com", first_name="Ada", data={"a": 1})
    seen = user.last_active_at
    find_or_make(db, "google", "1", email="b@example.com", last_name="Byron", data={"b": 2})
    assert (user.email, user.first_name, user.last_name) == ("b@example.com", "Ada", "Byron")
    assert seen is not None
    assert user.last_active_at is not None
    assert user.last_active_at > seen
    identity = identity_of(db, "google", "1")
    assert identity.data == {"b": 2}
    assert identity.updated_at > identity.created_at
    find_or_make(db, "google", "1")
    assert identity_of(db, "google", "1").data == {"b": 2}
    find_or_make(db, "google", "1", data={})
    assert identity_of(db, "google", "1").data == {}


def test_an_inactive_user_stays_so(db: TenantSession) -> None:
    user = find_or_make(db, "google", "1")
    UserRepository.update(db, user.id, is_active=False)
    assert find_or_make(db, "google", "1", username="x", data={"a": 1}) is user
    assert (user.is_active, user.username) == (False, "x")


def test_an_equal_address_links_nothing(db: TenantSession) -> None:
    UserRepository.create(db, email="ada@example.com")
    find_or_make(db, "telegram", "1")
    for subject in ("1", "2"):
        with pytest.raises(AlreadyExistsError) as caught:
            find_or_make(db, "telegram", subject, email="ADA@example.com", data={"a": 1})
        assert caught.value.key == "email"
        assert idle(db)
    assert (UserRepository.count(db), IdentityRepository.count(db)) == (2, 1)
    assert identity_of(db, "telegram", "1").data == {}, "all or nothing"


@pytest.mark.parametrize(("data", "trips"), [(None, 2), ({"a": 1}, 3)])
def test_a_known_identity_costs_two_statements(db: TenantSession, data: Any, trips: int) -> None:
    user = find_or_make(db, "google", "1")
    with counted_round_trips() as counted, counted_statements() as statements:
        find_or_make(db, "google", "1", email="a@example.com", data=data, link_to=user.id)
    assert (len(statements), counted.count) == (2, trips)


# Linked


@pytest.mark.parametrize("as_text", [False, True])
def test_a_second_provider_is_linked_on_request(db: TenantSession, *, as_text: bool) -> None:
    user = find_or_make(db, "google", GOOGLE, email="ada@example.com", first_name="Ada")
    link_to: Any = str(user.id) if as_text else user.id
    for _ in range(2):
        linked = find_or_make(
            db, "telegram", TELEGRAM, username="ada", data={"chat_id": 1}, link_to=link_to
        )
        assert linked is user
    assert (user.email, user.username, user.first_name) == ("ada@example.com", "ada", "Ada")
    assert (UserRepository.count(db), IdentityRepository.count(db, user_id=user.id)) == (1, 2)
    assert identity_of(db, "telegram", TELEGRAM).data == {"chat_id": 1}
    assert idle(db)


@pytest.mark.parametrize("data", [None, {"chat_id": 2}])
def test_an_identity_of_another_user_is_not_taken_over(db: TenantSession, data: Any) -> None:
    owner = find_or_make(db, "telegram", "1", username="owner", data={"chat_id": 1})
    thief = find_or_make(db, "google", "1").id
    with pytest.raises(AlreadyExistsError) as caught:
        find_or_make(db, "telegram", "1", username="thief", data=data, link_to=thief)
    assert caught.value.key == "provider, subject"
    assert idle(db)
    assert find(db, "telegram", "1") is owner
    assert owner.username == "owner"
    assert UserRepository.require(db, thief).username is None
    assert identity_of(db, "telegram", "1").data == {"chat_id": 1}


def test_only_a_user_of_the_tenant_is_linked(db: TenantSession, other: TenantSession) -> None:
    foreign = UserRepository.create(other)
    for link_to in (foreign.id, uuid4()):
        with pytest.raises(InvalidReferenceError) as caught:
            find_or_make(db, "google", "1", email="a@example.com", link_to=link_to)
        assert caught.value.field == "link_to"
        assert idle(db)
    assert (UserRepository.count(db), IdentityRepository.count(db)) == (0, 0)


def test_linking_with_the_address_of_another_user_changes_nothing(db: TenantSession) -> None:
    UserRepository.create(db, email="taken@example.com")
    user = UserRepository.create(db).id
    with pytest.raises(AlreadyExistsError) as caught:
        find_or_make(db, "google", "1", email="taken@example.com", link_to=user)
    assert caught.value.key == "email"
    assert find(db, "google", "1") is None
    assert UserRepository.require(db, user).last_active_at is None


def test_within_a_unit(db: TenantSession) -> None:
    with pytest.raises(ZeroDivisionError), transaction(db):
        find_or_make(db, "google", "1", data={"a": 1})
        with pytest.raises(AlreadyExistsError):
            find_or_make(db, "google", "1", data={"a": 2}, link_to=UserRepository.create(db).id)
        assert identity_of(db, "google", "1").data == {"a": 1}
        raise ZeroDivisionError
    assert UserRepository.count(db) == 0


# Listed and unlinked


def test_list_identities(db: TenantSession, other: TenantSession) -> None:
    for subject in range(5):
        find_or_make(db, "telegram", str(subject), data={"chat_id": subject})
    find_or_make(db, "google", "9")
    find_or_make(other, "telegram", "8")
    first = UserRepository.list_identities(db, "telegram", limit=3)
    second = UserRepository.list_identities(db, "telegram", limit=3, cursor=first.next_cursor)
    assert [identity.subject for identity in (*first, *second)] == ["4", "3", "2", "1", "0"]
    assert first.items[0].data == {"chat_id": 4}
    assert second.next_cursor is None
    assert UserRepository.list_identities(db, "github").items == []
    for provider in (None, 5):
        with pytest.raises(InvalidValueError, match=r"^provider: must be text$"):
            UserRepository.list_identities(db, provider)  # type: ignore[arg-type]
    assert idle(db)


def test_unlink(db: TenantSession, other: TenantSession) -> None:
    user = find_or_make(db, "google", "1")
    assert IdentityRepository.unlink(other, "google", "1") is False
    assert IdentityRepository.unlink(db, "google", "1") is True
    assert IdentityRepository.unlink(db, "google", "1") is False
    assert find(db, "google", "1") is None
    assert UserRepository.exists(db, user.id)
    assert find_or_make(db, "google", "1").id != user.id


def test_set_data(db: TenantSession, other: TenantSession) -> None:
    find_or_make(db, "google", "1", data={"a": 1})
    assert IdentityRepository.set_data(other, "google", "1", {"b": 2}) is None
    assert IdentityRepository.set_data(db, "google", "2", {"b": 2}) is None
    with counted_round_trips() as trips:
        found = IdentityRepository.set_data(db, "google", "1", {"b": 2})
    assert found is not None
    assert found.data == {"b": 2}
    assert trips.count == 1


def test_across_tenants_nothing_is_found() -> None:
    with SessionLocal(tenant_id=database.ALL_TENANTS) as across:
        for data in (None, {"a": 1}):
            with pytest.raises(ConfigurationError, match="one tenant"):
                find_or_make(across, "google", "1", data=data)
        with pytest.raises(ConfigurationError, match="one tenant"):
            UserRepository.list_identities(across, "google")


# Concurrently


def at_once(
    tenant: str, count: int, call: Callable[[TenantSession, int], User]
) -> list[UUID | DatabaseError]:
    ready = threading.Barrier(count)

    def run(number: int) -> UUID | DatabaseError:
        with SessionLocal(tenant_id=tenant) as session:
            ready.wait()
            try:
                return call(session, number).id
            except DatabaseError as error:
                return error

    with ThreadPoolExecutor(count) as pool:
        return [done.result() for done in [pool.submit(run, n) for n in range(count)]]


@pytest.mark.parametrize(
    "given",
    [{}, {"email": "ada@example.com"}, {"data": {"a": 1}}, {"email": "a@b.c", "data": {"a": 1}}],
)
def test_concurrent_calls_make_one_user(
    db: TenantSession, tenant: str, given: dict[str, Any]
) -> None:
    found = at_once(tenant, 32, lambda session, _: find_or_make(session, "google", "1", **given))
    assert len(set(found)) == 1, found
    assert isinstance(found[0], UUID)
    assert (UserRepository.count(db), IdentityRepository.count(db)) == (1, 1)


def test_concurrent_links_to_different_users(db: TenantSession, tenant: str) -> None:
    users = [UserRepository.create(db).id for _ in range(8)]
    found = at_once(
        tenant, 8, lambda session, n: find_or_make(session, "telegram", "1", link_to=users[n])
    )
    linked = [one for one in found if isinstance(one, UUID)]
    refused = [one for one in found if isinstance(one, AlreadyExistsError)]
    assert (len(linked), len(refused)) == (1, 7), found
    assert {error.key for error in refused} == {"provider, subject"}
    assert identity_of(db, "telegram", "1").user_id == linked[0]
    assert UserRepository.count(db) == 8
