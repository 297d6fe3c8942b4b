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
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sqlalchemy import make_url, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

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
    bind_tenant,
    check_schema,
    get_settings,
    init_db,
    transaction,
)

Fields = dict[str, Any]

MODELS: dict[str, type[TenantModel]] = {
    "personas": Persona,
    "modules": Module,
    "conversations": Conversation,
    "messages": Message,
    "conversation_states": State,
    "conversation_memory": Memory,
}
CHILDREN = ("messages", "conversation_states", "conversation_memory")
OTHER_NAMES = {"conversation_memories": "conversation_memory"}  # what its code calls a table
COLUMNS = {  # that are read, as far as they are there; besides ids and timestamps
    "personas": "name description template mode loop_frequency first_message image_path extra_data"
    " is_active",
    "modules": "name description content type trigger_pattern script execution_context"
    " requires_ai_inference stage_priority script_analysis_metadata is_active",
    "conversations": "title persona_id provider_type provider_config",
    "messages": "role content thinking extra_data input_tokens output_tokens",
    "conversation_states": "persona_id module_id execution_stage state_key state_value variables"
    " execution_metadata executed_at",
    "conversation_memory": "persona_id content compressed_content memory_type importance embedding"
    " metadata last_accessed access_count first_message_id memory_sequence original_message_range"
    " message_count_at_compression",
}
RENAMED = {
    "compressed_content": "content",
    "last_accessed": "last_accessed_at",
    "memory_sequence": "sequence",
    "message_count_at_compression": "message_count",
}
ENUMS: dict[str, Callable[[str], str]] = {
    "mode": str.lower,
    "type": str.lower,
    "execution_context": str.upper,
    "role": str.lower,
    "execution_stage": str.lower,
}
ORDER = {  # as far as there are such columns; with a minus the newest first
    "personas": "created_at id",
    "modules": "created_at id",
    "conversations": "id",
    "messages": "conversation_id created_at id",
    "conversation_states": "conversation_id -executed_at -updated_at -created_at -id",
    "conversation_memory": "conversation_id memory_sequence created_at id",
}
EVERYWHERE = ("id", "conversation_id", "created_at", "updated_at")
COLUMNS_OF_ALL = (
    "SELECT table_name, column_name, data_type FROM information_schema.columns"
    " WHERE table_schema = current_schema() ORDER BY table_name, ordinal_position"
)
STATE_KEY = ("persona_id", "module_id", "execution_stage", "state_key")
MAX_BATCH = 1000
MAX_ROWS = 1000  # of a table, in memory at once
MAX_CHARACTERS = 4_000_000
FETCHED_ROWS = 200
EXAMPLES = 3


class SourceError(Exception):
    """The source cannot be read, or is none."""


class TakenBackError(Exception):
    """Ends the transaction of a dry run."""


@dataclass
class Row:
    """A row as it goes into our table, and what was left out of it."""

    id: UUID
    fields: Fields
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, name: str, why: str) -> None:
        """Import the row without a field."""
        self.fields.pop(name, None)
        self.left_out.append(f"{name}: {why}")


@dataclass
class Tally:
    """What became of the rows, by table; what was skipped or left out, by reason."""

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    there: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)

    def tell(self, table: str, what: str, reason: str, row_id: object) -> None:
        """Count a reason."""
        key = (table, what, reason)
        self.reasons[key] += 1
        examples = self.examples.setdefault(key, [])
        if len(examples) < EXAMPLES:
            examples.append(str(row_id))


# --- Reading ---


