"""`database history`: the messages of a conversation, or of all of a user's."""

from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import orjson
import typer

from database.cli.conversations import OfUser
from database.cli.files import write_lines
from database.cli.naming import every, find_conversation, find_user
from database.cli.options import AsJson, Output, Tenant, Yes, confirm, progress, session
from database.cli.output import print_record, print_rows

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from database.models import Conversation

__all__ = ["app"]

app = typer.Typer(name="history", help="Read messages, hide them, delete them.")

Of = Annotated[
    str | None,
    typer.Argument(metavar="CONVERSATION", help="A thread_id, or an id; or else give --user."),
]

_COLUMNS = ("thread_id", "position", "role", "created_at", "content")


@app.command()
def show(
    conversation: Of = None,
    *,
    user: OfUser = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="How many of each conversation, the newest.")
    ] = 50,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Show the newest messages, the oldest of them first."""
    from database.repositories.message import MessageRepository

    with session(tenant) as db:
        rows = (
            {**message.to_dict(), "thread_id": chat.thread_id, "created_at": message.created_at}
            for chat in _named(db, conversation, user)
            for message in MessageRepository.history(db, chat.id, limit=limit)
        )
        print_rows(rows, _COLUMNS, as_json=as_json)


@app.command()
def export(
    conversation: Of = None,
    *,
    user: OfUser = None,
    output: Output = None,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Write the messages that are shown as JSON lines, with every field."""
    with session(tenant) as db:
        lines = _lines(db, _named(db, conversation, user))
        write_lines(lines, output, "Exporting messages", as_json=as_json)


@app.command()
def clear(
    conversation: Of = None,
    *,
    user: OfUser = None,
    yes: Yes = False,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Hide all messages; `restore` shows them again."""
    from database.repositories.message import MessageRepository

    with session(tenant) as db:
        chats = _named(db, conversation, user)
        confirm(f"Hide all messages {_whose(conversation, user)}?", yes=yes)
        _change(db, "cleared", MessageRepository.deactivate, chats, as_json=as_json)


@app.command()
def restore(
    conversation: Of = None, *, user: OfUser = None, tenant: Tenant = None, as_json: AsJson = False
) -> None:
    """Show messages again that were cleared."""
    from database.repositories.message import MessageRepository

    with session(tenant) as db:
        chats = _named(db, conversation, user)
        _change(db, "restored", MessageRepository.restore, chats, as_json=as_json)


@app.command()
def purge(
    conversation: Of = None,
    *,
    user: OfUser = None,
    yes: Yes = False,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Delete messages for good that were cleared."""
    from database.repositories.message import MessageRepository

    with session(tenant) as db:
        chats = _named(db, conversation, user)
        question = f"Delete the cleared messages {_whose(conversation, user)} for good?"
        confirm(question, yes=yes)
        _change(db, "purged", MessageRepository.purge, chats, as_json=as_json)


def _named(db: "Session", conversation: str | None, user: str | None) -> "list[Conversation]":
    """Return the conversation, or all of the user."""
    from database.repositories.conversation import ConversationRepository

    if conversation is not None and user is None:
        return [find_conversation(db, conversation)]
    if user is not None and conversation is None:
        return list(every(ConversationRepository.list, db, user_id=find_user(db, user).id))
    raise typer.BadParameter("give either a conversation or --user")


def _whose(conversation: str | None, user: str | None) -> str:
    return f"of {conversation!r}" if user is None else f"of the user {user!r}"


def _lines(db: "Session", chats: "list[Conversation]") -> Generator[str, None, None]:
    from database.repositories.message import MessageRepository

    for chat in chats:
        with closing(MessageRepository.iterate(db, chat.id)) as messages:
            for message in messages:
                row = {"thread_id": chat.thread_id, **message.to_dict()}
                yield orjson.dumps(row).decode() + "\n"


def _change(
    db: "Session",
    done: str,
    change: Callable[["Session", UUID], int],
    chats: "list[Conversation]",
    *,
    as_json: bool,
) -> None:
    """Do it to each conversation; each is committed by itself."""
    count = 0
    with progress("Conversations", len(chats)) as advance:
        for chat in chats:
            count += change(db, chat.id)
            advance(1)
    print_record({done: count}, as_json=as_json)
