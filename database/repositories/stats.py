"""Statistics: how much is said, by whom, when and with which models; never what."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime
from datetime import timezone as timezone_of
from typing import TYPE_CHECKING, Any, Literal, get_args

from database.errors import InvalidValueError
from database.models.message import Role
from database.repositories.grouping import groups_of
from database.repositories.periods import period_of
from database.repositories.threads import conversation_id_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

    from database.repositories.periods import Period

__all__ = ["Grouping", "MessageStats", "StatsRepository"]

Grouping = Literal["hour", "day", "week", "month", "role", "model", "user", "conversation"]


@dataclass(frozen=True, slots=True)
class MessageStats:
    """What the messages of a group amount to.

    Attributes:
        key: What the group has in common: the day it is, or on which the week or month begins; the
            time at which the hour begins; the role; the model; the id of the user or conversation.
            None in totals, for messages without a model, and for conversations without a user.
        label: The key as text to show, "" for None: of a user the address, else the username, else
            the id; of a conversation its thread_id.
        messages: How many messages there are.
        input_tokens: How many tokens they cost; messages that say nothing of it count as 0.
        output_tokens: Likewise.
        users: In conversations of how many users they are.
        conversations: In how many conversations they are.
    """

    key: date | datetime | Role | str | UUID | None
    label: str
    messages: int
    input_tokens: int
    output_tokens: int
    users: int
    conversations: int


class StatsRepository:
    """What the messages of a tenant amount to, one query a call.

    Deactivated messages count too, for they were sent and paid for; with `active_only` they do not.
    """

    @classmethod
    def summary(
        cls,
        db: Session,
        *,
        since: date | datetime | None = None,
        until: date | datetime | None = None,
        timezone: str = "UTC",
        user_id: UUID | str | None = None,
        conversation_id: UUID | str | None = None,
        role: Role | str | None = None,
        model: str | None = None,
        active_only: bool = False,
    ) -> MessageStats:
        """Return the totals of the messages that `messages` would group by the same arguments."""
        period = period_of(since, until, timezone)
        given = cls._filters(db, user_id, conversation_id, role, model)
        rows = groups_of(db, None, period, given, active_only=active_only)
        return _stats(None, period, rows[0])

    @classmethod
    def messages(
        cls,
        db: Session,
        by: Grouping,
        *,
        since: date | datetime | None = None,
        until: date | datetime | None = None,
        timezone: str = "UTC",
        user_id: UUID | str | None = None,
        conversation_id: UUID | str | None = None,
        role: Role | str | None = None,
        model: str | None = None,
        active_only: bool = False,
    ) -> list[MessageStats]:
        """Return the messages' statistics by group.

        Args:
            db: The session.
            by: "hour", "day", "week" (from Monday) or "month": the earliest first, and with `since`
                also those without messages, up to `until` or else the present. "role", "model",
                "user" or "conversation": those with the most messages first.
            since: Only messages made at this time or later; a date stands for its first moment.
            until: Only messages made before this time: of a date given here, none.
            timezone: The IANA name of the time zone in which days begin.
            user_id: Only in this user's conversations.
            conversation_id: Only in this one.
            role: Only by this role.
            model: Only by this model.
            active_only: Whether to leave out deactivated messages.

        Raises:
            InvalidValueError: An argument is not valid, `until` is before `since`, or from `since`
                on there are more than 100,000 hours, days, weeks or months.
        """
        if by not in get_args(Grouping):
            names = ", ".join(get_args(Grouping))
            raise InvalidValueError("by", f"must be one of {names}")
        period = period_of(since, until, timezone)
        given = cls._filters(db, user_id, conversation_id, role, model)
        rows = groups_of(db, by, period, given, active_only=active_only)
        return [_stats(by, period, row) for row in rows]

    @staticmethod
    def _filters(
        db: Session,
        user_id: UUID | str | None,
        conversation_id: UUID | str | None,
        role: Role | str | None,
        model: str | None,
    ) -> dict[str, Any]:
        from database.models.conversation import Conversation
        from database.models.message import Message
        from database.rules import check_fields

        of_message = {"role": role, "model": model}
        given: dict[str, Any] = {}
        for kind, fields in ((Conversation, {"user_id": user_id}), (Message, of_message)):
            some = {name: value for name, value in fields.items() if value is not None}
            given |= check_fields(kind, some, "replace", partial=True)
        if conversation_id is not None:
            given["conversation_id"] = conversation_id_of(db, conversation_id)
        return given


def _stats(by: Grouping | None, period: Period, row: Sequence[Any]) -> MessageStats:
    key, label, *counts = row
    if by == "hour":
        with suppress(OverflowError):  # there it is after Python's calendar
            key = key.astimezone(period.zone)
        # Of one zone's times the two in an hour that comes twice would be equal.
        key = key.replace(tzinfo=timezone_of(key.utcoffset()))
        label = key.isoformat(timespec="minutes")
    elif by == "role":
        key = Role(key)
    if label is None:
        label = "" if key is None else str(key)
    return MessageStats(key, label, *counts)
