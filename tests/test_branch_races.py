"""Calls beside each other on conversations that share messages: as if one came after the other.

Of each pair, both orders are tried: with the first call's unit open while the second one waits, and
with both waiting in a row for somebody who lets them go. What is left must be what one of the two
orders leaves without any waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Event
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
import pytest

from database import (
    ALL_TENANTS,
    ConflictError,
    InvalidReferenceError,
    NotFoundError,
    SessionLocal,
    TenantSession,
    UserRepository,
    transaction,
)
from database import ConversationRepository as Conversations
from database import MessageRepository as Messages
from tests.blocking import in_background, until_waiting
from tests.conftest import admin, database_of
from tests.factories import UserFactory


class Chain(NamedTuple):
    """A conversation, a fork of it, and a fork of that, each of a user of its own.

    They show "a b c", "a b d e" and "a b d e f". Beside them the user of the middle has one more
    fork of the first, that shows "a".
    """

    tenant: str
    users: list[UUID]
    first: UUID
    middle: UUID
    last: UUID
    messages: dict[str, UUID]


Call = Callable[[TenantSession, Chain], object]

CALLS: dict[str, Call] = {
    "append to last": lambda db, c: Messages.append(db, c.last, role="user", content="x"),
    "pop first": lambda db, c: Messages.pop_last(db, c.first),
    "pop and prune first": lambda db, c: pop_and_prune(db, c.first),
    "pop last": lambda db, c: Messages.pop_last(db, c.last),
    "fork first": lambda db, c: Conversations.fork(db, c.first, title="4"),
    "fork first at c": lambda db, c: Conversations.fork(db, c.first, at=c.messages["c"], title="4"),
    "fork first for another": lambda db, c: Conversations.fork(
        db, c.first, title="4", user_id=c.users[2]
    ),
    "fork last": lambda db, c: Conversations.fork(db, c.last, title="4"),
    "fork last at e": lambda db, c: Conversations.fork(db, c.last, at=c.messages["e"], title="4"),
    "fork last at a": lambda db, c: Conversations.fork(db, c.last, at=c.messages["a"], title="4"),
    "delete first": lambda db, c: Conversations.delete(db, c.first),
    "delete middle": lambda db, c: Conversations.delete(db, c.middle),
    "delete last": lambda db, c: Conversations.delete(db, c.last),
    "clear middle": lambda db, c: Messages.clear(db, c.middle),
    "delete b": lambda db, c: Messages.delete(db, c.messages["b"]),
    "delete e": lambda db, c: Messages.delete(db, c.messages["e"]),
    "hide first": lambda db, c: Messages.deactivate(db, c.first),
    "erase first's user": lambda db, c: UserRepository.erase(db, c.users[0]),
    "delete first's user": lambda db, c: UserRepository.delete(db, c.users[0]),
    "delete first's non-admin": lambda db, c: UserRepository.delete_non_admins(db, [c.users[0]]),
    "erase middle's user": lambda db, c: UserRepository.erase(db, c.users[1]),
}

PAIRS = [
    ("pop first", "fork first"),
    ("pop first", "fork first at c"),
    ("pop and prune first", "fork first at c"),
    ("pop last", "fork last"),
    # The middle of a chain
    ("delete middle", "append to last"),
    ("delete middle", "fork last"),
    ("delete middle", "fork last at e"),
    ("delete middle", "fork last at a"),
    ("delete middle", "delete last"),
    ("delete middle", "delete b"),
    ("delete middle", "delete e"),
    ("delete middle", "hide first"),
    ("delete middle", "delete first"),
    ("delete middle", "pop and prune first"),
    ("clear middle", "delete first"),
    ("clear middle", "hide first"),
    ("clear middle", "append to last"),
    ("delete first", "fork last at a"),
    ("delete e", "fork last at a"),
    ("delete e", "fork last at e"),
    # A user who goes
    ("fork first", "erase first's user"),
    ("fork first", "delete first's user"),
    ("fork first", "delete first's non-admin"),
    ("fork first for another", "erase first's user"),
    ("fork first for another", "delete first's user"),
    ("fork first for another", "delete first's non-admin"),
    ("pop first", "erase first's user"),
    ("delete middle", "erase first's user"),
    ("delete middle", "delete first's user"),
    ("clear middle", "erase first's user"),
    ("clear middle", "erase middle's user"),
    ("delete first", "erase middle's user"),
    ("delete b", "erase middle's user"),
    ("erase first's user", "delete first's user"),
    ("erase first's user", "delete first's non-admin"),
    ("erase first's user", "erase middle's user"),
]

ROWS: dict[str, Callable[[Chain], UUID]] = {
    "first": lambda c: c.first,
    "middle": lambda c: c.middle,
    "last": lambda c: c.last,
}
"""Which conversation somebody else may hold while both calls come."""


@pytest.fixture(scope="module")
def worker_url(server: str, template: str) -> Iterator[str]:
    """A database to ourselves: whoever waits there, waits for us."""
    with database_of(server, template) as url:
        yield url


@pytest.fixture
def login(worker_url: str) -> Iterator[psycopg.Connection]:
    with admin(worker_url) as connection:
        yield connection


def make_chain() -> Chain:
    tenant = f"chain-{uuid4().hex[:12]}"
    with SessionLocal(tenant_id=tenant) as db, transaction(db):
        users = [UserFactory(db=db).id for _ in range(3)]
        first = Conversations.create(db, user_id=users[0], title="1").id
        written = say(db, first, "a", "b", "c")
        Conversations.fork(db, first, at=written["a"], user_id=users[1], title="5")
        middle = Conversations.fork(db, first, at=written["b"], user_id=users[1], title="2").id
        written |= say(db, middle, "d", "e")
        last = Conversations.fork(db, middle, user_id=users[2], title="3").id
        written |= say(db, last, "f")
    return Chain(tenant, users, first, middle, last, written)


def say(db: TenantSession, conversation: UUID, *contents: str) -> dict[str, UUID]:
    rows = [{"role": "user", "content": content} for content in contents]
    return {m.content: m.id for m in Messages.append_many(db, conversation, rows)}


def pop_and_prune(db: TenantSession, conversation: UUID) -> None:
    with transaction(db):
        popped = Messages.pop_last(db, conversation)
        assert popped is not None
        Conversations.prune(db, conversation, popped)


def end_of(call: str, chain: Chain, db: TenantSession) -> bool:
    """Whether a call is done, and not refused."""
    try:
        CALLS[call](db, chain)
    except (NotFoundError, ConflictError, InvalidReferenceError):
        return False
    return True


def left_of(chain: Chain, done: dict[str, bool]) -> Any:
    """What everybody sees afterwards."""
    with SessionLocal(tenant_id=chain.tenant) as db:
        shown = {}
        for conversation in Conversations.list(db):
            history = [m.content for m in Messages.history(db, conversation.id)]
            newest = next(reversed(history), None)
            assert (conversation.message_count, conversation.last_message) == (len(history), newest)
            shown[conversation.title] = (" ".join(history), conversation.user_id in chain.users[:1])
        kept = {content for content, id_ in chain.messages.items() if Messages.exists(db, id_)}
        return shown, kept, UserRepository.count(db), done


def one_after_the_other(*calls: str) -> Any:
    chain, done = make_chain(), {}
    for call in calls:
        with SessionLocal(tenant_id=chain.tenant) as db:
            done[call] = end_of(call, chain, db)
    return left_of(chain, done)


def while_open(first: str, second: str, login: psycopg.Connection) -> Any:
    """The first call's unit ends when the second call waits for it, or has ended."""
    chain = make_chain()
    with ThreadPoolExecutor(1) as pool:
        with SessionLocal(tenant_id=chain.tenant) as db, transaction(db):
            done = {first: end_of(first, chain, db)}
            late = in_background(pool, chain.tenant, partial(end_of, second, chain))
            until_waiting(login, late)
        done[second] = late.result()
    return left_of(chain, done)


