"""Branches, forks and turns: what each call gives, refuses, costs and leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text

from database import (
    ALL_TENANTS,
    ConfigurationError,
    ConflictError,
    Conversation,
    ConversationRepository,
    InvalidValueError,
    Message,
    NotFoundError,
    Role,
    SessionLocal,
    TenantSession,
    UserRepository,
    transaction,
)
from database import MessageRepository as Messages
from database.repositories import branches, branching, segments
from database.session import tenant_of
from tests.blocking import in_background, until_waiting
from tests.conftest import admin
from tests.counting import counted_statements
from tests.factories import UserFactory
from tests.threads import THREADS, in_threads

Conversations = ConversationRepository


def talk(db: TenantSession, *contents: str, **fields: Any) -> tuple[Conversation, list[Message]]:
    """A conversation in which user and assistant speak in turn."""
    conversation = Conversations.create(db, **fields)
    roles = (Role.USER, Role.ASSISTANT)
    rows = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return conversation, Messages.append_many(db, conversation.id, rows)


def said(db: TenantSession, conversation: Conversation) -> str:
    return " ".join(message.content for message in Messages.history(db, conversation.id))


def counted(db: TenantSession, conversation: Conversation) -> tuple[int, str | None]:
    row = Conversations.require(db, conversation.id)
    return row.message_count, row.last_message


# Branches


def test_edit(db: TenantSession) -> None:
    chat, (_, _, question, _) = talk(db, "a", "b", "c", "d")
    Messages.update(db, question.id, extra_data={"files": [1]})
    edited = Messages.edit(db, question.id, content="C", model="m")
    assert (edited.role, edited.extra_data, edited.model) == ("user", {"files": [1]}, "m")
    assert said(db, chat) == "a b C"
    assert counted(db, chat) == (3, "C")
    Messages.append(db, chat.id, role="assistant", content="D")
    assert said(db, chat) == "a b C D"
    assert [m.content for m in Messages.history_to(db, question.id)] == ["a", "b", "c"]
    assert Messages.roles_to(db, question.id) == {Role.USER: 2, Role.ASSISTANT: 1}
    assert Messages.require(db, question.id).content == "c"


def test_edit_of_the_first_message(db: TenantSession) -> None:
    chat, (first, _) = talk(db, "a", "b")
    edited = Messages.edit(db, first.id, content="A", role="system")
    assert (edited.parent_id, edited.role) == (edited.id, "system")
    assert said(db, chat) == "A"
    Conversations.switch(db, chat.id, first)
    assert said(db, chat) == "a b"


def test_regenerate(db: TenantSession) -> None:
    chat, (question, answer) = talk(db, "q", "a1")
    call = Messages.append(db, chat.id, role="assistant", content="call", tool_call_id="x")
    result = Messages.append(db, chat.id, role="tool", content="result", tool_call_id="x")
    for of, content in ((answer, "a2"), (call, "a3"), (result, "a4"), (question, "a5")):
        again = Messages.regenerate(db, of.id, content, output_tokens=3)
        assert (again.role, again.output_tokens) == ("assistant", 3)
        assert said(db, chat) == f"q {content}"
    assert Messages.regenerate(db, answer.id) == question
    assert said(db, chat) == "q"
    assert len(Conversations.branches(db, chat.id)) == 5


def test_regenerate_needs_a_question(db: TenantSession) -> None:
    chat = Conversations.create(db)
    greeting = Messages.append(db, chat.id, role="assistant", content="hello")
    with pytest.raises(InvalidValueError, match=r"^message_id: must follow a user's message$"):
        Messages.regenerate(db, greeting.id, "hi")
    with pytest.raises(InvalidValueError, match=r"^message_id: "):
        Messages.regenerate(db, greeting.id)
    user = Messages.append(db, chat.id, role="user", content="hello")
    with pytest.raises(InvalidValueError, match=r"^model: must not be given without content"):
        Messages.regenerate(db, user.id, model="m")
    assert not Conversations.require(db, chat.id).is_branched


@pytest.mark.parametrize("how", ["message", "id", "text", "position"])
def test_branch_at(db: TenantSession, how: str) -> None:
    chat, messages = talk(db, "a", "b", "c", thread_id=f"t{uuid4()}")
    second = messages[1]
    at: Any = {
        "message": second,
        "id": second.id,
        "text": str(second.id),
        "position": second.position,
    }[how]
    returned = Conversations.branch(db, chat.thread_id, at=at)
    assert (returned.head_id, returned.message_count, returned.last_message) == (second.id, 2, "b")
    assert said(db, chat) == "a b"
    assert not any(branch.is_active for branch in Conversations.branches(db, chat.id))
    Messages.append_many(
        db, chat.id, [{"role": "user", "content": "C"}, {"role": "user", "content": "D"}]
    )
    assert said(db, chat) == "a b C D"
    Conversations.branch(db, chat.id, at=None)
    assert said(db, chat) == ""
    assert counted(db, chat) == (0, None)
    Messages.append(db, chat.id, role="user", content="new")
    assert said(db, chat) == "new"


def test_branch_at_the_newest_stays_linear(db: TenantSession) -> None:
    chat, messages = talk(db, "a", "b")
    Conversations.branch(db, chat.id, at=messages[-1])
    row = Conversations.require(db, chat.id)
    assert (row.is_branched, row.head_id) == (False, None)


def test_branches_and_switch(db: TenantSession) -> None:
    chat, (first, second, third, _) = talk(db, "a", "b", "c", "d")
    (only,) = Conversations.branches(db, chat.id)
    assert (only.head.content, only.start, only.parent_id, only.is_active) == ("d", 1, None, True)
    edited = Messages.edit(db, third.id, content="C")
    Messages.append(db, chat.id, role="assistant", content="D")
    other = Messages.edit(db, second.id, content="B")
    found = Conversations.branches(db, chat.id)
    assert [(b.head.content, b.start, b.parent_id, b.is_active) for b in found] == [
        ("B", other.position, first.id, True),
        ("D", edited.position, second.id, False),
        ("d", 1, None, False),
    ]
    for through, wanted in (
        (second, "a b C D"),
        (third, "a b c d"),
        (other, "a B"),
        (edited, "a b C D"),
        (first, "a B"),
    ):
        row = Conversations.switch(db, chat.id, through)
        assert (said(db, chat), row.message_count) == (wanted, len(wanted.split()))
    assert Conversations.branches(db, Conversations.create(db).id) == []


# Forks


def test_prune(db: TenantSession) -> None:
    chat, (a, b, c, d) = talk(db, "a", "b", "c", "d")
    assert Conversations.prune(db, chat.id, d) == 0
    edited = Messages.edit(db, c.id, content="C")
    end = Messages.append(db, chat.id, role="assistant", content="D")
    assert Conversations.prune(db, chat.id, end) == Conversations.prune(db, chat.id, b) == 0
    assert Conversations.prune(db, chat.id, d, keep=[d.id]) == 0
    assert Conversations.prune(db, chat.id, d, keep=[c.id]) == 1
    assert [m.content for m in Messages.history_to(db, c.id)] == ["a", "b", "c"]
    assert Conversations.prune(db, chat.id, c.id) == 1
    assert said(db, chat) == "a b C D"
    Conversations.branch(db, chat.id, at=end)
    again = Messages.edit(db, end.id, content="E")
    Conversations.branch(db, chat.id, at=a)
    assert Conversations.prune(db, chat.id, end, keep=[again.id]) == 1
    assert [m.content for m in Messages.history_to(db, again.id)] == ["a", "b", "C", "E"]
    Conversations.fork(db, chat.id, at=again)
    assert Conversations.prune(db, chat.id, again) == 0
    with pytest.raises(NotFoundError):
        Conversations.prune(db, chat.id, end)
    other, (one, two) = talk(db, "1", "2")
    with pytest.raises(NotFoundError):
        Conversations.prune(db, chat.id, one)
    Messages.edit(db, one.id, content="I")
    assert Conversations.prune(db, other.id, two) == 2
    assert (said(db, other), counted(db, other)) == ("I", (1, "I"))
    Messages.edit(db, edited.id, content="II", conversation_id=chat.id)


def test_pruning_goes_on_where_the_branch_came_from(db: TenantSession) -> None:
    chat, (a, _, _) = talk(db, "a", "b", "c")
    Conversations.branch(db, chat.id, at=a)
    first, _ = (Messages.append(db, chat.id, role="user", content=text) for text in "xy")
    Conversations.branch(db, chat.id, at=first)
    end = Messages.append(db, chat.id, role="user", content="z")
    Conversations.switch(db, chat.id, 1)
    Conversations.branch(db, chat.id, at=a)
    assert [b.head.content for b in Conversations.branches(db, chat.id)] == ["z", "y", "c"]
    assert Conversations.prune(db, chat.id, end) == 1
    y = Conversations.branches(db, chat.id)[0].head
    assert Conversations.prune(db, chat.id, y) == 2
    assert [b.head.content for b in Conversations.branches(db, chat.id)] == ["c"]
    assert said(db, chat) == "a"


@pytest.mark.parametrize("how", ["message", "id", "text"])
def test_pruning_keeps_what_is_named(db: TenantSession, how: str) -> None:
    chat, (first, second, third) = talk(db, "a", "b", "c")
    Messages.edit(db, first.id, content="A")
    kept: Any = {"message": second, "id": second.id, "text": str(second.id)}[how]
    assert Conversations.prune(db, chat.id, third, keep=[kept]) == 1
    assert Conversations.branches(db, chat.id)[1].head == second


@pytest.mark.parametrize("keep", [["x"], [None], [5], "x"])
def test_what_is_no_message_to_keep(db: TenantSession, keep: Any) -> None:
    chat, (first, second) = talk(db, "a", "b")
    for _ in range(2):  # linear, and branched
        with pytest.raises(InvalidValueError, match=r"^keep: must be a message or its UUID$"):
            Conversations.prune(db, chat.id, second, keep=keep)
        Messages.edit(db, first.id, content="A")
    assert Messages.exists(db, second.id)


def shown_branches(db: TenantSession, conversation: Conversation) -> list[tuple[str, bool]]:
    found = Conversations.branches(db, conversation.id)
    return [(branch.head.content, branch.is_active) for branch in found]


def test_branches_end_with_what_is_shown(db: TenantSession) -> None:
    chat, (_, _, third) = talk(db, "a", "b", "c")
    Messages.edit(db, third.id, content="C")
    last = Messages.append(db, chat.id, role="user", content="D")
    for hidden, expected in (
        ([], [("D", True), ("c", False)]),
        ([last.id], [("C", True), ("c", False)]),
        ([third.id], [("C", True)]),
    ):
        Messages.deactivate(db, chat.id, hidden)
        assert shown_branches(db, chat) == expected
    Conversations.branch(db, chat.id, at=1)
    assert shown_branches(db, chat) == [("C", False)]


def test_a_branch_goes_on_behind_hidden_messages(db: TenantSession) -> None:
    chat, (_, _, third) = talk(db, "a", "b", "c")
    second = Messages.edit(db, third.id, content="C")
    answer = Messages.append(db, chat.id, role="user", content="d")
    Messages.edit(db, answer.id, content="D")
    assert shown_branches(db, chat) == [("D", True), ("d", False), ("c", False)]
    Messages.deactivate(db, chat.id, [third.id, second.id, answer.id])
    assert said(db, chat) == "a b D"
    assert shown_branches(db, chat) == [("D", True)]


def test_a_forks_branches_end_with_what_is_shown(db: TenantSession) -> None:
    chat, (first, second, third) = talk(db, "a", "b", "c")
    early = Conversations.fork(db, chat.id, at=first)
    Messages.append(db, early.id, role="user", content="B")
    fork = Conversations.fork(db, early.id)
    late = Conversations.fork(db, chat.id)
    Conversations.branch(db, late.id, at=second)
    Messages.append(db, late.id, role="user", content="C")
    assert shown_branches(db, late) == [("C", True), ("c", False)]
    Messages.deactivate(db, chat.id, [third.id])
    assert shown_branches(db, late) == [("C", True)]
    assert shown_branches(db, fork) == [("B", True)]
    Messages.deactivate(db, early.id)
    assert shown_branches(db, fork) == [("a", True)]
    assert Conversations.branches(db, fork.id)[0].start == 1
    Messages.deactivate(db, chat.id, [first.id, second.id])
    assert shown_branches(db, fork) == []


def test_fork(db: TenantSession) -> None:
    user = UserFactory(db=db)
    chat, messages = talk(db, "a", "b", "c", user_id=user.id, title="t", metadata={"k": 1})
    with counted_statements() as statements:
        fork = Conversations.fork(db, chat.id, at=messages[1], thread_id=f"f{uuid4()}")
    assert not any("INSERT INTO messages" in statement for statement in statements)
    assert (fork.title, fork.user_id, fork.metadata_) == ("t", user.id, {"k": 1})
    assert (fork.message_count, fork.last_message, fork.forked_at_id) == (2, "b", messages[1].id)
    Messages.append(db, fork.id, role="user", content="F")
    Messages.append(db, chat.id, role="assistant", content="d")
    assert (said(db, fork), said(db, chat)) == ("a b F", "a b c d")
    assert [m.position for m in Messages.history(db, fork.id)] == [1, 2, 3]
    whole = Conversations.fork(db, fork.thread_id, title="other", user_id=None)
    assert (said(db, whole), whole.title, whole.user_id) == ("a b F", "other", None)
    assert Conversations.fork(db, Conversations.create(db).id).forked_at_id is None


def test_edit_in_a_fork_leaves_the_other_alone(db: TenantSession) -> None:
    chat, (first, *_) = talk(db, "a", "b")
    fork = Conversations.fork(db, chat.id)
    edited = Messages.edit(db, first.id, content="A", conversation_id=fork.thread_id)
    assert edited.conversation_id == fork.id
    assert (said(db, fork), said(db, chat)) == ("A", "a b")
    shared = next(b for b in Conversations.branches(db, fork.id) if b.head.content == "b")
    Conversations.switch(db, fork.id, shared.head)
    assert said(db, fork) == "a b"
    answer = Messages.regenerate(db, shared.head.id, "B", conversation_id=fork.id)
    assert (said(db, fork), answer.parent_id) == ("a B", first.id)


def test_deleting_keeps_what_forks_show(db: TenantSession) -> None:
    chat, messages = talk(db, "a", "b", "c", "d")
    short = Conversations.fork(db, chat.id, at=messages[1])
    long = Conversations.fork(db, chat.id, at=messages[2])
    Messages.append(db, long.id, role="user", content="L")
    assert Conversations.delete(db, chat.thread_id)
    assert (said(db, short), said(db, long)) == ("a b", "a b c L")
    assert [Messages.exists(db, m.id) for m in messages] == [True, True, True, False]
    assert Conversations.delete(db, long.id)
    assert said(db, short) == "a b"
    assert not Messages.exists(db, messages[2].id)
    assert Conversations.delete(db, short.id)
    assert not any(Messages.exists(db, m.id) for m in messages)
    assert not Conversations.delete(db, chat.id)


def test_a_fork_gets_only_what_it_shows(db: TenantSession) -> None:
    """Not another fork's branch, which its user never saw."""
    chat, (first, second) = talk(db, "a", "b")
    edited = Messages.edit(db, second.id, content="B")
    old, new = (Conversations.fork(db, chat.id, at=at) for at in (second, edited))
    Conversations.delete(db, chat.id)
    assert (said(db, old), said(db, new)) == ("a b", "a B")
    owners = {m.id: Messages.require(db, m.id).conversation_id for m in (first, second, edited)}
    assert owners == {first.id: new.id, second.id: old.id, edited.id: new.id}
    assert [b.head.content for b in Conversations.branches(db, new.id)] == ["B"]


