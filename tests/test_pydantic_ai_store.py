"""The conversation store of Pydantic AI: what its own one in memory does, ours does too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from pydantic_ai import Agent, DeferredToolRequests, ToolDenied
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import (
    ConversationConflict,
    ConversationEntry,
    ConversationRecord,
    ConversationStore,
    InMemoryConversationStore,
)
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import RunUsage

from database import (
    ConversationRepository,
    InvalidValueError,
    Message,
    MessageRepository,
    SessionLocal,
    TenantSession,
    UnreadableMessageError,
    UserRepository,
    get_engine,
)
from database.integrations.pydantic_ai import (
    PostgresConversationStore,
    append_history,
    clear,
    load_history,
)
from tests.counting import counted_statements
from tests.pydantic_ai_messages import messages

WHEN = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(params=["memory", "postgres"])
def store(request: pytest.FixtureRequest, configured: None, tenant: str) -> ConversationStore:
    """The framework's own store, and ours."""
    if request.param == "memory":
        return InMemoryConversationStore()
    return PostgresConversationStore(tenant_id=tenant)


@pytest.fixture
def ours(configured: None, tenant: str) -> PostgresConversationStore:
    return PostgresConversationStore(tenant_id=tenant)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    found = asyncio.run(work)
    assert get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    return found


def said(text: str) -> ModelMessage:
    return ModelRequest(parts=[UserPromptPart(text, timestamp=WHEN)])


def answered(text: str) -> ModelMessage:
    return ModelResponse(parts=[TextPart(text)], timestamp=WHEN)


def talk(*texts: str) -> list[ModelMessage]:
    return [answered(text) if n % 2 else said(text) for n, text in enumerate(texts)]


async def saved(
    store: ConversationStore, *texts: str, name: str = "chat", scope: str | None = None
) -> Conversation:
    """A conversation that the store has."""
    chat = Conversation(conversation_id=name, messages=talk(*texts))
    await store.save(chat, scope=scope)
    return chat


async def loaded(store: ConversationStore, name: str = "chat", **options: Any) -> Conversation:
    found = await store.load(name, **options)
    assert found is not None
    return found


async def record(store: ConversationStore, name: str = "chat") -> ConversationRecord:
    found = await store.read_record(name)
    assert found is not None
    return found


async def texts(store: ConversationStore, name: str = "chat", **options: Any) -> list[str]:
    return texts_of((await loaded(store, name, **options)).messages)


def texts_of(found: list[ModelMessage]) -> list[str]:
    return [message.parts[0].content for message in found]  # type: ignore[union-attr, misc]


async def ids(store: ConversationStore, name: str = "chat", **options: Any) -> list[str]:
    entries = await store.load_entries(name, **options)
    assert entries is not None
    return [entry.id for entry in entries]


# Saving and loading


def test_what_was_saved_is_loaded(store: ConversationStore) -> None:
    async def work() -> None:
        chat = Conversation(
            conversation_id="chat",
            messages=talk("a", "b"),
            usage=RunUsage(requests=2, input_tokens=5, details={"x\0": 1}),
        )
        entries = await store.save(chat)
        assert [entry.message for entry in entries] == chat.messages
        assert [entry.parent_id for entry in entries] == [None, entries[0].id]
        found = await loaded(store)
        assert found == chat
        assert found.revision == chat.revision is not None
        assert await store.load_entries("chat") == entries
        for entry in entries:
            assert await store.read_entry(entry.id) == entry
        assert await store.load("another") is None
        assert await store.load_entries("another") is None

    run(work())


def test_a_record_is_read_as_it_was_written(store: ConversationStore) -> None:
    async def work() -> None:
        first = ConversationEntry(parent_id=None, message=said("a"))
        second = ConversationEntry(parent_id=first.id, message=answered("b"))
        written = ConversationRecord(
            conversation_id="chat",
            head_id=second.id,
            usage=RunUsage(requests=1, tool_calls=3),
            deferred_tool_requests=DeferredToolRequests(
                calls=[ToolCallPart("t", {"a\0": ["\0", 2**70]}, "c")],
                approvals=[ToolCallPart("u", '{"b": 1}', "d")],
                metadata={"c": {"reason": "\0"}},
            ),
            scope="channel",
            forked_from="elsewhere",
            forked_at=str(uuid4()),
            branches=[first.id],
            updated_at=WHEN,
        )
        await store.write_record(written, new_entries=[first, second], expected_revision=None)
        assert await store.read_record("chat") == written
        assert await store.read_records() == [written]
        again = replace(written, revision="2", scope=None, deferred_tool_requests=None)
        await store.write_record(again, expected_revision=written.revision)
        assert await store.read_record("chat") == again
        assert await store.read_history(second.id) == [first, second]

    run(work())


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(given=messages)
def test_messages_of_every_kind(ours: PostgresConversationStore, given: list[ModelMessage]) -> None:
    async def work() -> None:
        chat = Conversation(messages=given)
        await ours.save(chat)
        found = await loaded(ours, chat.conversation_id)
        memory = InMemoryConversationStore()
        await memory.save(replace(chat, revision=None, new_message_index=None))
        assert await ours.save(found) == []
        assert len(found.messages) == len((await loaded(memory, chat.conversation_id)).messages)

    asyncio.run(work())


