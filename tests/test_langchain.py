"""LangChain: histories in conversations, in an agent's loop, exact, concurrent, of one tenant."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from pydantic import Field
from sqlalchemy import QueuePool

from database import (
    ConversationRepository,
    InvalidValueError,
    MessageRepository,
    NotFoundError,
    SessionLocal,
    StatsRepository,
    TenantSession,
    UserRepository,
    get_engine,
)
from database.integrations.langchain import DatabaseChatMessageHistory as History
from database.integrations.langchain_messages import FORMAT
from database.session import tenant_of
from tests.counting import counted_round_trips, counted_statements
from tests.threads import THREADS, in_threads

# LangChain would have its users go to LangGraph's checkpointers; until 2.0 these still are.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")


@pytest.fixture
def history(db: TenantSession) -> Iterator[History]:
    yield History("thread", tenant_id=tenant_of(db))
    pool = get_engine().pool
    assert isinstance(pool, QueuePool)
    assert pool.checkedout() == 0


def again(history: History, **options: Any) -> History:
    """The same thread, of another process as it were."""
    return History(history.session_id, tenant_id=history.tenant_id, **options)


CALL = {"name": "weather", "args": {"city": "Łódź", "days": 2**70}, "id": "call_1"}
EVERYTHING: list[BaseMessage] = [
    SystemMessage("Be kind.", id="sys"),
    HumanMessage("Hello", name="ada", id="1", additional_kwargs={"n": [1, None, 2.5]}),
    HumanMessage(
        [
            {"type": "text", "text": "What is"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
            {"type": "text", "text": " this?"},
        ]
    ),
    HumanMessage(["plain", {"type": "text", "text": " parts"}]),
    AIMessage(
        [
            {"type": "thinking", "thinking": "Let me see.", "signature": "c2ln"},
            {"type": "text", "text": "A picture."},
        ],
        response_metadata={"model_name": "model-1", "finish_reason": "stop"},
        usage_metadata={"input_tokens": 7, "output_tokens": 3, "total_tokens": 10},
        id="run--1",
    ),
    AIMessage("", tool_calls=[{**CALL, "type": "tool_call"}]),
    AIMessage("", invalid_tool_calls=[{"name": "f", "args": "{", "id": "c", "error": "no JSON"}]),
    ToolMessage("Rain", tool_call_id="call_1", name="weather", status="error"),
    ToolMessage("Sun", tool_call_id="c" * 300, artifact={"raw": [1, 2]}),
    ToolMessage("Bytes", tool_call_id="b", artifact=b"\x00\xff"),
    ToolMessage("One", tool_call_id="d", artifact=Document("text", metadata={"page": 1})),
    ToolMessage("Many", tool_call_id="e", artifact=[Document("a", id="1"), Document("b")]),
    ToolMessage("None", tool_call_id="f", artifact=[]),
    ToolMessage([{"type": "text", "text": "parts"}], tool_call_id="g"),
    FunctionMessage(content="42", name="old"),
    ChatMessage(content="Hm", role="developer"),
    ChatMessage(content="Hm", role="critic"),
    AIMessageChunk(content="half"),
    HumanMessage("\x00 and \ud800 and 漢字 and 🫖"),
    AIMessage("Be plain."),
    HumanMessage(""),
]


# Round trips


def test_messages_come_back_equal(history: History) -> None:
    assert history.messages == []
    history.add_messages(EVERYTHING)
    for one in (history, again(history, strict=True)):
        found = one.messages
        assert found == EVERYTHING
        assert [type(message) for message in found] == [type(message) for message in EVERYTHING]
    assert found[9].artifact == b"\x00\xff"  # type: ignore[attr-defined]
    assert found[10].artifact == Document("text", metadata={"page": 1})  # type: ignore[attr-defined]


def test_messages_one_by_one_come_back_equal(history: History) -> None:
    for message in EVERYTHING:
        history.add_message(message)
    history.add_user_message("Bye")
    history.add_ai_message("Bye!")
    assert history.messages == [*EVERYTHING, HumanMessage("Bye"), AIMessage("Bye!")]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
TEXT = st.text(st.characters(), max_size=30)
PARTS = st.lists(
    TEXT | st.builds(lambda text: {"type": "text", "text": text}, TEXT) | st.just({"type": "x"}),
    max_size=3,
)
MESSAGES = st.one_of(
    st.builds(HumanMessage, content=TEXT | PARTS, id=st.none() | TEXT),
    st.builds(
        AIMessage,
        content=TEXT | PARTS,
        additional_kwargs=st.dictionaries(st.sampled_from("abc"), JSON, max_size=2),
        response_metadata=st.dictionaries(st.sampled_from(["model", "x"]), JSON, max_size=2),
    ),
    st.builds(ToolMessage, content=TEXT, tool_call_id=TEXT, artifact=JSON | st.binary()),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(messages=st.lists(MESSAGES, max_size=4))
def test_any_messages_come_back_equal(configured: None, messages: list[BaseMessage]) -> None:
    history = History(f"law-{uuid4()}", strict=True)
    history.add_messages(messages)
    assert history.messages == messages


def test_what_the_columns_say(history: History, db: TenantSession) -> None:
    history.add_messages(EVERYTHING)
    rows = MessageRepository.history(db, "thread")
    assert [str(row.role) for row in rows] == [
        *("system", "user", "user", "user"),
        *("assistant",) * 3,
        *("tool",) * 8,
        *("system", "user", "assistant", "user", "assistant", "user"),
    ]
    assert [row.content for row in rows[:6]] == [
        *("Be kind.", "Hello", "What is this?", "plain parts", "A picture.", "")
    ]
    answer = rows[4]
    assert (answer.thinking, answer.model) == ("Let me see.", "model-1")
    assert (answer.input_tokens, answer.output_tokens) == (7, 3)
    assert [row.tool_call_id for row in rows[7:10]] == ["call_1", None, "b"]
    assert rows[18].content == "\ufffd and \ufffd and 漢字 and 🫖"
    plain = [row.content for row in rows if row.data is None]
    assert plain == ["Be plain.", ""], "what its text alone makes again is a plain row"
    assert {row.data_format for row in rows if row.data is not None} == {FORMAT}
    assert StatsRepository.summary(db).output_tokens == 3
    found = MessageRepository.search(db, "picture")
    assert [row.id for row in found] == [answer.id]


def test_what_providers_say_otherwise_is_no_error(history: History, db: TenantSession) -> None:
    usage: Any = {"input_tokens": 2**40, "output_tokens": 1, "total_tokens": 1}
    odd = [
        AIMessage("a", response_metadata={"model": 5}, usage_metadata=usage),
        AIMessage("b", response_metadata={"model": "m" * 256}),
        AIMessage("c", additional_kwargs={"reasoning_content": "Hm."}),
    ]
    history.add_messages(odd)
    assert history.messages == odd
    first, second, third = MessageRepository.history(db, "thread")
    assert (first.model, first.input_tokens, first.output_tokens) == (None, None, 1)
    assert (second.model, third.thinking) == (None, "Hm.")


def test_large_and_many(history: History) -> None:
    large = ToolMessage("x" * 20_000_000, tool_call_id="c", artifact=b"y" * 1_000_000)
    many: list[BaseMessage] = [HumanMessage(f"{n}") for n in range(1_000)]
    history.add_messages([large, *many])
    found = history.messages
    assert found == [large, *many]
    assert again(history, limit=50).messages == many[-50:]


# What may stand in a history


def test_an_applications_own_messages(history: History, db: TenantSession) -> None:
    chat = ConversationRepository.create(db, "thread").id
    for role in ("system", "user", "assistant"):
        MessageRepository.append(db, chat, role=role, content=role)
    MessageRepository.append(db, chat, role="tool", content="42", tool_call_id="c")
    assert history.messages == [
        SystemMessage("system"),
        HumanMessage("user"),
        AIMessage("assistant"),
        ToolMessage("42", tool_call_id="c"),
    ]


UNREADABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "newer": ("data_format", {"data": b"{}", "data_format": "langchain/2"}),
    "other": ("data_format", {"data": b"[]", "data_format": "pydantic-ai/1"}),
    "no format": ("data_format", {"data": b"{}"}),
    "no data": ("data_format", {"data_format": FORMAT}),
    "no JSON": ("data", {"data": b"\xff{", "data_format": FORMAT}),
    "no message": ("data", {"data": b'{"type": "human"}', "data_format": FORMAT}),
    "no type": ("data", {"data": b'{"type": "alien", "data": {}}', "data_format": FORMAT}),
    "a number": ("data", {"data": b"5", "data_format": FORMAT}),
    "deep": ("data", {"data": b"[" * 100_000, "data_format": FORMAT}),
    "artifact": (
        "data",
        {"data": b'{"type":"tool","data":{},"artifact":["x",1]}', "data_format": FORMAT},
    ),
    "a tool's": ("tool_call_id", {"role": "tool"}),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_left_out_or_an_error(
    history: History, db: TenantSession, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    field, row = UNREADABLE[kind]
    history.add_user_message("before")
    MessageRepository.append(db, "thread", **{"role": "user", "content": "secret"} | row)
    history.add_user_message("after")
    with caplog.at_level(logging.WARNING):
        assert history.messages == [HumanMessage("before"), HumanMessage("after")]
    assert "message 2 is left out" in caplog.text
    assert "secret" not in caplog.text
    with pytest.raises(InvalidValueError) as caught:
        _ = again(history, strict=True).messages
    assert caught.value.field == field


@pytest.mark.parametrize("artifact", [object(), {1, 2}, {"deep": [b"x"]}, [Document("a"), 1]])
def test_an_artifact_that_cannot_be_kept(
    history: History, caplog: pytest.LogCaptureFixture, artifact: Any
) -> None:
    messages = [HumanMessage("q"), ToolMessage("secret", tool_call_id="c", artifact=artifact)]
    with pytest.raises(InvalidValueError, match=r"^artifact: must be JSON, bytes, or documents"):
        again(history, strict=True).add_messages(messages)
    assert history.messages == []
    with caplog.at_level(logging.WARNING):
        history.add_messages(messages)
    assert "an artifact is left out" in caplog.text
    assert "secret" not in caplog.text
    assert history.messages == [messages[0], ToolMessage("secret", tool_call_id="c")]


@pytest.mark.parametrize(
    "bad", ["text", None, {"type": "human"}, HumanMessage("x", additional_kwargs={"a": object()})]
)
def test_bad_messages_write_nothing(history: History, db: TenantSession, bad: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^messages: must be "):
        history.add_messages([HumanMessage("good"), bad])
    assert ConversationRepository.get_by_thread_id(db, "thread") is None


def test_bad_options(db: TenantSession) -> None:
    options: dict[str, dict[str, Any]] = {
        "limit": {"limit": 0},
        "user_id": {"user_id": "me"},
        "session_id": {"session_id": 5},
    }
    for field, option in options.items():
        with pytest.raises(InvalidValueError) as caught:
            History(**{"session_id": "s"} | option)
        assert caught.value.field == field
    for limit in (-1, 1.5, True, "5"):
        with pytest.raises(InvalidValueError, match="limit"):
            History("s", limit=limit)  # type: ignore[arg-type]
    for thread in ("", "x" * 256):
        with pytest.raises(InvalidValueError, match="thread_id"):
            History(thread).add_user_message("x")


# Threads, users, tenants


def test_nothing_is_made_before_the_first_write(history: History, db: TenantSession) -> None:
    assert history.messages == []
    history.clear()
    history.add_messages([])
    asyncio.run(history.aadd_messages([]))
    assert ConversationRepository.count(db) == 0


def test_clear(history: History, db: TenantSession) -> None:
    other = again(history)
    history.add_user_message("x")
    assert other.messages == [HumanMessage("x")]
    history.clear()
    assert history.messages == other.messages == []
    other.add_user_message("y")
    assert history.messages == [HumanMessage("y")]
    assert MessageRepository.count(db) == 1


def test_a_conversation_that_is_deleted_is_made_again(history: History, db: TenantSession) -> None:
    history.add_user_message("x")
    ConversationRepository.delete(db, "thread")
    assert history.messages == []
    history.add_user_message("y")
    ConversationRepository.delete(db, "thread")
    history.add_user_message("z")
    assert history.messages == again(history).messages == [HumanMessage("z")]


def test_whose_conversation_it_is(history: History, db: TenantSession) -> None:
    ada, bob = UserRepository.create(db).id, UserRepository.create(db).id
    again(history, user_id=ada).add_user_message("Ada's")
    made = ConversationRepository.get_by_thread_id(db, "thread")
    assert made is not None
    assert made.user_id == ada
    assert again(history, user_id=str(ada)).messages == history.messages == [HumanMessage("Ada's")]
    bobs = again(history, user_id=bob)
    calls: list[Callable[[], object]] = [
        lambda: bobs.messages,
        bobs.clear,
        lambda: bobs.add_user_message("Bob's"),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match=r"^session_id: is the conversation of another"):
            call()
    assert history.messages == [HumanMessage("Ada's")]


def test_tenants_have_threads_of_their_own(history: History, other: TenantSession) -> None:
    theirs = History("thread", tenant_id=tenant_of(other))
    history.add_user_message("ours")
    assert theirs.messages == []
    theirs.clear()
    theirs.add_user_message("theirs")
    assert (history.messages, theirs.messages) == (
        [HumanMessage("ours")],
        [HumanMessage("theirs")],
    )


def test_first_writes_of_many_threads(history: History, db: TenantSession) -> None:
    def write(_: TenantSession, number: int) -> None:
        again(history).add_messages([HumanMessage(f"{number}"), AIMessage(f"{number}")])

    in_threads(tenant_of(db), write)
    found = [str(message.content) for message in history.messages]
    assert len(found) == 2 * THREADS
    assert found[::2] == found[1::2], "what is added together stays together"
    assert sorted(map(int, found[::2])) == list(range(THREADS))
    assert ConversationRepository.count(db) == 1


def test_one_round_trip_a_call(history: History) -> None:
    history.add_user_message("x")
    calls: list[Callable[[], object]] = [
        lambda: history.add_message(HumanMessage("y")),
        lambda: history.add_messages([HumanMessage("y"), AIMessage("z")]),
        lambda: history.messages,
        lambda: asyncio.run(history.aget_messages()),
    ]
    for call in calls:
        with counted_statements() as statements, counted_round_trips() as trips:
            call()
        assert (len(statements), trips.count) == (1, 1)


def test_async(history: History) -> None:
    async def talk() -> None:
        await history.aadd_messages(EVERYTHING)
        assert await history.aget_messages() == EVERYTHING
        with pytest.raises(InvalidValueError):
            await history.aadd_messages(["text"])  # type: ignore[list-item]
        await history.aclear()
        assert await history.aget_messages() == []
        await asyncio.gather(
            *(again(history).aadd_messages([HumanMessage(f"{n}")]) for n in range(40))
        )
        assert len(await history.aget_messages()) == 40

    asyncio.run(talk())


def test_cancelled_in_the_middle(history: History) -> None:
    async def cancel() -> None:
        for n in range(20):
            task = asyncio.create_task(
                history.aadd_messages([HumanMessage(f"{n}"), AIMessage(f"{n}")])
            )
            await asyncio.sleep(n / 5_000)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    found = [str(message.content) for message in history.messages]
    assert found[::2] == found[1::2], "all of an append or nothing"


def test_over_a_sessionmaker(history: History, db: TenantSession) -> None:
    given: list[Any] = []

    def sessions(**options: Any) -> TenantSession:
        given.append(options)
        return SessionLocal(**options)

    one = again(history, sessions=sessions)
    one.add_user_message("x")
    assert one.messages == [HumanMessage("x")]
    assert given == [{"tenant_id": tenant_of(db)}] * 2


# In an agent's loop


class Scripted(BaseChatModel):
    """A model that calls its tool once for each question, and then says what it heard."""

    heard: list[list[BaseMessage]] = Field(default_factory=list)
    tools: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Sequence[Any], **_: Any) -> Scripted:
        self.tools.extend(one.name for one in tools)
        return self

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        self.heard.append(messages)
        last = messages[-1]
        usage: Any = {"input_tokens": len(messages), "output_tokens": 1, "total_tokens": 0}
        if isinstance(last, ToolMessage):
            answer = AIMessage(f"It is {last.content}.", usage_metadata=usage)
        else:
            call = {
                "name": self.tools[0],
                "args": {"city": last.content},
                "id": f"c{len(messages)}",
            }
            answer = AIMessage("", tool_calls=[call], usage_metadata=usage)
        answer.response_metadata = {"model_name": "scripted-1"}
        return ChatResult(generations=[ChatGeneration(message=answer)])


@tool(response_format="content_and_artifact")
def weather(city: str) -> tuple[str, list[Document]]:
    """Tell the weather of a city."""
    return f"raining in {city}", [Document("a report", metadata={"city": city})]


def agent(model: Scripted) -> Any:
    """The loop of an agent, as LangChain's users write it: the model until it calls no tool."""
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Be brief."), MessagesPlaceholder("history"), ("human", "{question}")]
    )
    bound = model.bind_tools([weather])

    def run(values: dict[str, Any]) -> list[BaseMessage]:
        said = prompt.invoke(values).to_messages()
        new: list[BaseMessage] = []
        while True:
            answer = bound.invoke([*said, *new])
            new.append(answer)
            if not answer.tool_calls:
                return new
            new += [weather.invoke(call) for call in answer.tool_calls]

    return RunnableLambda(run)


