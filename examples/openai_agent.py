"""An agent of the OpenAI Agents SDK that remembers: `python examples/openai_agent.py`.

Needs the extras `openai-agents` and `demo`, and no network: the model follows a script, where yours
would be `Agent(model="gpt-...")`. All else is as with a real one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from agents import Agent, Model, ModelResponse, RunConfig, Runner, Usage, function_tool
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputItem,
    ResponseOutputMessage,
    ResponseOutputText,
)
from rich.console import Console
from rich.table import Table
from rich.text import Text

from database import DatabaseError, UserRepository, get_db_session, init_db
from database.integrations.openai_agents import DatabaseSession

EMAIL = "ada@example.com"
KETTLES = {"copper": 3, "steel": 0}

console = Console()


@function_tool  # type: ignore[untyped-decorator]
def count_kettles(kind: str) -> str:
    """Tell how many kettles of a kind are in stock.

    Args:
        kind: What they are made of.
    """
    return f"{KETTLES.get(kind, 0)} {kind} kettles"


class Script(Model):  # type: ignore[misc]
    """Looks a kettle up when one is named, and otherwise says what it remembers."""

    model = "script-1"

    async def get_response(self, *, input: list[Any], **_: Any) -> ModelResponse:  # noqa: A002
        """Answer the newest item of the input, knowing the others."""
        last = input[-1]
        named = [kind for kind in KETTLES if kind in str(last.get("content"))]
        if "output" in last:
            output = _message(f"There are {last['output']}.")
        elif named:
            output = ResponseFunctionToolCall(
                type="function_call",
                name="count_kettles",
                call_id=f"call_{uuid4().hex}",
                arguments=json.dumps({"kind": named[0]}),
            )
        else:
            asked = [item["content"] for item in input[:-1] if item.get("role") == "user"]
            output = _message(f"You asked: {' '.join(asked)}")
        used = Usage(requests=1, input_tokens=40 * len(input), output_tokens=12)
        return ModelResponse(output=[output], usage=used, response_id=None)

    def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        """Not in the script."""
        raise NotImplementedError


def _message(text: str) -> ResponseOutputItem:
    part = ResponseOutputText(type="output_text", text=text, annotations=[])
    return ResponseOutputMessage(
        id=f"msg_{uuid4().hex}",
        type="message",
        role="assistant",
        status="completed",
        content=[part],
    )


async def ask(session: DatabaseSession, text: str) -> None:
    """Let the agent answer; the session keeps all that is said, and what it cost."""
    agent = Agent("shopkeeper", model=Script(), tools=[count_kettles])
    config = RunConfig(tracing_disabled=True)
    result = await Runner.run(agent, text, session=session, run_config=config)
    await session.store_run_usage(result)
    console.print(f"[bold]Ada:[/] {text}\n[bold]Agent:[/] {result.final_output}")


async def main() -> None:
    """Talk, leave, come back, and look at what was kept."""
    await asyncio.to_thread(init_db)
    with get_db_session() as db:
        user = UserRepository.get_or_create(db, EMAIL).id
    thread = f"shop-{uuid4().hex[:8]}"

    console.rule("A session")
    session = DatabaseSession(thread, user_id=user)
    await session.set_metadata({"shop": "Kettles & Sons"})
    await ask(session, "Have you copper kettles?")
    await ask(session, "And of steel?")

    console.rule("The same one, later, in another process")
    session = DatabaseSession(thread, user_id=user)
    await ask(session, "What did I want to know?")
    forgotten = [await session.pop_item() for _ in range(2)]
    console.print(f"Taken back: {len(forgotten)} items, {len(await session.get_items())} are left")

    console.rule("What was kept")
    table = Table("Turn", "Ada said", "Requests", "Tokens in", "Tokens out")
    for turn in await session.get_conversation_turns():
        used: Any = await session.get_turn_usage(turn["turn"])
        numbers = (used["requests"], used["input_tokens"], used["output_tokens"])
        table.add_row(str(turn["turn"]), Text(turn["content"]), *map(str, numbers))
    console.print(table)
    found = await session.search("kettles -steel", highlight=("»", "«"))
    for message, snippet in zip(found, found.snippets, strict=True):
        console.print(Text(f"Found: {message.role}: {snippet}"))
    console.print(f"Metadata: {await session.get_metadata()}")
    sessions = await DatabaseSession.list_sessions(user_id=user, limit=1)
    console.print(Text(f"Newest session: {sessions.items[0].last_message}"))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except DatabaseError as error:
        sys.exit(f"The demo stopped: {error}")
