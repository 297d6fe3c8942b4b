"""Messages: appended in one statement, revised in branches."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any
from uuid import UUID

from database.errors import InvalidValueError
from database.models.base import uuid7
from database.repositories.appending import append_all, append_one, extend, known_keys
from database.repositories.bookkeeping import move_head, recount
from database.repositories.branching import branch_at, locked, message_in
from database.repositories.histories import read_path
from database.repositories.links import before
from database.repositories.message_removals import MessageRemovals
from database.repositories.trees import append_tree
from database.types import utcnow
from database.units import transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

    from database.models.message import Message, Role

__all__ = ["MessageRepository"]

_MANAGED = ("conversation_id", "position", "parent_id", "is_active")


class MessageRepository(MessageRemovals):
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
    def append_tree(
        cls,
        db: Session,
        conversation_id: UUID | str,
        messages: Iterable[Mapping[str, Any]],
        *,
        follows: Sequence[int | None],
    ) -> builtins.list[Message]:
        """Append messages of several branches, all or none; the history ends with the last one.

        However many branches there are, it takes a few statements.

        Args:
            db: The session.
            conversation_id: Where to.
            messages: As for `append_many`, without idempotency keys.
            follows: Of each message the number of the one that it follows, counted from 0: an
                earlier one, or None for what the history has ended with so far.

        Returns:
            The messages in order.

        Raises:
            As `append`. Nothing is written then.
        """
        now = utcnow()
        rows = [cls._row(db, message, now) for message in messages]
        return append_tree(db, cls._conversation(db, conversation_id), rows, follows, now)

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
            cls._lock_around(db, id)
            message = super().update(db, id, *args, **fields)
            recount(db, message.conversation_id)
            return message

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
