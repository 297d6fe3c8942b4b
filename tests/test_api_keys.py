"""API keys: made once, stored as hashes, bound to a tenant, and never shown again."""

from __future__ import annotations

import logging
import re
import threading
import time
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError

import database
from database import (
    ALL_TENANTS,
    ApiKey,
    ApiKeyRepository,
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    ConversationRepository,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    NewApiKey,
    NotFoundError,
    SessionLocal,
    Settings,
    TenantSession,
    User,
    UserRepository,
    get_engine,
    transaction,
)
from database.pool import create_database_engine
from tests.counting import counted_round_trips, counted_statements

HOUR = timedelta(hours=1)
DEVELOPMENT_KEY = "development-key-of-one-machine"


def now() -> datetime:
    return datetime.now(UTC)


def tenant_of(db: TenantSession) -> Any:
    return db.info["database.tenant"]


def idle(db: TenantSession) -> bool:
    return not db.in_transaction() and get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def refused(db: TenantSession, key: object) -> None:
    """Expect the one error that all keys get, and a session as it was."""
    before = tenant_of(db)
    with pytest.raises(AuthenticationError) as caught:
        ApiKeyRepository.authenticate(db, key)
    assert str(caught.value) == "the API key is not valid"
    assert tenant_of(db) == before
    assert idle(db)


@pytest.fixture
def user(db: TenantSession) -> User:
    return UserRepository.create(db, email="ada@example.com")


@pytest.fixture
def new(db: TenantSession, user: User) -> NewApiKey:
    return ApiKeyRepository.create(db, user.id, name="ci")


@pytest.fixture
def elsewhere(configured: None) -> Iterator[TenantSession]:
    """A session of the default tenant, as a request has before its key is known."""
    with SessionLocal() as session:
        yield session


# Made


def test_a_new_key(db: TenantSession, user: User, tenant: str) -> None:
    expires_at = now() + HOUR
    new = ApiKeyRepository.create(db, user.id, name="ci", expires_at=expires_at)
    key = new.api_key
    assert re.fullmatch(rf"dbk_{tenant}_[A-Za-z0-9_-]{{43}}", new.secret)
    assert (key.user_id, key.name, key.expires_at) == (user.id, "ci", expires_at)
    assert (key.last_used_at, key.revoked_at) == (None, None)
    assert key.key_hash == sha256(new.secret.encode()).digest()
    assert new.secret.startswith(key.prefix)
    assert len(new.secret) - len(key.prefix) == 43 - 6
    assert ApiKeyRepository.require(db, key.id) is key


def test_many_keys(db: TenantSession, user: User) -> None:
    made = ApiKeyRepository.create_many(db, ({"user_id": user.id, "name": n} for n in "abc"))
    assert [new.api_key.name for new in made] == ["a", "b", "c"]
    assert len({new.secret for new in made}) == 3
    for new in made:
        assert ApiKeyRepository.authenticate(db, new.secret) is user
    assert ApiKeyRepository.create_many(db, []) == []
    with pytest.raises(InvalidReferenceError):
        ApiKeyRepository.create_many(db, [{"user_id": user.id}, {"user_id": uuid4()}])
    assert ApiKeyRepository.count(db) == 3


BAD: list[tuple[str, dict[str, Any]]] = [
    ("expires_at", {"expires_at": datetime(2999, 1, 1)}),  # noqa: DTZ001
    ("expires_at", {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}),
    ("expires_at", {"expires_at": "2999-01-01T00:00:00Z"}),
    ("name", {"name": "x" * 256}),
    ("name", {"name": 5}),
    ("user_id", {"user_id": None}),
    ("user_id", {"user_id": "x"}),
    ("key_hash", {"key_hash": b"x" * 32}),
    ("prefix", {"prefix": "dbk_"}),
    ("revoked_at", {"revoked_at": None}),
    ("colour", {"colour": "red"}),
]


@pytest.mark.parametrize(("field", "fields"), BAD)
def test_what_no_key_can_be_made_of(
    db: TenantSession, user: User, field: str, fields: dict[str, Any]
) -> None:
    for make in (
        lambda: ApiKeyRepository.create(db, **{"user_id": user.id} | fields),
        lambda: ApiKeyRepository.create_many(db, [{"user_id": user.id} | fields]),
    ):
        with pytest.raises(InvalidValueError) as caught:
            make()
        assert caught.value.field == field
    assert ApiKeyRepository.count(db) == 0
    assert idle(db)


