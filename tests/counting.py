"""Counting what goes to the server: statements, and round trips as libpq traces them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import event

from database import get_engine


class Statements(list[str]):
    """The statements since it was made, as they were sent."""


@contextmanager
def counted_statements() -> Iterator[Statements]:
    found = Statements()

    def remember(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        found.append(statement)

    engine = get_engine()
    event.listen(engine, "before_cursor_execute", remember)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", remember)


class RoundTrips:
    """How often the client waited for the server, once the block has ended."""

    count = 0


@contextmanager
def counted_round_trips() -> Iterator[RoundTrips]:
    """Count the server's ReadyForQuery messages: one ends each round trip."""
    engine = get_engine()
    result = RoundTrips()
    with tempfile.TemporaryFile() as trace:
        traced = []

        def start(driver: object, *_: object) -> None:
            if driver not in traced:
                driver.pgconn.trace(trace.fileno())  # type: ignore[attr-defined]
                traced.append(driver)

        event.listen(engine, "checkout", start)
        try:
            yield result
        finally:
            event.remove(engine, "checkout", start)
            for driver in traced:
                driver.pgconn.untrace()  # type: ignore[attr-defined]
        os.lseek(trace.fileno(), 0, os.SEEK_SET)
        result.count = trace.read().count(b"ReadyForQuery")
