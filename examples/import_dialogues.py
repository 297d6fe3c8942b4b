"""Import the Schema-Guided Dialogue data set: a batch job that may be killed, and run again.

    python examples/import_dialogues.py PATH... [--tenant T] [--contexts] [--dry-run] [--batch N]

A PATH is a file with a list of dialogues, a `schema.json`, or a folder of these. DATABASE_URL says
where the data goes; without it, into the embedded server.

    dialogue         Conversation, thread_id "sgd:<dialogue_id>"
    turn             Message: USER is user, SYSTEM is assistant
    service call     Message of the tool, in front of the utterance that tells its results
    service          Module, by its name in lower case
    state of a user  State of the conversation and the service's module; the newest one stays
    service results  with --contexts: Context of the user ("sgd", "import"), for search; its type
                     "service_result", its source "sgd:<dialogue_id>:<turn>:<frame>"

- A batch of dialogues is one transaction: whenever the job dies, a dialogue is there with all of
  its rows or not at all, and the next run goes on. Several jobs may import the same at once.
- What is malformed is told on stderr, a line each with file, dialogue and reason; the rest is
  imported. A turn goes in as a whole or not at all. Turns and elements are numbered from 0.
- A dialogue that is there with other content (a turn was malformed then, and is not now) is told
  too, and stays as it is. Delete the conversation to import it anew.
- Contexts are stored in the place of those with their source, and those of dialogues that are there
  with the same content as well: --contexts may come with a later run. No results, no context.
- Files are streamed: memory does not grow with them. A dialogue of more than 1 MB is left out.
- A dry run checks all input, and does not ask the database.

The exit status is 0; 1 if anything was told on stderr as above; 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from uuid import UUID, uuid4

import orjson
from importing import elements, reason, report, tenant, unit  # the file beside this one
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field
from rich.console import Console
from rich.progress import Progress
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from database import (
    AlreadyExistsError,
    ContextRepository,
    Conversation,
    ConversationRepository,
    DatabaseError,
    InvalidValueError,
    MessageRepository,
    Module,
    ModuleRepository,
    NotFoundError,
    StateRepository,
    Stored,
    UserRepository,
    init_db,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

T = TypeVar("T")
Fields = dict[str, Any]

SCHEMA = "schema.json"
IDENTITY = ("sgd", "import")  # of the user who has the contexts
TABLES = ("modules", "conversations", "messages", "conversation_states", "contexts")
MAX_ELEMENT_BYTES = 2**20
MAX_BATCH = 1000
MAX_BATCH_BYTES = 2**19

# --- Reading: what must be in an element of a file ---


def storable(value: T) -> T:
    """Return a JSON value that the database can hold."""
    try:
        orjson.dumps([[value]])  # for it will lie within other JSON
    except TypeError:
        raise ValueError("has too many levels, too long a number or broken text") from None
    return value


Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Name = Annotated[str, AfterValidator(str.lower), Field(pattern=r"^[a-z][a-z0-9_]{0,49}$")]
Object = Annotated[Fields, AfterValidator(storable)]


class Input(BaseModel):
    """A part of the input: what it does not name is ignored, and no number passes for a text.

    Lists fail fast, for only the first fault is told, and a million of them need much memory.
    """

    model_config = ConfigDict(strict=True)


class Described(Input):
    """A slot or an intent of a service."""

    name: Text
    description: Text


class Service(Input):
    """An element of schema.json."""

    service_name: Name
    description: Text
    slots: Annotated[list[Described], FailFast()]
    intents: Annotated[list[Described], FailFast()]


class Call(Input):
    """What the system asked a service."""

    method: str
    parameters: Object


class Frame(Input):
    """What a turn means for one service."""

    service: Name
    state: Object | None = None
    service_call: Call | None = None
    service_results: Annotated[list[Any], AfterValidator(storable)] = []


class Turn(Input):
    """What one side said."""

    speaker: Literal["USER", "SYSTEM"]
    utterance: str
    frames: Annotated[list[Frame], FailFast()] = []


class Turns(Input):
    """An element of a file of dialogues; each of its turns is judged by itself."""

    dialogue_id: Annotated[str, Field(pattern=r"^\P{C}{1,200}$")]  # printable
    turns: list[Any]


# --- Mapping: the rows that they become ---


@dataclass
class Dialogue:
    """A dialogue as it goes into the database."""

    id: str
    file: Path
    messages: list[Fields] = field(default_factory=list)
    states: dict[str, Fields] = field(default_factory=dict)  # by service, the newest
    services: dict[str, None] = field(default_factory=dict)  # in order, each once
    contexts: list[Fields] = field(default_factory=list)

    @property
    def thread_id(self) -> str:
        """Its name in the tenant, apart from those that other applications give."""
        return f"sgd:{self.id}"

    @cached_property
    def digest(self) -> str:
        """What tells its content from any other."""
        content = json.dumps([self.messages, self.states], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def add(self, number: int, turn: Turn) -> None:
        """Add a turn's messages and contexts, and its states in the place of older ones."""
        key = f"turn-{number}"
        for index, frame in enumerate(turn.frames):
            self.services[frame.service] = None
            if turn.speaker == "USER" and frame.state is not None:
                self.states[frame.service] = frame.state
            if frame.service_call is not None:
                self.messages.append(tool_message(frame, frame.service_call, f"{key}-call-{index}"))
                if frame.service_results:
                    self.contexts.append(
                        {
                            "context_type": "service_result",
                            "source_identifier": f"{self.thread_id}:{number}:{index}",
                            "content": called(frame, frame.service_call),
                            "metadata": {"dialogue_id": self.id, "turn": number},
                        }
                    )
        role = "user" if turn.speaker == "USER" else "assistant"
        self.messages.append({"role": role, "content": turn.utterance, "idempotency_key": key})


