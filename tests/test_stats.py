"""Statistics: what messages amount to, by group, range and time zone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from typing import Any, get_args
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from database import (
    ALL_TENANTS,
    ConfigurationError,
    ConversationRepository,
    InvalidValueError,
    MessageRepository,
    MessageStats,
    Role,
    SessionLocal,
    TenantSession,
    UserRepository,
    get_engine,
    transaction,
)
from database import StatsRepository as Stats
from database.repositories.stats import Grouping
from tests.counting import counted_round_trips, counted_statements

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)  # a Monday
BERLIN = "Europe/Berlin"


def said(db: TenantSession, chat: UUID, at: datetime = NOON, **fields: Any) -> UUID:
    row: dict[str, Any] = {"role": "user", "content": "secret words", "created_at": at} | fields
    return MessageRepository.append(db, chat, **row).id


@pytest.fixture
def chat(db: TenantSession) -> UUID:
    return ConversationRepository.create(db).id


def keys(rows: list[MessageStats]) -> list[Any]:
    return [row.key for row in rows]


def counted(rows: list[MessageStats]) -> dict[Any, int]:
    return {row.key: row.messages for row in rows}


# What is counted


def test_by_role_model_user_and_conversation(db: TenantSession) -> None:
    ada = UserRepository.create(db, email="ada@example.com")
    bob = UserRepository.create(db, username="bob")
    eve = UserRepository.create(db)
    one, two, bobs, eves = (
        ConversationRepository.create(db, user_id=user.id, thread_id=thread)
        for user, thread in ((ada, "one"), (ada, "two"), (bob, "bobs"), (eve, "eves"))
    )
    nobodys = ConversationRepository.create(db, thread_id="nobodys")
    for chat in (one, one, two, bobs, eves, nobodys):
        said(db, chat.id)
    for chat, model in ((one, "m-1"), (one, "m-2"), (bobs, "m-1")):
        said(db, chat.id, role="assistant", model=model, input_tokens=100, output_tokens=10)
    said(db, one.id, role="tool", output_tokens=0)

    assert Stats.messages(db, "role") == [
        MessageStats(Role.USER, "user", 6, 0, 0, 3, 5),
        MessageStats(Role.ASSISTANT, "assistant", 3, 300, 30, 2, 2),
        MessageStats(Role.TOOL, "tool", 1, 0, 0, 1, 1),
    ]
    assert Stats.messages(db, "model") == [
        MessageStats(None, "", 7, 0, 0, 3, 5),
        MessageStats("m-1", "m-1", 2, 200, 20, 2, 2),
        MessageStats("m-2", "m-2", 1, 100, 10, 1, 1),
    ]
    users = Stats.messages(db, "user")
    assert users[:2] == [
        MessageStats(ada.id, "ada@example.com", 6, 200, 20, 1, 2),
        MessageStats(bob.id, "bob", 2, 100, 10, 1, 1),
    ]
    assert users[2:] == [
        MessageStats(eve.id, str(eve.id), 1, 0, 0, 1, 1),
        MessageStats(None, "", 1, 0, 0, 0, 1),
    ]
    chats = Stats.messages(db, "conversation")
    assert chats[0] == MessageStats(one.id, "one", 5, 200, 20, 1, 1)
    assert {row.label for row in chats} == {"one", "two", "bobs", "eves", "nobodys"}
    assert Stats.summary(db) == MessageStats(None, "", 10, 300, 30, 3, 5)
    assert not db.in_transaction()


def test_of_nothing(db: TenantSession, chat: UUID) -> None:
    for by in get_args(Grouping):
        assert Stats.messages(db, by) == []
    assert Stats.summary(db) == MessageStats(None, "", 0, 0, 0, 0, 0)


def test_filters(db: TenantSession) -> None:
    user = UserRepository.create(db).id
    mine = ConversationRepository.create(db, user_id=user, thread_id="mine")
    other = ConversationRepository.create(db)
    for chat in (mine, other):
        said(db, chat.id)
        said(db, chat.id, role="assistant", model="m-1")
        said(db, chat.id, role="assistant", model="m-2")
    for filters, expected in (
        ({"user_id": user}, 3),
        ({"user_id": str(user)}, 3),
        ({"conversation_id": other.id}, 3),
        ({"conversation_id": "mine"}, 3),
        ({"conversation_id": "unknown"}, 0),
        ({"role": "assistant"}, 4),
        ({"role": Role.USER}, 2),
        ({"model": "m-1"}, 2),
        ({"model": "m-1", "role": "assistant", "user_id": user}, 1),
        ({"model": "m-1", "conversation_id": other.id, "user_id": user}, 0),
    ):
        assert Stats.summary(db, **filters).messages == expected, filters
        for by in ("day", "role", "user"):
            rows = Stats.messages(db, by, **filters)
            assert sum(row.messages for row in rows) == expected, (by, filters)


def test_deactivated_messages_count_unless_refused(db: TenantSession, chat: UUID) -> None:
    said(db, chat, input_tokens=5)
    hidden = said(db, chat, input_tokens=7)
    MessageRepository.deactivate(db, chat, [hidden])
    assert Stats.summary(db).input_tokens == 12
    assert Stats.summary(db, active_only=True).input_tokens == 5
    assert counted(Stats.messages(db, "role", active_only=True)) == {Role.USER: 1}


def test_more_tokens_than_an_integer_holds(db: TenantSession, chat: UUID) -> None:
    for _ in range(3):
        said(db, chat, output_tokens=2**31 - 1)
    assert Stats.summary(db).output_tokens == 3 * (2**31 - 1)
    assert type(Stats.summary(db).output_tokens) is int


# Ranges and time zones


def test_since_is_within_and_until_is_not(db: TenantSession, chat: UUID) -> None:
    for hours in range(3):
        said(db, chat, NOON + timedelta(hours=hours))
    hour = timedelta(hours=1)
    assert Stats.summary(db, since=NOON, until=NOON + hour).messages == 1
    assert Stats.summary(db, since=NOON + hour).messages == 2
    assert Stats.summary(db, until=NOON + hour).messages == 1
    assert Stats.summary(db, since=NOON, until=NOON).messages == 0
    assert Stats.messages(db, "day", since=NOON, until=NOON) == []
    elsewhere = NOON.astimezone(timezone(timedelta(hours=-9)))
    assert Stats.summary(db, since=elsewhere, until=elsewhere + hour).messages == 1


def test_dates_are_days_of_the_time_zone(db: TenantSession, chat: UUID) -> None:
    said(db, chat, datetime(2026, 3, 2, 23, 30, tzinfo=UTC))  # half past midnight in Berlin
    second, third = date(2026, 3, 2), date(2026, 3, 3)
    assert keys(Stats.messages(db, "day")) == [second]
    assert keys(Stats.messages(db, "day", timezone=BERLIN)) == [third]
    assert Stats.summary(db, since=third).messages == 0
    assert Stats.summary(db, since=third, timezone=BERLIN).messages == 1
    assert Stats.summary(db, until=third).messages == 1
    assert Stats.summary(db, until=third, timezone=BERLIN).messages == 0


def test_days_without_messages_are_there(db: TenantSession, chat: UUID) -> None:
    said(db, chat)
    said(db, chat, NOON + timedelta(days=3))
    first, days = date(2026, 3, 1), [date(2026, 3, n) for n in range(1, 8)]
    rows = Stats.messages(db, "day", since=first, until=date(2026, 3, 8), timezone=BERLIN)
    assert keys(rows) == days
    assert [row.messages for row in rows] == [0, 1, 0, 0, 1, 0, 0]
    assert rows[0] == MessageStats(first, "2026-03-01", 0, 0, 0, 0, 0)
    assert keys(Stats.messages(db, "day")) == [days[1], days[4]]
    assert keys(Stats.messages(db, "day", until=date(2026, 3, 8))) == [days[1], days[4]]
    part = Stats.messages(db, "day", since=NOON, until=NOON + timedelta(days=1, seconds=1))
    assert keys(part) == days[1:3]


def test_without_an_end_days_go_up_to_the_present(db: TenantSession, chat: UUID) -> None:
    before = datetime.now(UTC).date()
    rows = Stats.messages(db, "day", since=before - timedelta(days=6))
    after = datetime.now(UTC).date()
    assert rows[0].key == before - timedelta(days=6)
    assert rows[-1].key in (before, after)
    assert len(rows) in (7, 8)
    # What an import has dated later is not lost.
    later = NOON.replace(year=2100)
    said(db, chat, later)
    rows = Stats.messages(db, "day", since=before)
    assert rows[-1].key == later.date()
    assert Stats.messages(db, "day", since=later.date() + timedelta(days=1)) == []


def test_weeks_and_months(db: TenantSession, chat: UUID) -> None:
    said(db, chat, datetime(2026, 3, 1, 23, 30, tzinfo=UTC))  # a Sunday, in Berlin a Monday
    said(db, chat, datetime(2026, 5, 31, 22, 30, tzinfo=UTC))  # in Berlin the first of June
    assert counted(Stats.messages(db, "week")) == {date(2026, 2, 23): 1, date(2026, 5, 25): 1}
    assert counted(Stats.messages(db, "month")) == {date(2026, 3, 1): 1, date(2026, 5, 1): 1}
    berlin = {"timezone": BERLIN, "since": date(2026, 2, 20), "until": date(2026, 6, 2)}
    weeks = Stats.messages(db, "week", **berlin)  # type: ignore[arg-type]
    assert keys(weeks) == [date(2026, 2, 16) + timedelta(weeks=n) for n in range(16)]
    assert [row.messages for row in weeks if row.messages] == [1, 1]
    assert weeks[2].messages == weeks[-1].messages == 1
    months = Stats.messages(db, "month", **berlin)  # type: ignore[arg-type]
    assert counted(months) == {date(2026, n, 1): (n in (3, 6)) for n in range(2, 7)}


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        (BERLIN, date(2026, 3, 29), 23),
        (BERLIN, date(2026, 10, 25), 25),
        ("America/Havana", date(2026, 11, 1), 25),  # midnight comes twice
        ("America/Santiago", date(2026, 9, 6), 23),  # midnight is left out
        ("Australia/Lord_Howe", date(2026, 4, 5), 25),  # half an hour longer
        ("Asia/Kathmandu", date(2026, 4, 5), 24),
    ],
)
def test_days_on_which_clocks_are_changed(
    db: TenantSession, chat: UUID, zone: str, day: date, hours: int
) -> None:
    given: dict[str, Any] = {"since": day, "until": day + timedelta(days=1), "timezone": zone}
    assert [row.messages for row in Stats.messages(db, "hour", **given)] == [0] * hours
    start = datetime.combine(day, datetime.min.time(), ZoneInfo(zone)).astimezone(UTC)
    end = datetime.combine(day + timedelta(days=1), datetime.min.time(), ZoneInfo(zone))
    at = start
    while at < end:
        said(db, chat, at)
        at += timedelta(minutes=30)
    said(db, chat, start - timedelta(microseconds=1))
    said(db, chat, end)
    every = 2 * (end - start) // timedelta(hours=1)
    assert counted(Stats.messages(db, "day", **given)) == {day: every}
    assert counted(Stats.messages(db, "day", timezone=zone))[day] == every
    rows = Stats.messages(db, "hour", **given)
    assert len(rows) == hours
    assert sum(row.messages for row in rows) == every
    assert rows[0].key == start
    assert {row.key.date() for row in rows if isinstance(row.key, datetime)} == {day}
    assert len({row.label for row in rows}) == hours


def test_hours_without_messages_are_there(db: TenantSession, chat: UUID) -> None:
    said(db, chat, NOON + timedelta(minutes=59))
    zone = ZoneInfo("Asia/Kolkata")  # five and a half hours
    given: dict[str, Any] = {
        "since": NOON + timedelta(minutes=29),
        "until": NOON + timedelta(minutes=90, seconds=1),
        "timezone": "Asia/Kolkata",
    }
    rows = Stats.messages(db, "hour", **given)
    assert [row.key.hour for row in rows if isinstance(row.key, datetime)] == [17, 18, 19]
    assert [row.messages for row in rows] == [0, 1, 0]
    assert rows[0].key == datetime(2026, 3, 2, 17, tzinfo=zone)
    assert rows[0].label == "2026-03-02T17:00+05:30"


def test_hours_after_a_change_by_half_an_hour(db: TenantSession) -> None:
    zone = ZoneInfo("Australia/Lord_Howe")
    until = datetime(2026, 4, 5, 23, 10, tzinfo=zone)
    rows = Stats.messages(
        db, "hour", since=date(2026, 4, 5), until=until, timezone="Australia/Lord_Howe"
    )
    assert len(rows) == 25
    assert rows[-1].label == "2026-04-05T23:00+10:30"


# Laws

TIMES = st.datetimes(datetime(2026, 3, 28), datetime(2026, 3, 31), timezones=st.just(UTC))  # noqa: DTZ001
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "chat": st.integers(0, 3),
            "at": TIMES,
            "role": st.sampled_from(list(Role)),
            "model": st.sampled_from([None, "a", "b"]),
            "input_tokens": st.none() | st.integers(0, 2**31 - 1),
            "output_tokens": st.none() | st.integers(0, 9),
        }
    ),
    max_size=12,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=ROWS,
    bounds=st.tuples(st.none() | TIMES, st.none() | TIMES),
    zone=st.sampled_from(["UTC", BERLIN, "Asia/Kolkata", "America/Havana"]),
)
def test_groups_add_up_to_the_totals(
    configured: None,
    rows: list[dict[str, Any]],
    bounds: tuple[datetime | None, datetime | None],
    zone: str,
) -> None:
    since, until = sorted(bounds) if all(bounds) else bounds  # type: ignore[type-var]
    if since and not until:
        until = datetime(2026, 4, 2, tzinfo=UTC)
    with SessionLocal(tenant_id=f"law-{uuid4().hex[:12]}") as db:
        owners = [UserRepository.create(db).id, UserRepository.create(db).id, None]
        with transaction(db):
            chats = [ConversationRepository.create(db, user_id=owners[n % 3]).id for n in range(4)]
            for row in rows:
                fields = {k: v for k, v in row.items() if k not in ("chat", "at")}
                said(db, chats[row["chat"]], at=row["at"], **fields)
        within = [
            row
            for row in rows
            if (since is None or row["at"] >= since) and (until is None or row["at"] < until)
        ]
        given: dict[str, Any] = {"since": since, "until": until, "timezone": zone}
        total = Stats.summary(db, **given)
        assert total.messages == len(within)
        assert total.conversations == len({row["chat"] for row in within})
        assert total.users == len({row["chat"] % 3 for row in within} - {2})
        for name in ("input_tokens", "output_tokens"):
            assert getattr(total, name) == sum(row[name] or 0 for row in within)
        for by in get_args(Grouping):
            groups = Stats.messages(db, by, **given)
            assert len(set(keys(groups))) == len(groups)
            for name in ("messages", "input_tokens", "output_tokens"):
                assert sum(getattr(one, name) for one in groups) == getattr(total, name)
            for name in ("users", "conversations"):
                counts = [getattr(one, name) for one in groups]
                assert max(counts, default=0) <= getattr(total, name) <= sum(counts)
            if by in ("hour", "day", "week", "month"):
                assert keys(groups) == sorted(keys(groups))
            else:
                assert [one.messages for one in groups] == sorted(
                    (one.messages for one in groups), reverse=True
                )


# Tenants, queries, input


def test_of_one_tenant(db: TenantSession, other: TenantSession, chat: UUID) -> None:
    user = UserRepository.create(db, email="ada@example.com").id
    for session in (db, other):
        owner = UserRepository.create(session, email="same@example.com").id
        said(session, ConversationRepository.create(session, user_id=owner).id, input_tokens=5)
    for session in (db, other):
        assert Stats.summary(session) == MessageStats(None, "", 1, 5, 0, 1, 1)
        for by in get_args(Grouping):
            assert sum(row.messages for row in Stats.messages(session, by)) == 1, by
    theirs = Stats.messages(db, "conversation")[0].key
    assert isinstance(theirs, UUID)
    assert Stats.summary(other, conversation_id=theirs).messages == 0
    assert Stats.summary(other, user_id=user).messages == 0
    with SessionLocal(tenant_id=ALL_TENANTS) as everywhere, pytest.raises(ConfigurationError):
        Stats.summary(everywhere)


@pytest.mark.parametrize("unit", [nullcontext, transaction])
def test_one_query_each(
    db: TenantSession, chat: UUID, unit: Callable[[TenantSession], Any]
) -> None:
    said(db, chat)
    since, until = date(2026, 3, 1), NOON + timedelta(days=1)
    calls: list[Callable[[], object]] = [
        lambda: Stats.summary(db, since=since, user_id=uuid4()),
        *(
            lambda by=by: Stats.messages(db, by, since=since, until=until, timezone=BERLIN)
            for by in get_args(Grouping)
        ),
    ]
    for call in calls:
        with unit(db), counted_statements() as statements, counted_round_trips() as trips:
            call()
        assert len(statements) == 1
        if unit is nullcontext:
            assert trips.count == 1
            assert get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def test_what_a_unit_has_appended_counts(db: TenantSession, chat: UUID) -> None:
    with transaction(db):
        said(db, chat)
        assert Stats.summary(db).messages == 1


class Nowhere(tzinfo):
    def utcoffset(self, _: datetime | None) -> None:
        return None

    dst = tzname = utcoffset


BAD: list[tuple[str, dict[str, Any]]] = [
    ("since", {"since": datetime(2026, 1, 1)}),  # noqa: DTZ001
    ("until", {"until": datetime(2026, 1, 1)}),  # noqa: DTZ001
    ("since", {"since": datetime(2026, 1, 1, tzinfo=Nowhere())}),
    ("since", {"since": "2026-01-01"}),
    ("since", {"since": 5}),
    ("until", {"since": NOON, "until": NOON - timedelta(microseconds=1)}),
    ("until", {"since": date(2026, 1, 2), "until": date(2026, 1, 1)}),
    *(
        ("timezone", {"timezone": zone})
        for zone in (
            "Mars/Olympus",
            "",
            "../etc/passwd",
            "/etc/localtime",
            "Europe",
            "europe\x00",
            "x" * 10_000,
            "\ud800",
            "UTC'; --",
            "FOO+5",
            None,
            5,
            UTC,
        )
    ),
    ("user_id", {"user_id": "me"}),
    ("conversation_id", {"conversation_id": 5}),
    ("role", {"role": "ghost"}),
    ("model", {"model": 5}),
    ("model", {"model": "x" * 256}),
]


@pytest.mark.parametrize(("field", "arguments"), BAD)
def test_bad_arguments(db: TenantSession, field: str, arguments: dict[str, Any]) -> None:
    for call in (
        lambda: Stats.summary(db, **arguments),
        lambda: Stats.messages(db, "day", **arguments),
    ):
        with pytest.raises(InvalidValueError) as caught:
            call()
        assert caught.value.field == field
        assert not db.in_transaction()


@pytest.mark.parametrize("by", ["year", "", None, 5, ["day"], "content"])
def test_bad_groups(db: TenantSession, by: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^by: must be one of hour, day"):
        Stats.messages(db, by)


def test_a_zone_that_only_the_client_knows(
    db: TenantSession, chat: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    said(db, chat)
    monkeypatch.setattr("database.repositories.periods.ZoneInfo", lambda _: UTC)
    with pytest.raises(InvalidValueError, match=r"^timezone: is not known to the server"):
        Stats.messages(db, "day", timezone="Mars/Olympus")
    assert not db.in_transaction()


def test_the_ends_of_time(db: TenantSession, chat: UUID) -> None:
    said(db, chat)
    for zone in ("UTC", "Pacific/Kiritimati", "Pacific/Niue"):
        given: dict[str, Any] = {"since": date.min, "until": date.max, "timezone": zone}
        assert Stats.summary(db, **given).messages == 1
        assert len(Stats.messages(db, "role", **given)) == 1
        months = Stats.messages(db, "month", **given | {"since": date(5000, 1, 1)})
        assert len(months) == 12 * 5000
        for by in ("hour", "day", "week", "month"):
            with pytest.raises(InvalidValueError, match=f"^since: must be at most 100,000 {by}s"):
                Stats.messages(db, by, **given)
        far = [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
        assert Stats.summary(db, since=far[0], until=far[1], timezone=zone).messages == 1


def test_groups_beyond_the_ends_of_time(db: TenantSession) -> None:
    """A month that begins before the year 1, and hours that are after the year 9999 in Tokyo."""
    with pytest.raises(InvalidValueError, match=r"^since: must be after the year 1$"):
        Stats.messages(
            db,
            "month",
            since=datetime.min.replace(tzinfo=UTC),
            until=date(1, 2, 1),
            timezone="America/New_York",
        )
    last = datetime.max.replace(tzinfo=UTC)
    since = last - timedelta(hours=2)
    assert Stats.messages(db, "hour", since=since, until=last, timezone="Asia/Tokyo")


def test_messages_of_the_last_year_there_is(db: TenantSession, chat: UUID) -> None:
    said(db, chat, datetime.max.replace(tzinfo=UTC) - timedelta(hours=20))
    for by in ("hour", "day"):
        assert len(Stats.messages(db, by, timezone="Pacific/Kiritimati")) == 1


def test_labels_and_reprs_hold_no_contents(db: TenantSession, chat: UUID) -> None:
    said(db, chat)
    for by in get_args(Grouping):
        assert "secret" not in repr(Stats.messages(db, by))


@pytest.fixture
def in_a_zone(fresh_url: str) -> Iterator[None]:
    from database import close_db, configure
    from tests.conftest import admin

    with admin(fresh_url) as login:
        name = login.info.dbname
        login.execute(f"ALTER DATABASE \"{name}\" SET timezone = 'Asia/Tokyo'")
    configure(url=fresh_url)
    yield
    close_db()


def test_whatever_the_server_has_for_a_zone(in_a_zone: None) -> None:
    with SessionLocal() as db:
        chat = ConversationRepository.create(db).id
        said(db, chat, datetime(2026, 3, 2, 23, 30, tzinfo=UTC))
        (day,) = Stats.messages(db, "day", since=date(2026, 3, 2), until=date(2026, 3, 3))
        assert (day.key, day.label, day.messages) == (date(2026, 3, 2), "2026-03-02", 1)
        (hour,) = Stats.messages(db, "hour")
        assert hour.label == "2026-03-02T23:00+00:00"
