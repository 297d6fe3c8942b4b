"""Real runs of the OpenAI Agents SDK on our sessions: a model of our own, no network."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest
from agents import OpenAIResponsesCompactionSession
from agents.extensions.memory import AdvancedSQLiteSession, EncryptedSession
from cryptography.fernet import Fernet

from database import (
    InvalidValueError,
    Message,
    MessageRepository,
    NotFoundError,
    SessionLocal,
    get_engine,
)
from database.integrations.openai_agents import DatabaseSession
from tests import openai_agents
from tests.openai_agents import Weatherman, run

pytestmark = pytest.mark.anyio
ours = openai_agents.ours


@pytest.fixture
def model() -> Weatherman:
    return Weatherman()


def messages(tenant: str) -> list[Message]:
    with SessionLocal(tenant_id=tenant) as db:
        return MessageRepository.history(db, "chat")


async def test_runs_with_tools_continue_a_session(
    ours: DatabaseSession, tenant: str, model: Weatherman
) -> None:
    result = await run(ours, model, "Weather in Oslo")
    assert result.final_output == "It is snowing in Oslo."
    again = DatabaseSession("chat", tenant_id=tenant)
    assert (await run(again, model, "Weather in Rome")).final_output == "It is snowing in Rome."
    assert (await run(again, model, "How often did I ask?")).final_output == "3 times."
    kinds = [item.get("role", item.get("type")) for item in await again.get_items()]
    turn = ["user", "function_call", "function_call_output", "assistant"]
    assert kinds == [*turn, *turn, "user", "assistant"]
    assert model.inputs[-1][:-1] == (await again.get_items())[:-2]
    assert set(model.holding_connections) == {0}
    roles = [str(message.role) for message in messages(tenant)]
    assert roles == ["user", "assistant", "tool", "assistant"] * 2 + ["user", "assistant"]
    call, result_ = messages(tenant)[1:3]
    assert call.tool_call_id
    assert call.tool_call_id == result_.tool_call_id


async def test_many_sessions_run_at_once(tenant: str, model: Weatherman) -> None:
    sessions = [DatabaseSession(f"chat {n}", tenant_id=tenant) for n in range(16)]
    for ask in ("Weather in Oslo", "How often did I ask?"):
        results = await asyncio.gather(*(run(session, model, ask) for session in sessions))
    assert {result.final_output for result in results} == {"2 times."}


@pytest.mark.filterwarnings("ignore:coroutine 'run_single_turn' was never awaited")  # the SDK's
async def test_a_run_that_is_cancelled_leaves_a_session_that_goes_on(
    ours: DatabaseSession, model: Weatherman
) -> None:
    for n in range(20):
        call = asyncio.create_task(run(ours, model, f"Weather in {n}"))
        await asyncio.sleep(n / 1000)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    del call
    gc.collect()  # what the SDK left in it warns now, not in another test
    assert get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    assert (await run(ours, model, "Weather in Rome")).final_output == "It is snowing in Rome."


async def test_encrypted(ours: DatabaseSession, tenant: str, model: Weatherman) -> None:
    key = Fernet.generate_key().decode()

    def encrypted(ttl: int = 600) -> EncryptedSession:
        return EncryptedSession("chat", ours, encryption_key=key, ttl=ttl)

    await run(encrypted(), model, "Weather in Oslo")
    assert (await run(encrypted(), model, "How often did I ask?")).final_output == "2 times."
    assert len(await encrypted().get_items(3)) == 3
    for message in messages(tenant):
        assert message.content == ""
        assert message.data
        assert b"Oslo" not in message.data
    popped = await encrypted().pop_item()
    assert popped
    assert popped["content"][0]["text"] == "2 times."
    assert len(await encrypted().get_items()) == 5
    other = EncryptedSession("chat", ours, encryption_key=Fernet.generate_key().decode())
    assert await other.get_items() == []
    await encrypted().clear_session()
    assert await encrypted().get_items() == []


class Responses:
    """The part of OpenAI's client that compacts."""

    def __init__(self) -> None:
        self.responses = self

    async def compact(self, **_: Any) -> Any:
        output = [{"type": "compaction", "id": "cmp_1", "encrypted_content": "short"}]
        return SimpleNamespace(output=output, usage=None)


