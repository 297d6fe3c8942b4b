"""Memories' embeddings: what is taken, stored and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sqlalchemy import inspect

import database
from database import (
    ConfigurationError,
    InvalidValueError,
    SessionLocal,
    TenantSession,
)
from database import MemoryRepository as Memories
from database.repositories import recalling
from tests.factories import ConversationFactory, MemoryFactory
from tests.test_conformance import idle
from tests.vectors import database_for, embedding_of, seen

pytestmark = pytest.mark.usefixtures("short_vectors")


@pytest.fixture
def chat(db: TenantSession) -> Any:
    return ConversationFactory(db=db).id


@pytest.mark.parametrize(
    "embedding",
    [
        [0.5, -2, 0],
        (0.5, -2.0, 0),
        *(np.array([0.5, -2, 0], kind) for kind in ("float16", "float32", "float64")),
        list(np.array([0.5, -2, 0], "float32")),
        np.array([[0.5, -2, 0]] * 2).T[:, 0],
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_an_embedding(db: TenantSession, chat: Any, embedding: Any) -> None:
    made = Memories.add(db, chat, content="a", embedding=embedding)
    assert embedding_of(db, made.id) == [0.5, -2, 0]
    for memory in (made, *seen(db)):
        assert "embedding" in inspect(memory).unloaded
    other = Memories.add(db, chat, content="b")
    Memories.update(db, other.id, embedding=embedding)
    assert embedding_of(db, other.id) == [0.5, -2, 0]
    (again,) = Memories.recall(db, embedding=embedding, limit=1)
    assert again.parts.similarity == pytest.approx(1)


def test_a_changed_embedding_is_seen(db: TenantSession, chat: Any) -> None:
    made = Memories.add(db, chat, content="a", embedding=[1, 0, 0])
    assert made.embedding == [1, 0, 0]
    db.rollback()
    assert Memories.update(db, made.id, embedding=[0, 1, 0]).embedding == [0, 1, 0]
    db.rollback()
    assert Memories.update(db, made.id, embedding=None).embedding is None


BAD_EMBEDDINGS: list[Any] = [
    *([], [1, 2], [1] * 4, [1, 2, None], [1, 2, "3"], [1, 2, True], [1, 2, 3j], "123", b"123", 5),
    *([1, 2, float("nan")], [1, 2, float("inf")], [1, 2, -float("inf")], [1, 2, 10**400]),
    *([0, 0, 0], [0.0, -0.0, 0], [1e-50, 0, 0], [1e-30, 0, 0], [1e30, 0, 0], [1e39, 0, 0]),
    *([[1, 2, 3]], [[1], [2], [3]], {1, 2, 3}, {"a": 1}, object()),
    *(np.eye(3), np.array(1.0), np.array([1, np.nan, 0]), np.array(["a", "b", "c"])),
    np.array([True, False, True]),
]


@pytest.mark.parametrize("embedding", BAD_EMBEDDINGS, ids=lambda value: str(value)[:20])
def test_no_embedding(db: TenantSession, chat: Any, embedding: Any) -> None:
    made = Memories.add(db, chat, content="a", embedding=[1, 0, 0])
    for call in (
        lambda: Memories.add(db, chat, content="b", embedding=embedding),
        lambda: Memories.add_many(
            db, chat, [*[{"content": "a"}] * 2, {"content": "b", "embedding": embedding}]
        ),
        lambda: Memories.update(db, made.id, embedding=embedding),
        lambda: Memories.recall(db, embedding=embedding),
    ):
        with pytest.raises(InvalidValueError) as caught:
            call()
        assert caught.value.field == "embedding"
        assert idle(db)
    assert len(seen(db)) == 1
    assert embedding_of(db, made.id) == [1, 0, 0]


@pytest.mark.parametrize("length", [1e-15, 1e15])
def test_extreme_lengths_have_a_direction(db: TenantSession, chat: Any, length: float) -> None:
    Memories.add(db, chat, content="a", embedding=[length, 0, 0])
    (found,) = Memories.recall(db, embedding=[length, length, 0])
    assert found.parts.similarity == pytest.approx(0.5**0.5, abs=1e-3)


def test_a_database_of_other_dimensions(small_url: str, tenant: str) -> None:
    database.configure(url=small_url, embedding_dimensions=4)
    with SessionLocal(tenant_id=tenant) as db:
        memory = MemoryFactory(db=db)
        for call in (
            lambda: Memories.add(db, memory.conversation_id, content="a", embedding=[1] * 4),
            lambda: Memories.update(db, memory.id, embedding=[1] * 4),
            lambda: Memories.recall(db, embedding=[1] * 4),
            lambda: Memories.recall(db, text="a"),
        ):
            with pytest.raises(ConfigurationError, match=r"DIMENSIONS is 4\b.* with 3$"):
                call()
            assert idle(db)
        assert len(seen(db)) == 1


def test_half_precision(server: str, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with database_for(server, 2001) as url:
        database.configure(url=url, embedding_dimensions=2001)
        with SessionLocal(tenant_id=tenant) as db:
            memory = MemoryFactory(db=db, embedding=np.eye(2001)[7])
            Memories.add(db, memory.conversation_id, content="tea", embedding=[0.25] * 2001)
            other = MemoryFactory(db=db, content="b")
            Memories.update(db, other.id, embedding=[-65504.0, 1e-7] + [0] * 1999)
            assert embedding_of(db, other.id) == pytest.approx([-65504, 2**-23, *[0] * 1999])
            (found, *_) = Memories.recall(db, embedding=[1.0] * 2001, text="tea", limit=1)
            assert found.memory.content == "tea"
            assert found.parts.similarity == pytest.approx(1, abs=1e-3)
            for few in (recalling.FEW, 0):
                monkeypatch.setattr(recalling, "FEW", few)
                assert len(Memories.recall(db, embedding=[1.0] * 2001)) == 3
                assert len(Memories.recall(db, embedding=[1.0] * 2001, limit=1)) == 1
            for bad in ([65505] + [0] * 2000, [1e-8] * 2001, [1] * 2000):
                with pytest.raises(InvalidValueError, match=r"^embedding: "):
                    Memories.update(db, other.id, embedding=bad)
        database.close_db()
