"""Import the database of Project 2501 (MDCS): personas, modules, conversations and all in them.

    python examples/import_project2501.py --source URL [--tenant T] [--dry-run] [--batch N]

URL is that of its PostgreSQL, which is only read. DATABASE_URL says where the data goes; without
it, into the embedded server.

- Both of its schemas are read, that of its SQL files and that of its code, and enums as values or
  as names. Tables and columns may be missing.
- Ids and timestamps stay. Timestamps without a time zone are taken as UTC, and the report names
  them. `updated_at` of a memory is the time of the import.
- Messages get their positions by created_at, then id. Memories keep their sequence; without one
  they are numbered by created_at. A memory's range "25-35" becomes positions; it starts where its
  first message is, if that is there.
- A row that breaks a rule is skipped: a bad name, a doubled key (of states the newest stays),
  negative tokens, a conversation, persona or module that is not there. Less is left out of a row
  that is imported: the persona of a conversation or memory that is not there, a loop frequency of
  a reactive persona, an embedding of other dimensions. The report counts these by reason, with
  some ids.
- A batch of conversations, each with all that is in it, is one transaction: whenever the job dies,
  a conversation is there with all of its rows or not at all, and the next run goes on. What is
  there stays as it is: delete a conversation to import it anew.
- Rows are streamed: memory does not grow with them.
- A dry run does all of it in one transaction and takes that back; the target must be migrated.

The exit status is 0; 1 if anything was skipped or left out, or the job stopped; 2 if the arguments
are wrong or the source cannot be read.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
from importing import tenant  # the files beside this one
from project2501_report import Tally
from project2501_rows import Row, mapped, memory, parts, persona, state
from project2501_source import CHILDREN, Children, Source, SourceError
from rich.console import Console
from rich.progress import Progress
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from database import (
    AlreadyExistsError,
    Conversation,
    ConversationRepository,
    DatabaseError,
    InvalidReferenceError,
    InvalidValueError,
    Memory,
    MemoryRepository,
    Message,
    MessageRepository,
    Module,
    ModuleRepository,
    Persona,
    PersonaRepository,
    SessionLocal,
    State,
    StateRepository,
    TenantModel,
    check_schema,
    get_settings,
    init_db,
    transaction,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

Fields = dict[str, Any]

MODELS: dict[str, type[TenantModel]] = {
    "personas": Persona,
    "modules": Module,
    "conversations": Conversation,
    "messages": Message,
    "conversation_states": State,
    "conversation_memory": Memory,
}
STATE_KEY = ("persona_id", "module_id", "execution_stage", "state_key")
MAX_BATCH = 1000


class TakenBackError(Exception):
    """Ends the transaction of a dry run."""


class Job:
    """One run: reads rows, writes them in batches, and counts."""

    def __init__(self, tenant: str | None, batch: int, *, dry_run: bool) -> None:
        self.tenant = tenant
        self.batch = batch
        self.dry_run = dry_run
        self.tally = Tally()
        self.naive: list[str] = []
        self.ids: dict[str, set[UUID]] = {"persona": set(), "module": set()}  # that are here
        self.dimensions = get_settings().embedding_dimensions
        self.stopped = False
        console = Console(stderr=True)
        self.progress = Progress(console=console, disable=not console.is_terminal)

    def run(self, source: Source) -> None:
        """Import all of a source."""
        self.naive = source.naive
        task = self.progress.add_task("importing", total=source.count())

        def rows(table: str) -> Iterator[Fields]:
            for row in source.rows(table):
                self.tally.read[table] += 1
                self.progress.advance(task)
                yield row

        with (
            self.progress,
            SessionLocal(tenant_id=self.tenant) as db,
            suppress(TakenBackError),
            transaction(db) if self.dry_run else nullcontext(),
        ):
            self.import_named(db, "personas", map(persona, rows("personas")))
            self.import_named(db, "modules", map(mapped, rows("modules")))
            self.import_conversations(db, rows)
            if self.dry_run:
                raise TakenBackError

    @contextmanager
    def unit(self, db: Session) -> Iterator[None]:
        """Make one transaction; what is undone is not counted."""
        before = deepcopy(self.tally)
        try:
            with transaction(db):
                yield
        except BaseException:
            self.tally = before
            raise

    def import_named(self, db: Session, table: str, rows: Iterable[Row]) -> None:
        """Import personas or modules."""
        repository = PersonaRepository if table == "personas" else ModuleRepository
        for part in parts(rows):
            with self.unit(db):
                here = self.count_here(db, table, part)
                new = [row for row in part if row.id not in here]
                written = self.write(table, new, partial(repository.create_many, db))
            self.ids[table.removesuffix("s")] |= here | written

    def import_conversations(self, db: Session, rows: Callable[[str], Iterator[Fields]]) -> None:
        """Import conversations with all that is in them, a batch in a transaction."""
        children = {
            table: Children(rows(table), partial(self.skip_orphan, table)) for table in CHILDREN
        }
        conversations = map(mapped, rows("conversations"))
        while batch := list(islice(conversations, self.batch)):
            with self.unit(db):
                self.import_batch(db, batch, children)
        for table in CHILDREN:
            children[table].drain()

    def import_batch(
        self, db: Session, batch: Sequence[Row], children: dict[str, Children]
    ) -> None:
        """Import conversations; of one that is here already nothing is written."""
        here = self.count_here(db, "conversations", batch)
        new = [row for row in batch if row.id not in here]
        for row in new:
            self.leave_out_persona(row)
        written = self.write("conversations", new, partial(ConversationRepository.create_many, db))
        for conversation in batch:
            id_ = conversation.id
            messages, states, memories = (children[table].of(id_) for table in CHILDREN)
            found = {
                "messages": map(mapped, messages),
                "conversation_states": self.states(id_, states),
                "conversation_memory": self.memories(memories),
            }
            for table, rows in found.items():
                for part in parts(rows):
                    if id_ in written:
                        self.write_children(db, id_, table, part)
                    elif id_ in here:
                        self.skip_all(
                            table, part, self.count_here(db, table, part), "here without it"
                        )
                    else:
                        self.skip_all(table, part, set(), "skipped")
            if id_ in written and "updated_at" in conversation.fields:
                # Appending has changed it.
                ConversationRepository.update(db, id_, updated_at=conversation.fields["updated_at"])

    def write_children(self, db: Session, conversation: UUID, table: str, part: list[Row]) -> None:
        """Write rows of a conversation."""
        if table == "messages":
            self.write(table, part, partial(MessageRepository.append_many, db, conversation))
        elif table == "conversation_states":
            self.write(table, part, partial(StateRepository.create_many, db))
        else:
            self.place(db, conversation, part)
            self.write(table, part, partial(MemoryRepository.add_many, db, conversation))

    def states(self, conversation: UUID, rows: Iterable[Fields]) -> Iterator[Row]:
        """Yield the states of a conversation that can be imported: the newest of each key."""
        taken = set()
        for row in map(state, rows):
            row.fields["conversation_id"] = conversation
            key = tuple(row.fields.get(name) for name in STATE_KEY)
            owners = [name for name in self.ids if not self.is_here(row, name)]
            if owners:
                self.tally.skip("conversation_states", row.id, f"its {owners[0]} is not there")
            elif key in taken:
                self.tally.skip("conversation_states", row.id, "a newer one has its key")
            else:
                taken.add(key)
                yield row

    def memories(self, rows: Iterable[Fields]) -> Iterator[Row]:
        """Yield the memories of a conversation, each with a sequence of its own."""
        last: int | None = None
        for given in rows:
            row = memory(given, self.dimensions)
            self.leave_out_persona(row)
            sequence = row.fields.setdefault("sequence", max(last or 0, 0) + 1)
            if sequence == last:
                self.tally.skip("conversation_memory", row.id, "another one has its sequence")
                continue
            last = sequence
            yield row

    def place(self, db: Session, conversation: UUID, memories: Sequence[Row]) -> None:
        """Let the ranges of memories start where their first messages are."""
        firsts = [
            row.fields[name] for row in memories if (name := "first_message_id") in row.fields
        ]
        if not firsts:
            return
        # A session's own queries see only its tenant, as the repositories' do.
        query = select(Message.id, Message.position).where(
            Message.conversation_id == conversation, Message.id.in_(firsts)
        )
        positions = dict(db.execute(query).all())
        for row in memories:
            first = row.fields.get("first_message_id")
            if first not in positions:
                if first is not None:
                    row.leave_out("first_message_id", "is not there")
            elif "first_position" in row.fields:
                row.fields["last_position"] += positions[first] - row.fields["first_position"]
                row.fields["first_position"] = positions[first]

    def is_here(self, row: Row, owner: str) -> bool:
        """Tell whether the persona or module of a row is there, or it has none."""
        id_ = row.fields.get(f"{owner}_id")
        return id_ is None or id_ in self.ids[owner]

    def leave_out_persona(self, row: Row) -> None:
        """Leave out a persona that is not there."""
        if not self.is_here(row, "persona"):
            row.leave_out("persona_id", "is not there")

    def count_here(self, db: Session, table: str, rows: Sequence[Row]) -> set[UUID]:
        """Return the ids of the rows that are there already."""
        model = MODELS[table]
        query = select(model.id).where(model.id.in_([row.id for row in rows]))
        here = set(db.scalars(query))
        self.tally.there[table] += len(here)
        return here

    def write(
        self, table: str, rows: list[Row], insert: Callable[[list[Fields]], object]
    ) -> set[UUID]:
        """Insert rows; return the ids of those that the library takes.

        When it refuses some, each half is tried by itself: few of the others need a call more.
        """
        if not rows:
            return set()
        try:
            insert([row.fields for row in rows])
        except (AlreadyExistsError, InvalidReferenceError, InvalidValueError) as error:
            if len(rows) == 1:
                self.tally.skip(table, rows[0].id, str(error))
                return set()
            half = len(rows) // 2
            return self.write(table, rows[:half], insert) | self.write(table, rows[half:], insert)
        self.tally.written[table] += len(rows)
        for row in rows:
            for reason in row.left_out:
                self.tally.tell(table, "left out", reason, row.id)
        return {row.id for row in rows}

    def skip_all(self, table: str, rows: Iterable[Row], known: set[UUID], why: str) -> None:
        """Count rows that are not imported as their conversation is not, but for the known."""
        for row in rows:
            if row.id not in known:
                self.tally.skip(table, row.id, f"its conversation is {why}")

    def skip_orphan(self, table: str, given: Fields) -> None:
        """Count a row that has no conversation."""
        self.tally.skip(table, given["id"], "its conversation is not there")

    def stop(self, *parts: object) -> None:
        """Tell why the job ends early."""
        self.stopped = True
        self.progress.console.out("stopped", *parts, sep=": ", highlight=False)


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Import a database of Project 2501.")
    parser.add_argument("--source", required=True, metavar="URL", help="where it is; is only read")
    parser.add_argument("--tenant", type=tenant, help="default: DATABASE_TENANT_ID")
    parser.add_argument("--dry-run", action="store_true", help="take everything back at the end")
    parser.add_argument("--batch", type=int, default=25, help="conversations per transaction")
    options = parser.parse_args()
    if not 1 <= options.batch <= MAX_BATCH:
        parser.error(f"argument --batch: must be from 1 to {MAX_BATCH}")
    try:
        source = Source(options.source)
    except SourceError as error:
        parser.exit(2, f"{parser.prog}: error: --source: {error}\n")

    started = time.monotonic()
    try:
        job = Job(options.tenant, options.batch, dry_run=options.dry_run)
    except DatabaseError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    with source.connection:
        try:
            check_schema() if options.dry_run else init_db()
            job.run(source)
        except psycopg.Error as error:
            job.stop("the source", type(error).__name__)
        except (DatabaseError, SQLAlchemyError) as error:
            job.stop(error)
        except KeyboardInterrupt:
            job.stop("by the user")
    job.tally.report(MODELS, job.naive, time.monotonic() - started, dry_run=job.dry_run)
    return 1 if job.stopped or job.tally.reasons else 0


if __name__ == "__main__":
    sys.exit(main())
