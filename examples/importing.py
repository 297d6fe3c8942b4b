"""What the import jobs share: files read item by item, transactions, and the report."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, TypeVar

from pydantic import ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from sqlalchemy.orm import Session
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from database import AlreadyExistsError, bind_tenant, run_in_transaction

T = TypeVar("T")

CHUNK_BYTES = 2**16

# All up to the next bracket that stands in no string, or as far as the strings are complete.
BRACKET = re.compile(rb'(?:[^]["{}]++|"(?:[^"\\]++|\\.)*+")*+([][{}])?', re.DOTALL)


def elements(
    file: BinaryIO, advance: Callable[[int], None], largest: int
) -> Iterator[bytes | None]:
    """Yield the elements of a JSON list of any length as they stand there; None if too large.

    What stands between two of them, and should not, is yielded as well: whatever is wrong with one
    element, the next one comes.

    Args:
        file: The file.
        advance: Gets the number of bytes read.
        largest: How many bytes an element may have.

    Raises:
        ValueError: The file is no list, or breaks off.
    """
    chunk = file.read(CHUNK_BYTES)
    advance(len(chunk))
    data = chunk.lstrip()
    if not data.startswith(b"["):
        raise ValueError("must be a JSON list")
    start = end = 1  # of the element, and of what has been looked at
    depth = 0
    separator = b""
    too_large = False
    while True:
        while (match := BRACKET.match(data, end)) and (bracket := match[1]):
            if depth == 0:
                start = match.start(1)
                between = data[end:start].strip()
                if between != (separator if bracket in b"[{" else b""):
                    yield between.strip(b", \t\r\n")
                if bracket in b"]}":
                    if bracket == b"}" or (data[start + 1 :] + file.read(CHUNK_BYTES)).strip():
                        raise ValueError("must be one JSON list")
                    return
                separator = b","
            end = match.end()
            depth += 1 if bracket in b"[{" else -1
            if depth == 0:
                yield None if too_large or end - start > largest else data[start:end]
                too_large = False
        end = match.end() if match and depth > 0 else end
        too_large |= depth > 0 and len(data) - start > largest
        done = end if depth == 0 or too_large else start
        data, start, end = data[done:], 0, end - done
        # More of a long element at once: it is copied each time, and its last text read anew.
        chunk = file.read(max(CHUNK_BYTES, len(data) // 2))
        if not chunk or len(data) - end > largest:
            raise ValueError("breaks off" if not chunk else "a text is too large")
        advance(len(chunk))
        data += chunk


def lines(file: BinaryIO, advance: Callable[[int], None], largest: int) -> Iterator[bytes | None]:
    """Yield the lines of a file; None for one that has more than `largest` bytes."""
    while line := file.readline(largest + 1):
        advance(len(line))
        if len(line) <= largest:
            yield line
            continue
        while not line.endswith(b"\n") and (line := file.readline(CHUNK_BYTES)):
            advance(len(line))
        yield None


def reason(error: Exception) -> str:
    """Return in short what is wrong, without what stands there."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
        return f"not JSON: {error.args[0]}"
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"]])


def tenant(text: str) -> str:
    """Return a tenant's name; a wrong one is a ValueError."""
    bind_tenant(Session(), text)
    return text


def unit(work: Callable[[Session], T], tenant_id: str | None) -> T:
    """Run a transaction; once more when another job has just written the same rows."""
    again = retry_if_exception_type(AlreadyExistsError)
    retrying = Retrying(retry=again, stop=stop_after_attempt(5), reraise=True)
    result: T = retrying(run_in_transaction, work, attempts=8, tenant_id=tenant_id)
    return result


def report(
    tables: Iterable[str],
    written: Counter[str],
    there: Counter[str] | None,
    problems: int,
    seconds: float,
) -> None:
    """Say on stdout what was done.

    Args:
        tables: In which order.
        written: Rows by table.
        there: Those that were there already; None if nobody has asked, in a dry run.
        problems: How many were told.
        seconds: How long it took.
    """
    table = Table("table", box=SIMPLE)
    table.add_column("sound" if there is None else "inserted", justify="right")
    table.add_column("already there", justify="right")
    for name in tables:
        known = "not asked" if there is None else f"{there[name]:,}"
        table.add_row(name, f"{written[name]:,}", known)
    rows = written.total() + (there or Counter()).total()
    speed = f"{rows:,} rows in {seconds:.1f} s: {rows / seconds:,.0f} rows/s"
    Console().print(table, f"{speed}; {problems:,} errors", highlight=False)
