"""The example of the OpenAI Agents SDK, as a process of its own."""

from __future__ import annotations

from pathlib import Path

from tests.running import in_order, run_example

SHOWN = (
    "Ada: Have you copper kettles?",
    "Agent: There are 3 copper kettles.",
    "Ada: And of steel?",
    "Agent: There are 0 steel kettles.",
    "later",
    "Agent: You asked: Have you copper kettles? And of steel?",
    "Taken back: 2 items, 8 are left",
    "│ 1    │ Have you copper kettles? │ 2 ",
    "│ 2    │ And of steel?            │ 2 ",
    "There are 3 copper »kettles«.",
    "Metadata: {'shop': 'Kettles & Sons'}",
    "Newest session: There are 0 steel kettles.",
)


def test_an_agent_remembers_and_does_so_every_time(empty_url: str, tmp_path: Path) -> None:
    for _ in range(2):
        done = run_example("openai_agent.py", tmp_path, empty_url)
        assert (done.returncode, done.stderr) == (0, "")
        assert in_order(done.stdout, SHOWN), done.stdout
        assert "Found: tool: 0 steel" not in done.stdout


def test_an_agent_without_a_database_ends_with_one_line(tmp_path: Path) -> None:
    done = run_example("openai_agent.py", tmp_path, "postgresql://me:secret-word@127.0.0.1:1/chat")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("The demo stopped: DATABASE_URL: ")
    assert "secret-word" not in line
