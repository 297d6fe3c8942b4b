"""What somebody looks for, as the server can look for it.

Web-search syntax is PostgreSQL's: words, "phrases", OR, and minus before what must not occur. The
server's parser knows two things badly, which are brought into its reach here: scripts that put no
spaces between words, and symbols such as emoji, which it drops.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

import orjson

from database.errors import InvalidValueError
from database.models.searchable import UNSPACED
from database.types import clean_text

__all__ = ["MOST_CHARACTERS", "Mode", "Query", "parse_query"]

Mode = Literal["text", "substring"]

MOST_CHARACTERS = 1_000

_TERM = re.compile(r'(?P<minus>-?)(?:"(?P<phrase>[^"]*)"?|(?P<word>[^\s"]+))')
# They join symbols, or choose how one looks.
_JOINERS = "\u200d\ufe0e\ufe0f\u20e3"
# What may stand behind a backslash in JSON, and the regular expression that it does not.
_ESCAPES = frozenset('"\\bfnrtuBFNRTU0123456789abcdefABCDEF')
_NOT_ESCAPED = r"(?<![^\\](?:\\\\)*\\(?:u[0-9a-f]{0,3})?)"


@dataclass(frozen=True, slots=True)
class Query:
    """A query, parsed.

    Attributes:
        words: For websearch_to_tsquery; None when there are none.
        pattern: A regular expression that must match too, or None.
        terms: What to highlight.
    """

    words: str | None = None
    pattern: str | None = None
    terms: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is looked for, so that nothing is found."""
        return self.words is None and self.pattern is None


@dataclass(frozen=True, slots=True)
class _Term:
    text: str
    excluded: bool
    quoted: bool

    @property
    def symbols(self) -> list[str]:
        """Runs of what the server's parser drops, though somebody may look for it."""
        marked = "".join(c if _is_symbol(c) else " " for c in self.text)
        return [run for run in marked.split() if run.strip(_JOINERS)]

    @property
    def words(self) -> str:
        """The term for the server's parser: characters without spaces between them as a phrase."""
        plain = "".join(" " if _is_symbol(c) else c for c in self.text)
        # Not compiled at import, where it would take 10 ms; re keeps it.
        phrase = self.quoted or bool(re.search(UNSPACED, plain))
        spaced = re.sub(UNSPACED, r" \g<0> ", plain)
        if not any(c.isalnum() for c in spaced):
            return ""
        return ("-" if self.excluded else "") + (f'"{spaced}"' if phrase else spaced.strip())


def parse_query(query: object, mode: Mode, *, escaped_json: bool = False) -> Query:
    """Return a query as the server can look for it.

    Args:
        query: What somebody typed.
        mode: "text" for web-search syntax, "substring" for the characters as they stand.
        escaped_json: Whether patterns are matched against JSON text, where some are escaped.

    Raises:
        InvalidValueError: The query is no text or too long, or the mode is unknown.
    """
    if not isinstance(query, str):
        raise InvalidValueError("query", "must be text")
    if len(query) > MOST_CHARACTERS:
        raise InvalidValueError("query", f"must have at most {MOST_CHARACTERS} characters")
    text = clean_text(query)
    if mode == "substring":
        if not text.strip():
            return Query()
        return Query(pattern=_substring(text, escaped_json=escaped_json), terms=(text,))
    if mode == "text":
        return _parse_web_search(text, escaped_json=escaped_json)
    raise InvalidValueError("mode", 'must be "text" or "substring"')


def _parse_web_search(text: str, *, escaped_json: bool) -> Query:
    alternatives: list[list[_Term]] = [[]]
    for found in _TERM.finditer(text):
        if found["word"] and found["word"].lower() == "or" and not found["minus"]:
            alternatives.append([])
        else:
            quoted = found["phrase"] is not None
            content = found["phrase"] if quoted else found["word"]
            term = _Term(content, bool(found["minus"]), quoted)
            if term.words or term.symbols:
                alternatives[-1].append(term)
    alternatives = [terms for terms in alternatives if terms]
    everything = [term for terms in alternatives for term in terms]
    shown = tuple(term.text for term in everything if term.text.strip() and not term.excluded)
    groups = (" ".join(filter(None, (term.words for term in terms))) for terms in alternatives)
    words = " or ".join(filter(None, groups)) or None
    if not any(term.symbols for term in everything):
        return Query(words, terms=shown)
    if len(alternatives) == 1:
        (terms,) = alternatives
        parts = [(symbol, term.excluded) for term in terms for symbol in term.symbols]
        pattern = _all_of(parts, escaped_json=escaped_json)
        return Query(words, f"^{pattern}", shown)
    # The server's two ways of matching cannot be joined by OR: all of it by the one that can.
    parts_of = [[(term.text, term.excluded) for term in terms] for terms in alternatives]
    patterns = [_all_of(parts, escaped_json=escaped_json) for parts in parts_of]
    return Query(None, f"^(?:{'|'.join(patterns)})", shown)


def _all_of(parts: list[tuple[str, bool]], *, escaped_json: bool) -> str:
    return "".join(
        f"(?{'!' if excluded else '='}.*{_escaped(_stored(text, escaped_json))})"
        for text, excluded in parts
    )


def _substring(text: str, *, escaped_json: bool) -> str:
    stored = _stored(text, escaped_json)
    if escaped_json and stored[0] in _ESCAPES:
        return f"{_NOT_ESCAPED}{_escaped(stored)}"
    return f"***={stored}"


def _stored(text: str, escaped_json: bool) -> str:  # noqa: FBT001
    return orjson.dumps(text).decode()[1:-1] if escaped_json else text


def _escaped(text: str) -> str:
    return re.sub(r"[!-/:-@\[-^`{-~]", r"\\\g<0>", text)


def _is_symbol(character: str) -> bool:
    if character.isascii():
        return False
    category = unicodedata.category(character)
    # Digits that are no ASCII are words in some locales only.
    return character in _JOINERS or category[0] == "S" or category in ("Nd", "No")
