"""Where a conversation's history goes: its branches, and the forks that share it."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

from database.errors import ConfigurationError, InvalidValueError
from database.models.conversation import Conversation
from database.repositories.bookkeeping import lock
from database.repositories.branches import Branch, branches_of
from database.repositories.branching import (
    branch_at,
    locked,
    message_id_of,
    message_in,
    newest_after,
)
from database.repositories.expiring import ExpiringRepository
from database.repositories.forking import begin_fork, shared
from database.repositories.opening import EMAIL_OF_WRITTEN
from database.repositories.pruning import prune
from database.repositories.threads import conversation_id_of
from database.units import is_owned, transaction

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from sqlalchemy.orm import Session

    from database.models.message import Message

__all__ = ["LINKS", "MANAGED", "ConversationBranches"]

# What messages link to; and what appends count on: a position given twice would refuse every later
# message.
LINKS = ("head_id", "is_branched", "is_shared", "forked_at_id")
MANAGED = ("last_position", "last_sequence", "message_count", "version", *LINKS)


class ConversationBranches(ExpiringRepository[Conversation]):
    """The calls of `ConversationRepository` that say where a conversation's history goes."""

    model = Conversation
    order = "updated_at"
    kept = "is_shared"
    computed: ClassVar = {"user_email": EMAIL_OF_WRITTEN}

    @classmethod
    def lock(cls, db: Session, thread_id: str | UUID) -> Conversation | None:
        """Return a conversation, or None, locked until the transaction ends, as appends lock it.

        Raises:
            ConfigurationError: The call is in no transaction, which would keep the lock.
        """
        if not is_owned(db):
            msg = "lock: must be called inside transaction(db)"
            raise ConfigurationError(msg)
        return lock(db, conversation_id_of(db, thread_id))

    @classmethod
    def branch(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        at: Message | UUID | str | int | None,
    ) -> Conversation:
        """Go back to a message: the history ends with it, and the next one follows it.

        What came after stays, in a branch. Locks the conversation, as an append does.

        Args:
            db: The session.
            conversation_id: Which.
            at: A message of any branch, its id, or its position in the history; None is before
                the first.

        Returns:
            The conversation.

        Raises:
            NotFoundError: There is no such conversation, or it has no such message.
        """
        conversation = conversation_id_of(db, conversation_id)
        with transaction(db):
            branch_at(db, conversation, at)
            return cls.require(db, conversation)

    @classmethod
    def branches(cls, db: Session, conversation_id: UUID | str) -> builtins.list[Branch]:
        """Return the branches of a conversation, the newest first; a linear one has one.

        None of them is active right after `branch`, until something is appended.

        Raises:
            NotFoundError: There is no such conversation in the tenant.
        """
        return branches_of(db, cls.require(db, conversation_id_of(db, conversation_id)))

    @classmethod
    def switch(
        cls, db: Session, conversation_id: UUID | str, message_id: Message | UUID | str | int
    ) -> Conversation:
        """Let the history run through a message, up to the newest one that came of it.

        Locks the conversation, as an append does.

        Args:
            db: The session.
            conversation_id: Which.
            message_id: A message of any branch, for example the head of one, as for `branch`.

        Returns:
            The conversation.

        Raises:
            NotFoundError: There is no such conversation, or it has no such message.
        """
        conversation = conversation_id_of(db, conversation_id)
        with transaction(db):
            newest_after(db, conversation, message_id)
            return cls.require(db, conversation)

    @classmethod
    def prune(
        cls,
        db: Session,
        conversation_id: UUID | str,
        head: Message | UUID | str,
        *,
        keep: Iterable[Message | UUID | str] = (),
    ) -> int:
        """Delete the messages that lead to a branch's head and to nothing else; return how many.

        The history stays, other branches stay, and what forks show, even if they have gone back
        from it. So it also deletes what `pop_last` left behind for forks that do not show it.
        Locks the conversation, as an append does.

        Args:
            db: The session.
            conversation_id: Which.
            head: The newest message of the branch, or the popped one.
            keep: Messages that stay, or their ids, with those that lead there.

        Raises:
            NotFoundError: There is no such conversation, or it has no such message.
            InvalidValueError: `head`, or one to keep, is no message and no id of one.
        """
        conversation = conversation_id_of(db, conversation_id)
        kept = [message_id_of(message, "keep") for message in keep]
        with transaction(db):
            found = locked(db, conversation)
            if not found.is_branched:
                return 0
            return prune(db, found, message_in(db, found, head, "head"), kept)

    @classmethod
    def fork(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        at: Message | UUID | str | int | None = None,
        thread_id: str | None = None,
        **fields: Any,
    ) -> Conversation:
        """Begin a conversation with the history of another one, which it shares: nothing is copied.

        Both go on apart from then on. Locks the conversation whose messages it shares.

        Args:
            db: The session.
            conversation_id: Which one's.
            at: The last message to share, as for `branch`; None is the newest.
            thread_id: The fork's name; None is its id.
            fields: As for `create`, the user by id; by default the values of the other one.

        Returns:
            The fork.

        Raises:
            NotFoundError: There is no such conversation, or it has no such message.
            AlreadyExistsError: The thread_id is taken.
            InvalidReferenceError: No such user or persona in the tenant.
            InvalidValueError: A field breaks its rule.
            ConflictError: The conversation is deleted by somebody else just now.
        """
        source = conversation_id_of(db, conversation_id)
        with transaction(db):
            forked = cls.require(db, source)
            cls._refuse(fields, MANAGED)
            values = {**_taken_over(forked), **fields, "thread_id": thread_id}
            newest = shared(db, forked, at)
            fork = cls._insert(db, values)
            if newest is None:
                return fork
            begin_fork(db, fork.id, newest)
            return cls.require(db, fork.id)

    @staticmethod
    def _refuse(fields: Container[str], names: Iterable[str]) -> None:
        for name in names:
            if name in fields:
                raise InvalidValueError(name, "is set by the repository")


def _taken_over(conversation: Conversation) -> dict[str, Any]:
    """Return what a fork has from the conversation that it begins with."""
    return {
        "title": conversation.title,
        "user_id": conversation.user_id,
        "persona_id": conversation.persona_id,
        "provider_type": conversation.provider_type,
        "provider_config": conversation.provider_config,
        "metadata": conversation.metadata_,
        "scope": conversation.scope,
        "expires_at": conversation.expires_at,
    }