def test_an_agents_loop_with_tools(db: TenantSession) -> None:
    model = Scripted()
    user = UserRepository.create(db).id
    chain = RunnableWithMessageHistory(
        agent(model),
        lambda session_id: History(session_id, tenant_id=tenant_of(db), user_id=user, strict=True),
        input_messages_key="question",
        history_messages_key="history",
    )
    config: Any = {"configurable": {"session_id": "loop"}}
    first = chain.invoke({"question": "Rome"}, config)
    second = asyncio.run(chain.ainvoke({"question": "Oslo"}, config))
    assert [message.content for message in second] == [
        "",
        "raining in Oslo",
        "It is raining in Oslo.",
    ]
    kept = History("loop", tenant_id=tenant_of(db), strict=True).messages
    assert kept == [HumanMessage("Rome"), *first, HumanMessage("Oslo"), *second]
    assert kept[2].artifact == [Document("a report", metadata={"city": "Rome"})]  # type: ignore[attr-defined]
    assert model.heard[2] == [SystemMessage("Be brief."), *kept[:5]], "it was told the first turn"
    rows = MessageRepository.history(db, "loop")
    assert [str(row.role) for row in rows] == ["user", "assistant", "tool", "assistant"] * 2
    assert rows[2].tool_call_id == "c2"
    (row,) = (row for row in StatsRepository.messages(db, "model") if row.key == "scripted-1")
    assert (row.messages, row.output_tokens) == (4, 4)
    assert chain.invoke({"question": "Rome"}, {"configurable": {"session_id": "new"}})
    assert len(model.heard[-2]) == 2, "another session is empty"


def test_streaming_into_a_history(db: TenantSession) -> None:
    model = Scripted(tools=["weather"])
    chain: Any = RunnableWithMessageHistory(
        model, lambda session_id: History(session_id, tenant_id=tenant_of(db))
    )
    chunks = list(chain.stream("Rome", {"configurable": {"session_id": "s"}}))
    assert chunks
    first, second = History("s", tenant_id=tenant_of(db)).messages
    assert first == HumanMessage("Rome")
    assert isinstance(second, AIMessage)
    assert second.tool_calls[0]["args"] == {"city": "Rome"}


class Odd(BaseMessage):
    """A message of a kind that LangChain does not know."""

    type: str = "odd"


def test_a_kind_that_cannot_be_read_back_is_refused(history: History) -> None:
    with pytest.raises(InvalidValueError, match=r"^messages: must be of a kind that LangChain"):
        history.add_messages([Odd(content="hi")])
    assert history.messages == []