def test_only_new_messages_are_saved(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store, "a", "b")
        first = chat.revision
        assert await store.save(chat) == []
        assert chat.revision != first
        chat.messages += talk("c", "d")
        new = await store.save(chat)
        assert [entry.message for entry in new] == talk("c", "d")
        assert await texts(store) == ["a", "b", "c", "d"]
        found = await loaded(store)
        found.messages.append(said("e"))
        await store.save(found)
        assert len(await ids(store)) == 5

    run(work())


def test_an_empty_conversation(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store)
        assert (await record(store)).head_id is None
        assert await texts(store) == []
        chat.messages += talk("a")
        await store.save(chat)
        assert await texts(store) == ["a"]

    run(work())


def test_a_limit_loads_the_last_messages(store: ConversationStore) -> None:
    async def work() -> None:
        await saved(store, "a", "b", "c", "d")
        everything = await store.load_entries("chat")
        assert everything is not None
        for limit in range(6):
            found = await store.load_entries("chat", limit=limit)
            assert found == everything[max(0, 4 - limit) :]
        window = await loaded(store, limit=2)
        assert texts_of(window.messages) == ["c", "d"]
        window.messages += talk("e")
        await store.save(window)
        assert await texts(store) == ["a", "b", "c", "d", "e"]
        with pytest.raises(UserError):
            await store.load("chat", limit=-1)

    run(work())


def test_a_rewritten_history_is_a_branch(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store, "a", "b", "c", "d")
        old = await ids(store)
        rewritten = replace(chat, messages=[*chat.messages[:2], *talk("x", "y")])
        new = await store.save(rewritten)
        assert new[0].parent_id == old[1]
        assert await texts(store) == ["a", "b", "x", "y"]
        assert (await record(store)).branches == [old[3]]
        assert texts_of([e.message for e in await store.read_history(old[3])]) == list("abcd")
        rewritten = replace(rewritten, messages=talk("other"), new_message_index=None)
        assert (await store.save(rewritten))[0].parent_id is None
        assert await texts(store) == ["other"]
        assert len((await record(store)).branches) == 2

    run(work())


def test_a_rewritten_window_is_a_branch(store: ConversationStore) -> None:
    async def work() -> None:
        await saved(store, "a", "b", "c", "d")
        old = await ids(store)
        window = await loaded(store, limit=2)
        window.messages = [window.messages[0], answered("x")]
        await store.save(window)
        assert await texts(store) == ["a", "b", "c", "x"]
        window = await loaded(store, limit=1)
        window.messages = [answered("y")]
        (new,) = await store.save(window)
        assert new.parent_id == old[2]
        assert await texts(store) == ["a", "b", "c", "y"]

    run(work())


def test_what_was_loaded_can_be_changed(store: ConversationStore) -> None:
    async def work() -> None:
        await saved(store, "a")
        found = await loaded(store)
        found.messages[0].parts[0].content = "changed"  # type: ignore[union-attr, misc]
        found.usage.requests = 9
        assert await texts(store) == ["a"]
        assert (await loaded(store)).usage.requests == 0

    run(work())


# Conflicts


def test_a_stale_copy_is_a_conflict(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store, "a")
        mine, theirs = await loaded(store), await loaded(store)
        theirs.messages += talk("theirs")
        await store.save(theirs)
        mine.messages += talk("mine")
        with pytest.raises(ConversationConflict) as raised:
            await store.save(mine)
        assert raised.value.conversation_id == "chat"
        with pytest.raises(ConversationConflict):
            await store.save(chat)
        with pytest.raises(ConversationConflict):
            await store.branch("chat", at=0, expected_revision=mine.revision)
        with pytest.raises(ConversationConflict):
            await saved(store, "new")
        assert await texts(store) == ["a", "theirs"]

    run(work())


