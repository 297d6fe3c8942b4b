"""What text search sees of a column: the expressions that its indexes and queries share.

The server's parser takes a run of letters for one word. In scripts that put no spaces between
words (Chinese, Japanese, Thai), or glue particles to them (Korean), every character therefore
stands alone in the index, and a word is looked for as a phrase of its characters. Only the first
100,000 characters are indexed: a tsvector holds at most 1 MB.
"""

from __future__ import annotations

__all__ = ["UNSPACED", "words_of_json", "words_of_text"]

# PostgreSQL's escapes, which are Python's as well. The migrations have copies.
UNSPACED = (
    r"[\u0E00-\u0EFF\u1000-\u11FF\u1780-\u17FF\u2E80-\u2FDF\u3005-\u3007\u3040-\u31FF"
    r"\u3400-\u4DBF\u4E00-\u9FFF\uAC00-\uD7FF\uF900-\uFAFF\uFF66-\uFF9F\U00020000-\U0003FFFF]"
)
"""A regular expression: a character of a script whose words no spaces part."""

# A member's name, and an escaped character, are no words.
_JSON_SYNTAX = r'"(?:[^"\\]|\\.)*": |\\(?:.|u....)'


def words_of_text(column: str) -> str:
    """Return the SQL of a text column's words, a tsvector."""
    return _words(column, f"({UNSPACED})")


def words_of_json(column: str) -> str:
    """Return the SQL of the words in a JSONB column's values, a tsvector."""
    return _words(f"{column}::text", f"{_JSON_SYNTAX}|({UNSPACED})")


def _words(text: str, parted: str) -> str:
    return (
        f"to_tsvector('simple'::regconfig, regexp_replace(\"left\"({text}, 100000),"
        f" '{parted}'::text, ' \\1 '::text, 'g'::text))"
    )