class Source:
    """One snapshot of the old database; which tables and columns it has."""

    def __init__(self, url: str) -> None:
        self.connection = connected(url)
        self.names: dict[str, str] = {}  # what the tables are called there
        self.columns: dict[str, list[str]] = {}
        self.naive: list[str] = []
        try:
            self._find_columns()
        except psycopg.Error as error:
            self.connection.close()
            raise SourceError(type(error).__name__) from None
        except SourceError:
            self.connection.close()
            raise

    def _find_columns(self) -> None:
        ids = set()
        for name, column, kind in self.connection.execute(COLUMNS_OF_ALL):
            table = OTHER_NAMES.get(name, name)
            if table not in MODELS:
                continue
            if column == "tenant_id":
                raise SourceError("is a database of this library, not of Project 2501")
            if self.names.setdefault(table, name) != name:
                raise SourceError(f"has both {self.names[table]} and {name}")
            if column in EVERYWHERE or column in COLUMNS[table].split():
                self.columns.setdefault(table, []).append(column)
                if kind == "timestamp without time zone":
                    self.naive.append(f"{name}.{column}")
                elif kind == "uuid":
                    ids.add((table, column))
        if not self.names:
            raise SourceError("has no table of Project 2501")
        needed = {(table, "id") for table in self.names}
        needed |= {(table, "conversation_id") for table in CHILDREN if table in self.names}
        for table, column in sorted(needed - ids):
            raise SourceError(f"{self.names[table]} has no {column} of type uuid")

    def count(self) -> int:
        """Return how many rows there are."""
        counts = (
            sql.SQL("(SELECT count(*) FROM {})").format(sql.Identifier(name))
            for name in self.names.values()
        )
        row = self.connection.execute(sql.SQL("SELECT {}").format(sql.SQL(" + ").join(counts)))
        return sum(count for (count,) in row)

    def rows(self, table: str) -> Iterator[Fields]:
        """Yield the rows of a table in its order, by a cursor of the server."""
        if table not in self.names:
            return
        order = [name for name in ORDER[table].split() if name.lstrip("-") in self.columns[table]]
        statement = sql.SQL("SELECT {} FROM {} ORDER BY {}").format(
            sql.SQL(", ").join(map(sql.Identifier, self.columns[table])),
            sql.Identifier(self.names[table]),
            sql.SQL(", ").join(
                sql.SQL("{} DESC NULLS LAST" if name.startswith("-") else "{}").format(
                    sql.Identifier(name.lstrip("-"))
                )
                for name in order
            ),
        )
        with self.connection.cursor(f"read_{table}", row_factory=dict_row) as cursor:
            cursor.itersize = FETCHED_ROWS
            yield from cursor.execute(statement)


def connected(url: str) -> psycopg.Connection:
    """Return a connection that only reads, and sees one snapshot."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise SourceError("must be a PostgreSQL URL") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres") or "@" in (parsed.host or ""):
        raise SourceError("must be a PostgreSQL URL, its password percent-encoded")
    plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        connection = psycopg.connect(plain, client_encoding="utf8")
    except psycopg.Error as error:
        reason = next(iter(str(error).splitlines()), "no connection")
        if parsed.password:
            reason = reason.replace(str(parsed.password), "***")
        raise SourceError(reason) from None
    connection.read_only = True
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    return connection


class Children:
    """The rows of a table, taken conversation by conversation: both come in the order of ids."""

    def __init__(self, rows: Iterator[Fields], orphan: Callable[[Fields], None]) -> None:
        self.rows = rows
        self.orphan = orphan
        self.next = next(rows, None)

    def of(self, conversation: UUID) -> Iterator[Fields]:
        """Yield those of a conversation; those in front of them have none."""
        while (row := self.next) and row["conversation_id"] is not None:
            if row["conversation_id"] > conversation:
                return
            self.next = next(self.rows, None)
            if row["conversation_id"] == conversation:
                yield row
            else:
                self.orphan(row)

    def drain(self) -> None:
        """Take those that are left: they have no conversation."""
        while row := self.next:
            self.next = next(self.rows, None)
            self.orphan(row)


# --- Mapping: rows of theirs as ours ---


def mapped(given: Fields) -> Row:
    """Return a row with what all tables have in common; nulls are our defaults."""
    fields: Fields = {}
    for name, value in given.items():
        if isinstance(value, datetime) and value.tzinfo is None:
            fields[name] = value.replace(tzinfo=UTC)
        elif name in ENUMS and isinstance(value, str):
            fields[name] = ENUMS[name](value)
        elif value is not None and name != "conversation_id":
            fields.setdefault(RENAMED.get(name, name), value)
    for name, other in (("created_at", "executed_at"), ("updated_at", "created_at")):
        if name not in fields and other in fields:
            fields[name] = fields[other]
    return Row(given["id"], fields)


def persona(given: Fields) -> Row:
    """Return a persona."""
    row = mapped(given)
    if "loop_frequency" in row.fields:
        if row.fields.get("mode", "reactive") == "reactive":
            row.leave_out("loop_frequency", "of a reactive persona")
        else:  # theirs may be ".5"
            row.fields["loop_frequency"] = re.sub(r"^\.", "0.", str(row.fields["loop_frequency"]))
    return row


def state(given: Fields) -> Row:
    """Return a state: the value of a key, or the variables of a stage."""
    row = mapped(given)
    variables = row.fields.pop("variables", None)
    if "state_key" not in row.fields:
        row.fields |= {"state_key": "variables", "state_value": variables}
    row.fields.setdefault("state_value", None)
    if "executed_at" not in row.fields and "updated_at" in row.fields:
        row.fields["executed_at"] = row.fields["updated_at"]
    return row


def memory(given: Fields, dimensions: int) -> Row:
    """Return a memory, with the range that it names."""
    row = mapped(given)
    row.fields.pop("updated_at", None)
    if (text := row.fields.pop("original_message_range", None)) is not None:
        match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", str(text))
        if match and 0 < int(match[1]) <= int(match[2]):
            row.fields |= {"first_position": int(match[1]), "last_position": int(match[2])}
        else:
            row.leave_out("original_message_range", "is no range of positions")
    if (embedding := row.fields.get("embedding")) is not None:
        if isinstance(embedding, str):
            with suppress(ValueError):
                embedding = json.loads(embedding)
        if isinstance(embedding, list) and len(embedding) == dimensions:
            row.fields["embedding"] = embedding
        else:
            row.leave_out("embedding", f"has not {dimensions} dimensions")
    if (first := row.fields.get("first_message_id")) is not None:
        try:
            row.fields["first_message_id"] = UUID(str(first))
        except ValueError:
            row.leave_out("first_message_id", "is no UUID")
    return row


def parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield rows in lists that are small enough to hold."""
    part: list[Row] = []
    characters = 0
    for row in rows:
        part.append(row)
        characters += sum(len(value) for value in row.fields.values() if isinstance(value, str))
        if len(part) == MAX_ROWS or characters > MAX_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