def test_a_deleted_conversation_is_a_conflict(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store, "a")
        await store.delete("chat")
        with pytest.raises(ConversationConflict):
            await store.save(chat)
        await saved(store, "b")
        with pytest.raises(ConversationConflict):
            await store.save(chat)
        with pytest.raises(ConversationConflict):
            await store.delete_record("chat", expected_revision=chat.revision or "")
        assert await texts(store) == ["b"]
        with pytest.raises(ConversationConflict):
            await store.delete_record("unknown", expected_revision="x")

    run(work())


def test_of_many_saves_of_one_revision_one_wins(store: ConversationStore) -> None:
    async def work() -> None:
        await saved(store, "a")
        copies = [await loaded(store) for _ in range(8)]
        for number, copy in enumerate(copies):
            copy.messages += talk(f"{number}", "b")
        results = await asyncio.gather(*map(store.save, copies), return_exceptions=True)
        won = [n for n, result in enumerate(results) if isinstance(result, list)]
        assert len(won) == 1
        assert [type(r) for r in results].count(ConversationConflict) == 7
        assert await texts(store) == ["a", str(won[0]), "b"]
        assert (await record(store)).revision == copies[won[0]].revision

    run(work())


def test_of_many_new_conversations_of_one_id_one_is_made(store: ConversationStore) -> None:
    async def work() -> None:
        results = await asyncio.gather(
            *(saved(store, str(number), "b") for number in range(8)), return_exceptions=True
        )
        won = [n for n, result in enumerate(results) if isinstance(result, Conversation)]
        assert len(won) == 1
        assert [type(r) for r in results].count(ConversationConflict) == 7
        assert await texts(store) == [str(won[0]), "b"]

    run(work())


def test_a_head_that_nobody_has_is_a_conflict(store: ConversationStore) -> None:
    async def work() -> None:
        for head in (str(uuid4()), "no UUID"):
            lost = ConversationRecord(conversation_id="chat", head_id=head)
            with pytest.raises(ConversationConflict):
                await store.write_record(lost, expected_revision=None)
            with pytest.raises(LookupError):
                await store.read_entry(head)
            with pytest.raises(LookupError):
                await store.read_history(head)
        assert await store.read_record("chat") is None
        assert await store.read_history(None) == []

    run(work())


# Branches


def test_a_branch_goes_on_from_an_earlier_message(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store, "a", "b", "c", "d")
        old = await ids(store)
        chat = await store.branch("chat", at=2, expected_revision=chat.revision)
        assert texts_of(chat.messages) == ["a", "b"]
        assert await loaded(store) == chat
        assert (await record(store)).branches == [old[3]]
        chat.messages += talk("x", "y")
        new = await store.save(chat)
        assert new[0].parent_id == old[1]
        assert await texts(store) == ["a", "b", "x", "y"]
        assert await texts(store, limit=3) == ["b", "x", "y"]

        back = await store.branch("chat", from_entry=old[3], expected_revision=chat.revision)
        assert texts_of(back.messages) == ["a", "b", "c", "d"]
        assert (await record(store)).branches == [new[1].id]
        back.messages += talk("e")
        await store.save(back)
        assert await texts(store) == ["a", "b", "c", "d", "e"]

    run(work())


def test_a_branch_at_the_start_and_at_the_end(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store, "a", "b")
        old = await ids(store)
        same = await store.branch("chat", at=2, expected_revision=chat.revision)
        assert texts_of(same.messages) == ["a", "b"]
        assert (await record(store)).branches == []
        empty = await store.branch("chat", at=0, expected_revision=same.revision)
        assert empty.messages == []
        assert (await record(store)).head_id is None
        empty.messages += talk("x")
        (new,) = await store.save(empty)
        assert new.parent_id is None
        assert await texts(store) == ["x"]
        back = await store.branch("chat", from_entry=old[0], expected_revision=empty.revision)
        assert texts_of(back.messages) == ["a"]
        assert (await record(store)).branches == [old[1], new.id]

    run(work())


def test_a_branch_of_what_there_is_not(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store, "a")
        revision = chat.revision
        for wrong in ({"at": 2}, {"at": -1}, {"from_entry": str(uuid4())}, {}):
            with pytest.raises(UserError):
                await store.branch("chat", expected_revision=revision, **wrong)
        with pytest.raises(UserError):
            await store.branch("another", at=0, expected_revision=None)
        assert await texts(store) == ["a"]

    run(work())


