"""Memories: what is kept of conversations, added, faded and deleted."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from database.errors import InvalidValueError
from database.repositories import forgetting
from database.repositories.embeddings import check_dimensions, column_type, vector_text
from database.repositories.memory_reads import MemoryReads, each
from database.repositories.remembering import add_all
from database.repositories.threads import conversation_id_of
from database.units import transaction

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from database.models.memory import Memory

__all__ = ["MemoryRepository"]


class MemoryRepository(MemoryReads):
    """The memories of a tenant's conversations.

    A conversation is given by its id or, at the cost of a query more, by its thread_id.
    """

    @classmethod
    def add(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        content: str,
        embedding: Any = None,
        importance: float = 0.5,
        memory_type: str | None = None,
        user_id: UUID | str | None = None,
        persona_id: UUID | str | None = None,
        metadata: dict[str, Any] | None = None,
        first_message_id: UUID | str | None = None,
        first_position: int | None = None,
        last_position: int | None = None,
        message_count: int | None = None,
        **fields: Any,
    ) -> Memory:
        """Add a memory to a conversation in one statement, numbered without gap or double.

        Locks the conversation's row until the transaction ends.

        Args:
            db: The session.
            conversation_id: Of which conversation.
            content: What is remembered.
            embedding: A list of numbers or a NumPy array, of DATABASE_EMBEDDING_DIMENSIONS; None if
                it shall not be found by meaning.
            importance: In [0, 1].
            memory_type: At most 64 characters.
            user_id: About whom.
            persona_id: Whose memory it is.
            metadata: What else is known about it.
            first_message_id: The first message that it was made of.
            first_position: The position of that one.
            last_position: That of the last one.
            message_count: How many there were.
            fields: For imports: id, sequence, created_at, last_accessed_at, access_count.

        Raises:
            InvalidReferenceError: A row referred to does not exist in the tenant.
            InvalidValueError: A field breaks its rule.
            AlreadyExistsError: The id or the sequence is taken.
            ConfigurationError: The database was migrated with other dimensions.
        """
        given = {
            "content": content,
            "embedding": embedding,
            "importance": importance,
            "memory_type": memory_type,
            "user_id": user_id,
            "persona_id": persona_id,
            "metadata": {} if metadata is None else metadata,
            "first_message_id": first_message_id,
            "first_position": first_position,
            "last_position": last_position,
            "message_count": message_count,
            **fields,
        }
        return cls.add_many(db, conversation_id, [given])[0]

    @classmethod
    def add_many(
        cls, db: Session, conversation_id: UUID | str, items: Iterable[Mapping[str, Any]]
    ) -> builtins.list[Memory]:
        """Add memories in order, all or none; of each the arguments of `add`, by name."""
        rows = [cls._row(db, item) for item in each("items", items)]
        with_sequence = sum(row.get("sequence") is not None for row in rows)
        if with_sequence not in (0, len(rows)):
            raise InvalidValueError("sequence", "must be given for all memories or for none")
        conversation = conversation_id_of(db, conversation_id)
        if any(row.get("embedding") is not None for row in rows):
            check_dimensions(db)
        return add_all(db, conversation, rows, column_type(db))

    @classmethod
    def clear(cls, db: Session, conversation_id: UUID | str) -> int:
        """Delete all memories of a conversation, whose numbers begin again; return how many."""
        return forgetting.clear(db, conversation_id_of(db, conversation_id))

    @classmethod
    def decay(
        cls,
        db: Session,
        older_than: timedelta,
        factor: float,
        *,
        user_id: UUID | str | None = None,
        conversation_id: UUID | str | None = None,
        batch_size: int = 1000,
    ) -> int:
        """Multiply the importance of memories that were not accessed for a while.

        Works in batches as `forget` does; each memory decays once a call.

        Args:
            db: The session.
            older_than: For how long.
            factor: In [0, 1].
            user_id: Only memories about this user.
            conversation_id: Only of this conversation.
            batch_size: How many memories one statement changes, 1 to 100,000.

        Returns:
            How many decayed.
        """
        scope = cls._scope(db, user_id, conversation_id)
        return forgetting.decay(db, older_than, factor, scope, batch_size)

    @classmethod
    def forget(
        cls,
        db: Session,
        below: float,
        *,
        user_id: UUID | str | None = None,
        conversation_id: UUID | str | None = None,
        batch_size: int = 1000,
        dry_run: bool = False,
    ) -> int:
        """Delete the memories of an importance below a limit; return how many.

        Works in batches, passes over rows that others have locked, and outside a unit commits each
        batch.

        Args:
            db: The session.
            below: In [0, 1].
            user_id: Only memories about this user.
            conversation_id: Only of this conversation.
            batch_size: How many memories one statement deletes, 1 to 100,000.
            dry_run: Only count them.
        """
        scope = cls._scope(db, user_id, conversation_id)
        return forgetting.forget(db, below, scope, batch_size, dry_run=dry_run)

    @classmethod
    def create(cls, db: Session, *args: Any, **fields: Any) -> Memory:
        """Add a memory: `add` with `conversation_id` by name."""
        conversation_id = fields.pop("conversation_id", None)
        if args or conversation_id is None:
            raise InvalidValueError("conversation_id", "must be given by name")
        return cls.add_many(db, conversation_id, [fields])[0]

    @classmethod
    def create_many(cls, db: Session, items: Iterable[Mapping[str, Any]]) -> builtins.list[Memory]:
        """Add memories to the conversations that they name, all or none."""
        with transaction(db):
            return [cls.create(db, **item) for item in items]

    @classmethod
    def update(cls, db: Session, id: UUID | str, /, *args: Any, **fields: Any) -> Memory:  # noqa: A002
        """Change fields of a memory and return it; `sequence` and `conversation_id` stay.

        Raises:
            NotFoundError: There is no such memory in the tenant.
            InvalidValueError, InvalidReferenceError, ConfigurationError: As for `add`.
        """
        for name in ("sequence", "conversation_id"):
            if name in fields:
                raise InvalidValueError(name, "is set by the repository")
        if fields.get("embedding") is not None:
            check_dimensions(db)
        return super().update(db, id, *args, **fields)

    @classmethod
    def _row(cls, db: Session, given: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            raise InvalidValueError("items", "must be mappings")
        for name in ("conversation_id", "updated_at"):
            if name in given:
                raise InvalidValueError(name, "is set by the repository")
        if "content" not in given:
            raise InvalidValueError("content", "must be given")
        row = cls._check(db, given, partial=True)
        if row.get("embedding") is not None:
            row["embedding"] = vector_text(db, row["embedding"])
        return row

    @classmethod
    def _scope(
        cls, db: Session, user_id: UUID | str | None, conversation_id: UUID | str | None
    ) -> dict[str, UUID]:
        scope = {}
        if user_id is not None:
            scope["user_id"] = cls._id(user_id, "user_id")
        if conversation_id is not None:
            scope["conversation_id"] = conversation_id_of(db, conversation_id)
        return scope