def test_a_cleared_fork_comes_back(db: TenantSession) -> None:
    chat, _ = talk(db, "a", "b")
    fork = Conversations.fork(db, chat.id)
    Messages.append(db, fork.id, role="user", content="F")
    assert Messages.deactivate(db, fork.id) == 1
    assert (said(db, fork), counted(db, fork), said(db, chat)) == ("", (0, None), "a b")
    assert Messages.restore(db, fork.id) == 1
    assert (said(db, fork), counted(db, fork)) == ("a b F", (3, "F"))


def test_clear(db: TenantSession) -> None:
    chat, (first, _) = talk(db, "a", "b")
    fork = Conversations.fork(db, chat.id, at=first)
    Messages.append(db, fork.id, role="user", content="F")
    assert Messages.clear(db, chat.id) == 1
    assert (said(db, chat), counted(db, chat), said(db, fork)) == ("", (0, None), "a F")
    assert Messages.append(db, chat.id, role="user", content="c").position == 3
    assert (said(db, chat), counted(db, chat)) == ("c", (1, "c"))
    assert Messages.clear(db, fork.thread_id) == 2
    assert (said(db, fork), Messages.clear(db, fork.id), Messages.clear(db, uuid4())) == ("", 0, 0)
    other = Conversations.fork(db, chat.id)
    assert Messages.clear(db, other.id) == 0
    assert (said(db, other), said(db, chat)) == ("", "c")


