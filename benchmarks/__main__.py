"""Measure and print tables: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from benchmarks import comparison, report
from benchmarks.cases import CASES
from benchmarks.harness import Effort
from benchmarks.site import Site, sites

if TYPE_CHECKING:
    from benchmarks.comparison import Comparison
    from benchmarks.harness import Timings

_COMPARISONS = {"peers": comparison.on_socket, "network": comparison.over_network}
_NAMES = [case.name for case in CASES] + list(_COMPARISONS)


def main() -> None:
    """Run the command line."""
    arguments = _arguments()
    if arguments.pin:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the server inherits it
    # So that the server stops too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    wanted = arguments.only or ([case.name for case in CASES] if arguments.quick else _NAMES)
    with sites() as (fast, safe, peers_url):
        _print_versions(fast)
        cases = _measure_cases(fast, safe, wanted, arguments)
        comparisons = _compare(fast, peers_url, wanted, arguments)
    if arguments.json:
        arguments.json.write_bytes(orjson.dumps(report.to_json(cases, comparisons)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=_NAMES, metavar="NAME", help=", ".join(_NAMES)
    )
    parser.add_argument("--rounds", type=int, default=200, help="at most, in each case")
    parser.add_argument("--quick", action="store_true", help="a few rounds, without the peers")
    parser.add_argument(
        "--pin", action="store_true", help="one processor for client and server (Linux)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    return parser.parse_args()


def _print_versions(site: Site) -> None:
    server = site.raw().connection.info.parameter_status("server_version")
    ours = ", ".join(f"{name} {version(name)}" for name in ("sqlalchemy", "psycopg"))
    ping = comparison.ping(site) * 1e6
    print(f"PostgreSQL {server}, Python {platform.python_version()}, {ours}")
    print(f"SELECT 1 takes {ping:,.0f} us", flush=True)


def _measure_cases(
    fast: Site, safe: Site, wanted: list[str], arguments: argparse.Namespace
) -> dict[str, Timings]:
    measured: dict[str, Timings] = {}
    rows = [report.CASE_HEAD]
    for case in CASES:
        if case.name in wanted:
            _say(case.name)
            effort = _effort(arguments, 6, case.fewest)
            site = safe if case.safe else fast
            measured[case.name] = case.measured(site, effort)
            rows += report.case_rows(case, measured[case.name])
    if measured:
        print("\nOurs beside raw psycopg, on a unix socket\n", report.table(rows), sep="\n")
    return measured


def _compare(
    site: Site, url: str, wanted: list[str], arguments: argparse.Namespace
) -> dict[str, Comparison]:
    wanted = [name for name in _COMPARISONS if name in wanted]
    if not wanted:
        return {}
    _say("filling the peers")
    # Not before: the modules that they import make the garbage collector's work larger.
    threads, missing = comparison.fill_peers(url)
    measured = {}
    for name in wanted:
        _say(name)
        found = measured[name] = _COMPARISONS[name](site, url, threads, _effort(arguments, 12, 5))
        where = "a unix socket" if name == "peers" else "a network of 0.5 ms round-trip time"
        print(f"\nBeside peers, on {where}: SELECT 1 takes {found.ping * 1e6:,.0f} us\n")
        print(report.table(report.comparison_rows(found)))
    print()
    for thread in threads:
        peer = thread.peer
        print(f"{peer.name}: {peer.distribution} {peer.version()}; {peer.note}".rstrip("; "))
    for reason in missing:
        print(f"SKIPPED {reason}")
    return measured


def _effort(arguments: argparse.Namespace, seconds: float, fewest: int) -> Effort:
    if arguments.quick:
        return Effort(seconds / 15, arguments.rounds, 3, warm_up=10)
    return Effort(seconds, arguments.rounds, fewest)


def _say(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
