"""Histories of Pydantic AI: written, read back exactly, and gone on from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from pydantic_ai import Agent
from pydantic_ai.messages import (
    BinaryContent,
    ImageUrl,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    RetryFeedbackPart,
    RetryInfo,
    SystemPromptPart,
    TextContent,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.usage import RequestUsage

from database import (
    Conversation,
    ConversationRepository,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    Message,
    MessageRepository,
    SessionLocal,
    TenantSession,
    UnreadableMessageError,
    configure,
)
from database.integrations.pydantic_ai import append_history, clear, load_history
from tests.counting import counted_round_trips, counted_statements
from tests.pydantic_ai_messages import as_stored, messages
from tests.test_conformance import idle, tenant_of

FORMAT = "pydantic-ai/1"
SECRET = "the secret of the message"


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    """The event loop that `run_sync` runs in, and leaves open."""
    made = asyncio.new_event_loop()
    asyncio.set_event_loop(made)
    yield
    asyncio.set_event_loop(None)
    made.close()


@pytest.fixture
def chat(db: TenantSession) -> Conversation:
    return ConversationRepository.create(db)


def said(text: str) -> ModelMessage:
    return ModelRequest(parts=[UserPromptPart(text)])


def answered(text: str) -> ModelMessage:
    return ModelResponse(parts=[TextPart(text)])


def row(db: TenantSession, chat: Conversation, message: ModelMessage) -> Message:
    """The row of a message, as another session reads it."""
    (made,) = append_history(db, chat.id, [message])
    with SessionLocal(tenant_id=tenant_of(db)) as fresh:
        found = MessageRepository.require(fresh, made.id)
        assert found.to_dict() == made.to_dict()
        return found


def corrupt(db: TenantSession, chat: Conversation, data: bytes | None, format_: str) -> Message:
    return MessageRepository.append(
        db, chat.id, role="user", content=SECRET, data=data, data_format=format_
    )


# Round trips


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(given=messages)
def test_what_was_appended_is_loaded_equal(db: TenantSession, given: list[ModelMessage]) -> None:
    chat = ConversationRepository.create(db)
    rows = append_history(db, chat.id, given)
    assert [row.position for row in rows] == list(range(1, len(given) + 1))
    with SessionLocal(tenant_id=tenant_of(db)) as fresh:
        loaded = load_history(fresh, chat.id, strict=True)
    assert loaded == as_stored(given)
    assert loaded.skipped == []


def test_data_is_what_the_framework_itself_writes(db: TenantSession, chat: Conversation) -> None:
    given: list[ModelMessage] = [said("a\0é"), answered("b")]
    rows = append_history(db, chat.id, given)
    data = [bytes(row.data or b"") for row in rows]
    assert b"[" + b",".join(data) + b"]" == ModelMessagesTypeAdapter.dump_json(given)
    assert {row.data_format for row in rows} == {FORMAT}


def test_text_that_postgresql_cannot_store_is_exact(db: TenantSession, chat: Conversation) -> None:
    """Also what JSON proper has no way to say; but not in the keys of objects."""
    key = 'a\0"'
    bad = 'a\0b\ud800c\udfff\\ud800"'
    given: list[ModelMessage] = [
        ModelRequest(parts=[UserPromptPart([bad, ImageUrl("https://example.com/a.png")])]),
        ModelResponse(
            parts=[
                ThinkingPart(bad),
                TextPart(bad),
                ToolCallPart("t", {key: [bad, 1.5]}, "c"),
                ToolCallPart("t", bad, "d"),
            ],
            model_name=bad,
            usage=RequestUsage(input_tokens=1, details={key: 1}),
        ),
        ModelRequest(
            parts=[ToolReturnPart("t", {"a": bad}, bad), ToolReturnPart("t", b"\xff\0", "d")]
        ),
        ModelRequest(parts=[RetryFeedbackPart(bad, retry=RetryInfo(cause="model_retry"))]),
        ModelRequest(parts=[UserPromptPart([BinaryContent(b"\0\xff", media_type="text/plain")])]),
        said("\\ud800 written out"),
    ]
    append_history(db, chat.id, given)
    loaded = load_history(db, chat.id, strict=True)
    # The framework reads bytes of a tool as their base64, whatever else stands around them.
    given[2].parts[1].content = "_wA="  # type: ignore[misc, union-attr]
    assert loaded == given
    shown = MessageRepository.history(db, chat.id)
    clean = 'a\ufffdb\ufffdc\ufffd\\ud800"'
    assert [shown[0].content, shown[1].content, shown[1].thinking] == [clean] * 3


def test_unstorable_text_is_an_error_if_it_is_to_be(worker_url: str, tenant: str) -> None:
    configure(url=worker_url, unstorable="error")
    with SessionLocal(tenant_id=tenant) as db:
        chat = ConversationRepository.create(db)
        with pytest.raises(InvalidValueError, match=r"^content: ") as raised:
            append_history(db, chat.id, [said("good"), said(f"{SECRET}\0")])
        assert SECRET not in str(raised.value)
        assert load_history(db, chat.id) == []


def test_a_large_tool_result(db: TenantSession, chat: Conversation) -> None:
    large = "가나다 large \0" * 1_300_000
    assert len(large.encode()) > 20_000_000
    given: list[ModelMessage] = [
        ModelRequest(parts=[ToolReturnPart("t", large, "c")]),
        ModelRequest(parts=[ToolReturnPart("t", {"x": large}, "d")]),
    ]
    append_history(db, chat.id, given)
    assert load_history(db, chat.id, strict=True) == given


def test_nothing_is_appended_and_loaded_too(db: TenantSession, chat: Conversation) -> None:
    assert append_history(db, chat.id, []) == []
    assert load_history(db, chat.id) == []
    empty: list[ModelMessage] = [ModelRequest(parts=[]), ModelResponse(parts=[])]
    rows = append_history(db, chat.id, empty)
    assert [(row.role, row.content) for row in rows] == [("system", ""), ("assistant", "")]
    assert load_history(db, chat.id) == as_stored(empty)
    assert load_history(db, uuid4()) == []


# Columns


def test_columns_of_a_users_message(db: TenantSession, chat: Conversation) -> None:
    request = ModelRequest(
        parts=[
            SystemPromptPart("Be kind."),
            UserPromptPart("Hello"),
            UserPromptPart(
                [
                    "one",
                    ImageUrl("https://example.com/a.png"),
                    TextContent("two", metadata={"m": 1}),
                ]
            ),
        ],
        run_id="run 1",
    )
    found = row(db, chat, request)
    assert (found.role, found.content) == ("user", "Hello\n\none\n\ntwo")
    assert (found.run_id, found.tool_call_id, found.model) == ("run 1", None, None)
    assert (found.input_tokens, found.output_tokens, found.thinking) == (None, None, None)
    assert found.data_format == FORMAT


def test_columns_of_an_answer(db: TenantSession, chat: Conversation) -> None:
    response = ModelResponse(
        parts=[ThinkingPart("Hm."), TextPart("Yes"), TextPart("!"), ToolCallPart("t", {}, "call")],
        usage=RequestUsage(input_tokens=12, output_tokens=3),
        model_name="model-1",
        run_id="run 1",
    )
    found = row(db, chat, response)
    assert (found.role, found.content, found.thinking) == ("assistant", "Yes!", "Hm.")
    assert (found.input_tokens, found.output_tokens) == (12, 3)
    assert (found.model, found.run_id, found.tool_call_id) == ("model-1", "run 1", "call")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([ToolReturnPart("t", {"a": 1}, "c")], ("tool", '{"a":1}', "c")),
        ([ToolReturnPart("t", "x", "c"), ToolReturnPart("t", "y", "d")], ("tool", "x\n\ny", None)),
        ([UserPromptPart("And?"), ToolReturnPart("t", "x", "c")], ("tool", "And?\n\nx", "c")),
        ([SystemPromptPart("S"), ToolReturnPart("t", "x", "c")], ("tool", "x", "c")),
        ([ToolReturnPart("t", "No.", "c", outcome="retried")], ("tool", '{"error":"No."}', "c")),
        ([SystemPromptPart("A"), SystemPromptPart("B")], ("system", "A\n\nB", None)),
        ([RetryFeedbackPart("x", retry=RetryInfo(cause="no_output"))], ("system", ..., None)),
    ],
)
def test_columns_of_other_requests(
    db: TenantSession, chat: Conversation, parts: Any, expected: tuple[Any, ...]
) -> None:
    role, content, call = expected
    found = row(db, chat, ModelRequest(parts=parts))
    assert (found.role, found.tool_call_id) == (role, call)
    assert content is ... or found.content == content


def test_what_does_not_fit_a_column_is_in_the_data(db: TenantSession, chat: Conversation) -> None:
    long = "x" * 256
    response = ModelResponse(
        parts=[ToolCallPart("t", {}, long)],
        usage=RequestUsage(input_tokens=2**31, output_tokens=-1),
        model_name=long,
        run_id=long,
    )
    found = row(db, chat, response)
    assert {found.tool_call_id, found.model, found.run_id, found.input_tokens} == {None}
    assert found.output_tokens is None
    assert load_history(db, chat.id) == [response]


def test_a_response_without_usage_counts_no_tokens(db: TenantSession, chat: Conversation) -> None:
    assert row(db, chat, answered("x")).input_tokens is None


# What cannot be read

BAD = {
    "no JSON": (b"\xff\0", FORMAT, "its data is corrupt"),
    "nothing": (None, FORMAT, "its data is corrupt"),
    "empty": (b"", FORMAT, "its data is corrupt"),
    "cut off": (b'{"kind":"request","parts":[', FORMAT, "its data is corrupt"),
    "no message": (
        b'{"kind":"other","x":"' + SECRET.encode() + b'"}',
        FORMAT,
        "its data is corrupt",
    ),
    "two messages": (
        b'{"kind":"request","parts":[]},{"kind":"request","parts":[]}',
        FORMAT,
        "its data is corrupt",
    ),
    "half a surrogate": (b'{"kind":"request","parts":["\\ud800"]}', FORMAT, "its data is corrupt"),
    "too deep": (b'["\\ud800",' + b"[" * 200_000, FORMAT, "its data is corrupt"),
    "newer": (
        b'{"kind":"request","parts":[]}',
        "pydantic-ai/2",
        "its format is of another version",
    ),
    "older": (b"", "pydantic-ai/", "its format is of another version"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_skipped_and_reported(
    db: TenantSession,
    chat: Conversation,
    caplog: pytest.LogCaptureFixture,
    bad: tuple[bytes | None, str, str],
) -> None:
    data, format_, reason = bad
    append_history(db, chat.id, [said("a")])
    made = corrupt(db, chat, data, format_)
    append_history(db, chat.id, [answered("b")])
    with caplog.at_level(logging.WARNING):
        loaded = load_history(db, chat.id)
    assert [message.parts[0].content for message in loaded] == ["a", "b"]  # type: ignore[union-attr]
    assert loaded.skipped == [(made.id, 2, reason)]
    (record,) = caplog.records
    said_so = record.getMessage()
    assert said_so == f"1 of 3 messages cannot be read: {made.id} ({reason})"
    assert SECRET not in caplog.text
    with pytest.raises(UnreadableMessageError) as raised:
        load_history(db, chat.id, strict=True)
    assert isinstance(raised.value, DatabaseError)
    assert (raised.value.id, raised.value.position, raised.value.reason) == (made.id, 2, reason)
    assert str(raised.value) == f"message {made.id} at position 2: {reason}"
    assert raised.value.__cause__ is None
    assert idle(db)


def test_only_what_is_loaded_is_reported(db: TenantSession, chat: Conversation) -> None:
    corrupt(db, chat, b"x", FORMAT)
    append_history(db, chat.id, [said("a"), said("b")])
    assert load_history(db, chat.id, limit=2).skipped == []
    assert len(load_history(db, chat.id, limit=3).skipped) == 1


# What others wrote


def test_rows_of_others_are_read_by_role_and_text(db: TenantSession, chat: Conversation) -> None:
    rows = MessageRepository.append_many(
        db,
        chat.id,
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello", "run_id": "r"},
            {
                "role": "assistant",
                "content": "Hi",
                "thinking": "Hm",
                "model": "m",
                "input_tokens": 3,
                "output_tokens": 4,
                "data": b"\xff",
                "data_format": "other/7",
            },
            {"role": "assistant", "content": ""},
            {"role": "tool", "content": "42", "tool_call_id": "c"},
            {"role": "tool", "content": "43"},
        ],
    )
    append_history(db, chat.id, [said("last")])
    times = [row.created_at for row in rows]
    usage = RequestUsage(input_tokens=3, output_tokens=4)
    *found, last = load_history(db, chat.id, strict=True)
    assert found == [
        ModelRequest([SystemPromptPart("Be kind.", timestamp=times[0])], timestamp=times[0]),
        ModelRequest([UserPromptPart("Hello", timestamp=times[1])], timestamp=times[1], run_id="r"),
        ModelResponse(
            [ThinkingPart("Hm"), TextPart("Hi")], usage=usage, model_name="m", timestamp=times[2]
        ),
        ModelResponse([], timestamp=times[3]),
        ModelRequest([ToolReturnPart("tool", "42", "c", timestamp=times[4])], timestamp=times[4]),
        ModelRequest(
            [ToolReturnPart("tool", "43", str(rows[5].id), timestamp=times[5])],
            timestamp=times[5],
        ),
    ]
    assert last.parts[0].content == "last"  # type: ignore[union-attr]


def test_an_agent_goes_on_from_rows_of_others(db: TenantSession, chat: Conversation) -> None:
    for role in ("system", "user", "assistant", "tool", "user", "assistant"):
        MessageRepository.append(db, chat.id, role=role, content=f"a {role}")
    result = Agent(TestModel(custom_output_text="So be it.")).run_sync(
        "And now?", message_history=load_history(db, chat.id)
    )
    append_history(db, chat.id, result.new_messages())
    rows = MessageRepository.history(db, chat.id)
    assert [(row.role, row.content) for row in rows[-2:]] == [
        ("user", "And now?"),
        ("assistant", "So be it."),
    ]


# Agents


def weather_model(seen: list[list[ModelMessage]]) -> FunctionModel:
    """A model that asks the tool first, and then says what it was told."""

    def answer(history: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        seen.append(list(history))
        last = history[-1].parts[-1]
        if isinstance(last, ToolReturnPart):
            return ModelResponse(parts=[TextPart(f"It is {last.content}.")])
        return ModelResponse(parts=[ToolCallPart("weather", {"city": "Ulm"})])

    return FunctionModel(answer, model_name="weather-model")


def test_an_agent_with_a_tool_turn_by_turn(db: TenantSession, chat: Conversation) -> None:
    seen: list[list[ModelMessage]] = []
    agent = Agent(weather_model(seen), instructions="Be short.")

    @agent.tool_plain
    def weather(city: str) -> dict[str, Any]:
        return {"city": city, "degrees": 20}

    everything: list[ModelMessage] = []
    for turn in range(1, 4):
        with SessionLocal(tenant_id=tenant_of(db)) as session:
            history = load_history(session, chat.id, strict=True)
            assert history == as_stored(everything)
            result = agent.run_sync(f"Question {turn}", message_history=history)
            append_history(session, chat.id, result.new_messages())
            assert idle(session)
        everything = result.all_messages()
        assert len(everything) == 4 * turn
    rows = MessageRepository.history(db, chat.id)
    assert [row.role for row in rows] == ["user", "assistant", "tool", "assistant"] * 3
    assert rows[1].tool_call_id == rows[2].tool_call_id is not None
    assert len({row.run_id for row in rows}) == 3
    assert {row.model for row in rows if row.role == "assistant"} == {"weather-model"}
    assert all(row.input_tokens for row in rows if row.role == "assistant")
    page = MessageRepository.search(db, "degrees", conversation_id=chat.id, role="tool")
    assert len(page.items) == 3


def test_turns_never_part_a_result_from_its_call(db: TenantSession, chat: Conversation) -> None:
    agent = Agent(weather_model([]))

    @agent.tool_plain
    def weather(city: str) -> str:
        return city

    for turn in range(3):
        append_history(db, chat.id, agent.run_sync(f"Question {turn}").new_messages())
    for turns in (1, 2, 3, 4):
        found = load_history(db, chat.id, turns=turns)
        assert len(found) == 4 * min(turns, 3)
        first = found[0].parts[0]
        assert isinstance(first, UserPromptPart)
        assert first.content == f"Question {max(0, 3 - turns)}"


# Appending, clearing, tenants


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ([said("a"), "text"], "messages.1"),
        ([None], "messages.0"),
        ([{"kind": "request", "parts": []}], "messages.0"),
        (said("a"), "messages"),
        ("text", "messages.0"),
        (None, "messages"),
        ([ModelRequest(parts=[], metadata={"x": object()})], "messages.0"),
        ([ModelRequest(parts=[ToolReturnPart("t", object(), "c")])], "messages.0"),
    ],
)
def test_what_is_no_message_is_refused(
    db: TenantSession, chat: Conversation, given: Any, field: str
) -> None:
    with pytest.raises(InvalidValueError) as raised:
        append_history(db, chat.id, given)
    assert raised.value.field == field
    assert raised.value.__cause__ is None
    assert load_history(db, chat.id) == []
    assert idle(db)


def test_nothing_goes_to_an_unknown_conversation(db: TenantSession) -> None:
    with pytest.raises(InvalidReferenceError, match="conversation_id"):
        append_history(db, uuid4(), [said("a")])


def test_a_thread_names_a_conversation(db: TenantSession) -> None:
    ConversationRepository.create(db, "thread")
    append_history(db, "thread", [said("a")])
    assert len(load_history(db, "thread")) == 1
    assert clear(db, "thread") == 1


def test_append_and_load_are_one_round_trip_each(db: TenantSession, chat: Conversation) -> None:
    given = [said("a"), answered("b")] * 50
    append_history(db, chat.id, given)
    with counted_statements() as statements, counted_round_trips() as trips:
        append_history(db, chat.id, given)
    assert (len(statements), trips.count) == (1, 1)
    with counted_statements() as statements, counted_round_trips() as trips:
        assert len(load_history(db, chat.id)) == 200
    assert (len(statements), trips.count) == (1, 1)
    assert idle(db)


def test_clear_hides_what_restore_shows_again(db: TenantSession, chat: Conversation) -> None:
    given = [said("a"), answered("b")]
    append_history(db, chat.id, given)
    assert clear(db, chat.id) == 2
    assert load_history(db, chat.id) == []
    assert clear(db, chat.id) == 0
    assert MessageRepository.restore(db, chat.id) == 2
    assert load_history(db, chat.id) == given
    clear(db, chat.id)
    assert MessageRepository.purge(db, chat.id) == 2
    assert MessageRepository.restore(db, chat.id) == 0


def test_tenants_are_apart(db: TenantSession, other: TenantSession, chat: Conversation) -> None:
    append_history(db, chat.id, [said("a")])
    assert load_history(other, chat.id) == []
    assert clear(other, chat.id) == 0
    with pytest.raises(InvalidReferenceError):
        append_history(other, chat.id, [said("b")])
    assert len(load_history(db, chat.id)) == 1
