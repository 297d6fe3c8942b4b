"""What is measured, ours beside raw psycopg, and how slow ours may be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from benchmarks import agents, branches, langchain, memories, notes, pydantic_ai, states, works
from benchmarks.harness import Contender, Effort, Timings, measure

if TYPE_CHECKING:
    from benchmarks.site import Site

__all__ = ["CASES", "Case", "Claim"]

_SHARE_OF_THROUGHPUT = 1 / 0.7


@dataclass(frozen=True)
class Claim:
    """A contender takes at most so many times as long as another one; None is for information."""

    work: str
    at_most: float | None = None
    ours: str = "ours"
    base: str = "raw"


@dataclass(frozen=True)
class Case:
    """Contenders to be measured in turns, and what is claimed of them.

    Attributes:
        safe: Whether commits wait for the disk.
        fewest: How many rounds at least, unless in a hurry.
    """

    name: str
    contenders: Callable[[Site], AbstractContextManager[list[Contender]]]
    claims: tuple[Claim, ...]
    safe: bool = False
    fewest: int = 5

    def measured(self, site: Site, effort: Effort) -> Timings:
        """Measure the contenders that the claims are about."""
        names = {name for claim in self.claims for name in (claim.ours, claim.base)}
        site.use()
        with self.contenders(site) as contenders:
            return measure([one for one in contenders if one.name in names], effort)


_TASKS = ("ours, 8 tasks", f"{agents.THEIRS}, 8 tasks")

_AGENTS = (
    Case(
        "agents-add",
        agents.add_one,
        (
            Claim("Agents SDK: add an item", 1 / 3, base=agents.THEIRS),
            Claim("  by 8 tasks, each", 1 / 3, *_TASKS),
        ),
    ),
    Case(
        "agents-last",
        agents.last,
        (
            Claim("Agents SDK: last 50 of 1,000", 1 / 3, base=agents.THEIRS),
            Claim("  by 8 tasks, each", 1 / 3, *_TASKS),
        ),
    ),
    Case(
        "agents-many",
        agents.add_many,
        (Claim("Agents SDK: add 10,000 items", 1.0, base=agents.THEIRS),),
        fewest=8,
    ),
)
_LANGCHAIN = (
    Case(
        "langchain-add",
        langchain.add_one,
        (
            Claim("LangChain: add a message", 1.0, base=langchain.THEIRS),
            Claim("  theirs in autocommit", base=langchain.AUTOCOMMIT),
        ),
    ),
    Case(
        "langchain-last",
        langchain.last,
        (Claim("LangChain: last 50 of 1,000", 1 / 10, base=langchain.AUTOCOMMIT),),
    ),
    Case(
        "langchain-many",
        langchain.add_many,
        (Claim("LangChain: add 1,000 messages", base=langchain.THEIRS),),
    ),
)
_PYDANTIC_AI = (
    Case(
        "pydantic-ai-load",
        pydantic_ai.load,
        (
            # A fifth of the whole is a quarter of the rest.
            Claim("Pydantic AI: load 1,000 messages", 1.25, base="validation"),
            Claim("  store.load", ours="store", base="validation"),
            Claim("  store.read_history", ours="history", base="validation"),
        ),
    ),
    Case(
        "pydantic-ai-append",
        pydantic_ai.append,
        (Claim("Pydantic AI: append a turn of 4", base="append_many"),),
    ),
)

_THREADS = (
    Case(
        "threads",
        works.threads,
        (
            Claim("8 threads append by a pool", _SHARE_OF_THROUGHPUT),
            Claim("  a session each time", ours="ours, a session each time"),
        ),
    ),
)

CASES = (
    Case(
        "append",
        works.append,
        (
            Claim("append a message, count it", 1.8),
            Claim("  a session each time", ours="ours, a session each time"),
            Claim("  raw in one pipeline", ours="raw in one pipeline"),
        ),
    ),
    Case("append-safe", works.append, (Claim("  synchronous_commit on", 1.4),), safe=True),
    Case(
        "last",
        works.last,
        (
            Claim("last 50 of 1,000 messages", 1.5),
            Claim("  none with metadata", None, "ours, no metadata", "raw, no metadata"),
            Claim("  raw in one pipeline", ours="raw in one pipeline"),
        ),
    ),
    Case(
        "all",
        works.whole,
        (
            Claim("all 1,000 messages", 1.1),
            Claim("  none with metadata", None, "ours, no metadata", "raw, no metadata"),
        ),
    ),
    Case(
        "branched",
        branches.branched,
        (
            Claim("1,000 messages in 20 branches", 3.0, "branched", "linear"),
            Claim("  last 50", None, "branched, last 50", "linear, last 50"),
            Claim("  1,000 of a fork", None, "fork", "linear"),
        ),
    ),
    Case(
        "list",
        works.listing,
        (
            Claim("list 50 of 10,000, page 1", 1.5, "ours, page 1", "raw, page 1"),
            Claim("  page 100", 1.5, "ours, page 100", "raw, page 100"),
            Claim("  page 100 / page 1", 1.1, "ours, page 100", "ours, page 1"),
        ),
    ),
    Case("get-or-create", works.get_or_create, (Claim("get_or_create, existing user", 2.5),)),
    *(_THREADS if find_spec("psycopg_pool") else ()),
    Case("authenticate", notes.authenticate, (Claim("authenticate by an API key", 2.5),)),
    Case("store", notes.store, (Claim("store a context", 1.8),)),
    Case("store-many", notes.store_many, (Claim("store_many of 1,000", 1.2),)),
    Case(
        "search-user",
        notes.search_user,
        (Claim("search 1 of 1,000 users, rare word", 2.0),),
    ),
    Case(
        "search-tenant",
        notes.search_tenant,
        (
            Claim("search 100,000 contexts, rare word", 0.01, base="raw, ILIKE"),
            Claim("  against the owner's SQL"),
            Claim("  substring", None, "ours, substring", "raw, ILIKE"),
            Claim("  a word in every fifth", None, "ours, a common word", "raw, ILIKE"),
        ),
    ),
    Case("state", states.set_one, (Claim("set a state", 1.8),)),
    Case("states", states.get_all, (Claim("get_all of 200 states", 1.5),)),
    Case(
        "recall-tenant",
        memories.recall_tenant,
        (
            Claim("recall 10 of 100,000 memories", 1.5),
            Claim("  and count the access", ours="ours, touching"),
        ),
    ),
    Case("recall-user", memories.recall_user, (Claim("recall of a user's 500", 1.5),)),
    Case("recall-small", memories.recall_small, (Claim("recall in 1 of 100 tenants", 1.5),)),
    Case("add-many", memories.add_many, (Claim("add_many of 10,000 memories", 0.8),), fewest=2),
    *(_AGENTS if find_spec("agents") and find_spec("greenlet") else ()),
    *(_LANGCHAIN if find_spec("langchain_postgres") else ()),
    *(_PYDANTIC_AI if find_spec("pydantic_ai") else ()),
    Case(
        "import",
        works.importing,
        (
            Claim("import database", 1.15),
            Claim("  and all its names", ours="ours, all names"),
        ),
        fewest=15,
    ),
    # Last: its messages make the tables larger.
    Case("bulk", works.bulk, (Claim("append_many of 10,000", 0.8),), fewest=10),
)
