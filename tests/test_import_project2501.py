"""The import of Project 2501, from both of its schemas as its tables are described."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from project2501_source import Source, SourceError  # not a second copy: of examples.
from psycopg import sql
from psycopg.types.json import Jsonb
from sqlalchemy import make_url, select

import database
from database import (
    ConversationRepository,
    Memory,
    MemoryRepository,
    Message,
    MessageRepository,
    ModuleRepository,
    PersonaRepository,
    Repository,
    State,
    StateRepository,
    TenantModel,
    TenantSession,
)
from examples import import_project2501
from examples.import_project2501 import MODELS, Job
from tests.conftest import admin
from tests.counting import counted_statements
from tests.running import read_until

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "import_project2501.py"
TABLES: dict[str, type[Repository[Any]]] = {
    "personas": PersonaRepository,
    "modules": ModuleRepository,
    "conversations": ConversationRepository,
    "messages": MessageRepository,
    "conversation_states": StateRepository,
    "conversation_memory": MemoryRepository,
}
DIMENSIONS = 1536
JSON_RULE = "must be JSON: text keys, numbers of at most 64 bits, at most 250 levels"
START = datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC)

Reasons = dict[tuple[str, str, str], int]

# Keys and checks are left out: what they would have kept out must be skipped.
SHARED = """
CREATE TABLE personas (id uuid PRIMARY KEY, name varchar(255), description text, template text,
    mode {mode} DEFAULT {reactive}, loop_frequency text, first_message text,
    image_path varchar(500), extra_data jsonb, is_active boolean DEFAULT true,
    created_at {time}, updated_at {time});
CREATE TABLE modules (id uuid PRIMARY KEY, name varchar(255), description text, content text,
    type {type} DEFAULT {simple}, trigger_pattern varchar(500), script text,
    execution_context {context} DEFAULT 'ON_DEMAND', requires_ai_inference boolean DEFAULT false,
    stage_priority integer DEFAULT 100, script_analysis_metadata jsonb,
    is_active boolean DEFAULT true, created_at {time}, updated_at {time});
CREATE TABLE conversations (id uuid PRIMARY KEY, title varchar(255), persona_id uuid,
    provider_type varchar(50), provider_config jsonb, created_at {time}, updated_at {time});
CREATE TABLE messages (id uuid PRIMARY KEY, conversation_id uuid, role varchar(20), content text,
    thinking text, extra_data jsonb, input_tokens integer, output_tokens integer,
    created_at {time}, updated_at {time});
"""
OF_SQL_FILES = (
    "CREATE EXTENSION vector;"
    + SHARED.format(
        **dict.fromkeys(("mode", "type", "context"), "varchar(20)"),
        reactive="'reactive'",
        simple="'simple'",
        time="timestamptz",
    )
    + """
CREATE TABLE conversation_states (id uuid PRIMARY KEY, conversation_id uuid, persona_id uuid,
    module_id uuid, state_key varchar(255), state_value jsonb,
    created_at timestamptz, updated_at timestamptz);
CREATE TABLE conversation_memory (id uuid PRIMARY KEY, conversation_id uuid, persona_id uuid,
    first_message_id uuid, content text, memory_type varchar(50), importance float DEFAULT 0.5,
    embedding vector, metadata jsonb, last_accessed timestamptz, access_count integer,
    created_at timestamptz);
"""
)
OF_CREATE_ALL = (
    """
CREATE TYPE personamode AS ENUM ('REACTIVE', 'AUTONOMOUS');
CREATE TYPE moduletype AS ENUM ('SIMPLE', 'ADVANCED');
CREATE TYPE executioncontext AS ENUM ('IMMEDIATE', 'POST_RESPONSE', 'ON_DEMAND', 'Immediate');
"""
    + SHARED.format(
        mode="personamode",
        type="moduletype",
        context="executioncontext",
        reactive="'REACTIVE'",
        simple="'SIMPLE'",
        time="timestamp",
    )
    + """
CREATE TABLE conversation_states (id uuid PRIMARY KEY, conversation_id uuid, module_id uuid,
    execution_stage varchar(20), variables jsonb, execution_metadata jsonb, executed_at timestamp);
CREATE TABLE conversation_memory (id uuid PRIMARY KEY, conversation_id uuid,
    memory_sequence integer, compressed_content text, original_message_range varchar(20),
    message_count_at_compression integer, first_message_id varchar(100), created_at timestamp);
