"""The formats that chats are exported in, each read into a `Chat`.

What of an item has no column goes into the conversation's metadata, what of a message into its
extra_data: pictures and recordings as what the export has of them, the source's ids, weights.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal

from importing import reason  # the file beside this one
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    Strict,
    model_validator,
)

Fields = dict[str, Any]

MAX_ID = 200
MAX_TITLE = 500
SHORT_TITLE = 80
BEFORE_ALL = -1


@dataclass
class Chat:
    """A chat as it goes into the database.

    Attributes:
        thread_id: Its name in the tenant.
        title: What to call it.
        metadata: What else is known of it.
        created_at: When it began, if that is known.
        updated_at: When it was last changed, likewise.
        messages: Of all branches, in the order in which they are written.
        follows: Of each message, the number of the one before it.
        head: The number of the one that the history ends with.
    """

    thread_id: str
    title: str | None
    metadata: Fields
    created_at: datetime | None = None
    updated_at: datetime | None = None
    messages: list[Fields] = field(default_factory=list)
    follows: list[int] = field(default_factory=list)
    head: int = BEFORE_ALL

    def add(self, after: int | None = None, **fields: Any) -> int:
        """Add a message, by default after the newest; return its number."""
        newest = len(self.messages) - 1
        self.follows.append(newest if after is None else after)
        self.messages.append({name: value for name, value in fields.items() if value is not None})
        self.head = newest + 1
        return self.head

    def chains(self) -> Iterator[tuple[int, list[Fields]]]:
        """Yield messages that follow one another, and the number of the one before them."""
        starts = [n for n, before in enumerate(self.follows) if n == 0 or before != n - 1]
        for start, end in pairwise([*starts, len(self.messages)]):
            yield self.follows[start], self.messages[start:end]

    @cached_property
    def digest(self) -> str:
        """What tells its content from any other.

        Not the metadata of ChatGPT's messages: a later export may describe the same message in
        another way.
        """
        said = [
            {**message, "extra_data": {**message.get("extra_data", {}), "metadata": None}}
            for message in self.messages
        ]
        return digest_of([said, self.follows, self.head])

    def name(self) -> None:
        """Give it a title, if it has none: what the user said first."""
        asked = (message["content"] for message in self.messages if message["role"] == "user")
        title = " ".join((self.title or next(asked, "")[:MAX_TITLE]).split())
        if not self.title and len(title) > SHORT_TITLE:
            title = f"{title[: SHORT_TITLE - 1]}…"
        self.title = title[:MAX_TITLE] or None


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


def digest_of(value: Any) -> str:
    """Return the digest of what can be written as JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def place(where: str) -> Iterator[None]:
    """Let an error say where the fault is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {reason(error)}") from None


def given(fields: Mapping[str, Any]) -> Fields:
    """Return the fields that say something."""
    return {name: value for name, value in fields.items() if value not in (None, {}, [])}


def text_of(part: Any) -> str:
    """Return the text of a part of a message; of a picture and the like, what it is."""
    if part is None or isinstance(part, str):
        return part or ""
    if not isinstance(part, dict):
        raise ValueError("parts of a message must be texts or objects")  # noqa: TRY004 - see above
    for key in ("text", "refusal"):
        if isinstance(part.get(key), str):
            return str(part[key])
    names = (part.get(key) for key in ("type", "content_type", "asset_pointer"))
    return f"[{' '.join(name for name in names if isinstance(name, str))}]"


# --- What must be in an item ---


def as_text(value: Any) -> Any:
    """Return a whole number as text, and anything else as it is."""
    return str(value) if type(value) is int else value


Printable = Field(pattern=rf"^\P{{C}}{{1,{MAX_ID}}}$")
Id = Annotated[str, BeforeValidator(as_text), Printable]
When = Annotated[AwareDatetime, Strict(strict=False)]  # seconds since 1970, or ISO 8601


class Input(BaseModel):
    """A part of an item: no number passes for a text, and what it does not name is kept.

    Lists fail fast, for only the first fault is told, and a million of them need much memory.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    @property
    def rest(self) -> Fields:
        """What it has that no field is for."""
        return given(self.model_extra or {})


class Item(Input):
    """What conversations of all formats may have."""

    id: Id | None = None
    conversation_id: Id | None = None
    title: str | None = None

    def chat(self, source: str, item: Fields, **fields: Any) -> Chat:
        """Return a chat without messages."""
        # Of the whole item: two that differ in anything are two conversations.
        name = self.conversation_id or self.id or digest_of(item)
        metadata = {"source": source, **({"item": self.rest} if self.rest else {})}
        return Chat(f"{source}:{name}", self.title, metadata, **fields)


# --- ChatGPT: conversations.json ---


class Author(Input):
    """Who wrote a message."""

    role: Literal["user", "assistant", "system", "tool", "developer"]


class Content(Input):
    """What a message says; where, depends on its type."""

    content_type: str
    parts: list[Any] | None = None
    thoughts: list[Any] | None = None


