"""Reading what an export wrote into a tenant, all or nothing.

Python checks the form of a line and PostgreSQL reads it, for Python's numbers are not PostgreSQL's.
Errors name the line, never what it holds.
"""

from __future__ import annotations

import json
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn
from uuid import UUID

from database.errors import AlreadyExistsError, InvalidReferenceError, InvalidValueError
from database.repositories.bookkeeping import correct_counts
from database.repositories.exporting import HEADER, PARTS, Part
from database.repositories.import_statements import inserting, later_references, referencing
from database.repositories.ownership import OWNED, SHARED, Reference, columns_of
from database.session import tenant_of
from database.types import clean_text
from database.units import one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sqlalchemy.orm import Session

    from database.errors import DatabaseError

__all__ = ["import_user"]

_MOST_ROWS = 1_000
_MOST_CHARACTERS = 1_000_000


class _Line(NamedTuple):
    number: int
    kind: Part | Reference
    """The part whose row it is; of a reference that is set afterwards, its table and column."""
    text: str


def import_user(db: Session, lines: Iterable[str]) -> dict[str, int]:
    """Insert the rows of an export; return how many by table."""
    reader = _Reader(lines)
    tenant = tenant_of(db)
    written = dict.fromkeys((*SHARED, *OWNED), 0)
    with transaction(db), SpooledTemporaryFile(_MOST_CHARACTERS, "w+", encoding="utf-8") as later:
        for batch in _batches(reader.rows(later)):
            parameters = {"tenant": tenant, "user": reader.user}
            assert isinstance(batch[0].kind, Part)
            written[batch[0].kind.table] += _write(db, batch, parameters)
        later.seek(0)
        for batch in _batches(_referring(later)):
            _write(db, batch, parameters)
        if reader.user is not None and reader.has_branches:
            correct_counts(db, reader.user)
    return written


class _Reader:
    """Checks the form and the order of lines, and remembers whose they are."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = enumerate(lines, 1)
        self.user: UUID | None = None
        self.has_branches = False
        self.place = 0

    def rows(self, later: IO[str]) -> Iterator[_Line]:
        """Yield the lines of rows; write down the references that must wait for their rows."""
        _check_header(*next(self.lines, (1, "")))
        number = 1
        for number, text in self.lines:
            part, row = _row(number, _parsed(number, text))
            self._follow(number, part, row)
            self.has_branches |= part.table == "conversations" and bool(row["is_branched"])
            yield _Line(number, part, text)
            for column, _ in later_references(part.table):
                if row[column] is not None:
                    reference = {"id": row["id"], column: row[column]}
                    later.write(json.dumps([number, part.table, column, reference]) + "\n")
        if self.user is None:
            raise InvalidValueError(f"line {number + 1}", "must be the row of the user")

    def _follow(self, number: int, part: Part, row: dict[str, Any]) -> None:
        place = PARTS.index(part)
        if place < self.place:
            raise InvalidValueError(f"line {number}", "must come in the order of an export")
        self.place = place
        if part.table == "users":
            if self.user is not None:
                raise InvalidValueError(f"line {number}", "must be of the same user")
            self.user = _uuid(number, row["id"])
        elif part.table in OWNED and self.user is None:
            raise InvalidValueError(f"line {number}", "must be the row of the user")


def _check_header(number: int, line: object) -> None:
    if _parsed(number, line) != _parsed(number, json.dumps(HEADER)):
        rule = f"must be the header of a {HEADER['format']} of version {HEADER['version']}"
        raise InvalidValueError(f"line {number}", rule)


def _uuid(number: int, value: Any) -> UUID:
    try:
        return UUID(value)
    except (ValueError, TypeError, AttributeError):
        raise InvalidValueError(f"line {number}: id", "must be a UUID") from None


def _parsed(number: int, line: object) -> dict[str, Any]:
    if not isinstance(line, str):
        raise InvalidValueError(f"line {number}", "must be text")
    clean_text(line, f"line {number}", "error")
    try:
        # Not orjson: it takes no number beyond 64 bits. Nobody calculates with these.
        value = json.loads(line, parse_int=str, parse_float=str, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise InvalidValueError(f"line {number}", "must be one JSON object") from None
    if not isinstance(value, dict):
        raise InvalidValueError(f"line {number}", "must be one JSON object")
    return value


def _refuse(_: str) -> NoReturn:
    raise ValueError


def _row(number: int, line: dict[str, Any]) -> tuple[Part, dict[str, Any]]:
    where = f"line {number}"
    table, row = line.get("table"), line.get("row")
    marked = {"elsewhere": True} if "elsewhere" in line else {}
    if line != {"table": table, "row": row, **marked} or not isinstance(row, dict):
        raise InvalidValueError(where, "must hold a table, a row, and nothing else")
    part = Part(str(table), bool(marked))
    if part not in PARTS:
        raise InvalidValueError(f"{where}: table", "must be one of an export")
    if "tenant_id" in row:
        raise InvalidValueError(f"{where}: tenant_id", "must not be given: it is the session's")
    columns = columns_of(part.table)
    if missing := [name for name in columns if name not in row]:
        raise InvalidValueError(f"{where}: {missing[0]}", "must be given")
    if len(row) > len(columns):
        raise InvalidValueError(where, f"must hold no column that {part.table} does not have")
    return part, row


def _referring(later: IO[str]) -> Iterator[_Line]:
    for line in later:
        number, table, column, row = json.loads(line)
        yield _Line(number, Reference(column, table), json.dumps({"row": row}))


def _batches(lines: Iterable[_Line]) -> Iterator[list[_Line]]:
    batch: list[_Line] = []
    size = 0
    for line in lines:
        full = len(batch) == _MOST_ROWS or size + len(line.text) > _MOST_CHARACTERS
        if batch and (full or line.kind != batch[0].kind):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line.text)
    if batch:
        yield batch


def _write(db: Session, batch: list[_Line], parameters: dict[str, Any]) -> int:
    """Write a batch in one statement; if that fails, in halves, to find the line at fault."""
    kind = batch[0].kind
    sql = inserting(kind) if isinstance(kind, Part) else referencing(kind)
    document = "[" + ",".join(line.text for line in batch) + "]"
    try:
        with one_write(db) as connection:
            written, misplaced = connection.execute(sql, {**parameters, "lines": document}).one()
    except (AlreadyExistsError, InvalidReferenceError, InvalidValueError) as error:
        if len(batch) == 1:
            raise _at(batch[0].number, error) from error
        half = len(batch) // 2
        return _write(db, batch[:half], parameters) + _write(db, batch[half:], parameters)
    if misplaced is not None:
        place, column = misplaced
        raise InvalidReferenceError(f"line {batch[place - 1].number}: {column}")
    return int(written)


def _at(
    number: int, error: AlreadyExistsError | InvalidReferenceError | InvalidValueError
) -> DatabaseError:
    if isinstance(error, AlreadyExistsError):
        return AlreadyExistsError(f"line {number}: {error.key}")
    if isinstance(error, InvalidReferenceError):
        return InvalidReferenceError(f"line {number}: {error.field}")
    return InvalidValueError(f"line {number}: {error.field}", error.rule)
