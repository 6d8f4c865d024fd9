"""The one terminal that commands print to: foreign text shows as it is, without markup and without control characters."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from altgrad.report.text import for_terminal


class Terminal(Console):
    """A rich console through which no escape sequence passes.

    Args:
        markup: read `[red]...[/red]` in what is printed; foreign parts must then go through `rich.markup.escape`.
        options: as of rich's Console.
    """

    def __init__(self, *, markup: bool = False, **options: Any) -> None:
        super().__init__(markup=markup, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text that is printed, also a table's cell, comes by here."""
        return super().render_str(for_terminal(text), **options)


def ruled_table() -> Table:
    """A table without columns yet: a rule under its bold head, nothing else drawn."""
    return Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