# Forks


def test_a_fork_shares_the_history(store: ConversationStore) -> None:
    async def work() -> None:
        await saved(store, "a", "b", "c", "d", scope="mine")
        old = await ids(store)
        fork = await store.fork("chat", at=2, new_conversation_id="fork")
        assert texts_of(fork.messages) == ["a", "b"]
        found = await record(store, "fork")
        assert (found.forked_from, found.forked_at) == ("chat", old[1])
        assert (found.head_id, found.scope, found.branches) == (old[1], "mine", [])
        fork.messages += talk("x", "y")
        new = await store.save(fork)
        assert new[0].parent_id == old[1]
        assert await texts(store, "fork") == ["a", "b", "x", "y"]
        assert await texts(store, "fork", limit=3) == ["b", "x", "y"]
        assert (await ids(store, "fork"))[:2] == old[:2]
        assert await texts(store) == ["a", "b", "c", "d"]

        second = await store.fork("fork", at=3, new_conversation_id="second", scope="theirs")
        second.messages += talk("z")
        await store.save(second, scope="theirs")
        assert await texts(store, "second") == ["a", "b", "x", "z"]
        branch = await store.branch("second", at=1, expected_revision=second.revision)
        branch.messages += talk("q")
        await store.save(branch)
        assert await texts(store, "second") == ["a", "q"]

    run(work())


def test_a_whole_fork_takes_over_usage_and_requests(store: ConversationStore) -> None:
    async def work() -> None:
        requests = DeferredToolRequests(calls=[ToolCallPart("t", {}, "c")])
        chat = Conversation(
            conversation_id="chat",
            messages=talk("a", "b"),
            usage=RunUsage(requests=3),
            deferred_tool_requests=requests,
        )
        await store.save(chat)
        whole = await store.fork("chat")
        assert (whole.usage.requests, whole.deferred_tool_requests) == (3, requests)
        assert await loaded(store, whole.conversation_id) == whole
        part = await store.fork("chat", at=1)
        assert (part.usage.requests, part.deferred_tool_requests) == (0, None)
        none = await store.fork("chat", at=0, new_conversation_id="none")
        assert (none.messages, await texts(store, "none")) == ([], [])
        assert (await record(store, "none")).forked_from == "chat"
        with pytest.raises(ConversationConflict):
            await store.fork("chat", new_conversation_id="none")
        with pytest.raises(UserError):
            await store.fork("unknown")

    run(work())


def test_a_fork_of_a_branch_that_was_left(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store, "a", "b", "c")
        old = await ids(store)
        chat = await store.branch("chat", at=1, expected_revision=chat.revision)
        chat.messages += talk("x")
        await store.save(chat)
        fork = await store.fork("chat", from_entry=old[2], new_conversation_id="fork")
        fork.messages += talk("y")
        await store.save(fork)
        assert await texts(store, "fork") == ["a", "b", "c", "y"]

    run(work())


def test_deleting_keeps_what_a_fork_shows(store: ConversationStore) -> None:
    async def work() -> None:
        await saved(store, "a", "b", "c", "d")
        old = await ids(store)
        fork = await store.fork("chat", at=2, new_conversation_id="fork")
        fork.messages += talk("x")
        await store.save(fork)
        await store.delete("chat")
        assert await store.load("chat") is None
        assert await texts(store, "fork") == ["a", "b", "x"]
        for gone in old[2:]:
            with pytest.raises(LookupError):
                await store.read_entry(gone)
        fork = await loaded(store, "fork")
        fork.messages += talk("y")
        await store.save(fork)
        assert await texts(store, "fork") == ["a", "b", "x", "y"]
        await store.delete("fork")
        for gone in old:
            with pytest.raises(LookupError):
                await store.read_entry(gone)

    run(work())


def test_a_fork_of_what_is_deleted_meanwhile_is_a_conflict(store: ConversationStore) -> None:
    async def work() -> None:
        await saved(store, "a")
        (head,) = await ids(store)
        await store.delete("chat")
        fork = ConversationRecord(conversation_id="fork", head_id=head, forked_from="chat")
        with pytest.raises(ConversationConflict):
            await store.write_record(fork, expected_revision=None)
        assert await store.list_conversations() == []

    run(work())


# Lists, scopes, deleting


