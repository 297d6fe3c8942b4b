"""The formats that chats are exported in, each read into a `Chat`.

What of an item has no column goes into the conversation's metadata, what of a message into its
extra_data: pictures and recordings as what the export has of them, the source's ids, weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from chatgpt_chats import read_chatgpt  # the files beside this one
from chats import Chat, Fields, Input, Item, When, place, text_of
from pydantic import FailFast, Field, model_validator


def chat_of(item: Any) -> Chat:
    """Return the chat of an item, whose format shows in its keys.

    Raises:
        ValueError: It has none of the formats, or breaks a rule of its own.
    """
    if not isinstance(item, dict):
        raise ValueError("must be a JSON object")  # noqa: TRY004 - like all that is malformed
    for key, read in READERS.items():
        if key in item:
            chat = read(item)
            chat.name()
            return chat
    raise ValueError("must have mapping (ChatGPT), messages (OpenAI) or conversations (ShareGPT)")


# --- OpenAI: objects with messages ---


class ChatMessage(Input):
    """A message as the chat completions API takes and gives it."""

    role: Literal["user", "assistant", "system", "tool", "developer", "function"]
    content: Any = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        # An answer may be calls of tools alone.
        may_lack = self.content is None and self.role == "assistant"
        if not may_lack and not isinstance(self.content, str | list):
            raise ValueError("must have content, a text or a list of parts")
        return self


class Messages(Item):
    """A line, with what the model was asked and what it answered."""

    messages: Annotated[list[ChatMessage], FailFast()]
    model: str | None = None
    created: When | None = None


RENAMED = {"developer": "system", "function": "tool"}


def read_openai(item: Fields) -> Chat:
    """Return the chat of a list of messages."""
    line = Messages.model_validate(item)
    chat = line.chat("openai", item, created_at=line.created)
    for number, message in enumerate(line.messages):
        content, role, extra = message.content, message.role, message.rest
        if isinstance(content, list):
            extra["content"] = content
            with place(f"messages.{number}"):
                content = "\n".join(filter(None, map(text_of, content)))
        if role in RENAMED:
            extra["role"] = role
        chat.add(
            role=RENAMED.get(role, role),
            content=content or "",
            thinking=message.reasoning_content,
            tool_call_id=message.tool_call_id,
            model=line.model if role == "assistant" else None,
            created_at=line.created,
            extra_data=extra or None,
        )
    return chat


# --- ShareGPT: objects with conversations ---

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class Turn(Input):
    """What one of them said."""

    speaker: Annotated[Literal[tuple(SPEAKERS)], Field(alias="from")]  # type: ignore[valid-type]
    value: str


class Turns(Item):
    """A conversation of turns."""

    conversations: Annotated[list[Turn], FailFast()]
    system: str | None = None
    model: str | None = None


def read_sharegpt(item: Fields) -> Chat:
    """Return the chat of a list of turns."""
    turns = Turns.model_validate(item)
    chat = turns.chat("sharegpt", item)
    if turns.system:
        chat.add(role="system", content=turns.system)
    for turn in turns.conversations:
        role, extra = SPEAKERS[turn.speaker], turn.rest
        if turn.speaker == "function_call":
            extra["from"] = turn.speaker
        model = turns.model if role == "assistant" else None
        chat.add(role=role, content=turn.value, model=model, extra_data=extra or None)
    return chat


READERS: dict[str, Callable[[Fields], Chat]] = {
    "mapping": read_chatgpt,
    "messages": read_openai,
    "conversations": read_sharegpt,
}
