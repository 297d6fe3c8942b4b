"""`database stats`."""

import csv
import re
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, tzinfo
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

import typer

from database.cli.options import AsJson, Tenant, session
from database.cli.output import print_record, print_rows

if TYPE_CHECKING:
    from database.repositories.stats import MessageStats

__all__ = ["stats"]

_COUNTS = ("messages", "input_tokens", "output_tokens", "users", "conversations")


class By(StrEnum):
    """What to group by."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    ROLE = "role"
    MODEL = "model"
    USER = "user"
    CONVERSATION = "conversation"

    @property
    def in_time(self) -> bool:
        """Whether groups follow each other in time."""
        return self in (By.HOUR, By.DAY, By.WEEK, By.MONTH)


Count = StrEnum("Count", {name.upper(): name for name in _COUNTS})  # type: ignore[misc]

_TIME = "A date, a time, or 7d: the last seven days, today included."


def stats(
    *,
    by: Annotated[By | None, typer.Option(help="What to group by; else the totals.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help=f"{_TIME} Without --until: up to now.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only what was before this date or time.")
    ] = None,
    timezone: Annotated[
        str, typer.Option(metavar="NAME", help="In which days begin, such as Europe/Berlin.")
    ] = "UTC",
    active_only: Annotated[
        bool, typer.Option("--active-only", help="Leave out cleared messages.", show_default=False)
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.", show_default=False)] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw a chart, by day if by nothing else.")
    ] = False,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of the chart, too.")
    ] = None,
    count: Annotated[Count, typer.Option(help="What charts show.")] = Count.MESSAGES,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Count messages, tokens, active users and conversations."""
    from database.repositories.stats import StatsRepository

    if as_csv + as_json + plot > 1:
        raise typer.BadParameter("--csv, --json and --plot exclude each other")
    zone = _zone(timezone)
    given: dict[str, Any] = {
        "since": _time(since, zone, "--since"),
        "until": _time(until, zone, "--until"),
        "timezone": timezone,
        "active_only": active_only,
    }
    if by is None and (plot or png is not None):
        by = By.DAY
    with session(tenant) as db:
        if by is None:
            rows = [StatsRepository.summary(db, **given)]
        else:
            rows = StatsRepository.messages(db, by.value, **given)
    if png is not None:
        _write_picture(png, rows, by or By.DAY, count)
    _print(rows, by, count, as_csv=as_csv, as_json=as_json, plot=plot)


def _print(
    rows: "Sequence[MessageStats]",
    by: By | None,
    count: Count,
    *,
    as_csv: bool,
    as_json: bool,
    plot: bool,
) -> None:
    if plot:
        from database.cli.charts import draw

        print(draw(_chart(rows, by or By.DAY, count)))  # noqa: T201
        return
    counts = [{name: getattr(row, name) for name in _COUNTS} for row in rows]
    if by is None and not as_csv:
        print_record(counts[0], as_json=as_json)
        return
    columns = _COUNTS if by is None else (by.value, *_COUNTS)
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        labels: list[tuple[str, ...]] = [() if by is None else (row.label,) for row in rows]
        writer.writerows(
            (*label, *count.values()) for label, count in zip(labels, counts, strict=True)
        )
        return
    assert by is not None
    shown = (
        {by.value: row.key if as_json else row.label, **({"label": row.label} if as_json else {}), **n}
        for row, n in zip(rows, counts, strict=True)
    )
    print_rows(shown, columns, as_json=as_json)