class NodeMessage(Input):
    """The message of a node."""

    author: Author
    content: Content
    create_time: When | None = None
    metadata: Fields | None = None


class Node(Input):
    """A node of the tree; without a message, a place where others begin."""

    parent: str | None = None
    children: Annotated[list[str], FailFast()] = []
    message: NodeMessage | None = None


class Tree(Item):
    """An element of conversations.json; each of its nodes is judged by itself."""

    mapping: Fields
    current_node: str | None = None
    create_time: When | None = None
    update_time: When | None = None


TEXTS = (
    *("text", "result", "content", "output_str"),
    *("user_profile", "user_instructions", "model_set_context"),
)
EDITABLE = ("user_editable_context", "model_editable_context")  # what the model is told of the user
THOUGHTS = ("thoughts", "reasoning_recap")
THOUGHT = ("summary", "content")
# Without a text these say nothing; most are hidden system messages.
EMPTY = ("text", "multimodal_text", "thoughts", *EDITABLE)


def read_chatgpt(item: Fields) -> Chat:
    """Return the chat of a tree of messages; all of its branches stay.

    A node without content is left out: what follows it follows the one before it.
    """
    tree = Tree.model_validate(item)
    nodes = {}
    for id_, node in tree.mapping.items():
        if not id_.isprintable() or len(id_) > MAX_ID:
            raise ValueError("mapping: ids must be printable, of at most 200 characters")
        with place(f"mapping.{id_}"):
            nodes[id_] = Node.model_validate(node)
    chat = tree.chat("chatgpt", item, created_at=tree.create_time, updated_at=tree.update_time)
    numbers: dict[str | None, int] = {None: BEFORE_ALL}  # of the message that a node comes to
    for id_ in walk(nodes):
        numbers[id_] = before = numbers[nodes[id_].parent]
        with place(f"mapping.{id_}"):
            fields = fields_of(id_, nodes[id_].message, item["mapping"][id_])
        if fields is None:
            continue
        earlier = chat.messages[before].get("created_at") if before >= 0 else chat.created_at
        fields["created_at"] = fields["created_at"] or earlier
        numbers[id_] = chat.add(before, **fields)
    if len(numbers) <= len(nodes):
        raise ValueError("mapping: nodes follow one another in a circle")
    if tree.current_node is not None:
        if tree.current_node not in numbers:
            raise ValueError("current_node: must be in mapping")
        chat.head = numbers[tree.current_node]
    return chat


def walk(nodes: Mapping[str, Node]) -> Iterator[str]:
    """Yield the nodes that can be reached, each after its parent, siblings in their order."""
    after: dict[str | None, list[str]] = defaultdict(list)
    for id_, node in nodes.items():
        if node.parent is not None and node.parent not in nodes:
            raise ValueError(f"mapping.{id_}: parent: must be in mapping")
        after[node.parent].append(id_)
    for parent, children in after.items():
        if parent is not None and len(children) > 1:
            places = {id_: place for place, id_ in enumerate(nodes[parent].children)}
            children.sort(key=lambda id_: places.get(id_, len(places)))
    waiting = after[None][::-1]
    while waiting:
        id_ = waiting.pop()
        yield id_
        waiting += reversed(after[id_])


def fields_of(id_: str, message: NodeMessage | None, node: Fields) -> Fields | None:
    """Return the fields of a node's message, or None if it says nothing."""
    if message is None:
        return None
    content, kind = message.content, message.content.content_type
    text, thinking = said(content)
    if not (text or thinking) and kind in EMPTY:
        return None
    metadata = message.metadata or {}
    model = metadata.get("model_slug")
    given_role = message.author.role
    role = "system" if given_role == "developer" or kind in EDITABLE else given_role
    extra = {"id": id_, **message.rest, "metadata": metadata, "author": message.author.rest}
    if kind != "text" or content.parts != [text] or content.rest:
        extra["content"] = node["message"]["content"]
    if role != given_role:
        extra["role"] = given_role
    return {
        "role": role,
        "content": text,
        "thinking": thinking,
        "model": model if role == "assistant" and isinstance(model, str) else None,
        "created_at": message.create_time,
        "extra_data": given(extra),
    }


def said(content: Content) -> tuple[str, str | None]:
    """Return the text and the thoughts of a message."""
    if content.parts is not None:
        texts = [text_of(part) for part in content.parts]
    else:
        texts = texts_in(content.rest, TEXTS)
    for thought in content.thoughts or []:
        texts += texts_in(thought, THOUGHT)
    text = "\n".join(filter(None, texts))
    return ("", text or None) if content.content_type in THOUGHTS else (text, None)


def texts_in(fields: Any, names: Iterable[str]) -> list[str]:
    """Return the fields that are text, out of those with these names."""
    if not isinstance(fields, dict):
        raise ValueError("thoughts must be objects")  # noqa: TRY004 - see above
    return [fields[name] for name in names if isinstance(fields.get(name), str)]


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
