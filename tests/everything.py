"""A user with a row of every kind, and what all tables hold, by plain SQL."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql

from database import (
    Base,
    MessageRepository,
    TenantSession,
    transaction,
)
from tests.factories import (
    ApiKeyFactory,
    ContextFactory,
    ConversationFactory,
    IdentityFactory,
    MemoryFactory,
    MessageFactory,
    ModuleFactory,
    PersonaFactory,
    StateFactory,
    UserFactory,
)

MICROSECONDS = datetime(2024, 2, 29, 23, 59, 59, 123457, tzinfo=UTC)
TEXT = "Grüße 🎈 \x00 \u2028 \x85 \" \\ ' </script> \t\r\n %s :user \ud800"
ANY_JSON: list[Any] = [None, True, 0.1, 12345678901234, "x", [], {"a": [1, {"ü": None}]}, TEXT]
# NULL that is JSON's, numbers that no float holds, and digits that mean nothing.
RAW_JSON = ["null", "1e400", "-1e-400", "123456789012345678901234567890.10", '{"n": 1.50}']

Dump = dict[str, list[tuple[Any, ...]]]


class Person(NamedTuple):
    id: UUID
    chats: list[Any]


def tenant_of(db: TenantSession) -> str:
    return str(db.info["database.tenant"])


def make_person(db: TenantSession, login: psycopg.Connection) -> Person:
    """A user with rows in all tables, and every column filled somewhere."""
    with transaction(db):
        user = UserFactory(
            db=db, username=TEXT, settings={"t": TEXT}, last_active_at=MICROSECONDS, is_admin=True
        )
        persona = PersonaFactory(db=db, extra_data={"p": TEXT})
        module = ModuleFactory(db=db, content=TEXT)
        for _ in range(2):
            IdentityFactory(db=db, user_id=user.id, data={"d": TEXT})
        ApiKeyFactory(db=db, user_id=user.id, expires_at=MICROSECONDS.replace(year=2996))
        for number, content in enumerate(ANY_JSON):
            ContextFactory(db=db, user_id=user.id, context_type=f"type {number}", content=content)
        chats = [
            ConversationFactory(
                db=db,
                user_id=user.id,
                persona_id=persona.id,
                title=TEXT,
                provider_config={"k": TEXT},
                metadata={"m": [TEXT]},
                expires_at=MICROSECONDS,
            )
            for _ in range(3)
        ]
        for chat in chats[:2]:
            fill(db, chat.id, persona=persona.id, module=module.id, user=user.id)
    for content in RAW_JSON:
        context = ContextFactory(db=db, user_id=user.id, context_type="raw").id
        login.execute("UPDATE contexts SET content = %s WHERE id = %s", [content, context])
    for chat in chats[:2]:
        refer_ahead(db, login, chat.id)
    return Person(user.id, chats)


def fill(
    db: TenantSession, chat: UUID, *, persona: UUID, module: UUID, user: UUID | None = None
) -> None:
    """Messages, states and memories, with every field."""
    first = MessageFactory(
        db=db,
        conversation_id=chat,
        content=TEXT,
        thinking=TEXT,
        extra_data=ANY_JSON,
        data=bytes(range(256)),
        data_format="raw/1",
        run_id="run",
        tool_call_id="call",
        model="m",
        input_tokens=0,
        output_tokens=2**31 - 1,
        idempotency_key="key",
        created_at=MICROSECONDS,
    )
    hidden = [MessageFactory(db=db, conversation_id=chat, role=r) for r in ("assistant", "tool")]
    MessageFactory(db=db, conversation_id=chat, content="")
    MessageRepository.deactivate(db, chat, [hidden[0].id])
    for value in ANY_JSON:
        StateFactory(
            db=db,
            conversation_id=chat,
            persona_id=persona,
            module_id=module,
            execution_stage="stage",
            state_value=value,
            execution_metadata={"e": TEXT},
        )
    MemoryFactory(
        db=db,
        conversation_id=chat,
        user_id=user,
        persona_id=persona,
        first_message_id=first.id,
        content=TEXT,
        embedding=[1 / (n + 3) for n in range(1536)],
        importance=0.1,
        first_position=1,
        last_position=2,
        message_count=2,
    )
    MemoryFactory(db=db, conversation_id=chat)


def refer_ahead(db: TenantSession, login: psycopg.Connection, chat: UUID) -> None:
    """The first message follows the last one, which is the head: no order suits."""
    last = MessageRepository.get_last(db, chat)
    assert last is not None
    login.execute(
        "UPDATE messages SET parent_id = %s WHERE conversation_id = %s AND position <= 2",
        [last.id, chat],
    )
    login.execute("UPDATE conversations SET head_id = %s WHERE id = %s", [last.id, chat])


def dump(login: psycopg.Connection, tenant: str | None = None) -> Dump:
    """All rows as text by table, of a tenant, without its name, or of all."""
    found = {}
    for name, table in Base.metadata.tables.items():
        columns = [c.name for c in table.columns if tenant is None or c.name != "tenant_id"]
        query = sql.SQL(
            "SELECT {} FROM {} WHERE %s::text IN (tenant_id, '*') ORDER BY 1, 2"
        ).format(
            sql.SQL(", ").join(sql.Identifier(c) + sql.SQL("::text") for c in columns),
            sql.Identifier(name),
        )
        found[name] = login.execute(query, [tenant or "*"]).fetchall()
    return found


def counts(dumped: Dump) -> dict[str, int]:
    return {table: len(rows) for table, rows in dumped.items()}
