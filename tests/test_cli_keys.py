"""`database keys`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from database import ApiKeyRepository, AuthenticationError, TenantSession, UserRepository
from tests.cli import answer, record, refusal, run, table


@pytest.fixture
def ada(db: TenantSession) -> Any:
    return UserRepository.get_or_create(db, "ada@example.com")


def test_create_shows_the_secret_once(db: TenantSession, ada: Any) -> None:
    made = run(db, "keys", "create", "ada@example.com", "--name", "ci")
    secret = dict(line.split("\t") for line in made.stdout.splitlines())["secret"]
    assert ApiKeyRepository.authenticate(db, secret).id == ada.id
    assert "cannot be shown again" in made.stderr
    for command in ("list",), ("list", "ada@example.com", "--json"):
        assert secret not in run(db, "keys", *command).output


def test_a_key_that_expires(db: TenantSession, ada: Any) -> None:
    made = answer(db, "keys", "create", str(ada.id), "--days", "0.5")
    ends = datetime.fromisoformat(made["expires_at"])
    assert timedelta(hours=11) < ends - datetime.now(UTC) <= timedelta(hours=12)


def test_list(db: TenantSession, ada: Any) -> None:
    bob = UserRepository.create(db)
    keys = [ApiKeyRepository.create(db, user.id).api_key for user in (ada, bob, ada)]
    assert [row["id"] for row in table(db, "keys", "list")] == [str(k.id) for k in keys[::-1]]
    of_bob = answer(db, "keys", "list", str(bob.id))
    assert [row["id"] for row in of_bob] == [str(keys[1].id)]
    assert len(answer(db, "keys", "list", "--limit", "2")) == 2


def test_revoke(db: TenantSession, ada: Any) -> None:
    made = ApiKeyRepository.create(db, ada.id)
    assert "--yes" in refusal(db, "keys", "revoke", str(made.api_key.id))
    ApiKeyRepository.authenticate(db, made.secret)
    assert record(db, "keys", "revoke", str(made.api_key.id), "--yes")["revoked_at"]
    with pytest.raises(AuthenticationError):
        ApiKeyRepository.authenticate(db, made.secret)


def test_rotate(db: TenantSession, ada: Any) -> None:
    old = ApiKeyRepository.create(db, ada.id, name="ci")
    new = answer(db, "keys", "rotate", str(old.api_key.id))
    assert new["name"] == "ci"
    for secret in (old.secret, new["secret"]):
        assert ApiKeyRepository.authenticate(db, secret).id == ada.id
    newest = answer(db, "keys", "rotate", new["id"], "--grace", "0")
    with pytest.raises(AuthenticationError):
        ApiKeyRepository.authenticate(db, new["secret"])
    assert ApiKeyRepository.authenticate(db, newest["secret"]).id == ada.id
    assert "revoked, expired or rotated" in refusal(db, "keys", "rotate", new["id"])


@pytest.mark.parametrize("command", [("revoke", "--yes"), ("rotate",)])
@pytest.mark.parametrize(
    ("key", "said"),
    [("not-a-uuid", "UUID"), ("", "UUID"), ("01a201bd-0000-7000-8000-000000000000", "no such row")],
)
def test_unknown_keys(db: TenantSession, command: tuple[str, ...], key: str, said: str) -> None:
    assert said in refusal(db, "keys", command[0], key, *command[1:])


@pytest.mark.parametrize("days", ["-1", "x", "nan"])
def test_days_that_are_none(db: TenantSession, ada: Any, days: str) -> None:
    assert "--days" in run(db, "keys", "create", "ada@example.com", "--days", days, status=2).stderr
    assert answer(db, "keys", "list") == []


@pytest.mark.parametrize("days", ["inf", "1e300", "1e9", "4e6"])
def test_days_without_an_end(db: TenantSession, ada: Any, days: str) -> None:
    assert run(db, "keys", "create", "ada@example.com", "--days", days, status=2).stderr


def test_zero_days(db: TenantSession, ada: Any) -> None:
    assert "future" in refusal(db, "keys", "create", "ada@example.com", "--days", "0")