def test_pop(db: TenantSession) -> None:
    chat, (first, second, third) = talk(db, "a", "b", "c")
    assert (Messages.pop_last(db, chat.id), said(db, chat)) == (third, "a b")
    assert not Messages.exists(db, third.id)
    fork = Conversations.fork(db, chat.id)
    assert (Messages.pop_last(db, fork.id), said(db, fork), said(db, chat)) == (second, "a", "a b")
    assert (Messages.pop_last(db, chat.id), said(db, chat)) == (second, "a")
    assert Messages.exists(db, second.id)  # the fork may come back to it
    Messages.append(db, chat.id, role="user", content="d")
    assert Messages.pop_last(db, chat.id, before=2) == first
    assert (said(db, chat), counted(db, chat)) == ("d", (1, "d"))
    assert Messages.pop_last(db, chat.id, before=2) is None


def test_what_was_popped_is_pruned_where_no_fork_shows_it(db: TenantSession) -> None:
    chat, (_, second, third, fourth) = talk(db, "a", "b", "c", "d")
    fork = Conversations.fork(db, chat.id, at=second)
    assert [Messages.pop_last(db, chat.id) for _ in range(3)] == [fourth, third, second]
    assert [b.head.content for b in Conversations.branches(db, chat.id)] == ["d"]
    assert Conversations.prune(db, chat.id, fourth) == 2
    assert (said(db, chat), said(db, fork)) == ("a", "a b")
    assert Conversations.prune(db, chat.id, second) == 0
    Conversations.branch(db, fork.id, at=None)
    assert Conversations.prune(db, chat.id, second) == 0  # the fork may come back to it
    Conversations.delete(db, fork.id)
    assert Conversations.prune(db, chat.id, second) == 1
    assert (said(db, chat), counted(db, chat), Messages.count(db)) == ("a", (1, "a"), 1)