def test_the_user_must_be_one_of_the_tenant(db: TenantSession, other: TenantSession) -> None:
    foreign = UserRepository.create(other)
    for user_id in (foreign.id, str(foreign.id), uuid4()):
        with pytest.raises(InvalidReferenceError, match="user_id"):
            ApiKeyRepository.create(db, user_id)
    with pytest.raises(InvalidValueError, match="values: "):
        ApiKeyRepository.create_many(db, [5])  # type: ignore[list-item]
    with (
        SessionLocal(tenant_id=ALL_TENANTS) as across,
        pytest.raises(ConfigurationError, match="one tenant"),
    ):
        ApiKeyRepository.create(across, foreign.id)


@pytest.mark.parametrize("field", ["key_hash", "prefix", "revoked_at"])
def test_what_only_the_repository_sets(db: TenantSession, new: NewApiKey, field: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}: is set by the repository$"):
        ApiKeyRepository.update(db, new.api_key.id, **{field: None})
    assert ApiKeyRepository.update(db, new.api_key.id, name="cd").name == "cd"


# Shown


def test_a_secret_is_shown_nowhere(
    new: NewApiKey, user: User, tenant: str, worker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    database.configure(url=worker_url, echo=True, development_api_key=DEVELOPMENT_KEY)
    shown = [repr(new), str(new), repr(new.api_key), str(new.api_key.to_dict())]
    secrets = [new.secret.rpartition(tenant)[2][1:], DEVELOPMENT_KEY]
    with SessionLocal(tenant_id=tenant) as db:
        made = ApiKeyRepository.create(db, user.id)
        ApiKeyRepository.authenticate(db, made.secret)
        ApiKeyRepository.authenticate(db, made.secret)
        rotated = ApiKeyRepository.rotate(db, made.api_key.id, grace=HOUR)
        shown += [repr(made), repr(rotated)]
        secrets += [made.secret, rotated.secret]
        ApiKeyRepository.revoke(db, new.api_key.id)
        for key in (new.secret, new.secret.encode(), new.secret + "x", DEVELOPMENT_KEY + "x"):
            with pytest.raises(AuthenticationError) as caught:
                ApiKeyRepository.authenticate(db, key)
            lines = traceback.format_exception(caught.value)
            shown += [repr(caught.value), *(line for line in lines if "  File" not in line)]
        ApiKeyRepository.authenticate(db, DEVELOPMENT_KEY)
    shown += [
        caplog.text,
        repr(get_engine().get_execution_options()),
        repr(database.get_settings()),
    ]
    assert "INSERT INTO api_keys" in caplog.text
    assert [s for s in secrets for output in shown if s in output] == []


def test_to_dict_leaves_the_hash_out(new: NewApiKey) -> None:
    shown = new.api_key.to_dict()
    assert "key_hash" not in shown
    assert shown["prefix"] == new.api_key.prefix
    assert b64encode(new.api_key.key_hash).decode() not in str(shown)


# Authenticated


def test_a_key_finds_its_user_and_tenant(
    elsewhere: TenantSession, new: NewApiKey, user: User, tenant: str
) -> None:
    before = UserRepository.create(elsewhere)
    found = ApiKeyRepository.authenticate(elsewhere, new.secret)
    assert (found.id, found.email, found.tenant_id) == (user.id, "ada@example.com", tenant)
    assert tenant_of(elsewhere) == tenant
    assert idle(elsewhere)
    assert found in elsewhere
    assert before not in elsewhere
    assert ConversationRepository.create(elsewhere, user_id=found.id).tenant_id == tenant
    assert ApiKeyRepository.authenticate(elsewhere, new.secret) is found


def test_a_session_across_tenants_enters_the_keys(new: NewApiKey, user: User, tenant: str) -> None:
    with SessionLocal(tenant_id=ALL_TENANTS) as across:
        refused(across, "x")
        held = across.get(User, (tenant, user.id))
        across.rollback()
        assert ApiKeyRepository.authenticate(across, new.secret) is held
        assert held in across
        assert tenant_of(across) == tenant


def test_a_session_joined_to_a_connection(new: NewApiKey, user: User, tenant: str) -> None:
    with (
        get_engine().connect() as connection,
        connection.begin(),
        TenantSession(connection, join_transaction_mode="create_savepoint") as db,
    ):
        with pytest.raises(AuthenticationError):
            ApiKeyRepository.authenticate(db, f"dbk_{tenant}_{'x' * 43}")
        assert tenant_of(db) == "default"
        assert UserRepository.get(db, user.id) is None
        assert ApiKeyRepository.authenticate(db, new.secret).id == user.id
        assert UserRepository.get(db, user.id) is not None


def test_a_session_in_a_transaction(
    db: TenantSession, elsewhere: TenantSession, new: NewApiKey, user: User
) -> None:
    with transaction(elsewhere):
        UserRepository.count(elsewhere)
        with pytest.raises(ConfigurationError, match="within a transaction"):
            ApiKeyRepository.authenticate(elsewhere, new.secret)
        assert tenant_of(elsewhere) == "default"
    with transaction(db):
        UserRepository.count(db)
        assert ApiKeyRepository.authenticate(db, new.secret) is user
        with pytest.raises(AuthenticationError):
            ApiKeyRepository.authenticate(db, f"dbk_{tenant_of(db)}_{'x' * 43}")
        UserRepository.touch(db, user.id)
    assert ApiKeyRepository.require(db, new.api_key.id).last_used_at is not None


def revoked(db: TenantSession, new: NewApiKey) -> None:
    assert ApiKeyRepository.revoke(db, new.api_key.id)


def expired(db: TenantSession, new: NewApiKey) -> None:
    ApiKeyRepository.update(db, new.api_key.id, expires_at=now())


def inactive(db: TenantSession, new: NewApiKey) -> None:
    UserRepository.update(db, new.api_key.user_id, is_active=False)


def deleted(db: TenantSession, new: NewApiKey) -> None:
    assert ApiKeyRepository.delete(db, new.api_key.id)


def without_user(db: TenantSession, new: NewApiKey) -> None:
    assert UserRepository.delete(db, new.api_key.user_id)


def rotated_without_grace(db: TenantSession, new: NewApiKey) -> None:
    ApiKeyRepository.rotate(db, new.api_key.id, grace=timedelta())


@pytest.mark.parametrize(
    "end", [revoked, expired, inactive, deleted, without_user, rotated_without_grace]
)
def test_a_key_that_ended(
    db: TenantSession,
    elsewhere: TenantSession,
    new: NewApiKey,
    end: Callable[[TenantSession, NewApiKey], None],
) -> None:
    end(db, new)
    refused(db, new.secret)
    held = UserRepository.create(elsewhere)
    refused(elsewhere, new.secret)
    assert held in elsewhere
    assert list(elsewhere) == [held]


def test_a_key_of_another_tenant(db: TenantSession, other: TenantSession, new: NewApiKey) -> None:
    refused(db, new.secret.replace(tenant_of(db), tenant_of(other)))
    # The same id and user id in another tenant change nothing.
    twin = UserRepository.create(other, id=new.api_key.user_id, is_active=False)
    refused(db, ApiKeyRepository.create(other, twin.id, id=new.api_key.id).secret)
    assert ApiKeyRepository.authenticate(db, new.secret).tenant_id == tenant_of(db)


RANDOM = st.from_regex(r"[A-Za-z0-9_-]{42,44}", fullmatch=True)
keys = st.one_of(
    st.text(st.characters()),
    st.text("dbk_default\x00\ud800é-", max_size=80),
    st.binary(),
    st.builds("dbk_{}_{}".format, st.text(max_size=70), RANDOM),
    st.builds("dbk_{}_{}".format, st.from_regex(r"[A-Za-z0-9_.:@-]{1,66}", fullmatch=True), RANDOM),
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.uuids(),
    st.lists(st.text()) | st.dictionaries(st.text(), st.text()),
    st.builds(object) | st.builds(SecretStr, st.text()),
)


@given(key=keys)
@example(key="x" * 10_000_000)
@example(key=f"dbk_{'a' * 10_000_000}_{'b' * 43}")
@example(key=f"dbk_default_{'b' * 43}\n")
@example(key=f"dbk_default_{'٣' * 43}")
@example(key=f"dbk_{'a' * 64}_{'_' * 43}")
@example(key=b"dbk_default_" + b"b" * 43)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_other_object_is_a_key(db: TenantSession, key: object) -> None:
    refused(db, key)


def test_each_change_of_a_key_makes_it_another(db: TenantSession, new: NewApiKey) -> None:
    key = new.secret
    for place, character in enumerate(key):
        refused(db, f"{key[:place]}{'B' if character == 'A' else 'A'}{key[place + 1 :]}")
    for changed in (key[1:], key[:-1], f" {key}", f"{key}\n", key.upper(), f"{key}\x00", key * 2):
        refused(db, changed)


@pytest.mark.parametrize(
    "name", ["a", "Z9", "a_b_", "x_" + "A" * 43, "a.b:c@d-e", "_".join("a" * 32)]
)
def test_every_tenant_fits_into_a_key(name: str) -> None:
    tenant = f"{name}{uuid4().hex}"[:64]
    with SessionLocal(tenant_id=tenant) as db:
        user = UserRepository.create(db)
        made = ApiKeyRepository.create_many(db, [{"user_id": user.id}] * 8)
    prefixes = {new.api_key.prefix for new in made}
    assert len(prefixes) == 8
    assert max(map(len, prefixes)) <= 32
    with SessionLocal() as db:
        assert ApiKeyRepository.authenticate(db, made[0].secret).id == user.id
        assert tenant_of(db) == tenant


# What it costs, and when a use is noted


def last_used(db: TenantSession, id_: UUID) -> datetime | None:
    return ApiKeyRepository.require(db, id_).last_used_at


def test_a_use_is_noted_once_a_minute(
    db: TenantSession, elsewhere: TenantSession, new: NewApiKey
) -> None:
    for expected in (2, 1, 1):
        with counted_round_trips() as trips, counted_statements() as statements:
            ApiKeyRepository.authenticate(elsewhere, new.secret)
        assert (trips.count, len(statements)) == (expected, expected)
    noted = last_used(db, new.api_key.id)
    assert noted is not None
    ApiKeyRepository.update(db, new.api_key.id, last_used_at=noted - timedelta(seconds=61))
    with counted_statements() as statements:
        ApiKeyRepository.authenticate(elsewhere, new.secret)
    assert len(statements) == 2
    assert (last_used(db, new.api_key.id) or noted) > noted
    with counted_statements() as statements:
        refused(elsewhere, new.secret + "!")
    assert statements == []
    with counted_statements() as statements:
        refused(elsewhere, f"dbk_default_{'x' * 43}")
    assert len(statements) == 1


def wait_for_a_blocked_backend() -> None:
    deadline = time.monotonic() + 30
    query = text(
        "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE NOT granted AND datname = current_database()"
    )
    with get_engine().execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        while not connection.scalar(query):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_of_concurrent_uses_one_is_noted(
    db: TenantSession, elsewhere: TenantSession, new: NewApiKey
) -> None:
    noted = now() - timedelta(seconds=1)
    with ThreadPoolExecutor(1) as pool:
        with transaction(db):
            ApiKeyRepository.update(db, new.api_key.id, last_used_at=noted)
            late = pool.submit(ApiKeyRepository.authenticate, elsewhere, new.secret)
            wait_for_a_blocked_backend()
        assert late.result().id == new.api_key.user_id
    assert last_used(db, new.api_key.id) == noted


def test_a_use_that_cannot_be_noted_is_not_hidden(
    db: TenantSession, new: NewApiKey, user: User, worker_url: str
) -> None:
    fresh = ApiKeyRepository.create(db, user.id)
    ApiKeyRepository.authenticate(db, fresh.secret)
    database.configure(url=f"{worker_url}&options=-c%20default_transaction_read_only%3Don")
    with SessionLocal() as reading:
        with pytest.raises(DBAPIError, match="read-only"):
            ApiKeyRepository.authenticate(reading, new.secret)
        assert tenant_of(reading) == "default"
        assert idle(reading)
        assert ApiKeyRepository.authenticate(reading, fresh.secret).id == user.id


# Revoked


def test_revoke(db: TenantSession, new: NewApiKey) -> None:
    assert ApiKeyRepository.revoke(db, str(new.api_key.id)) is True
    first = new.api_key.to_dict()
    assert first["revoked_at"] == first["updated_at"]
    assert ApiKeyRepository.revoke(db, new.api_key.id) is True
    assert new.api_key.to_dict() == first
    assert ApiKeyRepository.revoke(db, uuid4()) is False
    with pytest.raises(InvalidValueError, match="id: must be a UUID"):
        ApiKeyRepository.revoke(db, "x")
    assert idle(db)
    with counted_round_trips() as trips:
        ApiKeyRepository.revoke(db, new.api_key.id)
    assert trips.count == 1


def test_list(db: TenantSession, user: User, new: NewApiKey) -> None:
    another = UserRepository.create(db)
    ApiKeyRepository.create(db, another.id)
    assert ApiKeyRepository.list(db, user_id=user.id).items == [new.api_key]


def test_another_tenant_sees_no_key(
    db: TenantSession, other: TenantSession, user: User, new: NewApiKey
) -> None:
    before = new.api_key.to_dict()
    for call in (
        lambda: ApiKeyRepository.rotate(other, new.api_key.id, grace=HOUR),
        lambda: ApiKeyRepository.update(other, new.api_key.id, name="x"),
        lambda: ApiKeyRepository.require(other, new.api_key.id),
        lambda: ApiKeyRepository.create(other, user.id),
    ):
        with pytest.raises(NotFoundError):
            call()
    assert ApiKeyRepository.revoke(other, new.api_key.id) is False
    assert ApiKeyRepository.delete(other, new.api_key.id) is False
    assert ApiKeyRepository.list(other, user_id=user.id).items == []
    assert ApiKeyRepository.count(db) == 1
    assert ApiKeyRepository.require(db, new.api_key.id).to_dict() == before


# Rotated


def test_rotate(db: TenantSession, user: User) -> None:
    expires_at = now() + 24 * HOUR
    old = ApiKeyRepository.create(db, user.id, name="ci", expires_at=expires_at)
    start = now()
    new = ApiKeyRepository.rotate(db, old.api_key.id, grace=HOUR)
    assert (new.api_key.user_id, new.api_key.name) == (user.id, "ci")
    assert new.api_key.expires_at == expires_at
    assert new.api_key.revoked_at is None
    end = old.api_key.expires_at
    assert end is not None
    assert start + HOUR <= end <= now() + HOUR
    assert ApiKeyRepository.authenticate(db, old.secret) is user
    assert ApiKeyRepository.authenticate(db, new.secret) is user
    # A later expiry does not undo it, nor does it wait when revoked.
    ApiKeyRepository.update(db, old.api_key.id, expires_at=expires_at)
    assert old.api_key.revoked_at == end
    assert ApiKeyRepository.revoke(db, old.api_key.id)
    assert old.api_key.revoked_at < end
    refused(db, old.secret)
    assert ApiKeyRepository.authenticate(db, new.secret) is user


def test_a_grace_beyond_the_expiry(db: TenantSession, user: User) -> None:
    expires_at = now() + HOUR
    old = ApiKeyRepository.create(db, user.id, expires_at=expires_at)
    new = ApiKeyRepository.rotate(db, old.api_key.id, grace=2 * HOUR)
    assert (old.api_key.expires_at, new.api_key.expires_at) == (expires_at, expires_at)
    forever = ApiKeyRepository.create(db, user.id)
    new = ApiKeyRepository.rotate(db, forever.api_key.id, grace=HOUR)
    assert new.api_key.expires_at is None
    assert forever.api_key.expires_at is not None


@pytest.mark.parametrize(
    "end",
    [
        revoked,
        expired,
        rotated_without_grace,
        lambda db, new: ApiKeyRepository.rotate(db, new.api_key.id, grace=HOUR),
    ],
)
def test_only_a_key_that_counts_is_rotated(
    db: TenantSession, new: NewApiKey, end: Callable[[TenantSession, NewApiKey], None]
) -> None:
    end(db, new)
    count, before = ApiKeyRepository.count(db), new.api_key.to_dict()
    with pytest.raises(ConflictError):
        ApiKeyRepository.rotate(db, new.api_key.id, grace=HOUR)
    assert idle(db)
    assert ApiKeyRepository.count(db) == count
    assert ApiKeyRepository.require(db, before["id"]).to_dict() == before


@pytest.mark.parametrize("grace", [timedelta(microseconds=-1), timedelta.max, 5, None, "1h"])
def test_grace(db: TenantSession, new: NewApiKey, grace: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        ApiKeyRepository.rotate(db, new.api_key.id, grace=grace)
    assert caught.value.field == "grace"
    assert ApiKeyRepository.count(db) == 1
    with pytest.raises(NotFoundError):
        ApiKeyRepository.rotate(db, uuid4(), grace=HOUR)
    assert idle(db)


def test_of_concurrent_rotations_one_succeeds(
    db: TenantSession, new: NewApiKey, tenant: str
) -> None:
    ready = threading.Barrier(8)

    def rotate() -> NewApiKey | type[DatabaseError]:
        with SessionLocal(tenant_id=tenant) as session:
            ready.wait()
            try:
                return ApiKeyRepository.rotate(session, new.api_key.id, grace=HOUR)
            except DatabaseError as error:
                return type(error)

    with ThreadPoolExecutor(8) as pool:
        done = [call.result() for call in [pool.submit(rotate) for _ in range(8)]]
    made = [one for one in done if isinstance(one, NewApiKey)]
    assert len(made) == 1
    assert done.count(ConflictError) == 7
    assert made[0].api_key.expires_at is None
    assert ApiKeyRepository.count(db) == 2


def test_a_rotation_that_fails_changes_nothing(db: TenantSession, new: NewApiKey) -> None:
    before = new.api_key.to_dict()
    with pytest.raises(ZeroDivisionError), transaction(db):
        ApiKeyRepository.rotate(db, new.api_key.id, grace=HOUR)
        raise ZeroDivisionError
    assert ApiKeyRepository.require(db, new.api_key.id).to_dict() == before
    assert ApiKeyRepository.count(db) == 1


# The development key


@pytest.fixture
def development(worker_url: str, tenant: str) -> Iterator[TenantSession]:
    """A session of some tenant, where a development key of the default tenant is set."""
    database.configure(url=worker_url, tenant_id=tenant, development_api_key=DEVELOPMENT_KEY)
    with SessionLocal(tenant_id=f"other-{tenant}") as session:
        yield session


def test_the_development_key_is_one_user(
    development: TenantSession, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    user = ApiKeyRepository.authenticate(development, DEVELOPMENT_KEY)
    assert (user.tenant_id, tenant_of(development)) == (tenant, tenant)
    assert UserRepository.get_by_identity(development, "development", "development") is user
    assert ApiKeyRepository.authenticate(development, DEVELOPMENT_KEY) is user
    assert UserRepository.count(development) == 1
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [w.getMessage() for w in warnings] == ["the development API key was used"] * 2
    assert idle(development)


def test_the_development_key_is_no_wildcard(
    development: TenantSession, caplog: pytest.LogCaptureFixture
) -> None:
    for key in ("", " ", "*", DEVELOPMENT_KEY[:-1], DEVELOPMENT_KEY + " ", DEVELOPMENT_KEY.upper()):
        refused(development, key)
    for other in (DEVELOPMENT_KEY.encode(), SecretStr(DEVELOPMENT_KEY), None):
        refused(development, other)
    assert caplog.records == []
    assert UserRepository.count(development) == 0
    with transaction(development):
        UserRepository.count(development)
        with pytest.raises(ConfigurationError, match="within a transaction"):
            ApiKeyRepository.authenticate(development, DEVELOPMENT_KEY)


def test_an_inactive_development_user(development: TenantSession, tenant: str) -> None:
    with SessionLocal() as db:
        user = UserRepository.get_or_create_by_identity(db, "development", "development")
        UserRepository.update(db, user.id, is_active=False)
    refused(development, DEVELOPMENT_KEY)


def test_without_a_development_key_nothing_is_one(db: TenantSession) -> None:
    for key in ("", DEVELOPMENT_KEY, "None", None):
        refused(db, key)


@pytest.mark.parametrize("key", ["", "x" * 15])
def test_a_short_development_key_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("DATABASE_DEVELOPMENT_API_KEY", key)
    with pytest.raises(ConfigurationError, match=r"DATABASE_DEVELOPMENT_API_KEY: .* 16 ") as caught:
        database.configure()
    assert "xxx" not in str(caught.value)


def test_production_has_no_development_key(
    monkeypatch: pytest.MonkeyPatch, worker_url: str
) -> None:
    refusal = "^DATABASE_DEVELOPMENT_API_KEY: must not be set in production$"
    for make in (database.configure, Settings):
        with pytest.raises(ConfigurationError, match=refusal):
            make(environment="production", url=worker_url, development_api_key=DEVELOPMENT_KEY)
    monkeypatch.setenv("DATABASE_DEVELOPMENT_API_KEY", DEVELOPMENT_KEY)
    monkeypatch.setenv("DATABASE_ENVIRONMENT", "production")
    with pytest.raises(ConfigurationError, match=refusal):
        database.configure(url=worker_url)
    monkeypatch.setenv("DATABASE_ENVIRONMENT", "test")
    changed = database.configure(url=worker_url).model_copy(update={"environment": "production"})
    engine = create_database_engine(worker_url, changed)
    with TenantSession(engine) as db, pytest.raises(AuthenticationError):
        ApiKeyRepository.authenticate(db, DEVELOPMENT_KEY)
    engine.dispose()


def test_a_hash_that_is_stored_is_no_key(db: TenantSession, new: NewApiKey) -> None:
    refused(db, new.api_key.key_hash)
    refused(db, new.api_key.key_hash.hex())
    with transaction(db):
        db.execute(update(ApiKey).values(key_hash=sha256(b"").digest()))
    refused(db, "")
