"""The import of exported chats, run as a process of its own, on sound files and malformed ones."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

import database
from database import (
    Conversation,
    ConversationRepository,
    Message,
    MessageRepository,
    TenantSession,
    UserRepository,
)
from examples import import_chats, importing
from tests.counting import counted_statements
from tests.running import ROOT, end_of, environment, most_megabytes, read_until

Json = Any
MEGABYTE = 2**20
NOWHERE = "postgresql://me:secret-word@127.0.0.1:1/nowhere"


def command(*arguments: object) -> list[str]:
    script = str(ROOT / "examples" / "import_chats.py")
    return [sys.executable, "-W", "error", script, *map(str, arguments)]


def run(url: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(url),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def reported(output: str) -> dict[str, list[int]]:
    """The numbers of the report: inserted and already there, by table."""
    return {
        name: [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", rest)]
        for name, rest in re.findall(r"^ +(conversations|messages) +(.*)$", output, re.MULTILINE)
    }


Import = Callable[..., tuple[import_chats.Job, list[str]]]


@pytest.fixture
def import_(tenant: str, capsys: pytest.CaptureFixture[str]) -> Import:
    """Imports files in this process; returns the job, and the lines that it told."""

    def run_job(*files: Path, **options: Any) -> tuple[import_chats.Job, list[str]]:
        job = import_chats.Job(tenant, **options)
        job.run(files)
        return job, capsys.readouterr().err.splitlines()

    return run_job


def write(path: Path, value: Json) -> Path:
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def as_lines(items: Sequence[Json]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


# --- Made-up chats ---


def node(id_: str, parent: str | None, role: str = "user", *parts: Json, **fields: Json) -> Json:
    """A node of a tree; without parts it says its own id."""
    content = {"content_type": "text", "parts": list(parts) or [id_]}
    message: Json = {"id": id_, "author": {"role": role, "name": None, "metadata": {}}}
    message |= {"create_time": None, "content": content, "weight": 1.0, "metadata": {}}
    return {"id": id_, "parent": parent, "children": [], "message": {**message, **fields}}


def tree(id_: str, nodes: Sequence[Json], current: str | None = None, **fields: Json) -> Json:
    """A chat of ChatGPT; the nodes' children are those that name them."""
    mapping = {item["id"]: dict(item) for item in nodes}
    for item in nodes:
        if item["parent"] in mapping:
            parent = mapping[item["parent"]]
            parent["children"] = [*parent["children"], item["id"]]
    named: Json = {"title": f"About {id_}", "conversation_id": id_}
    times = {"create_time": 1.7e9, "update_time": 1.7e9 + 60}
    current = current or (nodes[-1]["id"] if nodes else None)
    return {**named, **times, "mapping": mapping, "current_node": current, **fields}


def root(id_: str = "root") -> Json:
    return {"id": id_, "parent": None, "children": [], "message": None}


def chatgpt(id_: str) -> Json:
    """Of two questions; the first has two answers, and the history goes by the first one."""
    nodes = [
        root(),
        node("hidden", "root", "system", "", metadata={"is_visually_hidden_from_conversation": 1}),
        node("q1", "hidden", "user", f"{id_}?"),
        node("a1", "q1", "assistant", create_time=1.7e9 + 1, metadata={"model_slug": "gpt-4o"}),
        node("a1 again", "q1", "assistant"),
        node("q2", "a1"),
        node("a2", "q2", "assistant"),
    ]
    return tree(id_, nodes, "a2")


def openai(id_: str | None = None, said: str = "Hello") -> Json:
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": "Hi"}]
    return {"messages": messages} | ({"id": id_} if id_ else {})


def sharegpt(id_: str | None = None, said: str = "Hello") -> Json:
    turns = [{"from": "human", "value": said}, {"from": "gpt", "value": "Hi"}]
    return {"conversations": turns} | ({"id": id_} if id_ else {})


FORMATS: dict[str, Callable[[str], Json]] = {
    "chatgpt": chatgpt,
    "openai": openai,
    "sharegpt": sharegpt,
}
COUNTS = {"chatgpt": 5, "openai": 2, "sharegpt": 2}


def made_up(count: int) -> list[Json]:
    """Chats of all formats."""
    makers = list(FORMATS.values())
    return [makers[number % 3](f"made-{number:05}") for number in range(count)]


# --- What is stored ---


def messages_of(db: TenantSession, thread: str) -> list[Message]:
    """All messages of a conversation, of whatever branch."""
    return list(
        db.scalars(
            select(Message)
            .join(Conversation, Conversation.id == Message.conversation_id)
            .where(Conversation.thread_id == thread)
            .order_by(Message.position)
            .execution_options(populate_existing=True)
        )
    )


def history(db: TenantSession, thread: str) -> list[str]:
    return [message.content for message in MessageRepository.history(db, thread)]


