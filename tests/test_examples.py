"""What a new user runs first, as a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import make_url

from database import Message, PersonaRepository, UserRepository, configure, get_db_session
from tests.conftest import admin
from tests.running import in_order, run_example

SAID = (
    "Welcome aboard! Where do we go?",
    "How long is it?",
    "They ask for the circumference of the Earth.",
    "40,075 km along the equator.",
    "And on foot?",
    "One year.",
)
REMEMBERED = ("Clara remembers", "You told me: My dog is called Rufus.", "2.50", "11-20")


def test_quickstart_shows_the_conversation_every_time(empty_url: str, tmp_path: Path) -> None:
    for run in (1, 2):
        done = run_example("quickstart.py", tmp_path, empty_url)
        assert (done.returncode, done.stderr) == (0, "")
        shown = (*SAID, "The newest conversations", *REMEMBERED, "'status': 'healthy'")
        assert in_order(done.stdout, shown)
        assert "21 tokens in, 9 out" in done.stdout
        rows = [line for line in done.stdout.splitlines() if "A trip around the world" in line]
        assert len(rows) == run
        assert all("One year." in row and " 5 " in row for row in rows)

    configure(url=empty_url)
    with get_db_session() as db:
        assert [user.email for user in UserRepository.list(db)] == ["ada@example.com"]
        assert [persona.name for persona in PersonaRepository.list(db)] == ["Navigator"]
        thinking = [message.thinking for message in db.query(Message)]
        assert thinking.count(SAID[2]) == 2


def test_quickstart_works_where_others_work_too(fresh_url: str, tmp_path: Path) -> None:
    configure(url=fresh_url)
    with get_db_session() as db:
        UserRepository.create(db, email="ada@example.com", first_name="Ada")
    with get_db_session(tenant_id="another") as db:
        PersonaRepository.create(db, name="Navigator", template="another's")
    done = run_example("quickstart.py", tmp_path, fresh_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert in_order(done.stdout, SAID)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://me:secret-word@127.0.0.1:1/chat", "no server can be reached at 127.0.0.1:1"),
        ("postgresql://me:secret-word@/chat?host=/nowhere", "no server can be reached at /nowhere"),
        ("mysql://me:secret-word@127.0.0.1/chat", "must begin with postgresql://"),
        ("nonsense secret-word", "must look like postgresql://"),
    ],
)
def test_quickstart_ends_with_one_line_if_there_is_no_database(
    tmp_path: Path, url: str, reason: str
) -> None:
    done = run_example("quickstart.py", tmp_path, url)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("The demo stopped: DATABASE_URL: ")
    assert reason in line
    assert "secret-word" not in line


def test_quickstart_ends_with_one_line_if_it_may_not_migrate(
    server: str, empty_url: str, tmp_path: Path
) -> None:
    role = f"weak_{make_url(empty_url).database}"
    url = make_url(empty_url).set(username=role, password="weak")
    with admin(server) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'weak'")
    try:
        done = run_example("quickstart.py", tmp_path, url.render_as_string(hide_password=False))
    finally:
        with admin(server) as connection:
            connection.execute(f"DROP ROLE {role}")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("The demo stopped: permission denied for schema public")
