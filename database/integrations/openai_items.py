"""Items of the OpenAI Agents SDK as rows of messages, and back.

A plain message, `{"role": ..., "content": text}`, is a plain row. Of every other item `data` keeps
the exact JSON, and the columns what search, statistics and turns look at.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from database.errors import InvalidValueError
from database.types import clean_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from database.models.message import Message
    from database.repositories.histories import Body

__all__ = ["FORMAT", "item_of", "items_of", "row_of", "text_of"]

FORMAT = "openai-agents/1"

_PLAIN_ROLES = ("user", "assistant", "system")
_ROLES = {role: role for role in (*_PLAIN_ROLES, "tool")} | {"developer": "system"}
_MOST_CHARACTERS_OF_ID = 255

# Not orjson: it reads integers of more than 64 bits as floats, and writes NaN as null. Unlike
# escapes, surrogatepass keeps text of any script short, and lone surrogates as they are.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def row_of(item: object) -> dict[str, Any]:
    """Return the fields of the message that keeps an item.

    Raises:
        InvalidValueError: The item is no dict, or not JSON.
    """
    if not isinstance(item, dict):
        raise InvalidValueError("items", "must be dicts, as to_input_list() returns them")
    role = _role_of(item)
    if _is_plain(item, role):
        return {"role": role, "content": item["content"]}
    kind = item.get("type")
    row: dict[str, Any] = {
        "role": role,
        "content": text_of(item.get("output" if role == "tool" else "content")),
        "data": _data_of(item),
        "data_format": FORMAT,
    }
    if kind == "reasoning":
        row["content"] = ""
        row["thinking"] = text_of(item.get("content")) or text_of(item.get("summary")) or None
    elif role == "tool" and "output" not in item:
        row["content"] = text_of(item.get("content"))
    if (call := _call_of(item)) is not None:
        row["tool_call_id"] = call
    if "role" not in item:
        described = {name: item.get(name) for name in ("type", "name")}
        row["extra_data"] = {k: v for k, v in described.items() if isinstance(v, str)}
    return row


def item_of(message: Message | Body) -> dict[str, Any]:
    """Return the item that a message keeps; of one that the application wrote, what it says.

    Raises:
        InvalidValueError: The message is kept in another format than `FORMAT`.
    """
    if message.data_format == FORMAT:
        if message.data is not None:
            return _read(message.data)
    elif message.data_format is None and message.data is None:
        if message.role in _PLAIN_ROLES:
            return {"role": str(message.role), "content": message.content}
        if message.tool_call_id is not None:
            return {
                "type": "function_call_output",
                "call_id": message.tool_call_id,
                "output": message.content,
            }
        raise InvalidValueError("tool_call_id", "must be given of a tool's message")
    raise InvalidValueError("data_format", f"must be {FORMAT}, with data, or none")


def items_of(bodies: Sequence[Body]) -> list[dict[str, Any]] | None:
    """Return the items of messages, if all are plain or well kept; otherwise None.

    It reads them as one document: a fifth of the time.
    """
    documents = [body.data for body in bodies if body.data is not None]
    if not all(
        body.data_format == FORMAT if body.data is not None else _is_plain_body(body)
        for body in bodies
    ):
        return None
    try:
        read = json.loads(b"[%b]" % b",".join(documents))
    except (ValueError, RecursionError):
        return None
    if len(read) != len(documents) or not all(type(item) is dict for item in read):
        return None
    items = iter(read)
    return [
        {"role": body.role, "content": body.content} if body.data is None else next(items)
        for body in bodies
    ]


def _is_plain_body(body: Body) -> bool:
    return body.data_format is None and body.role in _PLAIN_ROLES


def text_of(content: object) -> str:
    """Return the text of a message's content or a tool's output, without images and files."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = (part.get("text", part.get("refusal")) for part in content if isinstance(part, dict))
    return "\n".join(part for part in parts if isinstance(part, str))


def _role_of(item: dict[Any, Any]) -> str:
    role, kind = item.get("role"), item.get("type")
    if isinstance(role, str) and role in _ROLES:
        return _ROLES[role]
    answers = isinstance(kind, str) and kind.endswith(("_output", "_approval_response"))
    return "tool" if answers else "assistant"


def _is_plain(item: dict[Any, Any], role: str) -> bool:
    """Tell whether the columns alone keep the item: its keys, their order and each character."""
    if [*item] != ["role", "content"] or item["role"] != role or role not in _PLAIN_ROLES:
        return False
    text = item["content"]
    return type(text) is str and clean_text(text) == text


def _call_of(item: dict[Any, Any]) -> str | None:
    for name in ("call_id", "approval_request_id", "tool_call_id"):
        found = item.get(name)
        if isinstance(found, str) and found and len(found) <= _MOST_CHARACTERS_OF_ID:
            return found
    return None


def _data_of(item: dict[Any, Any]) -> bytes:
    try:
        return _encode(item).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError):
        # The cause's text can show values.
        raise InvalidValueError("items", "must be JSON, without circles") from None


def _read(data: bytes) -> dict[str, Any]:
    try:
        item = json.loads(data)
    except (ValueError, RecursionError):
        item = None
    if not isinstance(item, dict):
        raise InvalidValueError("data", "must be a JSON object")
    return item
