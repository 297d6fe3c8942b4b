"""The persistence layer of LLM chat and agent applications, on PostgreSQL.

Importing it reads no environment and opens no connection; the first session does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Engine

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
        UnreadableMessageError,
    )
    from database.health import check_connection
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
    from database.repositories.branches import Branch
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
    from database.repositories.stats import MessageStats, StatsRepository
    from database.repositories.storing import Stored
    from database.repositories.user import UserRepository
    from database.schema import check_schema, init_db
    from database.session import ALL_TENANTS, TenantSession, bind_tenant
    from database.settings import Settings
    from database.units import run_in_transaction, transaction

    engine: Engine

# `engine` is missing here: a star import must not make it.
__all__ = [
    "ALL_TENANTS",
    "AlreadyExistsError",
    "ApiKey",
    "ApiKeyRepository",
    "AuthenticationError",
    "Base",
    "Branch",
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
    "MessageStats",
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
    "StatsRepository",
    "Stored",
    "TenantModel",
    "TenantSession",
    "TransientError",
    "UnreadableMessageError",
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

# Where each name is; it is imported when it is asked for, so that a command line starts at once.
_HOMES = {
    "database.config": (
        "SessionLocal",
        "close_db",
        "configure",
        "get_db",
        "get_db_session",
        "get_engine",
        "get_settings",
    ),
    "database.errors": (
        "AlreadyExistsError",
        "AuthenticationError",
        "ConfigurationError",
        "ConflictError",
        "DatabaseError",
        "InvalidReferenceError",
        "InvalidValueError",
        "NotFoundError",
        "SchemaOutdatedError",
        "TransientError",
        "UnreadableMessageError",
    ),
    "database.health": ("check_connection",),
    "database.models": (
        "ApiKey",
        "Base",
        "Context",
        "Conversation",
        "ExecutionContext",
        "Identity",
        "Memory",
        "Message",
        "Module",
        "ModuleType",
        "Persona",
        "PersonaMode",
        "Role",
        "State",
        "TenantModel",
        "User",
    ),
    "database.pagination": ("Page", "SearchPage"),
    "database.repositories.api_key": ("ApiKeyRepository", "NewApiKey"),
    "database.repositories.base": ("Repository",),
    "database.repositories.branches": ("Branch",),
    "database.repositories.compressing": ("MemoryStatus",),
    "database.repositories.context": ("ContextRepository",),
    "database.repositories.conversation": ("ConversationRepository",),
    "database.repositories.identity": ("IdentityRepository",),
    "database.repositories.memory": ("MemoryRepository",),
    "database.repositories.message": ("MessageRepository",),
    "database.repositories.module": ("ModuleRepository",),
    "database.repositories.persona": ("PersonaRepository",),
    "database.repositories.recalling": ("RecallParts", "Recalled"),
    "database.repositories.state": ("StateRepository",),
    "database.repositories.stats": ("MessageStats", "StatsRepository"),
    "database.repositories.storing": ("Stored",),
    "database.repositories.user": ("UserRepository",),
    "database.schema": ("check_schema", "init_db"),
    "database.session": ("ALL_TENANTS", "TenantSession", "bind_tenant"),
    "database.settings": ("Settings",),
    "database.units": ("run_in_transaction", "transaction"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "engine":
        from database.config import get_engine

        return get_engine()
    if name in _HOME_OF:
        from importlib import import_module

        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
