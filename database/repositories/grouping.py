"""The statements that group messages and count them."""

from __future__ import annotations

from datetime import MINYEAR, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, Uuid, bindparam, text
from sqlalchemy.exc import DBAPIError

from database.errors import DatabaseError, InvalidValueError
from database.repositories.loading import fetch
from database.session import tenant_of
from database.types import Timestamp, utcnow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import TextClause
    from sqlalchemy.orm import Session
    from sqlalchemy.types import TypeEngine

    from database.repositories.periods import Period

__all__ = ["groups_of"]

# Each group's key of a message, where it is one.
_OF_MESSAGE = {
    # Of the two hours of a night in autumn each is one.
    "hour": "date_trunc('hour', m.created_at, :timezone)",
    **{
        unit: f"CAST(date_trunc('{unit}', m.created_at AT TIME ZONE :timezone) AS date)"
        for unit in ("day", "week", "month")
    },
    "role": "m.role",
    "model": "m.model",
}
# Each group's key of a conversation, and what it is called.
_OF_CONVERSATION = {
    "user": ("c.user_id", "coalesce(max(u.email), max(u.username))"),
    "conversation": ("c.id", "max(c.thread_id)"),
}
_STEPS = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
    "month": timedelta(days=28),
}
_MOST_STEPS = 100_000

_CONDITIONS = {
    "since": "m.created_at >= :since",
    "until": "m.created_at < :until",
    "user_id": "m.conversation_id IN"
    " (SELECT id FROM conversations WHERE tenant_id = :tenant AND user_id = :user_id)",
    "conversation_id": "m.conversation_id = :conversation_id",
    "role": "m.role = :role",
    "model": "m.model = :model",
    "active_only": "m.is_active",
}
_COUNTS = ", ".join(
    f"CAST(coalesce({name}, 0) AS bigint)"
    for name in ("messages", "input_tokens", "output_tokens", "users", "conversations")
)
_PARAMETERS: dict[str, TypeEngine[Any]] = {
    "tenant": Text(),
    "since": Timestamp(),
    "until": Timestamp(),
    "end": Timestamp(),
    "timezone": Text(),
    "user_id": Uuid(),
    "conversation_id": Uuid(),
    "role": Text(),
    "model": Text(),
}
_UNKNOWN = "22023"


def groups_of(
    db: Session, by: str | None, period: Period, given: Mapping[str, Any], *, active_only: bool
) -> Sequence[Any]:
    """Return for each group its key, its label, and what it counts.

    Args:
        db: The session.
        by: What to group by; None is one group of all.
        period: When the messages were made.
        given: Checked filters.
        active_only: Whether to leave out deactivated messages.

    Raises:
        InvalidValueError: There were too many empty groups, or the server does not know the zone.
    """
    now = utcnow()
    if by in _STEPS and period.holds_more_than(_MOST_STEPS, _STEPS[by], now):
        raise InvalidValueError("since", f"must be at most {_MOST_STEPS:,} {by}s before the end")
    if by in _STEPS and period.since is not None and period.since.year == MINYEAR:
        # The group that it is in may begin before Python's calendar.
        raise InvalidValueError("since", f"must be after the year {MINYEAR}")
    values = {
        **given,
        "tenant": tenant_of(db),
        "timezone": period.timezone,
        "since": period.since,
        "until": period.until,
        "end": period.until or now,
        "active_only": active_only or None,
    }
    conditions = frozenset(name for name in _CONDITIONS if values.get(name) is not None)
    statement, used = _statement(by, conditions)
    try:
        return fetch(db, statement, {name: values[name] for name in used})
    except DatabaseError as error:
        cause = error.__cause__
        if isinstance(cause, DBAPIError) and getattr(cause.orig, "sqlstate", "") == _UNKNOWN:
            raise InvalidValueError("timezone", "is not known to the server") from None
        raise


@cache
def _statement(by: str | None, conditions: frozenset[str]) -> tuple[TextClause, list[str]]:
    where = ["m.tenant_id = :tenant", *(_CONDITIONS[name] for name in sorted(conditions))]
    own, key, label, order = _keys(by)
    users = "LEFT JOIN users u ON u.tenant_id = :tenant AND u.id = c.user_id"
    statement = f"""
WITH parts AS (
    SELECT {own} AS key, m.conversation_id, count(*) AS messages,
        sum(m.input_tokens) AS input_tokens, sum(m.output_tokens) AS output_tokens
    FROM messages m WHERE {" AND ".join(where)} GROUP BY 1, 2
), grouped AS (
    SELECT {key} AS key, {label} AS label, sum(messages) AS messages,
        sum(p.input_tokens) AS input_tokens, sum(p.output_tokens) AS output_tokens,
        count(DISTINCT c.user_id) AS users, count(*) AS conversations
    FROM parts p JOIN conversations c ON c.tenant_id = :tenant AND c.id = p.conversation_id
    {users if by == "user" else ""} {"" if by is None else "GROUP BY 1"}
)
SELECT key, label, {_COUNTS} FROM grouped
    {_series(by) if "since" in conditions else ""} ORDER BY {order}"""
    used = [name for name in _PARAMETERS if f":{name}" in statement]
    types = (bindparam(name, type_=_PARAMETERS[name]) for name in used)
    return text(statement).bindparams(*types), used


def _keys(by: str | None) -> tuple[str, str, str, str]:
    """Return the key of a message, key and label of a group, and the order of groups."""
    nothing = "CAST(NULL AS text)"
    if by is None:
        return nothing, nothing, nothing, "1"
    if by in _STEPS:
        return _OF_MESSAGE[by], "key", nothing, "key"
    if by in _OF_MESSAGE:
        return _OF_MESSAGE[by], "key", nothing, "messages DESC, key"
    return nothing, *_OF_CONVERSATION[by], "messages DESC, key"


def _series(by: str | None) -> str:
    """Return what joins the hours, days, weeks or months in which there may be no message."""
    last = "CAST(:end AS timestamptz) - interval '1 microsecond'"
    if by == "hour":
        # A summer time of half an hour moves where hours begin.
        keys = (
            "date_trunc('hour', at, :timezone) FROM generate_series("
            f"date_trunc('hour', CAST(:since AS timestamptz), :timezone), {last},"
            " interval '30 minutes')"
        )
    elif by in _STEPS:
        keys = (
            f"CAST(at AS date) FROM generate_series(date_trunc('{by}', :since AT TIME ZONE"
            f" :timezone), ({last}) AT TIME ZONE :timezone, interval '1 {by}')"
        )
    else:
        return ""
    return f"FULL JOIN (SELECT DISTINCT {keys} AS at WHERE :since < :end) s (key) USING (key)"
