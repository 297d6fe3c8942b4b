"""Reading the messages of a conversation's history.

A linear one is one range of positions. That it is linear is a condition of that read, so that it
costs no other one; what has branched is read by the path to its head.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from sqlalchemy import Text, Uuid, any_, bindparam, case, func, select, true
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import aliased

from database.models.conversation import Conversation
from database.models.message import Message, Role
from database.repositories.loading import fetch, read, shape_of
from database.repositories.paths import HEAD, along, path_to
from database.session import tenant_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.orm import Session

__all__ = [
    "IS_LINEAR",
    "MESSAGES",
    "OF_CONVERSATION",
    "Body",
    "count_roles",
    "last_ids",
    "messages_of",
    "read_bodies",
    "read_bodies_to",
    "read_data",
    "read_history",
    "read_messages",
    "read_path",
]

MESSAGES = shape_of(Message, "conversation_id")
_ANY_MESSAGES = shape_of(Message)
OF_CONVERSATION = (
    Message.tenant_id == bindparam("tenant"),
    Message.conversation_id == bindparam("conversation"),
)
IS_LINEAR = (
    ~select(Conversation.is_branched)
    .where(
        Conversation.tenant_id == bindparam("tenant"), Conversation.id == bindparam("conversation")
    )
    .scalar_subquery()
)

_BOUNDS = {
    "before": lambda message: message.position < bindparam("before"),
    "after": lambda message: message.position > bindparam("after"),
    "start": lambda message: message.position >= bindparam("start"),
    "end": lambda message: message.position <= bindparam("end"),
    "asked": lambda message: message.role == Role.USER,
    "calls": lambda message: (
        (message.role == Role.ASSISTANT)
        & (message.tool_call_id == any_(bindparam("calls", type_=ARRAY(Text))))
    ),
}

_NEWEST = (
    select(Message.id)
    .where(
        Message.tenant_id == bindparam("tenant"),
        Message.conversation_id == Conversation.id,
        Message.is_active,
    )
    .order_by(Message.position.desc())
    .limit(1)
    .lateral("newest")
)
_LAST_IDS = (
    select(Conversation.id, _NEWEST.c.id)
    .join(_NEWEST, true())
    .where(
        Conversation.tenant_id == bindparam("tenant"),
        Conversation.id == any_(bindparam("conversations", type_=ARRAY(Uuid()))),
        ~Conversation.is_branched,
    )
)


def read_messages(
    db: Session, statement: Select[Any], conversation: UUID, parameters: Mapping[str, Any]
) -> list[Message]:
    """Run a statement made of `MESSAGES` over a conversation; return its messages in order."""
    bound = {"tenant": tenant_of(db), "conversation": conversation, **parameters}
    return read(db, MESSAGES, statement, bound, conversation_id=conversation)


def read_history(db: Session, conversation: UUID, bounds: Mapping[str, Any]) -> list[Message]:
    """Return the active messages of a conversation's history within bounds, oldest first.

    Args:
        db: The session.
        conversation: Whose.
        bounds: limit and turns count from the newest within the others; before, after, start and
            end are positions, calls the ids of tool calls, and asked tells that only what a user
            said is meant.
    """
    names = frozenset(bounds)
    found = read_messages(db, _linear(names), conversation, bounds)
    if not found:
        parameters = {"tenant": tenant_of(db), "conversation": conversation, **bounds}
        found = read(db, _ANY_MESSAGES, _branched(names), parameters)
    return found[::-1] if "limit" in bounds else found


def read_path(db: Session, head: UUID, bounds: Mapping[str, Any]) -> list[Message]:
    """Return the active messages that lead to a message, itself the last, oldest first."""
    parameters = {"tenant": tenant_of(db), "head": head, **bounds}
    found = read(db, _ANY_MESSAGES, _to_head(frozenset(bounds)), parameters)
    return found[::-1] if "limit" in bounds else found


class Body(NamedTuple):
    """What a framework needs of a message: its own form of it, or else the text.

    Attributes:
        id_bytes: Of the id, which `id` makes: making it costs as much as all the rest.
        content: The text; None where there is `data`.
    """

    id_bytes: bytes
    position: int
    role: str
    content: str | None
    tool_call_id: str | None
    data: bytes | None
    data_format: str | None

    @property
    def id(self) -> UUID:
        """The message's id."""
        return UUID(bytes=self.id_bytes)


def read_bodies(db: Session, conversation: UUID, bounds: Mapping[str, Any]) -> list[Body]:
    """Return the bodies of what `read_history` returns."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation, **bounds}
    found = _fetch_bodies(db, _linear, parameters, bounds)
    return found or _fetch_bodies(db, _branched, parameters, bounds)


def read_data(
    db: Session, conversation: UUID, data_format: str, bounds: Mapping[str, Any]
) -> list[bytes | None]:
    """Return the data of what `read_history` returns, None of those in another format."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation, **bounds}
    parameters["data_format"] = data_format
    for selecting in (_linear, _branched):
        statement = _data(selecting, frozenset(bounds))
        if rows := fetch(db, statement, parameters, in_binary=True):
            found = [data for (data,) in rows]
            return found[::-1] if "limit" in bounds else found
    return []


