"""Branches of OpenAI Agents SDK sessions: as the SDK's own session has them, and what ours adds."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest
from agents.extensions.memory import AdvancedSQLiteSession
from sqlalchemy import event

from database import (
    ConversationRepository,
    InvalidValueError,
    MessageRepository,
    NotFoundError,
    TenantSession,
    get_engine,
)
from database.integrations.openai_agents import DatabaseSession
from tests import openai_agents
from tests.openai_agents import Weatherman, run

pytestmark = pytest.mark.anyio
ours = openai_agents.ours
session = openai_agents.session_beside(
    lambda: AdvancedSQLiteSession(session_id="chat", create_tables=True)
)


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answered(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"type": "message", "role": "assistant", "content": [part]}


def turns(first: int, last: int) -> list[Any]:
    pairs = ([said(f"question {n}"), answered(f"answer {n}")] for n in range(first, last + 1))
    return [item for pair in pairs for item in pair]


async def shown(session: Any) -> list[tuple[Any, ...]]:
    names = ("branch_id", "message_count", "user_turns", "is_current")
    return sorted(tuple(one[name] for name in names) for one in await session.list_branches())


async def test_a_branch_begins_before_a_turn_and_both_go_on(session: Any) -> None:
    await session.add_items(turns(1, 3))
    assert await session.create_branch_from_turn(2, "b") == "b"
    assert await session.get_items() == turns(1, 1)
    await session.add_items([said("another")])
    assert await session.get_items() == [*turns(1, 1), said("another")]
    assert await session.get_items(branch_id="main") == turns(1, 3)
    assert await session.get_items(3, branch_id="main") == turns(1, 3)[3:]
    assert await session.get_items(0, branch_id="main") == []
    assert await shown(session) == [("b", 3, 2, True), ("main", 6, 3, False)]
    await session.switch_to_branch("main")
    await session.add_items(turns(4, 4))
    assert await session.get_items() == turns(1, 4)
    assert await session.get_items(2, "b") == [turns(1, 1)[1], said("another")]
    assert await session.get_items(99, "main") == turns(1, 4)
    await session.switch_to_branch("main")
    await session.switch_to_branch("b")
    await session.add_items([answered("yes")])
    assert await session.get_items() == [*turns(1, 1), said("another"), answered("yes")]
    assert await shown(session) == [("b", 4, 2, True), ("main", 8, 4, False)]


async def test_turns_count_in_their_branch(session: Any) -> None:
    await session.add_items(turns(1, 3))
    await session.create_branch_from_turn(3, "b")
    await session.add_items(turns(7, 7))
    await session.create_branch_from_turn(3, "c")
    await session.add_items(turns(8, 9))

    async def told(branch: str | None = None) -> list[Any]:
        found = await session.get_conversation_turns(branch_id=branch)
        return [(turn["turn"], turn["full_content"]) for turn in found]

    first = [(1, "question 1"), (2, "question 2")]
    assert await told() == [*first, (3, "question 8"), (4, "question 9")]
    assert await told("b") == [*first, (3, "question 7")]
    assert await told("main") == [*first, (3, "question 3")]
    assert [t["turn"] for t in await session.find_turns_by_content("QUESTION 7", "b")] == [3]
    assert await session.find_turns_by_content("question 7") == []
    await session.switch_to_branch("b")
    assert await session.create_branch_from_turn(3, "d") == "d"
    assert await session.get_items() == turns(1, 2)


async def test_a_branch_begins_before_the_first_turn_of_some_content(session: Any) -> None:
    await session.add_items(turns(1, 3))
    assert await session.create_branch_from_content("QUESTION", "b") == "b"
    assert await session.get_items() == []
    await session.add_items(turns(5, 6))
    assert await session.create_branch_from_content("question 6") not in ("b", "main")
    assert await session.get_items() == turns(5, 5)
    assert await session.get_items(branch_id="b") == turns(5, 6)
    with pytest.raises(ValueError, match=r"search_term|question 3"):
        await session.create_branch_from_content("question 3")
    assert len(await session.list_branches()) == 3


async def test_names_are_made_where_none_is_given(session: Any) -> None:
    await session.add_items(turns(1, 3))
    names = []
    for _ in range(3):
        names.append(await session.create_branch_from_turn(2))
        await session.add_items(turns(2, 2))
    assert len({*names, "main"}) == 4
    assert all(name.startswith("branch_from_turn_2") for name in names)


async def test_what_cannot_be_branched_is_refused_and_changes_nothing(session: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has a text of its own
        await session.create_branch_from_turn(1)
    await session.add_items(turns(1, 2))
    await session.create_branch_from_turn(2, "b")
    await session.add_items(turns(2, 2))
    before = (await session.get_items(), await shown(session))
    for turn, name in ((0, None), (3, None), (-1, None), (1, "b"), (1, "main"), (1, ""), (1, " ")):
        with pytest.raises(ValueError):  # noqa: PT011
            await session.create_branch_from_turn(turn, name)
    for refused in (
        session.switch_to_branch("nowhere"),
        session.delete_branch("nowhere"),
        session.delete_branch("nowhere", force=True),
        session.delete_branch("main"),
        session.delete_branch("main", force=True),
        session.delete_branch(""),
        session.delete_branch("b"),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            await refused
    assert (await session.get_items(), await shown(session)) == before
    assert await session.get_items(branch_id="nowhere") == []
    assert await session.get_conversation_turns("nowhere") == []
    assert await session.find_turns_by_content("question", "nowhere") == []
    assert await session.get_turn_usage(branch_id="nowhere") == []
    assert await session.get_session_usage("nowhere") is None


async def test_deleting_a_branch_leaves_the_others(session: Any) -> None:
    await session.add_items(turns(1, 3))
    await session.create_branch_from_turn(3, "b")
    await session.add_items(turns(4, 5))
    await session.create_branch_from_turn(4, "c")
    await session.add_items(turns(6, 6))
    await session.delete_branch("b")
    assert await session.get_items() == [*turns(1, 2), *turns(4, 4), *turns(6, 6)]
    assert await session.get_items(branch_id="b") == []
    await session.delete_branch("c", force=True)
    assert await session.get_items() == turns(1, 3)
    assert await shown(session) == [("main", 6, 3, True)]
    await session.add_items(turns(4, 4))
    assert await session.get_items() == turns(1, 4)


async def test_pops_take_from_the_current_branch_alone(session: Any) -> None:
    await session.add_items(turns(1, 2))
    await session.create_branch_from_turn(2, "b")
    assert await session.pop_item() == answered("answer 1")
    await session.add_items([answered("better")])
    await session.switch_to_branch("main")
    assert [await session.pop_item() for _ in range(3)] == [*turns(1, 2)[:0:-1]]
    assert await session.get_items() == [said("question 1")]
    assert await session.get_items(branch_id="b") == [said("question 1"), answered("better")]
    assert await session.pop_item() == said("question 1")
    assert await session.pop_item() is None
    assert await session.get_items(branch_id="b") == [said("question 1"), answered("better")]
    await session.switch_to_branch("b")
    assert await session.pop_item() == answered("better")


async def test_what_another_branch_ends_with_outlives_a_pop(session: Any) -> None:
    await session.add_items(turns(1, 2))
    await session.create_branch_from_turn(2, "b")
    await session.switch_to_branch("main")
    assert [await session.pop_item() for _ in range(5)] == [*turns(1, 2)[::-1], None]
    assert await session.get_items(branch_id="b") == turns(1, 1)
    await session.switch_to_branch("b")
    assert await session.get_items() == turns(1, 1)
    assert [await session.pop_item() for _ in range(3)] == [*turns(1, 1)[::-1], None]


async def test_clearing_leaves_main_alone(session: Any) -> None:
    await session.add_items(turns(1, 2))
    await session.create_branch_from_turn(2, "b")
    await session.add_items(turns(3, 3))
    await session.clear_session()
    for branch in (None, "main", "b"):
        assert await session.get_items(branch_id=branch) == []
    await session.add_items(turns(1, 1))
    assert await shown(session) == [("main", 2, 1, True)]


async def test_runs_go_on_in_branches(session: Any) -> None:
    model = Weatherman()
    for city in ("Oslo", "Rome"):
        await session.store_run_usage(await run(session, model, f"Weather in {city}"))
    await session.create_branch_from_turn(2, "b")
    result = await run(session, model, "How often did I ask?")
    assert result.final_output == "2 times."
    await session.store_run_usage(result)
    assert (await session.get_turn_usage(2))["requests"] == 1
    assert (await session.get_turn_usage(2, "main"))["requests"] == 2
    assert (await session.get_session_usage())["requests"] == 5
    assert (await session.get_session_usage("main"))["total_turns"] == 2
    await session.switch_to_branch("main")
    assert (await run(session, model, "How often did I ask?")).final_output == "3 times."
    kinds = [item.get("role", item.get("type")) for item in await session.get_items(branch_id="b")]
    turn = ["user", "function_call", "function_call_output", "assistant"]
    assert kinds == [*turn, "user", "assistant"]


# Ours alone


async def test_an_empty_branch_can_be_left_and_found_again(ours: DatabaseSession) -> None:
    assert await ours.list_branches() == []
    with pytest.raises(InvalidValueError, match="branch_id"):
        await ours.switch_to_branch("main")
    await ours.add_items(turns(1, 1))
    await ours.switch_to_branch("main")
    await ours.create_branch_from_turn(1, "b")
    await ours.switch_to_branch("main")
    assert await ours.get_items() == turns(1, 1)
    assert await shown(ours) == [("b", 0, 0, False), ("main", 2, 1, True)]
    await ours.switch_to_branch("b")
    assert await ours.get_items() == await ours.get_items(branch_id="b") == []
    await ours.add_items(turns(2, 2))
    assert await ours.get_items() == turns(2, 2)
    await ours.delete_branch("b", force=True)
    assert await ours.create_branch_from_turn(1, "b") == "b"
    first, second = await ours.list_branches()
    assert (first["branch_id"], second["branch_id"]) == ("main", "b")
    assert isinstance(first["created_at"], datetime)
    assert first["created_at"].tzinfo is not None
    assert first["created_at"] < second["created_at"]


@pytest.mark.parametrize("bad", [7, "x" * 256, "NUL\x00", "two\nlines", "\ud800"])
async def test_names_are_checked(ours: DatabaseSession, bad: Any) -> None:
    await ours.add_items(turns(1, 1))
    with pytest.raises(InvalidValueError, match="branch_name"):
        await ours.create_branch_from_turn(1, bad)


@pytest.mark.parametrize("bad", [True, "1", 1.0, None])
async def test_turn_numbers_are_checked(ours: DatabaseSession, bad: Any) -> None:
    await ours.add_items(turns(1, 1))
    with pytest.raises(InvalidValueError, match="turn_number"):
        await ours.create_branch_from_turn(bad)


async def test_the_current_branch_is_the_conversation_s(ours: DatabaseSession) -> None:
    other = DatabaseSession("chat", tenant_id=ours.tenant_id)
    await ours.add_items(turns(1, 2))
    assert await other.get_items() == turns(1, 2)
    await ours.create_branch_from_turn(2, "b")
    await other.add_items(turns(3, 3))
    assert await ours.get_items() == [*turns(1, 1), *turns(3, 3)]
    await other.switch_to_branch("main")
    assert await ours.get_items() == turns(1, 2)
    await ours.switch_to_branch("b")
    await other.clear_session()
    assert await shown(ours) == [("main", 0, 0, True)]


async def test_a_name_is_given_once_by_calls_at_once(ours: DatabaseSession) -> None:
    await ours.add_items(turns(1, 2))
    sessions = [DatabaseSession("chat", tenant_id=ours.tenant_id) for _ in range(8)]
    made = await asyncio.gather(
        *(one.create_branch_from_turn(1, "b") for one in sessions), return_exceptions=True
    )
    assert made.count("b") == 1
    assert {str(one) for one in made if one != "b"} == {
        "branch_name: must not be that of another branch"
    }
    await ours.switch_to_branch("main")

    async def back_and_forth(one: DatabaseSession) -> None:
        for name in ("b", "main", "b"):
            await one.switch_to_branch(name)
            await one.add_items([said("here")])

    await asyncio.gather(*(back_and_forth(one) for one in sessions))
    counts = {name: count for name, count, _, _ in await shown(ours)}
    assert sum(counts.values()) == 4 + 24
    assert (await ours.get_items(branch_id="main"))[:4] == turns(1, 2)
    for name, count in counts.items():
        assert len(await ours.get_items(branch_id=name)) == count


async def test_deleting_deletes_what_no_other_branch_shows(
    ours: DatabaseSession, db: TenantSession
) -> None:
    def kept() -> set[str]:
        return {m.content for m in MessageRepository.search(db, None, conversation_id="chat")}

    await ours.add_items(turns(1, 2))
    await ours.create_branch_from_turn(2, "b")
    await ours.add_items([said("b 1"), answered("b 2"), said("b 3")])
    await ours.create_branch_from_turn(3, "empty")
    await ours.switch_to_branch("main")
    await ours.delete_branch("b")
    assert "b 3" not in kept()
    assert {"b 1", "b 2"} < kept()
    await ours.delete_branch("empty")
    assert kept() == {"question 1", "answer 1", "question 2", "answer 2"}
    await ours.create_branch_from_turn(2, "c")
    await ours.add_items([said("c 1")])
    fork = ConversationRepository.fork(db, "chat", thread_id="fork")
    await ours.delete_branch("c", force=True)
    assert "c 1" in kept()
    assert [m.content for m in MessageRepository.history(db, fork.id)][-1] == "c 1"


async def test_a_fork_has_no_branches_yet(ours: DatabaseSession, db: TenantSession) -> None:
    await ours.add_items(turns(1, 2))
    await ours.create_branch_from_turn(2, "b")
    await ours.add_items([said("in b")])
    ConversationRepository.fork(db, "chat", thread_id="fork")
    fork = DatabaseSession("fork", tenant_id=ours.tenant_id)
    assert await fork.get_items() == [*turns(1, 1), said("in b")]
    assert await shown(fork) == [("main", 3, 2, True)]
    assert await fork.get_items(branch_id="b") == []
    await fork.create_branch_from_turn(2, "own")
    assert await shown(fork) == [("main", 3, 2, False), ("own", 2, 1, True)]
    await fork.delete_branch("own", force=True)
    assert await fork.get_items() == await ours.get_items()
    assert await shown(ours) == [("b", 3, 2, True), ("main", 4, 2, False)]


async def test_tenants_are_apart(ours: DatabaseSession) -> None:
    other = DatabaseSession("chat", tenant_id=f"other-{uuid4().hex[:8]}")
    await ours.add_items(turns(1, 2))
    await ours.create_branch_from_turn(2, "b")
    assert await other.list_branches() == []
    assert await other.get_items(branch_id="main") == []
    for refused in (other.switch_to_branch("b"), other.create_branch_from_turn(1)):
        with pytest.raises(InvalidValueError):
            await refused
    await other.add_items(turns(7, 7))
    with pytest.raises(InvalidValueError):
        await other.delete_branch("b")
    assert await shown(ours) == [("b", 2, 1, True), ("main", 4, 2, False)]


async def test_metadata_keep_branches_and_hide_them(
    ours: DatabaseSession, db: TenantSession
) -> None:
    await ours.set_metadata({"title": "Oslo"})
    await ours.add_items(turns(1, 2))
    await ours.create_branch_from_turn(2, "b")
    assert await ours.get_metadata() == {"title": "Oslo"}
    chat = ConversationRepository.get_by_thread_id(db, "chat")
    assert chat
    assert {*chat.metadata_} == {"title", "openai_agents"}
    await ours.set_metadata({"openai_agents": 7, "a": 1})
    assert await ours.get_metadata() == {"a": 1}
    await ours.switch_to_branch("main")
    assert await ours.get_items() == turns(1, 2)
    await ours.clear_session()
    db.expire_all()
    chat = ConversationRepository.get_by_thread_id(db, "chat")
    assert chat
    assert chat.metadata_ == {"a": 1}


@pytest.mark.parametrize("work", ["create", "switch", "delete", "clear"])
async def test_what_fails_midway_leaves_all_as_it_was(ours: DatabaseSession, work: str) -> None:
    await ours.add_items(turns(1, 2))
    await ours.create_branch_from_turn(2, "b")
    await ours.add_items(turns(3, 3))
    calls = {
        "create": lambda: ours.create_branch_from_turn(1, "c"),
        "switch": lambda: ours.switch_to_branch("main"),
        "delete": lambda: ours.delete_branch("b", force=True),
        "clear": ours.clear_session,
    }

    async def state() -> list[Any]:
        return [await shown(ours), await ours.get_items(), await ours.get_items(branch_id="main")]

    before = await state()
    left = 0

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            msg = "the connection is gone"
            raise ConnectionError(msg)

    event.listen(get_engine(), "after_cursor_execute", fail)
    try:
        for statements in range(1, 100):
            left = statements
            try:
                await calls[work]()
            except ConnectionError:
                assert await state() == before
            else:
                break
    finally:
        event.remove(get_engine(), "after_cursor_execute", fail)
    assert statements > 3
    assert await state() != before


async def test_a_branch_whose_end_the_application_deleted(
    ours: DatabaseSession, db: TenantSession
) -> None:
    await ours.add_items(turns(1, 2))
    await ours.create_branch_from_turn(2, "b")
    found = MessageRepository.search(db, "answer 2", conversation_id="chat")
    MessageRepository.delete(db, found.items[0].id)
    assert await ours.get_items(branch_id="main") == []
    with pytest.raises(NotFoundError):
        await ours.switch_to_branch("main")
    assert await ours.get_items() == turns(1, 1)


async def test_what_cannot_be_read_is_left_out_of_branches(
    ours: DatabaseSession, db: TenantSession
) -> None:
    await ours.add_items(turns(1, 2))
    MessageRepository.append(db, "chat", role="assistant", content="a", data_format="other/1")
    await ours.create_branch_from_turn(2, "b")
    assert await ours.get_items(3, branch_id="main") == turns(1, 2)[1:]
    await ours.switch_to_branch("main")
    await ours.add_items(turns(3, 3))
    await ours.create_branch_from_turn(3, "c")
    await ours.switch_to_branch("b")
    await ours.switch_to_branch("c")
    await ours.switch_to_branch("main")
    assert [await ours.pop_item() for _ in range(3)] == [*turns(3, 3)[::-1], answered("answer 2")]
    assert await ours.get_items(branch_id="c") == [*turns(1, 1), said("question 2")]
