"""`database conversations`."""

from typing import Annotated

import typer

from database.cli.naming import every, find_conversation, find_user
from database.cli.options import AsJson, Limit, Tenant, Yes, confirm, session
from database.cli.output import print_record, print_rows

__all__ = ["Conversation_", "OfUser", "app"]

app = typer.Typer(name="conversations", help="Look at conversations, delete them.")

Conversation_ = Annotated[
    str, typer.Argument(metavar="CONVERSATION", help="A thread_id, or an id.")
]
OfUser = Annotated[
    str | None,
    typer.Option(
        "--user",
        metavar="USER",
        help="Whose: an id, an e-mail address, or provider:subject.",
        show_default=False,
    ),
]

_COLUMNS = ("id", "thread_id", "user_email", "title", "message_count", "updated_at")


@app.command("list")
def list_(
    *, user: OfUser = None, limit: Limit = None, tenant: Tenant = None, as_json: AsJson = False
) -> None:
    """List the conversations, the newest activity first."""
    from database.repositories.conversation import ConversationRepository

    with session(tenant) as db:
        owner = None if user is None else find_user(db, user).id
        found = every(ConversationRepository.list, db, limit=limit, user_id=owner)
        print_rows(found, _COLUMNS, as_json=as_json)


@app.command()
def delete(
    conversation: Conversation_, *, yes: Yes = False, tenant: Tenant = None, as_json: AsJson = False
) -> None:
    """Delete a conversation, with all its messages."""
    from database.repositories.conversation import ConversationRepository

    with session(tenant) as db:
        found = find_conversation(db, conversation)
        confirm(f"Delete the conversation {conversation!r} and its messages?", yes=yes)
        deleted = ConversationRepository.delete(db, found.id)
        print_record({"deleted": int(deleted)}, as_json=as_json)
