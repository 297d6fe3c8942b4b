"""What the documents show runs as it stands there: Python on a real database, and commands."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import database
from database import (
    ApiKeyRepository,
    ConversationRepository,
    IdentityRepository,
    MessageRepository,
    SessionLocal,
    UserRepository,
)
from tests.cli import ROOT, invoke
from tests.openai_agents import Weatherman, get_weather

FIRST = "database"  # the README's own heading: what its sections go on from
FRAMEWORKS = ("Pydantic AI", "OpenAI Agents SDK", "LangChain")
MOST_LINES = 10
ASKING = {"clear", "delete", "delete-non-admins", "downgrade", "erase", "purge", "revoke"}
OF_SCHEMA = {"check", "current", "doctor", "downgrade", "history-of-schema", "sql", "upgrade"}


class Block(NamedTuple):
    file: str
    section: str
    language: str
    code: str


def blocks(path: Path) -> list[Block]:
    section, found = "", []
    # A comment in a block begins as a heading does, so blocks are taken first.
    for language, code, heading in re.findall(
        r"^```(\w+)\n(.*?)^```$|^#+ (.+?)$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE
    ):
        section = heading or section
        if code:
            found.append(Block(path.name, section, language, code))
    return found


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
BEGINNING = next(block for block in PYTHON if block.section == FIRST)
SECTIONS = list(dict.fromkeys(block[:2] for block in PYTHON))
COMMANDS = dict.fromkeys(
    part.strip()
    for block in BLOCKS
    if block.language == "sh"
    for line in block.code.splitlines()
    for part in line.partition("#")[0].split("&&")
    if part.strip().startswith("database ")
)


# What the README leaves to its reader: an agent, and what a model makes of texts


def conversation_to_remember(names: dict[str, Any]) -> dict[str, Any]:
    texts = [{"role": "user", "content": f"The dog says {n}"} for n in range(40)]
    MessageRepository.append_many(names["db"], names["chat"].id, texts)
    return {"summary": lambda window: window[0].content, "embed": lambda _: [1.0] * 1536}


def pydantic_ai_agent(_names: dict[str, Any]) -> dict[str, Any]:
    from pydantic_ai import Agent
    from pydantic_ai.models.test import TestModel

    return {"agent": Agent(TestModel())}


def openai_agent(_names: dict[str, Any]) -> dict[str, Any]:
    from agents import Agent

    return {"agent": Agent("shop", model=Weatherman(), tools=[get_weather])}


def langchain_agent(_names: dict[str, Any]) -> dict[str, Any]:
    from langchain_core.messages import AIMessage
    from langchain_core.runnables import RunnableLambda

    return {"agent": RunnableLambda(lambda asked: AIMessage(f"{len(asked['history'])} before"))}


GIVEN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Memories": conversation_to_remember,
    "Pydantic AI": pydantic_ai_agent,
    "OpenAI Agents SDK": openai_agent,
    "LangChain": langchain_agent,
}


def run(block: Block, names: dict[str, Any]) -> None:
    code = compile(block.code, block.section, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    with asyncio.Runner() as runner:
        runner.get_loop()  # so that Pydantic AI's run_sync() makes none that nobody closes
        waiting = eval(code, names)
        if inspect.iscoroutine(waiting):
            runner.run(waiting)


@pytest.fixture
def reader(
    worker_url: str, tenant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What somebody has who has run the README's first snippet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    database.configure(url=worker_url, tenant_id=tenant)
    names: dict[str, Any] = {}
    exec("from database import *", names)
    run(BEGINNING, names)
    return names


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")
@pytest.mark.parametrize(("file", "section"), SECTIONS)
def test_snippets_run_as_they_are_written(reader: dict[str, Any], file: str, section: str) -> None:
    if section in GIVEN:
        reader |= GIVEN[section](reader)
    for block in PYTHON:
        if block[:2] == (file, section):
            run(block, reader)


@pytest.mark.parametrize("section", FRAMEWORKS)
def test_frameworks_are_shown_in_few_lines(section: str) -> None:
    shown = [block.code for block in PYTHON if block.section == section]
    assert len(shown) == (2 if section == "Pydantic AI" else 1)
    for code in shown:
        assert len(code.splitlines()) <= MOST_LINES


def test_the_web_service_answers(reader: dict[str, Any]) -> None:
    from fastapi.testclient import TestClient

    run(next(block for block in PYTHON if block.section == "FastAPI"), reader)
    thread = reader["chat"].thread_id
    answer = TestClient(reader["app"]).get(f"/conversations/{thread}/messages").json()
    assert [message["role"] for message in answer] == ["user", "assistant"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_they_are_written(
    request: pytest.FixtureRequest,
    tenant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    args = shlex.split(command)[1:]
    # What changes the schema is harmless only to a database of its own.
    where = "fresh_url" if args[0] in OF_SCHEMA else "worker_url"
    database.configure(url=request.getfixturevalue(where), tenant_id=tenant)
    with SessionLocal() as db:
        user = UserRepository.create(db, email="ada@example.com")
        for subject in ("12345", "5000000000"):
            IdentityRepository.create(db, user_id=user.id, provider="telegram", subject=subject)
        chat = ConversationRepository.create(db, "THREAD", user_id=user.id)
        MessageRepository.append(db, chat.id, role="user", content="Hello")
        key = ApiKeyRepository.create(db, user.id).api_key.id
    args = [str(key) if arg == "KEY" else arg for arg in args]
    invoke(*args, *(["--yes"] if ASKING.intersection(args) else []))
