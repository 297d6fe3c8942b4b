"""Memories found: by meaning and words, by their age, and by the messages that they are made of."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from database.errors import InvalidValueError, NotFoundError
from database.models.memory import Memory
from database.repositories import compressing
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
from database.repositories.threads import conversation_id_of
from database.session import tenant_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from database.models.message import Message
    from database.repositories.compressing import MemoryStatus

__all__ = ["MemoryReads", "each"]

T = TypeVar("T")

_HALF_LIFE = timedelta(hours=138)
"""A recency of 0.995 an hour, as in Park et al."""


class MemoryReads(Repository[Memory]):
    """What `MemoryRepository` reads."""

    model = Memory

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
        ids = [cls._id(id_, "message_ids") for id_ in each("message_ids", message_ids)]
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
    def _check(
        cls, db: Session, fields: Mapping[str, Any], *, partial: bool = False
    ) -> dict[str, Any]:
        checked = super()._check(db, fields, partial=partial)
        if checked.get("embedding") is not None:
            vector_text(db, checked["embedding"])
        return checked


def each(field: str, values: Iterable[T]) -> Iterator[T]:
    """Return an iterator over an argument, checked to be a sequence."""
    try:
        return iter(values)
    except TypeError:
        raise InvalidValueError(field, "must be a sequence") from None
