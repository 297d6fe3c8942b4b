"""`MessageRepository.append_tree`: messages of several branches, appended at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select

from database import (
    AlreadyExistsError,
    Conversation,
    ConversationRepository,
    InvalidReferenceError,
    InvalidValueError,
    Message,
    MessageRepository,
    SessionLocal,
    TenantSession,
    TransientError,
    get_engine,
)
from database.session import tenant_of
from tests.conftest import admin
from tests.counting import counted_statements

Follows = Sequence[int | None]

TREES = st.integers(0, 12).flatmap(
    lambda count: st.tuples(*(st.sampled_from([None, *range(n)]) for n in range(count)))
)


def said(text: object, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": str(text), **fields}


def grown(db: TenantSession, follows: Follows, conversation: UUID | None = None) -> list[Message]:
    where = conversation or ConversationRepository.create(db).id
    messages = [said(n) for n in range(len(follows))]
    return MessageRepository.append_tree(db, where, messages, follows=follows)


def one_by_one(db: TenantSession, follows: Follows, conversation: UUID) -> None:
    before = MessageRepository.get_last(db, conversation)
    ids: list[UUID] = []
    for n, parent in enumerate(follows):
        if n > 0:
            at = before if parent is None else ids[parent]
            ConversationRepository.branch(db, conversation, at=at)
        ids.append(MessageRepository.append(db, conversation, **said(n)).id)


def shown(db: TenantSession, conversation: UUID) -> dict[str, Any]:
    """All that can be seen of a conversation, but for ids and times."""
    history = [message.content for message in MessageRepository.history(db, conversation)]
    row = ConversationRepository.require(db, conversation)
    branches = ConversationRepository.branches(db, conversation)
    ways = []
    for branch in branches:
        ConversationRepository.branch(db, conversation, at=branch.head)
        found = MessageRepository.history(db, conversation)
        ways.append([(message.content, message.position) for message in found])
    return {
        "history": history,
        "ways": ways,
        "active": [branch.is_active for branch in branches],
        "row": (row.message_count, row.last_message, row.last_position, row.is_branched),
    }


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20
)
@given(st.sampled_from(["empty", "linear", "branched", "fork"]), TREES)
def test_a_tree_is_what_branching_makes(db: TenantSession, kind: str, follows: Follows) -> None:
    seen = []
    for write in (grown, one_by_one):
        conversation = ConversationRepository.create(db).id
        if kind != "empty":
            MessageRepository.append_many(db, conversation, [said("a"), said("b"), said("c")])
        if kind == "branched":
            ConversationRepository.branch(db, conversation, at=2)
        if kind == "fork":
            conversation = ConversationRepository.fork(db, conversation, at=2).id
        if write is grown:
            grown(db, follows, conversation)
        else:
            one_by_one(db, follows, conversation)
        seen.append(shown(db, conversation))
    assert seen[0] == seen[1]


def test_what_is_returned_is_what_is_stored(db: TenantSession) -> None:
    made = grown(db, [None, 0, 1, 0, None, 4])
    links = [message.parent_id for message in made]
    assert links == [None, None, None, made[0].id, made[4].id, None]
    assert [message.position for message in made] == [1, 2, 3, 4, 5, 6]
    for message, link in zip(made, links, strict=True):
        db.expire(message)
        assert message.parent_id == link


def test_thousands_of_branches_take_a_few_statements(db: TenantSession) -> None:
    conversation = ConversationRepository.create(db).id
    with counted_statements() as statements:
        made = grown(db, [None, *[0] * 2000], conversation)
    assert len(statements) <= 10
    assert {message.parent_id for message in made[2:]} == {made[0].id}
    history = MessageRepository.history(db, conversation)
    assert [message.id for message in history] == [made[0].id, made[-1].id]


def test_more_than_one_statement_takes(db: TenantSession) -> None:
    made = grown(db, [None, *range(5500), 5400])
    history = MessageRepository.history(db, made[0].conversation_id)
    assert [message.id for message in history] == [m.id for m in [*made[:5401], made[-1]]]


@pytest.mark.parametrize(
    "follows",
    [
        [0, 0],
        [None, 1],
        [None, 2],
        [None, -1],
        [None, "0"],
        [None, False],
        [None],
        [None] * 3,
        None,
        5,
        "01",
        iter([None, 0]),
    ],
)
def test_what_is_no_tree(db: TenantSession, follows: Any) -> None:
    conversation = ConversationRepository.create(db).id
    with pytest.raises(InvalidValueError, match="follows"):
        MessageRepository.append_tree(db, conversation, [said("a"), said("b")], follows=follows)
    assert MessageRepository.history(db, conversation) == []


def test_what_is_refused_leaves_nothing(db: TenantSession, other: TenantSession) -> None:
    conversation = ConversationRepository.create(db).id
    taken = MessageRepository.append(db, conversation, **said("taken"))
    for last, error in (
        (said("keyed", idempotency_key="k"), InvalidValueError),
        (said("doubled", id=taken.id), AlreadyExistsError),
        ({"role": "nobody", "content": ""}, InvalidValueError),
    ):
        with pytest.raises(error):
            MessageRepository.append_tree(
                db, conversation, [said("a"), said("b"), last], follows=[None, 0, 0]
            )
    for session, where in ((db, uuid4()), (other, conversation)):
        with pytest.raises(InvalidReferenceError):
            grown(session, [None, None], where)
    assert [message.content for message in MessageRepository.history(db, conversation)] == ["taken"]
    found = db.get(Conversation, (taken.tenant_id, conversation))
    assert found is not None
    assert not found.is_branched
    db.rollback()
    assert get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def test_two_writers_leave_whole_trees(db: TenantSession) -> None:
    chat = ConversationRepository.create(db).id
    tenant, writers, trees = tenant_of(db), 4, 5

    def write(_: int) -> None:
        with SessionLocal(tenant_id=tenant) as own:
            for _ in range(trees):
                grown(own, [None, 0, 0, None], chat)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    found = db.scalars(select(Message).where(Message.conversation_id == chat)).all()
    assert sorted(message.position for message in found) == list(range(1, 4 * writers * trees + 1))
    # The last one of each tree follows what the history ended with before; so it is a chain.
    row = ConversationRepository.require(db, chat)
    assert (row.message_count, row.last_message) == (writers * trees, "3")
    assert len(MessageRepository.history(db, chat)) == writers * trees


def test_a_server_that_dies_in_the_middle_leaves_nothing(
    db: TenantSession, worker_url: str
) -> None:
    chat = ConversationRepository.create(db).id
    with admin(worker_url) as killer:

        def kill(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if "AS link" in statement:
                pid = connection.connection.driver_connection.info.backend_pid
                killer.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

        event.listen(get_engine(), "before_cursor_execute", kill)
        with pytest.raises(TransientError):
            grown(db, [None, 0, 0], chat)
        event.remove(get_engine(), "before_cursor_execute", kill)
    assert not db.in_transaction()
    assert MessageRepository.history(db, chat) == []
    assert ConversationRepository.require(db, chat).message_count == 0
    assert len(grown(db, [None, 0, 0], chat)) == 3


def test_large_and_unstorable_texts(db: TenantSession) -> None:
    chat = ConversationRepository.create(db).id
    rows = [said("a\0b"), said("x" * 20_000_000), said("c")]
    MessageRepository.append_tree(db, chat, rows, follows=[None, 0, 0])
    assert [one.content for one in MessageRepository.history(db, chat)] == ["a\ufffdb", "c"]
    found = db.scalars(select(Message).where(Message.conversation_id == chat)).all()
    assert sorted(len(message.content) for message in found) == [1, 3, 20_000_000]
