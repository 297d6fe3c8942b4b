"""Sessions of the OpenAI Agents SDK: what they all promise, by the SDK's own one and by ours."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest
from agents import Session, SessionSettings, SQLiteSession
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import sessionmaker

from database import (
    ConversationRepository,
    InvalidReferenceError,
    InvalidValueError,
    Message,
    MessageRepository,
    NotFoundError,
    PersonaRepository,
    SessionLocal,
    TenantSession,
    UserRepository,
    configure,
    get_engine,
    get_settings,
)
from database.integrations.openai_agents import DatabaseSession
from database.integrations.openai_items import FORMAT, item_of, row_of
from database.pool import create_database_engine
from tests import openai_agents
from tests.counting import counted_round_trips

pytestmark = pytest.mark.anyio
ours = openai_agents.ours
session = openai_agents.session_beside(lambda: SQLiteSession("chat"))

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
USER = {"role": "user", "content": "How is the weather in Oslo?"}
CALL = {
    "type": "function_call",
    "call_id": "call_1",
    "name": "get_weather",
    "arguments": '{"city":"Oslo"}',
    "id": "fc_1",
    "status": "completed",
}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "Snow, -3 degrees"}
REASONING = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [{"type": "summary_text", "text": "They ask about Oslo."}],
    "encrypted_content": None,
}
ANSWER = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [
        {"type": "output_text", "text": "It snows.", "annotations": [], "logprobs": []},
        {"type": "output_text", "text": "Take a coat.", "annotations": []},
    ],
}
ITEMS: list[dict[str, Any]] = [
    USER,
    REASONING,
    CALL,
    RESULT,
    ANSWER,
    {"content": "keys in another order", "role": "user"},
    {"role": "developer", "content": "Be brief."},
    {"role": "system", "content": ""},
    {"role": "user", "content": "NUL \x00 and a lone \ud800 surrogate"},
    {"role": "user", "content": [{"type": "input_image", "image_url": PIXEL, "detail": "auto"}]},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]},
    {"type": "computer_call", "id": "cu", "call_id": "call_2", "action": {"type": "screenshot"}},
    {
        "type": "computer_call_output",
        "call_id": "call_2",
        "output": {"type": "computer_screenshot", "image_url": PIXEL},
    },
    {
        "type": "function_call_output",
        "call_id": "call_3",
        "output": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "b"}],
    },
    {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True},
    {"type": "item_reference", "id": "msg_1"},
    {"type": "compaction", "id": "cmp", "encrypted_content": "gAAAA"},
    {"type": "of a newer API", "n": [2**80, -0.0, 1e-7, 1.0, True, None, {}]},
    {"role": ["odd"], "type": 7, "call_id": "x" * 300},
    {"": "no type"},
    {},
]


def numbered(count: int, start: int = 0) -> list[Any]:
    return [{"role": "user", "content": str(n)} for n in range(start, start + count)]


def checked_out() -> int:
    return get_engine().pool.checkedout()  # type: ignore[attr-defined, no-any-return]


def rows(db: TenantSession, thread: str = "chat") -> list[Message]:
    return MessageRepository.history(db, thread)


async def test_is_a_session(session: Any) -> None:
    assert isinstance(session, Session)
    assert session.session_id == "chat"
    assert session.session_settings == SessionSettings()


async def test_is_empty_until_something_is_added(session: Any) -> None:
    assert await session.get_items() == await session.get_items(3) == []
    assert await session.pop_item() is None
    await session.clear_session()
    await session.add_items([])
    assert await session.get_items() == []


async def test_items_come_back_equal_and_in_order(session: Any) -> None:
    await session.add_items(ITEMS)
    found = await session.get_items()
    assert found == ITEMS
    # Equality says nothing of the order of keys, nor of 1 and 1.0, nor of zeros.
    assert json.dumps(found) == json.dumps(ITEMS)
    for item in ITEMS:
        await session.add_items([item])
    assert await session.get_items() == ITEMS * 2
    assert [await session.pop_item() for _ in ITEMS] == ITEMS[::-1]
    assert await session.get_items() == ITEMS


async def test_infinite_numbers_come_back(session: Any) -> None:
    await session.add_items([{"n": [math.inf, -math.inf]}, {"n": math.nan}])
    infinite, nan = await session.get_items()
    assert infinite == {"n": [math.inf, -math.inf]}
    assert math.isnan(nan["n"])


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (1, 1), (9, 9), (10, 10), (11, 10)])
async def test_the_latest_so_many(session: Any, limit: int, expected: int) -> None:
    await session.add_items(numbered(7))
    await session.add_items(numbered(3, 7))
    assert await session.get_items(limit) == numbered(10)[10 - expected :]


@pytest.mark.parametrize("kind", [dict, SessionSettings])
async def test_settings_limit_what_is_read(tenant: str, kind: Any) -> None:
    for session in (
        DatabaseSession("chat", tenant_id=tenant, session_settings=kind(limit=2)),
        SQLiteSession("chat", session_settings=kind(limit=2)),
    ):
        await session.add_items(numbered(5))
        assert await session.get_items() == numbered(2, 3)
        assert await session.get_items(4) == numbered(4, 1)
        assert await session.get_items(0) == []
        session.session_settings = SessionSettings(limit=1)
        assert await session.get_items() == numbered(1, 4)
        session.session_settings = None
        assert await session.get_items() == numbered(5)


async def test_pop_takes_the_latest(session: Any) -> None:
    await session.add_items(numbered(2))
    assert await session.pop_item() == {"role": "user", "content": "1"}
    await session.add_items(numbered(1, 5))
    assert await session.get_items() == [numbered(1)[0], numbered(1, 5)[0]]
    assert await session.pop_item() == {"role": "user", "content": "5"}
    assert await session.pop_item() == {"role": "user", "content": "0"}
    assert await session.pop_item() is None


async def test_clear_and_begin_again(session: Any) -> None:
    await session.add_items(ITEMS)
    await session.clear_session()
    assert await session.get_items() == []
    await session.add_items([USER])
    assert await session.get_items() == [USER]


@pytest.mark.parametrize("bad", [object(), {1, 2}, b"bytes"])
async def test_what_is_no_json_is_refused_and_nothing_written(session: Any, bad: Any) -> None:
    await session.add_items([USER])
    with pytest.raises((TypeError, ValueError)):
        await session.add_items([ANSWER, {"role": "user", "content": bad}, CALL])
    assert await session.get_items() == [USER]


async def test_16_tasks_add_and_pop(session: Any) -> None:
    async def add(task: int) -> None:
        for n in range(5):
            await session.add_items([{"task": task, "n": n, "part": part} for part in range(3)])

    async def pop() -> list[Any]:
        return [await session.pop_item() for _ in range(5)]

    await session.add_items([{"before": n} for n in range(50)])
    done = await asyncio.gather(*(add(t) for t in range(8)), *(pop() for _ in range(8)))
    popped = [item for found in done[8:] for item in found or []]
    left = await session.get_items()
    assert None not in popped
    assert len(popped) == 40
    together = sorted(json.dumps(item) for item in popped + left)
    added = [{"task": t, "n": n, "part": p} for t in range(8) for n in range(5) for p in range(3)]
    assert together == sorted(json.dumps(i) for i in added + [{"before": n} for n in range(50)])
    kept = [(item["task"], item["n"], item["part"]) for item in left if "task" in item]
    # Whose items are left stand as they were added, each call's next to each other.
    for (task, n, part), (next_task, next_n, next_part) in pairwise(kept):
        if next_part:
            assert (next_task, next_n, next_part) == (task, n, part + 1)


# Ours alone


@pytest.mark.parametrize("bad", ["text", None, 7, [("role", "user")], object()])
async def test_what_is_no_dict_is_refused(ours: DatabaseSession, bad: Any) -> None:
    with pytest.raises(InvalidValueError, match="items: must be dicts"):
        await ours.add_items([USER, bad])
    assert await ours.get_items() == []
    assert not (await DatabaseSession.list_sessions(tenant_id=ours.tenant_id)).items


async def test_circles_and_depths_are_refused(ours: DatabaseSession) -> None:
    circle: dict[str, Any] = {}
    circle["in"] = circle
    deep: Any = {}
    for _ in range(100_000):
        deep = {"in": deep}
    for bad in (circle, deep):
        with pytest.raises(InvalidValueError, match="items: must be JSON"):
            await ours.add_items([bad])
    while deep:  # else its end would be as deep
        deep = deep["in"]


@pytest.mark.parametrize("limit", [-1, True, "3", 2.0])
async def test_limits_are_checked(ours: DatabaseSession, limit: Any) -> None:
    with pytest.raises(InvalidValueError, match="limit"):
        await ours.get_items(limit)


@pytest.mark.parametrize("bad", [7, None, "", "x" * 256])
async def test_session_ids_are_checked(tenant: str, bad: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"session_id|thread_id"):
        await DatabaseSession(bad, tenant_id=tenant).add_items([USER])


async def test_tenants_and_users_are_checked(tenant: str) -> None:
    with pytest.raises(InvalidValueError, match="tenant_id"):
        await DatabaseSession("chat", tenant_id="no tenant!").get_items()
    with pytest.raises(InvalidValueError, match="user_id"):
        DatabaseSession("chat", user_id="Ada")
    with pytest.raises(InvalidValueError, match="user_id"):
        await DatabaseSession.list_sessions(user_id="Ada")
    with pytest.raises(InvalidReferenceError, match="user_id"):
        await DatabaseSession("chat", tenant_id=tenant, user_id=uuid4()).add_items([USER])
    assert not (await DatabaseSession.list_sessions(tenant_id=tenant)).items


async def test_columns_hold_what_search_and_turns_need(
    ours: DatabaseSession, db: TenantSession
) -> None:
    await ours.add_items([USER, REASONING, CALL, RESULT, ANSWER])
    user, reasoning, call, result, answer = rows(db)
    assert [str(m.role) for m in rows(db)] == [
        "user",
        "assistant",
        "assistant",
        "tool",
        "assistant",
    ]
    assert user.content == USER["content"]
    assert (user.data, user.data_format, user.extra_data) == (None, None, None)
    assert (reasoning.content, reasoning.thinking) == ("", "They ask about Oslo.")
    assert (call.content, call.tool_call_id) == ("", "call_1")
    assert call.extra_data == {"type": "function_call", "name": "get_weather"}
    assert (result.content, result.tool_call_id) == ("Snow, -3 degrees", "call_1")
    assert answer.content == "It snows.\nTake a coat."
    assert answer.data_format == FORMAT
    found = await ours.search("snow OR coat")
    assert {message.position for message in found} == {4, 5}
    assert not (await DatabaseSession("other", tenant_id=ours.tenant_id).search("snow")).items


async def test_one_round_trip_a_call(ours: DatabaseSession) -> None:
    await ours.add_items([USER])
    for call in (
        lambda: ours.add_items([ANSWER]),
        lambda: ours.add_items([USER, ANSWER]),
        ours.get_items,
        lambda: ours.get_items(2),
    ):
        with counted_round_trips() as trips:
            await call()
        assert trips.count == 1
    assert checked_out() == 0


async def test_first_writes_at_once_make_one_conversation(tenant: str) -> None:
    sessions = [DatabaseSession("chat", tenant_id=tenant) for _ in range(16)]
    await asyncio.gather(*(s.add_items(numbered(2, 2 * n)) for n, s in enumerate(sessions)))
    assert len((await DatabaseSession.list_sessions(tenant_id=tenant)).items) == 1
    items = await sessions[0].get_items()
    assert sorted(int(item["content"]) for item in items) == [*range(32)]
    for session in sessions:
        assert await session.get_items() == items


async def test_continues_in_another_process(ours: DatabaseSession, tenant: str) -> None:
    await ours.add_items(ITEMS)
    again = DatabaseSession("chat", tenant_id=tenant)
    assert await again.get_items() == ITEMS
    assert await again.pop_item() == ITEMS[-1]
    assert await ours.get_items() == ITEMS[:-1]


async def test_tenants_are_apart(ours: DatabaseSession) -> None:
    other = DatabaseSession("chat", tenant_id=f"other-{uuid4().hex[:8]}")
    await ours.add_items([USER])
    assert await other.get_items() == []
    assert await other.pop_item() is None
    await other.clear_session()
    await other.add_items([ANSWER])
    await other.clear_session()
    assert await ours.get_items() == [USER]


async def test_another_users_conversation_is_not_found(tenant: str, db: TenantSession) -> None:
    ada, bob = (UserRepository.create(db).id for _ in range(2))
    hers = DatabaseSession("chat", tenant_id=tenant, user_id=str(ada))
    await hers.add_items([USER])
    his = DatabaseSession("chat", tenant_id=tenant, user_id=bob)
    for call in (his.get_items, his.pop_item, his.clear_session, his.get_metadata):
        with pytest.raises(NotFoundError, match="another user"):
            await call()
    for write in (his.add_items([USER]), his.set_metadata({})):
        with pytest.raises(NotFoundError, match="another user"):
            await write
    assert await hers.get_items() == [USER]
    page = await DatabaseSession.list_sessions(tenant_id=tenant, user_id=ada)
    assert [found.thread_id for found in page] == ["chat"]
    assert not (await DatabaseSession.list_sessions(tenant_id=tenant, user_id=bob)).items


async def test_a_conversation_deleted_meanwhile_is_made_again(
    ours: DatabaseSession, db: TenantSession
) -> None:
    await ours.add_items([USER])
    ConversationRepository.delete(db, "chat")
    assert await ours.get_items() == []
    await ours.add_items([ANSWER])
    assert await ours.get_items() == [ANSWER]
    ConversationRepository.delete(db, "chat")
    await ours.add_items([USER, CALL])
    ConversationRepository.delete(db, "chat")
    await DatabaseSession("chat", tenant_id=ours.tenant_id).add_items([RESULT])
    assert await ours.get_items() == [RESULT]
    assert await ours.pop_item() == RESULT


async def test_goes_on_with_what_the_application_wrote(
    ours: DatabaseSession, db: TenantSession
) -> None:
    persona = PersonaRepository.create(db, name="Ada", template="", first_message="Hello!")
    chat = ConversationRepository.create(db, "chat", persona_id=persona.id)
    MessageRepository.append(db, chat.id, role="user", content="Hi", model="m", extra_data={"a": 1})
    MessageRepository.append(db, chat.id, role="tool", content="3", tool_call_id="call")
    await ours.add_items([ANSWER])
    assert await ours.get_items() == [
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Hi"},
        {"type": "function_call_output", "call_id": "call", "output": "3"},
        ANSWER,
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"data": b"{}", "data_format": "openai-agents/2"},
        {"data": b"{}"},
        {"data_format": FORMAT},
        {"data": b"{", "data_format": FORMAT},
        {"data": b"7", "data_format": FORMAT},
        {"data": b"{}, {}", "data_format": FORMAT},
        {"data": b"\xff", "data_format": FORMAT},
        {"role": "tool"},
    ],
)
async def test_what_cannot_be_read_is_left_out_or_an_error(
    ours: DatabaseSession, db: TenantSession, caplog: pytest.LogCaptureFixture, fields: Any
) -> None:
    await ours.add_items(numbered(3))
    foreign = {"role": "assistant", "content": "a secret", **fields}
    MessageRepository.append(db, "chat", **foreign)
    await ours.add_items(numbered(1, 3))
    MessageRepository.append(db, "chat", **foreign)
    with caplog.at_level(logging.WARNING, "database.integrations"):
        assert await ours.get_items() == numbered(4)
        assert await ours.get_items(3) == numbered(3, 1)
        assert [*{record.args[1] for record in caplog.records}] == [4, 6]  # type: ignore[index]
        assert "secret" not in caplog.text
        assert await ours.pop_item() == numbered(1, 3)[0]
        assert await ours.pop_item() == numbered(1, 2)[0]
    strict = DatabaseSession("chat", tenant_id=ours.tenant_id, strict=True)
    for call in (strict.get_items, strict.pop_item):
        with pytest.raises(InvalidValueError, match=r"data|tool_call_id"):
            await call()
    assert [message.position for message in rows(db)] == [1, 2, 4, 6]
    assert checked_out() == 0


async def test_clear_keeps_the_conversation(ours: DatabaseSession, db: TenantSession) -> None:
    await ours.set_metadata({"title": "Oslo"})
    await ours.add_items(numbered(3))
    MessageRepository.deactivate(db, "chat")
    await ours.clear_session()
    chat = ConversationRepository.get_by_thread_id(db, "chat")
    assert chat
    assert (chat.message_count, chat.last_message) == (0, None)
    assert MessageRepository.restore(db, chat.id) == 0
    assert await ours.get_metadata() == {"title": "Oslo"}
    await ours.add_items([USER])
    assert [message.position for message in rows(db)] == [4]


async def test_metadata(ours: DatabaseSession) -> None:
    assert await ours.get_metadata() == {}
    await ours.set_metadata({"a": {"b": [1]}})
    await ours.set_metadata({"c": None})
    assert await ours.get_metadata() == {"c": None}
    with pytest.raises(InvalidValueError, match="metadata"):
        await ours.set_metadata([])  # type: ignore[arg-type]
    assert await ours.get_items() == []


async def test_sessions_are_listed_by_pages(tenant: str) -> None:
    for n in range(5):
        await DatabaseSession(f"chat {n}", tenant_id=tenant).add_items([USER])
    await DatabaseSession("chat 1", tenant_id=tenant).add_items([USER])
    found, cursor = [], None
    while True:
        page = await DatabaseSession.list_sessions(tenant_id=tenant, limit=2, cursor=cursor)
        found += [conversation.thread_id for conversation in page]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == [f"chat {n}" for n in (1, 4, 3, 2, 0)]


async def test_20_mb_and_many_images(ours: DatabaseSession, db: TenantSession) -> None:
    large = {"type": "function_call_output", "call_id": "call_1", "output": "läßt " * 4_000_000}
    image = {"type": "input_image", "image_url": PIXEL + "A" * 5_000_000}
    items: list[Any] = [CALL, large, {"role": "user", "content": [image] * 3}, ANSWER]
    await ours.add_items(items)
    await ours.add_items([large])
    assert await ours.get_items() == [*items, large]
    assert await ours.pop_item() == large
    assert rows(db)[2].content == ""


async def test_10_000_items(ours: DatabaseSession) -> None:
    many = numbered(10_000)
    await ours.add_items(many)
    assert await ours.get_items() == many
    assert await ours.get_items(5_001) == many[4_999:]


@pytest.mark.parametrize("known", [True, False])
async def test_a_cancelled_write_is_done_or_not_at_all(
    tenant: str, worker_url: str, *, known: bool
) -> None:
    configure(url=worker_url, pool_size=2, max_overflow=0)
    session = DatabaseSession("chat", tenant_id=tenant)
    if known:
        await session.add_items(numbered(2, -2))
    for n in range(0, 60, 2):
        call = asyncio.create_task(session.add_items(numbered(2, n)))
        await asyncio.sleep(n / 20_000)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert checked_out() == 0
    items = [int(item["content"]) for item in await session.get_items()]
    assert items == sorted(items)
    assert items[1::2] == [n + 1 for n in items[::2]]
    await session.add_items([USER])
    assert (await session.get_items(1)) == [USER]


async def test_a_database_of_one_s_own(tenant: str, fresh_url: str) -> None:
    engine = create_database_engine(fresh_url, get_settings())
    own = sessionmaker(engine, class_=TenantSession)
    session = DatabaseSession("chat", tenant_id=tenant, sessions=own)
    await session.add_items([USER])
    assert await session.get_items() == [USER]
    assert len(await DatabaseSession.list_sessions(tenant_id=tenant, sessions=own)) == 1
    assert await DatabaseSession("chat", tenant_id=tenant).get_items() == []
    engine.dispose()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
known_keys = st.sampled_from(
    ["role", "type", "content", "output", "summary", "call_id", "name", "user", "text"]
)
some_items = st.dictionaries(
    known_keys | st.text(),
    json_values
    | known_keys
    | st.sampled_from(["user", "assistant", "tool", "reasoning", "function_call_output"])
    | st.lists(st.dictionaries(known_keys, json_values)),
)


@given(some_items)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_object_round_trips(tenant: str, item: dict[str, Any]) -> None:
    with SessionLocal(tenant_id=tenant) as db:
        ConversationRepository.get_or_create(db, "chat")
        message = MessageRepository.append(db, "chat", **row_of(item))
        db.expunge_all()
        (body,) = MessageRepository.bodies(db, "chat", limit=1)
        for found in (item_of(MessageRepository.require(db, message.id)), item_of(body)):
            assert json.dumps(found) == json.dumps(item)
