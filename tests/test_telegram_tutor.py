"""Everything that the Telegram tutor does: a test for each of its functions, by their names."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic_ai.messages import ModelMessage, ModelRequest, ToolReturnPart, UserPromptPart
from sqlalchemy import text

from database import (
    ConversationRepository,
    DatabaseError,
    InvalidValueError,
    MessageRepository,
    Settings,
    StatsRepository,
    TenantSession,
    UnreadableMessageError,
    UserRepository,
    get_db_session,
)
from database.integrations.opentelemetry import instrument
from database.integrations.pydantic_ai import append_history, clear, load_history
from database.schema import head_revision
from examples.telegram_tutor import ADA, BOB, Sender, Tutor, agent, thread
from tests.cli import answer, record, refusal, run, run_process
from tests.running import in_order, run_example
from tests.test_conformance import idle

LARGEST = 2**63 - 1


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    """The event loop that `run_sync` runs in, and leaves open."""
    made = asyncio.new_event_loop()
    asyncio.set_event_loop(made)
    yield
    asyncio.set_event_loop(None)
    made.close()


@pytest.fixture
def tutor(db: TenantSession) -> Tutor:
    return Tutor(db)


def prompts(history: list[ModelMessage]) -> list[str]:
    parts = [part for message in history for part in message.parts]
    return [str(part.content) for part in parts if isinstance(part, UserPromptPart)]


# The example


def test_the_example_shows_the_same_every_time(fresh_url: str, tmp_path: Path) -> None:
    for _ in range(2):
        done = run_example("telegram_tutor.py", tmp_path, fresh_url)
        assert (done.returncode, done.stderr) == (0, "")
        shown = (
            "Ada: What is Haus?",
            "It means: house. (1 asked so far)",
            "Bob: Feierabend?",
            "It means: the end of a day's work. (1 asked so far)",
            "Ada: And Tisch?",
            "I do not know that word. (2 asked so far)",
            "Telegram ids: [5000000000, 4503599627370495]",
            "12 messages in 2 conversations",
            "Ada's history: 8 messages",
            "Cleared: 8, left: 0",
            "Restored: 8, there: 8",
            "Purged: 8",
        )
        assert in_order(done.stdout, shown)


def test_the_example_ends_with_one_line_if_there_is_no_database(tmp_path: Path) -> None:
    done = run_example("telegram_tutor.py", tmp_path, "postgresql://me@127.0.0.1:1/x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("The demo stopped: DATABASE_URL: no server can be reached")


# Table E


def test_e_add_user_get_user_ids_get_user_by_id(db: TenantSession, tutor: Tutor) -> None:
    """Telegram's numbers are 64 bit; here they are text, and the chat's is beside them."""
    senders: list[Sender] = [
        ADA,
        BOB,
        {"id": LARGEST, "chat_id": -LARGEST, "first_name": "Max", "username": "max"},
    ]
    users = [tutor.add_user(sender) for sender in senders]
    assert set(tutor.telegram_ids()) == {sender["id"] for sender in senders}
    for sender, user in zip(senders, users, strict=True):
        found = UserRepository.get_by_identity(db, "telegram", str(sender["id"]))
        assert found is not None
        assert (found.id, found.first_name) == (user.id, sender["first_name"])
    chats = {i.user_id: i.data["chat_id"] for i in UserRepository.list_identities(db, "telegram")}
    assert chats == {u.id: s["chat_id"] for u, s in zip(users, senders, strict=True)}
    assert UserRepository.get_by_identity(db, "telegram", "1") is None

    renamed = tutor.add_user({**ADA, "first_name": "Augusta", "last_name": "King"})
    assert renamed.id == users[0].id
    assert (renamed.first_name, renamed.last_name) == ("Augusta", "King")
    assert UserRepository.count(db) == 3
    with pytest.raises(InvalidValueError, match="subject"):
        UserRepository.get_or_create_by_identity(db, "telegram", 5)  # type: ignore[arg-type]


def test_e_get_message_history(db: TenantSession, tutor: Tutor) -> None:
    assert tutor.history(ADA) == []
    assert "house" in tutor.answer(ADA, "What is Haus?")
    history = load_history(db, thread(ADA))
    kinds = [[part.part_kind for part in message.parts] for message in history]
    assert kinds == [["user-prompt"], ["tool-call"], ["tool-return"], ["text"]]
    assert tutor.history(BOB) == []
    assert "2 asked" in tutor.answer(ADA, "And Schmetterling?")
    assert prompts(tutor.history(ADA)) == ["What is Haus?", "And Schmetterling?"]
    assert idle(db)


def test_e_update_message_history(db: TenantSession, tutor: Tutor) -> None:
    user = tutor.add_user(ADA)
    chat = ConversationRepository.create(db, thread(ADA), user_id=user.id)
    result = agent.run_sync("Haus?", message_history=load_history(db, chat.id))
    rows = append_history(db, chat.id, result.new_messages())
    assert load_history(db, chat.id, strict=True) == result.all_messages()
    assert [row.role for row in rows] == ["user", "assistant", "tool", "assistant"]
    assert {row.data_format for row in rows} == {"pydantic-ai/1"}
    assert rows[3].model == "tutor-1"


def test_e_clear_user_history(db: TenantSession, tutor: Tutor) -> None:
    for sender in (ADA, BOB):
        tutor.answer(sender, "Haus?")
    before = tutor.history(ADA)
    assert tutor.clear(ADA) == 4
    assert (tutor.history(ADA), len(tutor.history(BOB))) == ([], 4)
    count = text("SELECT count(*) FROM messages")
    assert db.scalar(count) == 8
    db.rollback()
    assert MessageRepository.restore(db, thread(ADA)) == 4
    assert tutor.history(ADA) == before
    clear(db, thread(ADA))
    assert "1 asked" in tutor.answer(ADA, "Feierabend?")
    assert MessageRepository.purge(db, thread(ADA)) == 4
    assert db.scalar(count) == 8
    assert prompts(tutor.history(ADA)) == ["Feierabend?"]


def test_e_a_corrupt_blob_must_not_break_a_history(
    db: TenantSession, tutor: Tutor, caplog: pytest.LogCaptureFixture
) -> None:
    tutor.answer(ADA, "Haus?")
    tutor.answer(ADA, "Feierabend?")
    rows = MessageRepository.history(db, thread(ADA))
    MessageRepository.update(db, rows[0].id, data=b'{"kind": "request", "parts": [{')
    MessageRepository.update(db, rows[1].id, data_format="pydantic-ai/99")
    with caplog.at_level(logging.WARNING):
        history = tutor.history(ADA)
    assert len(history) == 6
    assert [skipped.id for skipped in history.skipped] == [rows[0].id, rows[1].id]
    assert "2 of 8 messages" in caplog.text
    assert "Haus" not in caplog.text
    with pytest.raises(UnreadableMessageError) as raised:
        load_history(db, thread(ADA), strict=True)
    assert isinstance(raised.value, DatabaseError)
    assert raised.value.id == rows[0].id
    # The call of this result cannot be read: the agent goes on all the same.
    first = history[0]
    assert isinstance(first, ModelRequest)
    assert isinstance(first.parts[0], ToolReturnPart)
    assert "butterfly" in tutor.answer(ADA, "Schmetterling?")


@pytest.fixture
def asked(tutor: Tutor) -> Tutor:
    tutor.answer(ADA, "Haus?")
    tutor.answer(ADA, "Schmetterling?")
    tutor.answer(BOB, "Feierabend?")
    return tutor


def known_as(sender: Sender) -> str:
    return f"telegram:{sender['id']}"


def test_e_get_message_stats(db: TenantSession, asked: Tutor) -> None:
    total = asked.stats()
    assert (total.messages, total.users, total.conversations) == (12, 2, 2)
    assert total.input_tokens > total.output_tokens > 0
    by_user = StatsRepository.messages(db, "user")
    assert [(one.messages, one.users) for one in by_user] == [(8, 1), (4, 1)]
    by_role = {one.key: one.messages for one in StatsRepository.messages(db, "role")}
    assert by_role == {"assistant": 6, "user": 3, "tool": 3}
    today = StatsRepository.messages(db, "day")
    assert [one.messages for one in today] == [12]
    assert [one.label for one in StatsRepository.messages(db, "model")] == ["tutor-1", ""]


def test_e_script_list_users(db: TenantSession, asked: Tutor) -> None:
    rows = answer(db, "users", "list")
    assert sorted(row["identities"] for row in rows) == [[known_as(BOB)], [known_as(ADA)]]
    assert {row["first_name"] for row in rows} == {"Ada", "Bob"}


def test_e_script_delete_user(db: TenantSession, asked: Tutor) -> None:
    assert "--yes" in refusal(db, "users", "delete", known_as(ADA))
    record(db, "users", "delete", known_as(ADA), "--yes")
    assert UserRepository.get_by_identity(db, "telegram", str(ADA["id"])) is None
    assert (asked.history(ADA), len(asked.history(BOB))) == ([], 4)


def test_e_script_delete_non_admins(db: TenantSession, asked: Tutor) -> None:
    record(db, "users", "make-admin", known_as(BOB))
    record(db, "users", "delete-non-admins", "--yes")
    assert asked.telegram_ids() == [BOB["id"]]


def test_e_script_delete_chat_history(db: TenantSession, asked: Tutor) -> None:
    record(db, "history", "clear", "--user", known_as(ADA), "--yes")
    assert (asked.history(ADA), len(asked.history(BOB))) == ([], 4)
    record(db, "history", "restore", "--user", known_as(ADA))
    assert len(asked.history(ADA)) == 8


def test_e_script_retrieve_message_history(db: TenantSession, asked: Tutor) -> None:
    shown = answer(db, "history", "show", "--user", known_as(ADA))
    assert [row["role"] for row in shown] == ["user", "assistant", "tool", "assistant"] * 2
    lines = run(db, "history", "export", "--user", known_as(ADA)).stdout.splitlines()
    exported = [json.loads(line) for line in lines]
    assert [row["content"] for row in exported if row["role"] == "user"] == [
        "Haus?",
        "Schmetterling?",
    ]


def test_e_script_message_stats(db: TenantSession, asked: Tutor) -> None:
    shown = answer(db, "stats", "--by", "user")
    assert [row["messages"] for row in shown] == [8, 4]


def test_e_alembic_upgrade_autogenerate_current_history(empty_url: str, tmp_path: Path) -> None:
    """From the package: what a checkout does by Alembic itself is tested with the migrations."""

    def database(*args: str) -> str:
        return run_process(*args, url=empty_url, folder=tmp_path).stdout

    database("upgrade")
    assert head_revision() in database("current")
    assert database("history-of-schema").count("\n") >= 4
    database("check")  # Autogenerate would find nothing to do.
    database("downgrade", "-1", "--yes")
    assert head_revision() in database("current")  # as the one that is needed


def test_e_logging_and_monitoring(
    configured: None, db: TenantSession, tutor: Tutor, caplog: pytest.LogCaptureFixture
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    end = instrument(tracer_provider=provider)
    try:
        with caplog.at_level(logging.DEBUG, "database"):
            tutor.answer(ADA, "Haus?")
    finally:
        end()
    spans = exporter.get_finished_spans()
    assert any("INSERT INTO messages" in str(span.attributes) for span in spans)
    told = caplog.text + "".join(span.to_json() for span in spans)
    assert "Haus" not in told
    assert str(ADA["id"]) not in told


def test_e_postgresql_15_ssl_and_retries(configured: None) -> None:
    """Encryption and repeated tries are settings; a server older than 15 would lack our SQL."""
    given = Settings(sslmode="verify-full", connect_retries=7, _env_file=None)
    assert (given.sslmode, given.connect_retries) == ("verify-full", 7)
    with get_db_session() as db:
        version = db.scalar(text("SELECT current_setting('server_version_num')::int"))
    assert version is not None
    assert version >= 150_000