async def test_compaction(ours: DatabaseSession, model: Weatherman) -> None:
    compacting = OpenAIResponsesCompactionSession("chat", ours, client=Responses())
    await ours.set_metadata({"kept": True})
    await run(compacting, model, "Weather in Oslo")
    await compacting.run_compaction({"force": True, "compaction_mode": "input"})
    assert [item["type"] for item in await ours.get_items()] == ["compaction"]
    assert await ours.get_metadata() == {"kept": True}
    assert (
        await run(compacting, model, "Weather in Rome")
    ).final_output == "It is snowing in Rome."


@pytest.fixture
def theirs() -> Any:
    return AdvancedSQLiteSession(session_id="chat", create_tables=True)


async def test_turns_and_usage_are_as_the_sdk_tells_them(
    ours: DatabaseSession, theirs: Any, model: Weatherman
) -> None:
    shown: list[Any] = []
    for session in (ours, theirs):
        assert await session.get_session_usage() is None
        assert await session.get_turn_usage() == []
        assert await session.get_turn_usage(1) == {}
        assert await session.get_conversation_turns() == []
        for text in ("Weather in Oslo", "How often did I ask?", "Weather in " + "x" * 200):
            result = await run(session, model, text)
            for _ in range(2):
                await session.store_run_usage(result)
        turns = await session.get_conversation_turns()
        found = await session.find_turns_by_content("OSLO")
        for turn in (*turns, *found):
            del turn["timestamp"]
            turn.pop("message_id", None)
        shown.append(
            (
                turns,
                found,
                await session.find_turns_by_content("nowhere"),
                await session.get_session_usage(),
                await session.get_turn_usage(),
                await session.get_turn_usage(3),
                await session.get_turn_usage(4),
            )
        )
    theirs.close()
    assert shown[0] == shown[1]
    assert shown[0][3] == {
        "requests": 5,
        "input_tokens": 500,
        "output_tokens": 50,
        "total_tokens": 550,
        "total_turns": 3,
    }


async def test_usage_stands_where_sums_find_it(
    ours: DatabaseSession, tenant: str, model: Weatherman
) -> None:
    result = await run(ours, model, "Weather in Oslo")
    await ours.store_run_usage(result)
    await ours.store_run_usage(await run(ours, model, "Weather in Rome"), model="another")
    told = [(m.model, m.input_tokens, m.output_tokens) for m in messages(tenant) if m.model]
    assert told == [("weather-1", 200, 20), ("another", 200, 20)]
    assert [m.input_tokens for m in messages(tenant)].count(None) == 6
    await ours.clear_session()
    assert await ours.get_session_usage() is None
    with pytest.raises(NotFoundError, match="nothing of a run"):
        await ours.store_run_usage(result)
    await ours.add_items([{"role": "user", "content": "Hi"}])
    with pytest.raises(NotFoundError, match="nothing of a run"):
        await ours.store_run_usage(result)


async def test_a_turn_s_usage_is_replaced_as_it_goes_on(
    ours: DatabaseSession, tenant: str, model: Weatherman
) -> None:
    first = await run(ours, model, "Weather in Oslo")
    await ours.store_run_usage(first)
    await ours.add_items([{"role": "assistant", "content": "And tomorrow, too."}] * 150)
    await ours.store_run_usage(first)
    assert [m.input_tokens for m in messages(tenant) if m.input_tokens is not None] == [200]
    assert messages(tenant)[-1].model == "weather-1"
    assert (await ours.get_session_usage() or {})["total_turns"] == 1
    assert messages(tenant)[1].extra_data == {"type": "function_call", "name": "get_weather"}


async def test_usage_of_encrypted_runs(ours: DatabaseSession, model: Weatherman) -> None:
    encrypted = EncryptedSession("chat", ours, encryption_key=Fernet.generate_key().decode())
    for _ in range(3):
        await encrypted.store_run_usage(await run(encrypted, model, "Weather in Oslo"))
    found = await ours.get_session_usage()
    assert found
    assert (found["requests"], found["total_turns"]) == (6, 3)
    assert await ours.get_conversation_turns() == []
    total: Any = await ours.get_turn_usage(0)
    assert total["input_tokens"] == 600


async def test_turns_of_images(ours: DatabaseSession) -> None:
    image = {"type": "input_image", "image_url": "data:,", "detail": "auto"}
    content: Any = [{"type": "input_text", "text": "What is this?"}, image]
    await ours.add_items([{"role": "user", "content": content}])
    (turn,) = await ours.get_conversation_turns()
    assert turn["content"] == "What is this?"
    assert turn["full_content"] == content
    assert await ours.find_turns_by_content("WHAT") == [turn]
    with pytest.raises(InvalidValueError, match="search_term"):
        await ours.find_turns_by_content(7)  # type: ignore[arg-type]