def test_pruning_keeps_what_a_fork_of_a_fork_shows(db: TenantSession) -> None:
    chat, (first, second, third) = talk(db, "a", "b", "c")
    fork = Conversations.fork(db, chat.id, at=second)
    Messages.append(db, fork.id, role="user", content="F")
    last = Conversations.fork(db, fork.id)
    Messages.append(db, last.id, role="user", content="L")
    Messages.clear(db, fork.id)
    for _ in range(3):
        Messages.pop_last(db, chat.id)
    assert Conversations.prune(db, chat.id, third) == 1
    assert (said(db, chat), said(db, last)) == ("", "a b F L")
    assert Messages.exists(db, first.id)


def test_a_cleared_fork_comes_back_when_the_other_is_gone(db: TenantSession) -> None:
    chat, _ = talk(db, "a", "b")
    fork = Conversations.fork(db, chat.id)
    Messages.deactivate(db, fork.id)
    Conversations.delete(db, chat.id)
    assert said(db, fork) == ""
    Messages.restore(db, fork.id)
    assert (said(db, fork), counted(db, fork)) == ("a b", (2, "b"))


def test_an_edit_is_made_once_for_a_key(db: TenantSession) -> None:
    chat, (_, second, _) = talk(db, "a", "b", "c")
    edited = Messages.edit(db, second.id, content="B", idempotency_key="e")
    Messages.append(db, chat.id, role="user", content="x")
    assert Messages.edit(db, second.id, content="B", idempotency_key="e") == edited
    assert (said(db, chat), counted(db, chat)) == ("a B x", (3, "x"))


