"""Histories as lists of messages, for `Agent.run(..., message_history=...)`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pydantic_ai.messages import ModelMessage

from database.errors import UnreadableMessageError
from database.integrations.pydantic_ai.rows import message_of, rows_of
from database.integrations.pydantic_ai.serialized import FORMAT, parse_message, parse_messages
from database.models.message import Message
from database.repositories.message import MessageRepository

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

    from database.repositories.histories import Body

__all__ = [
    "History",
    "Skipped",
    "append_history",
    "are_ours",
    "clear",
    "load_history",
    "read_row",
    "read_rows",
]

RowT = TypeVar("RowT", bound="Message | Body")

logger = logging.getLogger(__name__)

_OURS = FORMAT.partition("/")[0] + "/"


class Skipped(NamedTuple):
    """A message that could not be read.

    Attributes:
        id: Its row's id.
        position: Its place in the conversation.
        reason: Why; never what it holds.
    """

    id: UUID
    position: int
    reason: str


class History(list[ModelMessage]):
    """The messages of a conversation, in order.

    Attributes:
        skipped: Those left out because they could not be read.
    """

    def __init__(self, messages: Iterable[ModelMessage] = ()) -> None:
        super().__init__(messages)
        self.skipped: list[Skipped] = []


def load_history(
    db: Session,
    conversation_id: UUID | str,
    *,
    limit: int | None = None,
    turns: int | None = None,
    strict: bool = False,
) -> History:
    """Return the newest messages of a conversation, oldest of them first.

    A message that something else wrote is read from its role and text.

    Args:
        db: The session.
        conversation_id: Whose; as for `MessageRepository`.
        limit: How many at most; None is all. May part a tool's result from its call, `turns` not.
        turns: Begin with the user's message that is so many turns back.
        strict: Whether a message that cannot be read is an error. Otherwise it is left out, listed
            in `skipped`, and a warning logged.

    Raises:
        UnreadableMessageError: A message is corrupt or of a newer format, and `strict`.
        InvalidValueError: An argument is not valid.
    """
    if turns is None:
        data = MessageRepository.data(db, conversation_id, FORMAT, limit=limit)
        messages = parse_messages(data)
        if messages is not None:
            return History(messages)
    rows = MessageRepository.history(db, conversation_id, limit=limit, turns=turns)
    read, skipped = read_rows(rows, strict=strict)
    history = History(message for _, message in read)
    history.skipped = skipped
    return history


def are_ours(rows: Iterable[Message | Body]) -> bool:
    """Tell whether all rows are of Pydantic AI's messages, which their bodies tell whole."""
    return all(map(_is_ours, {row.data_format for row in rows}))


def _is_ours(data_format: str | None) -> bool:
    return data_format is not None and data_format.startswith(_OURS)


def read_rows(
    rows: Sequence[RowT], *, strict: bool
) -> tuple[list[tuple[RowT, ModelMessage]], list[Skipped]]:
    """Return messages beside their rows, and what cannot be read, logging a warning.

    Raises:
        UnreadableMessageError: One cannot be read, and `strict`.
    """
    if all(row.data_format == FORMAT for row in rows):
        messages = parse_messages([row.data for row in rows])
        if messages is not None:
            return list(zip(rows, messages, strict=True)), []
    read: list[tuple[RowT, ModelMessage]] = []
    skipped: list[Skipped] = []
    for row in rows:
        try:
            read.append((row, read_row(row)))
        except UnreadableMessageError as error:
            if strict:
                raise
            skipped.append(Skipped(error.id, error.position, error.reason))
    if skipped:
        logger.warning(
            "%d of %d messages cannot be read: %s",
            len(skipped),
            len(read) + len(skipped),
            ", ".join(f"{one.id} ({one.reason})" for one in skipped),
        )
    return read, skipped


def read_row(row: Message | Body) -> ModelMessage:
    """Return the message of a row, a whole one unless they `are_ours`.

    Raises:
        UnreadableMessageError: It is corrupt, or of another version of the format.
    """
    if row.data_format == FORMAT:
        try:
            return parse_message(row.data or b"")
        except (ValueError, RecursionError):
            # Not the cause: it shows contents.
            raise UnreadableMessageError(row.id, row.position, "its data is corrupt") from None
    if isinstance(row, Message) and not _is_ours(row.data_format):
        return message_of(row)
    raise UnreadableMessageError(row.id, row.position, "its format is of another version")


def append_history(
    db: Session, conversation_id: UUID | str, messages: Iterable[ModelMessage]
) -> list[Message]:
    """Append messages, such as `result.new_messages()`, in one statement: all or none.

    Of each, role, text, thinking, model, run and tokens can be searched and counted; what
    `load_history` returns is kept beside them, exactly.

    Args:
        db: The session.
        conversation_id: Where to.
        messages: In order.

    Returns:
        The rows.

    Raises:
        InvalidReferenceError: There is no such conversation in the tenant.
        InvalidValueError: One is no message of Pydantic AI.
    """
    return MessageRepository.append_many(db, conversation_id, rows_of(messages))


def clear(db: Session, conversation_id: UUID | str) -> int:
    """Hide all messages of a conversation; return how many.

    `MessageRepository.restore` shows them again, `purge` deletes them for good.
    """
    return MessageRepository.deactivate(db, conversation_id)
