"""Units of work: what is committed when, what errors undo, and how many round trips that costs."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

import database
from database import (
    AlreadyExistsError,
    Conversation,
    ConversationRepository,
    InvalidReferenceError,
    InvalidValueError,
    MessageRepository,
    NotFoundError,
    SessionLocal,
    TenantSession,
    TransientError,
    User,
    UserRepository,
    get_db_session,
    get_engine,
    run_in_transaction,
    transaction,
)
from tests.conftest import admin
from tests.counting import counted_round_trips, counted_statements


def checked_out() -> int:
    pool: Any = get_engine().pool
    count: int = pool.checkedout()
    return count


def count_elsewhere(tenant: str) -> int:
    with SessionLocal(tenant_id=tenant) as db:
        return UserRepository.count(db)


# What is committed


def test_each_call_is_committed(db: Session, tenant: str) -> None:
    UserRepository.create(db)
    assert count_elsewhere(tenant) == 1


def test_a_unit_is_committed_at_its_end(db: Session, tenant: str) -> None:
    with transaction(db):
        UserRepository.create(db)
        UserRepository.create(db)
        assert count_elsewhere(tenant) == 0
    assert count_elsewhere(tenant) == 2
    assert not db.in_transaction()


def test_an_error_undoes_the_unit(db: Session, tenant: str) -> None:
    with pytest.raises(ZeroDivisionError), transaction(db):
        UserRepository.create(db)
        raise ZeroDivisionError
    assert count_elsewhere(tenant) == 0
    UserRepository.create(db)
    assert count_elsewhere(tenant) == 1


def test_an_inner_unit_is_undone_alone(db: Session) -> None:
    with transaction(db):
        UserRepository.create(db, username="outer")
        with transaction(db):
            UserRepository.create(db, username="inner")
            with pytest.raises(ZeroDivisionError), transaction(db):
                UserRepository.create(db, username="innermost")
                raise ZeroDivisionError
        UserRepository.create(db, username="last")
    names = {user.username for user in UserRepository.list(db)}
    assert names == {"outer", "inner", "last"}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda db: UserRepository.create(db, email="a@example.com"), AlreadyExistsError),
        (lambda db: ConversationRepository.create(db, user_id=uuid4()), InvalidReferenceError),
        (lambda db: UserRepository.create(db, email="nobody"), InvalidValueError),
        (lambda db: UserRepository.update(db, uuid4(), username="x"), NotFoundError),
        (
            lambda db: MessageRepository.append(db, uuid4(), role="user", content="x"),
            InvalidReferenceError,
        ),
    ],
)
def test_a_failed_call_leaves_the_unit_usable(
    db: Session, call: Callable[[Session], Any], error: type[Exception]
) -> None:
    UserRepository.create(db, email="a@example.com")
    with transaction(db):
        with pytest.raises(error):
            call(db)
        UserRepository.create(db, username="before")
        with pytest.raises(error):
            call(db)
        UserRepository.create(db, username="after")
    assert UserRepository.count(db) == 3
    with pytest.raises(error):
        call(db)
    assert (db.in_transaction(), checked_out()) == (False, 0)


def test_a_callers_read_does_not_swallow_the_next_write(db: Session, tenant: str) -> None:
    db.execute(select(User)).all()
    assert db.in_transaction()
    UserRepository.create(db)
    assert count_elsewhere(tenant) == 1


@pytest.mark.parametrize("begin", ["begin", "begin_nested"])
def test_a_callers_transaction_is_the_callers(db: Session, tenant: str, begin: str) -> None:
    with getattr(db, begin)():
        UserRepository.create(db)
        with transaction(db):
            UserRepository.create(db)
        assert count_elsewhere(tenant) == 0
    if begin == "begin_nested":
        assert count_elsewhere(tenant) == 0
        db.commit()
    assert count_elsewhere(tenant) == 2


def test_pending_objects_are_not_lost(db: Session, tenant: str) -> None:
    db.add(User(username="pending"))
    assert UserRepository.count(db) == 1
    UserRepository.create(db)
    assert count_elsewhere(tenant) == 2
    with transaction(db):
        db.add(User(username="pending too"))
        UserRepository.create(db)
    assert count_elsewhere(tenant) == 4


def test_a_row_shows_what_the_database_holds(db: Session, tenant: str) -> None:
    mine = UserRepository.create(db, username="old")
    with SessionLocal(tenant_id=tenant) as elsewhere:
        UserRepository.update(elsewhere, mine.id, username="new")
    assert mine.username == "old"
    assert UserRepository.get(db, mine.id) is mine
    assert mine.username == "new"


def test_get_db_session(tenant: str) -> None:
    with get_db_session(tenant_id=tenant) as db:
        db.add(User())
    assert count_elsewhere(tenant) == 1
    with pytest.raises(ZeroDivisionError), get_db_session(tenant_id=tenant) as db:
        db.add(User())
        db.flush()
        raise ZeroDivisionError
    assert (count_elsewhere(tenant), checked_out()) == (1, 0)


def test_only_two_modules_end_transactions() -> None:
    ends = re.compile(r"\.(commit|rollback)\(")
    package = Path(database.__file__).parent
    found = {path.name for path in package.rglob("*.py") if ends.search(path.read_text())}
    assert found == {"units.py", "config.py"}


# What it costs


CALLS: dict[str, Callable[[Session, User, Conversation], Any]] = {
    "create": lambda db, _u, _c: UserRepository.create(db, email=f"{uuid4().hex}@example.com"),
    "get": lambda db, u, _c: UserRepository.get(db, u.id),
    "require": lambda db, u, _c: UserRepository.require(db, u.id),
    "update": lambda db, u, _c: UserRepository.update(db, u.id, first_name="Ada"),
    "delete": lambda db, u, _c: UserRepository.delete(db, u.id),
    "exists": lambda db, u, _c: UserRepository.exists(db, u.id),
    "count": lambda db, _u, _c: UserRepository.count(db),
    "list": lambda db, _u, _c: UserRepository.list(db, limit=1),
    "get_by_email": lambda db, _u, _c: UserRepository.get_by_email(db, "ada@example.com"),
    "get_or_create": lambda db, _u, _c: UserRepository.get_or_create(db, "ada@example.com"),
    "get_by_identity": lambda db, _u, _c: UserRepository.get_by_identity(db, "google", "1"),
    "touch": lambda db, u, _c: UserRepository.touch(db, u.id),
    "create conversation": lambda db, u, _c: ConversationRepository.create(db, user_id=u.id),
    "get_by_thread_id": lambda db, _u, c: ConversationRepository.get_by_thread_id(db, c.thread_id),
    "get_or_create thread": lambda db, _u, c: ConversationRepository.get_or_create(db, c.thread_id),
    "list_by_user": lambda db, u, _c: ConversationRepository.list_by_user(db, u.id),
    "get_by_user_email": lambda db, _u, _c: ConversationRepository.get_by_user_email(
        db, "ada@example.com"
    ),
    "update thread": lambda db, _u, c: ConversationRepository.update(db, c.thread_id, title="T"),
    "delete thread": lambda db, _u, c: ConversationRepository.delete(db, c.thread_id),
    "append": lambda db, _u, c: MessageRepository.append(db, c.id, role="user", content="Hi"),
    "append_many": lambda db, _u, c: MessageRepository.append_many(
        db, c.id, [{"role": "user", "content": "Hi"}] * 20
    ),
    "history": lambda db, _u, c: MessageRepository.history(db, c.id, limit=50),
    "window": lambda db, _u, c: MessageRepository.window(db, c.id, 1, 9),
    "get_last": lambda db, _u, c: MessageRepository.get_last(db, c.id),
    "purge": lambda db, _u, c: MessageRepository.purge(db, c.id),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture
def chat(db: Session) -> tuple[User, Conversation]:
    user = UserRepository.create(db, email="ada@example.com")
    conversation = ConversationRepository.create(db, user_id=user.id)
    MessageRepository.append(db, conversation.id, role="user", content="Hello")
    return user, conversation


@every_call
def test_a_call_is_one_round_trip(
    db: Session, chat: tuple[User, Conversation], call: Callable[..., Any]
) -> None:
    with counted_round_trips() as trips, counted_statements() as statements:
        call(db, *chat)
    assert (trips.count, len(statements)) == (1, 1)
    assert (db.in_transaction(), checked_out()) == (False, 0)


@every_call
def test_a_call_in_a_unit_is_one_round_trip(
    db: Session, chat: tuple[User, Conversation], call: Callable[..., Any]
) -> None:
    with counted_round_trips() as trips, transaction(db):
        UserRepository.create(db)
        call(db, *chat)
        UserRepository.create(db)
    assert trips.count == 3 + 1


def test_a_unit_of_one_statement_refuses_a_second(db: Session) -> None:
    from database.units import one_read

    with pytest.raises(Exception, match="second one"), one_read(db) as connection:
        connection.execute(text("SELECT 1"))
        connection.execute(text("SELECT 1"))
    assert (db.in_transaction(), checked_out()) == (False, 0)
    assert UserRepository.count(db) == 0


def test_no_connection_is_held_while_a_model_thinks(worker_url: str, tenant: str) -> None:
    database.configure(url=worker_url, pool_size=1, max_overflow=0)
    with SessionLocal(tenant_id=tenant) as db:
        conversation = ConversationRepository.create(db)
    thinking = threading.Barrier(50)

    def turn(_: int) -> None:
        with SessionLocal(tenant_id=tenant) as db:
            MessageRepository.history(db, conversation.id)
            # All fifty are in the middle of their turn at once: none of them holds the connection.
            thinking.wait(timeout=20)
            MessageRepository.append(db, conversation.id, role="assistant", content="...")

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(turn, range(50)))
    with SessionLocal(tenant_id=tenant) as db:
        assert len(MessageRepository.history(db, conversation.id)) == 50


# Retries


def test_deadlocks_are_run_again(tenant: str) -> None:
    with SessionLocal(tenant_id=tenant) as db:
        first, second = (UserRepository.create(db, username="0") for _ in range(2))
    both_hold_one = threading.Barrier(2)
    attempts: list[int] = []

    def swap(order: list[User]) -> None:
        def unit(db: TenantSession) -> None:
            attempts.append(id(db))
            for user in order:
                count = db.scalar(select(User.username).where(User.id == user.id).with_for_update())
                UserRepository.update(db, user.id, username=str(int(count or 0) + 1))
                if len(attempts) <= 2 and user is order[0]:
                    both_hold_one.wait(timeout=10)

        run_in_transaction(unit, tenant_id=tenant)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(swap, [[first, second], [second, first]]))
    assert len(attempts) == 3
    with SessionLocal(tenant_id=tenant) as db:
        assert [user.username for user in UserRepository.list(db)] == ["2", "2"]


def test_serialization_failures_are_run_again_and_given_up(tenant: str) -> None:
    with SessionLocal(tenant_id=tenant) as db:
        user = UserRepository.create(db, username="0")
    sessions: list[TenantSession] = []

    def unit(db: TenantSession) -> str:
        sessions.append(db)
        db.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert db.scalar(select(User.username).where(User.id == user.id)) is not None
        if len(sessions) <= losses:
            with SessionLocal(tenant_id=tenant) as elsewhere:
                UserRepository.update(elsewhere, user.id, username=str(len(sessions)))
        db.execute(update(User).where(User.id == user.id).values(first_name="changed"))
        return "done"

    losses = 2
    assert run_in_transaction(unit, attempts=3, tenant_id=tenant) == "done"
    assert len(set(map(id, sessions))) == 3
    sessions.clear()
    losses = 3
    with pytest.raises(TransientError):
        run_in_transaction(unit, attempts=3, tenant_id=tenant)
    assert (len(sessions), checked_out()) == (3, 0)


def test_other_errors_are_not_run_again(tenant: str) -> None:
    attempts = []

    def unit(db: TenantSession) -> None:
        attempts.append(1)
        UserRepository.create(db)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_in_transaction(unit, tenant_id=tenant)
    with pytest.raises(InvalidValueError, match="attempts"):
        run_in_transaction(unit, attempts=0, tenant_id=tenant)
    assert (attempts, count_elsewhere(tenant)) == ([1], 0)


def test_a_killed_backend_loses_the_unit_and_nothing_else(
    worker_url: str, db: Session, tenant: str
) -> None:
    UserRepository.create(db)
    with pytest.raises(TransientError), transaction(db):
        UserRepository.create(db)
        pid = db.scalar(text("SELECT pg_backend_pid()"))
        with admin(worker_url) as connection:
            connection.execute("SELECT pg_terminate_backend(%s)", [pid])
        time.sleep(0.1)
        UserRepository.create(db)
    assert not db.in_transaction()
    UserRepository.create(db)
    assert count_elsewhere(tenant) == 2