def test_lists_are_newest_first(store: ConversationStore) -> None:
    async def work() -> None:
        for number in range(5):
            scope = "odd" if number % 2 else "even"
            await saved(store, f"{number}", name=f"chat {number}", scope=scope)
            await asyncio.sleep(0.002)
        chat = await loaded(store, "chat 1")
        chat.messages += talk("more")
        await store.save(chat)

        async def listed(**options: Any) -> list[str]:
            return [one.conversation_id[-1] for one in await store.list_conversations(**options)]

        assert await listed() == ["1", "4", "3", "2", "0"]
        assert await listed(limit=2) == ["1", "4"]
        assert await listed(limit=0) == []
        assert await listed(scope="odd") == ["1", "3"]
        assert await listed(scope="odd", limit=1) == ["1"]
        assert await listed(scope="none") == []
        with pytest.raises(UserError):
            await store.list_conversations(limit=-1)
        assert await store.list_conversations(limit=1) == [await record(store, "chat 1")]

    run(work())


def test_a_scope_keeps_others_out(store: ConversationStore) -> None:
    async def work() -> None:
        chat = await saved(store, "a", scope="mine")
        assert await store.load("chat", scope="theirs") is None
        assert await store.load_entries("chat", scope="theirs") is None
        assert texts_of((await loaded(store, scope="mine")).messages) == ["a"]
        with pytest.raises(ConversationConflict):
            await store.save(chat, scope="theirs")
        with pytest.raises(UserError):
            await store.branch("chat", at=0, expected_revision=chat.revision, scope="theirs")
        with pytest.raises(UserError):
            await store.fork("chat", source_scope="theirs")
        await store.delete("chat", scope="theirs")
        chat.messages += talk("b")
        await store.save(chat)
        assert (await record(store)).scope == "mine"
        await store.delete("chat", scope="mine")
        assert await store.load("chat") is None
        await store.delete("chat")

    run(work())


# Agents


