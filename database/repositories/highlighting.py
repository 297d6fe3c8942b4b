"""Short pieces of found texts, with what was looked for marked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from database.errors import InvalidValueError
from database.models.searchable import UNSPACED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from database.repositories.queries import Mode

__all__ = ["Highlighter", "texts_of_json"]

_BEFORE = 60
_LENGTH = 200


class Highlighter:
    """Makes snippets for the terms of one query.

    Args:
        terms: What was looked for.
        mode: How: as words, or as substrings.
        marks: What to put before and after each hit; the text itself is not escaped.
    """

    def __init__(self, terms: Iterable[str], mode: Mode, marks: tuple[str, str]) -> None:
        if not (
            isinstance(marks, tuple | list)
            and len(marks) == 2  # noqa: PLR2004
            and all(isinstance(mark, str) for mark in marks)
        ):
            raise InvalidValueError("highlight", "must be two texts")
        patterns = [re.escape(term) if mode == "substring" else _words(term) for term in terms]
        # The longest first: of two that match at a place the first one wins.
        patterns.sort(key=len, reverse=True)
        self._pattern = re.compile("|".join(filter(None, patterns)) or "(?!)", re.IGNORECASE)
        self._before, self._after = marks

    def snippet(self, text: str) -> str:
        """Return about 200 characters around the first hit, or the first ones without a hit."""
        hit = self._pattern.search(text)
        start = max(0, hit.start() - _BEFORE) if hit else 0
        end = max(start + _LENGTH, hit.end() if hit else 0)
        shown = self._pattern.sub(
            lambda found: f"{self._before}{found[0]}{self._after}", text[start:end]
        )
        return f"{'…' if start else ''}{shown}{'…' if end < len(text) else ''}"


def texts_of_json(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_of_json(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of_json(item)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _words(term: str) -> str:
    words = re.findall(r"\w+", term)
    if not words:
        return re.escape(term.strip())
    joined = r"\W+".join(words)
    return joined if re.search(UNSPACED, term) else rf"\b{joined}\b"
