"""Ranges of time in a time zone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, tzinfo
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from database.errors import InvalidValueError

if TYPE_CHECKING:
    from datetime import timedelta

__all__ = ["Period", "period_of"]


@dataclass(frozen=True, slots=True)
class Period:
    """A range of time.

    Attributes:
        since: When it begins; None is without a beginning.
        until: When it has ended; None is without an end.
        timezone: The name of the zone in which its days begin.
        zone: That zone.
    """

    since: datetime | None
    until: datetime | None
    timezone: str
    zone: tzinfo

    def holds_more_than(self, count: int, step: timedelta, now: datetime) -> bool:
        """Tell whether it is longer than so many steps, if it has a beginning."""
        return self.since is not None and (self.until or now) - self.since > count * step


def period_of(since: object, until: object, timezone: object) -> Period:
    """Return a range of time from arguments.

    Raises:
        InvalidValueError: A time is none, has no time zone, or the zone is not known.
    """
    name, zone = _zone(timezone)
    period = Period(_moment("since", since, zone), _moment("until", until, zone), name, zone)
    if period.since and period.until and period.until < period.since:
        raise InvalidValueError("until", "must not be before since")
    return period


def _zone(name: object) -> tuple[str, tzinfo]:
    if name == "UTC":
        # Also on a machine without a database of time zones.
        return "UTC", UTC
    if isinstance(name, str):
        try:
            return name, ZoneInfo(name)
        # OSError: the name of a folder, or too long for a file.
        except (KeyError, ValueError, OSError):
            pass
    raise InvalidValueError("timezone", "must be the IANA name of a time zone")


def _moment(field: str, value: object, zone: tzinfo) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, date) and not isinstance(value, datetime):
        # Midnight, the first one of two; where there is none, it is the moment that it would be.
        value = datetime.combine(value, time(), zone)
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise InvalidValueError(field, "must be a date, or a datetime with a time zone")
    return value
