"""Units of work: what is committed when, what errors undo, and how many round trips that costs."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

import database
from database import (
    AlreadyExistsError,
    Conversation,
    ConversationRepository,
    DatabaseError,
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
from database.pagination import encode_cursor
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
    "extend": lambda db, _u, c: MessageRepository.extend(
        db, c.id, [{"role": "user", "content": "Hi"}] * 20
    ),
    "roles_to": lambda db, _u, _c: MessageRepository.roles_to(db, uuid4()),
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


def kill(url: str, pid: int | None) -> None:
    with admin(url) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])


def backend_of(db: Session) -> int | None:
    pid: int | None = db.scalar(text("SELECT pg_backend_pid()"))
    return pid


def emails(tenant: str) -> set[str | None]:
    with SessionLocal(tenant_id=tenant) as db:
        return set(db.scalars(select(User.email)))


# What else is in the session


FAILURES: dict[str, Callable[[Session], Any]] = {
    "create": lambda db: UserRepository.create(db, email="taken@example.com"),
    "create_many": lambda db: UserRepository.create_many(db, [{}, {"email": "taken@example.com"}]),
    "bad value": lambda db: UserRepository.create(db, email="nobody"),
    "unknown row": lambda db: UserRepository.update(db, uuid4(), username="x"),
    "reference": lambda db: ConversationRepository.create(db, user_id=uuid4()),
    "append": lambda db: MessageRepository.append(db, uuid4(), role="user", content=""),
    "append_many": lambda db: MessageRepository.append_many(
        db, uuid4(), [{"role": "user", "content": "", "idempotency_key": "k"}]
    ),
    "extend by many": lambda db: MessageRepository.extend(
        db, uuid4(), [{"role": "user", "content": ""}] * 5_001
    ),
    "message update": lambda db: MessageRepository.update(db, uuid4(), content="x"),
    "persona": lambda db: ConversationRepository.create(db, persona_id=uuid4()),
    "link": lambda db: UserRepository.get_or_create_by_identity(
        db, "google", "9", email="taken@example.com"
    ),
}
# They fail within, and put it right.
CONFLICTS: dict[str, Callable[[Session, Conversation], Any]] = {
    "append": lambda db, c: MessageRepository.append(
        db, c.id, role="user", content="", idempotency_key="known"
    ),
    "append_many": lambda db, c: MessageRepository.append_many(
        db, c.id, [{"role": "user", "content": "", "idempotency_key": "known"}]
    ),
    "extend by many": lambda db, c: MessageRepository.extend(
        db, c.id, [{"role": "user", "content": "", "idempotency_key": "known"}]
    ),
    "get_or_create": lambda db, _: UserRepository.get_or_create(db, "taken@example.com"),
    "thread": lambda db, c: ConversationRepository.get_or_create(db, c.thread_id),
    "identity": lambda db, _: UserRepository.get_or_create_by_identity(db, "google", "1"),
    "delete": lambda db, _: UserRepository.delete(db, uuid4()),
    "message delete": lambda db, _: MessageRepository.delete(db, uuid4()),
}


@pytest.fixture
def taken(db: Session) -> Conversation:
    """A user, an identity and a message that later calls run into."""
    UserRepository.get_or_create_by_identity(db, "google", "1", email="taken@example.com")
    conversation = ConversationRepository.create(db, "thread", user_email="taken@example.com")
    MessageRepository.append(db, conversation.id, role="user", content="", idempotency_key="known")
    return conversation


@pytest.mark.parametrize("call", FAILURES.values(), ids=FAILURES)
def test_what_is_pending_survives_a_call_that_fails(
    db: Session, tenant: str, taken: Conversation, call: Callable[[Session], Any]
) -> None:
    """A caller who catches the error, and commits, must not lose what it had added before."""
    taken.title = "changed"
    db.add(User(email="pending@example.com"))
    with pytest.raises(DatabaseError):
        call(db)
    db.commit()
    assert emails(tenant) == {"taken@example.com", "pending@example.com"}
    with SessionLocal(tenant_id=tenant) as elsewhere:
        assert ConversationRepository.require(elsewhere, taken.id).title == "changed"


@pytest.mark.parametrize("call", CONFLICTS.values(), ids=CONFLICTS)
def test_what_is_pending_survives_a_conflict_within_a_call(
    db: Session, tenant: str, taken: Conversation, call: Callable[..., Any]
) -> None:
    db.add(User(email="pending@example.com"))
    call(db, taken)
    db.commit()
    assert "pending@example.com" in emails(tenant)


def test_what_is_pending_survives_a_lost_race(
    db: Session, tenant: str, taken: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = UserRepository.get_by_identity
    seen = []

    def too_early(*args: Any) -> User | None:
        seen.append(args)
        return find(*args) if len(seen) > 1 else None

    monkeypatch.setattr(UserRepository, "get_by_identity", too_early)
    db.add(User(email="pending@example.com"))
    found = UserRepository.get_or_create_by_identity(db, "google", "1")
    db.commit()
    assert (found.email, len(seen)) == ("taken@example.com", 2)
    assert emails(tenant) == {"taken@example.com", "pending@example.com"}


@pytest.mark.parametrize("call", [*FAILURES, *CONFLICTS])
def test_rows_stay_usable_after_a_call(db: Session, taken: Conversation, call: str) -> None:
    """Looking at them must not begin a transaction, which would keep a connection."""
    with suppress(DatabaseError):
        (FAILURES[call](db) if call in FAILURES else CONFLICTS[call](db, taken))
    assert (db.in_transaction(), checked_out()) == (False, 0)
    with counted_statements() as statements:
        assert taken.thread_id == "thread"
    assert statements == []


def test_rows_stay_usable_after_a_commit(db: Session) -> None:
    with transaction(db):
        user = UserRepository.create(db, username="name")
    user.first_name = "Ada"
    db.commit()
    with counted_statements() as statements:
        assert (user.username, user.first_name) == ("name", "Ada")
    assert (statements, checked_out()) == ([], 0)


def test_rows_show_what_is_stored_after_a_unit_was_undone(db: Session) -> None:
    user = UserRepository.create(db, username="old")
    with pytest.raises(ZeroDivisionError), transaction(db):
        UserRepository.update(db, user.id, username="new")
        raise ZeroDivisionError
    assert user.username == "old"


@pytest.mark.parametrize("flushes", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_changed_objects_are_written_before_a_call(
    db: Session, tenant: str, *, flushes: bool, unit: bool
) -> None:
    db.autoflush = flushes
    user = UserRepository.create(db, username="old", first_name="old")
    with transaction(db) if unit else nullcontext():
        user.username = "new"
        assert UserRepository.require(db, user.id).username == "new"
        assert UserRepository.update(db, user.id, first_name="new").username == "new"
        user.last_name = "new"
        db.add(User(email="pending@example.com"))
        assert UserRepository.count(db) == 2
        assert UserRepository.get_by_email(db, "pending@example.com") is not None
    db.commit()
    with SessionLocal(tenant_id=tenant) as elsewhere:
        stored = UserRepository.require(elsewhere, user.id)
    assert (stored.username, stored.first_name, stored.last_name) == ("new", "new", "new")


# Errors of the flush and of the commit


def test_a_failed_flush_is_one_of_our_errors(db: Session, tenant: str, taken: Conversation) -> None:
    id_ = taken.id

    def add() -> None:
        db.add(User(email="taken@example.com"))

    for end in (db.flush, db.commit):
        add()
        with pytest.raises(IntegrityError):
            end()
        db.rollback()
    calls: list[Callable[[], Any]] = [
        lambda: UserRepository.create(db),
        lambda: UserRepository.count(db),
        lambda: UserRepository.create_many(db, [{}]),
        lambda: MessageRepository.append(db, id_, role="user", content=""),
    ]
    for call in calls:
        add()
        with pytest.raises(AlreadyExistsError, match=r"^email: "):
            call()
        db.rollback()
        with pytest.raises(AlreadyExistsError, match=r"^email: "), transaction(db):
            add()
            call()
        assert (db.in_transaction(), checked_out()) == (False, 0)
    assert emails(tenant) == {"taken@example.com"}
    with pytest.raises(AlreadyExistsError), get_db_session(tenant_id=tenant) as session:
        session.add(User(email="taken@example.com"))


def test_a_flush_that_fails_at_the_end_of_an_inner_unit(db: Session, tenant: str) -> None:
    with transaction(db):
        UserRepository.create(db, email="first@example.com")
        with pytest.raises(AlreadyExistsError), transaction(db):
            UserRepository.create(db, email="inner@example.com")
            db.add(User(email="first@example.com"))
        UserRepository.create(db, email="last@example.com")
    assert emails(tenant) == {"first@example.com", "last@example.com"}


@pytest.mark.parametrize("where", ["unit", "get_db_session"])
def test_a_commit_that_fails(db: Session, tenant: str, where: str) -> None:
    """Of two transactions that each read what the other writes, the later one fails, at COMMIT."""

    def read_and_write(session: Session) -> None:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        session.add(User(email=f"{len(session.scalars(select(User)).all())}@{uuid4().hex}"))
        session.flush()

    def skew() -> None:
        with (
            transaction(db) if where == "unit" else get_db_session(tenant_id=tenant) as session,
            SessionLocal(tenant_id=tenant) as other,
        ):
            read_and_write(session or db)
            with transaction(other):
                read_and_write(other)

    with pytest.raises(TransientError):
        skew()
    assert (db.in_transaction(), checked_out()) == (False, 0)
    assert len(emails(tenant)) == 1
    UserRepository.create(db)


def test_interrupts_undo_a_unit(db: Session, tenant: str) -> None:
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), transaction(db):
            UserRepository.create(db)
            raise error
    assert (count_elsewhere(tenant), db.in_transaction(), checked_out()) == (0, False, 0)


def test_an_interrupt_while_the_server_works(db: Session, tenant: str) -> None:
    """Ctrl-C: the connection is in the middle of something, and must not be used again."""
    user = UserRepository.create(db, username="old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with SessionLocal(tenant_id=tenant) as other:
            for unit in (transaction, lambda _: nullcontext()):
                with transaction(other):
                    UserRepository.update(other, user.id, username="held")
                    signal.setitimer(signal.ITIMER_REAL, 0.2)
                    with pytest.raises(KeyboardInterrupt), unit(db):
                        UserRepository.update(db, user.id, username="interrupted")
                    assert (db.in_transaction(), checked_out()) == (False, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert UserRepository.create(db).tenant_id == tenant
    assert checked_out() == 0


def test_begin_without_a_with_is_the_callers_too(db: Session, tenant: str) -> None:
    db.begin()
    UserRepository.create(db)
    with transaction(db):
        UserRepository.create(db)
    with pytest.raises(AlreadyExistsError):
        UserRepository.create(db, id=UserRepository.create(db).id)
    assert count_elsewhere(tenant) == 0
    db.rollback()
    assert count_elsewhere(tenant) == 0
    db.begin()
    UserRepository.create(db)
    db.commit()
    assert count_elsewhere(tenant) == 1


def test_a_unit_after_a_read_of_the_caller(db: Session, tenant: str) -> None:
    db.execute(text("SELECT 1"))
    with pytest.raises(ZeroDivisionError), transaction(db):
        UserRepository.create(db)
        raise ZeroDivisionError
    assert count_elsewhere(tenant) == 0
    with transaction(db):
        UserRepository.create(db)
    assert (count_elsewhere(tenant), db.in_transaction()) == (1, False)


# Retries


def test_a_lost_connection_is_not_run_again(worker_url: str, tenant: str) -> None:
    """The COMMIT may have come through."""
    attempts = []

    def unit(db: TenantSession) -> None:
        attempts.append(1)
        UserRepository.create(db)
        kill(worker_url, backend_of(db))

    with pytest.raises(TransientError):
        run_in_transaction(unit, tenant_id=tenant)
    assert (attempts, count_elsewhere(tenant), checked_out()) == ([1], 0, 0)


def test_what_a_retried_unit_returns(tenant: str) -> None:
    def unit(db: TenantSession) -> User:
        return UserRepository.create(db, username="name")

    with counted_round_trips() as trips:
        user = run_in_transaction(unit, tenant_id=tenant)
    assert (user.username, user.tenant_id, checked_out()) == ("name", tenant, 0)
    assert trips.count == 2
    with SessionLocal(tenant_id=tenant) as db:
        assert UserRepository.exists(db, user.id)


@pytest.mark.parametrize("isolation", ["SERIALIZABLE", "REPEATABLE READ"])
def test_single_calls_fail_for_concurrent_ones(db: Session, tenant: str, isolation: str) -> None:
    user = UserRepository.create(db, username="old")
    engine = get_engine().execution_options(isolation_level=isolation)
    with TenantSession(engine, tenant_id=tenant) as strict:
        with pytest.raises(TransientError), transaction(strict):
            UserRepository.count(strict)
            UserRepository.update(db, user.id, username="new")
            UserRepository.update(strict, user.id, username="lost")
        assert (strict.in_transaction(), checked_out()) == (False, 0)
        assert UserRepository.require(strict, user.id).username == "new"


# Lost connections


def test_all_idle_connections_are_lost(worker_url: str, tenant: str) -> None:
    """A restarted server: no call fails for it."""
    sessions = [SessionLocal(tenant_id=tenant) for _ in range(5)]
    pids = [backend_of(db) for db in sessions]
    assert len(set(pids)) == 5
    for db in sessions:
        db.rollback()
    for pid in pids:
        kill(worker_url, pid)
    for db in sessions:
        UserRepository.create(db)
        assert UserRepository.count(db) > 0
        db.close()
    assert count_elsewhere(tenant) == 5


@pytest.mark.parametrize("state", ["after a read", "with pending objects", "in a unit", "begun"])
def test_a_connection_lost_in_a_transaction(
    worker_url: str, db: Session, tenant: str, state: str
) -> None:
    UserRepository.create(db)

    def lose_it() -> None:
        if state == "with pending objects":
            db.add(User())
            db.flush()
        kill(worker_url, backend_of(db))
        UserRepository.create(db)

    with pytest.raises(TransientError):
        if state == "in a unit":
            with transaction(db):
                lose_it()
        elif state == "begun":
            with db.begin():
                lose_it()
        else:
            lose_it()
    assert count_elsewhere(tenant) == 1
    UserRepository.create(db)
    assert (count_elsewhere(tenant), db.in_transaction(), checked_out()) == (2, False, 0)


def test_no_free_connection(worker_url: str, tenant: str) -> None:
    database.configure(url=worker_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with SessionLocal(tenant_id=tenant) as db, SessionLocal(tenant_id=tenant) as other:
        user = UserRepository.create(db)
        other.execute(text("SELECT 1"))
        for call in (UserRepository.count, UserRepository.create):
            with pytest.raises(TransientError, match="pool_timeout"):
                call(db)
            with pytest.raises(TransientError, match="pool_timeout"), transaction(db):
                call(db)
            assert not db.in_transaction()
        user.username = "pending"
        for call in (UserRepository.count, UserRepository.create):
            with pytest.raises(TransientError, match="pool_timeout"):
                call(db)
            with pytest.raises(TransientError, match="pool_timeout"), transaction(db):
                call(db)
        other.rollback()
        db.commit()
        assert UserRepository.require(other, user.id).username == "pending"


def test_no_free_connection_for_an_inner_unit(worker_url: str, tenant: str) -> None:
    database.configure(url=worker_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with SessionLocal(tenant_id=tenant) as db, SessionLocal(tenant_id=tenant) as other:
        other.execute(text("SELECT 1"))
        with transaction(db):
            db.add(User(email="pending@b.c"))
            with pytest.raises(TransientError, match="pool_timeout"), transaction(db):
                pass
            with pytest.raises(TransientError, match="pool_timeout"):
                UserRepository.create_many(db, [{"email": "never@b.c"}])
            other.rollback()
    assert emails(tenant) == {"pending@b.c"}


def test_statement_timeouts(worker_url: str, tenant: str) -> None:
    database.configure(url=worker_url, statement_timeout=0.2)
    with SessionLocal(tenant_id=tenant) as db, SessionLocal(tenant_id=tenant) as other:
        user = UserRepository.create(db)
        with transaction(other):
            UserRepository.update(other, user.id, username="held")
            with pytest.raises(TransientError, match="statement_timeout"):
                UserRepository.update(db, user.id, username="waiting")
            assert not db.in_transaction()
            with transaction(db):
                UserRepository.create(db)
                with pytest.raises(TransientError, match="statement_timeout"):
                    UserRepository.update(db, user.id, username="waiting")
                UserRepository.create(db)
        assert UserRepository.count(db) == 3


# Sharing


def test_threads_of_many_tenants_share_an_engine(worker_url: str, tenant: str) -> None:
    database.configure(url=worker_url, pool_size=3, max_overflow=0)

    def work(number: int) -> None:
        name = f"{tenant}-{number}"
        for turn in range(10):
            with SessionLocal(tenant_id=name) as db:
                assert UserRepository.count(db) == turn
                with suppress(ZeroDivisionError), transaction(db):
                    UserRepository.create(db)
                    raise ZeroDivisionError
                with transaction(db):
                    made = UserRepository.create(
                        db, email="same@example.com" if turn == 0 else None
                    )
                    with suppress(AlreadyExistsError):
                        UserRepository.create(db, email="same@example.com")
                assert made.tenant_id == name
                assert {user.tenant_id for user in db.scalars(select(User))} == {name}
                db.rollback()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert checked_out() == 0


@pytest.mark.parametrize("threshold", [None, 0, 1, 3])
def test_prepared_statements_change_nothing(
    worker_url: str, tenant: str, threshold: int | None
) -> None:
    database.configure(url=worker_url, prepare_threshold=threshold, pool_size=1, max_overflow=0)
    with SessionLocal(tenant_id=tenant) as db:
        for turn in range(6):
            user = UserRepository.create(db, email=f"{turn}@example.com")
            with counted_round_trips() as trips:
                assert UserRepository.get(db, user.id) is user
            assert trips.count == 1
            with transaction(db):
                with pytest.raises(AlreadyExistsError):
                    UserRepository.create(db, email=f"{turn}@example.com")
                UserRepository.update(db, user.id, username=str(turn))
            with pytest.raises(AlreadyExistsError):
                UserRepository.create(db, email=f"{turn}@example.com")
            with pytest.raises(ZeroDivisionError), transaction(db):
                UserRepository.update(db, user.id, username="undone")
                raise ZeroDivisionError
            assert UserRepository.require(db, user.id).username == str(turn)
        for _ in range(6):
            UserRepository.count(db)
        prepared = db.scalar(text("SELECT count(*) FROM pg_prepared_statements"))
        assert (prepared == 0) == (threshold is None)


def test_a_request_of_fastapi(tenant: str) -> None:
    dependency = database.get_db()
    db = next(dependency)
    database.bind_tenant(db, tenant)
    UserRepository.create(db)
    assert (db.in_transaction(), checked_out()) == (False, 0)
    db.execute(text("SELECT 1"))
    db.add(User())
    with pytest.raises(ZeroDivisionError):
        dependency.throw(ZeroDivisionError())  # type: ignore[attr-defined]
    assert (count_elsewhere(tenant), checked_out()) == (1, 0)


# More of what it costs


COSTS: dict[str, tuple[int, Callable[[Session, Conversation], Any]]] = {
    "create_many": (2, lambda db, _: UserRepository.create_many(db, [{}] * 5)),
    "the next page": (
        1,
        lambda db, _: UserRepository.list(db, limit=1, cursor=encode_cursor_of_users()),
    ),
    "append by thread": (
        2,
        lambda db, c: MessageRepository.append(db, c.thread_id, role="user", content=""),
    ),
    "append a known key": (3, CONFLICTS["append"]),
    "append_many with known keys": (3, CONFLICTS["append_many"]),
    "append_many with new keys": (
        4,
        lambda db, c: MessageRepository.append_many(
            db, c.id, [{"role": "user", "content": "", "idempotency_key": uuid4().hex}]
        ),
    ),
    "get_or_create, made": (
        2,
        lambda db, _: UserRepository.get_or_create(db, f"{uuid4().hex}@example.com"),
    ),
    "get_or_create_by_identity, known": (2, CONFLICTS["identity"]),
    "get_or_create_by_identity, made": (
        4,
        lambda db, _: UserRepository.get_or_create_by_identity(db, "google", uuid4().hex),
    ),
    "deactivate": (4, lambda db, c: MessageRepository.deactivate(db, c.id)),
    "deactivate nothing": (3, lambda db, c: MessageRepository.deactivate(db, c.id, [])),
}


def encode_cursor_of_users() -> str:
    return encode_cursor("users.created_at", datetime.now(UTC), uuid4())


@pytest.mark.parametrize("name", COSTS)
def test_other_calls_cost(db: Session, taken: Conversation, name: str) -> None:
    expected, call = COSTS[name]
    UserRepository.count(db)
    with counted_round_trips() as trips:
        call(db, taken)
    assert trips.count == expected
    assert (db.in_transaction(), checked_out()) == (False, 0)