def in_a_row(
    first: str,
    second: str,
    row: str,
    login: psycopg.Connection,
    holder: psycopg.Connection,
) -> Any:
    """Both wait, the first one before the second one, where they need what somebody holds."""
    chain = make_chain()
    with ThreadPoolExecutor(2) as pool:
        with holder.transaction():
            held = "SELECT FROM conversations WHERE tenant_id = %s AND id = %s FOR UPDATE"
            holder.execute(held, [chain.tenant, ROWS[row](chain)])
            waiting = {}
            for call in (first, second):
                run = partial(end_of, call, chain)
                waiting[call] = in_background(pool, chain.tenant, run)
                until_waiting(login, *waiting.values())
        done = {call: one.result() for call, one in waiting.items()}
    return left_of(chain, done)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_as_if_one_came_after_the_other(
    worker_url: str, login: psycopg.Connection, one: str, other: str
) -> None:
    possible = [one_after_the_other(one, other), one_after_the_other(other, one)]
    with admin(worker_url) as holder:
        for first, second in ((one, other), (other, one)):
            assert while_open(first, second, login) in possible
            for row in ROWS:
                assert in_a_row(first, second, row, login, holder) in possible, (first, row)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("days", [None, 30])
def test_what_is_given_more_time_is_not_purged(
    login: psycopg.Connection,
    across: bool,  # noqa: FBT001
    days: int | None,
) -> None:
    chain, now = make_chain(), datetime.now(UTC)
    tenant = ALL_TENANTS if across else chain.tenant
    with ThreadPoolExecutor(1) as pool, SessionLocal(tenant_id=chain.tenant) as db:
        Conversations.update(db, chain.first, expires_at=now - timedelta(days=1))
        with transaction(db):
            later = None if days is None else now + timedelta(days=days)
            Conversations.update(db, chain.first, expires_at=later)
            purged = in_background(pool, tenant, Conversations.purge_expired)
            until_waiting(login, purged)
        assert purged.result() == 0
        assert Conversations.exists(db, chain.first)


