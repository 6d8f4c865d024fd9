"""What `pack`, `unpack` and `verify` do and print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from altgrad.analysis.comparison import record_table
from altgrad.errors import ReportError
from altgrad.records.files import write_text
from altgrad.records.folders import SUFFIX
from altgrad.records.pack import pack_runs, unpack
from altgrad.records.run import find_runs
from altgrad.records.verify import verify_run
from altgrad.report.console import Terminal


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


def verify(runs: Sequence[Path]) -> int:
    """`altgrad verify`: a line per run and per problem; 0 all are whole, 1 one is damaged."""
    folders = list(dict.fromkeys(found for run in runs for found in find_runs(run)))
    if not folders:
        raise ReportError(f"no run folders in {', '.join(map(str, runs))}; give run folders, or folders that hold some")
    findings = [verify_run(folder) for folder in folders]
    for finding in findings:
        _say(finding.said())
    damaged = sum(not finding.whole for finding in findings)
    _say(f"{len(findings)} runs: {len(findings) - damaged} whole, {damaged} damaged")
    return int(damaged > 0)


def _say(line: str) -> None:
    Terminal().print(line, highlight=False, markup=False, soft_wrap=True)
