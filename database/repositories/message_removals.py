"""Messages taken back, hidden and deleted."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import Uuid, any_, bindparam, update
from sqlalchemy.dialects.postgresql import ARRAY

from database.models.message import Message
from database.repositories.bookkeeping import lock, lock_forks, move_head, recount
from database.repositories.branching import newest_of, newest_shown, pop
from database.repositories.forking import clear_conversation
from database.repositories.histories import OF_CONVERSATION
from database.repositories.links import PURGE, unlink, unlink_deactivated
from database.repositories.message_reads import MessageReads
from database.session import tenant_of
from database.types import utcnow
from database.units import one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from database.models.conversation import Conversation

__all__ = ["MessageRemovals"]


class MessageRemovals(MessageReads):
    """What `MessageRepository` takes out of histories."""

    @classmethod
    def pop_last(
        cls, db: Session, conversation_id: UUID | str, *, before: int | None = None
    ) -> Message | None:
        """Take the newest message off the history; no two calls return the same one.

        It is deleted, unless another branch shows it too, or the conversation was ever forked: then
        it becomes a branch, for `ConversationRepository.prune`. Locks the conversation.

        Args:
            db: The session.
            conversation_id: Whose.
            before: Only a message at a position below this one; it is deleted in any case, but not
                from the conversation that a fork shares it with.

        Returns:
            The message, no longer the session's; None if there is none.
        """
        conversation = cls._conversation(db, conversation_id)
        with transaction(db):
            found = lock(db, conversation)
            newest = next(iter(cls.history(db, conversation, limit=1, before=before)), None)
            if found is None or newest is None:
                return None
            if before is None or newest is newest_shown(db, conversation):
                pop(db, found, newest)
            elif newest.conversation_id != conversation or not cls.delete(db, newest.id):
                return None
        db.expunge(newest)
        return newest

    @classmethod
    def clear(cls, db: Session, conversation_id: UUID | str) -> int:
        """Delete all messages of a conversation for good, hidden ones too; return how many.

        What forks show stays, and becomes theirs. The conversation stays, with its metadata;
        positions are not given again.
        """
        return clear_conversation(db, cls._conversation(db, conversation_id))

    @classmethod
    def deactivate(
        cls,
        db: Session,
        conversation_id: UUID | str,
        ids: Sequence[UUID | str] | None = None,
    ) -> int:
        """Hide messages, all of a conversation or the given ones; return how many."""
        return cls._set_active(db, conversation_id, ids, active=False)

    @classmethod
    def restore(
        cls,
        db: Session,
        conversation_id: UUID | str,
        ids: Sequence[UUID | str] | None = None,
    ) -> int:
        """Show deactivated messages again, all or the given ones; return how many."""
        return cls._set_active(db, conversation_id, ids, active=True)

    @classmethod
    def purge(cls, db: Session, conversation_id: UUID | str) -> int:
        """Delete a conversation's deactivated messages for good; return how many."""
        conversation = cls._conversation(db, conversation_id)
        parameters = {"tenant": tenant_of(db), "conversation": conversation}
        with one_write(db) as connection:
            is_linked, purged = connection.execute(PURGE, {**parameters, "linked": False}).one()
        if not is_linked:
            return int(purged)
        with transaction(db):
            lock(db, conversation)
            lock_forks(db, conversation)
            unlink_deactivated(db, conversation)
            _, purged = db.execute(PURGE, {**parameters, "linked": True}).one()
            return int(purged)

    @classmethod
    def delete(cls, db: Session, id: UUID | str, /) -> bool:  # noqa: A002
        """Delete a message for good, counting its conversation anew; tell whether there was one."""
        with transaction(db):
            conversation = cls._lock_around(db, id)
            if conversation is None:
                return False
            changed = {conversation.id}
            if conversation.is_branched or conversation.is_shared:
                changed.update(unlink(db, cls._id(id)))
            deleted = super().delete(db, id)
            for shown_in in sorted(changed):
                recount(db, shown_in)
            return deleted

    @classmethod
    def _lock_around(cls, db: Session, message: UUID | str) -> Conversation | None:
        """Lock the conversation that a message is in, and its forks; return it, if there is one."""
        while found := cls.get(db, message):
            place = found.conversation_id
            conversation = lock(db, place)
            if conversation is None:
                continue
            if conversation.is_shared:
                # While this waited for the lock, a fork may have got the message.
                found = cls.get(db, message)
                if found is None or found.conversation_id != place:
                    continue
                lock_forks(db, place)
            return conversation
        return None

    @classmethod
    def _set_active(
        cls,
        db: Session,
        conversation_id: UUID | str,
        ids: Sequence[UUID | str] | None,
        *,
        active: bool,
    ) -> int:
        conversation = cls._conversation(db, conversation_id)
        statement = (
            update(Message)
            .where(*OF_CONVERSATION, Message.is_active.is_(not active))
            .values(is_active=active, updated_at=utcnow())
            .execution_options(synchronize_session=False, names_tenant=True)
        )
        if ids is not None:
            given = bindparam("ids", [cls._id(id_) for id_ in ids], type_=ARRAY(Uuid()))
            statement = statement.where(Message.id == any_(given))
        with transaction(db):
            found = lock(db, conversation)
            parameters = {"tenant": tenant_of(db), "conversation": conversation}
            changed = db.connection().execute(statement, parameters).rowcount
            if ids is None and found is not None and _is_to_move(found, active=active):
                # What it shares is not its own to hide: it leaves that, and comes back to it.
                move_head(db, conversation, newest_of(db, found) if active else None)
                recount(db, conversation)
            elif changed:
                recount(db, conversation)
            return changed


def _is_to_move(conversation: Conversation, *, active: bool) -> bool:
    """Tell whether to hide or to show all messages moves the head: away from a fork's, and back.

    Back also where the fork has inherited since what it shared.
    """
    if active:
        return conversation.is_branched and conversation.head_id is None
    return conversation.forked_at_id is not None and conversation.head_id is not None
