"""Histories of LangChain: ours beside langchain-postgres' PostgresChatMessageHistory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg

from benchmarks.harness import Contender, repeat
from benchmarks.site import Site, messages, plain

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

__all__ = ["AUTOCOMMIT", "THEIRS", "add_many", "add_one", "last"]

THEIRS = "PostgresChatMessageHistory"
AUTOCOMMIT = f"{THEIRS}, autocommit"

_LAST = 50


@contextmanager
def add_one(site: Site) -> Iterator[list[Contender]]:
    (one,) = _messages(2)[1:]
    with _histories(site) as histories:
        yield [
            Contender(name, repeat(lambda history=history: history.add_messages([one])))  # type: ignore[misc]
            for name, history in histories.items()
        ]


@contextmanager
def last(site: Site) -> Iterator[list[Contender]]:
    """The last 50: theirs can only load all, and leaves the choice to the caller."""
    with _histories(site, _messages(1_000)) as histories:

        def reading(history: Any) -> Any:
            def read() -> None:
                assert len(history.messages[-_LAST:]) == _LAST

            return repeat(read)

        yield [Contender(name, reading(history)) for name, history in histories.items()]


@contextmanager
def add_many(site: Site) -> Iterator[list[Contender]]:
    many = _messages(1_000)
    with _histories(site) as histories:
        yield [
            Contender(name, repeat(lambda history=history: history.add_messages(many)))  # type: ignore[misc]
            for name, history in histories.items()
        ]


@contextmanager
def _histories(site: Site, filled: list[BaseMessage] | None = None) -> Iterator[dict[str, Any]]:
    """Yield a history of each kind; theirs as its documentation shows it, and in autocommit."""
    from langchain_postgres import PostgresChatMessageHistory

    from database.integrations.langchain import DatabaseChatMessageHistory

    with (
        psycopg.connect(plain(site.url)) as connection,
        psycopg.connect(plain(site.url), autocommit=True) as autocommit,
    ):
        PostgresChatMessageHistory.create_tables(autocommit, "chat_history")
        histories: dict[str, Any] = {
            "ours": DatabaseChatMessageHistory(str(uuid4()), limit=_LAST),
            **{
                name: PostgresChatMessageHistory("chat_history", str(uuid4()), sync_connection=to)
                for name, to in ((THEIRS, connection), (AUTOCOMMIT, autocommit))
            },
        }
        for history in histories.values():
            history.add_messages(filled or _messages(2))
        yield histories


def _messages(count: int) -> list[BaseMessage]:
    from langchain_core.messages import AIMessage, HumanMessage

    return [
        HumanMessage(one["content"])
        if one["role"] == "user"
        else AIMessage(
            one["content"],
            id=f"run--{number}",
            response_metadata={"model_name": one["model"], **one["extra_data"]},
            usage_metadata={
                "input_tokens": one["input_tokens"],
                "output_tokens": one["output_tokens"],
                "total_tokens": one["input_tokens"] + one["output_tokens"],
            },
        )
        for number, one in enumerate(messages(count))
    ]