def test_a_message_is_changed_that_has_become_a_forks(login: psycopg.Connection) -> None:
    chain, appended, seen = make_chain(), Event(), Event()

    def append(db: TenantSession) -> None:
        with transaction(db):
            Messages.append(db, chain.middle, role="user", content="x")
            appended.set()
            assert seen.wait(30)

    def change(db: TenantSession) -> None:
        Messages.update(db, chain.messages["a"], content="A")

    with ThreadPoolExecutor(2) as pool:
        with SessionLocal(tenant_id=chain.tenant) as db, transaction(db):
            Conversations.delete(db, chain.first)
            appending = in_background(pool, chain.tenant, append)
            until_waiting(login, appending)
            changing = in_background(pool, chain.tenant, change)
            until_waiting(login, appending, changing)
        assert appended.wait(30)
        until_waiting(login, changing)
        seen.set()
        appending.result()
        changing.result()
    shown = left_of(chain, {})[0]
    assert {title: history for title, (history, _) in shown.items()} == {
        "2": "A b d e x",
        "3": "A b d e f",
        "5": "A",
    }


def test_a_fork_is_locked_behind_a_younger_one_that_it_shares_with(
    login: psycopg.Connection,
) -> None:
    chain = make_chain()
    with ThreadPoolExecutor(1) as pool, SessionLocal(tenant_id=chain.tenant) as db:
        older = UUID(int=1)
        Conversations.fork(db, chain.middle, at=chain.messages["d"], id=older, title="6")
        heir = Conversations.fork(db, chain.middle, title="7").id
        Conversations.delete(db, chain.last)
        Conversations.delete(db, chain.middle)
        with transaction(db):
            Messages.append(db, heir, role="user", content="x")
            hiding = in_background(
                pool, chain.tenant, lambda d: Messages.deactivate(d, chain.first)
            )
            until_waiting(login, hiding)
            assert Messages.deactivate(db, heir, [chain.messages["d"]]) == 1
        assert hiding.result() == 3
        assert [m.content for m in Messages.history(db, heir)] == ["e", "x"]
        assert Messages.history(db, older) == []


def test_a_fork_waits_for_no_other_lock_behind_one_in_vain(login: psycopg.Connection) -> None:
    chain = make_chain()
    with ThreadPoolExecutor(2) as pool:
        with SessionLocal(tenant_id=chain.tenant) as db, transaction(db):
            Messages.pop_last(db, chain.last)
            forking = in_background(
                pool, chain.tenant, lambda d: Conversations.fork(d, chain.last, title="4")
            )
            until_waiting(login, forking)
            hiding = in_background(
                pool, chain.tenant, lambda d: Messages.deactivate(d, chain.middle)
            )
            until_waiting(login, forking, hiding)
        assert forking.result().title == "4"
        assert hiding.result() == 2
    left_of(chain, {})


def test_who_is_no_administrator_too_late_is_kept(login: psycopg.Connection) -> None:
    chain = make_chain()
    admin_then, other = chain.users[0], chain.users[2]
    with ThreadPoolExecutor(1) as pool, SessionLocal(tenant_id=chain.tenant) as db:
        UserRepository.update(db, admin_then, is_admin=True)
        with transaction(db):
            UserRepository.touch(db, other)
            deleting = in_background(
                pool, chain.tenant, lambda d: UserRepository.delete_non_admins(d, chain.users[::2])
            )
            until_waiting(login, deleting)
            UserRepository.update(db, admin_then, is_admin=False)
        assert deleting.result() == 1
        assert UserRepository.exists(db, admin_then)
    assert left_of(chain, {})[0]["2"][0] == "a b d e"