def test_a_fork_may_have_the_key_of_what_it_inherits(db: TenantSession) -> None:
    chat = Conversations.create(db)
    Messages.append(db, chat.id, role="user", content="a", idempotency_key="k")
    fork = Conversations.fork(db, chat.id)
    Messages.append(db, fork.id, role="user", content="b", idempotency_key="k")
    assert Conversations.delete(db, chat.id)
    assert said(db, fork) == "a b"


def test_a_move_of_the_head_leaves_forks_as_they_are(db: TenantSession) -> None:
    chat, (first, second) = talk(db, "a", "b")
    fork = Conversations.fork(db, chat.id)
    Messages.edit(db, second.id, content="B")
    Conversations.switch(db, chat.id, second)
    Conversations.branch(db, chat.id, at=first)
    assert Conversations.require(db, fork.id).updated_at == fork.updated_at


@pytest.mark.parametrize("change", ["delete", "purge", "update", "delete conversation"])
def test_a_fork_goes_on_while_what_it_shares_changes(
    db: TenantSession, worker_url: str, change: str
) -> None:
    """What the other session does waits for the fork's append, and sees it."""
    chat, (*_, last) = talk(db, "a", "b", "c")
    fork = Conversations.fork(db, chat.id)
    if change == "purge":
        Messages.deactivate(db, chat.id, [last.id])
    calls: dict[str, Callable[[TenantSession], object]] = {
        "delete": lambda own: Messages.delete(own, last.id),
        "purge": lambda own: Messages.purge(own, chat.id),
        "update": lambda own: Messages.update(own, last.id, content="C"),
        "delete conversation": lambda own: Conversations.delete(own, chat.id),
    }
    with admin(worker_url) as login, ThreadPoolExecutor(1) as pool:
        with transaction(db):
            Messages.append(db, fork.id, role="user", content="F")
            changed = in_background(pool, tenant_of(db), calls[change])
            until_waiting(login, changed)
        changed.result()
    shown = {"update": "a b C F", "delete conversation": "a b c F"}.get(change, "a b F")
    assert said(db, fork) == shown
    assert counted(db, fork) == (len(shown.split()), "F")


def test_purging_what_expired_keeps_what_forks_show(
    db: TenantSession, other: TenantSession
) -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    forks = []
    for session in (db, other):
        chat, _ = talk(session, "a", "b", expires_at=past)
        forks.append((session, Conversations.fork(session, chat.id, expires_at=None)))
    assert Conversations.purge_expired(db, dry_run=True) == 1
    with SessionLocal(tenant_id=ALL_TENANTS) as across:
        assert Conversations.purge_expired(across) >= 2
    for session, fork in forks:
        assert (said(session, fork), Conversations.count(session)) == ("a b", 1)


def test_purging_in_a_unit_of_all_tenants(db: TenantSession, other: TenantSession) -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    forks = []
    for session in (db, other):
        chat, _ = talk(session, "a", "b", expires_at=past)
        forks.append((session, Conversations.fork(session, chat.id, expires_at=None)))
    with SessionLocal(tenant_id=ALL_TENANTS) as across:
        role = across.scalar(text("SELECT current_user"))
        with pytest.raises(ZeroDivisionError), transaction(across):
            Conversations.purge_expired(across)
            raise ZeroDivisionError
        assert [Conversations.count(session) for session, _ in forks] == [2, 2]
        with transaction(across):
            assert Conversations.purge_expired(across) >= 2
            # It works across tenants, as before.
            assert across.scalar(text("SELECT current_user")) == role
            assert not across.scalar(text("SELECT current_setting('app.tenant_id', true)"))
            tenants = {tenant_of(session) for session, _ in forks}
            assert tenants <= {*across.scalars(select(Conversation.tenant_id))}
            assert Conversations.purge_expired(across, dry_run=True) == 0
    for session, fork in forks:
        assert (said(session, fork), Conversations.count(session)) == ("a b", 1)


@pytest.mark.parametrize(
    "remove",
    [
        UserRepository.erase,
        UserRepository.delete,
        lambda db, user: UserRepository.delete_non_admins(db, [user]),
    ],
    ids=["erase", "delete", "delete_non_admins"],
)
def test_who_is_erased_ends_what_others_forks_share(
    db: TenantSession, remove: Callable[[TenantSession, UUID], object]
) -> None:
    mine, theirs = UserFactory(db=db), UserFactory(db=db)
    chat, (first, _) = talk(db, "a", "b", user_id=mine.id)
    fork = Conversations.fork(db, chat.id, user_id=theirs.id)
    Messages.append(db, fork.id, role="user", content="F")
    edited = Messages.edit(db, first.id, content="A", conversation_id=fork.id)
    Messages.append(db, fork.id, role="user", content="AA")
    remove(db, mine.id)
    assert (said(db, fork), counted(db, fork)) == ("A AA", (2, "AA"))
    assert Messages.require(db, edited.id).parent_id == edited.id
    assert [b.head.content for b in Conversations.branches(db, fork.id)] == ["AA", "F"]
    assert Messages.count(db) == 3


