"""Everything that JEAN Memory's two systems do, and nothing of what failed in them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Engine, inspect, text
from sqlalchemy.dialects.postgresql import JSONB

import database
from database import (
    ApiKeyRepository,
    AuthenticationError,
    Context,
    ContextRepository,
    ConversationRepository,
    DatabaseError,
    IdentityRepository,
    InvalidReferenceError,
    MemoryRepository,
    MessageRepository,
    NotFoundError,
    SessionLocal,
    StateRepository,
    TenantSession,
    User,
    UserRepository,
    get_db,
    get_db_session,
    init_db,
    transaction,
)
from examples import jean_memory
from tests.conftest import admin
from tests.counting import counted_statements
from tests.running import ROOT, in_order, run_example

T = TypeVar("T")

GOOGLE_ID = "115292150460684697600"
TABLES = {"users", "identities", "api_keys", "contexts"}


@pytest.fixture
def user(db: TenantSession) -> User:
    return UserRepository.create(db, email="ada@example.com")


@pytest.fixture
def stranger(db: TenantSession) -> User:
    """Another user of the same tenant."""
    return UserRepository.create(db, email="eve@example.com")


@pytest.fixture
def elsewhere(configured: None, tenant: str) -> Iterator[TenantSession]:
    """Another session of the test's tenant: it sees what is committed, and has read nothing."""
    with SessionLocal(tenant_id=tenant) as session:
        yield session


def contents(page: Any) -> list[Any]:
    return [context.content for context in page]


def require(found: T | None) -> T:
    assert found is not None
    return found


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """What calls in as many threads return, or the errors of ours that they raise."""
    ready = threading.Barrier(count)

    def run(number: int) -> Any:
        ready.wait()
        try:
            return call(number)
        except DatabaseError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# The example

SHOWN = (
    "The note seoul is new: True",
    "Stored again it is new: False; same id: True",
    "Commits: Stored(inserted=3, updated=0)",
    "The »analytical engine« weaves",
    "»Bernoulli« numbers:",
    "»분석 엔«진",
    "Explain how the engine repeats operations 88",
    "Settings: {'mail': {'weekly': True}, 'theme': 'dark'}",
    "Notes: [{'text': 'Menabrea prints the lecture.'}]",
    "London's note, by its id: None",
    "London's, by its words: []",
    "Exported: {'users': 1, 'identities': 1, 'api_keys': 1, 'contexts': 6}",
    "Deleted: {'users': 1, 'identities': 1, 'api_keys': 1, 'contexts': 6}",
    "The next request: the API key is not valid",
    "Turin remembers: {'text': 'Menabrea prints the lecture.'}",
)


def test_the_example_shows_the_same_every_time(empty_url: str, tmp_path: Path) -> None:
    outputs = []
    for _ in range(2):
        done = run_example("jean_memory.py", tmp_path, empty_url)
        assert (done.returncode, done.stderr) == (0, "")
        assert in_order(done.stdout, SHOWN)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]

    database.configure(url=empty_url)
    with get_db_session(tenant_id="jean-london") as db:
        assert UserRepository.count(db) == ContextRepository.count(db) == 0
    with get_db_session(tenant_id="jean-turin") as db:
        assert UserRepository.count(db) == ApiKeyRepository.count(db) == 1
        assert ContextRepository.count(db) == 1


def test_the_example_ends_with_one_line_if_there_is_no_database(tmp_path: Path) -> None:
    done = run_example("jean_memory.py", tmp_path, "postgresql://me:secret-word@127.0.0.1:1/chat")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("The demo stopped: DATABASE_URL: ")
    assert "secret-word" not in line


def test_the_example_logs_in_again(tenant: str) -> None:
    first = jean_memory.login(tenant, GOOGLE_ID, "ada@example.com")
    phone = jean_memory.login(tenant, GOOGLE_ID, "ada@example.com", device="phone")
    with jean_memory.authenticated(first) as memory:
        memory.store_context("note", "kept")
        before = memory.user
    second = jean_memory.login(tenant, GOOGLE_ID, "Ada@Lovelace.org")
    for key in (second, phone):
        with jean_memory.authenticated(key) as memory:
            assert memory.user.id == before.id
            assert memory.user.email == "ada@lovelace.org"
            assert require(memory.user.last_active_at) > require(before.last_active_at)
            assert memory.get_context("note") == "kept"
    with pytest.raises(AuthenticationError), jean_memory.authenticated(first):
        pass


