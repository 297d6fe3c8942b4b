"""`database history` and `database conversations`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from database import (
    ConversationRepository,
    MessageRepository,
    TenantSession,
    UserRepository,
)
from tests.cli import answer, record, refusal, run, table


@pytest.fixture
def bob(db: TenantSession) -> Any:
    return UserRepository.get_or_create_by_identity(db, "telegram", "5000000000")


@pytest.fixture
def chats(db: TenantSession, bob: Any) -> list[Any]:
    """Two conversations of Bob's with three messages each, and one of nobody's."""
    made = [ConversationRepository.create(db, f"t{n}", user_id=bob.id) for n in range(2)]
    made.append(ConversationRepository.create(db, "other"))
    for chat in made:
        for n in range(3):
            MessageRepository.append(db, chat.id, role="user", content=f"{chat.thread_id}/{n}\n")
    return made


def contents(db: TenantSession, chat: Any) -> list[str]:
    return [message.content for message in MessageRepository.history(db, chat.id)]


@pytest.mark.parametrize("by_id", [False, True])
def test_retrieve_message_history(db: TenantSession, chats: list[Any], by_id: bool) -> None:  # noqa: FBT001
    name = str(chats[0].id) if by_id else "t0"
    shown = table(db, "history", "show", name, "--limit", "2")
    assert [(row["position"], row["role"], row["content"]) for row in shown] == [
        ("2", "user", r"t0/1\n"),
        ("3", "user", r"t0/2\n"),
    ]
    assert [row["content"] for row in answer(db, "history", "show", name)] == contents(db, chats[0])


def test_show_all_of_a_user(db: TenantSession, chats: list[Any]) -> None:
    shown = answer(db, "history", "show", "--user", "telegram:5000000000")
    assert [(row["thread_id"], row["position"]) for row in shown] == [
        (thread, n) for thread in ("t1", "t0") for n in (1, 2, 3)
    ]


def test_export_of_a_conversation(db: TenantSession, chats: list[Any], tmp_path: Path) -> None:
    lines = run(db, "history", "export", "t0").stdout.splitlines()
    messages = MessageRepository.history(db, chats[0].id)
    assert [json.loads(line) for line in lines] == [
        {"thread_id": "t0", **message.to_dict()} for message in messages
    ]
    file = tmp_path / "t0.jsonl"
    told = record(db, "history", "export", "t0", "-o", str(file))
    assert told == {"file": str(file), "lines": "3"}
    assert file.read_text(encoding="utf-8").splitlines() == lines


def test_export_of_a_user(db: TenantSession, chats: list[Any]) -> None:
    lines = run(db, "history", "export", "--user", "telegram:5000000000").stdout.splitlines()
    assert sorted({json.loads(line)["thread_id"] for line in lines}) == ["t0", "t1"]
    assert len(lines) == 6


def test_an_export_without_messages(db: TenantSession, bob: Any) -> None:
    assert run(db, "history", "export", "--user", str(bob.id)).stdout == ""


def test_delete_chat_history(db: TenantSession, chats: list[Any]) -> None:
    user = ("--user", "telegram:5000000000")
    assert "--yes" in refusal(db, "history", "clear", *user)
    assert record(db, "history", "clear", *user, "--yes") == {"cleared": "6"}
    assert [len(contents(db, chat)) for chat in chats] == [0, 0, 3]

    assert record(db, "history", "restore", "t1") == {"restored": "3"}
    assert [len(contents(db, chat)) for chat in chats] == [0, 3, 3]

    assert "--yes" in refusal(db, "history", "purge", *user)
    assert answer(db, "history", "purge", *user, "--yes") == {"purged": 3}
    assert record(db, "history", "restore", *user) == {"restored": "0"}
    assert [len(contents(db, chat)) for chat in chats] == [0, 3, 3]


@pytest.mark.parametrize("command", ["show", "export", "clear", "restore", "purge"])
def test_what_there_is_not(db: TenantSession, other: TenantSession, bob: Any, command: str) -> None:
    ConversationRepository.create(other, "theirs")
    yes = ("--yes",) if command in ("clear", "purge") else ()
    for name in ("theirs", "", "01a201bd-0000-7000-8000-000000000000"):
        assert "no such conversation" in refusal(db, "history", command, name, *yes)
    assert "no such user" in refusal(db, "history", command, "--user", "a@example.com", *yes)


@pytest.mark.parametrize("names", [(), ("t0", "--user", "telegram:5000000000")])
@pytest.mark.parametrize("command", ["show", "export", "clear", "restore", "purge"])
def test_one_of_two_names_must_be_given(
    db: TenantSession, chats: list[Any], command: str, names: tuple[str, ...]
) -> None:
    assert "either a conversation or --user" in run(db, "history", command, *names, status=2).stderr
    assert len(contents(db, chats[0])) == 3


def test_list_conversations(db: TenantSession, chats: list[Any]) -> None:
    assert [row["thread_id"] for row in table(db, "conversations", "list")] == ["other", "t1", "t0"]
    of_bob = table(db, "conversations", "list", "--user", "telegram:5000000000", "--limit", "1")
    assert [(row["thread_id"], row["message_count"]) for row in of_bob] == [("t1", "3")]


@pytest.mark.parametrize("by_id", [False, True])
def test_delete_conversation(db: TenantSession, chats: list[Any], by_id: bool) -> None:  # noqa: FBT001
    name = str(chats[0].id) if by_id else "t0"
    assert "--yes" in refusal(db, "conversations", "delete", name)
    assert answer(db, "conversations", "delete", name, "--yes") == {"deleted": 1}
    assert "no such" in refusal(db, "conversations", "delete", name, "--yes")
    assert ConversationRepository.count(db) == 2


def test_a_thread_goes_before_an_id(db: TenantSession, chats: list[Any]) -> None:
    named = ConversationRepository.create(db, str(chats[0].id))
    run(db, "conversations", "delete", str(chats[0].id), "--yes")
    assert not ConversationRepository.exists(db, named.id)
    assert ConversationRepository.exists(db, chats[0].id)