def test_forks_of_an_administrator_who_is_kept(db: TenantSession) -> None:
    admins, theirs = UserFactory(db=db, is_admin=True), UserFactory(db=db)
    chat, _ = talk(db, "a", "b", user_id=admins.id)
    fork = Conversations.fork(db, chat.id, user_id=theirs.id)
    Messages.append(db, fork.id, role="user", content="F")
    assert UserRepository.delete_non_admins(db, [admins.id]) == 0
    assert (said(db, fork), counted(db, fork)) == ("a b F", (3, "F"))


def test_branches_and_forks_travel(db: TenantSession, other: TenantSession) -> None:
    mine, theirs = UserFactory(db=db), UserFactory(db=db)
    chat, (first, *_) = talk(db, "a", "b", "c", user_id=mine.id)
    Messages.edit(db, first.id, content="A")
    own = Conversations.fork(db, chat.id)
    Messages.append(db, own.id, role="user", content="F")
    Conversations.switch(db, chat.id, first)
    others = Conversations.fork(db, chat.id, user_id=theirs.id)
    Messages.append(db, others.id, role="user", content="T")
    Messages.edit(db, first.id, content="R", conversation_id=others.id)

    UserRepository.import_(other, UserRepository.export(db, mine.id))
    assert (said(other, chat), said(other, own)) == ("a b c", "A F")
    assert len(Conversations.branches(other, chat.id)) == 2
    Messages.append(other, chat.id, role="user", content="d")
    assert said(other, chat) == "a b c d"
    # Of what belongs to another user, only what was written in the fork.
    UserRepository.import_(other, UserRepository.export(db, theirs.id))
    assert (said(other, others), counted(other, others)) == ("R", (1, "R"))
    shown = {b.head.content for b in Conversations.branches(other, others.id)}
    assert shown == {"R", "T"}


def test_an_imported_fork_counts_what_came_along(db: TenantSession, other: TenantSession) -> None:
    mine, theirs = UserFactory(db=db), UserFactory(db=db)
    chat, _ = talk(db, "a", "b", user_id=mine.id)
    bare, fork = (Conversations.fork(db, chat.id, user_id=theirs.id) for _ in range(2))
    Messages.append_many(db, fork.id, [{"role": "user", "content": c} for c in "FG"])
    last = Conversations.fork(db, fork.id)
    Messages.append(db, last.id, role="user", content="L")
    own, (first, _) = talk(db, "c", "d", user_id=theirs.id)
    Messages.edit(db, first.id, content="C")
    Conversations.update(db, own.id, last_message="said by hand")
    UserRepository.import_(other, UserRepository.export(db, theirs.id))
    assert [(said(other, c), counted(other, c)) for c in (bare, fork, last)] == [
        ("", (0, None)),
        ("F G", (2, "G")),
        ("F G L", (3, "L")),
    ]
    assert counted(other, own) == (1, "said by hand")
    for chat in (fork, own):
        old, new = (Conversations.require(session, chat.id) for session in (db, other))
        assert (old.updated_at, old.version) == (new.updated_at, new.version)


# Turns


def rows(*messages: str) -> list[dict[str, Any]]:
    """Of "user", "assistant:x" and "tool:x": who speaks, and the call."""
    parts = (message.partition(":") for message in messages)
    return [
        {"role": role, "content": f"{n}", "tool_call_id": call or None}
        for n, (role, _, call) in enumerate(parts)
    ]


@pytest.mark.parametrize("branched", [False, True], ids=["linear", "branched"])
@pytest.mark.parametrize(
    ("messages", "turns", "begins"),
    [
        ("user assistant user assistant", 1, 2),
        ("user assistant user assistant", 2, 0),
        ("system user assistant user", 5, 0),
        ("user assistant:x tool:x assistant user assistant", 1, 4),
        # The user spoke before the result came.
        ("user user assistant:x user tool:x assistant", 1, 1),
        ("user assistant:x user assistant tool:x", 1, 0),
        ("user user assistant:x assistant:y tool:y user tool:x user", 2, 1),
        ("user assistant:x user assistant:y user tool:x tool:y", 1, 0),
        # Ids of calls are not known, as where one message holds several.
        ("user assistant user tool:x assistant", 1, 0),
        ("user assistant tool:x user tool:y assistant user", 2, 0),
        ("user assistant tool user assistant tool user", 2, 3),
        # A result without any call.
        ("user tool:x user assistant", 2, 0),
        ("user user tool:x user assistant", 2, 1),
        ("assistant tool", 1, 0),
    ],
)
def test_turns(
    db: TenantSession, messages: str, turns: int, begins: int, *, branched: bool
) -> None:
    chat, first = talk(db, "unused")
    if branched:
        Conversations.branch(db, chat.id, at=None)
    else:
        Messages.delete(db, first[0].id)
    made = Messages.append_many(db, chat.id, rows(*messages.split()))
    assert Messages.history(db, chat.id, turns=turns) == made[begins:]


