"""Erasing a user: everything of theirs, nothing of anybody else's, and a receipt that is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import Column, ForeignKeyConstraint, MetaData, String, Table, Uuid

from database import (
    ALL_TENANTS,
    Base,
    ConfigurationError,
    ContextRepository,
    ConversationRepository,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    MessageRepository,
    NotFoundError,
    SessionLocal,
    TenantSession,
    UserRepository,
    get_db_session,
    get_engine,
    transaction,
)
from database.pool import create_database_engine
from database.repositories.ownership import (
    OWNED,
    SHARED,
    columns_of,
    owners_of,
    references_of,
    unclassified,
)
from database.settings import Settings
from tests.blocking import in_background, until_waiting
from tests.conftest import admin, database_of
from tests.counting import counted_round_trips, counted_statements
from tests.everything import Dump, counts, dump, make_person, tenant_of
from tests.factories import (
    ConversationFactory,
    MemoryFactory,
    MessageFactory,
    StateFactory,
    UserFactory,
)

BEFORE = 5
"""How often each has written when the erasure begins."""

NOTHING = dict.fromkeys(OWNED, 0)


@pytest.fixture(scope="module")
def worker_url(server: str, template: str) -> Iterator[str]:
    """A database to ourselves: what we compare are whole tables."""
    with database_of(server, template) as url:
        yield url


@pytest.fixture
def login(worker_url: str) -> Iterator[psycopg.Connection]:
    with admin(worker_url) as connection:
        yield connection


def lost(before: Dump, after: Dump) -> dict[str, int]:
    """How many rows went, by table; none may have come or changed."""
    for table, rows in after.items():
        assert set(rows) <= set(before[table]), table
    gone = {table: len(rows) - len(after[table]) for table, rows in before.items()}
    assert not any(gone.pop(table) for table in SHARED)
    return gone


def idle(db: TenantSession) -> bool:
    return not db.in_transaction() and get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


# Which tables there are


def test_every_table_is_classified() -> None:
    assert unclassified(Base.metadata.tables.values()) == set()
    assert {*OWNED, *SHARED} == Base.metadata.tables.keys()
    assert len({*OWNED, *SHARED}) == len((*OWNED, *SHARED))


@pytest.mark.parametrize("owner", ["users", "messages", "personas", None])
def test_a_new_table_is_noticed(owner: str | None) -> None:
    metadata = MetaData()
    for table in Base.metadata.tables.values():
        table.to_metadata(metadata)
    columns = [Column("tenant_id", String, primary_key=True), Column("x_id", Uuid)]
    key = ForeignKeyConstraint(["tenant_id", "x_id"], [f"{owner}.tenant_id", f"{owner}.id"])
    Table("new", metadata, *columns, *([key] if owner else []))
    assert unclassified(metadata.tables.values()) == {"new"}


@pytest.mark.parametrize("rule", [None, "SET NULL"])
def test_a_table_that_outlives_its_owner_is_noticed(rule: str | None) -> None:
    keys = ForeignKeyConstraint(["tenant_id", "user_id"], ["u.tenant_id", "u.id"], ondelete=rule)
    table = Table("contexts", MetaData(), Column("tenant_id"), Column("user_id", Uuid), keys)
    assert unclassified([table]) == {"contexts"}


@pytest.mark.parametrize("table", OWNED)
def test_owners_come_first_and_lead_one_way(table: str) -> None:
    owners = [owner.table for owner in owners_of(table)]
    assert all(OWNED.index(owner) < OWNED.index(table) for owner in owners)
    assert len([owner for owner in owners if owner != "users"]) <= 1


def test_what_owns_rows_is_locked() -> None:
    """An erasure locks users and conversations, so that nobody adds to what it deletes."""
    owners = {owner.table for table in OWNED for owner in owners_of(table)}
    assert owners == {"users", "conversations"}


def test_all_references_are_known() -> None:
    """Nothing refers to a table that neither list has, and no column is left out."""
    for name, table in Base.metadata.tables.items():
        assert {*columns_of(name), "tenant_id"} == set(table.columns.keys())
        known = {r.column for r in (*references_of(name, (*OWNED, *SHARED)), *owners_of(name))}
        assert known == {c.name for c in table.columns if c.foreign_keys} - {"tenant_id"}


# Alone


@pytest.mark.parametrize("as_text", [False, True])
def test_everything_goes_and_nothing_else(
    db: TenantSession,
    other: TenantSession,
    login: psycopg.Connection,
    as_text: bool,  # noqa: FBT001
) -> None:
    person = make_person(db, login)
    neighbour = make_person(db, login)
    make_person(other, login)
    MemoryFactory(db=db, conversation_id=neighbour.chats[0].id, user_id=person.id, sequence=10**9)
    # Somebody else's, that goes with the conversation.
    MemoryFactory(db=db, conversation_id=person.chats[2].id, user_id=neighbour.id)
    # Of no user, and about none.
    StateFactory(db=db)
    before = dump(login)
    user_id = str(person.id) if as_text else person.id
    would = UserRepository.erase(db, user_id, dry_run=True)
    assert dump(login) == before
    receipt = UserRepository.erase(db, user_id)
    assert idle(db)
    assert receipt == would == lost(before, dump(login))
    assert list(receipt) == list(OWNED)
    assert all(receipt.values())
    assert receipt["users"] == 1
    assert receipt["conversation_memory"] == 6
    assert UserRepository.erase(db, neighbour.id)["conversation_memory"] == 4


def test_nothing_is_left_anywhere(db: TenantSession, login: psycopg.Connection) -> None:
    person = make_person(db, login)
    UserRepository.erase(db, person.id)
    left = counts(dump(login, tenant_of(db)))
    assert {table for table, rows in left.items() if rows} == set(SHARED)


def test_only_the_tenant_without_row_level_security(
    worker_url: str, db: TenantSession, other: TenantSession, login: psycopg.Connection
) -> None:
    """The same rows, by the same ids, in two tenants."""
    person = make_person(db, login)
    engine = create_database_engine(
        worker_url, Settings(url=worker_url, app_role="", _env_file=None)
    )
    here, there = (TenantSession(engine, tenant_id=tenant_of(s)) for s in (db, other))
    lines = list(UserRepository.export(here, person.id))
    UserRepository.import_(there, lines)
    before = dump(login, tenant_of(other))
    expected = UserRepository.erase(here, person.id, dry_run=True)
    assert expected == {t: n for t, n in counts(before).items() if t in OWNED}
    assert UserRepository.erase(here, person.id) == expected
    assert dump(login, tenant_of(other)) == before
    assert list(UserRepository.export(there, person.id)) == lines
    engine.dispose()


def test_a_user_with_nothing(db: TenantSession) -> None:
    user = UserFactory(db=db)
    for dry_run in (True, False):
        assert UserRepository.erase(db, user.id, dry_run=dry_run) == {**NOTHING, "users": 1}
    assert UserRepository.get(db, user.id) is None


@pytest.mark.parametrize("dry_run", [False, True])
def test_unknown_users(db: TenantSession, other: TenantSession, dry_run: bool) -> None:  # noqa: FBT001
    theirs = UserFactory(db=other)
    for user_id in (uuid4(), str(uuid4()), theirs.id):
        with pytest.raises(NotFoundError, match=r"^User: "):
            UserRepository.erase(db, user_id, dry_run=dry_run)
        assert idle(db)
    for bad in ("no id", "", 5, None):
        with pytest.raises(InvalidValueError, match=r"^id: must be a UUID"):
            UserRepository.erase(db, bad, dry_run=dry_run)  # type: ignore[arg-type]
    with get_db_session(tenant_id=ALL_TENANTS) as all_, pytest.raises(ConfigurationError):
        UserRepository.erase(all_, theirs.id, dry_run=dry_run)
    assert UserRepository.exists(other, theirs.id)


def test_in_a_unit(db: TenantSession, login: psycopg.Connection) -> None:
    person = make_person(db, login)
    before = dump(login, tenant_of(db))
    with pytest.raises(ZeroDivisionError), transaction(db):
        receipt = UserRepository.erase(db, person.id)
        with pytest.raises(NotFoundError):
            UserRepository.erase(db, person.id)
        assert UserRepository.count(db) == 0
        raise ZeroDivisionError
    assert dump(login, tenant_of(db)) == before
    assert UserRepository.erase(db, person.id) == receipt


def test_what_others_refer_to(db: TenantSession, login: psycopg.Connection) -> None:
    """A fork or a memory of somebody else loses the reference, and keeps its place."""
    mine, theirs = (ConversationFactory(db=db, user_id=UserFactory(db=db).id) for _ in range(2))
    message = MessageFactory(db=db, conversation_id=mine.id)
    reply = MessageFactory(db=db, conversation_id=theirs.id)
    memory = MemoryFactory(db=db, conversation_id=theirs.id, first_message_id=message.id)
    login.execute("UPDATE messages SET parent_id = %s WHERE id = %s", [message.id, reply.id])
    login.execute("UPDATE conversations SET head_id = %s WHERE id = %s", [message.id, theirs.id])
    before = ConversationRepository.require(db, theirs.id).to_dict()
    UserRepository.erase(db, mine.user_id)
    assert ConversationRepository.require(db, theirs.id).to_dict() == {**before, "head_id": None}
    assert [m.parent_id for m in MessageRepository.history(db, theirs.id)] == [None]
    assert dump(login, tenant_of(db))["conversation_memory"][0][0] == str(memory.id)


@pytest.mark.parametrize(("dry_run", "statements", "trips"), [(False, 4, 5), (True, 1, 1)])
def test_costs(
    db: TenantSession,
    login: psycopg.Connection,
    dry_run: bool,  # noqa: FBT001
    statements: int,
    trips: int,
) -> None:
    person = make_person(db, login)
    with counted_statements() as sent, counted_round_trips() as waits:
        UserRepository.erase(db, person.id, dry_run=dry_run)
    assert (len(sent), waits.count) == (statements, trips)


# Beside others


Write = Callable[[TenantSession, UUID, UUID], Any]

WRITES: dict[str, Write] = {
    "message": lambda db, _, chat: MessageRepository.append(db, chat, role="user", content="x"),
    "messages": lambda db, _, chat: MessageRepository.append_many(
        db, chat, [{"role": "user", "content": "x"}] * 3
    ),
    "context": lambda db, user, _: ContextRepository.create(
        db, user_id=user, context_type="note", content={}
    ),
    "conversation": lambda db, user, _: ConversationFactory(db=db, user_id=user),
    "state": lambda db, _, chat: StateFactory(db=db, conversation_id=chat),
    "memory": lambda db, user, chat: MemoryFactory(db=db, conversation_id=chat, user_id=user),
    "touch": lambda db, user, _: UserRepository.touch(db, user),
}


@pytest.mark.parametrize("write", WRITES)
def test_who_comes_late_finds_nobody(
    db: TenantSession, login: psycopg.Connection, write: str
) -> None:
    user = UserFactory(db=db).id
    chat = ConversationFactory(db=db, user_id=user).id
    tenant = tenant_of(db)
    with ThreadPoolExecutor(1) as pool:
        with transaction(db):
            UserRepository.erase(db, user)
            late = in_background(pool, tenant, lambda db: WRITES[write](db, user, chat))
            until_waiting(login, late)
        if write == "touch":
            assert late.result() is False
        else:
            with pytest.raises(InvalidReferenceError):
                late.result()
    assert not any(counts(dump(login, tenant)).values())


@pytest.mark.parametrize("write", WRITES)
def test_who_was_first_is_counted(db: TenantSession, login: psycopg.Connection, write: str) -> None:
    user = UserFactory(db=db).id
    chat = ConversationFactory(db=db, user_id=user).id
    tenant = tenant_of(db)
    with ThreadPoolExecutor(1) as pool:
        with transaction(db):
            WRITES[write](db, user, chat)
            erased = in_background(pool, tenant, lambda db: UserRepository.erase(db, user))
            until_waiting(login, erased)
        assert sum(erased.result().values()) == {"touch": 2, "messages": 5}.get(write, 3)
    assert not any(counts(dump(login, tenant)).values())


def test_a_conversation_handed_over_meanwhile(db: TenantSession, login: psycopg.Connection) -> None:
    user, heir = UserFactory(db=db).id, UserFactory(db=db).id
    chat = ConversationFactory(db=db, user_id=user).id
    gained = ConversationFactory(db=db, user_id=heir).id
    MessageFactory(db=db, conversation_id=chat)
    with ThreadPoolExecutor(1) as pool:
        with transaction(db):
            ConversationRepository.update(db, chat, user_id=heir)
            ConversationRepository.update(db, gained, user_id=user)
            erased = in_background(pool, tenant_of(db), lambda d: UserRepository.erase(d, user))
            until_waiting(login, erased)
        assert erased.result() == {**NOTHING, "users": 1, "conversations": 1}
    assert MessageRepository.count(db) == 1
    assert ConversationRepository.list(db).items[0].id == chat


def test_everybody_writes_while_one_erases(db: TenantSession, login: psycopg.Connection) -> None:
    """Each call happens before and is counted, or fails with an error of ours."""
    tenant = tenant_of(db)
    user = UserFactory(db=db).id
    chats = [ConversationFactory(db=db, user_id=user).id for _ in range(4)]
    neighbour = UserFactory(db=db).id
    elsewhere = ConversationFactory(db=db, user_id=neighbour).id
    over, started = Event(), Barrier(7)

    def keep_writing(write: Write, chat: UUID) -> int:
        done = 0
        with SessionLocal(tenant_id=tenant) as own:
            while not over.is_set():
                try:
                    write(own, user, chat)
                    done += 1
                    if done == BEFORE:
                        started.wait()
                except DatabaseError:
                    assert not own.in_transaction()
        return done

    kinds: list[tuple[str, UUID]] = [
        ("message", chats[0]),
        ("messages", chats[1]),
        ("context", chats[2]),
        ("state", chats[3]),
        ("memory", elsewhere),
        ("conversation", chats[3]),
    ]
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(keep_writing, WRITES[kind], chat) for kind, chat in kinds]
        started.wait()
        try:
            receipt = UserRepository.erase(db, user)
        finally:
            over.set()
        message, messages, context, state, memory, conversation = (r.result() for r in running)
    assert receipt == {
        **NOTHING,
        "users": 1,
        "contexts": context,
        "conversations": 4 + conversation,
        "messages": message + 3 * messages,
        "conversation_states": state,
        "conversation_memory": memory,
    }
    left = counts(dump(login, tenant))
    assert {k: v for k, v in left.items() if v} == {"users": 1, "conversations": 1}


@pytest.mark.parametrize("number", [2, 5])
def test_only_one_of_several_erases(
    db: TenantSession, login: psycopg.Connection, number: int
) -> None:
    person = make_person(db, login)
    tenant = tenant_of(db)

    def erase(db: TenantSession) -> dict[str, int] | None:
        try:
            return UserRepository.erase(db, person.id)
        except NotFoundError:
            return None

    with ThreadPoolExecutor(number) as pool:
        receipts = [in_background(pool, tenant, erase) for _ in range(number)]
        found = [receipt.result() for receipt in receipts]
    assert sum(receipt is not None for receipt in found) == 1
