"""Modules."""

from __future__ import annotations

from database.models.module import Module
from database.repositories.base import Repository

__all__ = ["ModuleRepository"]


class ModuleRepository(Repository[Module]):
    """Modules of a tenant."""

    model = Module
    order = "created_at"
