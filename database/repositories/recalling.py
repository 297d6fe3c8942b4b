"""Recalling memories: the nearest and the best fitting ones, weighed by recency and importance.

The score is that of the memory stream in Park et al., "Generative Agents" (2023): a weighted sum of
relevance, recency, which halves with time since the last access, and importance. Vectors and texts
are joined by reciprocal rank fusion (Cormack et al., 2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Double, Integer, TextClause, bindparam, text

from database.errors import InvalidValueError
from database.models.memory import Memory
from database.repositories.loading import Shape, loaded, shape_of
from database.repositories.queries import Query, parse_query
from database.session import tenant_of
from database.types import Timestamp, utcnow
from database.units import one_read, one_write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.orm import Session


__all__ = [
    "FEW",
    "RecallParts",
    "Recalled",
    "Weighing",
    "check_similarity",
    "parse_text",
    "recall",
    "weighing_of",
]

FEW = 2_000
"""Up to so many memories that fulfil the filters are scanned exactly, without the vector index."""

_CANDIDATES = 100
_PER_RESULT = 4
_FUSION = 60.0  # the constant k of reciprocal rank fusion


@dataclass(frozen=True, slots=True)
class RecallParts:
    """What a score is made of.

    Attributes:
        relevance: In [0, 1]: of vectors the similarity, of texts the rank beside the best one's, of
            both their fused rank beside the best possible one.
        recency: In (0, 1]: 0.5 to the power of the half-lives since the last access.
        importance: In [0, 1], the memory's own.
        similarity: The cosine of the angle between the embeddings; None if it was not compared.
        text_rank: By ts_rank; None if the text does not match.
    """

    relevance: float
    recency: float
    importance: float
    similarity: float | None
    text_rank: float | None


@dataclass(frozen=True, slots=True)
class Recalled:
    """A memory that was recalled, its score, and the parts of it."""

    memory: Memory
    score: float
    parts: RecallParts


@dataclass(frozen=True, slots=True)
class Weighing:
    """How candidates are weighed.

    Attributes:
        similarity: The weight of the relevance.
        recency: Of the recency.
        importance: Of the importance.
        half_life: In what time the recency halves.
    """

    similarity: float
    recency: float
    importance: float
    half_life: timedelta

    def __post_init__(self) -> None:
        weights = (self.similarity, self.recency, self.importance)
        if not all(map(_is_weight, weights)) or not any(weights):
            rule = "must be three numbers, 0 or from 1e-9 to 1e9, not all of them 0"
            raise InvalidValueError("weights", rule)
        if not isinstance(self.half_life, timedelta) or self.half_life <= timedelta():
            raise InvalidValueError("half_life", "must be a positive timedelta")


_SHAPE: Shape[Memory] = shape_of(Memory)
_COLUMNS = ", ".join(f"m.{column.name}" for column in _SHAPE.select.selected_columns)
_FOUND = """
    SELECT * FROM recall_memories(
        :tenant, CAST(:user AS uuid), CAST(:conversation AS uuid), CAST(:persona AS uuid), :type,
        CAST(:embedding AS {kind}), :words, :pattern, :candidates, :few)
    WHERE CAST(:least AS double precision) IS NULL OR 1 - distance >= :least"""
# Nothing to compare with: the last accessed ones.
_LATEST = """
    SELECT id, CAST(NULL AS double precision) AS distance, CAST(NULL AS real) AS rank
    FROM conversation_memory WHERE tenant_id = :tenant
        AND (CAST(:user AS uuid) IS NULL OR user_id = :user)
        AND (CAST(:conversation AS uuid) IS NULL OR conversation_id = :conversation)
        AND (CAST(:persona AS uuid) IS NULL OR persona_id = :persona)
        AND (CAST(:type AS text) IS NULL OR memory_type = :type)
    ORDER BY last_accessed_at DESC, id DESC LIMIT :candidates"""
_RECIPROCAL = (
    f"coalesce(1 / ({_FUSION} + CASE WHEN {{value}} IS NOT NULL"
    " THEN rank() OVER (ORDER BY {value} {order} NULLS LAST) END), 0)"
)
_RELEVANCE = {
    (True, False): "greatest(1 - distance, 0)",
    (False, True): "rank / nullif(max(rank) OVER (), 0)",
    (True, True): f"({_RECIPROCAL.format(value='distance', order='ASC')}"
    f" + {_RECIPROCAL.format(value='rank', order='DESC')}) * {(_FUSION + 1) / 2}",
    (False, False): "0",
}
_TIES = "similarity DESC NULLS LAST, {row}.last_accessed_at DESC, {row}.id DESC"
_SCORED = f"""
WITH found AS MATERIALIZED ({{found}}
), relevant AS (
    SELECT id, distance, rank, CAST(coalesce({{relevance}}, 0) AS double precision)
        AS relevance
    FROM found
), scored AS MATERIALIZED (
    SELECT {_COLUMNS}, 1 - relevant.distance AS similarity, relevant.rank AS text_rank, relevance,
        recency, :of_relevance * relevance + :of_recency * recency
            + CASE WHEN m.importance > 1e-100 THEN :of_importance * m.importance ELSE 0 END AS score
    FROM relevant JOIN conversation_memory m ON m.tenant_id = :tenant AND m.id = relevant.id,
    LATERAL (SELECT power(0.5, least(300, greatest(
        0, extract(epoch FROM :now - m.last_accessed_at) / :half_life))) AS recency) decayed
    ORDER BY score DESC, {_TIES.format(row="m")} LIMIT :limit
)"""
_READ = f"""
SELECT scored.*, access_count, last_accessed_at
FROM scored ORDER BY score DESC, {_TIES.format(row="scored")}"""
# Locked in the order of their ids: else two calls that recall the same could wait for each other.
_TOUCH = f""", locked AS MATERIALIZED (
    SELECT m.id FROM conversation_memory m
    WHERE m.tenant_id = :tenant AND m.id IN (SELECT id FROM scored)
    ORDER BY m.id FOR NO KEY UPDATE
), touched AS (
    UPDATE conversation_memory m
    SET access_count = least(m.access_count, 2147483646) + 1,
        last_accessed_at = greatest(m.last_accessed_at, :now)
    FROM locked WHERE m.tenant_id = :tenant AND m.id = locked.id
    RETURNING m.id, m.access_count, m.last_accessed_at
)
SELECT scored.*, touched.access_count, touched.last_accessed_at
FROM scored JOIN touched ON touched.id = scored.id
ORDER BY score DESC, {_TIES.format(row="scored")}"""


def parse_text(text: object) -> Query:
    """Return what texts must hold; errors name the argument of `MemoryRepository.recall`."""
    try:
        return parse_query(text, "text")
    except InvalidValueError as error:
        raise InvalidValueError("text", error.rule) from None


def weighing_of(weights: object, half_life: timedelta) -> Weighing:
    """Return how candidates are weighed, checked."""
    if not isinstance(weights, tuple | list) or len(weights) != 3:  # noqa: PLR2004
        raise InvalidValueError("weights", "must be three: similarity, recency, importance")
    similarity, recency, importance = weights
    return Weighing(similarity, recency, importance, half_life)


def check_similarity(value: object, embedding: object) -> float | None:
    """Return the lowest similarity, checked."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
        raise InvalidValueError("min_similarity", "must be a number from -1 to 1")
    if embedding is None:
        raise InvalidValueError("min_similarity", "needs an embedding to compare with")
    return float(value)


