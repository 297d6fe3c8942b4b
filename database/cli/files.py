"""Exports: to standard output, or to a file that is whole or not there."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from database.cli.errors import CommandError
from database.cli.options import progress
from database.cli.output import print_record

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from typing import TextIO

__all__ = ["write_lines"]


def write_lines(
    lines: Generator[str, None, None], output: Path | None, what: str, *, as_json: bool
) -> None:
    """Write lines that end with newlines; to a file, then tell how many they were.

    A file appears, or replaces an older one, when all is written; nobody else may read it.

    Args:
        lines: Closed at the end.
        output: The file; None is standard output.
        what: What the lines are, for the progress bar.
        as_json: How to tell.

    Raises:
        CommandError: `output` is there and no file, or in no folder.
        OSError: It cannot be written.
    """
    with closing(lines):
        if output is None:
            # A bar would run through lines that go to the same terminal.
            with progress(what, shown=not sys.stdout.isatty()) as advance:
                _copy(lines, sys.stdout, advance)
            return
        with _replacing(output) as file, progress(what) as advance:
            count = _copy(lines, file, advance)
    print_record({"file": str(output), "lines": count}, as_json=as_json)


def _copy(lines: Iterable[str], file: TextIO, advance: Callable[[int], None]) -> int:
    count = 0
    for line in lines:
        file.write(line)
        count += 1
        advance(1)
    return count


@contextmanager
def _replacing(output: Path) -> Iterator[TextIO]:
    place = output.resolve()
    if place.exists() and not place.is_file():
        raise CommandError(f"{output}: is no file")
    if not place.parent.is_dir():
        raise CommandError(f"{output}: its folder does not exist")
    number, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=".part")
    try:
        with os.fdopen(number, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(number)
        Path(name).replace(place)
    except BaseException:
        Path(name).unlink()
        raise
