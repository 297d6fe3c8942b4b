"""What templates refer to: modules by `@name`, variables by `${name}`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from database.types import check_text

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Part", "parts_of", "references"]

# Each alternative begins with its own character and none can match in two ways: linear. All but a
# name's neighbours must be ASCII, for not all scripts put spaces between words.
_MARK = re.compile(
    r"\\(?P<escaped>[@$])"
    r"|@(?<![A-Za-z0-9_]@)(?P<module>[a-z][a-z0-9_]{0,49}+)(?![A-Za-z0-9_])"
    r"|\$\{(?P<variable>[^{}\n]{1,255}+)\}"
)


class Part(NamedTuple):
    """A piece of a template.

    Attributes:
        text: As it stands, or of an escaped character itself.
        module: The name, of a reference.
        variable: The name, of a variable.
    """

    text: str
    module: str | None = None
    variable: str | None = None


def parts_of(template: str) -> Iterator[Part]:
    """Yield the pieces of a template in order."""
    end = 0
    for found in _MARK.finditer(template):
        if found.start() > end:
            yield Part(template[end : found.start()])
        escaped, module, variable = found.groups()
        yield Part(escaped or found[0], module, variable)
        end = found.end()
    if end < len(template):
        yield Part(template[end:])


def references(template: str) -> list[str]:
    r"""Return the names of the modules that a template refers to, in order of first appearance.

    `@name` is a reference where the name is one that a module can have, as a whole. Neither
    `\@name` nor the address `someone@name` is one.

    Raises:
        InvalidValueError: The template is not text.
    """
    found = _MARK.finditer(check_text("template", template))
    return list(dict.fromkeys(mark["module"] for mark in found if mark["module"]))
