"""ChatGPT's conversations.json: each item a tree of messages, read into a `Chat`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

# The file beside this one.
from chats import BEFORE_ALL, MAX_ID, Chat, Fields, Input, Item, When, given, place, text_of
from pydantic import FailFast, Field


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
    children: Annotated[list[str], FailFast()] = Field(default_factory=list)
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
