"""Import exported chats: a batch job that may be killed, and run again.

    python examples/import_chats.py FILE... [--tenant T] [--email E | --user ID] [--dry-run]

A FILE is a JSON list or JSON lines; what format an item has shows in its keys. DATABASE_URL says
where the data goes; without it, into the embedded server.

    mapping          ChatGPT's conversations.json, thread_id "chatgpt:<conversation_id>"; the nodes
                     of the tree are messages, its branches are branches, and the history is that
                     of current_node
    messages         OpenAI's chat format, thread_id "openai:<id>"
    conversations    ShareGPT, thread_id "sharegpt:<id>"

- An item without an id is named by the digest of its content: the same item twice is one.
- Messages get ids of their own, for ChatGPT repeats ids where one chat goes on from another. The
  source's are in extra_data, with all that has no column. So is the full name of a model, or id of
  a tool call, of more than 255 characters; its column has a cut one that ends with its digest.
- ChatGPT's messages without content (most are hidden system messages) are left out. What it tells
  the model of the user is a system message; thoughts are a message's thinking.
- With --email or --user the conversations are that user's. --email makes the user if need be.
- A conversation is one transaction: whenever the job dies, it is there with all of its messages or
  not at all, and the next run goes on. Several jobs may import the same at once.
- What is malformed is told on stderr, a line each with file, item and reason; the rest is
  imported. Elements of a list are numbered from 0, lines from 1.
- A conversation that is there with other content, or is another user's, is told too, and stays as
  it is. Delete it to import it anew.
- Files are streamed: memory does not grow with them. An item of more than 64 MB is left out.
- A dry run checks the files, and does not ask the database.

The exit status is 0; 1 if anything was told on stderr as above; 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from uuid import UUID

from chat_formats import chat_of  # the files beside this one
from importing import CHUNK_BYTES, elements, lines, reason, report, tenant, unit
from rich.console import Console
from rich.progress import Progress
from sqlalchemy.exc import SQLAlchemyError

from database import (
    Conversation,
    ConversationRepository,
    DatabaseError,
    InvalidValueError,
    MessageRepository,
    UserRepository,
    init_db,
)

if TYPE_CHECKING:
    from chats import Chat
    from sqlalchemy.orm import Session

TABLES = ("conversations", "messages")
MAX_ITEM_BYTES = 2**26
BOM = b"\xef\xbb\xbf"

# Not the first line of an object that goes over several.
OBJECT_LINE = re.compile(rb'^[ \t]*\{[ \t]*["}]', re.MULTILINE)


def items(file: BinaryIO, advance: Callable[[int], None]) -> Iterator[tuple[str, bytes | None]]:
    """Yield where each item of a file stands, and the item; None if it is too large.

    Raises:
        ValueError: The file is neither a JSON list nor JSON lines, or breaks off.
    """
    start = len(BOM) if file.read(len(BOM)) == BOM else 0
    file.seek(start)
    head = file.read(CHUNK_BYTES).lstrip()
    file.seek(start)
    advance(start)
    if head.startswith(b"["):
        for number, element in enumerate(elements(file, advance, MAX_ITEM_BYTES)):
            yield f"element {number}", element
    elif OBJECT_LINE.search(head):
        for number, line in enumerate(lines(file, advance, MAX_ITEM_BYTES), 1):
            if line is None or line.strip():
                yield f"line {number}", line
    else:
        raise ValueError("must be a JSON list, or lines of JSON objects, in UTF-8")


def write(chat: Chat, user_id: UUID | None, db: Session) -> Conversation | None:
    """Write a chat, unless its conversation is there: then return that."""
    if found := ConversationRepository.get_by_thread_id(db, chat.thread_id):
        return found
    known = {} if chat.created_at is None else {"created_at": chat.created_at}
    conversation = ConversationRepository.create(
        db,
        chat.thread_id,
        title=chat.title,
        user_id=user_id,
        metadata={**chat.metadata, "digest": chat.digest},
        **known,
    ).id
    messages = MessageRepository.append_tree(
        db, conversation, chat.messages, follows=[n if n >= 0 else None for n in chat.follows]
    )
    if chat.head != len(messages) - 1:
        at = messages[chat.head] if chat.head >= 0 else None
        ConversationRepository.branch(db, conversation, at=at)
    if chat.updated_at is not None:
        # Appending has changed it.
        ConversationRepository.update(db, conversation, updated_at=chat.updated_at)
    return None


class Job:
    """One run: reads files, writes conversations, counts, and tells what is wrong."""

    def __init__(
        self, tenant: str | None, *, dry_run: bool = False, user_id: UUID | None = None
    ) -> None:
        self.tenant = tenant
        self.dry_run = dry_run
        self.user_id = user_id
        self.written: Counter[str] = Counter()
        self.there: Counter[str] = Counter()
        self.problems = 0
        console = Console(stderr=True)
        self.progress = Progress(console=console, disable=not console.is_terminal)

    def run(self, files: Sequence[Path]) -> None:
        """Import files."""
        total = sum(path.stat().st_size for path in files)
        advance = partial(self.progress.advance, self.progress.add_task("importing", total=total))
        with self.progress:
            for path in files:
                where = "at its start"
                try:
                    with path.open("rb") as file:
                        for place, item in items(file, advance):
                            where = f"after {place}"
                            self.take(path, place, item)
                except (ValueError, OSError) as error:
                    self.tell(path, where, error)

    def take(self, path: Path, place: str, item: bytes | None) -> None:
        """Write an item, if it is sound."""
        if item is None:
            self.tell(path, place, f"more than {MAX_ITEM_BYTES:,} bytes")
            return
        try:
            chat = chat_of(json.loads(item.decode()))
        except (ValueError, RecursionError) as error:
            self.tell(path, place, reason(error))
            return
        try:
            found = None if self.dry_run else unit(partial(write, chat, self.user_id), self.tenant)
        except InvalidValueError as error:
            self.tell(path, place, error)
            return
        if found and found.metadata_.get("digest") != chat.digest:
            self.tell(path, place, "is there with other content")
        elif found and self.user_id not in (None, found.user_id):
            self.tell(path, place, "is there as another user's")
        else:
            count = self.there if found else self.written
            count.update(conversations=1, messages=len(chat.messages))

    def tell(self, *parts: object) -> None:
        """Tell what is wrong, and where."""
        self.problems += 1
        self.progress.console.out(": ".join(map(str, parts)), highlight=False)


def user_of(email: str | None, user_id: UUID | None, db: Session) -> UUID | None:
    """Return the id of the user whose the chats are, or None."""
    if email is not None:
        return UserRepository.get_or_create(db, email).id
    return None if user_id is None else UserRepository.require(db, user_id).id


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Import exported chats.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tenant", type=tenant, help="default: DATABASE_TENANT_ID")
    user = parser.add_mutually_exclusive_group()
    user.add_argument("--email", help="whose they are; the user is made if need be")
    user.add_argument("--user", type=UUID, metavar="ID", help="whose they are")
    parser.add_argument("--dry-run", action="store_true", help="check the files, write nothing")
    options = parser.parse_args()
    for path in options.files:
        if not path.is_file():
            parser.error(f"no such file: {path}")

    job = Job(options.tenant, dry_run=options.dry_run)
    started = time.monotonic()
    try:
        if not options.dry_run:
            init_db()
            job.user_id = unit(partial(user_of, options.email, options.user), options.tenant)
            started = time.monotonic()
        job.run(list(dict.fromkeys(options.files)))
    except (DatabaseError, SQLAlchemyError) as error:
        job.tell("stopped", error)
    except KeyboardInterrupt:
        job.tell("stopped by the user")
    there = None if options.dry_run else job.there
    report(TABLES, job.written, there, job.problems, time.monotonic() - started)
    return 1 if job.problems else 0


if __name__ == "__main__":
    sys.exit(main())
