"""What commands print: tables on a terminal, tab-separated lines in a pipe, or JSON."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import Enum
from itertools import chain, islice
from typing import Any

import orjson
import typer

__all__ = ["print_record", "print_rows", "warn"]

_ROWS_OF_A_TABLE = 500
"""On a terminal a table needs all its rows before its first line; longer lists are several."""

_WIDTH_OF_ID = 36

# Bytes that move a terminal's cursor, or part a tab-separated line, are shown by their escapes.
_CONTROLS = {c: repr(chr(c))[1:-1] for c in (*range(32), *range(127, 160), 0x2028, 0x2029)}


def print_rows(rows: Iterable[Any], columns: Sequence[str], *, as_json: bool) -> None:
    """Print mappings or entities, as they come: in bounded memory.

    Args:
        rows: What to print.
        columns: What a table shows of each; JSON has all fields.
        as_json: Whether to print one JSON array.
    """
    rows = iter(rows)
    # What goes wrong at the start goes wrong before there is any output.
    rows = chain(list(islice(rows, 1)), rows)
    if as_json:
        _print_array(rows)
    elif sys.stdout.isatty():
        _print_tables(rows, columns)
    else:
        print("\t".join(columns))  # noqa: T201
        for row in rows:
            print("\t".join(cell(_field(row, name)) for name in columns))  # noqa: T201


def print_record(record: Any, *, as_json: bool) -> None:
    """Print one mapping or entity: a line for each field, or a JSON object."""
    fields = _fields(record)
    if as_json:
        print(_dumped(fields))  # noqa: T201
        return
    width = max(map(len, fields), default=0) + 1
    for name, value in fields.items():
        between = " " * (width - len(name)) if sys.stdout.isatty() else "\t"
        print(f"{name}{between}{cell(value)}")  # noqa: T201


def warn(line: str) -> None:
    """Print a line that is no result: to standard error."""
    typer.echo(line, err=True)


def cell(value: Any) -> str:
    """Return a value as a table shows it: on one line, without control characters."""
    match value:
        case None:
            text = ""
        case bool():
            text = "yes" if value else "no"
        case datetime():
            text = value.isoformat(timespec="seconds")
        case Enum():
            text = str(value.value)
        case list() if all(isinstance(item, str) for item in value):
            text = " ".join(value)
        case dict() | list():
            text = _dumped(value)
        case _:
            text = str(value)
    return text.translate(_CONTROLS)


def _print_array(rows: Iterable[Any]) -> None:
    opening = "["
    for row in rows:
        print(f"{opening}{_dumped(_fields(row))}", end="")  # noqa: T201
        opening = ",\n"
    print("[]" if opening == "[" else "]")  # noqa: T201


def _print_tables(rows: Iterator[Any], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    part = list(islice(rows, _ROWS_OF_A_TABLE))
    while True:
        table = Table(box=None, pad_edge=False)
        for name in columns:
            # An id on one line can be copied.
            width = min(_WIDTH_OF_ID, console.width // 2) if name == "id" else None
            table.add_column(name, overflow="fold", min_width=width)
        for row in part:
            table.add_row(*(Text(cell(_field(row, name))) for name in columns))
        console.print(table)
        part = list(islice(rows, _ROWS_OF_A_TABLE))
        if not part:
            return


def _field(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else getattr(row, name)


def _fields(row: Any) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = row if isinstance(row, Mapping) else row.to_dict()
    return fields


def _dumped(value: Any) -> str:
    return orjson.dumps(value, default=str).decode()
