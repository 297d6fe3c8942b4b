"""Other libraries that store messages, each used as its documentation shows; some may be missing.

An async one runs a whole round in one call of its loop, so that starting the loop costs nothing.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any, ClassVar
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import create_engine

from benchmarks.harness import repeat
from benchmarks.site import messages, plain

__all__ = ["PEERS", "Peer"]

Run = Callable[[int], None]


class Peer(ABC):
    """A library on a database, with one thread of messages.

    Attributes:
        append: Adds one message, n times.
        last: Loads the last 50.
        bulk: Adds 1,000 at once; None where it cannot.
    """

    name: ClassVar[str]
    distribution: ClassVar[str]
    note: ClassVar[str] = ""
    append: Run
    last: Run
    bulk: Run | None = None

    @abstractmethod
    def __init__(self, url: str, thread: UUID) -> None:
        """Connect; make the tables if they are missing."""

    def fill(self) -> None:
        """Add 1,000 messages to a new thread."""
        if self.bulk:
            self.bulk(1)
        else:
            self.append(1000)

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version(cls.distribution)


class LangChain(Peer):
    name = "langchain-postgres"
    distribution = "langchain-postgres"
    note = "loads the whole history"
    autocommit = False

    def __init__(self, url: str, thread: UUID) -> None:
        from langchain_core.messages import AIMessage
        from langchain_postgres import PostgresChatMessageHistory as History

        with psycopg.connect(plain(url)) as other:
            History.create_tables(other, "chat_history")
        connection = psycopg.connect(plain(url), autocommit=self.autocommit)
        history = History("chat_history", str(thread), sync_connection=connection)
        many = [AIMessage(m["content"], additional_kwargs=_extra(m)) for m in messages(1000)]

        def last() -> None:
            assert len(history.get_messages()) >= len(many)
            connection.commit()  # it leaves its transaction open

        self.append = repeat(lambda: history.add_messages(many[1:2]))
        self.last = repeat(last)
        self.bulk = repeat(lambda: history.add_messages(many))


class LangChainAutocommit(LangChain):
    name = "langchain-postgres, autocommit"
    autocommit = True


class OpenAIAgents(Peer):
    name = "openai-agents SQLAlchemySession"
    distribution = "openai-agents"

    def __init__(self, url: str, thread: UUID) -> None:
        from agents.extensions.memory import SQLAlchemySession

        session = SQLAlchemySession.from_url(str(thread), url=url, create_tables=True)
        many = [{"role": m["role"], "content": m["content"], **_extra(m)} for m in messages(1000)]
        loop = asyncio.new_event_loop()
        self.append = _repeat_in(loop, lambda: session.add_items(many[1:2]))
        self.last = _repeat_in(loop, lambda: session.get_items(50))
        self.bulk = _repeat_in(loop, lambda: session.add_items(many))


class GoogleADK(Peer):
    name = "google-adk DatabaseSessionService"
    distribution = "google-adk"

    def __init__(self, url: str, thread: UUID) -> None:
        from google.adk.events.event import Event
        from google.adk.sessions.base_session_service import GetSessionConfig
        from google.adk.sessions.database_session_service import DatabaseSessionService
        from google.genai.types import Content, Part

        loop = asyncio.new_event_loop()
        service = DatabaseSessionService(url)
        key = {"app_name": "bench", "user_id": "ada", "session_id": str(thread)}
        recent = GetSessionConfig(num_recent_events=50)
        session = loop.run_until_complete(
            service.get_session(**key, config=recent)
        ) or loop.run_until_complete(service.create_session(**key))
        one = messages(2)[1]

        def append() -> Any:
            content = Content(role="model", parts=[Part(text=one["content"])])
            event = Event(author="assistant", content=content, custom_metadata=one["extra_data"])
            return service.append_event(session, event)

        self.append = _repeat_in(loop, append)
        self.last = _repeat_in(loop, lambda: service.get_session(**key, config=recent))


class AdvancedAlchemy(Peer):
    name = "advanced-alchemy repository"
    distribution = "advanced-alchemy"

    def __init__(self, url: str, thread: UUID) -> None:
        from advanced_alchemy.filters import LimitOffset
        from sqlalchemy.orm import Session

        stored, repository = _advanced_alchemy()
        engine = create_engine(url)
        stored.__table__.create(engine, checkfirst=True)
        messages_ = repository(session=Session(engine, expire_on_commit=False))
        many = [
            {key: m.get(key) for key in ("role", "content", "extra_data")} for m in messages(1000)
        ]

        def last() -> None:
            messages_.list(LimitOffset(50, 0), thread=thread, order_by=[(stored.created_at, True)])
            messages_.session.rollback()  # gives the connection back

        self.append = repeat(
            lambda: messages_.add(stored(thread=thread, **many[1]), auto_commit=True)
        )
        self.last = repeat(last)
        self.bulk = repeat(
            lambda: messages_.add_many([stored(thread=thread, **m) for m in many], auto_commit=True)
        )


class LangGraphStore(Peer):
    name = "langgraph PostgresStore"
    distribution = "langgraph-checkpoint-postgres"
    note = "key and value, no order by time"

    def __init__(self, url: str, thread: UUID) -> None:
        from langgraph.store.base import PutOp
        from langgraph.store.postgres import PostgresStore
        from psycopg.rows import dict_row

        store = PostgresStore(psycopg.connect(plain(url), autocommit=True, row_factory=dict_row))
        store.setup()
        space = ("messages", str(thread))
        many = messages(1000)
        self.append = repeat(lambda: store.put(space, str(uuid4()), many[1]))
        self.last = repeat(lambda: store.search(space, limit=50))
        self.bulk = repeat(lambda: store.batch([PutOp(space, str(uuid4()), m) for m in many]))


PEERS: tuple[type[Peer], ...] = (
    LangChain,
    LangChainAutocommit,
    OpenAIAgents,
    GoogleADK,
    AdvancedAlchemy,
    LangGraphStore,
)


def _extra(message: dict[str, Any]) -> dict[str, Any]:
    return {"extra_data": message["extra_data"]} if "extra_data" in message else {}


def _repeat_in(loop: asyncio.AbstractEventLoop, call: Callable[[], Awaitable[object]]) -> Run:
    async def many(times: int) -> None:
        for _ in range(times):
            await call()

    return lambda times: loop.run_until_complete(many(times))


@cache
def _advanced_alchemy() -> tuple[Any, Any]:
    from advanced_alchemy.base import UUIDv7AuditBase
    from advanced_alchemy.repository import SQLAlchemySyncRepository
    from sqlalchemy import Column, Index, Text, Uuid
    from sqlalchemy.dialects.postgresql import JSONB

    columns = {
        "__tablename__": "aa_messages",
        "__table_args__": (Index("ix_aa_messages", "thread", "created_at"),),
        "thread": Column(Uuid, nullable=False),
        "role": Column(Text, nullable=False),
        "content": Column(Text, nullable=False),
        "extra_data": Column(JSONB),
    }
    model = type("StoredMessage", (UUIDv7AuditBase,), columns)
    return model, type("StoredMessages", (SQLAlchemySyncRepository,), {"model_type": model})
