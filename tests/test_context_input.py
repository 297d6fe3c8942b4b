"""Contexts: bad input, and other tenants."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from itertools import product
from typing import Any
from uuid import UUID, uuid4

import pytest

from database import (
    ALL_TENANTS,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    SessionLocal,
    TenantSession,
    User,
    UserRepository,
    transaction,
)
from database import ContextRepository as Contexts
from tests.test_conformance import idle
from tests.test_contexts import item, seen

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
PAST = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def user(db: TenantSession) -> User:
    return UserRepository.create(db)


Call = Callable[[TenantSession, UUID, Any], object]
X = "x"
NO_ID: tuple[Any, ...] = ("", "x", 5, None, b"", [])
NO_TYPE: tuple[Any, ...] = ("", "x" * 65, 5, [])
NO_SOURCE: tuple[Any, ...] = ("x" * 256, 5, b"x", [])
NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001
# Of each argument the calls, and the values that none of them takes.
ARGUMENTS: list[tuple[str, tuple[Any, ...], list[Call]]] = [
    (
        "user_id",
        NO_ID,
        [
            lambda db, _, bad: Contexts.store(db, bad, X, 1),
            lambda db, _, bad: Contexts.store_many(db, bad, []),
            lambda db, _, bad: Contexts.get(db, bad, X),
            lambda db, _, bad: Contexts.get_by_id(db, uuid4(), user_id=bad),
            lambda db, _, bad: Contexts.delete_by_type(db, bad, X),
            lambda db, _, bad: Contexts.delete_all(db, bad),
        ],
    ),
    (
        "user_id",
        ("", "x", 5),
        [
            lambda db, _, bad: Contexts.list(db, user_id=bad),
            lambda db, _, bad: Contexts.count(db, user_id=bad),
            lambda db, _, bad: Contexts.search(db, bad, X),
            lambda db, _, bad: Contexts.delete(db, uuid4(), user_id=bad),
        ],
    ),
    (
        "id",
        NO_ID,
        [
            lambda db, _, bad: Contexts.get(db, bad),
            lambda db, user, bad: Contexts.get_by_id(db, bad, user_id=user),
            lambda db, user, bad: Contexts.delete(db, bad, user_id=user),
            lambda db, _, bad: Contexts.delete(db, bad),
        ],
    ),
    (
        "context_type",
        NO_TYPE,
        [
            lambda db, user, bad: Contexts.store(db, user, bad, 1),
            Contexts.get,
            lambda db, _, bad: Contexts.list(db, context_type=bad),
            lambda db, user, bad: Contexts.search(db, user, X, context_type=bad),
            Contexts.delete_by_type,
        ],
    ),
    (
        "context_type",
        (None,),
        [
            lambda db, user, bad: Contexts.store(db, user, bad, 1),
            lambda db, user, bad: Contexts.get(db, user, bad, X),
            Contexts.delete_by_type,
        ],
    ),
    (
        "source_identifier",
        NO_SOURCE,
        [
            lambda db, user, bad: Contexts.store(db, user, X, 1, source_identifier=bad),
            lambda db, user, bad: Contexts.get(db, user, X, bad),
        ],
    ),
    ("source_prefix", NO_SOURCE, [lambda db, _, bad: Contexts.list(db, source_prefix=bad)]),
    (
        "content",
        (object(), {1: 2}, 2**64, {1, 2}, b"x", len),
        [lambda db, user, bad: Contexts.store(db, user, X, bad)],
    ),
    (
        "metadata",
        ([], "x", 0, False, {1: 2}, {"a": object()}),
        [lambda db, user, bad: Contexts.store(db, user, X, 1, metadata=bad)],
    ),
    (
        "expires_at",
        (NAIVE, "2026-01-01", 5, NOON.date()),
        [lambda db, user, bad: Contexts.store(db, user, X, 1, expires_at=bad)],
    ),
    (
        "colour",
        ("red",),
        [
            lambda db, _, bad: Contexts.list(db, colour=bad),
            lambda db, _, bad: Contexts.count(db, colour=bad),
        ],
    ),
    ("limit", (0, -1, 1001, 10**30, "5"), [lambda db, _, bad: Contexts.list(db, limit=bad)]),
    ("cursor", ("x", "", 5, b""), [lambda db, _, bad: Contexts.list(db, cursor=bad)]),
]
BAD = [
    pytest.param(field, call, bad, id=f"{field} {number} {place}")
    for number, (field, values, calls) in enumerate(ARGUMENTS)
    for place, (call, bad) in enumerate(product(calls, values))
]


@pytest.mark.parametrize(("field", "call", "bad"), BAD)
def test_bad_input(db: TenantSession, user: User, field: str, call: Call, bad: Any) -> None:
    kept = Contexts.store(db, user.id, X, "kept", source_identifier=X).to_dict()
    with pytest.raises(InvalidValueError) as caught:
        call(db, user.id, bad)
    assert caught.value.field == field
    assert idle(db)
    with pytest.raises(InvalidValueError), transaction(db):
        call(db, user.id, bad)
    assert seen(db) == [kept]


def test_unknown_and_foreign_users(db: TenantSession, other: TenantSession, user: User) -> None:
    for stranger in (uuid4(), UserRepository.create(other).id):
        for call in (
            lambda: Contexts.store(db, stranger, X, 1),  # noqa: B023
            lambda: Contexts.store_many(db, stranger, [item(n) for n in range(3)]),  # noqa: B023
        ):
            with pytest.raises(InvalidReferenceError) as caught:
                call()
            assert caught.value.field == "user_id"
            assert idle(db)
            with transaction(db):
                with pytest.raises(InvalidReferenceError):
                    call()
                Contexts.store(db, user.id, X, 1, source_identifier=X)
    assert len(seen(db)) == 1
    assert seen(other) == []


def test_another_tenant_sees_and_changes_nothing(
    db: TenantSession, other: TenantSession, user: User
) -> None:
    made = Contexts.store(db, user.id, X, X, source_identifier=X, expires_at=PAST)
    before = seen(db)
    # The same ids exist there as well.
    UserRepository.create(other, id=user.id)
    assert Contexts.get(other, user.id, X, X) is Contexts.get(other, user.id, X) is None
    assert Contexts.get_by_id(other, made.id, user_id=user.id) is None
    assert Contexts.list(other, user_id=user.id).items == Contexts.list(other).items == []
    assert Contexts.search(other, user.id, X).items == []
    assert Contexts.search(other, None, None).items == []
    assert Contexts.count(other, user_id=user.id) == 0
    assert Contexts.purge_expired(other) == Contexts.purge_expired(other, dry_run=True) == 0
    assert Contexts.delete(other, made.id, user_id=user.id) is False
    assert Contexts.delete_by_type(other, user.id, X) == Contexts.delete_all(other, user.id) == 0
    assert Contexts.store(other, user.id, X, "b", source_identifier=X).inserted is True
    assert Contexts.store_many(other, user.id, [item(X, context_type=X)]).updated == 1
    assert seen(db) == before
    assert len(seen(other)) == 1
    with SessionLocal(tenant_id=ALL_TENANTS) as across:
        for call in (
            lambda: Contexts.store(across, user.id, X, 1),
            lambda: Contexts.store_many(across, user.id, [item(1)]),
            lambda: Contexts.search(across, None, X),
            lambda: Contexts.delete_all(across, user.id),
            lambda: Contexts.get(across, user.id, X),
        ):
            with pytest.raises(DatabaseError, match="one tenant"):
                call()
