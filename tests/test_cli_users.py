"""`database users`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from database import (
    ContextRepository,
    ConversationRepository,
    MessageRepository,
    TenantSession,
    UserRepository,
)
from database.cli import naming
from tests.cli import answer, record, refusal, run, table


@pytest.fixture
def ada(db: TenantSession) -> Any:
    return UserRepository.get_or_create(db, "ada@example.com")


@pytest.fixture
def bob(db: TenantSession) -> Any:
    return UserRepository.get_or_create_by_identity(
        db, "telegram", "5000000000", username="bob", first_name="Bob"
    )


def test_list_users_shows_how_each_is_known(db: TenantSession, ada: Any, bob: Any) -> None:
    first, second = table(db, "users", "list")
    assert (first["id"], first["identities"]) == (str(bob.id), "telegram:5000000000")
    assert (first["username"], first["first_name"], first["email"]) == ("bob", "Bob", "")
    assert (second["email"], second["is_admin"]) == ("ada@example.com", "no")


def test_list_streams_over_all_pages(db: TenantSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "PAGE", 3)
    made = UserRepository.create_many(db, [{"username": f"u{n}"} for n in range(7)])
    newest_first = [str(user.id) for user in sorted(made, key=lambda u: (u.created_at, u.id))][::-1]
    assert [row["id"] for row in answer(db, "users", "list")] == newest_first
    for limit in (1, 3, 4, 6, 7, 8):
        shown = answer(db, "users", "list", "--limit", str(limit))
        assert [row["id"] for row in shown] == newest_first[:limit]


def test_an_empty_list(db: TenantSession) -> None:
    assert answer(db, "users", "list") == []
    assert table(db, "users", "list") == []


def test_a_list_is_of_one_tenant(db: TenantSession, other: TenantSession, ada: Any) -> None:
    assert answer(other, "users", "list") == []
    assert "no such user" in refusal(other, "users", "show", str(ada.id))


@pytest.mark.parametrize("name", ["id", "5000000000", "telegram:5000000000", "BOB@example.com "])
def test_a_user_is_named_in_any_way(db: TenantSession, bob: Any, name: str) -> None:
    UserRepository.update(db, bob.id, email="bob@example.com")
    if name == "5000000000":
        assert "named by id, e-mail address or provider" in refusal(db, "users", "show", name)
        return
    assert record(db, "users", "show", str(bob.id) if name == "id" else name)["username"] == "bob"


def test_an_address_that_is_anothers_identity_names_nobody(db: TenantSession) -> None:
    name = "okta:eve@example.com"
    known = UserRepository.get_or_create_by_identity(db, "okta", "eve@example.com")
    assert record(db, "users", "show", name)["id"] == str(known.id)
    UserRepository.create(db, email=name)
    assert "two users" in refusal(db, "users", "make-admin", name)
    assert not UserRepository.require(db, known.id).is_admin


@pytest.mark.parametrize(
    "command", [("show",), ("delete", "--yes"), ("export",), ("erase", "--yes"), ("make-admin",)]
)
@pytest.mark.parametrize(
    "name",
    [
        "01a201bd-0000-7000-8000-000000000000",
        "no@example.com",
        "telegram:1",
        "not-a-uuid",
        "",
        "a\nb",
        ":",
        "\udcff",
    ],
)
def test_unknown_users(db: TenantSession, command: tuple[str, ...], name: str) -> None:
    assert "user" in refusal(db, "users", command[0], name, *command[1:])


def test_delete_user(db: TenantSession, ada: Any, bob: Any) -> None:
    assert record(db, "users", "delete", "telegram:5000000000", "--yes") == {"deleted": "1"}
    assert [user.id for user in UserRepository.list(db)] == [ada.id]


@pytest.mark.parametrize("command", ["delete", "erase"])
def test_nobody_is_deleted_without_an_answer(db: TenantSession, ada: Any, command: str) -> None:
    assert "--yes" in refusal(db, "users", command, "ada@example.com")
    assert UserRepository.exists(db, ada.id)


def test_delete_non_admins(
    db: TenantSession, other: TenantSession, ada: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "PAGE", 2)
    record(db, "users", "make-admin", "ada@example.com")
    UserRepository.create_many(db, [{"username": f"u{n}"} for n in range(5)])
    kept = UserRepository.create(other)
    assert answer(db, "users", "delete-non-admins", "--dry-run") == {"would_delete": 5}
    assert "Delete 5 users" in refusal(db, "users", "delete-non-admins")
    assert UserRepository.count(db) == 6
    assert answer(db, "users", "delete-non-admins", "--yes") == {"deleted": 5}
    assert [user.id for user in UserRepository.list(db)] == [ada.id]
    assert UserRepository.exists(other, kept.id)
    assert answer(db, "users", "delete-non-admins", "--yes") == {"deleted": 0}


def test_delete_non_admins_keeps_whom_the_question_did_not_count(
    db: TenantSession, ada: Any, bob: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered_late(*_: object, yes: bool) -> None:
        UserRepository.update(db, ada.id, is_admin=True)
        UserRepository.create(db, username="new")

    monkeypatch.setattr("database.cli.users.confirm", answered_late)
    assert answer(db, "users", "delete-non-admins") == {"deleted": 1}
    assert {user.username for user in UserRepository.list(db)} == {None, "new"}


def test_delete_non_admins_of_the_repository(
    db: TenantSession, other: TenantSession, ada: Any, bob: Any
) -> None:
    stranger = UserRepository.create(other)
    UserRepository.update(db, ada.id, is_admin=True)
    ids = [ada.id, str(bob.id), stranger.id, uuid4()]
    assert UserRepository.delete_non_admins(db, ids) == 1
    assert UserRepository.delete_non_admins(db, []) == 0
    assert UserRepository.exists(db, ada.id)
    assert UserRepository.exists(other, stranger.id)


def test_make_admin(db: TenantSession, bob: Any) -> None:
    assert answer(db, "users", "make-admin", "telegram:5000000000")["is_admin"] is True
    assert UserRepository.require(db, bob.id).is_admin
    assert record(db, "users", "make-admin", str(bob.id), "--revoke")["is_admin"] == "no"
    assert not UserRepository.require(db, bob.id).is_admin


def test_erase(db: TenantSession, ada: Any) -> None:
    ContextRepository.store(db, ada.id, "note", {"a": 1})
    counted = answer(db, "users", "erase", "ada@example.com", "--dry-run")
    assert (counted["users"], counted["contexts"]) == (1, 1)
    assert UserRepository.exists(db, ada.id)
    assert answer(db, "users", "erase", "ada@example.com", "--yes") == counted
    assert not UserRepository.exists(db, ada.id)


def test_export_to_standard_output(db: TenantSession, ada: Any) -> None:
    chat = ConversationRepository.create(db, user_id=ada.id)
    MessageRepository.append(db, chat.id, role="user", content="Grüße \x1b[31m\u2028")
    lines = run(db, "users", "export", "ada@example.com").stdout
    assert lines == "".join(UserRepository.export(db, ada.id))


def test_export_to_a_file(db: TenantSession, ada: Any, tmp_path: Path) -> None:
    file = tmp_path / "ada.jsonl"
    told = answer(db, "users", "export", "ada@example.com", "--output", str(file))
    lines = file.read_text(encoding="utf-8").splitlines()
    assert told == {"file": str(file), "lines": len(lines)}
    assert json.loads(lines[0])["format"] == "database-user-export"
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_export_that_fails_leaves_the_older_file(
    db: TenantSession, ada: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ada.jsonl"
    file.write_text("older")

    def broken(*_: object) -> Any:
        yield "half\n"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UserRepository, "export", broken)
    line = refusal(db, "users", "export", "ada@example.com", "--output", str(file))
    assert line == "No space left on device"
    assert file.read_text() == "older"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("place", ["", "missing/ada.jsonl", "pipe"])
def test_a_place_that_no_file_can_have(
    db: TenantSession, ada: Any, tmp_path: Path, place: str
) -> None:
    if place == "pipe":
        (tmp_path / place).symlink_to("/dev/null")
    line = refusal(db, "users", "export", "ada@example.com", "--output", str(tmp_path / place))
    assert str(tmp_path) in line
    assert Path("/dev/null").is_char_device()


def test_a_link_is_followed(db: TenantSession, ada: Any, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("older")
    (tmp_path / "link").symlink_to("real")
    run(db, "users", "export", "ada@example.com", "--output", str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text().startswith("{")


def test_values_stay_on_their_line_and_in_their_column(db: TenantSession) -> None:
    UserRepository.create(db, username="a\tb\nc\x1b[2J\u2028d\x9b")
    (row,) = table(db, "users", "list")
    assert row["username"] == r"a\tb\nc\x1b[2J\u2028d\x9b"
    assert answer(db, "users", "list")[0]["username"] == "a\tb\nc\x1b[2J\u2028d\x9b"
