"""Ours, raw psycopg and the peers beside each other: on the socket, and over a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from statistics import median
from uuid import UUID, uuid4

from sqlalchemy import make_url

from benchmarks.harness import Contender, Effort, Timings, measure, repeat
from benchmarks.peers import PEERS, Peer
from benchmarks.proxy import Proxy, delaying
from benchmarks.raw import LAST
from benchmarks.site import TENANT, Site, messages
from database import MessageRepository

__all__ = [
    "ROUND_TRIP",
    "WORKS",
    "Comparison",
    "Thread",
    "fill_peers",
    "on_socket",
    "over_network",
    "ping",
]

ROUND_TRIP = 0.0005
WORKS = ("append", "last", "bulk")
_ONE = messages(2)[1]
_THOUSAND = messages(1000)
_COUNTED_CALLS = 11


@dataclass(frozen=True)
class Thread:
    """A peer, and the thread in which it has as many messages as our history has."""

    peer: type[Peer]
    id: UUID


@dataclass(frozen=True)
class Comparison:
    """What was measured, by work.

    Attributes:
        ping: Seconds of a bare SELECT 1.
        trips: Round trips a call, by contender.
    """

    ping: float
    timings: dict[str, Timings]
    trips: dict[str, dict[str, float]] = field(default_factory=dict)


def fill_peers(url: str) -> tuple[list[Thread], list[str]]:
    """Fill a thread of each peer; return those, and why others are missing."""
    threads, missing = [], []
    for peer in PEERS:
        thread = Thread(peer, uuid4())
        try:
            peer(url, thread.id).fill()
        except ImportError as error:
            missing.append(f"{peer.name}: {error}")
        else:
            threads.append(thread)
    return threads, missing


def on_socket(site: Site, url: str, threads: Sequence[Thread], effort: Effort) -> Comparison:
    """Compare without a network."""
    site.use()
    works = _works(site, url, threads)
    return Comparison(ping(site), {work: measure(works[work], effort) for work in WORKS})


def over_network(site: Site, url: str, threads: Sequence[Thread], effort: Effort) -> Comparison:
    """Compare through a delaying proxy, and count round trips there."""
    address = make_url(site.url)
    target = f"{address.query['host']}/.s.PGSQL.{address.query['port']}"
    with delaying(target, ROUND_TRIP / 2) as proxy, _far(site, proxy) as far:
        works = _works(far, _through(proxy, url), threads)
        del works["bulk"]
        return Comparison(
            ping(far),
            {work: measure(contenders, effort) for work, contenders in works.items()},
            {work: _trips(proxy, contenders) for work, contenders in works.items()},
        )


def _works(site: Site, url: str, threads: Sequence[Thread]) -> dict[str, list[Contender]]:
    db, mine = site.session(), site.raw()
    own, other = cycle(site.ours), cycle(site.theirs)
    wanted = (TENANT, site.history, 50)
    ours = {
        "append": lambda: MessageRepository.append(db, next(own), **_ONE),
        "last": lambda: MessageRepository.history(db, site.history, limit=50),
        "bulk": lambda: MessageRepository.append_many(db, site.ours[0], _THOUSAND),
    }
    raw = {
        "append": lambda: mine.append(next(other), _ONE),
        "last": lambda: mine.fetch(LAST, wanted),
        "bulk": lambda: mine.append_many(site.theirs[0], _THOUSAND),
    }
    # What is appended must not make the history longer that is read.
    readers = {thread.peer.name: thread.peer(url, thread.id) for thread in threads}
    writers = {thread.peer.name: thread.peer(url, uuid4()) for thread in threads}
    peers = {"append": writers, "last": readers, "bulk": writers}
    return {
        work: [
            Contender("ours", repeat(ours[work])),
            Contender("raw psycopg", repeat(raw[work])),
            *(
                Contender(name, run)
                for name, peer in peers[work].items()
                if (run := getattr(peer, work))
            ),
        ]
        for work in WORKS
    }


def ping(site: Site) -> float:
    """Return how many seconds a bare SELECT 1 takes."""
    connection = site.raw().connection
    one = Contender("one", repeat(lambda: connection.execute("SELECT 1").fetchone()))
    return measure([one], Effort(seconds=1, rounds=20)).median("one")


@contextmanager
def _far(site: Site, proxy: Proxy) -> Iterator[Site]:
    far = replace(site, url=_through(proxy, site.url))
    far.use()
    yield far
    far.close()


def _through(proxy: Proxy, url: str) -> str:
    there = make_url(url).set(host="127.0.0.1", port=proxy.port)
    return there.set(query={"sslmode": "disable", "gssencmode": "disable"}).render_as_string()


def _trips(proxy: Proxy, contenders: Sequence[Contender]) -> dict[str, float]:
    def one(contender: Contender) -> int:
        before = proxy.trips()
        contender.run(1)
        return proxy.trips() - before

    return {c.name: median(one(c) for _ in range(_COUNTED_CALLS)) for c in contenders}
