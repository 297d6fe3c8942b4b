"""`database stats`."""

import csv
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import date, datetime, timedelta, tzinfo
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from database.cli.options import AsJson, Tenant, session
from database.cli.output import cell, print_record, print_rows

if TYPE_CHECKING:
    from database.cli.charts import Chart
    from database.repositories.stats import MessageStats

__all__ = ["stats"]


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


class Count(StrEnum):
    """What is counted of a group."""

    MESSAGES = "messages"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    USERS = "users"
    CONVERSATIONS = "conversations"


_IN_TIME = (By.HOUR, By.DAY, By.WEEK, By.MONTH)
_NAMED = (By.USER, By.CONVERSATION)
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

    if [as_csv, as_json, plot].count(True) > 1:
        raise typer.BadParameter("--csv, --json and --plot exclude each other")
    zone = _zone(timezone)
    given: dict[str, Any] = {
        "since": _time("--since", since, zone),
        "until": _time("--until", until, zone),
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
    if by is not None and png is not None:
        _write_picture(png, rows, by, count)
    if by is not None and plot:
        _draw(rows, by, count)
    elif by is None and not as_csv:
        print_record(_fields(rows[0], by), as_json=as_json)
    else:
        _print(rows, by, as_csv=as_csv, as_json=as_json)


def _print(rows: "Sequence[MessageStats]", by: By | None, *, as_csv: bool, as_json: bool) -> None:
    columns = [*([] if by is None else [by.value]), *(["name"] if by in _NAMED else []), *Count]
    shown = (_fields(row, by) for row in rows)
    if not as_csv:
        print_rows(shown, columns, as_json=as_json)
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(fields[name]) for name in columns] for fields in shown)


def _fields(row: "MessageStats", by: By | None) -> dict[str, Any]:
    fields: dict[str, Any] = {} if by is None else {by.value: row.key}
    if by in _NAMED:
        fields["name"] = row.label
    return fields | {name.value: getattr(row, name) for name in Count}


def _draw(rows: "Sequence[MessageStats]", by: By, count: Count) -> None:
    from database.cli.charts import draw

    print(draw(_chart(rows, by, count)))  # noqa: T201


def _write_picture(file: Path, rows: "Sequence[MessageStats]", by: By, count: Count) -> None:
    from database.cli.charts import picture

    file.write_bytes(picture(_chart(rows, by, count)))


def _chart(rows: "Sequence[MessageStats]", by: By, count: Count) -> "Chart":
    from database.cli.charts import Chart

    title = f"{count.value.replace('_', ' ')} by {by.value}"
    numbers = [getattr(row, count) for row in rows]
    return Chart(title, [row.label for row in rows], numbers, in_time=by in _IN_TIME)


def _zone(name: str) -> tzinfo:
    from database.errors import InvalidValueError
    from database.repositories.periods import period_of

    try:
        return period_of(None, None, name).zone
    except InvalidValueError as error:
        raise typer.BadParameter(error.rule, param_hint="'--timezone'") from None


def _time(option: str, value: str | None, zone: tzinfo) -> date | datetime | None:
    """Return a time given as text; one without a zone is of the zone."""
    if value is None:
        return None
    if days := re.fullmatch(r"([1-9]\d{0,4})d", value, re.ASCII):
        return datetime.now(zone).date() - timedelta(days=int(days[1]) - 1)
    with suppress(ValueError):
        return date.fromisoformat(value)
    with suppress(ValueError):
        time = datetime.fromisoformat(value)
        return time if time.tzinfo is not None else time.replace(tzinfo=zone)
    hint = "must be a date such as 2026-01-31, a time such as 2026-01-31T18:30, or 7d"
    raise typer.BadParameter(hint, param_hint=f"'{option}'")
