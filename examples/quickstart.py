"""A whole chat round trip: `make demo`.

It runs on the database that DATABASE_URL names, or else on an embedded PostgreSQL that it starts.
"""

from __future__ import annotations

import sys

import persona_chat  # the file beside this one
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from database import (
    ConversationRepository,
    DatabaseError,
    MessageRepository,
    PersonaRepository,
    UserRepository,
    check_connection,
    get_db_session,
    init_db,
    transaction,
)

console = Console()


def main() -> None:
    """Migrate, chat, and read everything back."""
    init_db()
    with get_db_session() as db:
        user = UserRepository.get_or_create(db, "ada@example.com")
        persona = next(iter(PersonaRepository.list(db, name="Navigator")), None)
        persona = persona or PersonaRepository.create(
            db,
            name="Navigator",
            template="You are a patient navigator.",
            first_message="Welcome aboard! Where do we go?",
        )
        # What the persona says first is written in the same transaction.
        conversation = ConversationRepository.create(
            db, user_id=user.id, persona_id=persona.id, title="A trip around the world"
        )
        # Each call is committed when it returns, and holds no connection while a model thinks.
        MessageRepository.append(db, conversation.id, role="user", content="How long is it?")
        MessageRepository.append(
            db,
            conversation.id,
            role="assistant",
            content="40,075 km along the equator.",
            thinking="They ask for the circumference of the Earth.",
            input_tokens=21,
            output_tokens=9,
        )
        # Calls within a transaction are one unit: both messages are kept, or neither.
        with transaction(db):
            MessageRepository.append(db, conversation.id, role="user", content="And on foot?")
            MessageRepository.append(db, conversation.id, role="assistant", content="One year.")

        console.rule(f"{persona.name} and {user.email}")
        for message in MessageRepository.history(db, conversation.id, limit=20):
            thinking = f"[dim italic]{message.thinking}[/]\n" if message.thinking else ""
            tokens = f"{message.input_tokens} tokens in, {message.output_tokens} out"
            title = f"{message.position}. {message.role}"
            subtitle = tokens if message.output_tokens else None
            console.print(Panel(thinking + message.content, title=title, subtitle=subtitle))

        page = ConversationRepository.list_by_user(db, user.id, limit=5)
        table = Table("Title", "Last message", "Messages", title="The newest conversations")
        for item in page:
            table.add_row(item.title, item.last_message, str(item.message_count))
        console.print(table, "There are older ones." if page.next_cursor else "")

    # A persona that remembers, in a tenant of its own.
    with get_db_session(tenant_id=persona_chat.TENANT) as db:
        persona_chat.short(console, db)

    console.print(check_connection())


if __name__ == "__main__":
    try:
        main()
    except DatabaseError as error:
        sys.exit(f"The demo stopped: {error}")
