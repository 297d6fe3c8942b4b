"""States."""

from __future__ import annotations

from database.models.state import State
from database.repositories.base import Repository

__all__ = ["StateRepository"]


class StateRepository(Repository[State]):
    """States of a tenant."""

    model = State
