"""Messages: appended in one statement, revised in branches, hidden, deleted."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Uuid, any_, bindparam, update
from sqlalchemy.dialects.postgresql import ARRAY

from database.errors import InvalidValueError
from database.models.base import uuid7
from database.models.message import Message
from database.repositories.appending import append_all, append_one, extend, known_keys
from database.repositories.bookkeeping import lock, lock_forks, move_head, recount
from database.repositories.branching import (
    branch_at,
    locked,
    message_in,
    newest_of,
    newest_shown,
    pop,
)
from database.repositories.forking import clear_conversation
from database.repositories.histories import OF_CONVERSATION, read_path
from database.repositories.links import PURGE, before, unlink, unlink_deactivated
from database.repositories.message_reads import MessageReads
from database.session import tenant_of
from database.types import utcnow
from database.units import one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

    from database.models.conversation import Conversation
    from database.models.message import Role

__all__ = ["MessageRepository"]

_MANAGED = ("conversation_id", "position", "parent_id", "is_active")


class MessageRepository(MessageReads):
    """The messages of a tenant's conversations.

    `conversation_id` is a UUID, or its text or the conversation's thread_id, which costs one query
    more. Reads leave out deactivated messages, and find nothing in an unknown conversation.
    """

    @classmethod
    def append(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        role: Role | str,
        content: str,
        thinking: str | None = None,
        extra_data: Any = None,
        data: bytes | None = None,
        data_format: str | None = None,
        run_id: str | None = None,
        tool_call_id: str | None = None,
        model: str | None = None,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        idempotency_key: str | None = None,
        id: UUID | None = None,  # noqa: A002
        created_at: datetime | None = None,
        updated_at: datetime | None = None,
    ) -> Message:
        """Append a message and count it in its conversation, in one statement.

        Locks the conversation's row until the transaction ends: concurrent appends wait, and get
        positions without gap or double.

        Args:
            db: The session.
            conversation_id: Where to.
            role: user, assistant, system or tool.
            content: The text; may be empty.
            thinking: What the model thought before it.
            extra_data: Any JSON value.
            data: A framework's own serialised form.
            data_format: What `data` is, for example "pydantic-ai/1".
            run_id: The agent run it belongs to.
            tool_call_id: The tool call it answers.
            model: Which model wrote it.
            input_tokens: What it cost, 0 or more.
            output_tokens: Likewise.
            idempotency_key: Unique in the conversation: a second append with the same key returns
                the first one's message and writes nothing.
            id: For imports.
            created_at: For imports.
            updated_at: For imports: of the message, not of its conversation.

        Returns:
            The message, with its position.

        Raises:
            InvalidReferenceError: There is no such conversation in the tenant.
            InvalidValueError: A field breaks its rule.
            AlreadyExistsError: There is a message with this id.
        """
        given = {
            "role": role,
            "content": content,
            "thinking": thinking,
            "extra_data": extra_data,
            "data": data,
            "data_format": data_format,
            "run_id": run_id,
            "tool_call_id": tool_call_id,
            "model": model,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "idempotency_key": idempotency_key,
            "id": id,
            "created_at": created_at,
            "updated_at": updated_at,
        }
        now = utcnow()
        row = cls._row(db, given, now)
        conversation = cls._conversation(db, conversation_id)
        return append_one(db, conversation, row, now)

    @classmethod
    def append_many(
        cls,
        db: Session,
        conversation_id: UUID | str,
        messages: Iterable[Mapping[str, Any]],
    ) -> builtins.list[Message]:
        """Append messages in order, all or none, at consecutive positions.

        Args:
            db: The session.
            conversation_id: Where to.
            messages: Of each the arguments of `append`, by name. One whose idempotency key the
                conversation has already is not appended again.

        Returns:
            The messages in order; for a known idempotency key, the message that has it.

        Raises:
            As `append`. Nothing is written then.
        """
        now = utcnow()
        rows = [cls._row(db, message, now) for message in messages]
        conversation = cls._conversation(db, conversation_id)
        return append_all(db, conversation, rows, now)

    @classmethod
    def extend(
        cls, db: Session, conversation_id: UUID | str, messages: Iterable[Mapping[str, Any]]
    ) -> None:
        """Append messages as `append_many` does, and return nothing: in less time if many."""
        now = utcnow()
        rows = [cls._row(db, message, now) for message in messages]
        extend(db, cls._conversation(db, conversation_id), rows, now)

    @classmethod
    def edit(
        cls,
        db: Session,
        message_id: UUID | str,
        *,
        content: str,
        conversation_id: UUID | str | None = None,
        **fields: Any,
    ) -> Message:
        """Put a new version of a message in its place: a branch; the old one stays in another.

        The history then ends with the new message. Locks the conversation, as an append does.

        Args:
            db: The session.
            message_id: Which one.
            content: The new text.
            conversation_id: In which conversation, for a message that a fork shares; by default
                the message's own.
            fields: As for `append`. Role and extra_data are the old message's unless given.

        Returns:
            The new message.

        Raises:
            NotFoundError: There is no such message in the conversation.
            InvalidValueError: A field breaks its rule.
        """
        with transaction(db):
            old = cls.require(db, message_id)
            given = {"role": old.role, "extra_data": old.extra_data, **fields, "content": content}
            return cls._branch(db, old, None, conversation_id, given)

    @classmethod
    def regenerate(
        cls,
        db: Session,
        message_id: UUID | str,
        content: str | None = None,
        *,
        conversation_id: UUID | str | None = None,
        **fields: Any,
    ) -> Message:
        """Answer again what a message answers: a branch that goes on from the user's message.

        Locks the conversation, as an append does.

        Args:
            db: The session.
            message_id: A message of the answer, or the user's.
            content: The new answer's text; None is for a caller who appends it later, from what
                the history then is.
            conversation_id: As for `edit`.
            fields: As for `append`. The role is assistant unless given.

        Returns:
            The new answer; without content the user's message, with which the history then ends.

        Raises:
            NotFoundError: There is no such message in the conversation.
            InvalidValueError: It follows no user's message, or a field breaks its rule.
        """
        with transaction(db):
            old = cls.require(db, message_id)
            question = next(iter(read_path(db, old.id, {"limit": 1, "asked": True})), None)
            if question is None:
                raise InvalidValueError("message_id", "must follow a user's message")
            if content is None:
                if fields:
                    raise InvalidValueError(next(iter(fields)), "must not be given without content")
                branch_at(db, cls._place(db, old, conversation_id), question)
                return question
            given = {"role": "assistant", **fields, "content": content}
            return cls._branch(db, old, question.id, conversation_id, given)

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
    def create(cls, db: Session, *args: Any, **fields: Any) -> Message:
        """Append a message: `append` with `conversation_id` by name."""
        conversation_id = fields.pop("conversation_id", None)
        if args or conversation_id is None:
            raise InvalidValueError("conversation_id", "must be given by name")
        return cls.append_many(db, conversation_id, [fields])[0]

    @classmethod
    def create_many(cls, db: Session, items: Iterable[Mapping[str, Any]]) -> builtins.list[Message]:
        """Append messages to the conversations that they name, all or none."""
        with transaction(db):
            return [cls.create(db, **item) for item in items]

    @classmethod
    def update(cls, db: Session, id: UUID | str, /, *args: Any, **fields: Any) -> Message:  # noqa: A002
        """Change fields of a message in place; its conversation's preview follows.

        Raises:
            NotFoundError: There is no such message in the tenant.
            InvalidValueError: A field breaks its rule, or is not the caller's to set: position,
                conversation_id, is_active (`deactivate`, `restore`).
        """
        cls._refuse_managed(fields, *_MANAGED, "updated_at")
        if "content" not in fields:
            return super().update(db, id, *args, **fields)
        with transaction(db):
            # The conversation first, as everybody locks it: else two could wait for each other.
            lock(db, cls.require(db, id).conversation_id)
            message = super().update(db, id, *args, **fields)
            recount(db, message.conversation_id)
            return message

    @classmethod
    def delete(cls, db: Session, id: UUID | str, /) -> bool:  # noqa: A002
        """Delete a message for good, counting its conversation anew; tell whether there was one."""
        with transaction(db):
            message = cls.get(db, id)
            conversation: Conversation | None = None
            while message is not None:
                conversation = lock(db, message.conversation_id)
                if conversation is not None and not conversation.is_shared:
                    break
                # While this waited for the lock, a fork may have got the message.
                message = cls.get(db, id)
                if conversation and message and message.conversation_id == conversation.id:
                    break
            if message is None or conversation is None:
                return False
            changed = {conversation.id}
            if conversation.is_shared:
                lock_forks(db, conversation.id)
            if conversation.is_branched or conversation.is_shared:
                changed.update(unlink(db, message.id))
            deleted = super().delete(db, id)
            for shown_in in sorted(changed):
                recount(db, shown_in)
            return deleted

    @classmethod
    def _branch(
        cls,
        db: Session,
        old: Message,
        follows: UUID | None,
        conversation_id: UUID | str | None,
        given: Mapping[str, Any],
    ) -> Message:
        """Append what follows a message; None is the one that the old message follows."""
        conversation = cls._place(db, old, conversation_id)
        message_in(db, locked(db, conversation), old, "message_id")
        key = given.get("idempotency_key")
        if key is not None and (known := known_keys(db, conversation, [key])):
            return known[key]
        move_head(db, conversation, follows or before(db, old.id))
        recount(db, conversation, forks=False)
        return cls.append_many(db, conversation, [given])[0]

    @classmethod
    def _place(cls, db: Session, message: Message, conversation_id: UUID | str | None) -> UUID:
        if conversation_id is None:
            return message.conversation_id
        return cls._conversation(db, conversation_id)

    @classmethod
    def _row(cls, db: Session, given: Mapping[str, Any], now: datetime) -> dict[str, Any]:
        cls._refuse_managed(given, *_MANAGED)
        for required in ("role", "content"):
            if given.get(required) is None:
                raise InvalidValueError(required, "must be given")
        row = cls._check(db, {k: v for k, v in given.items() if v is not None}, partial=True)
        row.setdefault("id", uuid7())
        row.setdefault("created_at", now)
        return row

    @staticmethod
    def _refuse_managed(fields: Mapping[str, Any], *names: str) -> None:
        for name in names:
            if name in fields:
                raise InvalidValueError(name, "is set by the repository")

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