def tutor() -> Agent[None, Any]:
    """An agent whose model asks its tool first; `delete` needs somebody's consent."""

    def answer(history: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        last = history[-1].parts[-1]
        if isinstance(last, ToolReturnPart):
            return ModelResponse(parts=[TextPart(f"{last.tool_name}: {last.content}")])
        wish = str(last.content)  # type: ignore[union-attr]
        return ModelResponse(parts=[ToolCallPart("delete" if "delete" in wish else "add")])

    agent: Agent[None, Any] = Agent(
        FunctionModel(answer, model_name="tutor"), output_type=[str, DeferredToolRequests]
    )

    @agent.tool_plain
    def add() -> int:
        return 42

    @agent.tool_plain(requires_approval=True)
    def delete() -> str:
        return "gone"

    return agent


def test_an_agent_with_tools_goes_on_turn_by_turn(store: ConversationStore) -> None:
    async def work() -> None:
        agent = tutor()
        for turn in range(1, 4):
            chat = await store.load("chat") or Conversation(conversation_id="chat")
            result = await agent.run(f"Add {turn}", conversation=chat)
            assert result.output == "add: 42"
            assert len(await store.save(result)) == 4
        found = await loaded(store)
        assert len(found.messages) == 12
        assert (found.usage.requests, found.usage.tool_calls) == (6, 3)
        assert found == result.conversation

    run(work())


@pytest.mark.parametrize("approved", [True, False])
def test_an_agent_waits_for_consent(store: ConversationStore, approved: bool) -> None:  # noqa: FBT001
    async def work() -> None:
        agent = tutor()
        result = await agent.run("delete", conversation=Conversation(conversation_id="chat"))
        await store.save(result)
        waiting = await loaded(store)
        requests = waiting.deferred_tool_requests
        assert requests == result.output
        assert requests is not None
        (call,) = requests.approvals
        answers = requests.build_results(
            approvals={call.tool_call_id: True if approved else ToolDenied("No.")}
        )
        result = await agent.run(conversation=waiting, deferred_tool_results=answers)
        assert result.output == ("delete: gone" if approved else "delete: No.")
        await store.save(result)
        assert (await loaded(store)).deferred_tool_requests is None

    run(work())


# What only ours does


def test_tenants_are_apart(ours: PostgresConversationStore) -> None:
    theirs = PostgresConversationStore(tenant_id=f"other-{uuid4().hex[:12]}")

    async def work() -> None:
        await saved(ours, "mine")
        await saved(theirs, "theirs")
        (head,) = await ids(ours)
        assert await texts(theirs) == ["theirs"]
        assert [r.conversation_id for r in await theirs.list_conversations()] == ["chat"]
        for read in (theirs.read_entry, theirs.read_history):
            with pytest.raises(LookupError):
                await read(head)
        fork = ConversationRecord(conversation_id="fork", head_id=head)
        with pytest.raises(ConversationConflict):
            await theirs.write_record(fork, expected_revision=None)
        entry = ConversationEntry(parent_id=head, message=said("x"))
        stolen = replace(await record(theirs), head_id=entry.id)
        with pytest.raises(ConversationConflict):
            await theirs.write_record(
                stolen, new_entries=[entry], expected_revision=stolen.revision
            )
        await theirs.delete("chat")
        assert await texts(ours) == ["mine"]

    run(work())


def test_load_history_reads_what_was_saved(
    ours: PostgresConversationStore, db: TenantSession
) -> None:
    async def work() -> Conversation:
        chat = await saved(ours, "a", "b", "c")
        chat = await ours.branch("chat", at=1, expected_revision=chat.revision)
        chat.messages += talk("x")
        await ours.save(chat)
        return chat

    chat = run(work())
    assert load_history(db, "chat", strict=True) == chat.messages
    row = ConversationRepository.get_by_thread_id(db, "chat")
    assert row is not None
    assert (row.message_count, row.last_message) == (2, "x")
    found = MessageRepository.history(db, row.id)
    assert [(one.role, one.content) for one in found] == [("user", "a"), ("user", "x")]


def test_what_others_have_written_is_loaded_and_gone_on_from(
    ours: PostgresConversationStore, db: TenantSession
) -> None:
    row = ConversationRepository.create(db, "chat", title="Theirs", metadata={"kept": 1})
    MessageRepository.append(db, row.id, role="user", content="a")
    MessageRepository.append(db, row.id, role="assistant", content="b")
    append_history(db, row.id, talk("c"))

    async def work() -> None:
        chat = await loaded(ours)
        assert texts_of(chat.messages) == ["a", "b", "c"]
        chat.messages += talk("d")
        await ours.save(chat, scope=None)
        assert await texts(ours) == ["a", "b", "c", "d"]
        assert [one.head_id for one in await ours.list_conversations()] == (await ids(ours))[3:]

    run(work())
    found = ConversationRepository.require(db, row.id)
    assert found.title == "Theirs"
    assert found.metadata_["kept"] == 1


Change = Callable[[TenantSession, list[Message]], object]
CHANGES: dict[str, tuple[Change, list[str]]] = {
    "append": (
        lambda db, _: MessageRepository.append(db, "chat", role="user", content="x"),
        ["a", "b", "c", "x"],
    ),
    "append_history": (lambda db, _: append_history(db, "chat", talk("x")), ["a", "b", "c", "x"]),
    "clear": (lambda db, _: clear(db, "chat"), []),
    "hide one": (
        lambda db, rows: MessageRepository.deactivate(db, "chat", [rows[1].id]),
        ["a", "c"],
    ),
    "delete one": (lambda db, rows: MessageRepository.delete(db, rows[2].id), ["a", "b"]),
    "branch": (lambda db, rows: ConversationRepository.branch(db, "chat", at=rows[0]), ["a"]),
    "edit": (
        lambda db, rows: MessageRepository.edit(db, rows[2].id, content="new"),
        ["a", "b", "new"],
    ),
}


@pytest.mark.parametrize(("change", "left"), CHANGES.values(), ids=CHANGES)
def test_a_change_by_others_is_a_conflict(
    ours: PostgresConversationStore, db: TenantSession, change: Change, left: list[str]
) -> None:
    async def begin() -> Conversation:
        chat = await saved(ours, "a", "b", "c", scope="mine")
        chat.usage.requests = 7
        await ours.save(chat)
        return chat

    async def go_on(chat: Conversation) -> None:
        chat.messages += talk("mine")
        with pytest.raises(ConversationConflict):
            await ours.save(chat)
        again = await loaded(ours, scope="mine")
        assert texts_of(again.messages) == left
        assert again.usage.requests == 7
        assert again.revision == (await record(ours)).revision != chat.revision
        again.messages += talk("mine")
        await ours.save(again)
        assert await texts(ours) == [*left, "mine"]
        assert await texts(ours, limit=1) == ["mine"]

    chat = run(begin())
    change(db, MessageRepository.history(db, "chat"))
    run(go_on(chat))
    assert texts_of(load_history(db, "chat")) == [*left, "mine"]


def test_a_new_title_is_no_conflict(ours: PostgresConversationStore, db: TenantSession) -> None:
    chat = run(saved(ours, "a"))
    ConversationRepository.update(db, "chat", title="New")
    chat.messages += talk("b")
    run(ours.save(chat))
    assert run(texts(ours)) == ["a", "b"]


def test_what_cannot_be_read_is_left_out_or_an_error(
    ours: PostgresConversationStore, db: TenantSession, tenant: str
) -> None:
    strict = PostgresConversationStore(tenant_id=tenant, strict=True)
    chat = run(saved(ours, "a", "b", "c", "d"))
    rows = MessageRepository.history(db, "chat")
    MessageRepository.update(db, rows[1].id, data=b"{")
    MessageRepository.update(db, rows[2].id, data_format="pydantic-ai/2")

    async def work() -> None:
        entries = await ours.load_entries("chat")
        assert entries is not None
        assert [entry.id for entry in entries] == [str(rows[0].id), str(rows[3].id)]
        assert entries[1].parent_id == str(rows[2].id)
        assert await texts(ours, limit=2) == ["d"]
        for bad in rows[1:3]:
            with pytest.raises(UnreadableMessageError):
                await ours.read_entry(str(bad.id))
        with pytest.raises(UnreadableMessageError) as raised:
            await strict.load("chat")
        assert (raised.value.id, raised.value.position) == (rows[1].id, 2)
        again = await loaded(ours)
        again.messages += talk("e")
        await ours.save(again)
        assert await texts(ours) == ["a", "d", "e"]

    run(work())
    assert len(MessageRepository.history(db, "chat")) == 5
    assert chat.revision is not None


@pytest.mark.parametrize(
    "kept",
    [{"format_version": 2}, {"format_version": 1}, "nonsense", {"state": "{"}, {"state": "\\ud"}],
    ids=str,
)
def test_a_record_of_another_version_is_an_error(
    ours: PostgresConversationStore, db: TenantSession, kept: Any
) -> None:
    chat = run(saved(ours, "a"))
    row = ConversationRepository.get_by_thread_id(db, "chat")
    assert row is not None
    if isinstance(kept, dict) and "state" in kept:
        kept = row.metadata_["pydantic_ai"] | kept
    ConversationRepository.update(db, "chat", metadata={"pydantic_ai": kept})
    chat.messages += talk("b")
    for call in (ours.load("chat"), ours.save(chat), ours.list_conversations()):
        with pytest.raises(InvalidValueError, match=r"^metadata\.pydantic_ai: "):
            run(call)
    assert texts_of(load_history(db, "chat")) == ["a"]


def test_a_record_of_a_newer_version_is_not_written(ours: PostgresConversationStore) -> None:
    newer = ConversationRecord(conversation_id="chat", head_id=None)
    newer.format_version = 2  # type: ignore[assignment]
    entry = ConversationEntry(parent_id=None, message=said("a"))
    with pytest.raises(InvalidValueError, match=r"^format_version: "):
        run(ours.write_record(newer, new_entries=[entry], expected_revision=None))
    assert run(ours.read_record("chat")) is None


def test_nothing_is_half_written(ours: PostgresConversationStore, db: TenantSession) -> None:
    chat = run(saved(ours, "a"))
    good = ConversationEntry(parent_id=None, message=said("b"))
    for bad in (
        ConversationEntry(id="no UUID", parent_id=good.id, message=said("c")),
        ConversationEntry(parent_id=good.id, message=ModelRequest([], metadata={"x": object()})),
        ConversationEntry(parent_id=good.id, message="text"),  # type: ignore[arg-type]
    ):
        wrong = ConversationRecord(conversation_id="chat", head_id=bad.id)
        with pytest.raises(InvalidValueError):
            run(ours.write_record(wrong, new_entries=[good, bad], expected_revision=chat.revision))
    lost = ConversationRecord(conversation_id="chat", head_id=str(uuid4()))
    with pytest.raises(ConversationConflict):
        run(ours.write_record(lost, new_entries=[good], expected_revision=chat.revision))
    assert MessageRepository.count(db) == 1
    assert run(texts(ours)) == ["a"]


def test_entries_may_be_a_tree(ours: PostgresConversationStore) -> None:
    """The framework saves a line; a writer of its own may save more."""

    async def work() -> None:
        root = ConversationEntry(parent_id=None, message=said("root"))
        left = ConversationEntry(parent_id=root.id, message=said("left"))
        right = ConversationEntry(parent_id=root.id, message=said("right"))
        leaf = ConversationEntry(parent_id=left.id, message=said("leaf"))
        tree = [root, left, right, leaf]
        await ours.write_record(
            ConversationRecord(conversation_id="chat", head_id=left.id),
            new_entries=tree,
            expected_revision=None,
        )
        assert await texts(ours) == ["root", "left"]
        for entry in tree:
            assert await ours.read_entry(entry.id) == entry
        assert await ours.read_history(leaf.id) == [root, left, leaf]

    run(work())


def test_a_cancelled_save_is_whole_or_not_at_all(ours: PostgresConversationStore) -> None:
    async def work() -> None:
        await saved(ours, "a")
        outcomes = set()
        for delay in (0, 0, 0.0005, 0.001, 0.002, 0.004, 0.008):
            chat = await loaded(ours)
            before = await texts(ours)
            chat.messages += talk("x", "y")
            task = asyncio.create_task(ours.save(chat))
            await asyncio.sleep(delay)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                outcomes.add("cancelled")
            after = await texts(ours)
            assert after in (before, [*before, "x", "y"])
            # Nothing happens any more when the call has returned.
            assert await texts(ours) == after
        assert outcomes == {"cancelled"}

    run(work())


def test_conversations_belong_to_the_user(db: TenantSession, tenant: str) -> None:
    user = UserRepository.create(db)
    store = PostgresConversationStore(tenant_id=tenant, user_id=user.id)

    async def work() -> None:
        await saved(store, "a")
        await store.fork("chat", new_conversation_id="fork")

    run(work())
    rows = ConversationRepository.list_by_user(db, user.id).items
    assert {row.thread_id for row in rows} == {"chat", "fork"}


def test_sessions_may_come_from_elsewhere(configured: None, tenant: str) -> None:
    made: list[str | None] = []

    def sessions(*, tenant_id: str | None = None) -> TenantSession:
        made.append(tenant_id)
        return SessionLocal(tenant_id=tenant)

    store = PostgresConversationStore(tenant_id="asked", sessions=sessions)
    run(saved(store, "a"))
    assert set(made) == {"asked"}
    assert run(texts(PostgresConversationStore(tenant_id=tenant))) == ["a"]


def test_a_conversations_id_is_its_thread(
    ours: PostgresConversationStore, db: TenantSession
) -> None:
    """The id of another one's row does not stand for it."""
    row = ConversationRepository.create(db, "thread")
    id_ = str(row.id)
    assert run(ours.load(id_)) is None
    run(saved(ours, "a", name=id_))
    assert run(texts(ours, id_)) == ["a"]
    assert load_history(db, row.id) == []


def test_a_history_is_one_query(ours: PostgresConversationStore) -> None:
    async def work() -> None:
        chat = await saved(ours, *map(str, range(50)))
        for at in (10, 8, 6):
            chat = await ours.branch("chat", at=at, expected_revision=chat.revision)
            chat.messages += talk("x", "y")
            await ours.save(chat)
        head = (await record(ours)).head_id
        for limit in (None, 1, 5):
            with counted_statements() as statements:
                await ours.read_history(head, limit=limit)
            assert len(statements) == 1
        with counted_statements() as statements:
            await ours.load("chat")
        assert len(statements) == 2

    run(work())


def test_a_list_costs_the_same_for_any_number(
    ours: PostgresConversationStore, db: TenantSession
) -> None:
    """Also of conversations that others have written."""
    for number in range(30):
        row = ConversationRepository.create(db, f"{number}")
        append_history(db, row.id, talk("a", "b"))
    with counted_statements() as statements:
        found = run(ours.list_conversations())
    assert len(found) == 30
    assert len(statements) <= 2
    heads = {MessageRepository.get_last(db, one.conversation_id).id for one in found}  # type: ignore[union-attr]
    assert {one.head_id for one in found} == set(map(str, heads))


def test_a_list_is_longer_than_a_page(
    ours: PostgresConversationStore, db: TenantSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("database.integrations.pydantic_ai.store.MAX_PAGE", 10)
    then = datetime.now(UTC)
    ConversationRepository.create_many(
        db,
        [{"thread_id": f"{n}", "updated_at": then - timedelta(minutes=n)} for n in range(25)],
    )
    for limit, count in ((None, 25), (10, 10), (11, 11), (24, 24), (30, 25)):
        found = run(ours.list_conversations(limit=limit))
        assert [one.conversation_id for one in found] == [str(n) for n in range(count)]
