"""Memories."""

from __future__ import annotations

from database.models.memory import Memory
from database.repositories.base import Repository

__all__ = ["MemoryRepository"]


class MemoryRepository(Repository[Memory]):
    """Memories of a tenant."""

    model = Memory
