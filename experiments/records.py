"""Thins finished run folders into records small enough to commit: `python -m experiments.records RUNS DESTINATION`.

Of every run it keeps config.yaml, env.json and result.json, and of metrics.jsonl all evaluations and events, every n-th
training step, and the monitor's records of a few steps; of a collapse its report as Markdown. Paths of the machine that
ran it are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from altgrad.records.run import find_runs

STEP_EVERY = 10
MONITOR_STEPS = 2
_PATHS = ("runs_dir", "checkpoint_dir", "failure_report")


def without_paths(value: Any) -> Any:
    """The same data without the keys that hold paths."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items() if key not in _PATHS}
    return value


def kept_records(lines: list[str], every: int) -> list[str]:
    """The lines of a metrics file that a record keeps."""
    records = [json.loads(line) for line in lines if line.strip()]
    monitored = sorted({r["step"] for r in records if r["kind"] == "monitor"})
    stride = max(1, len(monitored) // MONITOR_STEPS)
    shown = {*monitored[::-stride], *monitored[:1]}
    last = max((r["step"] for r in records if r["kind"] == "step"), default=0)
    kept = [
        r
        for r in records
        if r["kind"] in ("eval", "event")
        or (r["kind"] == "step" and (r["step"] % every in (0, 1 % every) or r["step"] == last or not r["finite"]))
        or (r["kind"] == "monitor" and r["step"] in shown)
    ]
    return [json.dumps(rounded(r)) for r in kept]


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the monitor in four digits; losses stay exact."""
    if record["kind"] != "monitor":
        return record
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}


def collect(runs: Path, destination: Path, every: int = STEP_EVERY) -> int:
    """Write the record of every finished run below `runs`; returns how many there were."""
    count = 0
    for run in find_runs(runs):
        if not (run / "result.json").exists():
            continue
        folder = destination / run.name
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("env.json", "result.json"):
            data = without_paths(json.loads((run / name).read_text()))
            if "platform" in data:
                data["platform"] = data["platform"].split("-")[0]  # the kernel's build says nothing about the numbers
            (folder / name).write_text(json.dumps(data, indent=1) + "\n")
        config = without_paths(yaml.safe_load((run / "config.yaml").read_text()))
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        (folder / "metrics.jsonl").write_text("\n".join(kept_records(lines, every)) + "\n")
        for report in sorted((run / "checkpoints" / "failure_reports").glob("*.md")):
            (folder / "failure.md").write_text(report.read_text().replace(str(run.parent.resolve()), "runs"))
        count += 1
    return count


def main() -> None:
    """Parse the command line and collect."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--every", type=int, default=STEP_EVERY, help="keep every n-th training step")
    arguments = parser.parse_args()
    print(f"{collect(arguments.runs, arguments.destination, arguments.every)} runs recorded in {arguments.destination}")


if __name__ == "__main__":
    main()