def stored(db: TenantSession) -> dict[str, Json]:
    """All of a tenant's conversations by thread, but for ids and the times of the import."""
    found = {}
    query = select(Conversation).execution_options(populate_existing=True)
    for conversation in list(db.scalars(query)):
        rows = messages_of(db, conversation.thread_id)
        places = {row.id: row.position for row in rows}
        shown = history(db, conversation.thread_id)
        assert conversation.message_count == len(shown)
        assert conversation.last_position == len(rows)
        assert [row.position for row in rows] == list(range(1, len(rows) + 1))
        found[conversation.thread_id] = (
            (conversation.title, conversation.last_message, conversation.metadata_),
            [
                (
                    *(row.role, row.content, row.thinking, row.model, row.extra_data),
                    row.parent_id and places[row.parent_id],
                )
                for row in rows
            ],
            shown,
            [
                (branch.head.position, branch.start, branch.is_active)
                for branch in ConversationRepository.branches(db, conversation.id)
            ],
        )
    db.rollback()
    return found


def threads(db: TenantSession) -> set[str]:
    return set(db.scalars(select(Conversation.thread_id)))


# --- ChatGPT ---


def test_a_chat_of_chatgpt(db: TenantSession, import_: Import, tmp_path: Path) -> None:
    job, told = import_(write(tmp_path / "conversations.json", [chatgpt("c")]))
    assert told == []
    assert dict(job.written) == {"conversations": 1, "messages": 5}
    assert history(db, "chatgpt:c") == ["c?", "a1", "q2", "a2"]
    conversation = ConversationRepository.get_by_thread_id(db, "chatgpt:c")
    assert conversation
    assert conversation.title == "About c"
    assert conversation.created_at == datetime.fromtimestamp(1.7e9, UTC)
    assert conversation.updated_at == datetime.fromtimestamp(1.7e9 + 60, UTC)
    assert conversation.metadata_["source"] == "chatgpt"
    assert conversation.last_message == "a2"
    heads = {
        branch.head.content: branch.is_active
        for branch in ConversationRepository.branches(db, "chatgpt:c")
    }
    assert heads == {"a1 again": False, "a2": True}
    question, answer, *_ = messages_of(db, "chatgpt:c")
    assert question.role.value == "user"
    # A message without a time has that of the one before it.
    assert question.created_at == datetime.fromtimestamp(1.7e9, UTC)
    assert answer.created_at == datetime.fromtimestamp(1.7e9 + 1, UTC)
    assert (question.model, answer.model) == (None, "gpt-4o")
    assert question.extra_data == {"id": "q1", "weight": 1.0}
    metadata = {"model_slug": "gpt-4o"}
    assert answer.extra_data == {"id": "a1", "weight": 1.0, "metadata": metadata}

    ConversationRepository.switch(db, "chatgpt:c", messages_of(db, "chatgpt:c")[4])
    assert history(db, "chatgpt:c") == ["c?", "a1 again"]
    MessageRepository.append(db, "chatgpt:c", role="user", content="Go on")
    assert history(db, "chatgpt:c") == ["c?", "a1 again", "Go on"]


@st.composite
def trees(draw: st.DrawFn) -> tuple[dict[str, str | None], set[str], str]:
    """The parents of a tree's nodes, those nodes that say nothing, and the current one."""
    count = draw(st.integers(1, 12))
    parents: dict[str, str | None] = {}
    for number in range(count):
        place = draw(st.integers(-1, number - 1))
        parents[f"n{number}"] = None if place < 0 else f"n{place}"
    empty = {name for name in parents if draw(st.integers(0, 4)) == 0}
    return parents, empty, draw(st.sampled_from(sorted(parents)))


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=trees(), order=st.randoms(use_true_random=False))
def test_every_branch_of_a_tree_is_there_and_the_current_one_is_shown(
    *,
    drawn: tuple[dict[str, str | None], set[str], str],
    order: random.Random,
    db: TenantSession,
    tenant: str,
    tmp_path: Path,
) -> None:
    parents, empty, current = drawn
    nodes = [
        root(name) | {"parent": parent} if name in empty else node(name, parent)
        for name, parent in parents.items()
    ]
    order.shuffle(nodes)  # a mapping need not begin with its root
    id_ = str(uuid4())
    job = import_chats.Job(tenant)
    job.run([write(tmp_path / "tree.json", [tree(id_, nodes, current)])])
    assert job.problems == 0

    def path(name: str | None) -> list[str]:
        if name is None:
            return []
        return path(parents[name]) + ([name] if name not in empty else [])

    thread = f"chatgpt:{id_}"
    assert history(db, thread) == path(current)
    rows = messages_of(db, thread)
    db.rollback()
    assert sorted(row.content for row in rows) == sorted(parents.keys() - empty)
    for row in rows:
        shown = MessageRepository.history_to(db, row.id)
        assert [message.content for message in shown] == path(row.content)
    paths = [path(name) for name in parents]
    ends = {p[-1] for p in paths if p and not any(q[:-1] == p for q in paths)}
    branches = ConversationRepository.branches(db, thread)
    assert {branch.head.content for branch in branches} == ends
    active = [branch.head.content for branch in branches if branch.is_active]
    assert active == [name for name in path(current)[-1:] if name in ends]


def test_siblings_stay_in_their_order(db: TenantSession, import_: Import, tmp_path: Path) -> None:
    item = tree("c", [node("q", None), node("one", "q"), node("two", "q"), node("three", "q")])
    item["mapping"]["q"]["children"] = ["three", "one", "gone"]
    import_(write(tmp_path / "some.json", [item]))
    assert [row.content for row in messages_of(db, "chatgpt:c")] == ["q", "three", "one", "two"]
    assert history(db, "chatgpt:c") == ["q", "three"]


