"""`database stats`."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from database import ConversationRepository, MessageRepository, TenantSession, UserRepository
from database.cli.charts import Chart, draw, picture
from database.session import tenant_of
from tests.cli import answer, environment, record, refusal, run, table

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def said(db: TenantSession) -> None:
    user = UserRepository.create(db, email="ada@example.com").id
    chat = ConversationRepository.create(db, user_id=user).id
    for days, model in ((0, "m-1"), (0, "m-2"), (2, "m-1")):
        at = NOON + timedelta(days=days)
        MessageRepository.append(db, chat, role="user", content="secret", created_at=at)
        MessageRepository.append(
            db,
            chat,
            role="assistant",
            content="secret",
            model=model,
            input_tokens=100,
            output_tokens=10,
            created_at=at,
        )
    late = datetime(2026, 3, 4, 23, 30, tzinfo=UTC)
    hidden = MessageRepository.append(db, chat, role="tool", content="secret", created_at=late)
    MessageRepository.deactivate(db, chat, [hidden.id])


COUNTS = {"messages": 7, "input_tokens": 300, "output_tokens": 30, "users": 1, "conversations": 1}


@pytest.mark.usefixtures("said")
def test_totals(db: TenantSession, other: TenantSession) -> None:
    assert answer(db, "stats") == COUNTS
    assert record(db, "stats") == {name: str(count) for name, count in COUNTS.items()}
    assert answer(db, "stats", "--active-only") == COUNTS | {"messages": 6}
    assert answer(other, "stats") == dict.fromkeys(COUNTS, 0)
    lines = run(db, "stats", "--csv").stdout.splitlines()
    assert lines == [",".join(COUNTS), "7,300,30,1,1"]


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("day", {"2026-03-02": 4, "2026-03-04": 3}),
        ("week", {"2026-03-02": 7}),
        ("month", {"2026-03-01": 7}),
        ("hour", {"2026-03-02T12:00:00+00:00": 4, "2026-03-04T12:00:00+00:00": 2}),
        ("role", {"assistant": 3, "user": 3, "tool": 1}),
        ("model", {"m-1": 2, "m-2": 1}),
    ],
)
def test_groups(db: TenantSession, by: str, expected: dict[str, int]) -> None:
    rows = table(db, "stats", "--by", by)
    assert {row[by]: int(row["messages"]) for row in rows}.items() >= expected.items()
    document = answer(db, "stats", "--by", by)
    assert {row[by]: row["messages"] for row in document}.items() >= expected.items()
    read = csv.DictReader(io.StringIO(run(db, "stats", "--by", by, "--csv").stdout))
    assert list(read) == rows
    assert sum(row["messages"] for row in document) == 7


@pytest.mark.usefixtures("said")
def test_users_and_conversations_have_names(db: TenantSession) -> None:
    (row,) = answer(db, "stats", "--by", "user")
    found = UserRepository.get_by_email(db, "ada@example.com")
    assert found is not None
    assert row == {"user": str(found.id), "name": "ada@example.com"} | COUNTS
    (row,) = table(db, "stats", "--by", "conversation")
    assert row["name"] == row["conversation"]


@pytest.mark.usefixtures("said")
def test_ranges_and_time_zones(db: TenantSession) -> None:
    march = ("stats", "--by", "day", "--since", "2026-03-01", "--until", "2026-03-06")
    rows = answer(db, *march)
    assert [row["messages"] for row in rows] == [0, 4, 0, 3, 0]
    rows = answer(db, *march, "--timezone", "Europe/Berlin")
    assert [row["messages"] for row in rows] == [0, 4, 0, 2, 1]
    for since, count in (
        ("2026-03-04", 3),
        ("2026-03-04T12:00", 3),
        ("2026-03-04T12:00:01", 1),
        ("2026-03-04T12:30+01:00", 3),
        ("2026-03-04T12:00:01Z", 1),
        ("99999d", 7),
        ("1d", 0),
    ):
        assert answer(db, "stats", "--since", since)["messages"] == count, since
    in_berlin = ("--since", "2026-03-05", "--timezone", "Europe/Berlin")
    assert answer(db, "stats", *in_berlin)["messages"] == 1


def test_the_last_days(db: TenantSession) -> None:
    chat = ConversationRepository.create(db).id
    now = datetime.now(UTC)
    for days in (0, 6, 8):
        at = now - timedelta(days=days)
        MessageRepository.append(db, chat, role="user", content="x", created_at=at)
    rows = answer(db, "stats", "--by", "day", "--since", "7d")
    assert len(rows) in (7, 8), "8 around midnight"
    assert sum(row["messages"] for row in rows) in (1, 2)


@pytest.mark.parametrize(
    "given",
    [
        ["--by", "content"],
        ["--since", "yesterday"],
        ["--since", "0d"],
        ["--until", "2026-13-01"],
        ["--timezone", "Mars/Olympus"],
        ["--csv", "--json"],
        ["--csv", "--plot"],
        ["--count", "words"],
        ["--nonsense"],
    ],
)
def test_usage(db: TenantSession, given: list[str]) -> None:
    result = run(db, "stats", *given, status=2)
    assert result.stdout == ""
    assert given[0] in result.stderr


def test_refusals(db: TenantSession, tmp_path: Path) -> None:
    backwards = ("stats", "--since", "2026-03-02", "--until", "2026-03-01")
    assert refusal(db, *backwards) == "until: must not be before since"
    nowhere = str(tmp_path / "none" / "chart.png")
    assert "No such file" in refusal(db, "stats", "--png", nowhere)
    assert "must be at most" in refusal(db, "stats", "--by", "hour", "--since", "1800-01-01")


# Charts


@pytest.mark.usefixtures("said")
def test_plot(db: TenantSession) -> None:
    drawn = run(db, "stats", "--plot", "--since", "2026-03-01", "--until", "2026-03-06").stdout
    assert drawn.startswith("messages by day\n")
    assert "2026-03-01" in drawn
    assert "█" in drawn
    assert "\x1b" not in drawn
    drawn = run(db, "stats", "--by", "model", "--plot", "--count", "output_tokens").stdout
    title, *lines = drawn.splitlines()
    assert title == "output tokens by model"
    bars = {name: line.count("█") for name in ("m-1", "m-2") for line in lines if name in line}
    assert bars["m-1"] > bars["m-2"] > 0
    assert any("(none)" in line for line in lines)
    assert run(db, "stats", "--plot", "--by", "role", "--until", "2026-01-01").stdout == (
        "nothing to draw\n"
    )


@pytest.mark.usefixtures("said")
def test_picture(db: TenantSession, tmp_path: Path) -> None:
    file = tmp_path / "chart.png"
    for by in ("day", "model", "user", "hour"):
        rows = answer(db, "stats", "--by", by, "--png", str(file))
        assert sum(row["messages"] for row in rows) == 7, "the rows are printed all the same"
        assert file.read_bytes().startswith(PNG)
        file.unlink()
    run(db, "stats", "--until", "2026-01-01", "--png", str(file))
    assert file.read_bytes().startswith(PNG), "of nothing"


NAMES = ["$x$", "$\\frac", "", "\x1b[31mred\n", "漢字 " * 20, "a_{b}", "same", "same"]


def test_charts_of_any_names_and_numbers() -> None:
    for numbers in ([0] * 8, [1] * 8, [10**15, *range(7)], [999, 1000, 1001, 0, 0, 0, 0, 1]):
        for in_time in (True, False):
            chart = Chart("messages", NAMES, numbers, in_time=in_time)
            drawn = draw(chart)
            assert "\x1b" not in drawn
            assert ("billions" in drawn) == (max(numbers) > 10**9)
            assert picture(chart).startswith(PNG)
    for count in (1, 2, 31, 5_000):
        names = [f"name {n}" for n in range(count)]
        chart = Chart("messages", names, range(count), in_time=False)
        assert ("first 30 of" in draw(chart)) == (count > 30)
        timely = Chart("messages", names, range(count), in_time=True)
        assert draw(timely).count("\n") < 30


def test_pictures_choose_no_backend(tmp_path: Path) -> None:
    """Nothing of the process's matplotlib is changed."""
    script = (
        "import sys; from database.cli.charts import Chart, picture\n"
        "picture(Chart('t', ['a'], [1], in_time=False))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environ = environment(MPLCONFIGDIR=str(tmp_path))
    subprocess.run([sys.executable, "-W", "error", "-c", script], env=environ, check=True)


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize(
    ("module", "options"),
    [("plotext", ["--plot"]), ("matplotlib", ["--png", "chart.png"])],
)
def test_a_missing_extra_is_one_line(
    db: TenantSession, monkeypatch: pytest.MonkeyPatch, module: str, options: list[Any]
) -> None:
    for name in [name for name in sys.modules if re.match(rf"{module}(\.|$)", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    assert refusal(db, "stats", "--by", "day", *options) == (
        f"charts need {module}: pip install 'llm-database[plot]'"
    )


def test_in_a_pipe_that_closes(db: TenantSession, worker_url: str, said: None) -> None:
    command = f"{sys.executable} -W error -m database stats --by hour --since 3000d | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=environment(worker_url, DATABASE_TENANT_ID=tenant_of(db)),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("hour\tmessages")
    assert done.stderr == ""


def test_json_is_whole(db: TenantSession, said: None) -> None:
    result = run(db, "--json", "stats", "--by", "role")
    assert len(json.loads(result.stdout)) == 3
