"""The one terminal that commands print to, with its tables and its progress: foreign text shows as it is, without markup
and without control characters."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from altgrad.report.numbers import duration
from altgrad.report.text import for_terminal, wrapped

LOG_WIDTH = 120
"""Columns of a table in a file or a pipe, where COLUMNS says no other."""


class Terminal(Console):
    """A rich console through which no escape sequence passes.

    Args:
        markup: read `[red]...[/red]` in what is printed; foreign parts must then go through `rich.markup.escape`.
        options: as of rich's Console.
    """

    def __init__(self, *, markup: bool = False, **options: Any) -> None:
        super().__init__(markup=markup, emoji=False, **options)
        if not (self.is_terminal or "width" in options or "COLUMNS" in os.environ):
            self.width = LOG_WIDTH

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text that is printed, also a table's cell, comes by here."""
        return super().render_str(for_terminal(text), **options)

    def say(self, text: str, style: str | None = None, *, hang: int = 0) -> None:
        """Print sentences, which are not read as markup: on a terminal, and where COLUMNS gives a width, broken between words (see
        `wrapped`), elsewhere whole, so that a log can be searched."""
        said = for_terminal(text)
        lines = wrapped(said, self.width, hang) if self.is_terminal or "COLUMNS" in os.environ else said
        self.print(lines, style=style, highlight=False, markup=False, soft_wrap=True)


def ruled_table() -> Table:
    """A table without columns yet: a rule under its bold head, nothing else drawn."""
    return Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)


BAR = {"complete_style": "cyan", "finished_style": "green"}
"""Styles of a bar: red is for what went wrong."""


class TimeLeft(ProgressColumn):
    """What a task still needs at its speed, where that is known; what it took once it is over."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.time_remaining
        if seconds is None:
            return Text()
        whole = math.ceil(seconds)
        return Text(
            f"{whole} s" if whole < 60 else duration(whole), style="progress.elapsed" if task.finished else "cyan"
        ) + ("" if task.finished else " left")


class Bars:
    """Bars on a terminal that can draw a line again (TERM=dumb cannot), a line for each stage elsewhere; as a context it gives
    the function to call."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24, **BAR),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
        )
        self.bars = Progress(*columns, console=console, disable=not console.is_interactive)
        self.tasks: dict[str, Any] = {}

    def __enter__(self):
        self.bars.__enter__()
        return self.told

    def __exit__(self, *error: Any) -> None:
        self.bars.__exit__(*error)

    def told(self, what: str, done: int, of: int, more: str = "") -> None:
        """So much of a stage is done; `more` is said beside its name on a terminal."""
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=of)
            if not self.console.is_interactive:
                self.console.print(f"{what}: {of}", highlight=False, markup=False)
        self.bars.update(self.tasks[what], completed=done, total=of, description=f"{what}{more}")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """On a terminal, a spinner beside what is waited for until the block ends."""
    console = Terminal(stderr=True)
    if not console.is_interactive:
        yield
        return
    with console.status(what):
        yield
