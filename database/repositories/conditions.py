"""Conditions on JSON columns, as one SQL/JSON path each: data that the server evaluates.

In a path's predicate numbers compare as numbers, and a missing member or a value of another type is
no error but no match. Paths are strict: an array is not looked into unless the operator says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from database.errors import InvalidValueError
from database.types import dump_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["json_paths"]

_COMPARED = {"eq": "==", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_NEVER = "exists($ ? (1 == 2))"
_MOST = 100
# The server's stack, and its regular expressions, end somewhere beyond.
_MOST_CHARACTERS = 10_000
_BITS = 1024
_RULE = "must be text, a finite number, a boolean or None"


def json_paths(
    where: Mapping[str | tuple[str, ...], Any], columns: Sequence[str]
) -> dict[str, str | None]:
    """Return for each column the path that its conditions make, or None without any.

    Args:
        where: What must hold, by member: `{"stars": {"gte": 10}, "metadata.lang": "en"}`. A member
            is a dotted path, or a tuple of names; the name of a column at its front chooses the
            column, otherwise it is the first one. A condition is a value, which must be equal, or
            operators with theirs: eq, ne, gt, gte, lt, lte, in, contains, exists.
        columns: Which columns there are.

    Raises:
        InvalidValueError: An operator is unknown, or its value is not of a kind that it takes.
    """
    if not isinstance(where, Mapping):
        raise InvalidValueError("where", "must map members to conditions")
    if len(where) > _MOST:
        raise InvalidValueError("where", f"must have at most {_MOST} conditions")
    found: dict[str, list[str]] = {column: [] for column in columns}
    for member, condition in where.items():
        column, path = _member(member, columns)
        for name, operand in _operators(condition).items():
            field = f"where.{'.'.join(member) if isinstance(member, tuple) else member}.{name}"
            found[column].append(f"({_predicate(name, path, operand, field)})")
    return {
        column: f"strict {' && '.join(predicates)}" if predicates else None
        for column, predicates in found.items()
    }


def _member(member: object, columns: Sequence[str]) -> tuple[str, str]:
    names = tuple(member.split(".")) if isinstance(member, str) else member
    if (
        not isinstance(names, tuple)
        or not all(isinstance(n, str) and n for n in names)
        or not names
    ):
        raise InvalidValueError("where", "members must be dotted paths or tuples of names")
    if len(names) > _MOST:
        raise InvalidValueError("where", f"members must be at most {_MOST} levels deep")
    column = columns[0]
    if names[0] in columns and len(names) > 1:
        column, names = names[0], names[1:]
    return column, "".join(f".{_literal(name, 'where')}" for name in names)


def _operators(condition: object) -> Mapping[str, Any]:
    if not isinstance(condition, Mapping):
        return {"eq": condition}
    if not condition:
        raise InvalidValueError("where", "a condition must have an operator")
    return condition


def _predicate(name: object, path: str, operand: Any, field: str) -> str:
    at = f"${path}"
    if name in _COMPARED:
        return f"{at} {_COMPARED[str(name)]} {_literal(operand, field)}"
    other: dict[object, Callable[[], str]] = {
        "ne": lambda: _differs(at, operand, field),
        "in": lambda: _is_one_of(at, operand, field),
        "contains": lambda: _contains(at, operand, field),
        "exists": lambda: _exists(path, operand, field),
    }
    if name not in other:
        known = ", ".join(sorted({*_COMPARED, *map(str, other)}))
        raise InvalidValueError("where", f"operators are {known}")
    return other[name]()


def _differs(at: str, operand: Any, field: str) -> str:
    # Without the type, null would differ from everything.
    literal = _literal(operand, field)
    kind = {'"': "string", "t": "boolean", "f": "boolean", "n": "null"}.get(literal[0], "number")
    return f'{at} != {literal} && {at}.type() == "{kind}"'


def _is_one_of(at: str, operand: Any, field: str) -> str:
    if not isinstance(operand, list | tuple | set | frozenset):
        raise InvalidValueError(field, "must be a list of values")
    if len(operand) > _MOST:
        raise InvalidValueError(field, f"must have at most {_MOST} values")
    return " || ".join(f"{at} == {_literal(value, field)}" for value in operand) or _NEVER


def _contains(at: str, operand: Any, field: str) -> str:
    large = isinstance(operand, str | Mapping | list | tuple)
    # Refuses also what is no JSON, and what is nested too deeply.
    if large and len(dump_json(operand, field)) > _MOST_CHARACTERS:
        raise InvalidValueError(field, f"must have at most {_MOST_CHARACTERS} bytes as JSON")
    if isinstance(operand, Mapping | list | tuple):
        return _holds(at, operand, field)
    element = f"exists({at}[*] ? (@ == {_literal(operand, field)}))"
    if isinstance(operand, str):
        return f'{element} || {at} like_regex {_literal(operand, field)} flag "q"'
    return element


def _holds(at: str, value: Any, field: str) -> str:
    """Return the predicate of JSON containment, as the operator @> has it."""
    if isinstance(value, Mapping):
        parts = [_holds(f"{at}.{_literal(key, field)}", item, field) for key, item in value.items()]
        return " && ".join(f"({part})" for part in [f'{at}.type() == "object"', *parts])
    if isinstance(value, list | tuple):
        parts = [f"exists({at}[*] ? ({_holds('@', item, field)}))" for item in value]
        return " && ".join([f'{at}.type() == "array"', *parts])
    return f"{at} == {_literal(value, field)}"


def _exists(path: str, operand: Any, field: str) -> str:
    if not isinstance(operand, bool):
        raise InvalidValueError(field, "must be True or False")
    # Within a filter a missing member is false, outside it would be unknown, whose negation is too.
    found = f"exists($ ? (exists(@{path})))"
    return found if operand else f"!{found}"


def _literal(value: Any, field: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _BITS:
        return int.__repr__(value)  # beyond 64 bits there is no JSON of orjson's
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidValueError(field, _RULE)
    literal = dump_json(value, field).decode()
    if literal[0] in "[{":
        raise InvalidValueError(field, _RULE)
    return literal
