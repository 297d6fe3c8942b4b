"""Histories of Pydantic AI, beside the framework's own validation of the same bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Contender, repeat
from benchmarks.site import TENANT, Site, messages
from database import ConversationRepository, MessageRepository

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage

__all__ = ["append", "load"]

_TURNS = 250


@contextmanager
def load(site: Site) -> Iterator[list[Contender]]:
    """Load 1,000 messages: what is ours of it is what the time has beyond the validation's."""
    from pydantic_ai.messages import ModelMessagesTypeAdapter

    from database.integrations.pydantic_ai import (
        PostgresConversationStore,
        append_history,
        load_history,
    )

    store = PostgresConversationStore(tenant_id=TENANT)
    with site.session() as db:
        chat = ConversationRepository.create(db)
        append_history(db, chat.id, _conversation(site.scaled(_TURNS)))
        head = str(MessageRepository.history(db, chat.id, limit=1)[0].id)
        bodies = [body.data for body in MessageRepository.bodies(db, chat.id)]
        joined = b"[" + b",".join(filter(None, bodies)) + b"]"
        with asyncio.Runner() as runner:

            async def finish(work: Coroutine[Any, Any, object]) -> None:
                # Without the result, whose text the runner would make to restore SIGINT.
                await work

            def run(work: Coroutine[Any, Any, object]) -> None:
                runner.run(finish(work))

            yield [
                Contender("ours", repeat(lambda: load_history(db, chat.id))),
                Contender(
                    "validation",
                    repeat(lambda: ModelMessagesTypeAdapter.validate_json(joined)),
                ),
                Contender("store", repeat(lambda: run(store.load(chat.thread_id)))),
                Contender("history", repeat(lambda: run(store.read_history(head)))),
            ]


@contextmanager
def append(site: Site) -> Iterator[list[Contender]]:
    """Append a turn of four messages, beside the rows' append alone."""
    from database.integrations.pydantic_ai import append_history
    from database.integrations.pydantic_ai.rows import rows_of

    turn = _conversation(1)
    rows = rows_of(turn)
    with site.session() as db:
        ours, theirs = cycle(site.ours), cycle(site.theirs)
        yield [
            Contender("ours", repeat(lambda: append_history(db, next(ours), turn))),
            Contender(
                "append_many",
                repeat(lambda: MessageRepository.append_many(db, next(theirs), rows)),
            ),
        ]


def _conversation(turns: int) -> list[ModelMessage]:
    """Return turns with a tool, as an agent has them."""
    from pydantic_ai.messages import (
        ModelRequest,
        ModelResponse,
        TextPart,
        ToolCallPart,
        ToolReturnPart,
        UserPromptPart,
    )
    from pydantic_ai.usage import RequestUsage

    said = messages(2 * turns)
    usage = RequestUsage(input_tokens=1200, output_tokens=300)
    found: list[ModelMessage] = []
    for number, (asked, answered) in enumerate(zip(said[::2], said[1::2], strict=True)):
        run, call, source = (
            f"run-{number:032x}",
            f"call-{number}",
            answered["extra_data"]["sources"],
        )
        found += [
            ModelRequest([UserPromptPart(asked["content"])], run_id=run),
            ModelResponse(
                [ToolCallPart("search", {"query": asked["content"][:40]}, call)],
                usage=usage,
                model_name="some-model-1",
                run_id=run,
            ),
            ModelRequest([ToolReturnPart("search", source[0], call)], run_id=run),
            ModelResponse(
                [TextPart(answered["content"])],
                usage=usage,
                model_name="some-model-1",
                run_id=run,
            ),
        ]
    return found
