"""Keys by which programs act for a user."""

from __future__ import annotations

from database.models.api_key import ApiKey
from database.repositories.base import Repository

__all__ = ["ApiKeyRepository"]


class ApiKeyRepository(Repository[ApiKey]):
    """API keys of a tenant."""

    model = ApiKey
