"""Rows for tests, made through the repositories: `UserFactory(db=db)`."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import factory

from database import (
    ApiKey,
    ApiKeyRepository,
    ContextRepository,
    ConversationRepository,
    IdentityRepository,
    MemoryRepository,
    MessageRepository,
    ModuleRepository,
    PersonaRepository,
    StateRepository,
    TenantSession,
    UserRepository,
)


def fields_of(kind: type[factory.Factory], db: TenantSession, **given: Any) -> dict[str, Any]:
    """What a factory would give to `create`, of which only the rows referred to are made."""
    return dict(vars(kind.stub(db=db, **given)))


def unique(prefix: str) -> factory.LazyFunction:
    return factory.LazyFunction(lambda: f"{prefix}{uuid4().hex}")


class UserFactory(factory.Factory):
    class Meta:
        model = UserRepository.create
        inline_args = ("db",)

    email = factory.LazyFunction(lambda: f"{uuid4().hex}@example.com")
    first_name = factory.Faker("first_name")


class IdentityFactory(factory.Factory):
    class Meta:
        model = IdentityRepository.create
        inline_args = ("db",)

    user_id = factory.LazyAttribute(lambda made: UserFactory(db=made.db).id)
    provider = "google"
    subject = unique("subject-")


def create_api_key(db: TenantSession, **fields: Any) -> ApiKey:
    return ApiKeyRepository.create(db, **fields).api_key


class ApiKeyFactory(factory.Factory):
    class Meta:
        model = create_api_key
        inline_args = ("db",)

    user_id = factory.LazyAttribute(lambda made: UserFactory(db=made.db).id)
    name = factory.Faker("word")


class ConversationFactory(factory.Factory):
    class Meta:
        model = ConversationRepository.create
        inline_args = ("db",)

    title = factory.Faker("sentence")


class MessageFactory(factory.Factory):
    class Meta:
        model = MessageRepository.append
        inline_args = ("db",)

    conversation_id = factory.LazyAttribute(lambda made: ConversationFactory(db=made.db).id)
    role = "user"
    content = factory.Faker("sentence")


class PersonaFactory(factory.Factory):
    class Meta:
        model = PersonaRepository.create
        inline_args = ("db",)

    name = unique("persona ")
    template = "You are helpful."


class ModuleFactory(factory.Factory):
    class Meta:
        model = ModuleRepository.create
        inline_args = ("db",)

    name = unique("m_")


class ContextFactory(factory.Factory):
    class Meta:
        model = ContextRepository.create
        inline_args = ("db",)

    user_id = factory.LazyAttribute(lambda made: UserFactory(db=made.db).id)
    context_type = "note"
    content = factory.LazyFunction(lambda: {"text": uuid4().hex})


class StateFactory(factory.Factory):
    class Meta:
        model = StateRepository.create
        inline_args = ("db",)

    conversation_id = factory.LazyAttribute(lambda made: ConversationFactory(db=made.db).id)
    state_key = unique("key-")
    state_value = factory.LazyFunction(lambda: {"n": 1})


class MemoryFactory(factory.Factory):
    class Meta:
        model = MemoryRepository.create
        inline_args = ("db",)

    conversation_id = factory.LazyAttribute(lambda made: ConversationFactory(db=made.db).id)
    content = factory.Faker("sentence")
