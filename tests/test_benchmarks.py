"""The benchmarks run, on small tables: the times that they find there say nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import benchmarks.__main__ as command
from benchmarks.cases import CASES, Case
from benchmarks.harness import Effort
from benchmarks.site import Site, filled
from tests.conftest import database_of

SCALE = 0.02
"""Leaves two pages of every list."""

LEAST = Effort(seconds=0, rounds=1, warm_up=2)


@pytest.fixture(scope="module")
def site(server: str, template: str) -> Iterator[Site]:
    with database_of(server, template) as url, database_of(server, None) as spare:
        found = filled(url, spare, SCALE)
        yield found
        found.close()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_work_runs_and_can_be_compared(case: Case, site: Site) -> None:
    timings = case.measured(site, LEAST)
    for claim in case.claims:
        assert timings.median(claim.ours) / timings.median(claim.base) > 0


def test_works_that_need_no_peer_are_there() -> None:
    names = {case.name for case in CASES}
    assert names >= {"append", "list", "search-tenant", "recall-tenant", "pydantic-ai-load", "bulk"}


def test_the_command_shows_what_it_has_measured(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def sites() -> Iterator[tuple[Site, Site, str]]:
        yield site, site, site.spare

    file = tmp_path / "found.json"
    options = ["--quick", "--rounds", "2", "--only", "append", "--json", str(file)]
    monkeypatch.setattr(command, "sites", sites)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    command.main()
    seconds = json.loads(file.read_text("utf-8"))["cases"]["append"]["seconds"]
    assert {len(values) for values in seconds.values()} == {2}
    shown = capsys.readouterr().out
    assert "append a message, count it" in shown
    assert "  a session each time" in shown
