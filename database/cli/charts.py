"""Charts of groups: drawn with characters by plotext, or as a picture by matplotlib."""

from __future__ import annotations

import shutil
import warnings
from importlib import import_module
from io import BytesIO
from typing import TYPE_CHECKING, Any

from database.cli.errors import CommandError
from database.cli.output import cell

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Chart", "draw", "picture"]

_MOST_BARS = 30
_LONGEST_NAME = 40
_WIDTHS = (40, 160)
_HEIGHT = 20
_SCALES = ((10**9, "billions"), (10**6, "millions"), (10**3, "thousands"))


class Chart:
    """What to draw.

    Args:
        title: What the numbers are.
        names: Of the bars, in order.
        numbers: Of each.
        in_time: Whether the bars follow each other in time; else the first ones count most, and
            only so many are shown as can be told apart.
    """

    def __init__(
        self, title: str, names: Sequence[str], numbers: Sequence[int], *, in_time: bool
    ) -> None:
        self.title = title
        self.in_time = in_time
        if not in_time and len(names) > _MOST_BARS:
            self.title = f"{title}, the first {_MOST_BARS} of {len(names):,}"
            names, numbers = names[:_MOST_BARS], numbers[:_MOST_BARS]
        self.names = [_short(name) for name in names]
        # plotext takes memory by the height of a bar.
        unit, scale = next((s for s in _SCALES if max(numbers, default=0) >= s[0]), (1, ""))
        self.numbers = [number / unit for number in numbers] if scale else list(numbers)
        if scale:
            self.title += f" ({scale})"


def draw(chart: Chart) -> str:
    """Return a chart as lines of text, as wide as the terminal.

    Raises:
        CommandError: plotext is missing.
    """
    figure = _needed("plotext").figure
    if not chart.names:
        return "nothing to draw"
    width = min(max(shutil.get_terminal_size().columns, _WIDTHS[0]), _WIDTHS[1])
    names, numbers = chart.names, chart.numbers
    if not chart.in_time:
        # The first bar is the lowest one.
        names, numbers = names[::-1], numbers[::-1]
    figure.clear()
    figure.plot_size(width, _HEIGHT if chart.in_time else 2 * len(names) + 5)
    figure.draw(figure.bar(names, numbers, orientation="v" if chart.in_time else "h"))
    figure.ruler("y" if chart.in_time else "x").lim(0, max(*numbers, 1))
    return f"{chart.title}\n{figure.build().string(colorless=True).rstrip()}"


def picture(chart: Chart) -> bytes:
    """Return a chart as a PNG.

    Raises:
        CommandError: matplotlib is missing.
    """
    # Neither pyplot nor a backend is chosen: a figure by itself draws with Agg.
    figure = _needed("matplotlib.figure").Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(chart.title, parse_math=False)
    places = range(len(chart.names))
    if chart.in_time:
        axes.bar(places, chart.numbers)
        step = max(1, len(places) // 12)
        axes.set_xticks(places[::step], chart.names[::step], rotation=30, ha="right")
    else:
        axes.barh(places, chart.numbers)
        axes.set_yticks(places, chart.names, parse_math=False)
        axes.invert_yaxis()
    data = BytesIO()
    with warnings.catch_warnings():
        # What no font has is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def _short(name: str) -> str:
    shown = cell(name) or "(none)"
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"


def _needed(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = module.partition(".")[0]
        if error.name != missing:
            raise
        raise CommandError(f"charts need {missing}: pip install 'llm-database[plot]'") from None