@cache
def _data(selecting: Callable[[frozenset[str]], Select[Any]], names: frozenset[str]) -> Select[Any]:
    statement = selecting(names)
    columns = statement.selected_columns
    data = case((columns["data_format"] == bindparam("data_format"), columns["data"]))
    return statement.with_only_columns(data, maintain_column_froms=True)


def read_bodies_to(db: Session, head: UUID, bounds: Mapping[str, Any]) -> list[Body]:
    """Return the bodies of what `read_path` returns."""
    parameters = {"tenant": tenant_of(db), "head": head, **bounds}
    return _fetch_bodies(db, _to_head, parameters, bounds)


def _fetch_bodies(
    db: Session,
    selecting: Callable[[frozenset[str]], Select[Any]],
    parameters: Mapping[str, Any],
    bounds: Mapping[str, Any],
) -> list[Body]:
    statement = _bodies(selecting, frozenset(bounds))
    found = list(map(Body._make, fetch(db, statement, parameters, in_binary=True)))
    return found[::-1] if "limit" in bounds else found


@cache
def _bodies(
    selecting: Callable[[frozenset[str]], Select[Any]], names: frozenset[str]
) -> Select[Any]:
    statement = selecting(names)
    all_columns = statement.selected_columns
    columns: dict[str, Any] = {name: all_columns.get(name) for name in Body._fields}
    columns["id_bytes"] = func.uuid_send(all_columns["id"])
    columns["content"] = case((all_columns["data"].is_(None), all_columns["content"]))
    return statement.with_only_columns(*columns.values(), maintain_column_froms=True)


def count_roles(db: Session, head: UUID) -> dict[Role, int]:
    """Return how many active messages of each role lead to a message."""
    rows = fetch(db, _roles_to(), {"tenant": tenant_of(db), "head": head})
    return {Role(role): found for role, found in rows}


@cache
def _roles_to() -> Select[Any]:
    path = path_to(bindparam("head", type_=Uuid()))
    where, part = along(path, select(Message.role).where(Message.is_active))
    return select(part.c.role, func.count()).select_from(where).group_by(part.c.role)


def last_ids(db: Session, conversations: Sequence[UUID]) -> dict[UUID, UUID]:
    """Return the ids of the newest active messages of those that are linear, by conversation."""
    parameters = {"tenant": tenant_of(db), "conversations": conversations}
    return dict(fetch(db, _LAST_IDS, parameters))


def messages_of(head: ColumnElement[Any]) -> Select[Message]:
    """Select the active messages that lead to a message, in order, as SQLAlchemy loads them."""
    where, part = along(path_to(head), select(Message).where(Message.is_active))
    message = aliased(Message, part)
    return select(message).select_from(where).order_by(message.position)


@cache
def _linear(names: frozenset[str]) -> Select[Any]:
    statement = MESSAGES.select.where(*OF_CONVERSATION, IS_LINEAR, *_within(names, Message))
    if "turns" in names:
        asked = aliased(Message)
        turn = (
            select(asked.position)
            .where(
                asked.tenant_id == bindparam("tenant"),
                asked.conversation_id == bindparam("conversation"),
                asked.role == Role.USER,
                *_within(names, asked),
            )
            .order_by(asked.position.desc())
            .offset(bindparam("turns") - 1)
            .limit(1)
            .scalar_subquery()
        )
        statement = statement.where(Message.position >= func.coalesce(turn, 0))
    return _in_order(statement, names, Message.position)


@cache
def _branched(names: frozenset[str]) -> Select[Any]:
    return _along(HEAD, names)


@cache
def _to_head(names: frozenset[str]) -> Select[Any]:
    return _along(bindparam("head", type_=Uuid()), names)


def _along(head: ColumnElement[Any], names: frozenset[str]) -> Select[Any]:
    path = path_to(head)
    messages = _ANY_MESSAGES.select.where(*_within(names, Message))
    if "turns" in names:
        asked = aliased(Message)
        user = select(asked.position).where(asked.role == Role.USER, *_within(names, asked))
        where, part = along(path, user, asked)
        turn = (
            select(part.c.position)
            .select_from(where)
            .order_by(part.c.position.desc())
            .offset(bindparam("turns") - 1)
            .limit(1)
            .scalar_subquery()
        )
        messages = messages.where(Message.position >= func.coalesce(turn, 0))
    # A limit within each range: else all of them would be read to keep a few.
    where, part = along(path, _in_order(messages, names, Message.position))
    return _in_order(select(*part.c).select_from(where), names, part.c.position)


def _within(names: frozenset[str], message: Any) -> list[ColumnElement[bool]]:
    return [message.is_active, *(_BOUNDS[name](message) for name in names if name in _BOUNDS)]


def _in_order(statement: Select[Any], names: frozenset[str], position: Any) -> Select[Any]:
    if "limit" not in names:
        return statement.order_by(position)
    return statement.order_by(position.desc()).limit(bindparam("limit"))
