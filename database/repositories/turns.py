"""Windows of a history that begin with what a user said, and never part a call from its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from database.models.message import Role
from database.repositories.histories import read_history

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

    from database.models.message import Message

__all__ = ["read_turns"]


def read_turns(db: Session, conversation: UUID, bounds: Mapping[str, Any]) -> list[Message]:
    """Return the newest turns, and those before them that hold the calls of their results.

    One query, unless there are results whose calls are not among them.
    """
    within: dict[str, Any] = {name: bounds[name] for name in bounds if name != "turns"}
    lower: dict[str, Any] = {name: bounds[name] for name in bounds if name == "after"}
    found = read_history(db, conversation, bounds)
    while found:
        call = _call_before(db, conversation, found, lower)
        if call is None:
            break
        turn = read_history(db, conversation, {**lower, "end": call.position, "turns": 1})
        if not turn:
            break  # It was deleted meanwhile.
        found = read_history(db, conversation, {**within, "start": turn[0].position})
    return found


def _call_before(
    db: Session, conversation: UUID, window: Sequence[Message], lower: Mapping[str, Any]
) -> Message | None:
    """Return a message before a window that holds the call of a result in it.

    A call is known by its `tool_call_id`. An assistant's message without one may hold several: of
    the results that come after it, as long as no other message is known to call for them.
    """
    called = set()
    may_call = is_parted = False
    unknown = []
    for message in window:
        if message.role is Role.ASSISTANT:
            called.add(message.tool_call_id)
            may_call = may_call or message.tool_call_id is None
        elif message.role is Role.TOOL and (
            message.tool_call_id is None or message.tool_call_id not in called
        ):
            unknown.append(message.tool_call_id)
            is_parted = is_parted or not may_call
    before: dict[str, Any] = {**lower, "before": window[0].position}
    if ids := [call for call in unknown if call is not None]:
        calls = read_history(db, conversation, {**before, "calls": ids})
        if calls:
            return calls[0]
    if not is_parted:
        return None
    previous = read_history(db, conversation, {**before, "limit": 1})
    return next((m for m in previous if m.role in (Role.ASSISTANT, Role.TOOL)), None)