def test_turns_within_bounds(db: TenantSession) -> None:
    chat, messages = talk(db, "a", "b", "c", "d", "e", "f")
    assert Messages.history(db, chat.id, turns=1, before=5) == messages[2:4]
    assert Messages.history(db, chat.id, turns=9, after=2, before=6) == messages[2:5]
    with pytest.raises(InvalidValueError, match=r"^turns: must not be given together with limit$"):
        Messages.history(db, chat.id, turns=1, limit=1)
    for value in (0, -1, True, "1"):
        with pytest.raises(InvalidValueError, match=r"^turns: "):
            Messages.history(db, chat.id, turns=value)  # type: ignore[arg-type]


# Bad input


def test_what_is_unknown_or_foreign(db: TenantSession, other: TenantSession) -> None:
    chat, (first, _) = talk(db, "a", "b")
    foreign, (theirs, _) = talk(other, "x", "y")
    elsewhere, (unrelated, _) = talk(db, "v", "w")
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "branch": lambda c, m: Conversations.branch(db, c, at=m),
        "switch": lambda c, m: Conversations.switch(db, c, m),
        "fork": lambda c, m: Conversations.fork(db, c, at=m),
        "edit": lambda c, m: Messages.edit(db, m, content="!", conversation_id=c),
        "regenerate": lambda c, m: Messages.regenerate(db, m, "!", conversation_id=c),
    }
    for call in calls.values():
        for conversation, message in (
            (chat.id, theirs.id),
            (chat.id, unrelated.id),
            (chat.id, uuid4()),
            (foreign.id, theirs.id),
            (uuid4(), first.id),
            ("no such thread", first.id),
        ):
            with pytest.raises(NotFoundError):
                call(conversation, message)
        with pytest.raises(InvalidValueError):
            call(chat.id, "no UUID")
    for position in (3, 0, -1):
        with pytest.raises((NotFoundError, InvalidValueError)):
            Conversations.branch(db, chat.id, at=position)
    with pytest.raises(InvalidValueError, match=r"^at: "):
        Conversations.branch(db, chat.id, at=True)
    assert Messages.history_to(db, theirs.id) == []
    assert Messages.roles_to(db, theirs.id) == {}
    assert Messages.pop_last(db, foreign.id) is None
    for name in ("head_id", "is_branched", "is_shared", "forked_at_id", "message_count"):
        with pytest.raises(InvalidValueError, match=f"^{name}: is set by the repository"):
            Conversations.fork(db, chat.id, **{name: None})
    assert (said(db, chat), said(db, elsewhere), said(other, foreign)) == ("a b", "v w", "x y")
    assert not Conversations.require(db, chat.id).is_branched
    assert Conversations.count(db) == 2


def test_a_refused_edit_leaves_all_as_it_was(db: TenantSession) -> None:
    chat, (first, _) = talk(db, "a", "b")
    with pytest.raises(InvalidValueError, match=r"^input_tokens: "):
        Messages.edit(db, first.id, content="A", input_tokens=-1)
    assert (said(db, chat), counted(db, chat)) == ("a b", (2, "b"))
    assert not Conversations.require(db, chat.id).is_branched


def test_lock(db: TenantSession) -> None:
    chat, _ = talk(db, "a")
    with pytest.raises(ConfigurationError, match=r"^lock: "):
        Conversations.lock(db, chat.id)
    with transaction(db):
        assert Conversations.lock(db, chat.thread_id) == chat
        assert Conversations.lock(db, uuid4()) is None
        with SessionLocal(tenant_id=tenant_of(db)) as second, second.begin():
            skip = text("SELECT id FROM conversations WHERE id = :id FOR UPDATE SKIP LOCKED")
            assert second.execute(skip, {"id": chat.id}).all() == []


# Concurrency


def test_threads_append_to_a_branch(db: TenantSession) -> None:
    chat, (first, _) = talk(db, "a", "b")
    Conversations.branch(db, chat.id, at=first)

    def append(own: TenantSession, number: int) -> None:
        for count in range(5):
            Messages.append(own, chat.id, role="user", content=f"{number}.{count}")

    in_threads(tenant_of(db), append)
    history = Messages.history(db, chat.id)
    assert len(history) == 1 + 5 * THREADS
    assert counted(db, chat)[0] == len(history)
    assert len(Conversations.branches(db, chat.id)) == 2


def test_threads_pop_each_another_message(db: TenantSession) -> None:
    chat, _ = talk(db, *map(str, range(THREADS * 2)))

    def pop(own: TenantSession, _: int) -> list[Message | None]:
        return [Messages.pop_last(own, chat.id) for _ in range(2)]

    popped = [m.content for found in in_threads(tenant_of(db), pop) for m in found if m]
    assert sorted(popped, key=int) == [str(n) for n in range(THREADS * 2)]
    assert (said(db, chat), counted(db, chat)) == ("", (0, None))


