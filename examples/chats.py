"""Chats as they go into the database, and what all formats of items have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any

from importing import reason  # the file beside this one
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, Strict

Fields = dict[str, Any]

MAX_ID = 200
MAX_NAME = 255
CUT = ("model", "tool_call_id")  # a longer one ends with its digest, so that equal ones stay equal
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
        for name in CUT:
            if len(text := fields.get(name) or "") > MAX_NAME:
                fields[name] = text[: MAX_NAME - len(digest_of(text))] + digest_of(text)
                fields["extra_data"] = {**(fields.get("extra_data") or {}), name: text}
        newest = len(self.messages) - 1
        self.follows.append(newest if after is None else after)
        self.messages.append({name: value for name, value in fields.items() if value is not None})
        self.head = newest + 1
        return self.head

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