def test_the_example_makes_one_user_of_many_first_logins(db: TenantSession, tenant: str) -> None:
    keys = at_once(12, lambda _: jean_memory.login(tenant, GOOGLE_ID, "ada@example.com"))
    assert all(isinstance(key, str) for key in keys), keys
    assert UserRepository.count(db) == IdentityRepository.count(db) == 1
    assert ApiKeyRepository.count(db) == 1


def test_the_example_keeps_users_apart(tenant: str) -> None:
    ada = jean_memory.login(tenant, "1", "ada@example.com")
    eve = jean_memory.login(tenant, "2", "eve@example.com")
    with jean_memory.authenticated(ada) as memory:
        secret = memory.store_context("note", {"text": "secret"}, "s")
    with jean_memory.authenticated(eve) as memory:
        assert memory.get_context("note") is None
        assert memory.get_context("note", "s") is None
        assert memory.get_context_by_id(str(secret.id)) is None
        assert list(memory.get_all_context_by_type("note")) == []
        assert list(memory.search_context("secret")) == []
        assert list(memory.search_context(None)) == []
        assert memory.delete_context_by_id(str(secret.id)) is False
        assert memory.delete_context_by_type("note") == 0
        assert "secret" not in "".join(memory.export_user_data())
        memory.delete_user_data()
    with jean_memory.authenticated(ada) as memory:
        assert memory.get_context("note", "s") == {"text": "secret"}
        assert memory.delete_context_by_id(str(secret.id)) is True
        assert memory.get_context("note") is None


def test_the_example_lists_beyond_a_page(tenant: str) -> None:
    commits = [{"sha": f"{n:07x}"} for n in range(120)]
    with jean_memory.authenticated(jean_memory.login(tenant, "1", "ada@example.com")) as memory:
        memory.store_github_context("ada/engine", commits)
        memory.store_context("note", "another type")
        found = [context.content["sha"] for context in memory.get_all_context_by_type("github")]
        assert sorted(found) == [commit["sha"] for commit in commits]
        assert memory.delete_context_by_type("github") == 120
        assert memory.get_context("note") == "another type"


# Table A: ContextDatabase


def test_a_initialize_creates_pool_and_tables(empty_url: str) -> None:
    database.configure(url=empty_url, pool_size=3)
    assert inspect(database.get_engine()).get_table_names() == []
    for _ in range(2):  # it may be called at every start
        init_db()
        assert set(inspect(database.get_engine()).get_table_names()) >= TABLES
        with get_db_session() as db:
            user = UserRepository.get_or_create(db, "ada@example.com")
            ContextRepository.store(db, user.id, "note", {"n": 1}, source_identifier="only")
    with get_db_session() as db:
        assert ContextRepository.count(db) == 1
    assert database.get_engine().pool.size() == 3  # type: ignore[attr-defined]


def test_a_store_context_inserts_or_updates(
    db: TenantSession, elsewhere: TenantSession, user: User
) -> None:
    with counted_statements() as statements:
        made = ContextRepository.store(db, user.id, "profile", {"v": 1}, source_identifier="p")
    assert len(statements) == 1
    assert "ON CONFLICT" in statements[0]
    assert made.inserted is True
    created, updated, id_ = made.created_at, made.updated_at, made.id
    again = ContextRepository.store(db, user.id, "profile", {"v": 2}, source_identifier="p")
    assert (again.inserted, again.id, again.created_at) == (False, id_, created)
    assert again.updated_at > updated
    stored = require(ContextRepository.get(elsewhere, user.id, "profile", "p"))
    assert (stored.content, stored.updated_at) == ({"v": 2}, again.updated_at)
    assert ContextRepository.count(db) == 1


def test_a_get_context(db: TenantSession, user: User, stranger: User) -> None:
    assert ContextRepository.get(db, user.id, "note") is None
    for n in range(3):
        ContextRepository.store(db, user.id, "note", {"n": n})
    ContextRepository.store(db, stranger.id, "note", {"n": "stranger"})
    assert require(ContextRepository.get(db, user.id, "note")).content == {"n": 2}
    page = ContextRepository.list(db, user_id=user.id, context_type="note")
    assert contents(page) == [{"n": 2}, {"n": 1}, {"n": 0}]