def tool_message(frame: Frame, call: Call, key: str) -> Fields:
    """Return the message of a service call and its results."""
    return {
        "role": "tool",
        "content": orjson.dumps(frame.service_results).decode(),
        "tool_call_id": key,
        "idempotency_key": key,
        "extra_data": {**called(frame, call), "parameters": call.parameters},
    }


def called(frame: Frame, call: Call) -> Fields:
    """Return what was called, and its results."""
    return {"service": frame.service, "method": call.method, "results": frame.service_results}


def module(service: Service) -> Fields:
    """Return the module of a service."""
    lines = ["Intents:", *(f"- {intent.name}: {intent.description}" for intent in service.intents)]
    lines += ["Slots:", *(f"- {slot.name}: {slot.description}" for slot in service.slots)]
    return {
        "name": service.service_name,
        "description": service.description,
        "content": "\n".join(lines),
    }


# --- Writing: each `write_...` is one transaction, run by `unit` ---


def write_modules(modules: Sequence[Fields], db: Session) -> tuple[dict[str, UUID], int]:
    """Make the modules that are missing; return the ids of all by name, and how many were made."""
    query = select(Module).where(Module.name.in_([fields["name"] for fields in modules]))
    found = {module.name: module for module in db.scalars(query)}
    missing = [fields for fields in modules if fields["name"] not in found]
    found |= {module.name: module for module in ModuleRepository.create_many(db, missing)}
    for fields in modules:
        # Made for a dialogue when there was no schema.json.
        if fields["content"] is not None and found[fields["name"]].content is None:
            ModuleRepository.update(db, found[fields["name"]].id, **fields)
    return {name: module.id for name, module in found.items()}, len(missing)


