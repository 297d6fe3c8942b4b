"""What frameworks need of messages, read without making entities of them."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest

from database import (
    Conversation,
    ConversationRepository,
    InvalidValueError,
    MessageRepository,
    TenantSession,
    get_engine,
    transaction,
)
from tests.counting import counted_round_trips, counted_statements
from tests.test_conformance import idle


@pytest.fixture
def chat(db: TenantSession) -> Conversation:
    """Of a linear history."""
    row = ConversationRepository.create(db)
    MessageRepository.append_many(db, row.id, [message(n) for n in range(6)])
    return row


@pytest.fixture
def branched(db: TenantSession) -> Conversation:
    """A fork, with a branch of its own."""
    source = ConversationRepository.create(db)
    MessageRepository.append_many(db, source.id, [message(n) for n in range(4)])
    row = ConversationRepository.fork(db, source.id, at=2)
    for n in (10, 11, 12):
        MessageRepository.append(db, row.id, **message(n))
    ConversationRepository.branch(db, row.id, at=4)
    for n in (20, 21):
        MessageRepository.append(db, row.id, **message(n))
    return row


def message(number: int) -> dict[str, Any]:
    """Every second one in a framework's own form, also of bytes that are no text."""
    if number % 2:
        return {
            "role": "assistant",
            "content": f"{number}\U0001f642",
            "data": bytes([0, 255, number]) * 50,
            "data_format": "some/1",
            "tool_call_id": f"call {number}",
        }
    return {"role": "user", "content": f"{number}\U0001f642"}


def expected(rows: Any) -> list[tuple[Any, ...]]:
    return [
        (
            *(one.id.bytes, one.position, one.role, None if one.data else one.content),
            *(one.tool_call_id, one.data, one.data_format),
        )
        for one in rows
    ]


@pytest.mark.parametrize("which", ["chat", "branched"])
def test_bodies_are_of_the_history(
    db: TenantSession, which: str, request: pytest.FixtureRequest
) -> None:
    row = request.getfixturevalue(which)
    hidden = MessageRepository.history(db, row.id)[1]
    MessageRepository.deactivate(db, hidden.conversation_id, [hidden.id])
    for bounds in ({}, {"limit": 2}, {"limit": 100}, {"before": 4}, {"limit": 1, "before": 4}):
        rows = MessageRepository.history(db, row.id, **bounds)
        assert rows
        assert MessageRepository.bodies(db, row.id, **bounds) == expected(rows)
        if "before" not in bounds:
            data = [one.data if one.data_format == "some/1" else None for one in rows]
            assert MessageRepository.data(db, row.id, "some/1", **bounds) == data
    with transaction(db):
        assert MessageRepository.bodies(db, str(row.id)) == expected(
            MessageRepository.history(db, row.id)
        )
    rows = MessageRepository.history(db, row.id)
    assert [body.id for body in MessageRepository.bodies(db, row.id)] == [one.id for one in rows]
    assert idle(db)


@pytest.mark.parametrize("which", ["chat", "branched"])
def test_bodies_lead_to_a_message(
    db: TenantSession, which: str, request: pytest.FixtureRequest
) -> None:
    row = request.getfixturevalue(which)
    for one in MessageRepository.history(db, row.id):
        for limit in (None, 1, 3):
            rows = MessageRepository.history_to(db, one.id, limit=limit)
            assert MessageRepository.bodies_to(db, one.id, limit=limit) == expected(rows)
    assert idle(db)


def test_bodies_of_what_there_is_not(
    db: TenantSession, other: TenantSession, chat: Conversation
) -> None:
    head = MessageRepository.history(db, chat.id, limit=1)[0].id
    assert MessageRepository.bodies(db, uuid4()) == MessageRepository.bodies_to(db, uuid4()) == []
    assert MessageRepository.bodies(other, chat.id) == []
    assert MessageRepository.bodies_to(other, head) == []
    assert MessageRepository.last_ids(other, [chat]) == {}
    for wrong in ({"limit": 0}, {"limit": -1}, {"before": "x"}):
        with pytest.raises(InvalidValueError):
            MessageRepository.bodies(db, chat.id, **wrong)


def test_bodies_are_one_round_trip(db: TenantSession, chat: Conversation) -> None:
    with counted_statements() as statements, counted_round_trips() as trips:
        MessageRepository.bodies(db, chat.id)
    assert (len(statements), trips.count) == (1, 1)


def test_only_that_answer_comes_in_binary(db: TenantSession, chat: Conversation) -> None:
    """Also where the statement fails, or is never sent."""
    MessageRepository.bodies(db, chat.id)
    assert MessageRepository.history(db, chat.id)[1].created_at.tzinfo is not None
    engine = get_engine()
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        driver.answer_in_binary()  # type: ignore[union-attr]
        with driver.cursor() as cursor:  # type: ignore[union-attr]
            assert cursor.execute("SELECT 1").pgresult.fformat(0) == 1
            assert cursor.execute("SELECT 1").pgresult.fformat(0) == 0
        driver.answer_in_binary()  # type: ignore[union-attr]
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        with driver.cursor() as cursor:  # type: ignore[union-attr]
            assert cursor.execute("SELECT 1").pgresult.fformat(0) == 0


def test_last_ids(db: TenantSession, chat: Conversation, branched: Conversation) -> None:
    empty = ConversationRepository.create(db)
    cleared = ConversationRepository.create(db)
    MessageRepository.append(db, cleared.id, role="user", content="x")
    MessageRepository.deactivate(db, cleared.id)
    rows = [chat, ConversationRepository.require(db, branched.id), empty, cleared]
    last: dict[UUID, UUID] = {}
    for row in rows:
        for newest in MessageRepository.history(db, row.id, limit=1):
            last[row.id] = newest.id
    assert last.keys() == {chat.id, branched.id}
    assert MessageRepository.last_ids(db, rows) == last
    assert MessageRepository.last_ids(db, []) == {}
    with counted_statements() as statements:
        MessageRepository.last_ids(db, [chat, empty, cleared])
    assert len(statements) == 1
