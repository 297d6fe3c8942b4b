"""Contexts: got, listed, counted, deleted and purged; bad input; other tenants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from database import (
    ALL_TENANTS,
    Context,
    ConversationRepository,
    InvalidValueError,
    MessageRepository,
    SessionLocal,
    TenantSession,
    TransientError,
    User,
    UserRepository,
    configure,
    transaction,
)
from database import ContextRepository as Contexts
from database.repositories import expiring
from database.units import one_write
from tests.conftest import admin
from tests.counting import counted_statements
from tests.test_conformance import idle, tenant_of
from tests.test_contexts import item, seen

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
PAST = datetime(2020, 1, 1, tzinfo=UTC)
FUTURE = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
def user(db: TenantSession) -> User:
    return UserRepository.create(db)


def sources(rows: Any) -> list[str | None]:
    return [row.source_identifier for row in rows]


def test_get(db: TenantSession, user: User) -> None:
    other = UserRepository.create(db)
    for u in (user, other):
        for source in ("a", "b", None, "a"):
            Contexts.store(db, u.id, "note", str(u.id), source_identifier=source)
    Contexts.store(db, user.id, "task", 1)
    found = Contexts.get(db, user.id, "note", "b")
    assert found is not None
    assert (found.user_id, found.source_identifier) == (user.id, "b")
    newest = Contexts.get(db, str(user.id), "note")
    assert newest is not None
    assert (newest.user_id, newest.source_identifier) == (user.id, "a")
    assert Contexts.get(db, found.id) is found, "as any repository"
    for type_, source in (("note", "c"), ("note", ""), ("x", None), ("task", "a")):
        assert Contexts.get(db, user.id, type_, source) is None
    assert Contexts.get(db, uuid4(), "note") is None


def test_get_by_id_is_for_the_owner(db: TenantSession, user: User) -> None:
    other = UserRepository.create(db)
    made = Contexts.store(db, user.id, "note", 1)
    assert Contexts.get_by_id(db, str(made.id), user_id=str(user.id)) is made
    assert Contexts.get_by_id(db, made.id, user_id=other.id) is None
    assert Contexts.get_by_id(db, uuid4(), user_id=user.id) is None


def pages(db: TenantSession, limit: int, **filters: Any) -> Iterator[Context]:
    cursor = None
    while True:
        page = Contexts.list(db, limit=limit, cursor=cursor, **filters)
        assert len(page) == limit or page.next_cursor is None
        yield from page
        cursor = page.next_cursor
        if cursor is None:
            return


def test_list_is_last_stored_first(db: TenantSession, user: User) -> None:
    for source in "abcb":
        Contexts.store(db, user.id, "note", 1, source_identifier=source)
    assert sources(Contexts.list(db, user_id=user.id)) == ["b", "c", "a"]


@pytest.mark.parametrize("limit", [1, 7, 30, 1000])
def test_pages_with_ties(db: TenantSession, user: User, limit: int) -> None:
    Contexts.store_many(db, user.id, (item(f"n{n}") for n in range(30)))
    Contexts.store_many(db, user.id, (item(f"n{n}", 2) for n in range(10, 20)))
    Contexts.store_many(db, user.id, [item("x1"), item("n", context_type="task")])
    other = UserRepository.create(db)
    Contexts.store_many(db, other.id, [item("n1")])
    given: dict[str, Any] = {"user_id": user.id, "context_type": "note", "source_prefix": "n"}
    found = list(pages(db, limit, **given))
    assert found == sorted(found, key=lambda row: (row.updated_at, row.id))[::-1]
    assert sorted(map(str, sources(found))) == sorted(f"n{n}" for n in range(30))
    assert {row.content for row in found[:10]} == {2}
    assert Contexts.count(db, user_id=user.id) == 32
    assert Contexts.count(db, user_id=user.id, context_type="task") == 1
    assert len(list(pages(db, limit))) == Contexts.count(db) == 33


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        *(("git", ["git%hub", "git_hub", "github"]), ("git%", ["git%hub"]), ("git_", ["git_hub"])),
        *(("%", ["%"]), ("_", ["_"]), ("\\", ["\\"]), ("'", ["'"]), ("Git", []), ("", ...)),
    ],
)
def test_source_prefix_is_literal(db: TenantSession, user: User, prefix: str, found: Any) -> None:
    names = ["git%hub", "git_hub", "github", "%", "_", "\\", "'", "xgit"]
    Contexts.store_many(db, user.id, map(item, [*names, None]))
    listed = Contexts.list(db, user_id=user.id, source_prefix=prefix)
    assert sorted(map(str, sources(listed))) == sorted(names if found is ... else found)


def test_delete_is_for_the_owner(db: TenantSession, user: User) -> None:
    other = UserRepository.create(db)
    made = [Contexts.store(db, user.id, "note", n) for n in range(3)]
    assert Contexts.delete(db, made[0].id, user_id=other.id) is False
    assert len(seen(db)) == 3
    assert Contexts.delete(db, str(made[0].id), user_id=str(user.id)) is True
    assert Contexts.delete(db, made[0].id, user_id=user.id) is False
    assert Contexts.delete(db, made[1].id) is True
    assert [row["id"] for row in seen(db)] == [str(made[2].id)]


def test_delete_by_type_and_all(db: TenantSession, user: User) -> None:
    other = UserRepository.create(db)
    for u in (user, other):
        Contexts.store_many(db, u.id, (item(n, context_type=t) for n in range(3) for t in "ab"))
    assert Contexts.delete_by_type(db, user.id, "a") == 3
    assert Contexts.delete_by_type(db, str(user.id), "a") == 0
    assert {row["context_type"] for row in seen(db, user_id=user.id)} == {"b"}
    assert Contexts.delete_all(db, user.id) == 3
    assert Contexts.delete_all(db, user.id) == 0
    assert len(seen(db)) == len(seen(db, user_id=other.id)) == 6


# Expiry


def expiring_contexts(db: TenantSession, count: int) -> list[UUID]:
    user = UserRepository.create(db)
    times = [PAST + timedelta(days=n) for n in range(count)]
    ids = [Contexts.store(db, user.id, "note", 1, expires_at=at).id for at in times]
    Contexts.store_many(db, user.id, [item(1, expires_at=FUTURE), item(2)])
    return ids


def expiring_conversations(db: TenantSession, count: int) -> list[UUID]:
    times = [*(PAST + timedelta(days=n) for n in range(count)), FUTURE, None]
    made = [ConversationRepository.create(db, expires_at=at) for at in times]
    for conversation in made:
        MessageRepository.append(db, conversation.id, role="user", content="x")
    return [conversation.id for conversation in made[:count]]


both = pytest.mark.parametrize(
    ("repository", "make"),
    [(Contexts, expiring_contexts), (ConversationRepository, expiring_conversations)],
    ids=["contexts", "conversations"],
)
Make = Callable[[TenantSession, int], list[UUID]]


@both
@pytest.mark.parametrize("size", [1, 3, 6, 7, 1000])
def test_purge(
    db: TenantSession, other: TenantSession, repository: Any, make: Make, size: int
) -> None:
    make(db, 6)
    make(other, 2)
    assert repository.purge_expired(db, dry_run=True) == 6
    assert repository.count(db) == 8
    with counted_statements() as statements:
        assert repository.purge_expired(db, batch_size=size) == 6
    looking_for_shared = repository is ConversationRepository
    assert len(statements) == 6 // size + 1 + looking_for_shared
    assert (repository.count(db), idle(db)) == (2, True)
    assert repository.purge_expired(db) == repository.purge_expired(db, dry_run=True) == 0
    assert repository.count(other) == 4


@both
@pytest.mark.parametrize("size", [0, -1, 100_001, True, "1", 1.0, None])
def test_purge_batch_size(db: TenantSession, repository: Any, make: Make, size: Any) -> None:
    make(db, 1)
    with pytest.raises(InvalidValueError, match=r"^batch_size: "):
        repository.purge_expired(db, batch_size=size)
    assert (repository.count(db), idle(db)) == (3, True)


@both
def test_purge_passes_over_what_others_have_locked(
    db: TenantSession, repository: Any, make: Make
) -> None:
    ids = make(db, 6)
    table = repository.model.__tablename__
    lock = text(f"SELECT id FROM {table} WHERE id = ANY(:ids) FOR UPDATE")
    with SessionLocal(tenant_id=tenant_of(db)) as second, transaction(second):
        second.execute(lock, {"ids": ids[1:4:2]})
        with transaction(db):
            db.execute(text("SET LOCAL lock_timeout = '2s'"))
            assert repository.purge_expired(db, batch_size=2) == 4
        assert repository.purge_expired(db, batch_size=2) == 0
    assert repository.purge_expired(db) == 2


@both
def test_batches_done_before_an_error_stay_done(
    db: TenantSession, repository: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = make(db, 6)
    batches = 0

    def interrupted(session: TenantSession) -> Any:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise TransientError
        return one_write(session)

    monkeypatch.setattr(expiring, "one_write", interrupted)
    with pytest.raises(TransientError):
        repository.purge_expired(db, batch_size=2)
    assert idle(db)
    assert [repository.exists(db, id_) for id_ in ids] == [False] * 4 + [True] * 2


@both
def test_purge_within_a_unit_is_undone_with_it(
    db: TenantSession, repository: Any, make: Make
) -> None:
    make(db, 6)
    with pytest.raises(ZeroDivisionError), transaction(db):
        assert repository.purge_expired(db, batch_size=2) == 6
        raise ZeroDivisionError
    assert repository.count(db) == 8


@both
def test_purge_of_all_tenants(fresh_url: str, repository: Any, make: Make) -> None:
    configure(url=fresh_url)
    for name in ("one", "two"):
        with SessionLocal(tenant_id=name) as session:
            make(session, 3)
    with SessionLocal(tenant_id=ALL_TENANTS) as across:
        assert repository.purge_expired(across, dry_run=True) == 6
        assert repository.purge_expired(across, batch_size=4) == 6
    for name in ("one", "two"):
        with SessionLocal(tenant_id=name) as session:
            assert repository.count(session) == 2
    with admin(fresh_url) as login:
        left = login.execute("SELECT count(DISTINCT conversation_id) FROM messages").fetchone()
        assert left == (0 if repository is Contexts else 4,), "their messages went as well"