def write_dialogues(
    dialogues: Sequence[Dialogue], modules: dict[str, UUID], db: Session
) -> tuple[dict[str, str], Stored]:
    """Write what is missing; return the digests of the others by thread, and of the contexts."""
    # A session's own queries see only its tenant, as the repositories' do.
    query = select(Conversation.thread_id, Conversation.metadata_).where(
        Conversation.thread_id.in_([dialogue.thread_id for dialogue in dialogues])
    )
    there = {thread_id: data.get("digest", "") for thread_id, data in db.execute(query)}
    new = [dialogue for dialogue in dialogues if dialogue.thread_id not in there]
    conversations = ConversationRepository.create_many(
        db,
        [
            {
                "thread_id": dialogue.thread_id,
                "title": ", ".join(dialogue.services)[:500],
                "metadata": {"source": "sgd", "digest": dialogue.digest},
            }
            for dialogue in new
        ],
    )
    states = []
    for dialogue, conversation in zip(new, conversations, strict=True):
        MessageRepository.append_many(db, conversation.id, dialogue.messages)
        states += [
            {
                "conversation_id": conversation.id,
                "module_id": modules[service],
                "state_key": "state",
                "state_value": state,
            }
            for service, state in dialogue.states.items()
        ]
    StateRepository.create_many(db, states)
    same = [item for item in dialogues if there.get(item.thread_id) in (None, item.digest)]
    return there, store_contexts([context for item in same for context in item.contexts], db)


def store_contexts(contexts: Sequence[Fields], db: Session) -> Stored:
    """Store contexts of the job's user, who is made with the first ones."""
    if not contexts:
        return Stored(0, 0)
    user = UserRepository.get_by_identity(db, *IDENTITY)
    # Not each time: it notes the user's activity too, for which jobs would wait for each other.
    user = user or UserRepository.get_or_create_by_identity(db, *IDENTITY)
    return ContextRepository.store_many(db, user.id, contexts)


# --- The job ---


class Job:
    """One run: reads files, writes in batches, counts, and tells what is wrong."""

    def __init__(
        self, tenant: str | None, batch: int, *, dry_run: bool, contexts: bool = False
    ) -> None:
        self.tenant = tenant
        self.batch = batch
        self.contexts = contexts
        self.dry_run = dry_run
        self.dialogues: dict[str, Dialogue] = {}  # waiting to be written, as are
        self.modules: dict[str, Fields] = {}
        self.bytes = 0  # they have about so many
        self.ids: dict[str, UUID] = {}  # of the modules written
        self.written: Counter[str] = Counter()
        self.there: Counter[str] = Counter()
        self.problems = 0
        console = Console(stderr=True)
        self.progress = Progress(console=console, disable=not console.is_terminal)

    def run(self, files: Sequence[Path]) -> None:
        """Import files; a schema.json comes first, for it describes the modules."""
        total = sum(path.stat().st_size for path in files if path.exists())
        task = self.progress.add_task("importing", total=total)

        def advance(size: int) -> None:
            self.bytes += size
            self.progress.advance(task, size)

        with self.progress:
            for path in sorted(files, key=lambda path: path.name != SCHEMA):
                number = -1
                try:
                    with path.open("rb") as file:
                        found = elements(file, advance, MAX_ELEMENT_BYTES)
                        for number, element in enumerate(found):
                            self.take(path, number, element)
                except (ValueError, OSError) as error:
                    where = f"after element {number}" if number >= 0 else "at its start"
                    self.tell(path, where, error)
            self.flush()

    def take(self, path: Path, number: int, element: bytes | None) -> None:
        """Let what is sound in an element wait to be written."""
        if element is None:
            self.tell(path, f"element {number}", f"more than {MAX_ELEMENT_BYTES:,} bytes")
            return
        try:
            given = json.loads(element)
            if path.name == SCHEMA:
                self.add_module(module(Service.model_validate(given)))
            else:
                self.add_dialogue(path, Turns.model_validate(given))
        except (ValueError, RecursionError) as error:
            self.tell(path, f"element {number}", reason(error))
        if self.bytes > MAX_BATCH_BYTES or self.batch in (len(self.dialogues), len(self.modules)):
            self.flush()

    def add_dialogue(self, path: Path, given: Turns) -> None:
        """Let a dialogue wait, if one of its turns is sound or it has none."""
        dialogue = Dialogue(given.dialogue_id, path)
        for number, turn in enumerate(given.turns):
            try:
                dialogue.add(number, Turn.model_validate(turn))
            except ValueError as error:
                self.tell(path, f"dialogue {dialogue.id}", f"turn {number}", reason(error))
        if not self.contexts:
            dialogue.contexts.clear()
        if dialogue.thread_id in self.dialogues:
            self.flush()
        if dialogue.messages or not given.turns:
            self.dialogues[dialogue.thread_id] = dialogue
        for name in dialogue.services:
            self.add_module({"name": name, "description": None, "content": None})

    def add_module(self, fields: Fields) -> None:
        """Let a module wait, unless this run has it."""
        if fields["name"] not in self.ids:
            self.modules.setdefault(fields["name"], fields)

    def flush(self) -> None:
        """Write what waits."""
        # In one order: jobs that lock rows in different orders could wait for each other.
        modules = sorted(self.modules.values(), key=itemgetter("name"))
        dialogues = sorted(self.dialogues.values(), key=attrgetter("thread_id"))
        self.modules, self.dialogues, self.bytes = {}, {}, 0
        if modules:
            ids, made = {fields["name"]: uuid4() for fields in modules}, len(modules)
            if not self.dry_run:
                ids, made = unit(partial(write_modules, modules), self.tenant)
            self.ids |= ids
            self.written["modules"] += made
            self.there["modules"] += len(modules) - made
        if dialogues:
            self.save(dialogues)

    def save(self, dialogues: Sequence[Dialogue]) -> None:
        """Write dialogues; one that the database refuses does not keep the others out."""
        there: dict[str, str] = {}
        stored = Stored(sum(len(dialogue.contexts) for dialogue in dialogues), 0)
        try:
            if not self.dry_run:
                there, stored = unit(partial(write_dialogues, dialogues, self.ids), self.tenant)
        except (AlreadyExistsError, InvalidValueError, NotFoundError) as error:
            if len(dialogues) == 1:
                self.tell(dialogues[0].file, f"dialogue {dialogues[0].id}", error)
            else:
                for dialogue in dialogues:
                    self.save([dialogue])
            return
        self.written["contexts"] += stored.inserted
        self.there["contexts"] += stored.updated
        for dialogue in dialogues:
            digest = there.get(dialogue.thread_id)
            if digest not in (None, dialogue.digest):
                self.tell(dialogue.file, f"dialogue {dialogue.id}", "is there with other content")
                continue
            count = self.written if digest is None else self.there
            count["conversations"] += 1
            count["messages"] += len(dialogue.messages)
            count["conversation_states"] += len(dialogue.states)

    def tell(self, *parts: object) -> None:
        """Tell what is wrong, and where."""
        self.problems += 1
        self.progress.console.out(": ".join(map(str, parts)), highlight=False)