def test_a_tree_without_a_current_node_shows_its_last_branch(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    item = tree("c", [node("q", None), node("one", "q"), node("two", "q")]) | {"current_node": None}
    import_(write(tmp_path / "some.json", [item, tree("none", []), openai() | {"messages": []}]))
    assert history(db, "chatgpt:c") == ["q", "two"]
    assert ConversationRepository.count(db) == 3, "also those without a message"


def test_a_deep_chat_and_one_of_many_branches(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    deep = [node("n0", None)] + [node(f"n{n}", f"n{n - 1}") for n in range(1, 5000)]
    wide = [node("q", None)] + [node(f"a{n}", "q", "assistant") for n in range(30)]
    items = [tree("deep", deep), tree("wide", wide, "a7")]
    _, told = import_(write(tmp_path / "some.json", items))
    assert told == []
    assert len(messages_of(db, "chatgpt:deep")) == 5000
    assert history(db, "chatgpt:wide") == ["q", "a7"]
    assert len(ConversationRepository.branches(db, "chatgpt:wide")) == 30


PICTURE = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://f1", "width": 8}
HEARD = {"content_type": "audio_transcription", "text": "Good morning", "direction": "in"}
CONTENTS: list[tuple[str, Json, tuple[str, str, str | None]]] = [
    ("user", {"content_type": "text", "parts": ["a", "b"]}, ("user", "a\nb", None)),
    (
        "user",
        {"content_type": "multimodal_text", "parts": [PICTURE, "What is it?"]},
        ("user", "[image_asset_pointer file-service://f1]\nWhat is it?", None),
    ),
    ("user", {"content_type": "multimodal_text", "parts": [HEARD]}, ("user", HEARD["text"], None)),
    ("user", {"content_type": "multimodal_text", "parts": [{}, None]}, ("user", "[]", None)),
    (
        "assistant",
        {"content_type": "code", "language": "python", "text": "1 + 1"},
        ("assistant", "1 + 1", None),
    ),
    ("tool", {"content_type": "execution_output", "text": "2"}, ("tool", "2", None)),
    ("tool", {"content_type": "execution_output", "text": ""}, ("tool", "", None)),
    (
        "assistant",
        {
            "content_type": "thoughts",
            "thoughts": [{"summary": "Adding", "content": "One and one"}, {"summary": "Done"}],
        },
        ("assistant", "", "Adding\nOne and one\nDone"),
    ),
    (
        "assistant",
        {"content_type": "reasoning_recap", "content": "Thought for 5 seconds"},
        ("assistant", "", "Thought for 5 seconds"),
    ),
    (
        "tool",
        {"content_type": "tether_quote", "url": "https://example.com", "text": "A quote"},
        ("tool", "A quote", None),
    ),
    (
        "tool",
        {"content_type": "tether_browsing_display", "result": "Found", "summary": None},
        ("tool", "Found", None),
    ),
    ("tool", {"content_type": "system_error", "name": "E", "text": "Oh"}, ("tool", "Oh", None)),
    (
        "user",
        {"content_type": "user_editable_context", "user_profile": "I", "user_instructions": "Be"},
        ("system", "I\nBe", None),
    ),
    ("developer", {"content_type": "text", "parts": ["Be brief"]}, ("system", "Be brief", None)),
    ("tool", {"content_type": "of tomorrow", "what": {"ever": 1}}, ("tool", "", None)),
]


@pytest.mark.parametrize(
    ("role", "content", "row"),
    CONTENTS,
    ids=[given_["content_type"] for _, given_, _ in CONTENTS],
)
def test_what_a_message_may_be(
    *,
    role: str,
    content: Json,
    row: tuple[str, str, str | None],
    db: TenantSession,
    import_: Import,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "some.json", [tree("c", [node("m", None, role, content=content)])])
    assert import_(path)[1] == []
    (found,) = messages_of(db, "chatgpt:c")
    assert (found.role.value, found.content, found.thinking) == row
    assert found.extra_data
    # All that is not in a column stays.
    plain = content == {"content_type": "text", "parts": [found.content]}
    assert found.extra_data.get("content") == (None if plain else content)


@pytest.mark.parametrize(
    "content",
    [
        {"content_type": "text", "parts": [""]},
        {"content_type": "text", "parts": []},
        {"content_type": "text"},
        {"content_type": "multimodal_text", "parts": ["", None]},
        {"content_type": "thoughts", "thoughts": []},
        {"content_type": "user_editable_context", "user_profile": ""},
    ],
)
def test_a_message_that_says_nothing_is_passed_over(
    content: Json, db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    nodes = [node("q", None), node("m", "q", "system", content=content), node("a", "m")]
    import_(write(tmp_path / "some.json", [tree("c", nodes), tree("d", nodes, "m")]))
    assert history(db, "chatgpt:c") == ["q", "a"]
    assert history(db, "chatgpt:d") == ["q"]


# --- OpenAI and ShareGPT ---


def test_a_line_of_openai(db: TenantSession, import_: Import, tmp_path: Path) -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    item = {
        "id": 7,
        "model": "gpt-5",
        "created": 1_700_000_000,
        "tools": [{"type": "function"}],
        "messages": [
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": [{"type": "text", "text": "What?"}, image], "name": "ada"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "{}", "tool_call_id": "call-1"},
            {"role": "function", "name": "f", "content": "old"},
            {"role": "assistant", "reasoning_content": "Hm", "content": "That", "weight": 0},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]},
        ],
    }
    assert import_(write(tmp_path / "some.jsonl", as_lines([item])))[1] == []
    rows = [
        (row.role.value, row.content, row.thinking, row.tool_call_id, row.extra_data)
        for row in MessageRepository.history(db, "openai:7")
    ]
    assert rows == [
        ("system", "Be brief", None, None, {"role": "developer"}),
        (
            *("user", "What?\n[image_url]", None, None),
            {"content": item["messages"][1]["content"], "name": "ada"},  # type: ignore[index]
        ),
        ("assistant", "", None, None, {"tool_calls": [call]}),
        ("tool", "{}", None, "call-1", None),
        ("tool", "old", None, None, {"role": "function", "name": "f"}),
        ("assistant", "That", "Hm", None, {"weight": 0}),
        ("assistant", "No", None, None, {"content": [{"type": "refusal", "refusal": "No"}]}),
    ]
    models = {row.role.value: row.model for row in messages_of(db, "openai:7")}
    assert models == {"system": None, "user": None, "tool": None, "assistant": "gpt-5"}
    conversation = ConversationRepository.get_by_thread_id(db, "openai:7")
    assert conversation
    assert conversation.title == "What? [image_url]"
    assert conversation.created_at == datetime.fromtimestamp(1.7e9, UTC)
    assert conversation.metadata_["item"] == {"tools": [{"type": "function"}]}


def test_a_name_that_is_too_long_for_its_column_is_cut_and_kept(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    long, other, model = "i" * 300, "i" * 299 + "j", "m" * 256
    calls = [{"id": id_, "type": "function", "function": {"name": "f"}} for id_ in (long, other)]
    messages: Json = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "content": "a", "tool_call_id": id_} for id_ in (long, other, long)),
        {"role": "tool", "content": "b", "tool_call_id": "i" * 255},
    ]
    line = {"id": "c", "model": model, "messages": messages}
    item = chatgpt("g")
    item["mapping"]["a1"]["message"]["metadata"]["model_slug"] = model
    path = write(tmp_path / "some.json", [line, item])
    _, told = import_(path)
    assert told == []
    asked, *results, fits = messages_of(db, "openai:c")
    ids = [message.tool_call_id for message in results]
    assert ids[0] == ids[2] != ids[1]
    assert {len(id_ or "") for id_ in ids} == {255}
    assert [message.extra_data for message in results] == [
        {"tool_call_id": id_} for id_ in (long, other, long)
    ]
    assert (fits.tool_call_id, fits.extra_data) == ("i" * 255, None)
    assert asked.model is not None
    assert (asked.model[:100], len(asked.model)) == ("m" * 100, 255)
    assert asked.extra_data == {"tool_calls": calls, "model": model}
    a1 = next(message for message in messages_of(db, "chatgpt:g") if message.content == "a1")
    assert a1.model == asked.model
    assert a1.extra_data is not None
    assert a1.extra_data["metadata"]["model_slug"] == a1.extra_data["model"] == model
    assert import_(path)[0].there["conversations"] == 2


