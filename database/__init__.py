"""The persistence layer of LLM chat and agent applications, on PostgreSQL.

Importing it reads no environment and opens no connection; the first session does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from database.config import (
    SessionLocal,
    close_db,
    configure,
    get_db,
    get_db_session,
    get_engine,
    get_settings,
)
from database.errors import (
    AlreadyExistsError,
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    NotFoundError,
    SchemaOutdatedError,
    TransientError,
)
from database.models import (
    ApiKey,
    Base,
    Context,
    Conversation,
    ExecutionContext,
    Identity,
    Memory,
    Message,
    Module,
    ModuleType,
    Persona,
    PersonaMode,
    Role,
    State,
    TenantModel,
    User,
)
from database.pagination import Page, SearchPage
from database.repositories.api_key import ApiKeyRepository, NewApiKey
from database.repositories.base import Repository
from database.repositories.compressing import MemoryStatus
from database.repositories.context import ContextRepository
from database.repositories.conversation import ConversationRepository
from database.repositories.identity import IdentityRepository
from database.repositories.memory import MemoryRepository
from database.repositories.message import MessageRepository
from database.repositories.module import ModuleRepository
from database.repositories.persona import PersonaRepository
from database.repositories.recalling import Recalled, RecallParts
from database.repositories.state import StateRepository
from database.repositories.storing import Stored
from database.repositories.user import UserRepository
from database.session import ALL_TENANTS, TenantSession, bind_tenant
from database.units import run_in_transaction, transaction

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from database.health import check_connection
    from database.schema import check_schema, init_db
    from database.settings import Settings

    engine: Engine

# `engine` is missing here: a star import must not make it.
__all__ = [
    "ALL_TENANTS",
    "AlreadyExistsError",
    "ApiKey",
    "ApiKeyRepository",
    "AuthenticationError",
    "Base",
    "ConfigurationError",
    "ConflictError",
    "Context",
    "ContextRepository",
    "Conversation",
    "ConversationRepository",
    "DatabaseError",
    "ExecutionContext",
    "Identity",
    "IdentityRepository",
    "InvalidReferenceError",
    "InvalidValueError",
    "Memory",
    "MemoryRepository",
    "MemoryStatus",
    "Message",
    "MessageRepository",
    "Module",
    "ModuleRepository",
    "ModuleType",
    "NewApiKey",
    "NotFoundError",
    "Page",
    "Persona",
    "PersonaMode",
    "PersonaRepository",
    "RecallParts",
    "Recalled",
    "Repository",
    "Role",
    "SchemaOutdatedError",
    "SearchPage",
    "SessionLocal",
    "Settings",
    "State",
    "StateRepository",
    "Stored",
    "TenantModel",
    "TenantSession",
    "TransientError",
    "User",
    "UserRepository",
    "bind_tenant",
    "check_connection",
    "check_schema",
    "close_db",
    "configure",
    "get_db",
    "get_db_session",
    "get_engine",
    "get_settings",
    "init_db",
    "run_in_transaction",
    "transaction",
]

# What imports pydantic or alembic waits until it is asked for.
_LAZY = {
    "Settings": "database.settings",
    "check_connection": "database.health",
    "check_schema": "database.schema",
    "init_db": "database.schema",
}


def __getattr__(name: str) -> Any:
    if name == "engine":
        return get_engine()
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
