"""The small table beside a pack: every run of a study with how it ended, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from altgrad.analysis.comparison import table_row
from altgrad.analysis.outcome import Outcome
from altgrad.records.run import Run
from altgrad.report.numbers import count, loss, percent
from altgrad.report.tables import Column, Table, table_markdown
from altgrad.report.text import for_markdown

_COLUMNS = (
    *(Column("run"), Column("seed", True), Column("format"), Column("storage"), Column("optimizer")),
    *(Column("steps", True), Column("final val loss", True), Column("best val loss", True), Column("stall", True)),
    Column("verdict"),
)


def record_table(runs: Sequence[Path], root: Path, title: str) -> str:
    """A page of one table, one row per run; runs go by their names below `root`."""
    rows = []
    for path in sorted(runs):
        run = Run(path)
        row = table_row(Outcome(run, run.format), None)
        losses = [loss(row[name]) for name in ("final_val_loss", "best_val_loss")]
        facts = [run.format, run.storage or "-", run.optimizer or "-", count(row["steps"])]
        seed = "-" if run.seed is None else str(run.seed)
        rows.append(
            [path.relative_to(root).as_posix(), seed, *facts, *losses, percent(row["stall_rate"]), row["verdict"]]
        )
    note = "Losses are validation losses in nats per token; stall: attempted weight updates that changed no code."
    return f"# {for_markdown(title)}\n\n{len(rows)} runs. {note}\n\n{table_markdown(Table(_COLUMNS, rows))}\n"
