"""What became of the rows of Project 2501: counted, and told at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

EXAMPLES = 3


@dataclass
class Tally:
    """What became of the rows, by table; what was skipped or left out, by reason."""

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    there: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)

    def tell(self, table: str, what: str, reason: str, row_id: object) -> None:
        """Count a reason."""
        key = (table, what, reason)
        self.reasons[key] += 1
        examples = self.examples.setdefault(key, [])
        if len(examples) < EXAMPLES:
            examples.append(str(row_id))

    def skip(self, table: str, row_id: object, reason: str) -> None:
        """Count a row that is not imported."""
        self.skipped[table] += 1
        self.tell(table, "skipped", reason, row_id)

    def report(
        self, tables: Iterable[str], naive: Sequence[str], seconds: float, *, dry_run: bool
    ) -> None:
        """Say on stdout what was done.

        Args:
            tables: In which order.
            naive: The columns of timestamps without a time zone.
            seconds: How long it took.
            dry_run: Whether all of it was taken back.
        """
        written = "would write" if dry_run else "written"
        table = Table("table", box=SIMPLE)
        counts = {
            "read": self.read,
            written: self.written,
            "already there": self.there,
            "skipped": self.skipped,
        }
        for name in counts:
            table.add_column(name, justify="right")
        for name in tables:
            table.add_row(name, *(f"{count[name]:,}" for count in counts.values()))
        console = Console()
        console.print(table, highlight=False)
        for key, count in sorted(self.reasons.items()):
            name, what, reason = key
            ids = ", ".join(self.examples[key])
            more = ", ..." if count > EXAMPLES else ""
            console.out(f"{name}: {what}: {reason}: {count:,} ({ids}{more})", highlight=False)
        if naive:
            console.out(f"taken as UTC: {', '.join(naive)}", highlight=False)
        rows = self.read.total()
        speed = f"{rows:,} rows in {seconds:.1f} s: {rows / seconds:,.0f} rows/s"
        console.out(speed, highlight=False)
