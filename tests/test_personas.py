"""Personas, what they own, and the conversations that they open."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from database import (
    AlreadyExistsError,
    ConversationRepository,
    InvalidReferenceError,
    InvalidValueError,
    MemoryRepository,
    MessageRepository,
    PersonaMode,
    PersonaRepository,
    StateRepository,
    TenantSession,
    get_engine,
    transaction,
)
from tests.counting import counted_round_trips, counted_statements
from tests.factories import (
    ConversationFactory,
    MemoryFactory,
    PersonaFactory,
    StateFactory,
    UserFactory,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def idle(db: TenantSession) -> bool:
    return not db.in_transaction() and get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


# CRUD


def test_persona_crud(db: TenantSession) -> None:
    made = PersonaRepository.create(db, name="Ada", template="You are Ada.")
    assert (made.mode, made.is_active, made.loop_frequency) == (PersonaMode.REACTIVE, True, None)
    changed = PersonaRepository.update(
        db, made.id, mode="autonomous", loop_frequency="0.5", extra_data={"a": 1}
    )
    db.expunge_all()
    found = PersonaRepository.require(db, made.id)
    assert found.to_dict() == changed.to_dict()
    assert found.mode is PersonaMode.AUTONOMOUS
    assert (found.name, found.template) == ("Ada", "You are Ada.")
    with pytest.raises(AlreadyExistsError, match=r"^name"):
        PersonaRepository.create(db, name="Ada", template="")
    assert PersonaRepository.delete(db, made.id)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("name", {"name": ""}),
        ("name", {"name": "x" * 256}),
        ("template", {"template": None}),
        ("mode", {"mode": "REACTIVE"}),
        ("mode", {"mode": None}),
        ("loop_frequency", {"mode": "autonomous", "loop_frequency": "0"}),
        ("loop_frequency", {"mode": "autonomous", "loop_frequency": 5}),
        ("image_path", {"image_path": "x" * 501}),
    ],
)
def test_bad_personas(db: TenantSession, field: str, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError) as caught:
        PersonaRepository.create(db, **{"name": "Ada", "template": "", **bad})
    assert caught.value.field == field
    assert PersonaRepository.count(db) == 0


def test_a_loop_frequency_belongs_to_an_autonomous_persona(db: TenantSession) -> None:
    rule = r"^loop_frequency: must be a positive number, of an autonomous persona$"
    fields = {"name": "Ada", "template": ""}
    for mode in ({}, {"mode": "reactive"}):
        with pytest.raises(InvalidValueError, match=rule) as caught:
            PersonaRepository.create(db, **fields, **mode, loop_frequency="5")
        assert caught.value.field == "loop_frequency"
    assert PersonaRepository.count(db) == 0
    made = PersonaRepository.create(db, **fields, mode="autonomous", loop_frequency="5")
    with pytest.raises(InvalidValueError, match=rule):
        PersonaRepository.update(db, made.id, mode="reactive")
    PersonaRepository.update(db, made.id, mode="reactive", loop_frequency=None)
    with pytest.raises(InvalidValueError, match=rule):
        PersonaRepository.update(db, made.id, loop_frequency="5")
    db.expunge_all()
    assert PersonaRepository.require(db, made.id).loop_frequency is None


def test_deleting_a_persona_keeps_conversations_and_memories(
    db: TenantSession, other: TenantSession
) -> None:
    persona = PersonaFactory(db=db, first_message="Hello").id
    kept = PersonaFactory(db=db).id
    chats = [ConversationRepository.create(db, persona_id=owner) for owner in (persona, kept)]
    chat = chats[0].id
    memory = MemoryFactory(db=db, conversation_id=chat, persona_id=persona).id
    for owner in (persona, kept, None):
        StateFactory(db=db, conversation_id=chat, persona_id=owner)
    # The same id in another tenant is another persona.
    PersonaFactory(db=other, id=persona)
    theirs = ConversationFactory(db=other, persona_id=persona).id
    before = ConversationRepository.require(db, chat).to_dict()
    with counted_round_trips() as trips, counted_statements() as statements:
        assert PersonaRepository.delete(db, persona) is True
    assert (trips.count, len(statements)) == (1, 1)
    assert idle(db)
    db.expunge_all()
    assert ConversationRepository.require(db, chat).to_dict() == before | {"persona_id": None}
    assert ConversationRepository.require(db, chats[1].id).persona_id == kept
    assert [message.content for message in MessageRepository.history(db, chat)] == ["Hello"]
    assert MemoryRepository.require(db, memory).persona_id is None
    assert {state.persona_id for state in StateRepository.get_all(db, chat)} == {kept, None}
    assert ConversationRepository.require(other, theirs).persona_id == persona
    assert PersonaRepository.delete(db, persona) is False


# Conversations


def test_conversation_create_with_first_message(db: TenantSession) -> None:
    hello = "Grüß dich! 🎈 " * 40
    persona = PersonaFactory(db=db, first_message=hello).id
    user = UserFactory(db=db, email="ada@example.com")
    config = {"model": "m-1", "nested": {"temperature": 0.5, "stop": [None, "x"]}}
    with counted_round_trips() as trips, counted_statements() as statements:
        made = ConversationRepository.create(
            db,
            "thread",
            title="title",
            last_message="replaced",
            user_id=user.id,
            persona_id=str(persona),
            provider_type="anthropic",
            provider_config=config,
            metadata={"m": 1},
            expires_at=NOON,
        )
    assert (trips.count, len(statements)) == (1, 1)
    assert idle(db)
    assert (made.persona_id, made.user_id, made.user_email) == (persona, user.id, user.email)
    assert (made.provider_type, made.provider_config) == ("anthropic", config)
    assert (made.metadata_, made.expires_at, made.title) == ({"m": 1}, NOON, "title")
    assert (made.message_count, made.last_position, made.last_message) == (1, 1, hello[:200])
    shown = made.to_dict()
    db.expunge_all()
    assert ConversationRepository.require(db, made.id).to_dict() == shown
    (message,) = MessageRepository.history(db, "thread")
    assert (message.role, message.content, message.position) == ("assistant", hello, 1)
    assert (message.is_active, message.parent_id) == (True, None)
    assert message.created_at == made.created_at
    assert MessageRepository.append(db, made.id, role="user", content="Hi").position == 2
    again = ConversationRepository.require(db, made.id)
    assert (again.message_count, again.last_position, again.last_message) == (2, 2, "Hi")


@pytest.mark.parametrize("first_message", [None, ""])
def test_conversation_create_with_a_persona_that_waits(
    db: TenantSession, first_message: str | None
) -> None:
    persona = PersonaFactory(db=db, first_message=first_message).id
    made = ConversationRepository.create(db, persona_id=persona, last_message="preview")
    contents = [message.content for message in MessageRepository.history(db, made.id)]
    assert contents == ([] if first_message is None else [""])
    assert made.message_count == len(contents)
    assert made.last_message == ("preview" if first_message is None else "")
    assert made.thread_id == str(made.id)


def test_conversation_create_with_a_persona_is_all_or_none(
    db: TenantSession, other: TenantSession
) -> None:
    persona = PersonaFactory(db=db, first_message="Hello").id
    for unknown in (uuid4(), PersonaFactory(db=other, first_message="Hello").id):
        with pytest.raises(InvalidReferenceError) as caught:
            ConversationRepository.create(db, persona_id=unknown)
        assert caught.value.field == "persona_id"
    ConversationRepository.create(db, "taken")
    with pytest.raises(AlreadyExistsError, match=r"^thread_id"):
        ConversationRepository.create(db, "taken", persona_id=persona)
    with pytest.raises(InvalidReferenceError, match=r"^user_id"):
        ConversationRepository.create(db, user_id=uuid4(), persona_id=persona)
    with pytest.raises(InvalidValueError, match=r"^persona_id: "):
        ConversationRepository.create(db, persona_id="Ada")
    with pytest.raises(ZeroDivisionError), transaction(db):
        ConversationRepository.create(db, persona_id=persona)
        raise ZeroDivisionError
    assert idle(db)
    assert (ConversationRepository.count(db), MessageRepository.count(db)) == (1, 0)
    assert ConversationRepository.count(other) == 0
    with transaction(db):
        made = ConversationRepository.create(db, persona_id=persona)
        assert len(MessageRepository.history(db, made.id)) == 1


def test_conversations_by_persona(db: TenantSession, other: TenantSession) -> None:
    ada, bob = (PersonaFactory(db=db).id for _ in range(2))
    ConversationFactory(db=db)
    chats = [ConversationFactory(db=db, persona_id=ada) for _ in range(5)]
    ConversationFactory(db=db, persona_id=bob)
    MessageRepository.append(db, chats[1].id, role="user", content="newest")
    expected = [chats[n].id for n in (1, 4, 3, 2, 0)]
    with counted_round_trips() as trips, counted_statements() as statements:
        first = ConversationRepository.list_by_persona(db, ada, limit=3)
    assert (trips.count, len(statements)) == (1, 1)
    second = ConversationRepository.list_by_persona(db, str(ada), limit=3, cursor=first.next_cursor)
    assert [chat.id for chat in (*first, *second)] == expected
    assert second.next_cursor is None
    assert ConversationRepository.list_by_persona(db, uuid4()).items == []
    assert ConversationRepository.list_by_persona(other, ada).items == []
    with pytest.raises(InvalidValueError, match=r"^persona_id: "):
        ConversationRepository.list_by_persona(db, "Ada")