def test_a_store_and_fetch_github_context(
    db: TenantSession, elsewhere: TenantSession, user: User
) -> None:
    activity = {"commits": [{"sha": "9fceb02", "files": ["a.py"], "stats": {"additions": 212}}]}
    ContextRepository.store(db, user.id, "note", "no activity")
    ContextRepository.store(db, user.id, "github", activity, source_identifier="ada/engine")
    assert require(ContextRepository.get(elsewhere, user.id, "github")).content == activity
    activity["commits"].append({"sha": "1b2e1d6", "files": [], "stats": {}})
    ContextRepository.store(db, user.id, "github", activity, source_identifier="ada/engine")
    found = ContextRepository.list(elsewhere, user_id=user.id, context_type="github")
    assert contents(found) == [activity]


def test_a_create_user_and_get_user_by_google_id(db: TenantSession, other: TenantSession) -> None:
    assert UserRepository.get_by_identity(db, "google", GOOGLE_ID) is None
    user = UserRepository.create(db, email="ada@example.com")
    IdentityRepository.create(db, user_id=user.id, provider="google", subject=GOOGLE_ID)
    assert require(UserRepository.get_by_identity(db, "google", GOOGLE_ID)).id == user.id
    assert UserRepository.get_by_identity(db, "google", GOOGLE_ID[:-1]) is None
    assert UserRepository.get_by_identity(other, "google", GOOGLE_ID) is None


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, True, None, {"é": "서울 🌍"}], "": {}},
        ["text", ["nested"]],
        "text",
        'quotes " and \\ and \n',
        0,
        -1.5,
        False,
        None,
        {},
        [],
    ],
)
def test_a_json_is_objects_in_and_out(
    db: TenantSession, elsewhere: TenantSession, user: User, value: Any
) -> None:
    made = ContextRepository.store(db, user.id, "note", value, metadata={"value": value})
    ContextRepository.store_many(
        db, user.id, [{"context_type": "many", "content": value, "metadata": {"value": value}}]
    )
    for found in (
        made,
        require(ContextRepository.get(elsewhere, user.id, "note")),
        require(ContextRepository.get(elsewhere, user.id, "many")),
    ):
        assert (found.content, type(found.content)) == (value, type(value))
        assert found.metadata_ == {"value": value}
    kind = text("SELECT DISTINCT jsonb_typeof(content) FROM contexts")
    expected = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    assert db.scalars(kind).all() == [expected.get(type(value), "number")]


# Table B: tenants, API keys, settings, search


def test_b_tables_have_all_columns_and_the_unique_key(worker_url: str) -> None:
    found = inspect(database.get_engine())
    columns = {
        table: {column["name"]: column for column in found.get_columns(table)} for table in TABLES
    }
    assert columns["users"].keys() >= {
        "id", "tenant_id", "email", "is_active", "created_at", "last_active_at", "settings"
    }  # fmt: skip
    assert columns["contexts"].keys() >= {
        "id", "user_id", "tenant_id", "context_type", "source_identifier", "content", "metadata",
        "created_at", "updated_at",
    }  # fmt: skip
    assert columns["identities"].keys() >= {"user_id", "provider", "subject"}
    for table, name in (("users", "settings"), ("contexts", "content"), ("contexts", "metadata")):
        assert isinstance(columns[table][name]["type"], JSONB)
    (unique,) = found.get_unique_constraints("contexts")
    assert unique["column_names"] == [
        "tenant_id", "user_id", "context_type", "source_identifier"
    ]  # fmt: skip
    (key,) = found.get_foreign_keys("contexts")
    assert key["constrained_columns"] == ["tenant_id", "user_id"]
    assert key["options"] == {"ondelete": "CASCADE"}


def test_b_initialize_get_and_close_db(fresh_url: str, tenant: str) -> None:
    database.configure(url=fresh_url, tenant_id=tenant)
    first = database.get_engine()
    assert isinstance(first, Engine)
    steps = get_db()
    db = next(steps)
    UserRepository.create(db, email="ada@example.com")
    assert db.get_bind() is first is database.get_engine()
    assert list(steps) == []
    assert first.pool.checkedout() == 0  # type: ignore[attr-defined]
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    with admin(fresh_url) as watching:
        assert watching.execute(count).fetchone() == (2,)  # it counts itself
        database.close_db()
        database.close_db()
        deadline = time.monotonic() + 10
        while watching.execute(count).fetchone() != (1,):
            assert time.monotonic() < deadline, "close_db left a connection open"
            time.sleep(0.01)
    database.configure(url=fresh_url, tenant_id=tenant)
    with get_db_session() as again:
        assert again.get_bind() is not first
        assert UserRepository.get_by_email(again, "ada@example.com") is not None


