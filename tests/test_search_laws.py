"""Search: what is stored is found, SQL stays data, and other tenants stay apart."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from database import (
    ContextRepository,
    ConversationRepository,
    DatabaseError,
    MessageRepository,
    SessionLocal,
    TenantSession,
    UserRepository,
    transaction,
)
from tests.conftest import admin
from tests.test_conformance import idle, tenant_of

Contexts, Messages = ContextRepository, MessageRepository
examples = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def alphabet(*ranges: str) -> str:
    return "".join(chr(n) for ends in ranges for n in range(ord(ends[0]), ord(ends[-1]) + 1))


SCRIPTS = [
    *(alphabet("az", "AZ", "09"), alphabet("äö"), alphabet("ая", "АЯ"), alphabet("ىي", "بغ")),
    *(alphabet("가갛"), alphabet("一丰"), alphabet("あん", "アン"), alphabet("กฮ"), alphabet("अह")),
    *(alphabet("😀😏"), alphabet("٠٩")),
]
words = st.one_of(
    [st.text(st.sampled_from(letters), min_size=1, max_size=6) for letters in SCRIPTS]
)
spaces = st.sampled_from([" ", "\n", "\t", ", ", '"', " \\ ", "。", "! "])


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, str]:
    """A text, and one of its words."""
    drawn = draw(st.lists(words.filter(lambda w: w.lower() != "or"), min_size=1, max_size=8))
    return "".join(word + draw(spaces) for word in drawn), draw(st.sampled_from(drawn))


class Found:
    """Whether a query finds a text, as a context and as a message."""

    def __init__(self, db: TenantSession, content: str) -> None:
        self.db = db
        self.user = UserRepository.create(db).id
        self.chat = ConversationRepository.create(db).id
        Contexts.store(db, self.user, "note", {"name": content})
        Messages.append(db, self.chat, role="user", content=content)

    def by(self, query: str, mode: Any) -> tuple[int, int]:
        return (
            len(Contexts.search(self.db, self.user, query, mode=mode)),
            len(Messages.search(self.db, query, conversation_id=self.chat, mode=mode)),
        )


@given(drawn=texts())
@examples
def test_a_text_is_found_by_its_words(db: TenantSession, drawn: tuple[str, str]) -> None:
    content, word = drawn
    with transaction(db):
        found = Found(db, content)
        assert found.by(word, "text") == (1, 1)
        assert found.by(f'"{word}"', "text") == (1, 1)
        assert found.by(word.swapcase(), "text") == (1, 1)
        assert found.by(f"absent OR {word}", "text") == (1, 1)
        assert found.by(f"absent {word}", "text") == (0, 0)
        assert found.by(f"-{word}", "text") == (0, 0)


@given(data=st.data(), drawn=texts(), more=st.text(max_size=10))
@examples
def test_a_text_is_found_by_its_substrings(
    db: TenantSession, data: st.DataObject, drawn: tuple[str, str], more: str
) -> None:
    content = (drawn[0] + more).replace("\0", "")
    start = data.draw(st.integers(0, len(content) - 1))
    piece = content[start : data.draw(st.integers(start + 1, len(content)))]
    absent = f"{piece}\u2603"
    with transaction(db):
        found = Found(db, content)
        expected = (1, 1) if piece.strip() else (0, 0)
        assert found.by(piece, "substring") == expected
        assert found.by(absent, "substring") == ((0, 0) if absent not in content else expected)


# SQL

SQL = [
    *(
        "'; DROP TABLE contexts; --",
        "$$",
        "$1",
        "\\",
        "\\'",
        "%s",
        "%(tenant)s",
        ":x",
        "::text",
        "\0",
    ),
    *("' OR '1'='1", '"; DELETE FROM messages; --', "')) || pg_sleep(5) --", "{0}", "$function$"),
    *('" || $ ? (1 == 1)', '") ? (@ == 1', "\ud800", "a' || (SELECT 1) || 'b", "/*", "x\\u0000"),
]


@pytest.mark.parametrize("sql", SQL)
def test_sql_stays_data(db: TenantSession, other: TenantSession, sql: str) -> None:
    clean = sql.replace("\0", "\ufffd").replace("\ud800", "\ufffd")
    user = UserRepository.create(db).id
    chat = ConversationRepository.create(db).id
    bystander = Contexts.store(other, UserRepository.create(other).id, sql, sql).to_dict()
    made = Contexts.store(
        db, user, sql, {sql: sql}, source_identifier=sql, metadata={sql: sql}
    ).to_dict()
    assert made["content"] == {clean: clean}
    assert Contexts.get(db, user, sql, sql).to_dict() == made  # type: ignore[union-attr]
    again = [{"context_type": sql, "content": {sql: sql}, "source_identifier": sql}]
    assert Contexts.store_many(db, user, again).updated == 1
    assert len(Contexts.list(db, context_type=sql, source_prefix=sql)) == 1
    Messages.append(db, chat, role="user", content=f"x{sql}", extra_data={sql: sql})
    for mode in ("text", "substring"):
        found: Any = {"mode": mode, "where": {(sql,): sql}, "highlight": (sql, sql)}
        query: Any = clean if mode == "substring" else None
        assert len(Contexts.search(db, user, query, context_type=sql, **found)) == 1
        assert len(Messages.search(db, query, conversation_id=chat, **found)) == 1
        Contexts.search(db, user, sql, **found)
        Messages.search(db, sql, **found)
    for operand in (sql, [sql], {sql: sql}):
        where: Any = {(sql,): {"contains": operand}}
        assert len(Contexts.search(db, None, None, where=where)) == (
            not isinstance(operand, list | dict)
        )
    strings: list[Any] = [
        lambda: Contexts.get(db, sql),
        lambda: Contexts.get_by_id(db, sql, user_id=user),
        lambda: Contexts.delete(db, sql, user_id=user),
        lambda: Contexts.search(db, sql, sql),
        lambda: Contexts.search(db, user, sql, mode=sql),  # type: ignore[arg-type]
        lambda: Contexts.search(db, user, sql, cursor=sql),
        lambda: Messages.search(db, sql, user_id=sql),
        lambda: Messages.search(db, sql, role=sql),
    ]
    for number, call in enumerate(strings):
        with pytest.raises(DatabaseError):
            call()
        assert idle(db), number
    assert Messages.search(db, None, conversation_id=sql).items == []
    assert idle(db)
    assert Contexts.delete_by_type(db, user, sql) == 1
    assert [row.to_dict() for row in Contexts.list(other)] == [bystander]


# Tenants

CALLS = {
    "search_contexts": "search_contexts(:t, NULL, NULL, NULL, NULL, NULL, NULL,"
    " :words, :regex, 1000, NULL, NULL, 50)",
    "search_messages": "search_messages(:t, NULL, NULL, NULL, NULL, NULL, NULL,"
    " :words, :regex, 1000, NULL, NULL, 50)",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tenant_cannot_search_another(db: TenantSession, other: TenantSession, name: str) -> None:
    for session in (db, other):
        user = UserRepository.create(session).id
        Contexts.store(session, user, "note", "fox")
        chat = ConversationRepository.create(session, user_id=user, thread_id="t").id
        Messages.append(session, chat, role="user", content="fox")
    call = text(f"SELECT count(*) FROM {CALLS[name]}")
    for found in ({"words": "fox", "regex": None}, {"words": None, "regex": "fox"}):
        for tenant, count in (
            (tenant_of(db), 1),
            (tenant_of(other), 0),
            (None, 0),
            ("", 0),
            ("%", 0),
        ):
            assert db.scalar(call, {"t": tenant, **found}) == count
    db.rollback()
    for tenants_own in (Contexts.search(db, None, "fox"), Messages.search(db, "fox")):
        assert [row.tenant_id for row in tenants_own] == [tenant_of(db)]
    foreign = ConversationRepository.list(other).items[0]
    assert Messages.search(db, None, conversation_id=foreign.id).items == []
    assert Messages.search(db, "fox", user_id=foreign.user_id).items == []


@pytest.mark.parametrize("name", CALLS)
def test_only_the_application_may_search(worker_url: str, db: TenantSession, name: str) -> None:
    role = f"stranger_{uuid4().hex[:8]}"
    with admin(worker_url) as login:
        login.execute(f"CREATE ROLE {role}")
        try:
            query = (
                "SELECT has_function_privilege(%s, oid, 'EXECUTE') FROM pg_proc WHERE proname = %s"
            )
            assert login.execute(query, [role, name]).fetchall() == [(False,)]
            assert login.execute(query, ["database_app", name]).fetchall() == [(True,)]
        finally:
            login.execute(f"DROP ROLE {role}")
        fixed = login.execute(
            "SELECT prosecdef, array_to_string(proconfig, ' ') FROM pg_proc WHERE proname = %s",
            [name],
        ).fetchone()
    assert fixed is not None
    assert fixed[0] is True
    assert "search_path=pg_catalog, public, pg_temp" in fixed[1]


@pytest.mark.parametrize("name", CALLS)
def test_temporary_tables_do_not_stand_for_ours(db: TenantSession, name: str) -> None:
    table = name.removeprefix("search_")
    Contexts.store(db, UserRepository.create(db).id, "note", "fox")
    with transaction(db):
        db.execute(text(f"CREATE TEMP TABLE {table} (id uuid) ON COMMIT DROP"))
        db.execute(text("SET LOCAL search_path = pg_temp, public"))
        call = text(f"SELECT count(*) FROM {CALLS[name].replace('search_', 'public.search_')}")
        given = {"t": tenant_of(db), "words": "fox", "regex": None}
        assert db.scalar(call, given) == (name == "search_contexts")


def test_no_search_without_a_tenant(worker_url: str, db: TenantSession) -> None:
    Contexts.store(db, UserRepository.create(db).id, "note", "fox")
    call = CALLS["search_contexts"].replace(":t", "%s").replace(":words", "%s")
    with admin(worker_url) as login:
        query = f"SELECT count(*) FROM {call.replace(':regex', 'NULL')}"
        assert login.execute(query, [tenant_of(db), "fox"]).fetchone() == (0,)
        assert login.execute(query, [None, "fox"]).fetchone() == (0,)
        with pytest.raises(psycopg.errors.UndefinedFunction):
            login.execute("SELECT search_contexts('x')")
    with SessionLocal(tenant_id="x") as fresh, pytest.raises(DBAPIError):
        fresh.execute(text("SELECT search_contexts('x')"))