def files_of(path: Path) -> list[Path]:
    """Return the files that a PATH stands for."""
    if path.is_dir():
        return [*path.glob(SCHEMA), *sorted(path.glob("dialogues_*.json"))]
    return [path] if path.exists() else []


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Import Schema-Guided Dialogue data.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--tenant", type=tenant, help="default: DATABASE_TENANT_ID")
    parser.add_argument("--contexts", action="store_true", help="store service results for search")
    parser.add_argument("--dry-run", action="store_true", help="check the input, write nothing")
    parser.add_argument("--batch", type=int, default=25, help="dialogues per transaction")
    options = parser.parse_args()
    if not 1 <= options.batch <= MAX_BATCH:
        parser.error(f"argument --batch: must be from 1 to {MAX_BATCH}")
    for path in options.paths:
        if not files_of(path):
            parser.error(f"nothing to import: {path}")
    files = list(dict.fromkeys(file for path in options.paths for file in files_of(path)))

    job = Job(options.tenant, options.batch, dry_run=options.dry_run, contexts=options.contexts)
    started = time.monotonic()
    try:
        if not options.dry_run:
            init_db()
            started = time.monotonic()
        job.run(files)
    except (DatabaseError, SQLAlchemyError) as error:
        job.tell("stopped", error)
    except KeyboardInterrupt:
        job.tell("stopped by the user")
    there = None if options.dry_run else job.there
    report(TABLES, job.written, there, job.problems, time.monotonic() - started)
    return 1 if job.problems else 0


if __name__ == "__main__":
    sys.exit(main())