"""
)


class Old:
    """A database of Project 2501."""

    def __init__(self, connection: psycopg.Connection, url: str) -> None:
        self.connection = connection
        self.url = url
        self.clock = START

    def create(self, script: str) -> Old:
        self.connection.execute(script)
        return self

    def add(self, table: str, **fields: Any) -> UUID:
        """Insert a row a second younger than the one before, its times as the column has them."""
        self.clock += timedelta(seconds=1)
        fields = {"id": uuid4(), "created_at": self.clock} | fields
        columns = self.columns(table)
        if "created_at" not in columns:
            del fields["created_at"]
        values = [
            Jsonb(value)
            if isinstance(value, dict | list) and columns[name] == "jsonb"
            # Else the server would take them to its own zone.
            else value.replace(tzinfo=None)
            if isinstance(value, datetime) and "without" in columns[name]
            else value
            for name, value in fields.items()
        ]
        self.connection.execute(
            sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
                sql.Identifier(table),
                sql.SQL(", ").join(map(sql.Identifier, fields)),
                sql.SQL(", ").join(sql.Placeholder() * len(fields)),
            ),
            values,
        )
        assert isinstance(fields["id"], UUID)
        return fields["id"]

    def columns(self, table: str) -> dict[str, str]:
        found = self.connection.execute(
            "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = %s",
            [table],
        )
        return dict(found.fetchall())

    def say(self, conversation: UUID, text: str = "hello", **fields: Any) -> UUID:
        given = {"role": "user", "content": text, **fields}
        return self.add("messages", conversation_id=conversation, **given)

    def contents(self) -> list[Any]:
        return [
            self.connection.execute(f"SELECT * FROM {table} ORDER BY id").fetchall()
            for table in MODELS
        ]


@pytest.fixture
def empty(empty_url: str) -> Iterator[Old]:
    with admin(empty_url) as connection:
        # Naive timestamps must not follow it.
        connection.execute("SELECT set_config('timezone', 'Asia/Tokyo', false)")
        yield Old(connection, empty_url)


@pytest.fixture
def documented(empty: Old) -> Old:
    return empty.create(OF_SQL_FILES)


@pytest.fixture
def created(empty: Old) -> Old:
    return empty.create(OF_CREATE_ALL)


def run(old: Old, tenant: str, *, batch: int = 25, dry_run: bool = False) -> Job:
    job = Job(tenant, batch, dry_run=dry_run)
    source = Source(old.url)
    with source.connection:
        job.run(source)
    return job


def counts(job: Job) -> dict[str, tuple[int, ...]]:
    """What was read, written, already there and skipped, by table with any rows."""
    tally = job.tally
    found = {
        table: tuple(c[table] for c in (tally.read, tally.written, tally.there, tally.skipped))
        for table in MODELS
    }
    for read, *became in found.values():
        assert read == sum(became)
    return {table: numbers for table, numbers in found.items() if any(numbers)}


def reasons(job: Job) -> Reasons:
    return dict(job.tally.reasons)


def stored(db: TenantSession, model: type[TenantModel]) -> dict[UUID, Any]:
    """All fields of a table's rows that an import sets."""
    db.expire_all()
    ours = {"tenant_id", "conversation_id", "thread_id", "message_count", "last_position"}
    ours |= {"version", "last_message", "is_active", "is_branched", "is_shared"}
    return {
        row.id: {
            name: value
            for name, value in row.to_dict().items()
            if value is not None and name not in ours and value != {}
        }
        for row in db.scalars(select(model))
    }


def everything(db: TenantSession) -> dict[str, dict[UUID, Any]]:
    return {table: stored(db, model) for table, model in MODELS.items()}


