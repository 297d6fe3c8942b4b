"""The tables, one noun a file."""

from database.models.api_key import ApiKey
from database.models.base import Base, TenantModel
from database.models.context import Context
from database.models.conversation import Conversation
from database.models.identity import Identity
from database.models.memory import Memory
from database.models.message import Message, Role
from database.models.module import ExecutionContext, Module, ModuleType
from database.models.persona import Persona, PersonaMode
from database.models.state import State
from database.models.user import User

__all__ = [
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
]
