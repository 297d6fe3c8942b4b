"""Pydantic AI: histories as lists of its messages, and its conversation store, on PostgreSQL."""

from database.integrations.pydantic_ai.history import (
    History,
    Skipped,
    append_history,
    clear,
    load_history,
)
from database.integrations.pydantic_ai.store import PostgresConversationStore

__all__ = [
    "History",
    "PostgresConversationStore",
    "Skipped",
    "append_history",
    "clear",
    "load_history",
]
