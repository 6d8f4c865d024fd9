"""Thins finished runs into a pack small enough to commit: `python -m experiments.records RUNS experiments/results/STUDY.tar.xz`.

Of every run it keeps config.yaml, env.json and result.json, and of metrics.jsonl all evaluations and events, every n-th
training step, and the monitor's records of a few steps; of a collapse its report as Markdown. Paths of the machine that
ran it are left out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml

from altgrad.cli.record_pages import pack
from altgrad.records.documents import write_config, write_environment, write_result
from altgrad.records.files import write_bytes, write_text
from altgrad.records.metrics_log import METRICS, line_of
from altgrad.records.run import Run, find_runs

STEP_EVERY = 10
MONITOR_STEPS = 2
_PATHS = ("runs_dir", "checkpoint_dir", "failure_report", "files")  # and the checksums, which thinning makes anew


def without_paths(value: Any) -> Any:
    """The same data without the keys that hold paths."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items() if key not in _PATHS}
    return value


def kept_records(records: list[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    """The records of a run that its thinned copy keeps."""
    monitored = sorted({r["step"] for r in records if r["kind"] == "monitor"})
    stride = max(1, len(monitored) // MONITOR_STEPS)
    shown = {*monitored[::-stride], *monitored[:1]}
    last = max((r["step"] for r in records if r["kind"] == "step"), default=0)
    return [
        rounded(r)
        for r in records
        if r["kind"] in ("eval", "event")
        or (r["kind"] == "step" and (r["step"] % every in (0, 1 % every) or r["step"] == last or not r["finite"]))
        or (r["kind"] == "monitor" and r["step"] in shown)
    ]


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the monitor in four digits; losses stay exact."""
    if record["kind"] != "monitor":
        return record
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}


def thin(run: Run, folder: Path, every: int) -> None:
    """Write the thinned records of one finished run into `folder`."""
    folder.mkdir(parents=True)
    write_config(folder, yaml.safe_dump(without_paths(run.config), sort_keys=False))
    environment = dict(run.environment)
    if "platform" in environment:
        environment["platform"] = environment["platform"].split("-")[0]  # the kernel's build says nothing about numbers
    write_environment(folder, environment)
    write_bytes(folder / METRICS, b"".join(map(line_of, kept_records(run.records(), every))))
    for page in run.failure_reports:
        for kind in (".md", ".json"):
            report = page.with_suffix(kind).read_text("utf-8")
            write_text(folder / f"failure{kind}", report.replace(str(run.path.parent.resolve()), "runs"))
    write_result(folder, without_paths(run.result))


def collect(runs: Path, out: Path, every: int = STEP_EVERY) -> None:
    """Pack the thinned records of every finished run below `runs`, and write the table beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in find_runs(runs):
            if (run := Run(path)).finished:
                thin(run, Path(scratch) / path.relative_to(runs), every)
        for document in sorted(runs.glob("*.json")):  # a study's own results
            write_bytes(Path(scratch) / document.name, document.read_bytes())
        pack([Path(scratch)], out)


def main() -> None:
    """Parse the command line and collect."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path, help="the pack, such as experiments/results/study.tar.xz")
    parser.add_argument("--every", type=int, default=STEP_EVERY, help="keep every n-th training step")
    arguments = parser.parse_args()
    collect(arguments.runs, arguments.out, arguments.every)


if __name__ == "__main__":
    main()
