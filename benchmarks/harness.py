"""Timing contenders in turns, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import median, quantiles

__all__ = ["Contender", "Effort", "Timings", "measure", "repeat"]

_PRESSURE = Path("/proc/pressure/cpu")
_ROUND_SECONDS = 0.02
_LONG_CALL_SECONDS = 0.05


@dataclass(frozen=True)
class Contender:
    """One way to do a piece of work.

    Attributes:
        run: Does it n times; may return the seconds that count, where not all of its time does.
    """

    name: str
    run: Callable[[int], float | None]


@dataclass(frozen=True)
class Effort:
    """How long to measure: a time for each case, at most so many rounds, at least so many.

    Attributes:
        warm_up: How many calls of each contender come before; a statement is prepared from its
            sixth use on.
    """

    seconds: float
    rounds: int
    fewest: int = 5
    warm_up: int = 40


@dataclass(frozen=True)
class Timings:
    """Seconds a call took, by contender, one value a round.

    Attributes:
        pressure: The share of the time in which some process waited for a processor, at most.
    """

    seconds: dict[str, list[float]]
    pressure: float

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def ratio(self, name: str, base: str) -> tuple[float, float, float]:
        """Return the quartiles of the ratios within a round; the middle one is the result.

        Both were measured within some 50 ms, so a slow spell of the machine cancels out.
        """
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        low, middle, high = quantiles([one / other for one, other in pairs], n=4)
        return low, middle, high


def repeat(call: Callable[[], object]) -> Callable[[int], None]:
    """Return what does a call n times."""

    def run(times: int) -> None:
        for _ in range(times):
            call()

    return run


def measure(contenders: Sequence[Contender], effort: Effort) -> Timings:
    """Time contenders in many short rounds; each round begins with another one of them.

    Of the rounds those count in which the machine was least busy otherwise: the quieter half, by
    how long processes waited for a processor.
    """
    calls = {contender.name: _calls(contender, effort.warm_up // 2) for contender in contenders}
    rounds: list[tuple[float, dict[str, float]]] = []
    # What exists by now is nobody's garbage: collections shall look at the rounds' objects only.
    gc.collect()
    gc.freeze()
    started = time.perf_counter()
    while len(rounds) < effort.rounds:
        if len(rounds) >= effort.fewest and time.perf_counter() - started > effort.seconds:
            break
        first = len(rounds) % len(contenders)
        round_started, waited = time.perf_counter(), _waited()
        seconds = {}
        for contender in (*contenders[first:], *contenders[:first]):
            gc.collect()
            times = calls[contender.name]
            seconds[contender.name] = _time(contender, times) / times
        pressure = (_waited() - waited) / (time.perf_counter() - round_started)
        rounds.append((pressure, seconds))
    gc.unfreeze()
    rounds.sort(key=itemgetter(0))
    limit = rounds[len(rounds) // 2][0]
    quiet = [seconds for pressure, seconds in rounds if pressure <= limit]
    return Timings({c.name: [seconds[c.name] for seconds in quiet] for c in contenders}, limit)


def _waited() -> float:
    """Return how long processes of this machine have waited for a processor; 0 if unknown."""
    try:
        return int(_PRESSURE.read_text().split("\n")[0].rpartition("=")[2]) / 1e6
    except (OSError, ValueError):
        return 0.0


def _calls(contender: Contender, times: int) -> int:
    """Warm a contender up; return how many calls make a round."""
    _time(contender, 1)  # connects
    alone = _time(contender, 1)
    if alone > _LONG_CALL_SECONDS:
        return 1
    _time(contender, times)
    each = _time(contender, times) / times
    return max(1, round(_ROUND_SECONDS / each))


def _time(contender: Contender, times: int) -> float:
    started = time.perf_counter()
    counted = contender.run(times)
    return time.perf_counter() - started if counted is None else counted
