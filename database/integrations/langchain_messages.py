"""LangChain's messages as rows of messages, and back.

A message that is nothing but its text is a plain row. Of every other one `data` keeps the exact
message as JSON, and the columns what search and statistics look at.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    message_to_dict,
    messages_from_dict,
)

from database.errors import InvalidValueError
from database.types import clean_text

if TYPE_CHECKING:
    from database.repositories.histories import Body

__all__ = ["FORMAT", "message_of", "row_of"]

FORMAT = "langchain/1"

_ROLES = {
    "human": "user",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "user": "user",
    "assistant": "assistant",
    "developer": "system",
}
_PLAIN: dict[str, type[BaseMessage]] = {
    "user": HumanMessage,
    "assistant": AIMessage,
    "system": SystemMessage,
}
_LONGEST_NAME = 255
_MOST_TOKENS = 2**31 - 1

# Not orjson: it reads integers of more than 64 bits as floats, and writes NaN as null. Unlike
# escapes, surrogatepass keeps text of any script short, and lone surrogates as they are.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

# What JSON cannot hold of a tool's result, as what JSON can.
_ARTIFACTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (lambda value: b64encode(value).decode(), b64decode),
    "document": (lambda value: value.model_dump(), lambda value: Document(**value)),
    "documents": (
        lambda value: [one.model_dump() for one in value],
        lambda value: [Document(**one) for one in value],
    ),
}


def _refuse_unreadable(message: BaseMessage) -> None:
    """Refuse a message of a class that LangChain would not find again."""
    try:
        messages_from_dict([message_to_dict(message)])
    except Exception:  # noqa: BLE001 - whatever it raises may show contents
        rule = "must be of a kind that LangChain reads back"
        raise InvalidValueError("messages", rule) from None


def row_of(message: object, *, without_artifact: bool = False) -> dict[str, Any]:
    """Return the fields of the row that keeps a message.

    Args:
        message: LangChain's.
        without_artifact: Whether to leave out what a tool returned besides its text.

    Raises:
        InvalidValueError: It is no message of LangChain's, or holds what is not JSON; the field is
            `artifact` where that is to blame.
    """
    if not isinstance(message, BaseMessage):
        raise InvalidValueError("messages", "must be messages of LangChain")
    kind = message.type.removesuffix("MessageChunk").lower()
    role = _ROLES.get(message.role if isinstance(message, ChatMessage) else kind, "user")
    if _is_plain(message, role):
        return {"role": role, "content": message.content}
    if type(message).__module__.partition(".")[0] != "langchain_core":
        _refuse_unreadable(message)
    row = {
        "role": role,
        "content": str(message.text),
        "data": _data_of(message, without_artifact=without_artifact),
        "data_format": FORMAT,
    }
    if isinstance(message, AIMessage):
        row |= _row_of_answer(message)
    elif isinstance(message, ToolMessage) and len(message.tool_call_id) <= _LONGEST_NAME:
        row["tool_call_id"] = message.tool_call_id
    return row


def message_of(row: Body) -> BaseMessage:
    """Return the message that a row keeps; of one that the application wrote, what it says.

    Raises:
        InvalidValueError: The row is kept in another format than `FORMAT`, or damaged.
    """
    if row.data_format == FORMAT and row.data is not None:
        try:
            return _read(row.data)
        except Exception:  # noqa: BLE001 - whatever pydantic and LangChain make of it
            raise InvalidValueError("data", f"must be a message as {FORMAT} has them") from None
    if row.data_format is not None or row.data is not None:
        raise InvalidValueError("data_format", f"must be {FORMAT}, with data, or none")
    text = row.content or ""
    if row.role in _PLAIN:
        return _PLAIN[row.role](text)
    if row.tool_call_id is None:
        raise InvalidValueError("tool_call_id", "must be given of a tool's message")
    return ToolMessage(text, tool_call_id=row.tool_call_id)


def _is_plain(message: BaseMessage, role: str) -> bool:
    """Tell whether role and text alone make the message again, each character of it."""
    text, kind = message.content, _PLAIN.get(role)
    return (
        kind is not None
        and type(message) is kind
        and type(text) is str
        and message == kind(text)
        and clean_text(text) == text
    )


def _data_of(message: BaseMessage, *, without_artifact: bool) -> bytes:
    described: dict[str, Any] = message_to_dict(message)
    artifact = getattr(message, "artifact", None)
    if artifact is not None:
        described["data"]["artifact"] = None
        if not without_artifact:
            kind = _kind_of(artifact)
            described["artifact"] = kind, _ARTIFACTS[kind][0](artifact) if kind else artifact
            try:
                return _encoded(described)
            except (TypeError, ValueError, RecursionError):
                rule = "must be JSON, bytes, or documents"
                raise InvalidValueError("artifact", rule) from None
    try:
        return _encoded(described)
    except (TypeError, ValueError, RecursionError):
        raise InvalidValueError("messages", "must be JSON but for artifacts") from None


def _encoded(described: object) -> bytes:
    return _encode(described).encode("utf-8", "surrogatepass")


def _kind_of(artifact: object) -> str | None:
    if isinstance(artifact, bytes):
        return "bytes"
    if type(artifact) is Document:
        return "document"
    if isinstance(artifact, list) and artifact and all(type(one) is Document for one in artifact):
        return "documents"
    return None


def _read(data: bytes) -> BaseMessage:
    described = json.loads(data.decode("utf-8", "surrogatepass"))
    if "artifact" in described:
        kind, value = described["artifact"]
        described["data"]["artifact"] = _ARTIFACTS[kind][1](value) if kind else value
    (message,) = messages_from_dict([described])
    return message


def _row_of_answer(message: AIMessage) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if thinking := _thinking_of(message):
        row["thinking"] = thinking
    described = message.response_metadata
    model = described.get("model_name") or described.get("model")
    if isinstance(model, str) and 0 < len(model) <= _LONGEST_NAME:
        row["model"] = model
    usage: Mapping[str, Any] = message.usage_metadata or {}
    for name in ("input_tokens", "output_tokens"):
        count = usage.get(name)
        if isinstance(count, int) and 0 <= count <= _MOST_TOKENS:
            row[name] = count
    return row


def _thinking_of(message: AIMessage) -> str:
    """Return what the model thought, where its provider puts it."""
    parts = [message.additional_kwargs.get("reasoning_content")]
    if isinstance(message.content, list):
        blocks = [block for block in message.content if isinstance(block, dict)]
        parts += [
            block.get(name)
            for block in blocks
            for name in ("reasoning", "thinking")
            if block.get("type") == name
        ]
    return "\n".join(part for part in parts if isinstance(part, str) and part)
