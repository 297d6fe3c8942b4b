"""Plain tables of what was measured, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.cases import Case, Claim
    from benchmarks.comparison import Comparison
    from benchmarks.harness import Timings

__all__ = ["case_rows", "comparison_rows", "table", "to_json"]

CASE_HEAD: tuple[str, ...] = (
    "work",
    "time",
    "raw",
    "ratio",
    "quartiles",
    "at most",
    "",
    "rounds",
    "machine busy",
)
_LONG_SECONDS = 0.01
_TITLES = {"append": "append one", "last": "last 50", "bulk": "add 1,000"}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns; the first row is the head, the first column flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def case_rows(case: Case, timings: Timings) -> list[tuple[str, ...]]:
    """Return a row for each claim."""
    return [_case_row(claim, timings) for claim in case.claims]


def _case_row(claim: Claim, timings: Timings) -> tuple[str, ...]:
    low, ratio, high = timings.ratio(claim.ours, claim.base)
    limit = ("", "")
    if claim.at_most is not None:
        limit = (f"{claim.at_most:.2f}", "ok" if ratio <= claim.at_most else "MISS")
    return (
        claim.work,
        _time(timings.median(claim.ours)),
        _time(timings.median(claim.base)),
        f"{ratio:.2f}",
        f"{low:.2f}-{high:.2f}",
        *limit,
        str(len(timings.seconds[claim.ours])),
        f"{timings.pressure:.0%}",
    )


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return a row for each contender: times, how many times ours that is, and round trips."""
    head = [""]
    for work in comparison.timings:
        head += [_TITLES[work], "x ours"] + ["trips"] * (work in comparison.trips)
    rows = [tuple(head)]
    for name in comparison.timings["append"].seconds:
        row = [name]
        for work, timings in comparison.timings.items():
            if name in timings.seconds:
                row += [_time(timings.median(name)), f"{timings.ratio(name, 'ours')[1]:.2f}"]
            else:
                row += ["-", "-"]
            if work in comparison.trips:
                row.append(f"{comparison.trips[work][name]:g}")
        rows.append(tuple(row))
    return rows


def to_json(cases: dict[str, Timings], comparisons: dict[str, Comparison]) -> dict[str, Any]:
    """Return all measured values, in seconds."""
    return {
        "cases": {name: asdict(timings) for name, timings in cases.items()},
        "comparisons": {name: asdict(comparison) for name, comparison in comparisons.items()},
    }


def _time(seconds: float) -> str:
    if seconds < _LONG_SECONDS:
        return f"{seconds * 1e6:,.0f} us"
    return f"{seconds * 1e3:,.1f} ms"
