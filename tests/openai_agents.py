"""What the tests of OpenAI Agents SDK sessions share: sessions, and an agent without a network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from agents import Agent, Model, ModelResponse, RunConfig, Runner, Usage, function_tool
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
)
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from database import get_engine
from database.integrations.openai_agents import DatabaseSession


@pytest.fixture
def ours(tenant: str) -> DatabaseSession:
    return DatabaseSession("chat", tenant_id=tenant)


def session_beside(theirs: Callable[[], Any]) -> Any:
    """A fixture: our session, and in another test one of the SDK's own."""

    @pytest.fixture(params=["ours", "theirs"])
    def session(request: pytest.FixtureRequest, tenant: str) -> Iterator[Any]:
        if request.param == "ours":
            yield DatabaseSession("chat", tenant_id=tenant)
            return
        sqlite = theirs()
        yield sqlite
        sqlite.close()

    return session


def usage() -> Usage:
    return Usage(
        requests=1,
        input_tokens=100,
        output_tokens=10,
        total_tokens=110,
        input_tokens_details=InputTokensDetails(cached_tokens=60, cache_write_tokens=0),
        output_tokens_details=OutputTokensDetails(reasoning_tokens=4),
    )


def says(text: str) -> ResponseOutputMessage:
    part = ResponseOutputText(annotations=[], text=text, type="output_text")
    return ResponseOutputMessage(
        id=f"msg_{uuid4().hex}",
        content=[part],
        role="assistant",
        status="completed",
        type="message",
    )


def calls(name: str, arguments: str) -> ResponseFunctionToolCall:
    return ResponseFunctionToolCall(
        arguments=arguments, call_id=f"call_{uuid4().hex}", name=name, type="function_call"
    )


class Weatherman(Model):  # type: ignore[misc]
    """Asks the tool for the weather of the city that the user names, and says what it answers."""

    model = "weather-1"

    def __init__(self) -> None:
        self.inputs: list[list[Any]] = []
        self.holding_connections: list[int] = []

    async def get_response(self, *, input: Any, **_: Any) -> ModelResponse:  # noqa: A002
        self.inputs.append(list(input))
        self.holding_connections.append(get_engine().pool.checkedout())  # type: ignore[attr-defined]
        last = input[-1]
        if last.get("type") == "function_call_output":
            output: Any = says(f"It is {last['output']}.")
        elif last["content"] == "How often did I ask?":
            output = says(f"{sum(item.get('role') == 'user' for item in input)} times.")
        else:
            city = last["content"].removeprefix("Weather in ")
            output = calls("get_weather", f'{{"city": "{city}"}}')
        return ModelResponse(output=[output], usage=usage(), response_id=None)

    def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        raise NotImplementedError


@function_tool  # type: ignore[untyped-decorator]
def get_weather(city: str) -> str:
    """Tell the weather."""
    return f"snowing in {city}"


async def run(session: Any, model: Model, text: str, **options: Any) -> Any:
    agent = Agent("weatherman", model=model, tools=[get_weather])
    config = RunConfig(tracing_disabled=True)
    return await Runner.run(agent, text, session=session, run_config=config, **options)
