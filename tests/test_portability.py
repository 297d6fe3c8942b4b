"""What is exported comes back as it was; what was tampered with does not come at all."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from database import (
    ALL_TENANTS,
    AlreadyExistsError,
    ConfigurationError,
    ContextRepository,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    MemoryRepository,
    MessageRepository,
    NotFoundError,
    PersonaRepository,
    TenantSession,
    UserRepository,
    get_db_session,
    get_engine,
    transaction,
)
from database.repositories import importing
from database.repositories.ownership import OWNED, SHARED, columns_of
from tests.conftest import admin
from tests.counting import counted_statements
from tests.everything import (
    MICROSECONDS,
    Person,
    counts,
    dump,
    make_person,
    tenant_of,
)
from tests.factories import (
    ContextFactory,
    ConversationFactory,
    MemoryFactory,
    MessageFactory,
    PersonaFactory,
    UserFactory,
)

NOTHING = dict.fromkeys((*SHARED, *OWNED), 0)
HEADER = {"format": "database-user-export", "version": 1}

Change = Callable[[list[Any]], object]


@pytest.fixture
def login(worker_url: str) -> Iterator[psycopg.Connection]:
    with admin(worker_url) as connection:
        yield connection


@pytest.fixture
def person(db: TenantSession, login: psycopg.Connection) -> Person:
    return make_person(db, login)


def connections_in_use() -> int:
    return get_engine().pool.checkedout()  # type: ignore[attr-defined, no-any-return]


def is_empty(login: psycopg.Connection, db: TenantSession) -> bool:
    return not any(counts(dump(login, tenant_of(db))).values())


def rows_of(lines: list[str], table: str) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in lines[1:]]
    return [line["row"] for line in parsed if line["table"] == table]


# There and back


def test_there_and_back(
    db: TenantSession, other: TenantSession, login: psycopg.Connection, person: Person
) -> None:
    make_person(db, login)
    lines = list(UserRepository.export(db, person.id))
    written = UserRepository.import_(other, lines)
    assert list(UserRepository.export(other, person.id)) == lines
    there = dump(login, tenant_of(other))
    assert written == counts(there)
    assert all(written.values())
    here = dump(login, tenant_of(db))
    for table, rows in there.items():
        assert set(rows) <= set(here[table])
    UserRepository.erase(db, person.id)
    UserRepository.erase(other, person.id)
    assert UserRepository.import_(db, lines) == {**written, **dict.fromkeys(SHARED, 0)}
    assert {table: set(rows) for table, rows in dump(login, tenant_of(db)).items()} == {
        table: set(rows) for table, rows in here.items()
    }
    assert connections_in_use() == 0


def test_the_lines(db: TenantSession, person: Person) -> None:
    lines = list(UserRepository.export(db, str(person.id)))
    assert json.loads(lines[0]) == HEADER
    assert all(line.endswith("}\n") for line in lines)
    assert "".join(lines).splitlines(keepends=True) == lines
    parsed = [json.loads(line) for line in lines[1:]]
    assert {line["table"] for line in parsed} == {*SHARED, *OWNED}
    for line in parsed:
        assert line.keys() == {"table", "row"}
        assert list(line["row"]) == columns_of(line["table"])
        assert "tenant_id" not in line["row"]
    # A key's text names its tenant, and so does its beginning.
    assert tenant_of(db) not in "".join(line for line in lines if '"api_keys"' not in line)
    (user,) = rows_of(lines, "users")
    assert user["last_active_at"].startswith("2024-02-29T23:59:59.123457")
    (key,) = rows_of(lines, "api_keys")
    assert len(key["key_hash"]) == len("\\x") + 64


def test_through_a_file(
    db: TenantSession, other: TenantSession, person: Person, tmp_path: Path
) -> None:
    path = tmp_path / "export.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(UserRepository.export(db, person.id))
    with path.open(encoding="utf-8") as file:
        UserRepository.import_(other, file)
    with path.open(encoding="utf-8") as file:
        assert list(UserRepository.export(other, person.id)) == list(file)
    UserRepository.erase(other, person.id)
    UserRepository.import_(other, path.read_text(encoding="utf-8").splitlines())
    assert connections_in_use() == 0


def test_straight_from_another_tenant(
    db: TenantSession, other: TenantSession, person: Person
) -> None:
    UserRepository.import_(other, UserRepository.export(db, person.id))
    both = [list(UserRepository.export(session, person.id)) for session in (db, other)]
    assert both[0] == both[1]


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_in_small_batches(
    db: TenantSession,
    other: TenantSession,
    person: Person,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importing, "_MOST_ROWS", rows)
    lines = list(UserRepository.export(db, person.id))
    UserRepository.import_(other, lines)
    assert list(UserRepository.export(other, person.id)) == lines


def test_after_an_import_life_goes_on(
    db: TenantSession, other: TenantSession, person: Person
) -> None:
    UserRepository.import_(other, UserRepository.export(db, person.id))
    chat = person.chats[0]
    ours = MessageRepository.history(other, chat.id)
    theirs = MessageRepository.history(db, chat.id)
    assert [{**m.to_dict(), "tenant_id": tenant_of(db)} for m in ours] == [
        m.to_dict() for m in theirs
    ]
    assert ours[0].created_at == MICROSECONDS
    added = MessageRepository.append(other, chat.id, role="user", content="more")
    assert added.position == 5
    again = MessageRepository.append(
        other, chat.id, role="user", content="x", idempotency_key="key"
    )
    assert again.position == 1
    (null,) = ContextRepository.list(other, user_id=person.id, context_type="type 0").items
    assert null.content is None


def test_a_user_with_nothing(db: TenantSession, other: TenantSession) -> None:
    user = UserFactory(db=db)
    lines = list(UserRepository.export(db, user.id))
    assert len(lines) == 2
    assert UserRepository.import_(other, lines) == {**NOTHING, "users": 1}


# Whose rows


def test_memories_in_the_conversations_of_others(
    db: TenantSession, other: TenantSession, login: psycopg.Connection
) -> None:
    mine, theirs = (ConversationFactory(db=db, user_id=UserFactory(db=db).id) for _ in range(2))
    persona = PersonaFactory(db=db)
    message = MessageFactory(db=db, conversation_id=theirs.id)
    of_mine = MemoryFactory(db=db, conversation_id=mine.id)
    MemoryFactory(db=db, conversation_id=mine.id, user_id=theirs.user_id, content="their secret")
    about_me = MemoryFactory(
        db=db,
        conversation_id=theirs.id,
        user_id=mine.user_id,
        persona_id=persona.id,
        first_message_id=message.id,
    )
    lines = list(UserRepository.export(db, mine.user_id))
    assert "their secret" not in "".join(lines)
    assert [row["id"] for row in rows_of(lines, "personas")] == [str(persona.id)]
    assert [row["id"] for row in rows_of(lines, "conversations")] == [str(mine.id)]
    marked = json.loads(lines[-1])
    assert (marked["row"]["id"], marked["elsewhere"]) == (str(about_me.id), True)
    assert marked["row"]["first_message_id"] is None
    expected = {"personas": 1, "users": 1, "conversations": 1, "conversation_memory": 1}
    assert UserRepository.import_(other, lines) == {**NOTHING, **expected}
    assert [m.id for m in MemoryRepository.list(other).items] == [of_mine.id]
    assert UserRepository.erase(db, mine.user_id)["conversation_memory"] == 3
    written = UserRepository.import_(db, lines)
    assert written == {**NOTHING, **expected, "personas": 0, "conversation_memory": 2}
    assert list(UserRepository.export(db, mine.user_id)) == lines


def test_references_to_what_is_not_exported_are_null(
    db: TenantSession, other: TenantSession, login: psycopg.Connection
) -> None:
    mine, theirs = (ConversationFactory(db=db, user_id=UserFactory(db=db).id) for _ in range(2))
    message = MessageFactory(db=db, conversation_id=theirs.id)
    fork = MessageFactory(db=db, conversation_id=mine.id)
    MemoryFactory(db=db, conversation_id=mine.id, first_message_id=message.id)
    login.execute("UPDATE messages SET parent_id = %s WHERE id = %s", [message.id, fork.id])
    login.execute("UPDATE conversations SET head_id = %s WHERE id = %s", [message.id, mine.id])
    lines = list(UserRepository.export(db, mine.user_id))
    assert str(message.id) not in "".join(lines)
    UserRepository.import_(other, lines)
    assert list(UserRepository.export(other, mine.user_id)) == lines


def test_shared_rows_stay_as_they_are(
    db: TenantSession, other: TenantSession, person: Person
) -> None:
    lines = list(UserRepository.export(db, person.id))
    UserRepository.import_(other, lines)
    UserRepository.erase(other, person.id)
    persona = PersonaRepository.list(other).items[0]
    PersonaRepository.update(other, persona.id, template="ours")
    assert UserRepository.import_(other, lines)["personas"] == 0
    assert PersonaRepository.require(other, persona.id).template == "ours"
    UserRepository.erase(other, person.id)
    PersonaRepository.delete(other, persona.id)
    PersonaFactory(db=other, name=persona.name)
    with pytest.raises(AlreadyExistsError, match=r"^line 2: name: "):
        UserRepository.import_(other, lines)


def test_unknown_users(db: TenantSession, other: TenantSession) -> None:
    theirs = UserFactory(db=other)
    for user_id in (uuid4(), str(uuid4()), theirs.id):
        with pytest.raises(NotFoundError, match=r"^User: "):
            next(UserRepository.export(db, user_id))
        assert connections_in_use() == 0
    for bad in ("no id", "", 5, None):
        with pytest.raises(InvalidValueError, match=r"^id: must be a UUID"):
            UserRepository.export(db, bad)  # type: ignore[arg-type]
    with get_db_session(tenant_id=ALL_TENANTS) as all_:
        with pytest.raises(ConfigurationError):
            UserRepository.export(all_, theirs.id)
        with pytest.raises(ConfigurationError):
            UserRepository.import_(all_, [])


# Transactions and memory


def test_one_snapshot(db: TenantSession, person: Person) -> None:
    expected = list(UserRepository.export(db, person.id))
    seen: list[str] = []
    with closing(UserRepository.export(db, person.id)) as lines:
        for line in lines:
            if not seen:
                ContextFactory(db=db, user_id=person.id)
                MessageFactory(db=db, conversation_id=person.chats[0].id)
                UserRepository.erase(db, person.id)
            seen.append(line)
    assert seen == expected
    assert not UserRepository.exists(db, person.id)


def test_a_connection_is_held_until_the_end(db: TenantSession, person: Person) -> None:
    lines = UserRepository.export(db, person.id)
    assert connections_in_use() == 0
    next(lines)
    assert (connections_in_use(), db.in_transaction()) == (1, False)
    del lines
    assert connections_in_use() == 0
    for number in (1, 5, 30):
        with closing(UserRepository.export(db, person.id)) as half:
            for _ in range(number):
                next(half)
        assert connections_in_use() == 0
    # The connection takes nothing of the snapshot along.
    UserRepository.touch(db, person.id)
    with transaction(db):
        level = db.connection().exec_driver_sql("SHOW transaction_isolation").scalar()
    assert level == "read committed"


def test_in_a_unit(
    db: TenantSession, other: TenantSession, login: psycopg.Connection, person: Person
) -> None:
    alone = list(UserRepository.export(db, person.id))
    with transaction(db):
        assert list(UserRepository.export(db, person.id)) == alone
        UserRepository.update(db, person.id, first_name="inside")
        with closing(UserRepository.export(db, person.id)) as lines:
            changed = [next(lines) for _ in range(4)]
            assert connections_in_use() == 1
        assert rows_of(changed, "users")[0]["first_name"] == "inside"
        assert not db.connection().exec_driver_sql("SELECT name FROM pg_cursors").all()
    with pytest.raises(ZeroDivisionError), transaction(other):
        UserRepository.import_(other, alone)
        with pytest.raises(AlreadyExistsError):
            UserRepository.import_(other, alone)
        assert list(UserRepository.export(other, person.id)) == alone
        raise ZeroDivisionError
    assert is_empty(login, other)
    assert connections_in_use() == 0


@pytest.mark.parametrize("unit", [False, True])
def test_memory_is_bounded(
    db: TenantSession,
    other: TenantSession,
    login: psycopg.Connection,
    unit: bool,  # noqa: FBT001
) -> None:
    user = UserFactory(db=db)
    login.execute(
        "INSERT INTO contexts (tenant_id, id, user_id, context_type, content)"
        " SELECT %s, gen_random_uuid(), %s, 'note', %s FROM generate_series(1, 20000)",
        [tenant_of(db), user.id, Jsonb("x" * 500)],
    )

    def run(db: TenantSession) -> int:
        if db is other:
            return UserRepository.import_(other, UserRepository.export(source, user.id))["contexts"]
        return sum(1 for _ in UserRepository.export(db, user.id)) - 2

    with TenantSession(tenant_id=tenant_of(db)) as source:
        for session, most in ((db, 1_000_000), (other, 6_000_000)):
            tracemalloc.start()
            try:
                if unit:
                    with transaction(session):
                        assert run(session) == 20_000
                else:
                    assert run(session) == 20_000
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < most
    assert connections_in_use() == 0


def test_costs(db: TenantSession, other: TenantSession, person: Person) -> None:
    with counted_statements() as sent:
        lines = list(UserRepository.export(db, person.id))
    assert len(sent) == 12, "the user, and one for each part"
    with counted_statements() as sent:
        UserRepository.import_(other, lines)
    assert len(sent) == 12, "one for each table, and two kinds of references afterwards"


# Tampering


def row(table: str, **changes: Any) -> Change:
    """Change the first row of a table; `...` takes a column away."""

    def change(lines: list[Any]) -> None:
        found = next(line["row"] for line in lines[1:] if line["table"] == table)
        found.update(changes)
        for column, value in changes.items():
            if value is ...:
                del found[column]

    return change


def line(number: int, value: Any) -> Change:
    def change(lines: list[Any]) -> None:
        lines[number - 1] = value

    return change


def move(table: str, place: int) -> Change:
    def change(lines: list[Any]) -> None:
        found = next(line for line in lines[1:] if line["table"] == table)
        lines.remove(found)
        lines.insert(place, found)

    return change


def copy(table: str, **changes: Any) -> Change:
    """Put a second row behind the first one of a table."""

    def change(lines: list[Any]) -> None:
        place = next(n for n, line in enumerate(lines) if n and line["table"] == table)
        lines.insert(place + 1, {**lines[place], "row": {**lines[place]["row"], **changes}})

    return change


def drop(table: str) -> Change:
    def change(lines: list[Any]) -> None:
        lines[1:] = [line for line in lines[1:] if line["table"] != table]

    return change


FORM = r"must be one JSON object$"
ORDER = r"must come in the order of an export$"
MISSING = r"refers to a row that does not exist in this tenant$"
BAD: dict[str, tuple[Change, type[DatabaseError], str]] = {
    "empty": (lambda lines: lines.clear(), InvalidValueError, rf"^line 1: {FORM}"),
    "no header": (lambda lines: lines.pop(0), InvalidValueError, r"^line 1: must be the header"),
    "format": (line(1, {**HEADER, "format": "x"}), InvalidValueError, r"^line 1: must be the head"),
    "version": (line(1, {**HEADER, "version": 2}), InvalidValueError, r"^line 1: must be the head"),
    "header alone": (lambda lines: lines.__delitem__(slice(1, None)), InvalidValueError, "^line 2"),
    "a second header": (line(2, HEADER), InvalidValueError, r"^line 2: must hold a table"),
    "no JSON": (line(3, "secret"), InvalidValueError, rf"^line 3: {FORM}"),
    "blank": (line(3, ""), InvalidValueError, rf"^line 3: {FORM}"),
    "half": (line(3, '{"table": "users", "row": {"id"'), InvalidValueError, rf"^line 3: {FORM}"),
    "two": (line(3, '{"table": "users"} {}'), InvalidValueError, rf"^line 3: {FORM}"),
    "a list": (line(3, []), InvalidValueError, rf"^line 3: {FORM}"),
    "NaN": (line(3, '{"table": NaN}'), InvalidValueError, rf"^line 3: {FORM}"),
    "deep": (line(3, "[" * 100_000), InvalidValueError, rf"^line 3: {FORM}"),
    "huge garbage": (line(3, "x" * 10_000_000), InvalidValueError, rf"^line 3: {FORM}"),
    "bytes": (line(3, b"{}"), InvalidValueError, r"^line 3: must be text$"),
    "None": (line(3, ...), InvalidValueError, r"^line 3: must be text$"),
    "NUL itself": (line(3, '{"\0"}'), InvalidValueError, r"^line 3: must not contain NUL"),
    "surrogate itself": (line(3, '"\ud800"'), InvalidValueError, r"^line 3: must not contain NUL"),
    "NUL": (
        row("contexts", content="a\0"),
        InvalidValueError,
        r"^line \d+: value: must not .* NUL",
    ),
    "NUL in text": (row("messages", content="a\0"), InvalidValueError, r"^line \d+: value: .* NUL"),
    "surrogate": (row("contexts", content="\udc00"), InvalidValueError, r"^line \d+: value: has "),
    "no row": (line(3, {"table": "users"}), InvalidValueError, r"^line 3: must hold a table"),
    "row no object": (
        line(3, {"table": "users", "row": 1}),
        InvalidValueError,
        r"^line 3: must hold a table, a row, and nothing else$",
    ),
    "more": (
        line(3, {"table": "users", "row": {}, "x": 1}),
        InvalidValueError,
        r"^line 3: must hold a table, a row, and nothing else$",
    ),
    "unknown table": (
        line(3, {"table": "pg_authid", "row": {}}),
        InvalidValueError,
        r"^line 3: table: must be one of an export$",
    ),
    "table no text": (line(3, {"table": [], "row": {}}), InvalidValueError, r"^line 3: table: "),
    "elsewhere": (
        line(3, {"table": "contexts", "row": {}, "elsewhere": True}),
        InvalidValueError,
        r"^line 3: table: ",
    ),
    "elsewhere false": (
        line(3, {"table": "contexts", "row": {}, "elsewhere": False}),
        InvalidValueError,
        r"^line 3: must hold",
    ),
    "unknown column": (
        row("users", password="x"),
        InvalidValueError,
        r"^line 4: must hold no column that users does not have$",
    ),
    "missing column": (
        row("users", email=...),
        InvalidValueError,
        r"^line 4: email: must be given",
    ),
    "tenant": (row("users", tenant_id="x"), InvalidValueError, r"^line 4: tenant_id: must not be"),
    "id": (row("users", id="x"), InvalidValueError, r"^line 4: id: must be a UUID$"),
    "id null": (row("users", id=None), InvalidValueError, r"^line 4: id: must be a UUID$"),
    "id elsewhere": (
        row("contexts", id=5),
        InvalidValueError,
        r"^line 8: value: has the wrong form",
    ),
    "id missing": (row("contexts", id=None), InvalidValueError, r"^line 8: id: must not be None$"),
    "timestamp": (row("users", created_at="x"), InvalidValueError, r"^line 4: value: "),
    "check": (row("users", email="NO"), InvalidValueError, r"^line 4: email: breaks a rule"),
    "too long": (row("users", username="x" * 999), InvalidValueError, r"^line 4: value: is too"),
    "no embedding": (row("conversation_memory", embedding=[1]), InvalidValueError, r"^line \d+: "),
    "order": (move("identities", 9), InvalidValueError, rf"^line 10: {ORDER}"),
    "persona last": (move("personas", 6), InvalidValueError, rf"^line 7: {ORDER}"),
    "no user": (drop("users"), InvalidValueError, r"^line 4: must be the row of the user$"),
    "two users": (copy("users"), InvalidValueError, r"^line 5: must be of the same user$"),
    "twice": (copy("contexts"), AlreadyExistsError, r"^line 9: id: already exists$"),
    "same key": (
        copy("identities", id=str(uuid4())),
        AlreadyExistsError,
        r"^line 6: provider, subject: already exists$",
    ),
    "no persona": (drop("personas"), InvalidReferenceError, rf"^line \d+: persona_id: {MISSING}"),
    "no module": (drop("modules"), InvalidReferenceError, rf"^line \d+: module_id: {MISSING}"),
    "no conversations": (
        drop("conversations"),
        InvalidReferenceError,
        rf"^line \d+: conversation_id: {MISSING}",
    ),
    "no messages": (drop("messages"), InvalidReferenceError, rf"first_message_id: {MISSING}"),
    "of another user": (
        row("contexts", user_id=str(uuid4())),
        InvalidReferenceError,
        rf"^line 8: user_id: {MISSING}",
    ),
    "of no user": (
        row("conversations", user_id=None),
        InvalidReferenceError,
        rf"^line \d+: user_id: {MISSING}",
    ),
    "no parent": (
        row("messages", parent_id=str(uuid4())),
        InvalidReferenceError,
        rf"^line \d+: parent_id: {MISSING}",
    ),
    "no head": (
        row("conversations", head_id=str(uuid4())),
        InvalidReferenceError,
        rf"^line \d+: head_id: {MISSING}",
    ),
    "head no id": (
        row("conversations", head_id="x"),
        InvalidValueError,
        r"^line \d+: value: has the wrong form$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_was_tampered_with(
    db: TenantSession,
    other: TenantSession,
    login: psycopg.Connection,
    person: Person,
    case: str,
) -> None:
    change, error, message = BAD[case]
    lines: list[Any] = [json.loads(line) for line in UserRepository.export(db, person.id)]
    # What JSON has, but floats have not, is in the rows before.
    lines = [line for line in lines if line.get("row", {}).get("context_type") != "raw"]
    change(lines)
    lines = [json.dumps(line) if isinstance(line, dict | list) else line for line in lines]
    with pytest.raises(error, match=message) as caught:
        UserRepository.import_(other, lines)
    shown = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__cause__!s}"
    assert "secret" not in shown
    assert "xx" not in shown
    assert not other.in_transaction()
    assert connections_in_use() == 0
    assert is_empty(login, other)


def test_json_too_deep_for_the_server(db: TenantSession) -> None:
    """Newer versions of Python let more levels through than the server takes."""
    with pytest.raises(InvalidValueError, match=r"^value: is nested too deeply$"), transaction(db):
        db.connection().exec_driver_sql("SELECT CAST(repeat('[', 100000) AS json)")


def test_the_line_at_fault_is_found_in_a_batch(
    db: TenantSession, other: TenantSession, login: psycopg.Connection
) -> None:
    user = UserFactory(db=db)
    for number in range(20):
        ContextFactory(db=db, user_id=user.id, context_type=f"type {number}")
    lines = list(UserRepository.export(db, user.id))
    for number in range(2, len(lines)):
        bad = json.loads(lines[number])
        bad["row"]["context_type"] = ""
        tampered = [*lines[:number], json.dumps(bad), *lines[number + 1 :]]
        with pytest.raises(InvalidValueError, match=rf"^line {number + 1}: context_type: "):
            UserRepository.import_(other, tampered)
        assert is_empty(login, other)


def test_a_second_import(db: TenantSession, login: psycopg.Connection, person: Person) -> None:
    before = dump(login, tenant_of(db))
    lines = list(UserRepository.export(db, person.id))
    with pytest.raises(AlreadyExistsError, match=r"^line 4: (id|email): already exists$"):
        UserRepository.import_(db, lines)
    assert dump(login, tenant_of(db)) == before


def test_a_file_takes_nothing_from_other_users(
    db: TenantSession, other: TenantSession, login: psycopg.Connection, person: Person
) -> None:
    """What is in the tenant is no part of a file that names it."""
    victim = make_person(other, login)
    chat = victim.chats[0]
    last = MessageRepository.get_last(other, chat.id)
    assert last is not None
    before = dump(login, tenant_of(other))
    exported = list(UserRepository.export(db, person.id))
    tampered: list[tuple[str, str, UUID]] = [
        ("api_keys", "user_id", victim.id),
        ("conversations", "user_id", victim.id),
        ("conversations", "head_id", last.id),
        ("messages", "conversation_id", chat.id),
        ("messages", "parent_id", last.id),
        ("conversation_states", "conversation_id", chat.id),
        ("conversation_memory", "conversation_id", chat.id),
        ("conversation_memory", "user_id", victim.id),
        ("conversation_memory", "first_message_id", last.id),
    ]
    for table, column, value in tampered:
        lines: list[Any] = [json.loads(line) for line in exported]
        lines = [line for line in lines if line.get("row", {}).get("context_type") != "raw"]
        row(table, **{column: str(value)})(lines)
        with pytest.raises(InvalidReferenceError, match=r"^line \d+: "):
            UserRepository.import_(other, map(json.dumps, lines))
        assert dump(login, tenant_of(other)) == before


def test_large_lines_are_rows_too(db: TenantSession, other: TenantSession) -> None:
    user = UserFactory(db=db)
    chat = ConversationFactory(db=db, user_id=user.id)
    MessageFactory(db=db, conversation_id=chat.id, content="é" * 10_000_000)
    for _ in range(3):
        MessageFactory(db=db, conversation_id=chat.id, data=b"\xff" * 2_000_000)
    lines = list(UserRepository.export(db, user.id))
    assert UserRepository.import_(other, lines)["messages"] == 4
    assert list(UserRepository.export(other, user.id)) == lines


def test_lines_that_fail_to_come(
    db: TenantSession, other: TenantSession, login: psycopg.Connection, person: Person
) -> None:
    def broken() -> Iterator[str]:
        yield from list(UserRepository.export(db, person.id))[:20]
        raise OSError

    with pytest.raises(OSError, match=r"^$"):
        UserRepository.import_(other, broken())
    assert is_empty(login, other)
    assert (other.in_transaction(), connections_in_use()) == (False, 0)
