"""What commands on existing runs do and print, which need no torch: `report`, `watch`, `pack`, `unpack`, `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from altgrad.analysis import find_runs, is_study, write_report, write_study
from altgrad.analysis.comparison import record_table
from altgrad.analysis.live import LOOPBACK, LivePage, live_server
from altgrad.errors import ReportError
from altgrad.records.files import write_text
from altgrad.records.folders import SUFFIX, page_path
from altgrad.records.pack import pack_runs, unpack
from altgrad.records.verify import verify_run
from altgrad.report.console import Terminal, waiting
from altgrad.report.numbers import plural


def report(runs: Sequence[Path], out: Path | None, force: bool) -> None:
    """`altgrad report`: one HTML file over existing run folders."""
    folders = [found for run in runs for found in find_runs(run)]
    if not folders:
        raise ReportError(f"no run folders in {', '.join(map(str, runs))}; give folders that hold a config.yaml")
    target = out or page_path(folders[0] if len(folders) == 1 else folders[0].parent, "report.html")
    write = write_study if is_study(folders) else write_report
    with waiting(f"reading {plural(len(folders), 'run')}"):
        written = write(folders, target, force=force)
    _say(f"report: {written}")


def watch(runs: Sequence[Path], port: int) -> None:
    """`altgrad watch`: serve the runs' report until Ctrl-C."""
    page = LivePage(runs)
    server = live_server(page, port)
    _say(f"http://{LOOPBACK}:{server.server_port}/ (Ctrl-C ends it)")
    try:
        server.serve_forever()
    finally:
        server.server_close()


def pack(runs: Sequence[Path], out: Path) -> None:
    """`altgrad pack`: one file with the records, and a table of the runs beside it."""
    with waiting("packing"):
        names = pack_runs(runs, out)
    stem = out.name.removesuffix(SUFFIX)
    table = out.with_name(f"{stem}.md")
    write_text(table, record_table([out / name for name in names], out, stem))
    _say(f"{plural(len(names), 'run')} in {out} ({out.stat().st_size:,} bytes); their table: {table}")


def unpack_into(packed: Path, out: Path) -> None:
    """`altgrad unpack`: the files of a pack as a folder of runs."""
    with waiting("unpacking"):
        files = unpack(packed, out)
    _say(f"{plural(files, 'file')} in {out}")


def verify(runs: Sequence[Path]) -> int:
    """`altgrad verify`: a line per run and per problem; 0 all are whole, 1 one is damaged."""
    folders = list(dict.fromkeys(found for run in runs for found in find_runs(run)))
    if not folders:
        raise ReportError(f"no run folders in {', '.join(map(str, runs))}; give run folders, or folders that hold some")
    findings = []
    with waiting(f"reading {plural(len(folders), 'run')}"):
        for folder in folders:
            findings.append(verify_run(folder))
            _say(findings[-1].said())
    damaged = sum(not finding.whole for finding in findings)
    _say(f"{plural(len(findings), 'run')}: {len(findings) - damaged} whole, {damaged} damaged")
    return int(damaged > 0)


def _say(line: str) -> None:
    Terminal().print(line, highlight=False, markup=False, soft_wrap=True)
