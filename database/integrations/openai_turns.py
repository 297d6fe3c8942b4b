"""Turns of a session of the OpenAI Agents SDK, and what they cost.

A turn is a user's message and all that follows it. What its run used stands on the turn's last
message that is not the user's: tokens and model in their columns, where sums by model find them,
and the SDK's counts in `extra_data`. So usage goes when its message goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from database.errors import InvalidValueError
from database.integrations.openai_items import item_of
from database.models.message import Message, Role
from database.repositories.bookkeeping import lock
from database.repositories.message import MessageRepository
from database.types import check_text
from database.units import transaction

if TYPE_CHECKING:
    from uuid import UUID

    from database.session import TenantSession

__all__ = [
    "Turn",
    "counts_of",
    "matching",
    "model_of",
    "session_usage",
    "store_usage",
    "turn_usage",
    "turns_of",
    "usage_of",
]

_USAGE = "usage"
_COUNTS = ("requests", "input_tokens", "output_tokens", "total_tokens")
_DETAILS = ("input_tokens_details", "output_tokens_details")
_PAGE = 100
_PREVIEW = 100


@dataclass
class Turn:
    """The messages of a turn, in order; number 0 are those before the first one of a user."""

    number: int
    messages: list[Message] = field(default_factory=list)

    @property
    def usage(self) -> list[dict[str, Any]]:
        """What runs used in it; more than one only in number 0."""
        return [found for found in map(_usage_of, self.messages) if found]

    def described(self) -> dict[str, Any]:
        """Return the user's message, as `get_conversation_turns` shows it."""
        first = self.messages[0]
        try:
            content = item_of(first)["content"]
        except (InvalidValueError, KeyError):
            content = first.content
        shown = content if isinstance(content, str) else first.content
        return {
            "turn": self.number,
            "content": shown if len(shown) <= _PREVIEW else shown[:_PREVIEW] + "...",
            "full_content": content,
            "timestamp": first.created_at,
            "can_branch": True,
            "message_id": first.id,
        }


def turns_of(messages: Iterable[Message]) -> Iterator[Turn]:
    """Yield the turns of a history."""
    turn = Turn(0)
    for message in messages:
        if message.role is Role.USER:
            if turn.messages:
                yield turn
            turn = Turn(turn.number + 1)
        turn.messages.append(message)
    if turn.messages:
        yield turn


def matching(turns: Iterable[Turn], search_term: str) -> list[Turn]:
    """Return the turns whose user's text has a part like this, in any case."""
    wanted = check_text("search_term", search_term).casefold()
    return [turn for turn in turns if turn.number and wanted in turn.messages[0].content.casefold()]


def usage_of(turns: Iterable[Turn]) -> dict[str, int]:
    """Return the sums of what runs used in turns, empty if nothing was stored."""
    return _summed(usage for turn in turns for usage in turn.usage)


def counts_of(usage: Any) -> dict[str, Any]:
    """Return the SDK's `Usage` as JSON."""
    counts: dict[str, Any] = {name: getattr(usage, name) or 0 for name in _COUNTS}
    for name in _DETAILS:
        details = getattr(usage, name, None)
        counts[name] = None if details is None else details.model_dump(mode="json")
    return counts


def model_of(agent: Any) -> str | None:
    """Return the name of an agent's model, where it has one."""
    model = getattr(agent, "model", None)
    name = model if isinstance(model, str) else getattr(model, "model", None)
    return name if isinstance(name, str) else None


def store_usage(
    db: TenantSession, conversation: UUID, counts: dict[str, Any], model: str | None
) -> bool:
    """Write what the newest turn's run used, in place of what stood there; tell whether it could.

    A run that goes on after an approval counts what it used before, too.
    """
    with transaction(db):
        lock(db, conversation)
        turn = _newest_turn(db, conversation)
        answers = [message for message in turn if message.role is not Role.USER]
        if not answers:
            return False
        if len(answers) < len(turn):
            for message in answers[:-1]:
                if _usage_of(message):
                    _write_usage(db, message, None, None)
        _write_usage(db, answers[-1], counts, model)
        return True


def session_usage(db: TenantSession, conversation: UUID) -> dict[str, int]:
    """Return the sums of all that runs used, empty if nothing was stored."""
    return _summed(_stored(db, conversation))


def turn_usage(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """Return what was used, by turn."""
    found = []
    for turn in turns:
        if usage := turn.usage:
            summed = {name: sum(one[name] for one in usage) for name in _COUNTS}
            last = {name: usage[-1].get(name) for name in _DETAILS}
            found.append({"user_turn_number": turn.number, **summed, **last})
    return found


def _stored(db: TenantSession, conversation: UUID) -> Iterator[dict[str, Any]]:
    cursor = None
    while True:
        page = MessageRepository.search(
            db,
            None,
            conversation_id=conversation,
            where={_USAGE: {"exists": True}},
            limit=1000,
            cursor=cursor,
        )
        yield from filter(None, map(_usage_of, page))
        cursor = page.next_cursor
        if cursor is None:
            return


def _summed(usages: Iterable[dict[str, Any]]) -> dict[str, int]:
    sums = dict.fromkeys(_COUNTS, 0)
    runs = 0
    for usage in usages:
        runs += 1
        for name in _COUNTS:
            sums[name] += usage[name]
    return {**sums, "total_turns": runs} if runs else {}


def _newest_turn(db: TenantSession, conversation: UUID) -> list[Message]:
    newest_first: list[Message] = []
    before = None
    while page := MessageRepository.history(db, conversation, limit=_PAGE, before=before):
        for message in reversed(page):
            newest_first.append(message)
            if message.role is Role.USER:
                return newest_first[::-1]
        before = page[0].position
    return newest_first[::-1]


def _usage_of(message: Message) -> dict[str, Any] | None:
    found = message.extra_data.get(_USAGE) if isinstance(message.extra_data, dict) else None
    return found if isinstance(found, dict) and all(name in found for name in _COUNTS) else None


def _write_usage(
    db: TenantSession, message: Message, counts: dict[str, Any] | None, model: str | None
) -> None:
    kept = message.extra_data if isinstance(message.extra_data, dict) else {}
    extra_data = {name: value for name, value in kept.items() if name != _USAGE}
    if counts is not None:
        extra_data[_USAGE] = counts
    MessageRepository.update(
        db,
        message.id,
        input_tokens=counts and counts["input_tokens"],
        output_tokens=counts and counts["output_tokens"],
        model=model,
        extra_data=extra_data or None,
    )