@cache
def _statement(kind: str, has_vector: bool, has_text: bool, touch: bool) -> TextClause:  # noqa: FBT001
    found = _FOUND.format(kind=kind) if has_vector or has_text else _LATEST
    relevance = _RELEVANCE[has_vector, has_text]
    scored = _SCORED.format(found=found, relevance=relevance)
    numbers = ("of_relevance", "of_recency", "of_importance", "half_life", "least")
    return text(scored + (_TOUCH if touch else _READ)).bindparams(
        bindparam("now", type_=Timestamp()),
        *(bindparam(name, type_=Double()) for name in numbers if f":{name}" in scored),
        *(bindparam(name, type_=Integer()) for name in ("candidates", "limit")),
    )


def recall(
    db: Session,
    *,
    embedding: str | None,
    kind: str,
    query: Query,
    filters: Mapping[str, Any],
    least: float | None,
    weighing: Weighing,
    limit: int,
    touch: bool,
) -> list[Recalled]:
    """Return the memories with the highest scores, as `MemoryRepository.recall` says.

    Args:
        db: The session.
        embedding: pgvector's text of a vector, or None.
        kind: The type of the column, vector or halfvec.
        query: What texts must hold; may be empty.
        filters: user, conversation, persona, type; None is any.
        least: The lowest similarity.
        weighing: How to weigh.
        limit: How many at most.
        touch: Whether to note the access.
    """
    parameters = {
        **filters,
        "tenant": tenant_of(db),
        "embedding": embedding,
        "words": query.words,
        "pattern": query.pattern,
        "candidates": max(_CANDIDATES, _PER_RESULT * limit),
        "few": FEW,
        "least": least,
        "of_relevance": float(weighing.similarity),
        "of_recency": float(weighing.recency),
        "of_importance": float(weighing.importance),
        "half_life": weighing.half_life.total_seconds(),
        "now": utcnow(),
        "limit": limit,
    }
    statement = _statement(kind, embedding is not None, not query.is_empty, touch)
    with (one_write if touch else one_read)(db) as connection:
        result = connection.execute(statement, parameters)
        assert result.cursor is not None
        rows = result.cursor.fetchall()
        result.close()
    return _recalled(db, rows)


def _recalled(db: Session, rows: Sequence[Any]) -> list[Recalled]:
    width = len(_SHAPE.names)
    memories = loaded(
        db,
        _SHAPE,
        (*_SHAPE.names, "access_count", "last_accessed_at"),
        [(*row[:width], *row[-2:]) for row in rows],
        {"tenant_id": tenant_of(db)},
    )
    found = []
    for memory, row in zip(memories, rows, strict=True):
        similarity, text_rank, relevance, recency, score = row[width:-2]
        parts = RecallParts(relevance, recency, memory.importance, similarity, text_rank)
        found.append(Recalled(memory, score, parts))
    return found


def _is_weight(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # PostgreSQL refuses products that would round to zero or to infinity.
    return value == 0 or 1e-9 <= value <= 1e9  # noqa: PLR2004