# --- The job ---


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
                self.skip("conversation_states", row.id, f"its {owners[0]} is not there")
            elif key in taken:
                self.skip("conversation_states", row.id, "a newer one has its key")
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
                self.skip("conversation_memory", row.id, "another one has its sequence")
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
                self.skip(table, rows[0].id, str(error))
                return set()
            half = len(rows) // 2
            return self.write(table, rows[:half], insert) | self.write(table, rows[half:], insert)
        self.tally.written[table] += len(rows)
        for row in rows:
            for reason in row.left_out:
                self.tally.tell(table, "left out", reason, row.id)
        return {row.id for row in rows}

    def skip(self, table: str, row_id: UUID, reason: str) -> None:
        """Count a row that is not imported."""
        self.tally.skipped[table] += 1
        self.tally.tell(table, "skipped", reason, row_id)

    def skip_all(self, table: str, rows: Iterable[Row], known: set[UUID], why: str) -> None:
        """Count rows that are not imported as their conversation is not, but for the known."""
        for row in rows:
            if row.id not in known:
                self.skip(table, row.id, f"its conversation is {why}")

    def skip_orphan(self, table: str, given: Fields) -> None:
        """Count a row that has no conversation."""
        self.skip(table, given["id"], "its conversation is not there")

    def stop(self, *parts: object) -> None:
        """Tell why the job ends early."""
        self.stopped = True
        self.progress.console.out("stopped", *parts, sep=": ", highlight=False)

    def report(self, seconds: float) -> None:
        """Say on stdout what was done."""
        written = "would write" if self.dry_run else "written"
        table = Table("table", box=SIMPLE)
        counts = {
            "read": self.tally.read,
            written: self.tally.written,
            "already there": self.tally.there,
            "skipped": self.tally.skipped,
        }
        for name in counts:
            table.add_column(name, justify="right")
        for name in MODELS:
            table.add_row(name, *(f"{count[name]:,}" for count in counts.values()))
        console = Console()
        console.print(table, highlight=False)
        for key, count in sorted(self.tally.reasons.items()):
            name, what, reason = key
            ids = ", ".join(self.tally.examples[key])
            more = ", ..." if count > EXAMPLES else ""
            console.out(f"{name}: {what}: {reason}: {count:,} ({ids}{more})", highlight=False)
        if self.naive:
            console.out(f"taken as UTC: {', '.join(self.naive)}", highlight=False)
        rows = self.tally.read.total()
        speed = f"{rows:,} rows in {seconds:.1f} s: {rows / seconds:,.0f} rows/s"
        console.out(speed, highlight=False)


def tenant(text: str) -> str:
    """Return a tenant's name; a wrong one is a ValueError."""
    bind_tenant(Session(), text)
    return text


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
    job.report(time.monotonic() - started)
    return 1 if job.stopped or job.tally.reasons else 0


if __name__ == "__main__":
    sys.exit(main())
