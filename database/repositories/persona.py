"""Personas."""

from __future__ import annotations

from database.models.persona import Persona
from database.repositories.base import Repository

__all__ = ["PersonaRepository"]


class PersonaRepository(Repository[Persona]):
    """Personas of a tenant."""

    model = Persona
    order = "created_at"
