"""Memories: what is kept of conversations, recalled by meaning and words."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from database.errors import InvalidValueError, NotFoundError
from database.models.memory import Memory
from database.repositories import compressing, forgetting
from database.repositories.base import MAX_PAGE, Repository
from database.repositories.embeddings import check_dimensions, column_type, vector_text
from database.repositories.loading import read, shape_of
from database.repositories.queries import Query
from database.repositories.recalling import (
    Recalled,
    check_similarity,
    parse_text,
    recall,
    weighing_of,
)
from database.repositories.remembering import add_all
from database.repositories.threads import conversation_id_of
from database.session import tenant_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from database.models.message import Message
    from database.repositories.compressing import MemoryStatus

__all__ = ["MemoryRepository"]

T = TypeVar("T")

_HALF_LIFE = timedelta(hours=138)
"""A recency of 0.995 an hour, as in Park et al."""


class MemoryRepository(Repository[Memory]):
    """The memories of a tenant's conversations.

    A conversation is given by its id or, at the cost of a query more, by its thread_id.
    """

    model = Memory

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
        rows = [cls._row(db, item) for item in _each("items", items)]
        with_sequence = sum(row.get("sequence") is not None for row in rows)
        if with_sequence not in (0, len(rows)):
            raise InvalidValueError("sequence", "must be given for all memories or for none")
        conversation = conversation_id_of(db, conversation_id)
        if any(row.get("embedding") is not None for row in rows):
            check_dimensions(db)
        return add_all(db, conversation, rows, column_type(db))

    @classmethod
    def recall(
        cls,
        db: Session,
        *,
        embedding: Any = None,
        text: str | None = None,
        user_id: UUID | str | None = None,
        conversation_id: UUID | str | None = None,
        persona_id: UUID | str | None = None,
        memory_type: str | None = None,
        limit: int = 10,
        min_similarity: float | None = None,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        half_life: timedelta = _HALF_LIFE,
        touch: bool = True,
    ) -> builtins.list[Recalled]:
        """Return the memories that matter most now, the highest score first.

        The nearest to the embedding and those that fit the text best are the candidates, 100 or
        four times `limit` of each; with neither, the last accessed ones. Of the candidates

            score = weights[0] * relevance + weights[1] * recency + weights[2] * importance

        (Park et al., "Generative Agents", 2023). Up to 2,000 memories that fulfil the filters are
        compared exactly, more by the HNSW index; when that finds too few, exactly too. So no fewer
        than `limit` are returned while there are more with an embedding.

        Args:
            db: The session.
            embedding: As for `add`; distances are by cosine.
            text: What the memory shall be about, as for `ContextRepository.search`.
            user_id: Only memories about this user.
            conversation_id: Only of this conversation.
            persona_id: Only of this persona.
            memory_type: Only of this type.
            limit: How many at most, 1 to 1,000.
            min_similarity: The lowest cosine similarity, in [-1, 1]; needs an embedding.
            weights: Of relevance, recency and importance.
            half_life: In what time since the last access the recency halves.
            touch: Whether to count the access of those returned, in the same statement; locks them.

        Raises:
            InvalidValueError: An argument is not valid.
            ConfigurationError: The database was migrated with other dimensions.
        """
        from database.rules import check_number

        weighing = weighing_of(weights, half_life)
        limit = check_number("limit", limit, 1, MAX_PAGE)
        least = check_similarity(min_similarity, embedding)
        query = Query() if text is None else parse_text(text)
        given = {"user_id": user_id, "persona_id": persona_id, "memory_type": memory_type}
        checked = cls._filters(db, given)
        conversation = None if conversation_id is None else conversation_id_of(db, conversation_id)
        vector = (
            None
            if embedding is None
            else cls._check(db, {"embedding": embedding}, partial=True)["embedding"]
        )
        if vector is None and text is not None and query.is_empty:
            return []
        check_dimensions(db)
        return recall(
            db,
            embedding=None if vector is None else vector_text(db, vector),
            kind=column_type(db),
            query=query,
            filters={
                "user": checked.get("user_id"),
                "conversation": conversation,
                "persona": checked.get("persona_id"),
                "type": checked.get("memory_type"),
            },
            least=least,
            weighing=weighing,
            limit=limit,
            touch=touch,
        )

    @classmethod
    def recent(
        cls, db: Session, conversation_id: UUID | str, limit: int = 5
    ) -> builtins.list[Memory]:
        """Return the newest memories of a conversation, the newest first."""
        from database.rules import check_number

        conversation = conversation_id_of(db, conversation_id)
        parameters = {
            "tenant": tenant_of(db),
            "conversation": conversation,
            "limit": check_number("limit", limit, 1, MAX_PAGE),
        }
        return read(db, shape_of(Memory), compressing.RECENT, parameters)

    @classmethod
    def covers(
        cls, db: Session, conversation_id: UUID | str, message_ids: Sequence[UUID | str]
    ) -> builtins.set[UUID]:
        """Return those of the messages that a memory of the conversation was made of already."""
        ids = [cls._id(id_, "message_ids") for id_ in _each("message_ids", message_ids)]
        return compressing.covered(db, conversation_id_of(db, conversation_id), ids)

    @classmethod
    def window(
        cls, db: Session, conversation_id: UUID | str, start: int = 25, end: int = 35
    ) -> builtins.list[Message]:
        """Return the messages from the `start`-th to the `end`-th newest, oldest first.

        What a compressor takes: the newest 24 stay as they are, the 11 before become a memory.
        """
        return compressing.window(db, conversation_id_of(db, conversation_id), start, end)

    @classmethod
    def next_sequence(cls, db: Session, conversation_id: UUID | str) -> int:
        """Return the number that the next memory of a conversation gets, if none comes before.

        Raises:
            NotFoundError: There is no such conversation in the tenant.
        """
        return cls.status(db, conversation_id).next_sequence

    @classmethod
    def status(cls, db: Session, conversation_id: UUID | str) -> MemoryStatus:
        """Return how much of a conversation is in memories.

        Raises:
            NotFoundError: There is no such conversation in the tenant.
        """
        found = compressing.status(db, conversation_id_of(db, conversation_id))
        if found is None:
            raise NotFoundError("Conversation: no such row in this tenant")
        return found

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
        from database.units import transaction

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
    def _check(
        cls, db: Session, fields: Mapping[str, Any], *, partial: bool = False
    ) -> dict[str, Any]:
        checked = super()._check(db, fields, partial=partial)
        if checked.get("embedding") is not None:
            vector_text(db, checked["embedding"])
        return checked

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


def _each(field: str, values: Iterable[T]) -> Iterator[T]:
    try:
        return iter(values)
    except TypeError:
        raise InvalidValueError(field, "must be a sequence") from None
