"""Bad input: refused by the field's name, nothing written, and no value shown to anybody."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Column,
    Enum,
    Float,
    Integer,
    LargeBinary,
    String,
    Uuid,
    func,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import Boolean

import database
from database import (
    AlreadyExistsError,
    ApiKeyRepository,
    ContextRepository,
    ConversationRepository,
    DatabaseError,
    IdentityRepository,
    InvalidReferenceError,
    InvalidValueError,
    MemoryRepository,
    MessageRepository,
    ModuleRepository,
    PersonaRepository,
    SessionLocal,
    StateRepository,
    TenantSession,
    UserRepository,
)
from database.types import Timestamp, Vector, clean_text
from tests import factories
from tests.factories import fields_of
from tests.test_conformance import CASES, Case, idle, tenant_of

MARKER = "s3cr3t-marker"
UNSTORABLE = ["\x00", "\ud800", "a\x00b\udfffc", "\udc00\ud800"]
NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001
HALF_A_DAY = timedelta(hours=12)
TOO_EARLY = datetime(1, 1, 1, tzinfo=timezone(HALF_A_DAY))
TOO_LATE = datetime(9999, 12, 31, 23, tzinfo=timezone(-HALF_A_DAY))
NAN, INFINITY = float("nan"), float("inf")
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]

# What a column of a type never holds; the first type that fits counts.
WRONG: dict[type, list[Any]] = {
    Enum: ["nonsense", "", "USER ", 5],
    String: [5, b"x", ["x"], uuid4()],
    Timestamp: [NAIVE, TOO_EARLY, TOO_LATE, "2026-01-01", 5, "x"],
    BigInteger: ["5", 1.5, True, 2**63, -(2**63) - 1],
    Integer: ["5", 1.5, True, 2**31, -(2**31) - 1],
    Boolean: ["yes", 5, []],
    Float: ["0.5", True, NAN, INFINITY, []],
    Uuid: ["x", 5, MARKER],
    JSONB: [object(), {1: 2}, [{2: 1}], {1, 2}, b"x", 2**64, -(2**63) - 1, {"a": 10**99}, DEEP],
    LargeBinary: ["text", 5, [1]],
    Vector: ["abc", 5, ["1"], [NAN] * 1536, [INFINITY] * 1536, [10**400], [], [1.0] * 3, [[1.0]]],
}
ROW_COUNTS = select(
    *(select(func.count()).select_from(case.repository.model).scalar_subquery() for case in CASES)
)
CASE = {case.repository: case for case in CASES}
COLUMNS = [
    (case, column)
    for case in CASES
    for column in case.repository.model.__table__.columns
    if column.name != "tenant_id"
]
TEXTS = [
    pair
    for pair in COLUMNS
    if isinstance(pair[1].type, String)
    and not isinstance(pair[1].type, Enum)
    and pair[1].name not in ("loop_frequency", "prefix")
    and pair[0].repository.model.__name__ + pair[1].name != "Modulename"
]


def label(value: object) -> str | None:
    if isinstance(value, Column):
        return str(value.name)
    return value.repository.model.__name__ if isinstance(value, Case) else None


KNOW_THREADS = (MessageRepository, MemoryRepository)
"""Their conversation_id may be a thread_id, and stays what it is."""

each_column = pytest.mark.parametrize(("case", "column"), COLUMNS, ids=label)


@contextmanager
def refused(
    db: TenantSession, name: str, error: type[DatabaseError] = InvalidValueError
) -> Iterator[None]:
    """Expect an error that names a field or key, shows no value, and leaves nothing behind."""
    before = row_counts(db)
    with pytest.raises(error) as caught:
        yield
    assert name in (getattr(caught.value, "field", ""), getattr(caught.value, "key", ""))
    assert str(caught.value).startswith(f"{name}: ")
    assert MARKER not in shown(caught.value)
    assert idle(db)
    assert row_counts(db) == before


def shown(error: BaseException) -> str:
    """All texts of an error and of those it came from; its traceback quotes only source."""
    texts = [repr(error), *traceback.format_exception_only(error)]
    if error.__cause__ is not None:
        texts.append(shown(error.__cause__))
    if error.__context__ is not None and not error.__suppress_context__:
        texts.append(shown(error.__context__))
    return "".join(texts)


def row_counts(db: TenantSession) -> list[int]:
    with SessionLocal(tenant_id=tenant_of(db)) as session:
        return list(session.execute(ROW_COUNTS).one())


@contextmanager
def strict(db: TenantSession, url: str) -> Iterator[TenantSession]:
    database.configure(url=url, unstorable="error")
    with SessionLocal(tenant_id=tenant_of(db)) as session:
        yield session


def update(case: Case, db: TenantSession, id_: Any, name: str, value: Any) -> None:
    """Update a field; the thread_id is what an update finds a conversation by."""
    if name == "thread_id":
        raise InvalidValueError(name, "cannot be changed")
    case.repository.update(db, id_, **{name: value})


@each_column
def test_wrong_value(case: Case, column: Column[Any], db: TenantSession) -> None:
    fields = fields_of(case.factory, db)
    made = case.factory(db=db).id
    values = next(values for kind, values in WRONG.items() if isinstance(column.type, kind))
    length = getattr(column.type, "length", None)
    if case.repository in KNOW_THREADS and column.name == "conversation_id":
        values = [value for value in values if not isinstance(value, str)]  # They are thread_ids.
    for value in [*values, *(["x" * (length + 1)] if length else [])]:
        with refused(db, column.name):
            case.repository.create(db, **fields | {column.name: value})
        with refused(db, column.name):
            case.repository.create_many(db, [fields, fields | {column.name: value}])
        with refused(db, column.name):
            update(case, db, made, column.name, value)
    case.repository.create(db, **fields)


@each_column
def test_none(case: Case, column: Column[Any], db: TenantSession) -> None:
    made = case.factory(db=db).id
    json = isinstance(column.type, JSONB) and column.server_default is None  # None is JSON's null
    managed = (case.repository, column.name) in (
        (MessageRepository, "parent_id"),
        (ApiKeyRepository, "revoked_at"),
        (ConversationRepository, "head_id"),
        (ConversationRepository, "forked_at_id"),
    )
    if (column.nullable or json) and not managed:
        found = case.factory(db=db, **{column.name: None})
        assert found.to_dict().get(column.name) is None
        assert case.repository.update(db, made, **{column.name: None}).id == made
        return
    with refused(db, column.name):
        update(case, db, made, column.name, None)
    # For these None means the default.
    if column.name not in ("id", "thread_id", "created_at", "updated_at"):
        fields = fields_of(case.factory, db)
        with refused(db, column.name):
            case.repository.create(db, **fields | {column.name: None})


@pytest.mark.parametrize("case", CASES, ids=label)
def test_fields_unknown_or_missing(case: Case, db: TenantSession) -> None:
    fields = fields_of(case.factory, db)
    made = case.factory(db=db).id
    for name in ("colour", "tenant_id", "metadata_", "registry", "__table__"):
        with refused(db, name):
            case.repository.create(db, **fields | {name: MARKER})
        with refused(db, name):
            update(case, db, made, name, MARKER)
        with refused(db, name):
            case.repository.count(db, **{name: MARKER})
    for column in case.repository.model.__table__.columns:
        optional = column.nullable or column.server_default is not None or column.name == "id"
        if column.name in fields and not optional:
            with refused(db, column.name):
                case.repository.create(db, **{k: v for k, v in fields.items() if k != column.name})


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("value", [MARKER, 5, None, b"x", ""])
def test_what_is_no_id(case: Case, value: Any, db: TenantSession) -> None:
    for call in (case.repository.get, case.repository.exists, case.repository.require):
        with refused(db, "id"):
            call(db, value)


@pytest.mark.parametrize(("case", "column"), TEXTS, ids=label)
def test_unstorable_text(
    case: Case, column: Column[Any], db: TenantSession, worker_url: str
) -> None:
    end = "@x" if column.name == "email" else ""
    for value in UNSTORABLE:
        made = case.factory(db=db, **{column.name: value + end})
        clean = "".join("\ufffd" if c == "\x00" or "\ud800" <= c <= "\udfff" else c for c in value)
        assert made.to_dict()[column.name] == clean + end
        db.expunge_all()
        assert case.repository.require(db, made.id).to_dict()[column.name] == clean + end
        case.repository.delete(db, made.id)
    fields = fields_of(case.factory, db)
    made = case.factory(db=db)
    with strict(db, worker_url) as session:
        for value in UNSTORABLE:
            with refused(session, column.name):
                case.repository.create(session, **fields | {column.name: value + end})
            with refused(session, column.name):
                update(case, session, made.id, column.name, value + end)
        case.repository.create(session, **fields)


@pytest.mark.parametrize(
    ("case", "column"), [pair for pair in COLUMNS if isinstance(pair[1].type, JSONB)], ids=label
)
def test_unstorable_json(
    case: Case, column: Column[Any], db: TenantSession, worker_url: str
) -> None:
    kept = ["\\u0000", "\\\\u0000", "\x01é😀", 2**64 - 1, -(2**63), 1.5, None, True]
    bad = {
        "a\x00": ["\ud800", {"b\udfff": "\x00"}],
        "n": [NAN, INFINITY, {"x": -INFINITY}],
        "kept": kept,
    }
    clean = {"a\ufffd": ["\ufffd", {"b\ufffd": "\ufffd"}], "n": [None, None, {"x": None}]}
    fields = fields_of(case.factory, db)
    made = case.factory(db=db, **{column.name: bad})
    assert made.to_dict()[column.name] == clean | {"kept": kept}
    db.expunge_all()
    found = case.repository.require(db, made.id)
    assert found.to_dict()[column.name] == clean | {"kept": kept}
    with strict(db, worker_url) as session:
        for value in ("\x00", "\ud800", NAN, -INFINITY, (NAN,), {"\x00": 1}, {"\ud800": 1}):
            for held in ({"a": value}, {"a": [{"b": value}]}):
                with refused(session, column.name):
                    case.repository.create(session, **fields | {column.name: held})
                with refused(session, column.name):
                    update(case, session, made.id, column.name, held)
        case.repository.create(session, **fields | {column.name: {"kept": kept}})


TENANTS: list[Any] = ["", " ", "a b", "-a", "a" * 65, "a'b", "a\n", "a\x00", "\ud800", "é", 5, b"a"]


@pytest.mark.parametrize("tenant_id", TENANTS)
def test_tenant_name(tenant_id: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        SessionLocal(tenant_id=tenant_id)
    assert caught.value.field == "tenant_id"


EMAILS = ["", "@", "a@", "@b", "a", "a b@c", "a@b c", "a@b@c", "a@" + "b" * 254]
FREQUENCIES = ["", "0", "0.0", "-1", "1.", ".5", "1e3", " 1", "1\n", "x", "\u0661"]
RULES: list[tuple[Any, str, list[Any]]] = [
    (UserRepository, "email", EMAILS),
    (IdentityRepository, "provider", ["", "x" * 65]),
    (IdentityRepository, "subject", ["", "x" * 256]),
    (ConversationRepository, "thread_id", ["", "x" * 256]),
    (ConversationRepository, "title", ["x" * 501]),
    (MessageRepository, "role", ["", "owner", "User", "user ", None]),
    (MessageRepository, "input_tokens", [-1]),
    (MessageRepository, "output_tokens", [-1]),
    (MessageRepository, "idempotency_key", ["", "x" * 256]),
    (ContextRepository, "context_type", ["", "x" * 65]),
    (PersonaRepository, "name", ["", "x" * 256]),
    (PersonaRepository, "loop_frequency", FREQUENCIES),
    # A frequency belongs to an autonomous persona.
    (PersonaRepository, "loop_frequency", ["1.5"]),
    (ModuleRepository, "name", ["", "A", "1a", "a-b", "a b", "a" * 51, "a\n", "é", "a\x00"]),
    (StateRepository, "state_key", ["", "x" * 256]),
    (StateRepository, "version", [0, -1]),
    (MemoryRepository, "importance", [-0.01, 1.01]),
    (MemoryRepository, "sequence", [0, -1]),
    (MemoryRepository, "access_count", [-1]),
    (MemoryRepository, "message_count", [-1]),
]


@pytest.mark.parametrize(("repository", "field", "values"), RULES)
def test_rule(repository: Any, field: str, values: list[Any], db: TenantSession) -> None:
    case = CASE[repository]
    more = {"mode": "autonomous"} if values is FREQUENCIES else {}
    made = case.factory(db=db, **more)
    fields = fields_of(case.factory, db, **more)
    for value in values:
        with refused(db, field):
            case.repository.create(db, **fields | {field: value})
        with refused(db, field):
            update(case, db, made.id, field, value)
    assert case.repository.require(db, made.id).to_dict() == made.to_dict()


def test_values_at_the_edge(db: TenantSession) -> None:
    factories.ModuleFactory(db=db, name="a" * 50)
    factories.UserFactory(db=db, email="é@b")
    factories.ConversationFactory(db=db, thread_id="😀" * 255, title="😀" * 500)
    factories.MessageFactory(db=db, content="", input_tokens=0, output_tokens=2**31 - 1)
    for frequency in ("1", "0.5", "00.10", "10"):
        factories.PersonaFactory(db=db, mode="autonomous", loop_frequency=frequency)
    for vector in ([0.5] * 1536, (1,) * 1536, None):
        assert factories.MemoryFactory(db=db, importance=1, embedding=vector).importance == 1.0


REFERENCES = [
    (case, column.name)
    for case, column in COLUMNS
    if column.foreign_keys and column.name not in ("id", "parent_id", "head_id", "forked_at_id")
]


@pytest.mark.parametrize(("case", "field"), REFERENCES, ids=label)
def test_reference(case: Case, field: str, db: TenantSession, other: TenantSession) -> None:
    target = next(iter(case.repository.model.__table__.columns[field].foreign_keys)).column.table
    owner = next(c for c in CASES if c.repository.model.__table__ is target)
    foreign = owner.factory(db=other).id
    fields = fields_of(case.factory, db)
    made = case.factory(db=db).id
    for value in (foreign, uuid4(), str(uuid4())):
        with refused(db, field, InvalidReferenceError):
            case.repository.create(db, **fields | {field: value})
        if case.repository not in KNOW_THREADS or field != "conversation_id":
            with refused(db, field, InvalidReferenceError):
                update(case, db, made, field, value)


CONTEXT_KEY = "user_id, context_type, source_identifier"
STATE_KEY = "conversation_id, persona_id, module_id, execution_stage, state_key"
KEYS: list[tuple[Any, str, dict[str, Any]]] = [
    (UserRepository, "email", {"email": f"{MARKER}@b.c"}),
    (IdentityRepository, "provider, subject", {"provider": MARKER, "subject": MARKER}),
    (ConversationRepository, "thread_id", {"thread_id": MARKER}),
    (ContextRepository, CONTEXT_KEY, {"source_identifier": MARKER}),
    (PersonaRepository, "name", {"name": MARKER}),
    (ModuleRepository, "name", {"name": "a"}),
    (StateRepository, STATE_KEY, {"state_key": MARKER}),
    (MemoryRepository, "conversation_id, sequence", {"sequence": 7}),
]


@pytest.mark.parametrize(("repository", "name", "key"), KEYS)
def test_key_that_is_taken(
    repository: Any, name: str, key: dict[str, Any], db: TenantSession
) -> None:
    case = CASE[repository]
    first = case.factory(db=db, **key).to_dict()
    owners = {k: first[k] for k in ("user_id", "conversation_id") if k in name}
    fields = fields_of(case.factory, db, **owners)
    made = case.factory(db=db, **owners).id
    with refused(db, name, AlreadyExistsError):
        case.repository.create(db, **fields | key)
    with refused(db, name, AlreadyExistsError):
        case.repository.create_many(db, [fields, fields | key])
    if repository not in (ConversationRepository, MemoryRepository):
        with refused(db, name, AlreadyExistsError):
            case.repository.update(db, made, **key)


STATEMENTS = [
    "INSERT INTO users (id, email) VALUES (gen_random_uuid(), :marker)",
    "INSERT INTO users (id, username) SELECT gen_random_uuid(), repeat(:marker, 30)",
    "INSERT INTO users (id, email) SELECT gen_random_uuid(), email FROM users",
    "INSERT INTO api_keys (id, user_id, name) VALUES (gen_random_uuid(), :marker, 'x')",
    "SELECT CAST(:marker AS integer)",
    "SELECT CAST(:marker AS jsonb)",
    "SELECT CAST(:marker AS timestamptz)",
    "SELECT jsonb_path_query('{}', CAST(:marker AS jsonpath))",
    "SELECT to_tsquery(:marker || ' & (')",
    "UPDATE users SET id = NULL WHERE username = :marker",
    "SELECT nothing FROM nowhere WHERE :marker = ''",
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_driver_errors_show_no_values(statement: str, db: TenantSession) -> None:
    UserRepository.create(db, username=MARKER, email=f"{MARKER}@b.c")
    with pytest.raises((DatabaseError, DBAPIError)) as caught:
        db.execute(text(statement), {"marker": MARKER} if ":marker" in statement else {})
    db.rollback()
    assert MARKER not in shown(caught.value)
    assert MARKER not in "".join(traceback.format_exception(caught.value))
    assert UserRepository.count(db) == 1


SQL = ["'; DROP TABLE users; --", "' OR '1'='1", "%s", "%(tenant)s", ":tenant", "\\", "$1", "{}"]
QUERIES: dict[str, Callable[[TenantSession, str], Any]] = {
    "get_by_email": UserRepository.get_by_email,
    "get_by_identity": lambda db, s: UserRepository.get_by_identity(db, s, s),
    "get_by_subject": lambda db, s: IdentityRepository.get_by_subject(db, s, s),
    "unlink": lambda db, s: IdentityRepository.unlink(db, s, s),
    "get_by_thread_id": ConversationRepository.get_by_thread_id,
    "get_by_user_email": ConversationRepository.get_by_user_email,
    "count_by_user": ConversationRepository.count_by_user,
    "delete": ConversationRepository.delete,
    "history": MessageRepository.history,
    "window": lambda db, s: MessageRepository.window(db, s, 1, 9),
    "deactivate": MessageRepository.deactivate,
    "purge": MessageRepository.purge,
    "iterate": lambda db, s: list(MessageRepository.iterate(db, s)),
    "users": lambda db, s: UserRepository.list(db, username=s).items,
    "conversations": lambda db, s: ConversationRepository.list(db, last_message=s).items,
    "messages": lambda db, s: MessageRepository.count(db, content=s, thinking=s),
    "personas": lambda db, s: PersonaRepository.list(db, template=s).items,
    "get_by_name": PersonaRepository.get_by_name,
    "get_all": StateRepository.get_all,
    "latest_for_module": lambda db, s: StateRepository.latest_for_module(db, s, uuid4()),
    "clear": StateRepository.clear,
}
hostile = st.sampled_from(SQL + UNSTORABLE) | st.text("'\";-\\%:$(){}\x00", max_size=9) | st.text()
examples = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("query", QUERIES)
@given(words=hostile)
@examples
def test_text_in_queries_is_data(query: str, words: str, db: TenantSession) -> None:
    if UserRepository.count(db) == 0:
        user = UserRepository.create(db, email="a@b.c", username="name")
        IdentityRepository.create(db, user_id=user.id, provider="p", subject="s")
        thread = ConversationRepository.create(db, "thread", user_id=user.id)
        MessageRepository.append(db, thread.id, role="user", content="c", thinking="t")
    if len(words) <= 255:
        assert not QUERIES[query](db, words)
    assert idle(db)
    assert row_counts(db) == [1, 1, 0, 1, 1, 0, 0, 0, 0, 0]


@given(words=hostile)
@examples
def test_text_in_rows_is_data(words: str, db: TenantSession) -> None:
    clean = clean_text(words)
    thread = ConversationRepository.create(db, f"{uuid4()}{words}"[:255], None, words, words)
    assert (thread.title, thread.last_message) == (clean, clean)
    assert ConversationRepository.get_by_thread_id(db, f"{thread.thread_id}") is thread
    message: dict[str, Any] = {"role": "user", "content": words, "extra_data": {words: [words]}}
    key = f"key {words}"
    first = MessageRepository.append(db, thread.thread_id, **message, idempotency_key=key)
    assert MessageRepository.append(db, thread.id, role="tool", content="", idempotency_key=key)
    MessageRepository.append_many(db, thread.id, [message, {**message, "idempotency_key": key}])
    db.expunge_all()
    found = MessageRepository.history(db, thread.id)
    assert [row.position for row in found] == [1, 2]
    assert found[0].id == first.id
    assert {row.content for row in found} == {clean}
    assert [row.extra_data for row in found] == [{clean: [clean]}] * 2
    assert MessageRepository.count(db, content=words, conversation_id=thread.id) == 2
