"""Which row a message becomes, and which message a row that something else wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

from pydantic_ai.messages import (
    CompactionPart,
    ModelRequest,
    ModelResponse,
    RetryFeedbackPart,
    RetryPromptPart,
    SpeechPart,
    SystemPromptPart,
    TextContent,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.usage import RequestUsage
from pydantic_core import PydanticSerializationError, to_jsonable_python

from database.errors import InvalidValueError
from database.integrations.pydantic_ai.serialized import FORMAT, dump_message
from database.models.message import Message, Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic_ai.messages import ModelMessage, ModelRequestPart, ModelResponsePart

__all__ = ["message_of", "row_of", "rows_of"]

_BETWEEN_PARTS = "\n\n"
_LONGEST_NAME = 255
_MOST_TOKENS = 2**31 - 1
_UNKNOWN_TOOL = "tool"


def rows_of(messages: Iterable[ModelMessage]) -> list[dict[str, Any]]:
    """Return the arguments of `MessageRepository.append` for each message.

    Raises:
        InvalidValueError: One is no message of Pydantic AI, or has no JSON.
    """
    if not isinstance(messages, Iterable):
        raise InvalidValueError("messages", "must be a list of messages")
    return [row_of(message, f"messages.{number}") for number, message in enumerate(messages)]


def row_of(message: ModelMessage, field: str) -> dict[str, Any]:
    """Return the arguments of `MessageRepository.append` for one message; raise as `rows_of`."""
    if not isinstance(message, ModelRequest | ModelResponse):
        raise InvalidValueError(field, "must be a ModelRequest or a ModelResponse")
    exact = {
        "data": dump_message(message, field),
        "data_format": FORMAT,
        "run_id": _name(message.run_id),
    }
    if isinstance(message, ModelRequest):
        return _row_of_request(message) | exact
    return _row_of_response(message) | exact


def _row_of_request(message: ModelRequest) -> dict[str, Any]:
    parts = message.parts
    answers = [part.tool_call_id for part in parts if _is_answer(part)]
    if answers:
        role = Role.TOOL
    elif any(isinstance(part, UserPromptPart | SpeechPart) for part in parts):
        role = Role.USER
    else:
        # Also what the framework itself says: a turn begins with a user's words.
        role = Role.SYSTEM
    shown = (
        part for part in parts if role is Role.SYSTEM or not isinstance(part, SystemPromptPart)
    )
    return {
        "role": role,
        "content": _BETWEEN_PARTS.join(text for part in shown for text in _texts(part)),
        "tool_call_id": _only(answers),
    }


def _is_answer(part: ModelRequestPart) -> TypeGuard[ToolReturnPart | RetryPromptPart]:
    # Of the deprecated retries only those that name a tool answer a call.
    return isinstance(part, ToolReturnPart) or (
        isinstance(part, RetryPromptPart) and part.tool_name is not None
    )


def _row_of_response(message: ModelResponse) -> dict[str, Any]:
    calls = (part.tool_call_id for part in message.parts if isinstance(part, ToolCallPart))
    usage = message.usage
    measured = usage.has_values()
    return {
        "role": Role.ASSISTANT,
        "content": message.text or "",
        "thinking": message.thinking,
        "tool_call_id": _only(calls),
        "model": _name(message.model_name),
        "input_tokens": _tokens(usage.input_tokens) if measured else None,
        "output_tokens": _tokens(usage.output_tokens) if measured else None,
    }


def _texts(part: ModelRequestPart) -> Iterator[str]:
    match part:
        case SystemPromptPart() | SpeechPart():
            yield part.content
        case UserPromptPart(content=str(text)) | CompactionPart(content=str(text)):
            yield text
        case UserPromptPart(content=items):
            yield from _texts_of(items)
        case ToolReturnPart():
            yield _rendered(part, part.model_response_str)
        case RetryFeedbackPart() | RetryPromptPart():
            yield _rendered(part, part.model_response)


def _rendered(
    part: ToolReturnPart | RetryFeedbackPart | RetryPromptPart, as_sent: Callable[[], str]
) -> str:
    try:
        return as_sent()
    except PydanticSerializationError:
        # Of lone surrogates.
        return json.dumps(to_jsonable_python(part.content))


def _texts_of(items: Iterable[Any]) -> Iterator[str]:
    for item in items:
        if isinstance(item, str):
            yield item
        elif isinstance(item, TextContent):
            yield item.content


def _only(ids: Iterable[str]) -> str | None:
    found = list(ids)
    return _name(found[0]) if len(found) == 1 else None


# The columns are for looking things up; what does not fit them is whole in `data`.


def _name(text: str | None) -> str | None:
    return None if text is None or len(text) > _LONGEST_NAME else text


def _tokens(count: int) -> int | None:
    return count if 0 <= count <= _MOST_TOKENS else None


def message_of(row: Message) -> ModelMessage:
    """Return what a row without Pydantic AI's own JSON says, so that a model can go on from it."""
    if row.role is Role.ASSISTANT:
        parts: list[ModelResponsePart] = [
            *([ThinkingPart(row.thinking)] if row.thinking else []),
            *([TextPart(row.content)] if row.content else []),
        ]
        usage = RequestUsage(
            input_tokens=row.input_tokens or 0, output_tokens=row.output_tokens or 0
        )
        return ModelResponse(
            parts=parts,
            usage=usage,
            model_name=row.model,
            timestamp=row.created_at,
            run_id=row.run_id,
        )
    return ModelRequest(parts=[_request_part(row)], timestamp=row.created_at, run_id=row.run_id)


def _request_part(row: Message) -> ModelRequestPart:
    match row.role:
        case Role.SYSTEM:
            return SystemPromptPart(row.content, timestamp=row.created_at)
        case Role.TOOL:
            return ToolReturnPart(
                tool_name=_UNKNOWN_TOOL,
                content=row.content,
                tool_call_id=row.tool_call_id or str(row.id),
                timestamp=row.created_at,
            )
        case _:
            return UserPromptPart(row.content, timestamp=row.created_at)
