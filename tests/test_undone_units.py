"""What rows show when a unit was undone: what they showed before it, without a connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Column, Integer, Table, Text, delete, func, inspect, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, registry
from sqlalchemy.orm.exc import ObjectDeletedError

import database
from database import (
    Base,
    Conversation,
    ConversationRepository,
    DatabaseError,
    MemoryRepository,
    Message,
    MessageRepository,
    SessionLocal,
    TenantSession,
    User,
    UserRepository,
    get_engine,
    transaction,
)
from tests.counting import counted_statements
from tests.running import execute


class UndoneError(Exception):
    """Ends a unit."""


@contextmanager
def undone(db: Session) -> Iterator[None]:
    with suppress(UndoneError), transaction(db):
        yield
        raise UndoneError


@contextmanager
def within_nothing(_db: Session) -> Iterator[None]:
    yield


@contextmanager
def within_a_unit(db: Session) -> Iterator[None]:
    with transaction(db):
        UserRepository.count(db)
        yield


@contextmanager
def after_a_read(db: Session) -> Iterator[None]:
    db.scalar(text("SELECT 1"))
    yield


Around = Callable[[Session], AbstractContextManager[None]]
AROUND: dict[str, Around] = {
    "alone": within_nothing,
    "inner": within_a_unit,
    "after a read": after_a_read,
}


@pytest.fixture(params=list(AROUND))
def around(request: pytest.FixtureRequest) -> Around:
    """What the session is in when the unit begins."""
    return AROUND[request.param]


def shown(row: Any) -> dict[str, Any]:
    """What a row shows, without a statement."""
    with counted_statements() as statements:
        found: dict[str, Any] = row.to_dict()
    assert statements == []
    return found


# Rows of before


def test_rows_read_before_stay_usable(db: TenantSession, around: Around) -> None:
    user = UserRepository.create(db, username="old")
    chat = ConversationRepository.create(db, user_id=user.id)
    made = shown(user), shown(chat)
    with around(db):
        with undone(db):
            UserRepository.create(db)
        assert (shown(user), shown(chat)) == made


def test_no_connection_is_held_by_a_look_at_a_row(db: TenantSession) -> None:
    user = UserRepository.create(db, username="old")
    with undone(db):
        UserRepository.touch(db, user.id)
    assert user.username == "old"
    assert not db.in_transaction()
    pool: Any = get_engine().pool
    assert pool.checkedout() == 0


CALLS: dict[str, Callable[[Session, Conversation, Message], Any]] = {
    "edit": lambda db, _, m: MessageRepository.edit(db, m.id, content="x", role="nobody"),
    "edit elsewhere": lambda db, _, m: MessageRepository.edit(
        db, m.id, content="x", conversation_id=uuid4()
    ),
    "regenerate": lambda db, _, m: MessageRepository.regenerate(db, m.id, "x", role="nobody"),
    "branch": lambda db, c, _: ConversationRepository.branch(db, c.id, at=uuid4()),
    "switch": lambda db, c, _: ConversationRepository.switch(db, c.id, uuid4()),
    "fork": lambda db, c, _: ConversationRepository.fork(db, c.id, at=uuid4()),
    "update": lambda db, _, m: MessageRepository.update(db, m.id, content="x", role="nobody"),
    "append_many": lambda db, c, _: MessageRepository.append_many(
        db, c.id, [{"role": "user", "content": "", "idempotency_key": "k", "id": _.id}]
    ),
    "create_many": lambda db, c, _: ConversationRepository.create_many(
        db, [{"title": "new"}, {"thread_id": c.thread_id}]
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_failed_call_leaves_rows_as_they_were(
    db: TenantSession, around: Around, call: Callable[[Session, Conversation, Message], Any]
) -> None:
    chat = ConversationRepository.create(db)
    message = MessageRepository.append(db, chat.id, role="user", content="old")
    chat = ConversationRepository.require(db, chat.id)
    made = shown(chat), shown(message)
    with around(db):
        with pytest.raises(DatabaseError):
            call(db, chat, message)
        assert (shown(chat), shown(message)) == made


# Rows that the unit has changed


def write_past_the_session(db: Session, user: User) -> None:
    rename = text("UPDATE users SET username = 'new' WHERE id = :id")
    db.connection().execute(rename, {"id": user.id})


def write_and_read(db: Session, user: User) -> None:
    write_past_the_session(db, user)
    assert UserRepository.require(db, user.id).username == "new"


def write_and_refresh(db: Session, user: User) -> None:
    write_past_the_session(db, user)
    db.refresh(user)
    assert user.username == "new"


def set_and_flush(db: Session, user: User) -> None:
    user.username = "new"
    db.flush()


def write_in_an_inner_unit(db: Session, user: User) -> None:
    with transaction(db):
        UserRepository.update(db, user.id, username="new")


WRITES: dict[str, Callable[[Session, User], Any]] = {
    "update": lambda db, user: UserRepository.update(db, user.id, username="new"),
    "settings": lambda db, user: UserRepository.update_settings(db, user.id, {"new": 1}),
    "statement": lambda db, user: db.execute(
        update(User).where(User.id == user.id).values(username="new")
    ),
    "statement that fetches": lambda db, user: db.execute(
        update(User).where(User.id == user.id).values(username=func.concat("n", "ew")),
        execution_options={"synchronize_session": "fetch"},
    ),
    "statement by key": lambda db, user: db.execute(
        update(User), [{"tenant_id": user.tenant_id, "id": user.id, "username": "new"}]
    ),
    "statement that deletes": lambda db, user: db.execute(delete(User).where(User.id == user.id)),
    "flush": set_and_flush,
    "attribute": lambda _, user: setattr(user, "username", "new"),
    "written, then read": write_and_read,
    "written, then refreshed": write_and_refresh,
    "inner unit": write_in_an_inner_unit,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_no_row_keeps_what_was_undone(
    db: TenantSession, around: Around, write: Callable[[Session, User], Any]
) -> None:
    user = UserRepository.create(db, username="old")
    with around(db):
        with undone(db):
            write(db, user)
        assert (user.username, user.settings) == ("old", {})


def test_a_row_that_was_read_in_the_unit_shows_what_it_showed_before(
    db: TenantSession, around: Around
) -> None:
    user = UserRepository.create(db, username="old")
    made = shown(user)
    with around(db):
        with undone(db):
            UserRepository.require(db, user.id)
        assert shown(user) == made


READS: dict[str, Callable[[Session, UUID], User]] = {
    "repository": UserRepository.require,
    "select": lambda db, id_: db.scalars(select(User).where(User.id == id_)).one(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_row_first_seen_in_the_unit(
    db: TenantSession, around: Around, tenant: str, read: Callable[[Session, UUID], User]
) -> None:
    with SessionLocal(tenant_id=tenant) as elsewhere:
        key = UserRepository.create(elsewhere, username="old").id
    with around(db):
        with undone(db):
            UserRepository.update(db, key, username="new")
            user = read(db, key)
            assert user.username == "new"
        assert user.username == "old"


@pytest.mark.parametrize("makes", ["repository", "session"])
def test_a_row_made_in_the_unit_is_no_more(db: TenantSession, around: Around, makes: str) -> None:
    with around(db):
        with undone(db):
            if makes == "session":
                user = User(username="new")
                db.add(user)
                db.flush()
            else:
                user = UserRepository.create(db, username="new")
        if makes == "session":
            assert user not in db
        else:
            with counted_statements() as statements:
                key = user.id
            assert statements == []
            assert UserRepository.get(db, key) is None
            with pytest.raises(ObjectDeletedError):
                _ = user.username
        assert UserRepository.count(db) == 0


def test_an_inner_unit_that_succeeds_is_undone_with_the_outer(db: TenantSession) -> None:
    user = UserRepository.create(db, username="old")
    made = shown(user)
    with undone(db):
        with transaction(db):
            UserRepository.require(db, user.id)
        with undone(db):
            UserRepository.update(db, user.id, username="inner")
        assert user.username == "old"
    assert shown(user) == made


def test_what_an_inner_unit_reads_of_the_outer_ones_is_undone(db: TenantSession) -> None:
    user = UserRepository.create(db, username="old")
    with undone(db):
        UserRepository.update(db, user.id, username="new")
        with transaction(db):
            assert UserRepository.require(db, user.id).username == "new"
    assert user.username == "old"


def test_what_the_outer_unit_changed_survives_an_inner_one(db: TenantSession) -> None:
    user = UserRepository.create(db, username="old")
    with transaction(db):
        UserRepository.update(db, user.id, username="outer")
        with undone(db):
            UserRepository.require(db, user.id)
        assert shown(user)["username"] == "outer"
    assert shown(user)["username"] == "outer"


def test_a_deleted_row_is_the_sessions_again(db: TenantSession, around: Around) -> None:
    user = UserRepository.create(db, username="old")
    with around(db):
        with undone(db):
            db.delete(user)
            db.flush()
        assert user.username == "old"


@pytest.mark.parametrize("deletes", ["session", "statement"])
def test_a_row_whose_place_another_took(db: TenantSession, around: Around, deletes: str) -> None:
    first, second = (UserRepository.create(db, username="old") for _ in range(2))
    with around(db):
        with undone(db):
            if deletes == "session":
                db.delete(first)
                db.flush()
            else:
                db.execute(delete(User).where(User.id == first.id))
            twin = UserRepository.create(db, id=first.id, username="new")
            assert twin is not first
            UserRepository.update(db, second.id, username="new")
        assert second.username == "old"
        assert UserRepository.require(db, first.id).username == "old"


def test_what_is_not_loaded_yet_can_be_loaded_afterwards(short_vectors: None, tenant: str) -> None:
    with SessionLocal(tenant_id=tenant) as session:
        chat = ConversationRepository.create(session)
        MemoryRepository.add(session, chat.id, content="old", embedding=[1, 2, 3])
    with SessionLocal(tenant_id=tenant) as session:
        (memory,) = MemoryRepository.recent(session, chat.id)
        assert "embedding" in inspect(memory).unloaded
        with undone(session):
            UserRepository.create(session)
        assert shown(memory)["content"] == "old"
        assert list(memory.embedding or ()) == [1, 2, 3]


def test_a_failed_flush_undoes_all(db: TenantSession) -> None:
    """SQLAlchemy rolls back before the unit ends: its rows are read again when looked at."""
    user = UserRepository.create(db, email="taken@example.com")
    with pytest.raises((DatabaseError, IntegrityError)), transaction(db):
        db.add(User(email="taken@example.com"))
        db.flush()
    assert user.email == "taken@example.com"


def test_a_row_of_no_session_any_more(db: TenantSession, around: Around) -> None:
    user = UserRepository.create(db, username="old")
    with around(db):
        with undone(db):
            UserRepository.require(db, user.id)
            db.expunge(user)
        assert (user.username, user in db) == ("old", False)


# Models of the caller's own


class Note(Base):
    """Mapped apart from our models, which other tests compare with the database."""

    __abstract__ = True

    id: Mapped[int]
    body: Mapped[str]


apart = registry()
columns = Column("id", Integer, primary_key=True), Column("body", Text)
apart.map_imperatively(Note, Table("notes", apart.metadata, *columns))


@pytest.fixture
def notes(fresh_url: str, tenant: str) -> Iterator[TenantSession]:
    """A session of a database that has such a model's table."""
    execute(fresh_url, "CREATE TABLE notes (id integer PRIMARY KEY, body text)")
    execute(fresh_url, "GRANT ALL ON notes TO database_app")
    database.configure(url=fresh_url)
    with SessionLocal(tenant_id=tenant) as session:
        yield session


def test_a_row_of_the_callers_model_stays_usable(notes: TenantSession, around: Around) -> None:
    note = Note(id=1, body="old")
    notes.add(note)
    notes.commit()
    with around(notes):
        with undone(notes):
            UserRepository.create(notes)
        with counted_statements() as statements:
            assert note.body == "old"
        assert statements == []


def test_no_row_of_the_callers_model_keeps_what_was_undone(
    notes: TenantSession, around: Around
) -> None:
    note = Note(id=1, body="old")
    notes.add(note)
    notes.commit()
    with around(notes):
        with undone(notes):
            notes.connection().execute(text("UPDATE notes SET body = 'new'"))
            notes.refresh(note)
            assert note.body == "new"
        assert note.body == "old"