def test_forks_while_the_conversation_is_deleted(db: TenantSession) -> None:
    chat, messages = talk(db, "a", "b", "c")

    def work(own: TenantSession, number: int) -> Conversation | None:
        if number == THREADS // 2:
            Conversations.delete(own, chat.id)
            return None
        try:
            return Conversations.fork(own, chat.id, at=messages[number % 3].id)
        except (NotFoundError, ConflictError):
            return None

    forks = [fork for fork in in_threads(tenant_of(db), work) if fork]
    for fork in forks:
        shown = [m.content for m in Messages.history(db, fork.id)]
        assert shown == ["a", "b", "c"][: fork.message_count]
        assert shown


# Cost


def test_linear_conversations_keep_their_fast_path(db: TenantSession) -> None:
    chat, _ = talk(db, "a", "b", "c")
    reads: dict[str, Callable[[], Any]] = {
        "history": lambda: Messages.history(db, chat.id),
        "limit": lambda: Messages.history(db, chat.id, limit=2),
        "turns": lambda: Messages.history(db, chat.id, turns=1),
        "window": lambda: Messages.window(db, chat.id, 1, 2),
        "append": lambda: Messages.append(db, chat.id, role="user", content="x"),
    }
    for read in reads.values():
        with counted_statements() as statements:
            read()
        assert len(statements) == 1
        assert "RECURSIVE" not in statements[0]
    plan = explained(db, chat, "SELECT id, content")
    assert "using uq_messages_conversation_id_position" in plan
    assert "Sort" not in plan


def explained(db: TenantSession, chat: Conversation, select: str) -> str:
    sql = f"""
        EXPLAIN {select} FROM messages WHERE tenant_id = :tenant AND conversation_id = :chat
            AND is_active AND NOT (SELECT is_branched FROM conversations
                WHERE tenant_id = :tenant AND id = :chat)
        ORDER BY position DESC LIMIT 50"""
    with transaction(db):
        for way in ("seqscan", "bitmapscan", "sort"):
            db.execute(text(f"SET LOCAL enable_{way} = off"))
        lines = db.scalars(text(sql), {"tenant": tenant_of(db), "chat": chat.id}).all()
    return "\n".join(lines)


def test_a_branched_history_is_two_statements(db: TenantSession) -> None:
    chat, (first, _) = talk(db, "a", "b")
    for n in range(5):
        first = Messages.edit(db, first.id, content=str(n))
    with counted_statements() as statements:
        Messages.history(db, chat.id, limit=50)
    assert len(statements) == 2
    with counted_statements() as statements:
        Messages.history_to(db, first.id)
    assert len(statements) == 1


@pytest.mark.parametrize("number", [1, 2, 20])
def test_branches_are_found_by_as_many_statements(db: TenantSession, number: int) -> None:
    chat, (first, _) = talk(db, "a", "b")
    for n in range(number - 1):
        Messages.edit(db, first.id, content=str(n))
    fork = Conversations.fork(db, chat.id, at=first)
    for n in range(number - 1):
        Messages.edit(db, first.id, content=str(n), conversation_id=fork.id)
    for conversation, expected in ((chat, 3), (fork, 5)):
        with counted_statements() as statements:
            found = Conversations.branches(db, conversation.id)
        assert (len(found), len(statements)) == (number, expected)


def test_the_work_for_branches_grows_as_their_number_does(db: TenantSession) -> None:
    calls: list[int] = []
    files = {module.__file__ for module in (branches, branching, segments)}

    def count(frame: FrameType, event: str, _: object) -> None:
        calls[-1] += event == "call" and frame.f_code.co_filename in files

    for number in (100, 400):
        chat, _ = talk(db)
        rows = [{"role": "user", "content": "x"}] * number
        made = Messages.append_tree(db, chat.id, rows, follows=[None, *[0] * (number - 1)])
        for call in (
            lambda chat=chat: Conversations.branches(db, chat.id),
            lambda chat=chat, first=made[0]: Conversations.switch(db, chat.id, first),
        ):
            calls.append(0)
            sys.setprofile(count)
            try:
                call()
            finally:
                sys.setprofile(None)
    few, few_switched, many, many_switched = calls
    assert few > 100
    assert many < 5 * few
    assert many_switched < 5 * few_switched


# Scopes


def test_conversations_are_listed_by_scope(db: TenantSession, other: TenantSession) -> None:
    for session in (db, other):
        for scope in ("support", "support", "sales", None):
            Conversations.create(session, scope=scope)
    newest = Conversations.update(db, Conversations.create(db).id, scope="support")
    page = Conversations.list(db, scope="support", limit=2)
    assert page.items[0] == newest
    rest = Conversations.list(db, scope="support", limit=2, cursor=page.next_cursor)
    assert [c.scope for c in (*page, *rest)] == ["support"] * 3
    assert (Conversations.count(db, scope="sales"), rest.next_cursor) == (1, None)
    for value in ("", "x" * 256, 1):
        with pytest.raises(InvalidValueError, match=r"^scope: "):
            Conversations.create(db, scope=value)