def test_b_create_or_get_user(db: TenantSession, other: TenantSession) -> None:
    def create_or_get(session: TenantSession, email: str) -> User:
        return UserRepository.get_or_create_by_identity(session, "google", GOOGLE_ID, email=email)

    start = datetime.now(UTC)
    new = create_or_get(db, "ada@example.com")
    key = ApiKeyRepository.create(db, new.id)
    id_, seen = new.id, require(new.last_active_at)
    assert (new.email, new.is_active, seen >= start) == ("ada@example.com", True, True)
    old = create_or_get(db, "ada@lovelace.org")
    assert (old.id, old.email) == (id_, "ada@lovelace.org")
    assert require(old.last_active_at) > seen
    assert UserRepository.count(db) == 1
    assert ApiKeyRepository.authenticate(db, key.secret).id == id_
    assert create_or_get(other, "ada@example.com").id != id_
    assert require(UserRepository.get_by_identity(db, "google", GOOGLE_ID)).id == id_


def test_b_validate_api_key(db: TenantSession, other: TenantSession, user: User) -> None:
    new = ApiKeyRepository.create(db, user.id)
    stored = ContextRepository.store(db, user.id, "note", "text")
    with SessionLocal() as request:
        assert ApiKeyRepository.authenticate(request, new.secret).id == user.id
        # The session is the tenant's from now on.
        assert contents(ContextRepository.list(request)) == ["text"]
        assert ContextRepository.get(request, stored.id) is not None
    for wrong in (new.secret[:-1], new.secret + "x", "", "anything", None):
        with pytest.raises(AuthenticationError):
            ApiKeyRepository.authenticate(other, wrong)
    ApiKeyRepository.revoke(db, new.api_key.id)
    with pytest.raises(AuthenticationError):
        ApiKeyRepository.authenticate(other, new.secret)
    assert ContextRepository.count(other) == 0


def test_b_validate_api_key_stores_only_a_hash(db: TenantSession, user: User) -> None:
    new = ApiKeyRepository.create(db, user.id)
    row = str(db.execute(text("SELECT to_jsonb(api_keys) FROM api_keys")).scalar_one())
    assert new.secret not in row
    assert new.secret[-20:] not in row
    digest = "SELECT key_hash = sha256(convert_to(:secret, 'UTF8')) FROM api_keys"
    assert db.scalar(text(digest), {"secret": new.secret}) is True