def at(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat()


# --- Content ---


def test_all_of_the_sql_files_schema(db: TenantSession, tenant: str, documented: Old) -> None:
    late = START + timedelta(days=1)
    persona = documented.add(
        "personas",
        name="Ava",
        description="d",
        template="@m ${x}",
        mode="autonomous",
        loop_frequency=".5",
        first_message="Hi",
        image_path="/a.png",
        extra_data={"a": [1.5, None]},
        updated_at=late,
    )
    plain = documented.add("personas", name="Bob", template="")
    module = documented.add(
        "modules",
        name="memory_2",
        description="d",
        content="c",
        type="advanced",
        trigger_pattern="t",
        script="s",
        execution_context="POST_RESPONSE",
        requires_ai_inference=True,
        stage_priority=7,
        script_analysis_metadata={"m": 1},
        is_active=False,
    )
    conversation = documented.add(
        "conversations",
        title="Talk",
        persona_id=persona,
        provider_type="openai",
        provider_config={"model": "m"},
        updated_at=late,
    )
    # In another order than their times, and two at the same time: these by id.
    third = documented.say(conversation, "3", id=UUID(int=9), created_at=late, role="ASSISTANT")
    second = documented.say(conversation, "2", id=UUID(int=8), created_at=late, role="Assistant")
    first = documented.say(
        conversation,
        "1",
        thinking="hm",
        extra_data=["x"],
        input_tokens=0,
        output_tokens=3,
        updated_at=late,
    )
    key = {"conversation_id": conversation, "state_key": "mood"}
    of_both = documented.add(
        "conversation_states",
        **key,
        persona_id=persona,
        module_id=module,
        state_value={"a": 1},
        updated_at=late,
    )
    of_none = documented.add("conversation_states", **key, state_value=[1, "x"])
    vector = [0.5] * (DIMENSIONS - 1) + [-1.0]
    whole = documented.add(
        "conversation_memory",
        conversation_id=conversation,
        persona_id=persona,
        first_message_id=second,
        content="we met",
        memory_type="fact",
        importance=0.75,
        embedding=str(vector),
        metadata={"k": "v"},
        last_accessed=late,
        access_count=4,
    )
    bare = documented.add("conversation_memory", conversation_id=conversation, content="then")
    before = documented.contents()

    job = run(documented, tenant)
    assert counts(job) == {
        "personas": (2, 2, 0, 0),
        "modules": (1, 1, 0, 0),
        "conversations": (1, 1, 0, 0),
        "messages": (3, 3, 0, 0),
        "conversation_states": (2, 2, 0, 0),
        "conversation_memory": (2, 2, 0, 0),
    }
    assert (reasons(job), job.naive) == ({}, [])
    assert documented.contents() == before

    days = timedelta(days=1).total_seconds()
    found = everything(db)
    assert found["personas"] == {
        persona: {
            "id": str(persona),
            "created_at": at(1),
            "updated_at": at(days),
            "name": "Ava",
            "description": "d",
            "template": "@m ${x}",
            "mode": "autonomous",
            "loop_frequency": "0.5",
            "first_message": "Hi",
            "image_path": "/a.png",
            "extra_data": {"a": [1.5, None]},
        },
        plain: {
            "id": str(plain),
            "created_at": at(2),
            "updated_at": at(2),
            "name": "Bob",
            "template": "",
            "mode": "reactive",
        },
    }
    assert found["modules"] == {
        module: {
            "id": str(module),
            "created_at": at(3),
            "updated_at": at(3),
            "name": "memory_2",
            "description": "d",
            "content": "c",
            "type": "advanced",
            "trigger_pattern": "t",
            "script": "s",
            "execution_context": "POST_RESPONSE",
            "requires_ai_inference": True,
            "stage_priority": 7,
            "script_analysis_metadata": {"m": 1},
        }
    }
    assert not ModuleRepository.require(db, module).is_active
    assert found["conversations"] == {
        conversation: {
            "id": str(conversation),
            "created_at": at(4),
            "updated_at": at(days),
            "title": "Talk",
            "persona_id": str(persona),
            "provider_type": "openai",
            "provider_config": {"model": "m"},
            "last_sequence": 2,
        }
    }
    assert found["messages"] == {
        first: {
            "id": str(first),
            "created_at": at(7),
            "updated_at": at(days),
            "position": 1,
            "role": "user",
            "content": "1",
            "thinking": "hm",
            "extra_data": ["x"],
            "input_tokens": 0,
            "output_tokens": 3,
        },
        second: {
            "id": str(second),
            "created_at": at(days),
            "updated_at": at(days),
            "position": 2,
            "role": "assistant",
            "content": "2",
        },
        third: {
            "id": str(third),
            "created_at": at(days),
            "updated_at": at(days),
            "position": 3,
            "role": "assistant",
            "content": "3",
        },
    }
    assert found["conversation_states"] == {
        of_both: {
            "id": str(of_both),
            "created_at": at(8),
            "updated_at": at(days),
            "executed_at": at(days),
            "persona_id": str(persona),
            "module_id": str(module),
            "state_key": "mood",
            "state_value": {"a": 1},
        },
        of_none: {
            "id": str(of_none),
            "created_at": at(9),
            "updated_at": at(9),
            "executed_at": at(9),
            "state_key": "mood",
            "state_value": [1, "x"],
        },
    }
    for memory in found["conversation_memory"].values():
        assert memory.pop("updated_at") > at(days)
    assert found["conversation_memory"][bare].pop("last_accessed_at") > at(days)
    assert found["conversation_memory"] == {
        whole: {
            "id": str(whole),
            "created_at": at(10),
            "last_accessed_at": at(days),
            "persona_id": str(persona),
            "first_message_id": str(second),
            "sequence": 1,
            "content": "we met",
            "memory_type": "fact",
            "importance": 0.75,
            "metadata": {"k": "v"},
            "access_count": 4,
        },
        bare: {
            "id": str(bare),
            "created_at": at(11),
            "sequence": 2,
            "content": "then",
            "importance": 0.5,
            "access_count": 0,
        },
    }
    vectors = db.execute(select(Memory.id, Memory.embedding)).all()
    assert dict(vectors) == {whole: vector, bare: None}
    talk = ConversationRepository.require(db, conversation)
    assert (talk.thread_id, talk.message_count, talk.last_position, talk.last_message) == (
        *(str(conversation), 3, 3),
        "3",
    )
    # And it goes on where it was.
    assert MessageRepository.append(db, conversation, role="user", content="4").position == 4
    assert MemoryRepository.add(db, conversation, content="new").sequence == 3


@pytest.mark.parametrize("name", ["conversation_memory", "conversation_memories"])
def test_all_of_the_create_all_schema(
    db: TenantSession, tenant: str, created: Old, name: str
) -> None:
    if name != "conversation_memory":
        created.create(f"ALTER TABLE conversation_memory RENAME TO {name}")
    persona = created.add("personas", name="Ava", template="t", mode="AUTONOMOUS")
    modules = [
        created.add("modules", name=name, type="SIMPLE", execution_context=context)
        for name, context in [("a", "IMMEDIATE"), ("b", "Immediate"), ("c", "POST_RESPONSE")]
    ]
    conversation = created.add("conversations", title="Talk", persona_id=persona)
    messages = [created.say(conversation, str(number)) for number in range(40)]
    stage = created.add(
        "conversation_states",
        conversation_id=conversation,
        module_id=modules[2],
        execution_stage="STAGE4",
        variables={"mood": "good"},
        execution_metadata={"ms": 3},
        executed_at=START,
    )
    given = {"conversation_id": conversation, "original_message_range": "25-35"}
    given |= {"message_count_at_compression": 40, "compressed_content": "so far"}
    later, earlier = (
        created.add(name, **given, memory_sequence=3),
        created.add(name, **given, memory_sequence=2, first_message_id=str(messages[4])),
    )
    job = run(created, tenant)
    assert reasons(job) == {}
    assert counts(job)["messages"] == (40, 40, 0, 0)
    assert job.naive == [
        *("conversation_memory.created_at",) * (name == "conversation_memory"),
        *("conversation_memories.created_at",) * (name != "conversation_memory"),
        "conversation_states.executed_at",
        *(
            f"{table}.{column}"
            for table in ("conversations", "messages", "modules", "personas")
            for column in ("created_at", "updated_at")
        ),
    ]

    assert PersonaRepository.require(db, persona).mode == "autonomous"
    found = [ModuleRepository.require(db, id_) for id_ in modules]
    assert [(m.type, m.execution_context) for m in found] == [
        ("simple", "IMMEDIATE"),
        ("simple", "IMMEDIATE"),
        ("simple", "POST_RESPONSE"),
    ]
    assert stored(db, State) == {
        stage: {
            "id": str(stage),
            **dict.fromkeys(("created_at", "updated_at", "executed_at"), at(0)),
            "module_id": str(modules[2]),
            "execution_stage": "stage4",
            "state_key": "variables",
            "state_value": {"mood": "good"},
            "execution_metadata": {"ms": 3},
        }
    }
    memories = {memory.id: memory for memory in db.scalars(select(Memory))}
    ranges = {
        id_: (m.sequence, m.first_position, m.last_position, m.message_count, m.content)
        for id_, m in memories.items()
    }
    # The second window began with message 5: its range counted from the newest message.
    assert ranges == {later: (3, 25, 35, 40, "so far"), earlier: (2, 5, 15, 40, "so far")}
    assert memories[earlier].first_message_id == messages[4]
    assert memories[later].created_at.isoformat() == at(47)
    assert [m.id for m in MessageRepository.history(db, conversation)] == messages
    assert MemoryRepository.add(db, conversation, content="new").sequence == 4


# --- Rows that break rules ---


def add_bad(old: Old) -> tuple[Reasons, dict[str, int]]:
    """Add rows of each kind that is refused, each beside a good one; return what must be told."""
    persona = old.add("personas", name="Ava", template="t")
    old.add("personas", name="Ava", template="t")
    old.add("personas", name="Loop", template="t", loop_frequency="5")
    old.add("personas", name="Mode", template="t", mode="other")
    old.add("personas", name="None", template=None)
    module = old.add("modules", name="good")
    for name in ("Bad name", "x" * 51, "good"):
        old.add("modules", name=name)
    old.add("modules", name="context", execution_context="SOON")
    old.add("modules", name="type", type="other")

    talk = old.add("conversations", title="Talk", persona_id=persona)
    left = old.add("conversations", title="Left", persona_id=uuid4())
    gone = uuid4()
    old.connection.execute("ALTER TABLE conversations ALTER title TYPE text")
    refused = old.add("conversations", title="x" * 501)
    messages = [old.say(talk, str(number)) for number in range(8)]
    old.say(talk, input_tokens=-1)
    for fields in ({"output_tokens": -1}, {"role": "narrator"}, {"content": None}):
        old.say(talk, **fields)
    old.say(talk, extra_data={"n": 2**64})
    old.say(talk, "last")
    old.say(refused)
    old.say(gone)
    old.say(left)

    def state(key: str, **fields: Any) -> None:
        given = {"conversation_id": talk, "state_key": key, "state_value": {"k": key}, **fields}
        old.add("conversation_states", **given)

    for number in range(5):
        state("doubled", state_value={"number": number})
    state("fine", module_id=module, persona_id=persona)
    state("")
    state("orphan", persona_id=uuid4())
    state("orphan", module_id=uuid4())
    for conversation in (gone, None, refused):
        state("orphan", conversation_id=conversation)

    def memory(**fields: Any) -> None:
        old.add("conversation_memory", **{"conversation_id": talk, "content": "c", **fields})

    memory(first_message_id=messages[0])
    memory(first_message_id=uuid4(), persona_id=uuid4())
    memory(embedding="[1,2,3]")
    memory(embedding=str([0] * DIMENSIONS))
    memory(importance=1.5)
    memory(access_count=-1)
    memory(content=None)
    memory(metadata=[1])
    memory(conversation_id=gone)
    memory(conversation_id=refused)
    gone_reason = "its conversation is not there"
    rules = {
        "personas": {
            "name: already exists": 1,
            "mode: Input should be 'reactive' or 'autonomous'": 1,
            "template: must be given": 1,
        },
        "modules": {
            "name: String should match pattern '^[a-z][a-z0-9_]{0,49}$'": 2,
            "name: already exists": 1,
            "execution_context: Input should be 'IMMEDIATE', 'POST_RESPONSE' or 'ON_DEMAND'": 1,
            "type: Input should be 'simple' or 'advanced'": 1,
        },
        "conversations": {"title: String should have at most 500 characters": 1},
        "messages": {
            "input_tokens: Input should be greater than or equal to 0": 1,
            "output_tokens: Input should be greater than or equal to 0": 1,
            "role: Input should be 'user', 'assistant', 'system' or 'tool'": 1,
            "content: must be given": 1,
            f"extra_data: {JSON_RULE}": 1,
            "its conversation is skipped": 1,
            gone_reason: 1,
        },
        "conversation_states": {
            "a newer one has its key": 4,
            "state_key: String should have at least 1 character": 1,
            "its persona is not there": 1,
            "its module is not there": 1,
            gone_reason: 2,
            "its conversation is skipped": 1,
        },
        "conversation_memory": {
            "embedding: must not be all zeros: it has no direction": 1,
            "importance: Input should be less than or equal to 1": 1,
            "access_count: breaks a rule of its column": 1,
            "content: must be given": 1,
            "metadata: must be a JSON object": 1,
            gone_reason: 1,
            "its conversation is skipped": 1,
        },
    }
    left_out = {
        ("personas", "loop_frequency: of a reactive persona"): 1,
        ("conversations", "persona_id: is not there"): 1,
        ("conversation_memory", "persona_id: is not there"): 1,
        ("conversation_memory", "first_message_id: is not there"): 1,
        ("conversation_memory", f"embedding: has not {DIMENSIONS} dimensions"): 1,
    }
    expected = {
        (table, "skipped", rule): count
        for table, of_table in rules.items()
        for rule, count in of_table.items()
    }
    expected |= {(table, "left out", rule): count for (table, rule), count in left_out.items()}
    good = {
        "personas": 2,
        "modules": 1,
        "conversations": 2,
        "messages": 10,
        "conversation_states": 2,
        "conversation_memory": 3,
    }
    return expected, good


def test_rows_that_break_rules(db: TenantSession, tenant: str, documented: Old) -> None:
    expected, good = add_bad(documented)
    job = run(documented, tenant)
    assert reasons(job) == expected
    assert {table: written for table, (_, written, _, _) in counts(job).items()} == good
    assert {table: repository.count(db) for table, repository in TABLES.items()} == good
    for (table, what, reason), ids in job.tally.examples.items():
        assert len(ids) == min(job.tally.reasons[table, what, reason], 3)
        for id_ in map(UUID, ids):
            assert (TABLES[table].get(db, id_) is None) == (what == "skipped")
    (newest,) = (s for s in db.scalars(select(State)) if s.state_key == "doubled")
    assert newest.state_value == {"number": 4}
    positions = db.scalars(
        select(Message.position).where(Message.content != "hello").order_by(Message.position)
    )
    assert list(positions) == list(range(1, 10)), "what is skipped leaves no gap"

    # The second time the same rows are skipped, and what was left out once is not told again.
    before = everything(db)
    again = run(documented, tenant)
    assert everything(db) == before
    first = counts(job)
    assert counts(again) == {
        table: (read, 0, written, skipped) for table, (read, written, _, skipped) in first.items()
    }
    assert {key[1] for key in reasons(again)} == {"skipped"}


def test_sequences_of_memories(db: TenantSession, tenant: str, created: Old) -> None:
    conversation = created.add("conversations")
    for number, sequence in enumerate([None, 5, 2, 5, None, 0]):
        created.add(
            "conversation_memory",
            conversation_id=conversation,
            memory_sequence=sequence,
            compressed_content=str(number),
            original_message_range=("1-2", "2-1", "0-1", "x", "1-99999999999", None)[number],
            first_message_id="no id" if number == 2 else None,
        )
    job = run(created, tenant)
    memories = db.scalars(select(Memory).order_by(Memory.sequence))
    assert [(memory.sequence, memory.content) for memory in memories] == [
        *((2, "2"), (5, "1")),
        *((6, "0"), (7, "4")),
    ]
    assert reasons(job) == {
        ("conversation_memory", "skipped", "another one has its sequence"): 1,
        (
            *("conversation_memory", "skipped"),
            "sequence: Input should be greater than or equal to 1",
        ): 1,
        (
            *("conversation_memory", "left out"),
            "original_message_range: is no range of positions",
        ): 3,
        ("conversation_memory", "left out", "first_message_id: is no UUID"): 1,
    }


# --- Runs: again, dry, killed, of tenants ---


@pytest.mark.parametrize("schema", ["documented", "created"])
@pytest.mark.parametrize("when", ["infinity", "-infinity", "12000-01-01", "0044-03-15 BC"])
def test_times_that_python_has_none_for(
    schema: str, when: str, request: pytest.FixtureRequest, db: TenantSession, tenant: str
) -> None:
    old: Old = request.getfixturevalue(schema)
    old.add("conversations", title="first")
    strange = old.add("conversations", title="strange", created_at=when)
    old.say(strange, created_at=when)
    old.add("conversations", title="last")
    job = run(old, tenant)
    told = "created_at: is beyond the years 1 to 9999"
    assert reasons(job) == {(table, "left out", told): 1 for table in ("conversations", "messages")}
    assert {one.title for one in ConversationRepository.list(db)} == {"first", "strange", "last"}
    assert [one.content for one in MessageRepository.history(db, strange)] == ["hello"]


def add_talks(old: Old, talks: int, messages: int = 4) -> list[UUID]:
    """Add conversations, each with messages, a state and a memory."""
    persona = old.add("personas", name="Ava", template="t")
    module = old.add("modules", name="mood")
    made = [old.add("conversations", title=f"{n}", persona_id=persona) for n in range(talks)]
    for conversation in made:
        old.connection.execute(
            "INSERT INTO messages (id, conversation_id, role, content, created_at)"
            " SELECT gen_random_uuid(), %s, 'user', 'm' || n, now() + n * interval '1 s'"
            " FROM generate_series(1, %s) AS n",
            [conversation, messages],
        )
        key = {"conversation_id": conversation}
        old.add("conversation_states", **key, module_id=module, state_key="k", state_value={"a": 1})
        old.add("conversation_memory", **key, persona_id=persona, content="c")
    return made


def test_the_second_run_writes_nothing(db: TenantSession, tenant: str, documented: Old) -> None:
    talks = add_talks(documented, 7)
    first = run(documented, tenant, batch=3)
    before = everything(db)
    again = run(documented, tenant, batch=2)
    assert everything(db) == before
    assert counts(again) == {t: (read, 0, read, 0) for t, (read, *_) in counts(first).items()}
    assert reasons(again) == {}

    # What is new comes; what is new in a conversation that is there does not, and is told.
    new = documented.add("conversations")
    documented.say(new)
    documented.say(talks[0])
    third = run(documented, tenant)
    assert third.tally.written == {"conversations": 1, "messages": 1}
    assert reasons(third) == {("messages", "skipped", "its conversation is here without it"): 1}
    # And one that was deleted here comes anew.
    ConversationRepository.delete(db, talks[0])
    run(documented, tenant)
    assert ConversationRepository.require(db, talks[0]).message_count == 5


def test_a_dry_run_writes_nothing(db: TenantSession, tenant: str, documented: Old) -> None:
    expected, good = add_bad(documented)
    dry = run(documented, tenant, batch=1, dry_run=True)
    assert [repository.count(db) for repository in TABLES.values()] == [0] * 6
    assert (reasons(dry), dry.tally.written) == (expected, good)
    real = run(documented, tenant)
    assert (counts(real), reasons(real)) == (counts(dry), expected)


def test_what_fails_in_the_middle_is_completed(
    db: TenantSession, tenant: str, documented: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks = add_talks(documented, 7)
    calls = []

    def failing(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Job, "place", failing)
    job = Job(tenant, 2, dry_run=False)
    source = Source(documented.url)
    with source.connection, pytest.raises(KeyboardInterrupt):
        job.run(source)
    monkeypatch.undo()
    done = sorted(talks)[:4]
    assert sorted(row.id for row in db.scalars(select(MODELS["conversations"]))) == done
    assert job.tally.written == {
        "personas": 1,
        "modules": 1,
        "conversations": 4,
        "messages": 16,
        "conversation_states": 4,
        "conversation_memory": 4,
    }
    assert [repository.count(db) for repository in TABLES.values()] == [1, 1, 4, 16, 4, 4]
    rest = run(documented, tenant)
    assert counts(rest)["conversations"] == (7, 3, 4, 0)
    assert counts(rest)["messages"] == (28, 12, 16, 0)
    assert reasons(rest) == {}
    assert [repository.count(db) for repository in TABLES.values()] == [1, 1, 7, 28, 7, 7]


def test_tenants_are_kept_apart(
    db: TenantSession, other: TenantSession, tenant: str, documented: Old
) -> None:
    add_talks(documented, 2)
    run(documented, tenant)
    assert [repository.count(other) for repository in TABLES.values()] == [0] * 6
    name = f"{tenant}-2"
    assert run(documented, name).tally.written == run(documented, f"{name}-3").tally.written
    with database.SessionLocal(tenant_id=name) as second:
        assert everything(second).keys() == everything(db).keys()
        for table in ("personas", "conversations", "messages", "conversation_states"):
            assert stored(second, MODELS[table]) == stored(db, MODELS[table])


@pytest.mark.parametrize("table", MODELS)
def test_a_table_that_is_missing(
    db: TenantSession, tenant: str, documented: Old, table: str
) -> None:
    add_talks(documented, 2)
    documented.create(f"DROP TABLE {table}")
    job = run(documented, tenant)
    found = counts(job)
    assert table not in found
    assert TABLES[table].count(db) == 0
    expected = {
        "personas": {
            ("conversations", "left out", "persona_id: is not there"): 2,
            ("conversation_memory", "left out", "persona_id: is not there"): 2,
        },
        "modules": {("conversation_states", "skipped", "its module is not there"): 2},
        "conversations": {
            (child, "skipped", "its conversation is not there"): count
            for child, count in (
                *(("messages", 8), ("conversation_states", 2)),
                ("conversation_memory", 2),
            )
        },
    }
    assert reasons(job) == expected.get(table, {})


# --- The command ---


def environment(url: str) -> dict[str, str]:
    hidden = ("FORCE_COLOR", "TTY_COMPATIBLE")
    given = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DATABASE_") and name not in hidden
    }
    known = {"DATABASE_URL": url, "DATABASE_CONNECT_RETRIES": "0", "PYTHONPATH": str(ROOT)}
    return given | known | {"COLUMNS": "100"}


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(worker_url: str, tenant: str, tmp_path: Path) -> Command:
    def run_it(*arguments: object, url: str = worker_url) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", str(SCRIPT), "--tenant", tenant, *map(str, arguments)],
            cwd=tmp_path,
            env=environment(url),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run_it


def test_the_command(documented: Old, command: Command) -> None:
    add_talks(documented, 2)
    done = command("--source", documented.url)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert lines[0] == ["table", "read", "written", "already", "there", "skipped"]
    assert lines[2:8] == [
        ["personas", "1", "1", "0", "0"],
        ["modules", "1", "1", "0", "0"],
        ["conversations", "2", "2", "0", "0"],
        ["messages", "8", "8", "0", "0"],
        ["conversation_states", "2", "2", "0", "0"],
        ["conversation_memory", "2", "2", "0", "0"],
    ]
    assert re.fullmatch(r"16 rows in [\d.]+ s: [\d,]+ rows/s", done.stdout.splitlines()[-1])

    secret = documented.say(uuid4(), "a secret")
    dry = command("--source", documented.url, "--dry-run")
    assert (dry.returncode, dry.stderr) == (1, "")
    assert "would write" in dry.stdout
    assert f"messages: skipped: its conversation is not there: 1 ({secret})\n" in dry.stdout
    assert "secret" not in dry.stdout


def test_the_command_tells_what_is_taken_as_utc(created: Old, command: Command) -> None:
    created.add("personas", name="Ava", template="t")
    done = command("--source", created.url)
    assert done.returncode == 0, done.stderr
    assert "taken as UTC: conversation_memory.created_at, " in done.stdout


Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(tenant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """The command, but within this process."""

    def run_it(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tenant", tenant, *arguments])
        try:
            status = import_project2501.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run_it


def test_sources_that_cannot_be_read(main: Main, empty: Old, worker_url: str) -> None:
    nowhere = "postgresql://me:hidden@127.0.0.1:1/nothing"
    for url, reason in (
        (nowhere, "connection refused"),
        (nowhere.replace("hidden", "hid@den"), "must be a PostgreSQL URL, its password percent"),
        (nowhere.replace("hidden", "hid/den"), "connection refused"),
        ("hidden", "must be a PostgreSQL URL"),
        ("sqlite:///hidden", "must be a PostgreSQL URL"),
        (make_url(empty.url).set(database="none").render_as_string(False), "does not exist"),
        (empty.url, "has no table of Project 2501"),
        (worker_url, "is a database of this library"),
    ):
        status, out, errors = main("--source", url)
        assert (status, out) == (2, "")
        (line,) = errors.splitlines()
        assert line.startswith("import_project2501.py: error: --source: ")
        assert reason in line.lower() or reason in line
        assert "hid" not in line
        assert "den" not in line


def test_sources_of_another_form(empty: Old) -> None:
    empty.create("CREATE TABLE messages (id integer, conversation_id uuid)")
    with pytest.raises(SourceError, match=r"^messages has no id of type uuid$"):
        Source(empty.url)
    empty.create("CREATE TABLE conversation_memory (id uuid)")
    empty.create("CREATE TABLE conversation_memories (id uuid)")
    with pytest.raises(SourceError, match=r"^has both "):
        Source(empty.url)


def test_wrong_arguments(main: Main) -> None:
    for arguments in ([], ["--source", "x", "--batch", "0"], ["--source", "x", "--tenant", "a b"]):
        status, _, errors = main(*arguments)
        assert status == 2
        assert "import_project2501.py: error: " in errors


def test_a_target_that_cannot_be_used(documented: Old, command: Command, empty_url: str) -> None:
    add_talks(documented, 1)
    gone = command("--source", documented.url, url="postgresql://me:hidden@127.0.0.1:1/nothing")
    assert gone.returncode == 1
    assert gone.stderr.startswith("stopped: ")
    assert "Traceback" not in gone.stderr
    assert "hidden" not in gone.stderr
    raw = command("--source", documented.url, "--dry-run", url=empty_url)
    assert raw.returncode == 1
    assert "the database's schema is not the one needed" in raw.stderr


def test_killed_in_the_middle_and_run_again(
    db: TenantSession, documented: Old, command: Command, worker_url: str, tenant: str
) -> None:
    add_talks(documented, 120, messages=30)
    process = subprocess.Popen(
        [
            *(sys.executable, str(SCRIPT), "--source", documented.url),
            *("--tenant", tenant, "--batch", "1"),
        ],
        env=environment(worker_url),
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while ConversationRepository.count(db) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = ConversationRepository.count(db)
    assert done < 120
    assert [MessageRepository.count(db), MemoryRepository.count(db)] == [30 * done, done]
    rest = command("--source", documented.url)
    assert (rest.returncode, rest.stderr) == (0, "")
    assert [repository.count(db) for repository in TABLES.values()] == [
        *(1, 1),
        *(120, 3600, 120, 120),
    ]


def test_progress_is_shown_on_a_terminal(documented: Old, worker_url: str, tenant: str) -> None:
    add_talks(documented, 3)
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--source", documented.url, "--tenant", tenant],
        env=environment(worker_url) | {"TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=its,
    )
    os.close(its)
    shown = read_until(ours, None)
    os.close(ours)
    assert process.wait(60) == 0
    assert "importing" in shown
    assert "100%" in shown


# --- Cost ---


def test_statements_grow_with_conversations_not_with_rows(tenant: str, documented: Old) -> None:
    add_talks(documented, 4, messages=1500)
    with counted_statements() as sent:
        job = run(documented, tenant, batch=2)
    assert job.tally.written["messages"] == 6000
    # Of each conversation: two of messages, its update, a state and a memory; a savepoint is two.
    assert len([statement for statement in sent if "SAVEPOINT" not in statement]) == 4 * 5 + 8
    with counted_statements() as sent:
        run(documented, tenant, batch=2)
    assert {statement.split()[0] for statement in sent} == {"SELECT"}
    assert len(sent) == 2 + 2 + 4 * 4


PEAK = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(status)
"""


def test_memory_does_not_grow_with_the_source(
    documented: Old, worker_url: str, tenant: str
) -> None:
    """Of one conversation, which is one transaction."""
    peaks = []
    talk = documented.add("conversations")
    for messages in (100, 6_000):
        documented.connection.execute(
            "INSERT INTO messages (id, conversation_id, role, content)"
            " SELECT gen_random_uuid(), %s, 'user', repeat('All work. ', 1000)"
            " FROM generate_series(1, %s)",
            [talk, messages],
        )
        done = subprocess.run(
            [
                *(sys.executable, "-c", PEAK, sys.executable, str(SCRIPT)),
                *("--source", documented.url, "--tenant", f"{tenant}-{messages}"),
            ],
            env=environment(worker_url),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 40, "of 60 MB of text"