def test_an_item_of_sharegpt(db: TenantSession, import_: Import, tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Add up"},
        {"from": "function_call", "value": '{"name": "add"}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two", "weight": 1},
    ]
    item = {"id": "s", "system": "Be kind", "conversations": turns, "tools": "[]"}
    assert import_(write(tmp_path / "some.json", [item]))[1] == []
    assert [
        (row.role.value, row.content, row.extra_data)
        for row in MessageRepository.history(db, "sharegpt:s")
    ] == [
        ("system", "Be kind", None),
        ("user", "Add up", None),
        ("assistant", '{"name": "add"}', {"from": "function_call"}),
        ("tool", "2", None),
        ("assistant", "Two", {"weight": 1}),
    ]


@pytest.mark.parametrize(
    ("title", "said", "expected"),
    [
        (None, "Hello\n  there", "Hello there"),
        ("", "Hello", "Hello"),
        (None, "字" * 200, "字" * 79 + "…"),
        ("T" * 900, "Hello", "T" * 500),
        (None, " ", None),
    ],
)
def test_titles(
    *,
    title: str | None,
    said: str,
    expected: str | None,
    db: TenantSession,
    import_: Import,
    tmp_path: Path,
) -> None:
    import_(write(tmp_path / "some.json", [openai("t", said) | {"title": title}]))
    conversation = ConversationRepository.get_by_thread_id(db, "openai:t")
    assert conversation
    assert conversation.title == expected


# --- Which format ---


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("form", ["list", "indented list", "lines", "spaced lines"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_known_by_their_content(
    *, name: str, form: str, bom: str, db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    items = [FORMATS[name](f"i{number}") for number in range(3)]
    text = {
        "list": json.dumps(items),
        "indented list": "\n " + json.dumps(items, indent=2) + "\n",
        "lines": as_lines(items),
        "spaced lines": "\n" + as_lines(items).replace("\n", "\r\n \r\n"),
    }[form]
    job, told = import_(write(tmp_path / "some", bom + text))
    assert told == []
    assert threads(db) == {f"{name}:i{number}" for number in range(3)}
    assert dict(job.written) == {"conversations": 3, "messages": 3 * COUNTS[name]}


def test_one_file_may_have_several(db: TenantSession, import_: Import, tmp_path: Path) -> None:
    items = [maker("x") for maker in FORMATS.values()]
    assert import_(write(tmp_path / "some.jsonl", as_lines(items)))[1] == []
    assert threads(db) == {"chatgpt:x", "openai:x", "sharegpt:x"}


# --- Again, killed, and at once ---


def test_a_second_run_writes_nothing(
    db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    items = [*made_up(9), openai(), sharegpt(), openai()]  # one of them twice
    path = write(tmp_path / "some.json", items)
    first = run(worker_url, tmp_path, path, "--tenant", tenant)
    assert (first.returncode, first.stderr) == (0, "")
    assert reported(first.stdout) == {"conversations": [11, 1], "messages": [31, 2]}
    before = {row.id: row.to_dict() for row in db.scalars(select(Conversation))}
    messages = set(db.scalars(select(Message.id)))
    db.rollback()
    again = run(worker_url, tmp_path, path, "--tenant", tenant)
    assert (again.returncode, again.stderr) == (0, "")
    assert reported(again.stdout) == {"conversations": [0, 12], "messages": [0, 33]}
    db.expire_all()
    assert {row.id: row.to_dict() for row in db.scalars(select(Conversation))} == before
    assert set(db.scalars(select(Message.id))) == messages


def test_other_content_of_the_same_chat_is_told_and_left_alone(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    path = write(tmp_path / "some.json", [chatgpt("c"), openai("o"), openai("o", "Other")])
    _, told = import_(path)
    assert told == [f"{path}: element 2: is there with other content"]
    before = stored(db)
    grown = chatgpt("c")
    grown["mapping"]["q3"] = node("q3", "a2")
    write(path, [grown | {"current_node": "q3"}])
    job, told = import_(path)
    assert told == [f"{path}: element 0: is there with other content"]
    assert not job.written
    assert stored(db) == before
    ConversationRepository.delete(db, "chatgpt:c")
    assert import_(path)[1] == []
    assert history(db, "chatgpt:c") == ["c?", "a1", "q2", "a2", "q3"]


def test_what_a_later_export_says_about_the_same_messages_does_not_matter(
    import_: Import, tmp_path: Path
) -> None:
    path = write(tmp_path / "some.json", [chatgpt("c")])
    import_(path)
    later = chatgpt("c") | {"title": "Renamed", "update_time": 1.8e9, "is_archived": True}
    later["mapping"]["a1"]["message"]["metadata"]["new"] = "field"
    job, told = import_(write(path, [later]))
    assert told == []
    assert dict(job.there) == {"conversations": 1, "messages": 5}


def test_messages_with_the_same_ids_are_each_their_own(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    """As ChatGPT has them in a chat that goes on from another one."""
    nodes = [node("q", None), node("a", "q")]
    import_(write(tmp_path / "some.json", [tree("one", nodes), tree("two", nodes)]))
    rows = messages_of(db, "chatgpt:one") + messages_of(db, "chatgpt:two")
    assert len({row.id for row in rows}) == 4
    assert [row.extra_data["id"] for row in rows if row.extra_data] == ["q", "a", "q", "a"]


def test_killed_anywhere_it_is_as_if_it_had_run_once(
    db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "many.json", made_up(240))
    once = f"{tenant}-once"
    assert run(worker_url, tmp_path, path, "--tenant", once).returncode == 0
    with database.SessionLocal(tenant_id=once) as other:
        expected = stored(other)
    assert len(expected) == 240
    before = 0
    for _ in range(3):
        with subprocess.Popen(
            command(path, "--tenant", tenant),
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
        # Each chat with all of its branches, or not at all.
        assert there == {thread: expected[thread] for thread in there}
        assert before < len(there)
        before = len(there)
    assert before < len(expected), "killed too late to show anything"

    done = run(worker_url, tmp_path, path, "--tenant", tenant)
    assert (done.returncode, done.stderr) == (0, "")
    assert reported(done.stdout)["conversations"] == [240 - before, before]
    assert stored(db) == expected


def test_two_at_once_make_one_import(
    db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    items = made_up(60)
    one, two = (write(tmp_path / f"{n}.json", items) for n in range(2))
    jobs = [
        subprocess.Popen(
            command(path, "--tenant", tenant, "--email", "ada@example.com"),
            cwd=tmp_path,
            env=environment(worker_url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in (one, two)
    ]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [(job.returncode, error) for job, (_, error) in zip(jobs, outputs, strict=True)] == [
        (0, ""),
        (0, ""),
    ]
    reports = [reported(output)["conversations"] for output, _ in outputs]
    assert sum(inserted for inserted, _ in reports) == len(stored(db)) == 60
    assert [sum(report) for report in reports] == [60, 60]


# --- Malformed input ---


def changed(**fields: Json) -> Json:
    """A chat of which the message q1 is changed."""
    item = chatgpt("broken")
    item["mapping"]["q1"]["message"] |= fields
    return item


def said(**fields: Json) -> Json:
    return {"messages": [{"role": "user", "content": "Hello"}, {"role": "user", **fields}]}


CIRCLE = tree("c", [node("a", "b"), node("b", "a"), node("c", None)])
DEEP = json.loads("[" * 300 + "]" * 300)
ITEMS: list[tuple[Json, str]] = [
    (5, "must be a JSON object"),
    ([], "must be a JSON object"),
    ({}, "must have mapping (ChatGPT), messages (OpenAI) or conversations (ShareGPT)"),
    ({"mapping": []}, "mapping: Input should be a valid dictionary"),
    (chatgpt("c") | {"conversation_id": ""}, "conversation_id: String should match"),
    (chatgpt("c\n"), "conversation_id: String should match"),
    (chatgpt("c" * 201), "conversation_id: String should match"),
    (openai("c") | {"id": True}, "id: Input should be a valid string"),
    (chatgpt("c") | {"title": 5}, "title: Input should be a valid string"),
    (chatgpt("c") | {"create_time": "soon"}, "create_time: "),
    (chatgpt("c") | {"create_time": 1e300}, "create_time: "),
    (chatgpt("c") | {"current_node": "nowhere"}, "current_node: must be in mapping"),
    (tree("c", [node("a", "gone")]), "mapping.a: parent: must be in mapping"),
    (CIRCLE, "mapping: nodes follow one another in a circle"),
    (tree("c", [node("a\x1b[2J", None)]), "mapping: ids must be printable"),
    (tree("c", [node("a" * 201, None)]), "mapping: ids must be printable, of at most 200"),
    ({"mapping": {"a": 5}}, "mapping.a: Input should be a valid dictionary"),
    (changed(author={"role": "critic"}), "mapping.q1: message.author.role: Input should be 'user'"),
    (changed(author=None), "mapping.q1: message.author: Input should be a valid dictionary"),
    (changed(content=None), "mapping.q1: message.content: Input should be a valid dictionary"),
    (changed(content={"parts": []}), "mapping.q1: message.content.content_type: Field required"),
    (changed(content={"content_type": "text", "parts": [5]}), "mapping.q1: parts of a message"),
    (changed(content={"content_type": "thoughts", "thoughts": [5]}), "mapping.q1: thoughts must"),
    (changed(create_time=float("nan")), "mapping.q1: message.create_time: "),
    (changed(deep=DEEP), "extra_data: must be JSON"),
    (changed(long=2**70), "extra_data: must be JSON"),
    (
        openai("c") | {"created": "0001-01-01T00:00:00+14:00"},
        "created_at: must be from the years 1",
    ),
    ({"messages": {}}, "messages: Input should be a valid list"),
    ({"messages": [5]}, "messages.0: Input should be a valid dictionary"),
    (said(content=5), "messages.1: Value error, must have content, a text or a list of parts"),
    (said(), "messages.1: Value error, must have content"),
    (said(content="a", role="bot"), "messages.1.role: Input should be 'user'"),
    (said(content=[5]), "messages.1: parts of a message must be texts or objects"),
    (said(content="a", tool_call_id=5), "messages.1.tool_call_id: Input should be a valid string"),
    ({"conversations": [{"from": "me", "value": "a"}]}, "conversations.0.from: Input should be"),
    ({"conversations": [{"from": "human"}]}, "conversations.0.value: Field required"),
    ({"conversations": [{"from": "human", "value": None}]}, "conversations.0.value: Input should"),
]


@pytest.mark.parametrize(("item", "reason"), ITEMS, ids=[reason for _, reason in ITEMS])
def test_a_malformed_item_is_told_and_the_others_imported(
    item: Json, reason: str, db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    path = write(tmp_path / "some.json", [openai("first"), item, openai("last")])
    job, (line,) = import_(path)
    assert line.startswith(f"{path}: element 1: {reason}")
    assert job.problems == 1
    assert threads(db) == {"openai:first", "openai:last"}
    assert len(list(db.scalars(select(Message.id)))) == 4


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [}', "not JSON: Expecting value"),
        (b'{"messages": [', "not JSON: Expecting value"),
        (b'{"messages": []} {}', "not JSON: Extra data"),
        (b'{"messages": [{"role": "user", "content": "\xe4"}]}', "not JSON: utf-8"),
        (b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        (b'{"n": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"\x00", "not JSON: Expecting value"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_a_malformed_line_is_told_and_the_others_imported(
    line: bytes, reason: str, db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    first, last = (json.dumps(openai(id_)).encode() for id_ in ("first", "last"))
    path = write(tmp_path / "some.jsonl", b"\n".join([first, b"", line, last]))
    _, (told,) = import_(path)
    assert told.startswith(f"{path}: line 3: {reason}")
    assert threads(db) == {"openai:first", "openai:last"}


SOUND = json.dumps([openai("a"), openai("b")])
LINES = as_lines([openai("a"), openai("b")])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SOUND[:-1], "after element 1: breaks off"),
        (SOUND[:-1] + ', {"messages": [{"rol', "after element 1: breaks off"),
        (SOUND + "]", "after element 1: must be one JSON list"),
        (SOUND[:-1] + ", x]", "element 2: not JSON: Expecting value"),
        (LINES + '{"messages": [{"rol', "line 3: not JSON: Unterminated string"),
    ],
)
def test_what_stands_before_a_break_is_imported(
    text: str, reason: str, db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    path = write(tmp_path / "cut", text)
    _, (line,) = import_(path, write(tmp_path / "whole.json", [openai("c")]))
    assert line.startswith(f"{path}: {reason}")
    assert threads(db) == {"openai:a", "openai:b", "openai:c"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n",
        b"\xef\xbb\xbf",
        b"PK\x03\x04 a zip file",
        b"role,content\nuser,Hello\n",
        b"<html></html>",
        b'"text"',
        SOUND.encode("utf-16"),
        LINES.encode("utf-16-le"),
        json.dumps(chatgpt("c"), indent=2).encode(),
    ],
)
def test_a_file_of_no_known_format(content: bytes, import_: Import, tmp_path: Path) -> None:
    path = write(tmp_path / "some", content)
    job, told = import_(path)
    rule = "must be a JSON list, or lines of JSON objects, in UTF-8"
    assert told == [f"{path}: at its start: {rule}"]
    assert not job.written


def test_what_cannot_be_stored_is_replaced(
    db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    dirty = "a\x00b\ud800"
    items = [
        tree("c", [node("m", None, "user", dirty, note=dirty)], title=dirty),
        openai("o", dirty),
        sharegpt("s", dirty),
        sharegpt(None, dirty),
    ]
    path = write(tmp_path / "some.json", items)
    for _ in range(2):
        assert import_(path)[1] == []
    found = list(db.scalars(select(Message).where(Message.role == "user")))
    assert {message.content for message in found} == {"a\ufffdb\ufffd"}
    assert {"id": "m", "weight": 1.0, "note": "a\ufffdb\ufffd"} in [row.extra_data for row in found]


def test_a_refused_chat_leaves_nothing_behind(
    db: TenantSession, import_: Import, worker_url: str, tmp_path: Path
) -> None:
    database.configure(url=worker_url, unstorable="error")
    nodes = [node("q", None), node("a", "q"), node("b", "q", "user", "a\x00b")]
    path = write(tmp_path / "some.json", [tree("c", nodes), openai("o")])
    _, (line,) = import_(path)
    assert line.startswith(f"{path}: element 0: content: ")
    assert threads(db) == {"openai:o"}
    assert MessageRepository.count(db) == 2


# --- Large input ---


@pytest.mark.parametrize("form", ["list", "lines"])
def test_a_message_of_20_megabytes(
    form: str, db: TenantSession, import_: Import, tmp_path: Path
) -> None:
    large = "All work and no play. " * (20 * MEGABYTE // 22)
    items = [openai("large", large), openai("small")]
    text = json.dumps(items) if form == "list" else as_lines(items)
    assert import_(write(tmp_path / "some", text))[1] == []
    assert history(db, "openai:large") == [large, "Hi"]
    assert history(db, "openai:small") == ["Hello", "Hi"]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_an_item_that_is_too_large_is_left_out(
    form: str,
    db: TenantSession,
    import_: Import,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(import_chats, "MAX_ITEM_BYTES", 200_000)
    items = [openai("a"), openai("large", "long " * 50_000), openai("b")]
    text = json.dumps(items) if form == "list" else as_lines(items)
    path = write(tmp_path / "some", text)
    _, told = import_(path)
    place = "element 1" if form == "list" else "line 2"
    assert told == [f"{path}: {place}: more than 200,000 bytes"]
    assert threads(db) == {"openai:a", "openai:b"}


@given(
    given_lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b""))),
    largest=st.integers(1, 8),
    ends=st.booleans(),
)
def test_lines_are_those_of_the_file(*, given_lines: list[bytes], largest: int, ends: bool) -> None:
    text = b"\n".join(given_lines) + (b"\n" if ends and given_lines else b"")
    sizes: list[int] = []
    found = list(importing.lines(BytesIO(text), sizes.append, largest))
    assert sum(sizes) == len(text)
    expected = [line if len(line) <= largest else None for line in BytesIO(text)]
    assert found == expected


def long_file(path: Path, megabytes: int, form: str) -> Path:
    """Write a file of chats of 8 KB."""
    item = chatgpt("ID")
    item["mapping"]["a1"]["message"]["content"]["parts"] = ['All "work" and [no] play. ' * 240]
    text = json.dumps(item)
    start, between, end = ("[", ", ", "]") if form == "list" else ("", "\n", "\n")
    with path.open("w") as file:
        for number in range(megabytes * MEGABYTE // len(text)):
            file.write((between if number else start) + text.replace('"ID"', f'"long-{number}"'))
        file.write(end)
    return path


@pytest.mark.parametrize("form", ["list", "lines"])
def test_memory_does_not_grow_with_the_input(
    form: str, db: TenantSession, tenant: str, worker_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "long"
    small, large = (
        most_megabytes(command(long_file(path, size, form), "--dry-run"), tmp_path, worker_url)
        for size in (1, 100)
    )
    assert path.stat().st_size > 99 * MEGABYTE
    assert large < 200
    assert large < small + 20
    long_file(path, 3, form)
    assert most_megabytes(command(path, "--tenant", tenant), tmp_path, worker_url) < 200
    assert ConversationRepository.count(db) > 250


# --- Options ---


def test_tenants_and_users_stay_apart(fresh_url: str, tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", made_up(3))
    ada = ("--tenant", "one", "--email", "Ada@example.com")
    assert run(fresh_url, tmp_path, path, *ada).returncode == 0
    assert run(fresh_url, tmp_path, path, *ada).returncode == 0
    assert run(fresh_url, tmp_path, path, "--tenant", "two").returncode == 0
    database.configure(url=fresh_url)
    with database.SessionLocal(tenant_id="two") as db:
        assert len(threads(db)) == 3
        assert UserRepository.count(db) == 0
    with database.SessionLocal(tenant_id="one") as db:
        assert ConversationRepository.count_by_user(db, "ada@example.com") == 3
        bob = UserRepository.create(db, email="bob@example.com")
        more = write(tmp_path / "more.json", [openai("bob's"), openai("made-00001", "Other")])
        done = run(fresh_url, tmp_path, more, path, "--tenant", "one", "--user", bob.id)
        assert done.returncode == 1
        assert f"{more}: element 1: is there with other content" in done.stderr
        for number in range(3):
            told = f"{path}: element {number}: is there as another user's"
            assert told in done.stderr.splitlines()
        assert ConversationRepository.count_by_user(db, "bob@example.com") == 1
        assert ConversationRepository.count_by_user(db, "ada@example.com") == 3


def test_a_user_who_is_not_there(worker_url: str, tenant: str, tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", made_up(1))
    for option in (("--user", uuid4()), ("--email", "no address")):
        done = run(worker_url, tmp_path, path, "--tenant", tenant, *option)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("stopped: ")
        assert reported(done.stdout)["conversations"] == [0, 0]


def test_a_dry_run_needs_no_database(tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", [*made_up(3), {"messages": 5}])
    done = run(NOWHERE, tmp_path, path, "--dry-run")
    assert done.returncode == 1
    assert done.stderr == f"{path}: element 3: messages: Input should be a valid list\n"
    assert reported(done.stdout) == {"conversations": [3], "messages": [9]}


def test_it_works_on_a_fresh_machine(empty_url: str, tmp_path: Path) -> None:
    done = run(empty_url, tmp_path, write(tmp_path / "some.json", made_up(3)))
    assert (done.returncode, done.stderr) == (0, "")
    database.configure(url=empty_url)
    with database.SessionLocal() as db:
        assert len(threads(db)) == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: FILE"),
        (["missing.json"], "no such file: missing.json"),
        (["."], "no such file: ."),
        (["some.json", "--tenant", "no name"], "argument --tenant: invalid tenant value"),
        (["some.json", "--user", "ada"], "argument --user: invalid UUID value"),
        (["some.json", "--user", str(uuid4()), "--email", "a@b.c"], "not allowed with argument"),
    ],
)
def test_wrong_arguments(arguments: list[str], reason: str, tmp_path: Path) -> None:
    write(tmp_path / "some.json", [])
    done = run(NOWHERE, tmp_path, *arguments)
    assert done.returncode == 2
    assert reason in done.stderr


def test_without_a_database_it_says_so(tmp_path: Path) -> None:
    done = run(NOWHERE, tmp_path, write(tmp_path / "some.json", made_up(1)))
    assert done.returncode == 1
    assert done.stderr.startswith("stopped: ")
    assert "Traceback" not in done.stderr
    assert "secret-word" not in done.stderr + done.stdout


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", made_up(3))
    terminal, slave = pty.openpty()
    with subprocess.Popen(
        command(path, "--dry-run"),
        cwd=tmp_path,
        env=environment(NOWHERE, TERM="xterm"),
        stdout=subprocess.DEVNULL,
        stderr=slave,
    ):
        os.close(slave)
        shown = read_until(terminal, None)
    os.close(terminal)
    assert "importing" in shown
    assert "100%" in shown


# --- Cost ---


def test_statements_grow_neither_with_messages_nor_with_branches(
    tenant: str, tmp_path: Path
) -> None:
    linear = [node("n0", None)] + [node(f"n{n}", f"n{n - 1}") for n in range(1, 300)]
    path = write(tmp_path / "some.json", [tree("linear", linear)])
    with counted_statements() as sent:
        import_chats.Job(tenant).run([path])
    assert [statement.split()[0] for statement in sent] == ["SELECT", "INSERT", "WITH", "UPDATE"]
    with counted_statements() as sent:
        import_chats.Job(tenant).run([path])
    assert [statement.split()[0] for statement in sent] == ["SELECT"]

    def wide(branches: int) -> int:
        nodes = [node("q", None)] + [node(f"a{n}", "q", "assistant") for n in range(branches)]
        chat = write(tmp_path / "wide.json", [tree(f"wide {branches}", nodes, "a1")])
        with counted_statements() as sent:
            import_chats.Job(tenant).run([chat])
        return len(sent)

    assert wide(2000) == wide(3) < 30