def test_b_validate_api_key_has_one_development_key(
    worker_url: str, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = "the-development-key"
    with SessionLocal(tenant_id=tenant) as db, pytest.raises(AuthenticationError):
        ApiKeyRepository.authenticate(db, key)
    database.configure(url=worker_url, tenant_id=tenant, development_api_key=key)
    with SessionLocal(tenant_id=f"{tenant}-2") as db:
        for other_key in ("any key", key + "x", ""):
            with pytest.raises(AuthenticationError):
                ApiKeyRepository.authenticate(db, other_key)
        with caplog.at_level(logging.WARNING):
            assert ApiKeyRepository.authenticate(db, key).tenant_id == tenant
        assert "development" in caplog.text
        assert key not in caplog.text
    with pytest.raises(database.ConfigurationError, match="DEVELOPMENT_API_KEY"):
        database.configure(url=worker_url, environment="production", development_api_key=key)


def test_b_store_context_is_unique_in_tenant_user_type_and_source(
    db: TenantSession, other: TenantSession, user: User, stranger: User
) -> None:
    foreigner = UserRepository.create(other)

    def store(
        session: TenantSession, who: User, kind: str, source: str | None, content: str
    ) -> bool | None:
        return ContextRepository.store(
            session, who.id, kind, content, source_identifier=source, metadata={"of": content}
        ).inserted

    assert store(db, user, "note", "s", "first")
    assert store(db, user, "github", "s", "another type")
    assert store(db, user, "note", "t", "another source")
    assert store(db, stranger, "note", "s", "another user")
    assert store(other, foreigner, "note", "s", "another tenant")
    assert store(db, user, "note", None, "no source")
    assert store(db, user, "note", None, "no source again")
    assert store(db, user, "note", "s", "second") is False
    found = require(ContextRepository.get(db, user.id, "note", "s"))
    assert (found.content, found.metadata_) == ("second", {"of": "second"})
    assert (ContextRepository.count(db), ContextRepository.count(other)) == (6, 1)
    with pytest.raises(InvalidReferenceError, match="user_id"):
        store(db, foreigner, "note", "s", "not theirs")
    assert contents(ContextRepository.list(other)) == ["another tenant"]


def test_b_store_context_in_batches(db: TenantSession, user: User, stranger: User) -> None:
    ContextRepository.store(db, user.id, "github", "old", source_identifier="sha-3")
    items = [
        {"context_type": "github", "content": {"n": n}, "source_identifier": f"sha-{n}"}
        for n in range(100)
    ]
    with counted_statements() as statements:
        done = ContextRepository.store_many(db, user.id, iter(items))
    assert (done.inserted, done.updated) == (99, 1)
    assert len([one for one in statements if "contexts" in one]) == 1
    assert require(ContextRepository.get(db, user.id, "github", "sha-3")).content == {"n": 3}
    with pytest.raises(database.InvalidValueError, match="context_type"):
        ContextRepository.store_many(db, stranger.id, [items[0], {"content": 1}])
    assert ContextRepository.count(db, user_id=stranger.id) == 0
    assert ContextRepository.count(db, user_id=user.id) == 100


def test_b_get_context(db: TenantSession, other: TenantSession, user: User) -> None:
    for n in range(5):
        ContextRepository.store(db, user.id, "note", n, source_identifier=f"s-{n}")
    assert require(ContextRepository.get(db, user.id, "note", "s-1")).content == 1
    assert require(ContextRepository.get(db, user.id, "note")).content == 4
    page = ContextRepository.list(db, user_id=user.id, context_type="note", limit=2)
    assert contents(page) == [4, 3]
    ContextRepository.store(db, user.id, "note", "news", source_identifier="s-0")
    assert require(ContextRepository.get(db, user.id, "note")).content == "news"
    assert ContextRepository.get(db, user.id, "note", "s-9") is None
    assert ContextRepository.get(db, user.id, "github", "s-1") is None
    assert ContextRepository.get(other, user.id, "note", "s-1") is None


def test_b_get_all_context_by_type(
    db: TenantSession, other: TenantSession, user: User, stranger: User
) -> None:
    for n in range(7):
        ContextRepository.store(db, user.id, "note", n)
    ContextRepository.store(db, user.id, "github", "another type")
    ContextRepository.store(db, stranger.id, "note", "another user")
    found: list[Any] = []
    cursor = None
    for _ in range(3):
        page = ContextRepository.list(
            db, user_id=user.id, context_type="note", limit=3, cursor=cursor
        )
        found += contents(page)
        cursor = page.next_cursor
    assert cursor is None
    assert found == [6, 5, 4, 3, 2, 1, 0]
    assert contents(ContextRepository.list(other, context_type="note")) == []


def test_b_get_context_by_id_checks_the_owner(
    db: TenantSession, other: TenantSession, user: User, stranger: User
) -> None:
    stored = ContextRepository.store(db, user.id, "note", "text")
    for id_ in (stored.id, str(stored.id)):
        found = require(ContextRepository.get_by_id(db, id_, user_id=user.id))
        assert found.content == "text"
        assert ContextRepository.get_by_id(db, id_, user_id=stranger.id) is None
        assert ContextRepository.get_by_id(other, id_, user_id=user.id) is None


def test_b_search_context(
    db: TenantSession, other: TenantSession, user: User, stranger: User
) -> None:
    foreigner = UserRepository.create(other)
    for session, who in ((db, user), (db, stranger), (other, foreigner)):
        ContextRepository.store_many(
            session,
            who.id,
            [
                {"context_type": "note", "content": {"text": "Invoices are due: 50% in MAY"}},
                {"context_type": "note", "content": {"text": "서울에서 분석 강연"}},
                {
                    "context_type": "github",
                    "content": {"message": "Count the invoices", "additions": 212},
                    "metadata": {"repository": "ada/engine"},
                },
            ],
        )

    def found(query: str | None, **options: Any) -> set[str]:
        page = ContextRepository.search(db, user.id, query, **options)
        assert {context.user_id for context in page} <= {user.id}
        return {next(iter(context.content.values()))[:5] for context in page}

    assert found("invoices") == {"Invoi", "Count"}
    assert found("invoices -count") == {"Invoi"}
    assert found('"the invoices" OR 강연') == {"Count", "서울에서 "[:5]}
    assert found("voice") == set()
    for query, expected in {"VOICE": {"Invoi", "Count"}, "50%": {"Invoi"}, "0%i": set()}.items():
        assert found(query, mode="substring") == expected
    assert found("울에서", mode="substring") == {"서울에서 "[:5]}
    assert found("invoices", context_type="github") == {"Count"}
    assert found(None, where={"additions": {"gt": 99}}) == {"Count"}
    assert found(None, where={"additions": {"gt": 212}}) == set()
    assert found(None, where={"additions": "212"}) == set()
    assert found(None, where={"metadata.repository": "ada/engine"}) == {"Count"}
    assert found("") == set()
    page = ContextRepository.search(db, user.id, "due invoices", highlight=("[", "]"))
    assert page.snippets == ["[Invoices] are [due]: 50% in MAY"]
    assert len(ContextRepository.search(db, None, "invoices")) == 4
    assert len(ContextRepository.search(other, user.id, "invoices")) == 0


def test_b_search_context_is_best_first_then_newest(db: TenantSession, user: User) -> None:
    for note in ("loom, loom and loom", "a loom", "one more loom", "engine"):
        ContextRepository.store(db, user.id, "note", note)
    expected = ["loom, loom and loom", "one more loom", "a loom"]
    page = ContextRepository.search(db, user.id, "loom")
    assert contents(page) == expected
    assert page.ranks[0] > page.ranks[1] == page.ranks[2] > 0
    first = ContextRepository.search(db, user.id, "loom", limit=2)
    rest = ContextRepository.search(db, user.id, "loom", limit=2, cursor=first.next_cursor)
    assert (contents(first), contents(rest)) == (expected[:2], expected[2:])
    assert rest.next_cursor is None


def test_b_delete_context_by_id(
    db: TenantSession, other: TenantSession, user: User, stranger: User
) -> None:
    stored = ContextRepository.store(db, user.id, "note", "text")
    kept = ContextRepository.store(db, user.id, "note", "kept")
    assert ContextRepository.delete(db, stored.id, user_id=stranger.id) is False
    assert ContextRepository.delete(other, stored.id, user_id=user.id) is False
    assert ContextRepository.delete(other, stored.id) is False
    assert ContextRepository.count(db) == 2
    assert ContextRepository.delete(db, stored.id, user_id=user.id) is True
    assert ContextRepository.delete(db, stored.id, user_id=user.id) is False
    assert [context.id for context in ContextRepository.list(db)] == [kept.id]


def test_b_delete_context_by_type_and_user(
    db: TenantSession, other: TenantSession, user: User, stranger: User
) -> None:
    for who in (user, stranger):
        for kind in ("note", "note", "github"):
            ContextRepository.store(db, who.id, kind, kind)
    assert ContextRepository.delete_by_type(other, user.id, "note") == 0
    assert ContextRepository.delete_by_type(db, user.id, "note") == 2
    assert ContextRepository.delete_by_type(db, user.id, "note") == 0
    assert contents(ContextRepository.list(db, user_id=user.id)) == ["github"]
    assert ContextRepository.count(db, user_id=stranger.id) == 3
    assert ContextRepository.delete_all(db, stranger.id) == 3
    assert ContextRepository.count(db) == 1


def everything_of(db: TenantSession, user: User) -> dict[str, int]:
    """Give a user a row in each table that can hold one; return how many."""
    IdentityRepository.create(db, user_id=user.id, provider="google", subject=str(user.id))
    ApiKeyRepository.create(db, user.id)
    ContextRepository.store_many(
        db, user.id, [{"context_type": "note", "content": n} for n in range(3)]
    )
    chat = ConversationRepository.create(db, user_id=user.id)
    MessageRepository.append(db, chat.id, role="user", content="Hello")
    MessageRepository.append(db, chat.id, role="assistant", content="Hello!")
    StateRepository.create(db, conversation_id=chat.id, state_key="mood", state_value="calm")
    MemoryRepository.create(db, conversation_id=chat.id, sequence=1, content="They said hello.")
    return {
        "users": 1, "identities": 1, "api_keys": 1, "contexts": 3, "conversations": 1,
        "messages": 2, "conversation_states": 1, "conversation_memory": 1,
    }  # fmt: skip


def rows_in_all_tables(url: str) -> dict[str, int]:
    """How many rows each table has, of all tenants; tables without any are left out."""
    with admin(url) as connection:
        counts = {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()
            for table in database.Base.metadata.tables
        }
    return {table: row[0] for table, row in counts.items() if row and row[0]}


def test_b_delete_user_data(fresh_url: str, tenant: str) -> None:
    database.configure(url=fresh_url)
    with get_db_session(tenant_id=tenant) as db, get_db_session(tenant_id="other") as other:
        kept = everything_of(other, UserRepository.create(other, email="ada@example.com"))
        user = UserRepository.create(db, email="ada@example.com")
        rows = everything_of(db, user)
        everything = rows_in_all_tables(fresh_url)
        assert everything == {table: rows[table] + kept[table] for table in rows}
        with pytest.raises(NotFoundError):
            UserRepository.erase(other, user.id)
        receipt = UserRepository.erase(db, user.id, dry_run=True)
        assert {table: count for table, count in receipt.items() if count} == rows
        assert rows_in_all_tables(fresh_url) == everything
        assert UserRepository.erase(db, user.id) == receipt
    assert rows_in_all_tables(fresh_url) == kept


def test_b_user_settings(
    db: TenantSession, other: TenantSession, elsewhere: TenantSession, user: User, stranger: User
) -> None:
    assert UserRepository.get_settings(db, user.id) == {}
    changes = {"mail": {"weekly": True, "daily": True}, "theme": "dark"}
    assert UserRepository.update_settings(db, user.id, changes) == changes
    with counted_statements() as statements:
        merged = UserRepository.update_settings(db, user.id, {"mail": {"daily": None}, "size": 12})
    assert len(statements) == 1
    assert merged == {"mail": {"weekly": True}, "theme": "dark", "size": 12}
    assert UserRepository.get_settings(elsewhere, user.id) == merged
    assert UserRepository.get_settings(db, stranger.id) == {}
    with pytest.raises(NotFoundError):
        UserRepository.get_settings(other, user.id)
    with pytest.raises(NotFoundError):
        UserRepository.update_settings(other, user.id, {"theme": "light"})
    assert UserRepository.get_settings(elsewhere, user.id) == merged


# What failed in the product that grew from it


@pytest.mark.parametrize("way", ["repository", "orm", "sql"])
def test_failure_no_cascade_when_a_user_is_deleted(fresh_url: str, tenant: str, way: str) -> None:
    database.configure(url=fresh_url)
    with get_db_session(tenant_id=tenant) as db:
        user = UserRepository.create(db, email="ada@example.com")
        everything_of(db, user)
        kept = everything_of(db, UserRepository.create(db, email="eve@example.com"))
        if way == "repository":
            assert UserRepository.delete(db, user.id) is True
        elif way == "orm":
            with transaction(db):
                db.delete(user)
        else:
            with transaction(db):
                db.execute(text("DELETE FROM users WHERE id = :id"), {"id": user.id})
    assert rows_in_all_tables(fresh_url) == kept


@pytest.mark.parametrize("field", ["content", "metadata_"])
@pytest.mark.parametrize("way", ["update", "store"])
def test_failure_an_edit_in_place_is_not_saved(
    db: TenantSession, elsewhere: TenantSession, user: User, way: str, field: str
) -> None:
    stored = ContextRepository.store(
        db, user.id, "note", {"tags": ["a"]}, source_identifier="s", metadata={"tags": ["a"]}
    )
    context = require(ContextRepository.get(db, user.id, "note", "s"))
    getattr(context, field)["tags"].append("b")
    db.commit()
    before = require(ContextRepository.get(elsewhere, user.id, "note", "s"))
    assert getattr(before, field) == {"tags": ["a"]}
    # An edit is saved by the call that says so, and by nothing else.
    if way == "update":
        name = field.rstrip("_")
        ContextRepository.update(db, context.id, **{name: getattr(context, field)})
    else:
        ContextRepository.store(
            db,
            user.id,
            "note",
            context.content,
            source_identifier="s",
            metadata=context.metadata_,
        )
    after = require(ContextRepository.get(elsewhere, user.id, "note", "s"))
    assert getattr(after, field) == {"tags": ["a", "b"]}
    assert after.id == stored.id
    assert getattr(require(ContextRepository.get(db, context.id)), field) == {"tags": ["a", "b"]}


def test_failure_replace_violates_the_unique_key(
    db: TenantSession, elsewhere: TenantSession, user: User
) -> None:
    def store(content: str) -> Context:
        return ContextRepository.store(db, user.id, "note", content, source_identifier="s")

    first = store("first")
    id_ = first.id
    assert store("second").id == id_
    with transaction(db):
        assert ContextRepository.delete(db, id_, user_id=user.id)
        third = store("third")
        assert store("fourth").id == third.id
    assert third.id != id_
    (found,) = ContextRepository.list(elsewhere)
    assert (found.id, found.content) == (third.id, "fourth")


def test_failure_alembic_on_an_empty_database(empty_url: str) -> None:
    given = {k: v for k, v in os.environ.items() if not k.startswith("DATABASE_")}
    done = subprocess.run(
        [Path(sys.executable).with_name("alembic"), "upgrade", "head"],
        cwd=ROOT,
        env={**given, "DATABASE_URL": empty_url, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    database.configure(url=empty_url)
    database.check_schema()
    with get_db_session() as db:
        user = UserRepository.get_or_create_by_identity(db, "google", GOOGLE_ID)
        ContextRepository.store(db, user.id, "note", "found")
        assert contents(ContextRepository.search(db, user.id, "found")) == ["found"]


def test_failure_commits_behind_the_callers_back(
    db: TenantSession, elsewhere: TenantSession
) -> None:
    def everything() -> None:
        with transaction(db):
            user = UserRepository.get_or_create_by_identity(db, "google", GOOGLE_ID)
            ApiKeyRepository.create(db, user.id)
            ContextRepository.store(db, user.id, "note", "one")
            ContextRepository.store_many(db, user.id, [{"context_type": "note", "content": "two"}])
            UserRepository.update_settings(db, user.id, {"theme": "dark"})
            UserRepository.touch(db, user.id)
            ContextRepository.delete_by_type(db, user.id, "github")
            assert len(ContextRepository.search(db, user.id, "one")) == 1
            assert UserRepository.count(elsewhere) == ContextRepository.count(elsewhere) == 0
            raise KeyError("of the caller's")

    with pytest.raises(KeyError):
        everything()
    for repository in (UserRepository, IdentityRepository, ApiKeyRepository, ContextRepository):
        assert repository.count(elsewhere) == 0


def test_failure_get_or_create_races(db: TenantSession, tenant: str) -> None:
    def by_identity(_: int) -> Any:
        with get_db_session(tenant_id=tenant) as session:
            return UserRepository.get_or_create_by_identity(
                session, "google", GOOGLE_ID, email="ada@example.com"
            ).id

    def by_email(_: int) -> Any:
        with get_db_session(tenant_id=tenant) as session:
            return UserRepository.get_or_create(session, "eve@example.com").id

    for call in (by_identity, by_email):
        found = at_once(16, call)
        assert len(set(found)) == 1, found
    assert UserRepository.count(db) == 2
    (user_id,) = {found[0]}

    def store(number: int) -> Any:
        with get_db_session(tenant_id=tenant) as session:
            return ContextRepository.store(
                session, user_id, "note", number, source_identifier="s"
            ).inserted

    assert sorted(at_once(16, store)) == [False] * 15 + [True]
    assert ContextRepository.count(db) == 1


def test_failure_last_used_at_is_written_on_every_call(db: TenantSession, user: User) -> None:
    new = ApiKeyRepository.create(db, user.id)
    assert ApiKeyRepository.require(db, new.api_key.id).last_used_at is None

    def writes_of_a_call() -> int:
        with SessionLocal() as request, counted_statements() as statements:
            ApiKeyRepository.authenticate(request, new.secret)
        return sum(statement.startswith("UPDATE") for statement in statements)

    assert [writes_of_a_call() for _ in range(5)] == [1, 0, 0, 0, 0]
    used = require(ApiKeyRepository.require(db, new.api_key.id).last_used_at)
    ApiKeyRepository.update(db, new.api_key.id, last_used_at=used - timedelta(minutes=2))
    assert [writes_of_a_call() for _ in range(2)] == [1, 0]


def test_failure_access_checks_are_n_plus_1(tenant: str) -> None:
    key = jean_memory.login(tenant, GOOGLE_ID, "ada@example.com")
    commits = [{"sha": f"{n:07x}", "message": "Mend the loop"} for n in range(40)]
    with jean_memory.authenticated(key) as memory:
        memory.store_github_context("ada/engine", commits)

    def cost(call: Callable[[jean_memory.Memory], Any]) -> int:
        """How many statements a request takes that looks at all that it gets."""
        with counted_statements() as statements, jean_memory.authenticated(key) as memory:
            found = call(memory)
            seen = [(c.user_id, c.content, c.metadata_, c.updated_at) for c in found]
        assert len(seen) == 40
        return len(statements)

    assert cost(lambda memory: memory.get_all_context_by_type("github")) == 2
    assert cost(lambda memory: memory.search_context("loop", highlight=("[", "]"))) == 2
    assert cost(lambda memory: memory.search_context("loo", mode="substring")) == 2
