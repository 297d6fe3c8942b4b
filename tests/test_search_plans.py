"""Search: which indexes serve it, for the application's role, as auto_explain logs the plans."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import text

from database import ContextRepository as Contexts
from database import (
    ConversationRepository,
    SessionLocal,
    TenantSession,
    UserRepository,
    configure,
    get_engine,
)
from database import MessageRepository as Messages
from database.driver import driver_of
from tests.conftest import admin, database_of
from tests.test_contexts import item

ROWS = 4_000
USERS = 20


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[tuple[str, UUID, UUID]]:
    """A database with rows of two tenants, one user of them, and a conversation."""
    with database_of(server, template) as url:
        configure(url=url)
        for name in ("b", "a"):
            with SessionLocal(tenant_id=name) as db:
                users = [UserRepository.create(db).id for _ in range(USERS)]
                for n, user in enumerate(users):
                    Contexts.store_many(db, user, (note(i) for i in range(n, ROWS, USERS)))
                chat = ConversationRepository.create(db, user_id=users[7]).id
                rows = ({"role": "user", "content": words(n)} for n in range(ROWS))
                Messages.append_many(db, chat, rows)
        with admin(url) as login:
            login.execute("VACUUM ANALYZE")
        yield url, users[7], chat


def words(n: int) -> str:
    return f"common words w{n} rare{n:05}thing in every text"


def note(n: int) -> dict[str, Any]:
    return item(n, {"text": words(n), "n": n, "kind": f"k{n % 3}"})


class Explained:
    """A session of the application's role, and the plans of what it ran."""

    def __init__(self, db: TenantSession, user: UUID, chat: UUID) -> None:
        self.db, self.user, self.chat = db, user, chat
        self.notices: list[str] = []

    def plan(self) -> str:
        found = "\n".join(n for n in self.notices if "search_" in n or "Index" in n)
        self.notices.clear()
        return found


@pytest.fixture
def explained(filled: tuple[str, UUID, UUID]) -> Iterator[Explained]:
    url, user, chat = filled
    configure(url=url)
    with SessionLocal(tenant_id="a") as db:
        # Only a superuser may load it; it stays loaded for the connection's other roles.
        with get_engine().connect().execution_options(isolation_level="AUTOCOMMIT") as login:
            for setting in (
                "LOAD 'auto_explain'",
                "SET auto_explain.log_min_duration = 0",
                "SET auto_explain.log_nested_statements = on",
                "SET auto_explain.log_level = notice",
            ):
                login.execute(text(setting))
        assert get_engine().pool.checkedin() == 1  # type: ignore[attr-defined]
        found = Explained(db, user, chat)
        with listening(db, found.notices):
            yield found


@contextmanager
def listening(db: TenantSession, notices: list[str]) -> Iterator[None]:
    def remember(notice: psycopg.errors.Diagnostic) -> None:
        notices.append(notice.message_primary or "")

    driver = driver_of(db.connection())
    driver.add_notice_handler(remember)
    assert db.scalar(text("SELECT current_user")) == "database_app"
    db.rollback()
    notices.clear()
    try:
        yield
    finally:
        driver.remove_notice_handler(remember)


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "words of a user": ("ix_contexts_text", "user", {"query": "rare00127thing"}),
    "words of the tenant": ("ix_contexts_text", "tenant", {"query": "rare00127thing"}),
    "phrase": ("ix_contexts_text", "tenant", {"query": '"w127 rare00127thing"'}),
    "words and emoji": ("ix_contexts_text", "tenant", {"query": "w127 -🎉"}),
    "substring of the tenant": (
        "ix_contexts_substring",
        "tenant",
        {"query": "RE00127th", "mode": "substring"},
    ),
    "substring with an escape's letter": (
        "ix_contexts_substring",
        "tenant",
        {"query": "0127thing", "mode": "substring"},
    ),
    "equality": ("ix_contexts_content", "tenant", {"query": None, "where": {"n": 127}}),
    "equal texts": (
        "ix_contexts_content",
        "tenant",
        {"query": None, "where": {"text": {"eq": words(127)}, "n": {"gte": 5}}},
    ),
    "messages": ("ix_messages_text", "messages", {"query": "rare00127thing"}),
    "messages of a user": ("ix_messages_text", "user's messages", {"query": "rare00127thing"}),
}


def search(explained: Explained, scope: str, options: dict[str, Any]) -> list[Any]:
    given = dict(options)
    query = given.pop("query")
    if scope == "messages":
        return Messages.search(explained.db, query, **given).items
    if scope == "user's messages":
        return Messages.search(explained.db, query, user_id=explained.user, **given).items
    user = explained.user if scope == "user" else None
    return Contexts.search(explained.db, user, query, **given).items


def serves(index: str, plan: str) -> bool:
    """Whether the index looks for what is searched, and not for the tenant alone."""
    scan = rf"Bitmap Index Scan on {index} .*\n\s+Index Cond: .*(@@|~\*)"
    return re.search(scan, plan) is not None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("calls", [1, 8], ids=["first", "prepared"])
def test_the_index_is_used(explained: Explained, case: str, calls: int) -> None:
    """From the sixth call on the server may take one plan for all parameters."""
    index, scope, options = CASES[case]
    for _ in range(calls):
        explained.plan()
        assert len(search(explained, scope, options)) == 1
    plan = explained.plan()
    assert serves(index, plan), plan
    assert "Seq Scan on contexts" not in plan
    assert "Seq Scan on messages" not in plan


def test_a_users_substrings_have_an_index(explained: Explained) -> None:
    """Of a user with few contexts the planner may rather read them all."""
    options = {"query": "re00127th", "mode": "substring"}
    assert len(search(explained, "user", options)) == 1
    plan = explained.plan()
    assert "Index Scan on ix_contexts_substring" in plan or "ix_contexts_user_id" in plan, plan
    assert "Seq Scan on contexts" not in plan


@pytest.mark.parametrize("case", ["substring of the tenant", "equality"])
def test_the_index_is_used_after_searches_of_everything(explained: Explained, case: str) -> None:
    """The plans of the function's statements outlive a call, in their connection."""
    for _ in range(8):
        assert len(search(explained, "tenant", {"query": None})) == 50
    explained.plan()
    index, scope, options = CASES[case]
    assert len(search(explained, scope, options)) == 1
    plan = explained.plan()
    assert serves(index, plan), plan


def test_the_rows_of_hits_are_read_by_their_keys(explained: Explained) -> None:
    search(explained, "tenant", {"query": "common"})
    # Not so where hits are ranked: a thousand of four thousand rows are better read in one scan.
    assert "Index Scan using pk_contexts on contexts  " in explained.plan()


def test_a_list_by_source_and_user_has_an_index(explained: Explained) -> None:
    explained.plan()
    assert len(Contexts.list(explained.db, user_id=explained.user, limit=5)) == 5
    assert "ix_contexts_user_id_updated_at_id" in explained.plan()
    assert Contexts.get(explained.db, explained.user, "note", "127") is not None
    assert "uq_contexts_source" in explained.plan()
