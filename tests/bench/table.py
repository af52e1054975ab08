"""What was measured, as text and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(slots=True)
class Table:
    """One table: the first column names the case, the others are numbers."""

    title: str
    columns: Sequence[str]
    note: str = ""
    rows: list[Sequence[str]] = field(default_factory=list)

    def show(self, console: Console) -> None:
        """On the screen."""
        shown = RichTable(title=self.title, title_justify="left", caption=self.note or None, caption_justify="left")
        for position, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if position else "left", no_wrap=not position)
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown)

    def markdown(self) -> str:
        """As a section of a page."""
        lines = [f"### {self.title}", "", " | ".join(["", *self.columns, ""]).strip()]
        lines.append(" | ".join(["", *("---:" if position else "---" for position in range(len(self.columns))), ""]).strip())
        lines += [" | ".join(["", *row, ""]).strip() for row in self.rows]
        return "\n".join([*lines, "", self.note, ""] if self.note else [*lines, ""])


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def count(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def millis(seconds: float) -> str:
    return f"{seconds * 1000:.3g}"
