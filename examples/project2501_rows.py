"""Rows of Project 2501 as rows of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from project2501_source import UNREADABLE

Fields = dict[str, Any]

RENAMED = {
    "compressed_content": "content",
    "last_accessed": "last_accessed_at",
    "memory_sequence": "sequence",
    "message_count_at_compression": "message_count",
}
ENUMS: dict[str, Callable[[str], str]] = {
    "mode": str.lower,
    "type": str.lower,
    "execution_context": str.upper,
    "role": str.lower,
    "execution_stage": str.lower,
}
MAX_ROWS = 1000  # of a table, in memory at once
MAX_CHARACTERS = 4_000_000


@dataclass
class Row:
    """A row as it goes into our table, and what was left out of it."""

    id: UUID
    fields: Fields
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, name: str, why: str) -> None:
        """Import the row without a field."""
        self.fields.pop(name, None)
        self.left_out.append(f"{name}: {why}")


def mapped(given: Fields) -> Row:
    """Return a row with what all tables have in common; nulls are our defaults."""
    row = Row(given["id"], {})
    fields = row.fields
    for name, value in given.items():
        if value is UNREADABLE:
            row.leave_out(RENAMED.get(name, name), "is beyond the years 1 to 9999")
        elif isinstance(value, datetime) and value.tzinfo is None:
            fields[name] = value.replace(tzinfo=UTC)
        elif name in ENUMS and isinstance(value, str):
            fields[name] = ENUMS[name](value)
        elif value is not None and name != "conversation_id":
            fields.setdefault(RENAMED.get(name, name), value)
    for name, other in (("created_at", "executed_at"), ("updated_at", "created_at")):
        if name not in fields and other in fields:
            fields[name] = fields[other]
    return row


def persona(given: Fields) -> Row:
    """Return a persona."""
    row = mapped(given)
    if "loop_frequency" in row.fields:
        if row.fields.get("mode", "reactive") == "reactive":
            row.leave_out("loop_frequency", "of a reactive persona")
        else:  # theirs may be ".5"
            row.fields["loop_frequency"] = re.sub(r"^\.", "0.", str(row.fields["loop_frequency"]))
    return row


def state(given: Fields) -> Row:
    """Return a state: the value of a key, or the variables of a stage."""
    row = mapped(given)
    variables = row.fields.pop("variables", None)
    if "state_key" not in row.fields:
        row.fields |= {"state_key": "variables", "state_value": variables}
    row.fields.setdefault("state_value", None)
    if "executed_at" not in row.fields and "updated_at" in row.fields:
        row.fields["executed_at"] = row.fields["updated_at"]
    return row


def memory(given: Fields, dimensions: int) -> Row:
    """Return a memory, with the range that it names."""
    row = mapped(given)
    row.fields.pop("updated_at", None)
    if (text := row.fields.pop("original_message_range", None)) is not None:
        match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", str(text))
        if match and 0 < int(match[1]) <= int(match[2]):
            row.fields |= {"first_position": int(match[1]), "last_position": int(match[2])}
        else:
            row.leave_out("original_message_range", "is no range of positions")
    if (embedding := row.fields.get("embedding")) is not None:
        if isinstance(embedding, str):
            with suppress(ValueError):
                embedding = json.loads(embedding)
        if isinstance(embedding, list) and len(embedding) == dimensions:
            row.fields["embedding"] = embedding
        else:
            row.leave_out("embedding", f"has not {dimensions} dimensions")
    if (first := row.fields.get("first_message_id")) is not None:
        try:
            row.fields["first_message_id"] = UUID(str(first))
        except ValueError:
            row.leave_out("first_message_id", "is no UUID")
    return row


def parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield rows in lists that are small enough to hold."""
    part: list[Row] = []
    characters = 0
    for row in rows:
        part.append(row)
        characters += sum(len(value) for value in row.fields.values() if isinstance(value, str))
        if len(part) == MAX_ROWS or characters > MAX_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part
