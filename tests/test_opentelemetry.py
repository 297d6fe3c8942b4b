"""Spans of statements: one each, and nothing in them of what the statements are about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

import database
from database import (
    ALL_TENANTS,
    AlreadyExistsError,
    ApiKeyRepository,
    ContextRepository,
    ConversationRepository,
    DatabaseError,
    InvalidReferenceError,
    MemoryRepository,
    MessageRepository,
    SessionLocal,
    StateRepository,
    StatsRepository,
    TenantSession,
    TransientError,
    UserRepository,
    get_engine,
    transaction,
)
from database.integrations.opentelemetry import instrument
from tests.counting import counted_round_trips

SECRET = "xyzzy"

Spans = Callable[[], tuple[ReadableSpan, ...]]


@pytest.fixture
def provider() -> TracerProvider:
    return TracerProvider(shutdown_on_exit=False)


@pytest.fixture
def spans(provider: TracerProvider) -> Spans:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter.get_finished_spans


@pytest.fixture
def traced(configured: None, provider: TracerProvider, spans: Spans) -> Iterator[Spans]:
    end = instrument(tracer_provider=provider)
    yield spans
    end()


def test_a_span_for_each_statement(traced: Spans, db: TenantSession) -> None:
    with counted_round_trips() as trips:
        chat = ConversationRepository.create(db).id
        message = MessageRepository.append(db, chat, role="user", content=SECRET)
        MessageRepository.history(db, chat, limit=5)
    assert trips.count == 3, "spans cost no round trip"
    create, append, history = traced()
    assert [span.name for span in (create, append, history)] == ["INSERT", "WITH", "SELECT"]
    url = make_url(get_engine().url)
    assert dict(append.attributes or {}) | {"db.query.text": ""} == {
        "db.system.name": "postgresql",
        "db.namespace": url.database,
        "db.operation.name": "WITH",
        "db.query.text": "",
        "server.address": url.host or url.query["host"],
        **({"server.port": url.port} if url.port else {}),
    }
    statement = str((append.attributes or {})["db.query.text"])
    assert "INSERT INTO messages" in statement
    assert "%(content)s" in statement
    assert append.kind is SpanKind.CLIENT
    assert append.status.status_code is StatusCode.UNSET
    assert (append.end_time or 0) > (append.start_time or 0) > 0
    assert message.content == SECRET


def test_spans_are_children_of_the_present_one(
    traced: Spans, provider: TracerProvider, db: TenantSession
) -> None:
    with provider.get_tracer("app").start_as_current_span("request") as request:
        UserRepository.create(db)
    child, parent = traced()
    assert child.parent is not None
    assert (child.parent.span_id, parent.name) == (request.get_span_context().span_id, "request")


def test_nothing_of_contents_is_in_spans(traced: Spans, db: TenantSession) -> None:
    """Whatever is written and read, also by statements that fail."""
    user = UserRepository.create(db, email=f"{SECRET}@example.com", username=SECRET).id
    key = ApiKeyRepository.create(db, user, name=SECRET)
    chat = ConversationRepository.create(db, user_id=user, thread_id=SECRET, title=SECRET).id
    many = [{"role": "user", "content": f"{SECRET} {n}", "extra_data": {SECRET: 1}} for n in (1, 2)]
    MessageRepository.append_many(db, chat, many)
    MessageRepository.search(db, SECRET)
    MessageRepository.search(db, SECRET, mode="substring", where={SECRET: 1})
    ContextRepository.store(db, user, SECRET, {SECRET: SECRET}, source_identifier=SECRET)
    ContextRepository.search(db, user, SECRET, highlight=("<b>", "</b>"))
    StateRepository.set(db, chat, SECRET, SECRET)
    MemoryRepository.add(db, chat, content=SECRET)
    MemoryRepository.recall(db, text=SECRET)
    StatsRepository.messages(db, "model", model=SECRET)
    UserRepository.update_settings(db, user, {SECRET: SECRET})
    list(MessageRepository.iterate(db, chat))
    ApiKeyRepository.authenticate(db, key.secret)
    list(UserRepository.export(db, user))
    with pytest.raises(AlreadyExistsError):
        UserRepository.create(db, email=f"{SECRET}@example.com")
    with pytest.raises(AlreadyExistsError), transaction(db):
        ConversationRepository.create(db, thread_id=SECRET)
    with pytest.raises(InvalidReferenceError):
        MessageRepository.append(db, uuid4(), role="user", content=SECRET)
    UserRepository.erase(db, user)
    found = traced()
    assert len(found) > 20
    for span in found:
        shown = span.to_json()
        assert SECRET not in shown
        assert key.secret not in shown
        assert span.events == ()


REFUSED = {
    "22P02": text("SELECT CAST(:id AS integer), :secret"),  # invalid input syntax: "..."
    "23514": text("UPDATE messages SET role = :secret WHERE id = CAST(:id AS uuid)"),
}


@pytest.mark.parametrize("state", REFUSED)
def test_what_the_server_quotes_is_not_in_spans(
    traced: Spans, db: TenantSession, state: str
) -> None:
    chat = ConversationRepository.create(db).id
    message = MessageRepository.append(db, chat, role="user", content=SECRET)
    given = {"id": str(message.id), "secret": SECRET}
    # The login role, from which row-level security hides nothing.
    with (
        SessionLocal(tenant_id=ALL_TENANTS) as everywhere,
        pytest.raises(DatabaseError) as caught,
        transaction(everywhere),
    ):
        everywhere.execute(REFUSED[state], given)
    assert isinstance(caught.value.__cause__, DBAPIError)
    said = caught.value.__cause__.orig.diag  # type: ignore[union-attr]
    quoted = f"{said.message_primary} {said.message_detail}"
    assert SECRET in quoted or str(message.id) in quoted, "else this tests nothing"
    (failed,) = (span for span in traced() if span.status.status_code is StatusCode.ERROR)
    assert SECRET not in failed.to_json()
    assert str(message.id) not in failed.to_json()
    assert failed.status.description is None
    attributes = failed.attributes or {}
    assert (attributes["error.type"], attributes["db.response.status_code"]) == (state, state)


def test_failures_end_their_spans(traced: Spans, db: TenantSession) -> None:
    with pytest.raises(ProgrammingError):
        db.execute(text("SELECT no_such_function()"))
    db.rollback()
    with (
        SessionLocal(tenant_id=ALL_TENANTS) as login,
        pytest.raises(DatabaseError),
        transaction(login),
    ):
        login.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    first, second = traced()
    # The server may have gone before it could say why.
    for span, states in ((first, ["42883"]), (second, ["57P01", "OperationalError"])):
        assert span.status.status_code is StatusCode.ERROR
        assert span.end_time
        assert (span.attributes or {})["error.type"] in states
    UserRepository.create(db)
    assert traced()[-1].status.status_code is StatusCode.UNSET


def test_a_failure_to_connect_makes_no_span(traced: Spans) -> None:
    database.configure(
        url="postgresql://me:s3cret@127.0.0.1:1/none", connect_retries=0, connect_timeout=1
    )
    with SessionLocal() as db, pytest.raises(TransientError):
        UserRepository.create(db)
    assert traced() == ()


def test_the_password_is_nowhere(traced: Spans, worker_url: str) -> None:
    url = make_url(worker_url).set(password="s3cret")
    assert url.username
    database.configure(url=url.render_as_string(hide_password=False))
    with SessionLocal() as db:
        UserRepository.count(db)
    (span,) = traced()
    assert "s3cret" not in span.to_json()
    assert url.username not in (span.attributes or {}).values()


def test_engines_made_later_are_traced_until_it_ends(
    provider: TracerProvider, spans: Spans, configured: None, worker_url: str
) -> None:
    end = instrument(tracer_provider=provider)
    try:
        for expected in (1, 2):
            database.configure(url=worker_url)  # the engine is made at the first use
            with SessionLocal() as db:
                UserRepository.count(db)
            assert len(spans()) == expected
    finally:
        end()
    with SessionLocal() as db:
        UserRepository.count(db)
        assert len(spans()) == 2
    end()  # once more does no harm


def test_of_one_engine(provider: TracerProvider, spans: Spans, db: TenantSession) -> None:
    mine = get_engine()
    end = instrument(mine, tracer_provider=provider)
    UserRepository.count(db)
    with SessionLocal(bind=mine.execution_options(logging_token="x")) as optioned:
        UserRepository.count(optioned)
    assert len(spans()) == 2
    end()
    UserRepository.count(db)
    assert len(spans()) == 2


def test_twice_is_still_one_span_each(traced: Spans, db: TenantSession) -> None:
    second, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    second.add_span_processor(SimpleSpanProcessor(exporter))
    end = instrument(tracer_provider=second)
    try:
        UserRepository.count(db)
        assert len(traced()) == 1
        assert exporter.get_finished_spans() == ()
    finally:
        end()
    UserRepository.count(db)
    assert len(traced()) == 2, "the first one goes on"


def test_other_engines_are_not_traced(traced: Spans, worker_url: str) -> None:
    engine = create_engine(make_url(worker_url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    engine.dispose()
    assert traced() == ()


def test_suppression_is_heeded(traced: Spans, db: TenantSession) -> None:
    with suppress_instrumentation():
        UserRepository.count(db)
    assert traced() == ()


def test_without_a_provider_nothing_changes(db: TenantSession) -> None:
    end = instrument()
    try:
        assert UserRepository.count(db) == 0
    finally:
        end()


def test_a_message_of_many_rows_is_one_span(traced: Spans, db: TenantSession) -> None:
    rows: list[dict[str, Any]] = [{"username": f"u{n}"} for n in range(50)]
    UserRepository.create_many(db, rows)
    assert all("u7" not in span.to_json() for span in traced())
