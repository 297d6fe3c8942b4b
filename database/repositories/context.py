"""Contexts."""

from __future__ import annotations

from database.models.context import Context
from database.repositories.base import Repository

__all__ = ["ContextRepository"]


class ContextRepository(Repository[Context]):
    """Contexts of a tenant."""

    model = Context
