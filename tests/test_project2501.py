"""Everything that Project 2501 does, and nothing of what failed in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import QueuePool, text

import database
from database import (
    Conversation,
    ConversationRepository,
    ExecutionContext,
    InvalidValueError,
    MemoryRepository,
    MemoryStatus,
    Message,
    MessageRepository,
    ModuleRepository,
    ModuleType,
    NotFoundError,
    PersonaMode,
    PersonaRepository,
    SessionLocal,
    StateRepository,
    TenantSession,
    get_db_session,
    get_settings,
    transaction,
)
from examples import persona_chat
from tests.conftest import admin
from tests.counting import Statements, counted_statements
from tests.factories import MemoryFactory, ModuleFactory, PersonaFactory
from tests.running import ROOT, in_order, run_example
from tests.threads import THREADS, in_threads

T = TypeVar("T")

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def chat(db: TenantSession) -> Conversation:
    # Once an engine it is looked whether the dimensions of embeddings fit: that is not counted.
    conversation = ConversationRepository.create(db)
    MemoryRepository.recall(db, embedding=vector(1), conversation_id=conversation.id)
    return conversation


def vector(*numbers: float) -> list[float]:
    return [*numbers, *[0.0] * (get_settings().embedding_dimensions - len(numbers))]


def say(db: TenantSession, chat: Conversation, count: int) -> list[Message]:
    items = [{"role": "user", "content": f"message {number}"} for number in range(1, count + 1)]
    return MessageRepository.append_many(db, chat.id, items)


def checked_out() -> int:
    pool = database.get_engine().pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


@contextmanager
def statements_are(count: int) -> Iterator[Statements]:
    """So many statements are sent, and no connection is held after them."""
    with counted_statements() as statements:
        yield statements
    assert len(statements) == count, statements
    assert checked_out() == 0


# The example

SHOWN = (
    "My dog is called Rufus. Go on.",
    "When does the train leave for Turin? You told me: The train to Turin leaves at noon.",
    "What is my dog called? You told me: My dog is called Rufus.",
    "Who is Babbage? You never told me.",
    "The next prompt",
    "Be brief. Never write @style or ${memories}.",
    "The guest is calm. The talk is of babbage.",
    "- My dog is called Rufus. / We walk along",
    "States",
    "{'topic': 'babbage'}",
    "{'mood': 'calm'}",
    "Memories for: What is my dog called?",
    "1-10",
    "2.50",
    "11-20",
    "MemoryStatus(memories=2, messages=31, covered=20, last_position=20, next_sequence=3)",
)


def test_the_example_shows_the_same_every_time(empty_url: str, tmp_path: Path) -> None:
    outputs = []
    for _ in range(2):
        done = run_example("persona_chat.py", tmp_path, empty_url, columns=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert in_order(done.stdout, SHOWN)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]

    database.configure(url=empty_url)
    with get_db_session(tenant_id=persona_chat.TENANT) as db:
        assert [persona.name for persona in PersonaRepository.list(db)] == ["Clara"]
        assert ModuleRepository.count(db) == len(persona_chat.MODULES)
        assert ConversationRepository.count(db) == 2
        assert MemoryRepository.count(db) == 4


def test_the_example_ends_with_one_line_if_there_is_no_database(tmp_path: Path) -> None:
    done = run_example("persona_chat.py", tmp_path, "postgresql://me:secret-word@127.0.0.1:1/chat")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("The demo stopped: DATABASE_URL: ")
    assert "secret-word" not in line


def test_the_example_recalls_what_its_model_no_longer_sees(db: TenantSession) -> None:
    prompts: list[str] = []

    def model(prompt: str, history: Sequence[Message]) -> str:
        prompts.append(prompt)
        assert len(history) <= persona_chat.SEEN
        return persona_chat.scripted(prompt, history)

    chat = persona_chat.Chat.open(db, model)
    for said in persona_chat.TALK:
        chat.say(said)
    assert "The guest is a stranger. The talk is of nothing yet." in prompts[0]
    assert "- nothing yet" in prompts[0]
    memories = MemoryRepository.recent(db, chat.conversation.id)
    ranges = [(m.sequence, m.first_position, m.last_position, m.message_count) for m in memories]
    assert ranges == [(2, 11, 20, 10), (1, 1, 10, 10)]
    assert chat.say("What is my dog called?") == "You told me: My dog is called Rufus."
    assert "- My dog is called Rufus. / We walk" in prompts[-1]
    db.expunge_all()
    again = MemoryRepository.recent(db, chat.conversation.id)
    assert all(memory.access_count > 0 for memory in again)
    assert chat.compress() is None


# Table D: DatabaseManager


def test_d_test_connection(worker_url: str) -> None:
    found = database.check_connection()
    assert found["status"] == "healthy"
    assert found["message"] == "ok"
    assert found["database"] == database.get_engine().url.database
    assert found["version"][:2].isdecimal()
    assert found["host"]
    assert isinstance(found["port"], int)
    database.configure(url="postgresql://me:secret@127.0.0.1:1/chat", connect_retries=0)
    found = database.check_connection()
    assert (found["status"], found["host"], found["port"]) == ("unhealthy", "127.0.0.1", 1)
    assert "secret" not in str(found)


def test_d_pool_settings(worker_url: str) -> None:
    settings = get_settings()
    assert (settings.pool_size, settings.max_overflow) == (10, 20)
    assert (settings.pool_pre_ping, settings.pool_recycle, settings.echo) == (True, 300, False)
    database.configure(url=worker_url, pool_size=2, max_overflow=1, pool_recycle=60, echo=False)
    pool = database.get_engine().pool
    assert isinstance(pool, QueuePool)
    assert (pool.size(), pool._max_overflow, pool._recycle) == (2, 1, 60)


def test_d_get_session_and_close(tenant: str) -> None:
    with get_db_session(tenant_id=tenant) as db:
        PersonaFactory(db=db, name="Ada")
    with pytest.raises(KeyError), get_db_session(tenant_id=tenant) as db, transaction(db):
        PersonaFactory(db=db, name="Eve")
        raise KeyError
    engine = database.get_engine()
    database.close_db()
    assert database.get_engine() is not engine  # the next session opens anew
    with get_db_session(tenant_id=tenant) as db:
        assert [persona.name for persona in PersonaRepository.list(db)] == ["Ada"]


# Table D: personas and modules


def test_d_persona_crud(db: TenantSession) -> None:
    with statements_are(1):
        made = PersonaRepository.create(db, name="Ada", template="You are Ada.")
    assert (made.mode, made.is_active) == (PersonaMode.REACTIVE, True)
    with statements_are(1):
        PersonaRepository.update(db, made.id, description="Counts", image_path="/ada.png")
    db.expunge_all()
    with statements_are(1):
        found = PersonaRepository.require(db, made.id)
    assert (found.description, found.image_path, found.name) == ("Counts", "/ada.png", "Ada")
    with statements_are(1):
        assert PersonaRepository.delete(db, made.id)
    assert PersonaRepository.get(db, made.id) is None


def test_d_persona_list_filters(db: TenantSession) -> None:
    PersonaFactory(db=db, name="first")
    PersonaFactory(db=db, name="second", mode="autonomous", loop_frequency="0.5")
    PersonaFactory(db=db, name="third", is_active=False)
    for filters, expected in (
        ({}, ["third", "second", "first"]),
        ({"mode": "reactive"}, ["third", "first"]),
        ({"active_only": True}, ["second", "first"]),
        ({"mode": "reactive", "active_only": True}, ["first"]),
        ({"order": "name"}, ["first", "second", "third"]),
    ):
        with statements_are(1):
            page = PersonaRepository.list(db, **filters)
        assert [persona.name for persona in page] == expected


def test_d_module_crud_and_list_filters(db: TenantSession) -> None:
    with statements_are(1):
        made = ModuleRepository.create(db, name="mood", type="advanced", script="x = 1")
    assert (made.execution_context, made.stage_priority) == (ExecutionContext.ON_DEMAND, 100)
    ModuleFactory(db=db, name="style", is_active=False)
    for filters, expected in (
        ({}, ["style", "mood"]),
        ({"type": "simple"}, ["style"]),
        ({"active_only": True}, ["mood"]),
    ):
        with statements_are(1):
            page = ModuleRepository.list(db, **filters)
        assert [module.name for module in page] == expected
    with statements_are(1):
        changed = ModuleRepository.update(db, made.id, execution_context="POST_RESPONSE")
    assert (changed.script, changed.type) == ("x = 1", ModuleType.ADVANCED)
    with statements_are(1):
        assert ModuleRepository.delete(db, made.id)


def test_d_modules_by_names(db: TenantSession) -> None:
    for name in ("a", "b", "c"):
        ModuleFactory(db=db, name=name)
    with statements_are(1):
        found = ModuleRepository.get_many_by_names(db, ["c", "a"])
    assert [module.name for module in found] == ["c", "a"]
    with pytest.raises(NotFoundError, match="x, y"):
        ModuleRepository.get_many_by_names(db, ["a", "x", "y"])


def test_d_modules_for_a_stage(db: TenantSession) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "text": {},
        "now": {"type": "advanced", "execution_context": "IMMEDIATE"},
        "now_ai": {
            "type": "advanced",
            "execution_context": "IMMEDIATE",
            "requires_ai_inference": True,
        },
        "after": {"type": "advanced", "execution_context": "POST_RESPONSE", "stage_priority": 1},
        "after_ai": {
            "type": "advanced",
            "execution_context": "POST_RESPONSE",
            "requires_ai_inference": True,
        },
        "on_demand": {"type": "advanced"},
    }
    for name, kind in kinds.items():
        ModuleFactory(db=db, name=name, **kind)
        ModuleFactory(db=db, name=f"{name}_unused", **kind)
        ModuleFactory(db=db, name=f"{name}_escaped", **kind)
    template = " ".join(rf"@{name} \@{name}_escaped" for name in kinds)
    persona = PersonaFactory(db=db, template=template)
    expected = {1: ["after", "after_ai", "now", "text"], 2: ["now_ai"], 4: ["after"]}
    for stage, names in (expected | {5: ["after_ai"]}).items():
        with statements_are(2):
            found = ModuleRepository.for_stage(db, stage, persona_id=persona.id)
        assert [module.name for module in found] == names


# Table D: conversations and messages


def test_d_conversation_create_with_the_first_message(db: TenantSession) -> None:
    persona = PersonaFactory(db=db, first_message="Hello!")
    config = {"model": "large", "temperature": 0.7}
    with statements_are(1):
        chat = ConversationRepository.create(
            db, title="Trip", persona_id=persona.id, provider_type="x", provider_config=config
        )
    (message,) = MessageRepository.history(db, chat.id)
    assert (message.role, message.content, message.position) == ("assistant", "Hello!", 1)
    db.expunge_all()
    found = ConversationRepository.require(db, chat.id)
    assert (found.provider_type, found.provider_config) == ("x", config)


def test_d_conversation_by_persona(db: TenantSession) -> None:
    persona = PersonaFactory(db=db)
    chats = [ConversationRepository.create(db, persona_id=persona.id).id for _ in range(2)]
    ConversationRepository.create(db)
    with statements_are(1):
        page = ConversationRepository.list_by_persona(db, persona.id)
    assert [chat.id for chat in page] == chats[::-1]


def test_d_message_create_get_list_edit_delete(db: TenantSession, chat: Conversation) -> None:
    with statements_are(1):
        made = MessageRepository.append(
            db, chat.id, role="assistant", content="Hm", thinking="?", extra_data={"a": 1}
        )
    with statements_are(1):
        MessageRepository.update(db, made.id, thinking="!", output_tokens=3)
    db.expunge_all()
    with statements_are(1):
        found = MessageRepository.require(db, made.id)
    assert (found.content, found.thinking, found.output_tokens) == ("Hm", "!", 3)
    with statements_are(4):  # the preview of the conversation, locked meanwhile, follows
        MessageRepository.update(db, made.id, content="Yes")
    with statements_are(1):
        assert [m.content for m in MessageRepository.history(db, chat.id)] == ["Yes"]
    with pytest.raises(InvalidValueError, match=r"^input_tokens"):
        MessageRepository.update(db, made.id, input_tokens=-1)
    with pytest.raises(InvalidValueError, match=r"^content"):
        MessageRepository.update(db, made.id, content=None)
    with statements_are(4):
        assert MessageRepository.delete(db, made.id)
    assert MessageRepository.history(db, chat.id) == []


def test_d_message_windows(db: TenantSession, chat: Conversation) -> None:
    messages = say(db, chat, 40)
    with statements_are(1):
        assert MessageRepository.history(db, chat.id, limit=5) == messages[-5:]
    with statements_are(1):
        assert MessageRepository.window(db, chat.id, 3, 7) == messages[2:7]
    with statements_are(1):
        assert MessageRepository.count(db, conversation_id=chat.id) == 40
    with statements_are(1):  # the 25th to the 35th newest
        assert MemoryRepository.window(db, chat.id) == messages[5:16]
    with statements_are(1):
        assert MemoryRepository.window(db, chat.id, 38, 50) == messages[:3]
    assert MemoryRepository.window(db, chat.id, 41, 50) == []
    # What is deactivated does not count.
    MessageRepository.deactivate(db, chat.id, [messages[-1].id, messages[10].id])
    window = MemoryRepository.window(db, chat.id)
    assert [m.position for m in window] == [4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15]
    for start, end in ((0, 5), (5, 4)):
        with pytest.raises(InvalidValueError):
            MemoryRepository.window(db, chat.id, start, end)


# Table D: states


def test_d_state_upsert(db: TenantSession, chat: Conversation) -> None:
    module = ModuleFactory(db=db)
    key: dict[str, Any] = {"module_id": module.id, "execution_stage": "stage4"}
    for version in (1, 2):
        with statements_are(1):
            state = StateRepository.set(
                db, chat.id, "variables", {"n": version}, execution_metadata={"ms": 3}, **key
            )
        assert state.version == version
    other_stage = key | {"execution_stage": "stage5"}
    assert StateRepository.set(db, chat.id, "variables", {}, **other_stage).version == 1
    with statements_are(1):
        found = StateRepository.get(db, chat.id, "variables", **key)
    assert found is not None
    assert (found.state_value, found.execution_metadata) == ({"n": 2}, {"ms": 3})
    assert StateRepository.count(db) == 2


def test_d_states_of_a_conversation_with_module_names(
    db: TenantSession, chat: Conversation
) -> None:
    modules = [ModuleFactory(db=db, name=name) for name in ("a", "b", "c")]
    items = [{"key": "variables", "value": {}, "module_id": module.id} for module in modules]
    with statements_are(1):
        StateRepository.set_many(db, chat.id, items)
    db.expunge_all()
    with statements_are(1):
        found = {state.module_name for state in StateRepository.get_all(db, chat.id)}
    assert found == {"a", "b", "c"}


def test_d_latest_state_of_a_module(db: TenantSession, chat: Conversation) -> None:
    module = ModuleFactory(db=db)
    for stage, minutes in (("stage4", 5), ("stage5", 1)):
        StateRepository.set(
            db,
            chat.id,
            "variables",
            {"stage": stage},
            module_id=module.id,
            execution_stage=stage,
            executed_at=NOON + timedelta(minutes=minutes),
        )
    with statements_are(1):
        latest = StateRepository.latest_for_module(db, chat.id, module.id)
    assert latest is not None
    assert latest.state_value == {"stage": "stage4"}


# Table D: memories


def test_d_memory_add_with_the_next_sequence(db: TenantSession, chat: Conversation) -> None:
    messages = say(db, chat, 40)
    window = MemoryRepository.window(db, chat.id)
    with statements_are(1):
        assert MemoryRepository.next_sequence(db, chat.id) == 1
    with statements_are(1):
        memory = MemoryRepository.add(
            db,
            chat.id,
            content="They counted.",
            embedding=vector(1, 2),
            memory_type="summary",
            first_message_id=window[0].id,
            first_position=window[0].position,
            last_position=window[-1].position,
            message_count=len(window),
        )
    assert (memory.sequence, memory.importance) == (1, 0.5)
    assert (memory.first_position, memory.last_position) == (6, 16)
    assert MemoryRepository.next_sequence(db, chat.id) == 2
    with statements_are(1):
        more = MemoryRepository.add_many(db, chat.id, [{"content": "a"}, {"content": "b"}])
    assert [found.sequence for found in more] == [2, 3]
    assert MessageRepository.delete(db, messages[5].id)
    db.expunge_all()
    found = MemoryRepository.require(db, memory.id)
    assert (found.first_message_id, found.first_position) == (None, 6)
    assert found.embedding is not None
    assert list(found.embedding[:3]) == [1, 2, 0]


def test_d_memory_covers(db: TenantSession, chat: Conversation) -> None:
    ids = [message.id for message in say(db, chat, 20)]
    elsewhere = ConversationRepository.create(db)
    foreign = say(db, elsewhere, 5)[3].id
    MemoryRepository.add(db, chat.id, content="m", first_position=3, last_position=5)
    MemoryRepository.add(db, chat.id, content="n", first_position=9, last_position=9)
    MemoryRepository.add(db, chat.id, content="of no messages")
    with statements_are(1):
        covered = MemoryRepository.covers(db, chat.id, [*ids, foreign])
    assert covered == {ids[2], ids[3], ids[4], ids[8]}
    assert MemoryRepository.covers(db, chat.id, [str(ids[0]), str(ids[2])]) == {ids[2]}
    assert MemoryRepository.covers(db, elsewhere.id, [foreign]) == set()
    with statements_are(0):
        assert MemoryRepository.covers(db, chat.id, []) == set()


def test_d_memory_recent(db: TenantSession, chat: Conversation) -> None:
    MemoryRepository.add_many(db, chat.id, [{"content": str(n)} for n in range(1, 8)])
    MemoryFactory(db=db)
    with statements_are(1):
        found = MemoryRepository.recent(db, chat.id, 3)
    assert [memory.content for memory in found] == ["7", "6", "5"]
    assert len(MemoryRepository.recent(db, chat.id)) == 5


def test_d_memory_status_and_clear(db: TenantSession, chat: Conversation) -> None:
    with statements_are(1):
        assert MemoryRepository.status(db, chat.id) == MemoryStatus(0, 0, 0, 0, 1)
    messages = say(db, chat, 20)
    # Ranges may overlap: a message is counted once.
    MemoryRepository.add(db, chat.id, content="m", first_position=1, last_position=5)
    MemoryRepository.add(db, chat.id, content="n", first_position=4, last_position=8)
    MessageRepository.deactivate(db, chat.id, [messages[0].id])
    with statements_are(1):
        status = MemoryRepository.status(db, chat.id)
    assert status == MemoryStatus(
        memories=2, messages=19, covered=7, last_position=8, next_sequence=3
    )
    kept = MemoryFactory(db=db).id
    with counted_statements() as statements:
        assert MemoryRepository.clear(db, chat.id) == 2
    assert len(statements) <= 2
    assert checked_out() == 0
    assert MemoryRepository.status(db, chat.id) == MemoryStatus(0, 19, 0, 0, 1)
    assert [memory.id for memory in MemoryRepository.list(db)] == [kept]
    assert MemoryRepository.clear(db, chat.id) == 0
    missing = "019a0000-0000-7000-8000-000000000000"
    with pytest.raises(NotFoundError):
        MemoryRepository.status(db, missing)


def test_d_memory_recall(db: TenantSession, chat: Conversation) -> None:
    items: list[dict[str, Any]] = [
        {"content": "tea", "embedding": vector(1)},
        {"content": "tea and bread", "embedding": vector(1, 1)},
        {"content": "rain", "embedding": vector(0, 1), "importance": 1.0},
    ]
    MemoryRepository.add_many(db, chat.id, items)
    similar = {"weights": (1, 0, 0), "conversation_id": chat.id}
    with statements_are(1):
        found = MemoryRepository.recall(db, embedding=vector(1), limit=2, **similar)  # type: ignore[arg-type]
    assert [recalled.memory.content for recalled in found] == ["tea", "tea and bread"]
    assert [recalled.memory.access_count for recalled in found] == [1, 1]
    assert found[1].parts.similarity == pytest.approx(0.5**0.5, abs=1e-3)
    with statements_are(1):
        found = MemoryRepository.recall(
            db, text="rain", conversation_id=chat.id, weights=(1, 1, 1), touch=False
        )
    (recalled,) = found
    parts = recalled.parts
    assert recalled.score == pytest.approx(parts.relevance + parts.recency + parts.importance)
    assert (recalled.memory.access_count, parts.similarity) == (0, None)


def test_d_memory_decay_and_forget(db: TenantSession, chat: Conversation) -> None:
    MemoryRepository.add(db, chat.id, content="old", last_accessed_at=NOON - timedelta(days=999))
    MemoryRepository.add(db, chat.id, content="new")
    with statements_are(1):
        assert MemoryRepository.decay(db, timedelta(days=7), 0.5, conversation_id=chat.id) == 1
    db.expunge_all()
    shares = {m.content: m.importance for m in MemoryRepository.recent(db, chat.id)}
    assert shares == {"old": 0.25, "new": 0.5}
    with statements_are(1):
        assert MemoryRepository.forget(db, 0.4, conversation_id=chat.id, dry_run=True) == 1
    with statements_are(1):
        assert MemoryRepository.forget(db, 0.4, conversation_id=chat.id) == 1
    assert [m.content for m in MemoryRepository.recent(db, chat.id)] == ["new"]


# What failed in it


def test_failure_enum_names_are_stored(db: TenantSession, tenant: str) -> None:
    persona = PersonaFactory(db=db, mode=PersonaMode.AUTONOMOUS)
    module = ModuleFactory(
        db=db, type=ModuleType.ADVANCED, execution_context=ExecutionContext.POST_RESPONSE
    )
    # A row whose columns have the server's defaults reads as well as one of ours.
    with transaction(db):
        db.execute(
            text(
                "INSERT INTO personas (tenant_id, id, name, template)"
                " VALUES (:tenant, gen_random_uuid(), 'raw', '')"
            ),
            {"tenant": tenant},
        )
        db.execute(
            text(
                "INSERT INTO modules (tenant_id, id, name)"
                " VALUES (:tenant, gen_random_uuid(), 'raw')"
            ),
            {"tenant": tenant},
        )
        stored = set(db.scalars(text("SELECT mode FROM personas")))
        rows = db.execute(text("SELECT type, execution_context FROM modules"))
        kinds = {tuple(row) for row in rows}
    assert stored == {"autonomous", "reactive"}
    assert kinds == {("advanced", "POST_RESPONSE"), ("simple", "ON_DEMAND")}
    db.expunge_all()
    assert {found.mode for found in PersonaRepository.list(db)} == set(PersonaMode)
    assert {found.type for found in ModuleRepository.list(db)} == set(ModuleType)
    for repository, row, field in (
        (PersonaRepository, persona, {"mode": "REACTIVE"}),
        (ModuleRepository, module, {"execution_context": "immediate"}),
    ):
        with pytest.raises(InvalidValueError):
            repository.update(db, row.id, **field)


def test_failure_deleting_a_persona_deletes_its_conversations(
    db: TenantSession, tenant: str
) -> None:
    persona = PersonaFactory(db=db, first_message="Hello!")
    chat = ConversationRepository.create(db, persona_id=persona.id)
    MessageRepository.append(db, chat.id, role="user", content="Hi")
    StateRepository.set(db, chat.id, "mood", "calm", persona_id=persona.id)
    memory = MemoryRepository.add(db, chat.id, content="Greetings", persona_id=persona.id)
    assert PersonaRepository.delete(db, persona.id)
    with SessionLocal(tenant_id=tenant) as elsewhere:
        found = ConversationRepository.require(elsewhere, chat.id)
        assert (found.persona_id, found.message_count) == (None, 2)
        contents = [m.content for m in MessageRepository.history(elsewhere, chat.id)]
        assert contents == ["Hello!", "Hi"]
        assert StateRepository.count(elsewhere) == 0
        assert MemoryRepository.require(elsewhere, memory.id).persona_id is None
        ConversationRepository.delete(elsewhere, chat.id)
        assert MemoryRepository.count(elsewhere) == MessageRepository.count(elsewhere) == 0


def test_failure_sequences_race(db: TenantSession, chat: Conversation, tenant: str) -> None:
    each = 5

    def add(session: TenantSession, number: int) -> list[int]:
        alone = [
            MemoryRepository.add(session, chat.id, content=f"{number} {n}").sequence
            for n in range(each)
        ]
        many = [{"content": f"{number} {n}"} for n in range(each)]
        together = [memory.sequence for memory in MemoryRepository.add_many(session, chat.id, many)]
        assert together == list(range(together[0], together[0] + each))
        return alone + together

    numbers = [number for found in in_threads(tenant, add) for number in found]
    assert sorted(numbers) == list(range(1, 2 * each * THREADS + 1))
    assert MemoryRepository.next_sequence(db, chat.id) == len(numbers) + 1
    stored = {m.sequence for m in MemoryRepository.recent(db, chat.id, 1000)}
    assert stored == set(numbers)


def test_failure_messages_are_ordered_by_time_only(db: TenantSession, chat: Conversation) -> None:
    # All at one time, or even backwards: they stay in the order of their appends.
    for number in range(10):
        MessageRepository.append(db, chat.id, role="user", content=str(number), created_at=NOON)
    for number in range(10, 20):
        at = NOON - timedelta(minutes=number)
        MessageRepository.append(db, chat.id, role="user", content=str(number), created_at=at)
    expected = [str(number) for number in range(20)]
    assert [m.content for m in MessageRepository.history(db, chat.id)] == expected
    assert [m.content for m in MessageRepository.history(db, chat.id, limit=3)] == expected[-3:]
    assert [m.content for m in MemoryRepository.window(db, chat.id, 11, 20)] == expected[:10]


def test_failure_a_session_is_held_while_a_model_answers(worker_url: str, tenant: str) -> None:
    database.configure(url=worker_url, pool_size=1, max_overflow=0, pool_timeout=1)
    held: list[int] = []

    def model(prompt: str, history: Sequence[Message]) -> str:
        held.append(checked_out())
        assert not db.in_transaction()
        with get_db_session(tenant_id=tenant) as another:  # the only connection is free
            last = MessageRepository.get_last(another, history[-1].conversation_id)
        assert last is not None
        assert last.content == history[-1].content  # what was said is committed
        return persona_chat.scripted(prompt, history)

    with get_db_session(tenant_id=tenant) as db:
        chat = persona_chat.Chat.open(db, model)
        for said in persona_chat.TALK:
            chat.say(said)
        assert MemoryRepository.status(db, chat.conversation.id).memories == 2
    assert held == [0] * len(persona_chat.TALK)


INDEXED = {
    "messages": "tenant_id, conversation_id, position",
    "conversation_memory": "tenant_id, conversation_id, sequence",
    "conversation_states": (
        "tenant_id, conversation_id, persona_id, module_id, execution_stage, state_key"
    ),
    "conversations": "tenant_id, persona_id",
}


def test_failure_single_column_indexes(worker_url: str) -> None:
    with admin(worker_url) as connection:
        rows = connection.execute(
            "SELECT tablename, indexdef FROM pg_indexes WHERE tablename = ANY(%s)", [[*INDEXED]]
        ).fetchall()
    for table, columns in INDEXED.items():
        found = [definition.replace('"', "") for name, definition in rows if name == table]
        assert any(f"USING btree ({columns}" in definition for definition in found), table
        # Of one column is none but the index of vectors, which cannot have another.
        single = [definition for definition in found if "," not in definition.split("USING")[1]]
        assert all("USING hnsw" in definition for definition in single), single


def test_failure_three_truths_for_the_schema() -> None:
    """The migrations alone make tables: `test_migrations.py` compares them with the models."""
    others = [
        path.relative_to(ROOT).as_posix()
        for folder in ("database", "alembic", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".sql"
        or (path.suffix == ".py" and "create_all(" in path.read_text("utf-8"))
    ]
    assert others == []
