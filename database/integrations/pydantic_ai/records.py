"""What Pydantic AI keeps of a conversation besides its messages, in the metadata of its row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_ai.conversation import Conversation as RunState
from pydantic_ai.conversation import ConversationTypeAdapter
from pydantic_ai.conversation_store import ConversationRecord

from database.errors import InvalidValueError
from database.integrations.pydantic_ai.serialized import dump, parse

if TYPE_CHECKING:
    from database.models.conversation import Conversation

__all__ = ["is_current", "metadata_of", "record_of"]

_KEY = "pydantic_ai"
_VERSION = 1


class _Kept(BaseModel):
    """What the metadata hold.

    Attributes:
        place: Where the conversation stood after the write, see `_place_of`.
        state: Usage and deferred requests as JSON text, which is exact for any text in them.
    """

    model_config = ConfigDict(frozen=True)

    format_version: Literal[1]
    revision: str
    place: list[int | str | None]
    head_id: UUID | None
    state: str
    forked_from: str | None
    forked_at: str | None
    branches: list[str]


def is_current(row: Conversation) -> bool:
    """Tell whether there is a record, and nobody else has changed the history since.

    Raises:
        InvalidValueError: It is corrupt, or of a newer version.
    """
    kept = _kept_in(row)
    return kept is not None and kept.place == _place_of(row)


def record_of(row: Conversation, newest: UUID | None) -> ConversationRecord:
    """Return the record of a conversation.

    Args:
        row: The conversation.
        newest: The message that its history ends with; for one that `is_current` it is not asked.

    Raises:
        InvalidValueError: It is corrupt, or of a newer version.
    """
    place = _place_of(row)
    kept = _kept_in(row)
    record = ConversationRecord(
        conversation_id=row.thread_id,
        head_id=_text(newest),
        scope=row.scope,
        updated_at=row.updated_at,
        revision=":".join(map(str, place)),
    )
    if kept is None:
        return record
    try:
        state = parse(ConversationTypeAdapter, kept.state.encode())
    except (ValueError, RecursionError):
        raise _unreadable() from None
    record.usage = state.usage
    record.deferred_tool_requests = state.deferred_tool_requests
    record.forked_from = kept.forked_from
    record.forked_at = kept.forked_at
    record.branches = kept.branches
    if kept.place == place:
        record.head_id = _text(kept.head_id)
        record.revision = kept.revision
    return record


def metadata_of(row: Conversation, record: ConversationRecord) -> dict[str, Any]:
    """Return a conversation's metadata with a record in them.

    Args:
        row: The conversation, its history already as the record says.
        record: What to keep.

    Raises:
        InvalidValueError: The record is of another version, or has no JSON.
    """
    if record.format_version != _VERSION:
        raise InvalidValueError("format_version", f"must be {_VERSION}")
    state = RunState(
        usage=record.usage,
        conversation_id=record.conversation_id,
        deferred_tool_requests=record.deferred_tool_requests,
    )
    kept = {
        "format_version": _VERSION,
        "revision": record.revision,
        "place": _place_of(row),
        "head_id": record.head_id,
        "state": dump(ConversationTypeAdapter, state, "conversation").decode(),
        "forked_from": record.forked_from,
        "forked_at": record.forked_at,
        "branches": record.branches,
    }
    return {**row.metadata_, _KEY: kept}


def _kept_in(row: Conversation) -> _Kept | None:
    """Return what is kept of a conversation; None if only others have written it."""
    found = row.metadata_.get(_KEY)
    if found is None:
        return None
    try:
        return _Kept.model_validate(found)
    except ValidationError:
        # Not the cause: it shows values.
        raise _unreadable() from None


def _place_of(row: Conversation) -> list[int | str | None]:
    """Return what changes with the history, but not with the title.

    The id is in it because a fork begins with the metadata of the other one, and because a
    conversation that was deleted and made again is a new one.
    """
    return [str(row.id), row.last_position, row.message_count, _text(row.head_id)]


def _text(id_: UUID | None) -> str | None:
    return None if id_ is None else str(id_)


def _unreadable() -> InvalidValueError:
    return InvalidValueError(f"metadata.{_KEY}", f"must be a record of version {_VERSION}")
