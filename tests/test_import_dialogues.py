"""The batch job, run as a process of its own, on real dialogues and on malformed ones."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

import database
from database import (
    Context,
    ContextRepository,
    Conversation,
    ConversationRepository,
    Message,
    MessageRepository,
    Module,
    ModuleRepository,
    Repository,
    State,
    StateRepository,
    TenantSession,
    UserRepository,
    transaction,
)
from examples import import_dialogues, importing
from tests.conftest import admin
from tests.counting import counted_statements
from tests.running import end_of, environment, most_megabytes, read_until

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "import_dialogues.py"
TABLES: dict[str, type[Repository[Any]]] = {
    "modules": ModuleRepository,
    "conversations": ConversationRepository,
    "messages": MessageRepository,
    "conversation_states": StateRepository,
    "contexts": ContextRepository,
}
MEGABYTE = 2**20

Json = Any
# What stands in the database for a dialogue.
Row = tuple[str, str, str | None, Json]
Content = tuple[list[Row], dict[str, Json]]


@pytest.fixture(scope="session")
def sgd() -> Path:
    folder = os.environ.get("SGD_DATA")
    if not folder:
        pytest.skip("SGD_DATA is not set: the folder with the dialogues and schema.json")
    return Path(folder)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)]


def run(
    url: str, folder: Path, *arguments: object, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the job in a folder, where it must find no `.env` of ours."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(url, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def reported(output: str) -> dict[str, tuple[int, ...]]:
    """The numbers of the final report, by table; "rows" and "errors" besides."""
    found = {
        name: tuple(int(n.replace(",", "")) for n in re.findall(r"[\d,]+", rest))
        for name, rest in re.findall(rf"^ +({'|'.join(TABLES)}) +(.*)$", output, re.MULTILINE)
    }
    last = re.search(
        r"^([\d,]+) rows in [\d.]+ s: [\d,]+ rows/s; (\d+) errors$", output.strip(), re.MULTILINE
    )
    assert last, output
    return found | {"rows": (int(last[1].replace(",", "")),), "errors": (int(last[2]),)}


def counts(db: TenantSession) -> dict[str, int]:
    return {name: repository.count(db) for name, repository in TABLES.items()}


def stored(db: TenantSession) -> dict[str, Content]:
    """All conversations of the tenant, by thread: messages by position, states by module."""
    found: dict[str, Content] = {}
    threads = {}
    for conversation in db.scalars(select(Conversation)):
        found[conversation.thread_id] = ([], {})
        threads[conversation.id] = conversation
    positions: Counter[Any] = Counter()
    for message in db.scalars(select(Message).order_by(Message.conversation_id, Message.position)):
        positions[message.conversation_id] += 1
        assert message.position == positions[message.conversation_id]
        row = (message.role.value, message.content, message.tool_call_id, message.extra_data)
        found[threads[message.conversation_id].thread_id][0].append(row)
    names = {module.id: module.name for module in db.scalars(select(Module))}
    for state in db.scalars(select(State)):
        assert state.state_key == "state"
        assert state.module_id
        states = found[threads[state.conversation_id].thread_id][1]
        assert names[state.module_id] not in states
        states[names[state.module_id]] = state.state_value
    for conversation in threads.values():
        messages = found[conversation.thread_id][0]
        assert conversation.message_count == conversation.last_position == len(messages)
        assert conversation.last_message == (messages[-1][1][:200] if messages else None)
    return found


def content(dialogue: Json) -> Content:
    """What a sound dialogue must become."""
    rows: list[Row] = []
    states = {}
    for number, turn in enumerate(dialogue["turns"]):
        for index, frame in enumerate(turn["frames"]):
            service = frame["service"].lower()
            if "state" in frame:
                states[service] = frame["state"]
            if "service_call" in frame:
                results = frame["service_results"]
                text = json.dumps(results, separators=(",", ":"), ensure_ascii=False)
                data = {"service": service, **frame["service_call"], "results": results}
                rows.append(("tool", text, f"turn-{number}-call-{index}", data))
        role = {"USER": "user", "SYSTEM": "assistant"}[turn["speaker"]]
        rows.append((role, turn["utterance"], None, None))
    return rows, states


def contents(dialogues: Sequence[Json]) -> dict[str, Content]:
    return {f"sgd:{dialogue['dialogue_id']}": content(dialogue) for dialogue in dialogues}


def stored_contexts(db: TenantSession) -> dict[str, Json]:
    """All contexts of the tenant, by source: content and metadata."""
    user = UserRepository.get_by_identity(db, "sgd", "import")
    found = {}
    for context in db.scalars(select(Context)):
        assert user
        assert (context.user_id, context.context_type) == (user.id, "service_result")
        assert context.source_identifier
        found[context.source_identifier] = (context.content, context.metadata_)
    return found


def service_results(dialogues: Sequence[Json]) -> dict[str, Json]:
    """The contexts that sound dialogues must have."""
    return {
        f"sgd:{dialogue['dialogue_id']}:{number}:{index}": (
            {
                "service": frame["service"].lower(),
                "method": frame["service_call"]["method"],
                "results": frame["service_results"],
            },
            {"dialogue_id": dialogue["dialogue_id"], "turn": number},
        )
        for dialogue in dialogues
        for number, turn in enumerate(dialogue["turns"])
        for index, frame in enumerate(turn["frames"])
        if frame.get("service_results")
    }


def made_up(count: int, prefix: str = "made") -> list[Json]:
    """Dialogues of eight turns, with a call and its results, between two services."""
    return [dialogue(f"{prefix}_{number:05}", number) for number in range(count)]


def dialogue(id_: str, number: int = 0) -> Json:
    turns: list[Json] = []
    for turn in range(4):
        service = ("Banks_2", "Weather_1")[(number + turn) % 2]
        state = {"active_intent": "Ask", "slot_values": {"turn": [str(turn)], "of": [id_]}}
        user = {"service": service, "actions": [], "slots": [], "state": state}
        turns.append({"speaker": "USER", "utterance": f"{id_} asks {turn}", "frames": [user]})
        system: Json = {"service": service, "actions": [], "slots": []}
        if turn % 2:
            system["service_call"] = {"method": "Find", "parameters": {"what": f"{turn} ü"}}
            system["service_results"] = [{"name": "A", "n": 1.5}, {"name": id_, "n": None}]
        turns.append({"speaker": "SYSTEM", "utterance": f"answer {turn}", "frames": [system]})
    return {"dialogue_id": id_, "services": ["Banks_2", "Weather_1"], "turns": turns}


def service(name: str) -> Json:
    slots = [{"name": "city", "description": "Where", "is_categorical": False}]
    intents = [{"name": "Find", "description": "Find one", "required_slots": ["city"]}]
    return {"service_name": name, "description": f"About {name}", "slots": slots} | {
        "intents": intents
    }


def write(path: Path, value: Json) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def expected_counts(
    dialogues: Sequence[Json], modules: int, *, contexts: bool = False
) -> dict[str, int]:
    made = contents(dialogues).values()
    return {
        "modules": modules,
        "conversations": len(dialogues),
        "messages": sum(len(messages) for messages, _ in made),
        "conversation_states": sum(len(states) for _, states in made),
        "contexts": len(service_results(dialogues)) if contexts else 0,
    }


# --- Real data ---


def real_dialogues(folder: Path) -> list[Json]:
    return [
        d for path in sorted(folder.glob("dialogues_*.json")) for d in json.loads(path.read_text())
    ]


def test_real_data_are_imported_once_and_whole(
    sgd: Path, db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    dialogues = real_dialogues(sgd)
    services = json.loads((sgd / "schema.json").read_text())
    frames = [frame for d in dialogues for turn in d["turns"] for frame in turn["frames"]]
    turns = sum(len(d["turns"]) for d in dialogues)
    calls = sum("service_call" in frame for frame in frames)
    assert (len(dialogues), turns) == (452, 5712)

    done = run(worker_url, tmp_path, sgd, "--tenant", tenant)

    assert (done.returncode, done.stderr) == (0, "")
    expected = {
        "modules": len(services),
        "conversations": len(dialogues),
        "messages": turns + calls,
        "conversation_states": sum(len(content(d)[1]) for d in dialogues),
        "contexts": 0,
    }
    assert counts(db) == expected
    assert stored(db) == contents(dialogues)
    roles = Counter(role.value for role in db.scalars(select(Message.role)))
    assert (roles["user"] + roles["assistant"], roles["tool"]) == (turns, calls)
    assert {module.name: module.description for module in db.scalars(select(Module))} == {
        given["service_name"].lower(): given["description"] for given in services
    }
    report = reported(done.stdout)
    assert {name: report[name] for name in TABLES} == {
        name: (number, 0) for name, number in expected.items()
    }
    assert (report["rows"], report["errors"]) == ((sum(expected.values()),), (0,))

    rows = {row.id: row.to_dict() for row in db.scalars(select(Message))}
    threads = {row.id: row.to_dict() for row in db.scalars(select(Conversation))}
    again = run(worker_url, tmp_path, sgd, "--tenant", tenant)

    assert (again.returncode, again.stderr) == (0, "")
    db.expire_all()
    assert {row.id: row.to_dict() for row in db.scalars(select(Message))} == rows
    assert {row.id: row.to_dict() for row in db.scalars(select(Conversation))} == threads
    assert counts(db) == expected
    report = reported(again.stdout)
    assert {name: report[name] for name in TABLES} == {
        name: (0, number) for name, number in expected.items()
    }


def test_a_real_dialogue_reads_as_it_was_spoken(
    sgd: Path, db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    run(worker_url, tmp_path, sgd / "dialogues_001.json", "--tenant", tenant)
    spoken = MessageRepository.history(db, "sgd:1_00000")
    assert [message.role.value for message in spoken[:7]] == [
        *("user", "assistant", "user", "assistant", "user", "tool", "assistant")
    ]
    assert spoken[0].content == (
        "I want to make a restaurant reservation for 2 people at half past 11 in the morning."
    )
    call = spoken[5]
    assert call.tool_call_id == "turn-5-call-0"
    assert call.extra_data
    assert call.extra_data["method"] == "ReserveRestaurant"
    assert call.extra_data["parameters"]["restaurant_name"] == "Sino"
    assert json.loads(call.content) == call.extra_data["results"]
    assert call.extra_data["results"][0]["address"] == "377 Santana Row #1000"
    conversation = ConversationRepository.get_by_thread_id(db, "sgd:1_00000")
    assert conversation
    assert conversation.title == "restaurants_2"
    (state,) = StateRepository.list(db, conversation_id=conversation.id)
    # What the user wanted at the end, not in the beginning.
    assert state.state_value["slot_values"]["location"] == ["San Jose"]
    assert ModuleRepository.require(db, state.module_id or "").name == "restaurants_2"


def test_real_results_are_found_by_search(
    sgd: Path, db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    dialogues = real_dialogues(sgd)
    expected = service_results(dialogues)
    assert len(expected) == 816
    # A part was imported without contexts.
    first = run(worker_url, tmp_path, sgd / "dialogues_001.json", "--tenant", tenant)
    assert first.returncode == 0
    assert stored_contexts(db) == {}
    messages = {row.id: row.to_dict() for row in db.scalars(select(Message))}
    assert messages
    db.rollback()
    before: dict[Any, Any] = {}
    for report in ((len(expected), 0), (0, len(expected))):
        done = run(worker_url, tmp_path, sgd, "--tenant", tenant, "--contexts")
        assert (done.returncode, done.stderr) == (0, "")
        assert reported(done.stdout)["contexts"] == report
        db.expire_all()
        assert stored_contexts(db) == expected
        assert stored(db) == contents(dialogues)
        ids = {row.id: row.created_at for row in db.scalars(select(Context))}
        assert not before or ids == before
        before = ids
        now = {row.id: row.to_dict() for row in db.scalars(select(Message))}
        assert {id_: now[id_] for id_ in messages} == messages
        db.rollback()

    user = UserRepository.get_by_identity(db, "sgd", "import")
    assert user
    # A restaurant, a street, one with many places, and who plays at events.
    for name in ("Ludwig's German Table", "Santana Row", "Telegraph Avenue", "Buddy Guy"):
        holding = {
            source
            for source, (content, _) in expected.items()
            if name in json.dumps(content["results"], ensure_ascii=False)
        }
        assert holding
        found = ContextRepository.search(
            db, user.id, f'"{name}"', highlight=("<b>", "</b>"), limit=1000
        )
        assert {context.source_identifier for context in found.items} == holding
        for snippet in found.snippets:
            assert f"<b>{name}</b>" in snippet
        substring = ContextRepository.search(db, None, name[2:], mode="substring", limit=1000)
        assert {context.source_identifier for context in substring.items} >= holding
    (sino,) = ContextRepository.search(
        db, user.id, "sino", where={"service": "restaurants_2"}, context_type="service_result"
    ).items
    assert sino.content["method"] == "ReserveRestaurant"
    assert sino.metadata_ == {"dialogue_id": "1_00000", "turn": 5}
    with database.SessionLocal(tenant_id=f"{tenant}-other") as other:
        for user_id in (None, user.id):
            for mode in ("text", "substring"):
                assert not ContextRepository.search(other, user_id, "Santana", mode=mode).items


# --- Killed, and at once ---


@pytest.fixture
def many(tmp_path: Path) -> tuple[Path, list[Json]]:
    """A folder with 300 dialogues in three files, and the dialogues."""
    folder = tmp_path / "many"
    folder.mkdir()
    dialogues = made_up(300)
    for part in range(3):
        write(folder / f"dialogues_{part}.json", dialogues[part * 100 : part * 100 + 100])
    write(folder / "schema.json", [service("Banks_2"), service("Weather_1"), service("Homes_1")])
    return folder, dialogues


def test_killed_anywhere_it_loses_and_doubles_nothing(
    many: tuple[Path, list[Json]], db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    folder, dialogues = many
    expected = contents(dialogues)
    before = 0
    for _ in range(3):
        with subprocess.Popen(
            command(folder, "--tenant", tenant, "--batch", 5, "--contexts"),
            cwd=tmp_path,
            env=environment(worker_url, DATABASE_APPLICATION_NAME=tenant),
            stdout=subprocess.DEVNULL,
        ) as job:
            while ConversationRepository.count(db) == before and job.poll() is None:
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.08))
            job.kill()
        end_of(worker_url, tenant)
        there = stored(db)
        # Each dialogue with all that it has, or not at all.
        assert there == {thread: expected[thread] for thread in there}
        written = [d for d in dialogues if f"sgd:{d['dialogue_id']}" in there]
        assert stored_contexts(db) == service_results(written)
        assert before < len(there)
        before = len(there)
        db.rollback()
    assert before < len(dialogues), "killed too late to show anything"

    done = run(worker_url, tmp_path, folder, "--tenant", tenant, "--contexts")

    assert (done.returncode, done.stderr) == (0, "")
    assert reported(done.stdout)["conversations"] == (len(dialogues) - before, before)
    assert stored(db) == expected
    assert stored_contexts(db) == service_results(dialogues)
    assert counts(db) == expected_counts(dialogues, modules=3, contexts=True)


def test_two_at_once_make_one_import(
    many: tuple[Path, list[Json]], db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    folder, dialogues = many
    files = sorted(folder.glob("*.json"))
    jobs = [
        subprocess.Popen(
            command(*order, "--tenant", tenant, "--batch", batch, "--contexts"),
            cwd=tmp_path,
            env=environment(worker_url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for order, batch in ((files, 20), (files[::-1], 3), (files, 20))
    ]
    outputs = [job.communicate(timeout=120) for job in jobs]

    assert [(job.returncode, error) for job, (_, error) in zip(jobs, outputs, strict=True)] == [
        (0, ""),
        (0, ""),
        (0, ""),
    ]
    assert stored(db) == contents(dialogues)
    assert stored_contexts(db) == service_results(dialogues)
    expected = expected_counts(dialogues, modules=3, contexts=True)
    assert counts(db) == expected
    reports = [reported(output) for output, _ in outputs]
    for name, number in expected.items():
        # Together they have inserted each row once; each of them has seen them all.
        assert sum(report[name][0] for report in reports) == number, name
        assert [sum(report[name]) for report in reports] == [number] * 3, name
    assert min(report["conversations"][1] for report in reports) > 0, "they did not meet"


@pytest.mark.parametrize("known_modules", [False, True])
def test_what_another_job_writes_at_this_moment_is_there_already(
    db: TenantSession, tenant: str, worker_url: str, tmp_path: Path, *, known_modules: bool
) -> None:
    path = write(tmp_path / "some.json", [dialogue("same")])
    same = import_dialogues.Dialogue("same", path)
    for number, turn in enumerate(dialogue("same")["turns"]):
        same.add(number, import_dialogues.Turn.model_validate(turn))
    modules = [{"name": name, "description": None, "content": None} for name in same.services]
    if known_modules:
        with transaction(db):
            import_dialogues.write_modules(modules, db)
    job = import_dialogues.Job(tenant, 10, dry_run=False, contexts=True)
    with ThreadPoolExecutor() as pool:
        with transaction(db):
            ids, _ = import_dialogues.write_modules(modules, db)
            import_dialogues.write_dialogues([same], ids, db)
            running = pool.submit(job.run, [path])
            waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
            with admin(worker_url) as connection:
                while not connection.execute(waiting).fetchone():
                    assert not running.done()
                    time.sleep(0.01)
        running.result(timeout=30)

    assert stored(db) == contents([dialogue("same")])
    assert (job.problems, job.written.total(), job.there.total()) == (0, 0, 2 + 1 + 10 + 2 + 2)


# --- Options ---


def test_a_dry_run_needs_no_database(tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", [*made_up(3), {"dialogue_id": "4"}])
    nowhere = "postgresql://nobody@127.0.0.1:1/nowhere"
    for options in ([], ["--contexts"]):
        done = run(nowhere, tmp_path, path, "--dry-run", *options)
        assert done.returncode == 1
        assert done.stderr == f"{path}: element 3: turns: Field required\n"
        report = reported(done.stdout)
        expected = expected_counts(made_up(3), modules=2, contexts=bool(options))
        assert {name: report[name][0] for name in TABLES} == expected


def test_a_dry_run_writes_nothing(
    db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "some.json", made_up(3))
    done = run(worker_url, tmp_path, path, "--dry-run", "--contexts", "--tenant", tenant)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(counts(db).values()) == {UserRepository.count(db)} == {0}


def test_tenants_stay_apart(fresh_url: str, tmp_path: Path) -> None:
    some, more = made_up(4), [dialogue("made_00000", 1), dialogue("of the second")]
    first, second = write(tmp_path / "1.json", some), write(tmp_path / "2.json", more)
    assert run(fresh_url, tmp_path, first, "--tenant", "one").returncode == 0
    assert run(fresh_url, tmp_path, second, DATABASE_TENANT_ID="two").returncode == 0
    assert run(fresh_url, tmp_path, first).returncode == 0
    database.configure(url=fresh_url)
    for tenant_id, dialogues in {"one": some, "two": more, "default": some}.items():
        with database.SessionLocal(tenant_id=tenant_id) as db:
            assert stored(db) == contents(dialogues)
            assert counts(db) == expected_counts(dialogues, modules=2)


def test_it_works_on_a_fresh_machine(empty_url: str, tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", made_up(2))
    done = run(empty_url, tmp_path, path)
    assert (done.returncode, done.stderr) == (0, "")
    database.configure(url=empty_url)
    with database.SessionLocal() as db:
        assert stored(db) == contents(made_up(2))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: PATH"),
        (["missing.json"], "nothing to import: missing.json"),
        (["."], "nothing to import: ."),
        (["some.json", "--batch", "0"], "argument --batch: must be from 1 to 1000"),
        (["some.json", "--batch", "x"], "argument --batch: invalid int value: 'x'"),
        (["some.json", "--tenant", "no name"], "argument --tenant: invalid tenant value"),
    ],
)
def test_wrong_arguments(arguments: list[str], reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    write(folder / "some.json", [])
    done = run("postgresql://nobody@127.0.0.1:1/nowhere", folder, *arguments)
    assert done.returncode == 2
    assert reason in done.stderr


def test_without_a_database_it_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", made_up(1))
    done = run("postgresql://me:secret-word@127.0.0.1:1/nowhere", tmp_path, path)
    assert done.returncode == 1
    assert done.stderr.startswith("stopped: ")
    assert "Traceback" not in done.stderr
    assert "secret-word" not in done.stderr + done.stdout
    assert reported(done.stdout)["rows"] == (0,)


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", [*made_up(3), {}])
    terminal, slave = pty.openpty()
    with subprocess.Popen(
        command(path, "--dry-run"),
        cwd=tmp_path,
        env=environment("postgresql:///unused", TERM="xterm"),
        stdout=subprocess.PIPE,
        stderr=slave,
    ) as job:
        os.close(slave)
        shown = read_until(terminal, None)
        assert job.stdout
        output = job.stdout.read()
    os.close(terminal)
    assert "importing" in shown
    assert "100%" in shown
    assert f"{path}: element 3: dialogue_id: Field required" in shown
    assert b"\x1b" not in output
    assert reported(output.decode())["errors"] == (1,)


# --- Malformed input ---

Import = Callable[..., tuple[import_dialogues.Job, list[str]]]


@pytest.fixture
def import_(tenant: str, capsys: pytest.CaptureFixture[str]) -> Import:
    """Imports files in this process; returns the job, and the lines that it told."""

    def run_job(
        *files: Path, dry_run: bool = False, contexts: bool = False
    ) -> tuple[import_dialogues.Job, list[str]]:
        job = import_dialogues.Job(tenant, 10, dry_run=dry_run, contexts=contexts)
        job.run(files)
        return job, capsys.readouterr().err.splitlines()

    return run_job


def broken(**changes: Json) -> Json:
    """A dialogue of which the turn 1 is changed; `...` takes a field away."""
    given = dialogue("broken")
    changed = {k: v for k, v in {**given["turns"][1], **changes}.items() if v is not ...}
    return {**given, "turns": [given["turns"][0], changed, *given["turns"][2:]]}


def frame(**changes: Json) -> list[Json]:
    whole = {
        "service": "Banks_2",
        "service_call": {"method": "Find", "parameters": {}},
        "service_results": [],
    }
    return [{k: v for k, v in {**whole, **changes}.items() if v is not ...}]


DEEP = json.loads("[" * 300 + "]" * 300)
PATTERN = "String should match pattern"
TURNS: list[tuple[dict[str, Json], str]] = [
    ({"speaker": ...}, "speaker: Field required"),
    ({"speaker": "BOT"}, "speaker: Input should be 'USER' or 'SYSTEM'"),
    ({"speaker": ["USER"]}, "speaker: Input should be 'USER' or 'SYSTEM'"),
    ({"utterance": ...}, "utterance: Field required"),
    ({"utterance": 5}, "utterance: Input should be a valid string"),
    ({"utterance": None}, "utterance: Input should be a valid string"),
    ({"frames": None}, "frames: Input should be a valid list"),
    ({"frames": {}}, "frames: Input should be a valid list"),
    ({"frames": [5]}, "frames.0: Input should be a valid dictionary"),
    ({"frames": frame(service=...)}, "frames.0.service: Field required"),
    ({"frames": frame(service="no name!")}, f"frames.0.service: {PATTERN}"),
    ({"frames": frame(service="A" * 51)}, f"frames.0.service: {PATTERN}"),
    ({"frames": frame(state=[])}, "frames.0.state: Input should be a valid dictionary"),
    ({"frames": frame(service_call=5)}, "frames.0.service_call: Input should be a valid dict"),
    ({"frames": frame(service_call={"method": "m"})}, "frames.0.service_call.parameters: Field"),
    (
        {"frames": frame(service_call={"method": 5, "parameters": {}})},
        "frames.0.service_call.method: Input should be a valid string",
    ),
    ({"frames": frame(service_results={})}, "frames.0.service_results: Input should be a valid"),
    (
        {"frames": frame(service_results=DEEP)},
        "frames.0.service_results: Value error, has too many levels",
    ),
    (
        {"frames": frame(service_results=["\ud800"])},
        "frames.0.service_results: Value error, has too many levels, too long a number or broken",
    ),
    (
        {"frames": frame(service_results=[2**70])},
        "frames.0.service_results: Value error, has too many levels, too long",
    ),
]


@pytest.mark.parametrize(("changes", "reason"), TURNS, ids=[reason for _, reason in TURNS])
def test_a_malformed_turn_is_told_and_the_others_imported(
    changes: dict[str, Json], reason: str, db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    given = [dialogue("first"), broken(**changes), dialogue("last")]
    path = write(tmp_path / "some.json", given)
    job, (line,) = import_(path)

    assert line.startswith(f"{path}: dialogue broken: turn 1: {reason}")
    assert job.problems == 1
    found = stored(db)
    assert found.keys() == {"sgd:first", "sgd:broken", "sgd:last"}
    rows, states = content(dialogue("broken"))
    assert found["sgd:broken"] == ([rows[0], *rows[2:]], states)


DIALOGUES: list[tuple[str, str]] = [
    ("5", "Input should be a valid dictionary"),
    ("null", "Input should be a valid dictionary"),
    ("[]", "Input should be a valid dictionary"),
    ('"text"', "Input should be a valid dictionary"),
    ("{}", "dialogue_id: Field required"),
    ('{"turns": []}', "dialogue_id: Field required"),
    ('{"dialogue_id": 7, "turns": []}', "dialogue_id: Input should be a valid string"),
    ('{"dialogue_id": "", "turns": []}', f"dialogue_id: {PATTERN}"),
    ('{"dialogue_id": "a\\u0000", "turns": []}', f"dialogue_id: {PATTERN}"),
    ('{"dialogue_id": "a\\u001b[2J", "turns": []}', f"dialogue_id: {PATTERN}"),
    (json.dumps({"dialogue_id": "i" * 201, "turns": []}), f"dialogue_id: {PATTERN}"),
    ('{"dialogue_id": "a"}', "turns: Field required"),
    ('{"dialogue_id": "a", "turns": {}}', "turns: Input should be a valid list"),
    ('{"dialogue_id": "a" "turns": []}', "not JSON: Expecting ',' delimiter"),
    ('{"dialogue_id": a}', "not JSON: Expecting value"),
    ('{"dialogue_id": "\n"}', "not JSON: Invalid control character"),
    ("", "not JSON: Expecting value"),
    ("[" * 100_000 + "]" * 100_000, "not JSON: maximum recursion depth exceeded"),
    (json.dumps(["x" * 1000] * 1200), "more than 1,048,576 bytes"),
    ('{"of": [' + ",".join(["[]"] * 400_000) + "]}", "more than 1,048,576 bytes"),
]


@pytest.mark.parametrize(
    ("element", "reason"), DIALOGUES, ids=[element[:40] for element, _ in DIALOGUES]
)
def test_a_malformed_dialogue_is_told_and_the_others_imported(
    element: str, reason: str, db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    sound = [dialogue("first"), dialogue("last")]
    texts = [json.dumps(sound[0]), element, json.dumps(sound[1])]
    path = write(tmp_path / "some.json", f"[{', '.join(texts)}]")
    job, (line,) = import_(path)

    assert line.startswith(f"{path}: element 1: {reason}")
    assert job.problems == 1
    assert stored(db) == contents(sound)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("", "after element 2: breaks off"),
        (", ", "after element 2: breaks off"),
        (', {"dialogue_id": "cut", "turns": [{"spea', "after element 2: breaks off"),
        (', {"dialogue_id": "cut", "turns": []', "after element 2: breaks off"),
        ('] "more"', "after element 2: must be one JSON list"),
        ("][]", "after element 2: must be one JSON list"),
        ("}", "after element 2: must be one JSON list"),
        (", ]", "element 3: not JSON: Expecting value: line 1 column 1 (char 0)"),
        (", 5]", "element 3: Input should be a valid dictionary or instance of Turns"),
        (', "' + "x" * 3 * MEGABYTE, "after element 2: a text is too large"),
    ],
    ids=lambda value: value[:40],
)
def test_what_stands_before_a_break_is_imported(
    end: str, reason: str, db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    sound = made_up(3)
    path = write(tmp_path / "cut.json", json.dumps(sound)[:-1] + end)
    other = write(tmp_path / "whole.json", [dialogue("whole")])
    _, lines = import_(path, other)
    assert lines == [f"{path}: {reason}"]
    assert stored(db) == contents([*sound, dialogue("whole")])


@pytest.mark.parametrize(
    "text", ["", " \n", "{}", '{"a": []}', "5", '"["', "\x00[", "]", "\ufeff[]"]
)
def test_a_file_that_is_no_list(text: str, import_: Import, tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", text)
    job, lines = import_(path, dry_run=True)
    assert lines == [f"{path}: at its start: must be a JSON list"]
    assert not job.written


def test_all_that_is_malformed_is_reported_by_the_process(
    db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    homes: Json = {"service_name": "Homes_1", "description": None, "slots": [], "intents": []}
    schema = write(folder / "schema.json", [service("Banks_2"), homes, service("9 lives")])
    one = write(folder / "dialogues_1.json", [dialogue("a"), broken(speaker="BOT"), {"turns": 1}])
    two = write(folder / "dialogues_2.json", json.dumps(made_up(2))[:-700])
    three = write(folder / "dialogues_3.json", {"dialogue_id": "no list"})
    four = folder / "dialogues_4.json"
    four.symlink_to(folder / "nowhere.json")
    five = folder / "dialogues_5.json"
    sound = json.dumps(dialogue("z")).encode()
    five.write_bytes(b'[{"dialogue_id": "\xff", "turns": []}, ' + sound + b"]")
    lines = [
        f"{schema}: element 1: description: Input should be a valid string",
        f"{schema}: element 2: service_name: {PATTERN} '^[a-z][a-z0-9_]{{0,49}}$'",
        f"{one}: dialogue broken: turn 1: speaker: Input should be 'USER' or 'SYSTEM'",
        f"{one}: element 2: dialogue_id: Field required",
        f"{two}: after element 0: breaks off",
        f"{three}: at its start: must be a JSON list",
        f"{four}: at its start: [Errno 2] No such file or directory: '{four}'",
        f"{five}: element 0: not JSON: utf-8",
    ]
    for arguments in (["--dry-run"], [], []):
        done = run(worker_url, tmp_path, folder, "--tenant", tenant, *arguments)
        assert done.returncode == 1
        assert done.stderr.splitlines() == lines
        assert reported(done.stdout)["errors"] == (len(lines),)
    found = stored(db)
    assert found.keys() == {"sgd:a", "sgd:broken", "sgd:made_00000", "sgd:z"}
    assert found["sgd:made_00000"] == content(made_up(1)[0])
    assert {module.name for module in db.scalars(select(Module))} == {"banks_2", "weather_1"}


def test_a_dialogue_without_a_sound_turn_is_left_out(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    hollow = {"dialogue_id": "hollow", "turns": [{"speaker": "BOT"}]}
    empty = {"dialogue_id": "empty", "turns": []}
    _, lines = import_(write(tmp_path / "some.json", [hollow, empty]))
    assert len(lines) == 1
    assert stored(db) == {"sgd:empty": ([], {})}


def test_other_content_of_the_same_dialogue_is_told_and_left_alone(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    path = write(tmp_path / "some.json", [broken(speaker="BOT")])
    import_(path)
    before = stored(db)
    # Repaired; and another dialogue twice, in the end once more with other content.
    write(path, [dialogue("broken"), dialogue("new"), dialogue("new"), dialogue("new", 1)])
    job, lines = import_(path, contexts=True)

    assert lines == [
        f"{path}: dialogue broken: is there with other content",
        f"{path}: dialogue new: is there with other content",
    ]
    assert stored(db) == before | contents([dialogue("new")])
    assert (job.written["conversations"], job.there["conversations"]) == (1, 1)
    assert stored_contexts(db) == service_results([dialogue("new")])
    assert (job.written["contexts"], job.there["contexts"]) == (2, 2)

    assert ConversationRepository.delete(db, "sgd:broken")
    assert ConversationRepository.delete(db, "sgd:new")
    job, _ = import_(path, contexts=True)
    assert stored(db) == contents([dialogue("broken"), dialogue("new")])
    # Contexts are the user's: they outlive a conversation.
    assert (job.written["contexts"], job.there["contexts"]) == (2, 4)
    db.expire_all()
    assert stored_contexts(db) == service_results([dialogue("broken"), dialogue("new")])


def test_a_refused_dialogue_does_not_keep_the_others_out(
    db: TenantSession, import_: Import, worker_url: str, tmp_path: Path
) -> None:
    database.configure(url=worker_url, unstorable="error")
    refused = {"dialogue_id": "nul", "turns": [{"speaker": "USER", "utterance": "a\x00b"}]}
    path = write(tmp_path / "some.json", [dialogue("a"), refused, dialogue("z")])
    job, (line,) = import_(path, contexts=True)
    assert line.startswith(f"{path}: dialogue nul: content: ")
    assert stored_contexts(db) == service_results([dialogue("a"), dialogue("z")])
    assert job.written["contexts"] == 4
    assert stored(db) == contents([dialogue("a"), dialogue("z")])
    assert job.written["conversations"] == 2


def test_what_cannot_be_stored_is_replaced(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    given = {"dialogue_id": "nul", "turns": [{"speaker": "USER", "utterance": "a\x00b\ud800"}]}
    for _ in range(2):
        _, lines = import_(write(tmp_path / "some.json", [given]))
        assert lines == []
        assert stored(db) == {"sgd:nul": ([("user", "a\ufffdb\ufffd", None, None)], {})}


def test_a_module_gets_its_text_when_its_schema_comes(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    path = write(tmp_path / "some.json", made_up(1))
    import_(path)
    bare = list(db.scalars(select(Module)))
    assert {module.content for module in bare} == {None}
    schema = write(tmp_path / "schema.json", [service("Banks_2"), service("Weather_1")])
    job, _ = import_(path, schema)
    db.expire_all()
    modules = list(db.scalars(select(Module).order_by(Module.name)))
    assert {module.id for module in modules} == {module.id for module in bare}
    assert [module.description for module in modules] == ["About Banks_2", "About Weather_1"]
    assert modules[0].content == "Intents:\n- Find: Find one\nSlots:\n- city: Where"
    assert (job.written["modules"], job.there["modules"]) == (0, 2)


# --- Reading ---

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
# What can confuse a scanner: brackets, quotes and backslashes within texts.
NASTY = st.text(st.sampled_from('[]{}",\\:\n é'))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(importing, "CHUNK_BYTES", size)


def read(path: Path) -> tuple[list[Json], str]:
    """The elements of a file, and why they end before it does."""
    found: list[Json] = []
    sizes: list[int] = []
    try:
        with path.open("rb") as file:
            for element in importing.elements(file, sizes.append, MEGABYTE):
                assert element is not None
                found.append(json.loads(element))
    except ValueError as error:
        return found, str(error)
    assert sum(sizes) == path.stat().st_size
    return found, ""


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    items=st.lists(st.dictionaries(NASTY, VALUES | NASTY) | st.lists(NASTY), max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    ascii_=st.booleans(),
    size=st.integers(1, 40),
)
def test_elements_are_those_of_the_list_whatever_the_chunks(
    *,
    items: list[Json],
    indent: int | None,
    ascii_: bool,
    size: int,
    small_chunks: Callable[[int], None],
    tmp_path: Path,
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_)
    path = tmp_path / f"{uuid4()}.json"
    path.write_bytes(text.encode())
    small_chunks(size)
    assert read(path) == (items, "")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    items=st.lists(st.dictionaries(NASTY, NASTY), min_size=1, max_size=4),
    part=st.floats(0, 1, exclude_max=True),
    size=st.integers(1, 40),
)
def test_elements_of_a_cut_list_are_the_first_ones(
    items: list[Json], part: float, size: int, small_chunks: Callable[[int], None], tmp_path: Path
) -> None:
    text = json.dumps(items)
    path = write(tmp_path / f"{uuid4()}.json", text[: int(len(text) * part)])
    small_chunks(size)
    found, why = read(path)
    assert why in ("breaks off", "must be a JSON list")
    assert found == items[: len(found)]
    # All that are complete, in the eyes of a parser too.
    ends = [len(json.dumps(items[:count])) - 1 for count in range(1, len(items) + 1)]
    assert len(found) == sum(end <= path.stat().st_size for end in ends)


# --- Cost ---


def test_statements_grow_with_dialogues_not_with_rows(tenant: str, tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", made_up(20))
    with counted_statements() as sent:
        import_dialogues.Job(tenant, 50, dry_run=False, contexts=True).run([path])
    inserts = Counter(
        match[1] for statement in sent if (match := re.search(r"INSERT INTO (\w+)", statement))
    )
    once = {"modules": 1, "conversations": 1, "conversation_states": 1}
    assert inserts == {**once, "messages": 20, "users": 1, "identities": 1, "contexts": 1}
    # Of each dialogue at most: two of a savepoint, lock, known keys, append.
    assert len(sent) <= 20 * 5 + 24
    with counted_statements() as sent:
        import_dialogues.Job(tenant, 50, dry_run=False).run([path])
    assert [statement.split()[0] for statement in sent] == ["SELECT", "SELECT"]
    with counted_statements() as sent:
        import_dialogues.Job(tenant, 50, dry_run=False, contexts=True).run([path])
    assert [statement.split()[0] for statement in sent if "SAVEPOINT" not in statement] == [
        *("SELECT", "SELECT", "SELECT", "WITH")
    ]


def peak_megabytes(url: str, folder: Path, *arguments: object, status: int = 0) -> int:
    return most_megabytes(command(*arguments), folder, url, status)


def long_file(path: Path, megabytes: int) -> int:
    """Write a file of dialogues of 8 KB; return how many."""
    given = dialogue("ID")
    given["turns"] *= 2
    given["turns"][0]["utterance"] = 'All "work" and [no] play. ' * 150
    text = json.dumps(given)
    count = megabytes * MEGABYTE // len(text)
    with path.open("w") as file:
        file.write("[")
        for number in range(count):
            file.write(("," if number else "") + text.replace('"ID"', f'"long_{number}"', 1))
        file.write("]")
    return count


def test_memory_does_not_grow_with_the_input(
    db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "long.json"
    long_file(path, 1)
    small = peak_megabytes(worker_url, tmp_path, path, "--dry-run")
    long_file(path, 100)
    assert path.stat().st_size > 99 * MEGABYTE
    peak = peak_megabytes(worker_url, tmp_path, path, "--dry-run")
    assert peak < 200
    assert peak < small + 20

    count = long_file(path, 8)
    assert peak_megabytes(worker_url, tmp_path, path, "--tenant", tenant, "--contexts") < 200
    assert ConversationRepository.count(db) == count


def test_memory_is_bounded_for_the_largest_dialogues(
    db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    # Empty objects: what takes the most memory for its length.
    given = dialogue("ID")
    given["turns"][3]["frames"][0]["service_results"] = [{}] * 330_000
    text = json.dumps(given, separators=(",", ":"))
    assert 0.9 * MEGABYTE < len(text) < MEGABYTE
    texts = (text.replace('"ID"', f'"large_{number}"', 1) for number in range(4))
    path = write(tmp_path / "large.json", f"[{','.join(texts)}]")
    options = ("--tenant", tenant, "--batch", 1000, "--contexts")
    assert peak_megabytes(worker_url, tmp_path, path, *options) < 200
    assert (ConversationRepository.count(db), ContextRepository.count(db)) == (4, 8)


def test_memory_is_bounded_for_the_most_faults(tmp_path: Path) -> None:
    given = dialogue("faulty")
    given["turns"][1]["frames"] = [5] * 400_000
    path = write(tmp_path / "faulty.json", json.dumps([given], separators=(",", ":")))
    assert peak_megabytes("postgresql:///unused", tmp_path, path, "--dry-run", status=1) < 200
