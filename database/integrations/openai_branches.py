"""Named branches of a session of the OpenAI Agents SDK.

Branches of a conversation have no names: its metadata keeps them, and with which message each ends
that is not the current one. All calls hold the conversation's lock: what a name says and where the
history ends is read and written together.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING, Any
from uuid import UUID

from database.errors import InvalidValueError
from database.integrations.openai_turns import turns_of
from database.models.message import Role
from database.repositories.conversation import ConversationRepository
from database.repositories.message import MessageRepository
from database.types import check_text, utcnow
from database.units import transaction

if TYPE_CHECKING:
    from collections.abc import Callable

    from database.integrations.openai_turns import Turn
    from database.models.conversation import Conversation
    from database.models.message import Message
    from database.session import TenantSession

__all__ = [
    "Branches",
    "clear",
    "locked_branches",
    "pop",
    "tip_of",
    "unknown_branch",
    "with_branches",
    "without_branches",
]

_KEY = "openai_agents"
"""Where the metadata of a conversation tell of its branches."""

_MAIN = "main"
_MOST_CHARACTERS = 255


@dataclass
class _Branch:
    made: datetime
    tip: UUID | None = None
    """Its newest message; None if it is empty, or the current one."""


class Branches:
    """The branches of a conversation that the caller has locked.

    Args:
        db: The session, in a transaction.
        conversation: Whose.
    """

    def __init__(self, db: TenantSession, conversation: Conversation) -> None:
        self._db = db
        self._conversation = conversation
        self.current = _MAIN
        self._named = {_MAIN: _Branch(conversation.created_at)}
        kept = _kept(conversation)
        if kept is not None:
            self.current = kept["current"]
            self._named = {
                name: _Branch(
                    datetime.fromisoformat(one["created_at"]), one["tip"] and UUID(one["tip"])
                )
                for name, one in kept["branches"].items()
            }

    def create(self, turn_of: Callable[[list[Turn]], int], name: str | None) -> str:
        """Begin a branch before a turn of the current one, and go there; return its name.

        Raises:
            InvalidValueError: There is no such turn, or the name is empty or taken.
        """
        if name is not None:
            self._check_new(name)
        turns = [*turns_of(MessageRepository.history(self._db, self._conversation.id))]
        number = turn_of(turns)
        place = next((at for at, turn in enumerate(turns) if turn.number == number), None)
        if not number or place is None:
            raise InvalidValueError("turn_number", "must be that of a turn of the current branch")
        if name is None:
            names = (f"branch_from_turn_{number}{f'_{n}' if n > 1 else ''}" for n in count(1))
            name = next(name for name in names if name not in self._named)
        self._named[name] = _Branch(utcnow())
        self._go(name, turns[place - 1].messages[-1].id if place else None)
        return name

    def switch(self, name: str) -> str:
        """Go on with another branch, where it was left.

        Raises:
            InvalidValueError: There is none of this name.
            NotFoundError: Its newest message was deleted.
        """
        self._check_known(name)
        if name != self.current:
            self._go(name, self._named[name].tip)
        return name

    def delete(self, name: str, *, force: bool) -> str:
        """Delete a branch, and what neither another one nor a fork shows.

        Raises:
            InvalidValueError: There is none of this name, or it must not be deleted.
        """
        self._check_known(name)
        if name == _MAIN:
            raise InvalidValueError("branch_id", f"must not be {_MAIN!r}, which stays")
        if name == self.current:
            if not force:
                raise InvalidValueError("branch_id", "must not be the current one without force")
            self.switch(_MAIN)
        tip = self._named.pop(name).tip
        self._store()
        if tip is not None and MessageRepository.get(self._db, tip) is not None:
            ends = [end for end in map(self.tip, self._named) if end is not None]
            ConversationRepository.prune(self._db, self._conversation.id, tip, keep=ends)
        return name

    def described(self) -> list[dict[str, Any]]:
        """Return what `list_branches` shows, the oldest first."""
        shown = []
        for name, branch in sorted(self._named.items(), key=lambda item: item[1].made):
            tip = self.tip(name)
            roles = MessageRepository.roles_to(self._db, tip) if tip else {}
            shown.append(
                {
                    "branch_id": name,
                    "message_count": sum(roles.values()),
                    "user_turns": roles.get(Role.USER, 0),
                    "is_current": name == self.current,
                    "created_at": branch.made,
                }
            )
        return shown

    def tip(self, name: str) -> UUID | None:
        """Return the newest message of a branch; None if it is empty, or there is none."""
        if name != self.current:
            branch = self._named.get(name)
            return None if branch is None else branch.tip
        if self._conversation.is_branched:
            return self._conversation.head_id
        last = MessageRepository.get_last(self._db, self._conversation.id)
        return None if last is None else last.id

    def pop(self, before: int | None) -> Message | None:
        """Take the newest message off the current branch, as `MessageRepository.pop_last` does.

        What another branch ends with is not deleted.
        """
        conversation = self._conversation.id
        ending = [b for n, b in self._named.items() if n != self.current and b.tip is not None]
        if ending:
            newest = MessageRepository.history(self._db, conversation, limit=2, before=before)
            ending = [branch for branch in ending if newest and branch.tip == newest[-1].id]
        if not ending:
            return MessageRepository.pop_last(self._db, conversation, before=before)
        previous = newest[-2].id if len(newest) > 1 else None
        if before is None:
            ConversationRepository.branch(self._db, conversation, at=previous)
            return newest[-1]
        # It goes from between others, so from all branches.
        for branch in ending:
            branch.tip = previous
        self._store()
        return MessageRepository.pop_last(self._db, conversation, before=before)

    def _go(self, name: str, tip: UUID | None) -> None:
        self._named[self.current].tip = self.tip(self.current)
        self._named[name].tip = None
        self.current = name
        self._store()
        self._conversation = ConversationRepository.branch(self._db, self._conversation.id, at=tip)

    def _store(self) -> None:
        kept = {
            "conversation": str(self._conversation.id),
            "current": self.current,
            "branches": {
                name: {"tip": one.tip and str(one.tip), "created_at": one.made.isoformat()}
                for name, one in self._named.items()
            },
        }
        metadata = {**self._conversation.metadata_, _KEY: kept}
        ConversationRepository.update(self._db, self._conversation.id, metadata=metadata)

    def _check_known(self, name: str) -> None:
        if check_text("branch_id", name) not in self._named:
            raise unknown_branch()

    def _check_new(self, name: str) -> None:
        if not check_text("branch_name", name).strip():
            raise InvalidValueError("branch_name", "must not be empty")
        if len(name) > _MOST_CHARACTERS or not name.isprintable():
            rule = f"must be at most {_MOST_CHARACTERS} printable characters"
            raise InvalidValueError("branch_name", rule)
        if name in self._named:
            raise InvalidValueError("branch_name", "must not be that of another branch")


def unknown_branch() -> InvalidValueError:
    """Return the error for a branch that there is not."""
    return InvalidValueError("branch_id", "must be that of a branch of the session")


def locked_branches(db: TenantSession, conversation: UUID) -> Branches | None:
    """Return the branches of a conversation, locked until the transaction ends, or None."""
    locked = ConversationRepository.lock(db, conversation)
    return None if locked is None else Branches(db, locked)


def tip_of(db: TenantSession, conversation: UUID, name: str) -> UUID | None:
    """Return the newest message of a branch, in a transaction; None if there is none.

    Behind a lock: else a pop could take it away before the branch is read.
    """
    branches = locked_branches(db, conversation)
    return None if branches is None else branches.tip(name)


def pop(db: TenantSession, conversation: UUID, before: int | None) -> Message | None:
    """Take the newest message off the current branch of a conversation, in a transaction."""
    branches = locked_branches(db, conversation)
    return None if branches is None else branches.pop(before)


def clear(db: TenantSession, conversation: UUID) -> int:
    """Delete all messages and names of a conversation; return how many messages."""
    with transaction(db):
        locked = ConversationRepository.lock(db, conversation)
        if locked is not None and _KEY in locked.metadata_:
            metadata = without_branches(locked.metadata_)
            ConversationRepository.update(db, conversation, metadata=metadata)
        return MessageRepository.clear(db, conversation)


def without_branches(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what a conversation's metadata tell besides branches."""
    return {name: value for name, value in metadata.items() if name != _KEY}


def with_branches(conversation: Conversation, metadata: Any) -> Any:
    """Return metadata with what a locked conversation's own tell of branches, and nothing else."""
    if not isinstance(metadata, dict):
        return metadata  # for the repository to refuse
    kept = conversation.metadata_.get(_KEY)
    return without_branches(metadata) | ({} if kept is None else {_KEY: kept})


def _kept(conversation: Conversation) -> dict[str, Any] | None:
    kept = conversation.metadata_.get(_KEY)
    # A fork has taken over the metadata, but not the branches.
    is_own = isinstance(kept, dict) and kept.get("conversation") == str(conversation.id)
    return kept if is_own else None
