"""What `pack` and `unpack` do and print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from altgrad.analysis.record_table import record_table
from altgrad.records.archive import SUFFIX
from altgrad.records.files import write_text
from altgrad.records.pack import pack_runs, unpack


def pack(runs: Sequence[Path], out: Path) -> None:
    """`altgrad pack`: one file with the records, and a table of the runs beside it."""
    names = pack_runs(runs, out)
    stem = out.name.removesuffix(SUFFIX)
    table = out.with_name(f"{stem}.md")
    write_text(table, record_table([out / name for name in names], out, stem))
    _say(f"{len(names)} runs in {out} ({out.stat().st_size:,} bytes); their table: {table}")


def unpack_into(packed: Path, out: Path) -> None:
    """`altgrad unpack`: the files of a pack as a folder of runs."""
    _say(f"{unpack(packed, out)} files in {out}")


def _say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
