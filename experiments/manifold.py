"""The study of updates by grid steps, from nothing to its table, as one command: `python -m experiments.manifold`.

Two sweeps: every arm of `experiments/manifold.yaml` at each of its learning rates on the first seed, then every
arm at its best rate with all seeds. The best rate is the one of lowest validation loss at the end. Finished runs are kept,
so the command can be repeated and extended; `python -m experiments.manifold_results` makes tables and figure of the outcome.

    python -m experiments.manifold --dry-run           # how many runs, how long
    python -m experiments.manifold --jobs 2 --out runs/manifold
    python -m experiments.manifold max_steps=100 formats=[E4M3] seeds=[42,43]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from altgrad.errors import AltGradError
from altgrad.records.run import Run
from altgrad.sweep import Plan, SweepOptions, describe_plan, describe_result, make_plan, matrix_from_mapping, run_sweep
from altgrad.training.config.document import merged, nested, read_document, resolved, setting
from experiments.manifold_results import Results, final_loss, main_table, run_record

OFF_GRID = {"format": None, "off_grid_lr": 1e-3}
"""Options of every optimizer that steps weights on the grid: which follow the storage, the rest is trained by AdamW."""
Cells = dict[tuple[str, str], list[Run]]
"""Finished runs by (arm, format)."""
MATRIX = Path(__file__).parent / "manifold.yaml"


def read_study(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The study's file with `key=value` settings: formats, seeds, arms, or any key of the base config."""
    study = read_document(path, references=False)
    for override in overrides:
        keys, value = setting(override)
        own = keys[0] in ("formats", "seeds", "arms", "control", "base")
        study = merged(study, nested(keys if own else ["base", *keys], value))
    return resolved(study, str(path))


def cells(study: dict[str, Any]) -> list[tuple[str, str]]:
    """(arm, format) of every cell; an arm may list the formats that it is for."""
    return [(a, f) for f in study["formats"] for a, arm in study["arms"].items() if f in arm.get("formats", [f])]


def tried_rates(study: dict[str, Any], arm: str, fmt: str) -> list[float]:
    """Learning rates that a cell is tuned over: the arm's, or those that it states for the format."""
    facts = study["arms"][arm]
    return facts.get("lr_on", {}).get(fmt, facts["lr"])


def entry(study: dict[str, Any], arm: str, fmt: str, lrs: list[float]) -> dict[str, Any]:
    """A cell at some learning rates, as an `include` entry of a sweep."""
    facts = study["arms"][arm]
    on_grid = facts.get("weight_storage") is None
    options = {**(OFF_GRID if on_grid else {}), **facts["options"]}
    return {
        "fp8_format": fmt,
        "weight_storage": "grid" if on_grid else facts["weight_storage"],
        "storage_rounding": facts["storage_rounding"],
        "optimizer.name": facts["optimizer"],
        "optimizer.options": options,
        "optimizer.lr": lrs,
    }


def plan(study: dict[str, Any], entries: list[dict[str, Any]], seeds: list[int], out: Path) -> Plan:
    """The sweep of these cells."""
    facts = {"base": study["base"], "name": study["base"]["name"], "seeds": seeds, "matrix": {}, "include": entries}
    return make_plan(matrix_from_mapping(facts), out)


def by_cell(study: dict[str, Any], out: Path, plan: Plan) -> Cells:
    """Finished runs of a plan by (arm, format)."""
    found: Cells = {}
    arms = {
        (v["optimizer"], v["storage_rounding"], json.dumps(v["options"], sort_keys=True)): k
        for k, v in study["arms"].items()
    }
    for planned in plan.runs:
        folder = out / planned.name
        if not (run := Run(folder)).finished:
            continue
        optimizer = run.config["optimizer"]
        own = {k: v for k, v in optimizer["options"].items() if k not in OFF_GRID}
        arm = arms[(optimizer["name"], run.config["storage_rounding"], json.dumps(own, sort_keys=True))]
        found.setdefault((arm, run.format), []).append(run)
    return found


def best_rates(study: dict[str, Any], tuned: Cells) -> dict[tuple[str, str], float]:
    """Learning rate of lowest final validation loss per cell."""
    return {cell: float(min(runs, key=final_loss).config["optimizer"]["lr"]) for cell, runs in tuned.items()}


def make(sweep: Plan, jobs: int | None) -> None:
    """Make the runs; the study ends here where some were stopped or failed, since what follows needs all of them."""
    result = run_sweep(sweep, SweepOptions(jobs=jobs))
    describe_result(result)
    if result.count("stopped") or result.count("failed"):
        sys.exit("the study is incomplete; the same command goes on with it")


def results_of(study: dict[str, Any], tuned: Cells, final: Cells) -> dict[str, Any]:
    """Everything that the tables need, for `manifold.json`."""
    return {
        "study": study,
        "tuning": [run_record(run, arm, movement=False) for (arm, _), runs in tuned.items() for run in runs],
        "runs": [run_record(run, arm, movement=True) for (arm, _), runs in final.items() for run in runs],
    }


def main() -> None:
    """Tune, run, write `<out>/manifold.json` and print its main table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", nargs="*", help="key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/manifold"))
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    study, out = read_study(MATRIX, arguments.settings), arguments.out
    tuned = [entry(study, a, f, tried_rates(study, a, f)) for a, f in cells(study)]
    tuning = plan(study, tuned, study["seeds"][:1], out)
    if arguments.dry_run:
        describe_plan(tuning, SweepOptions(jobs=arguments.jobs))
        print(
            f"then {len(cells(study)) * (len(study['seeds']) - 1)} more runs: every cell at its best rate, further seeds"
        )
        return
    make(tuning, arguments.jobs)
    rates = best_rates(study, by_cell(study, out, tuning))
    final = plan(study, [entry(study, a, f, [rates[a, f]]) for a, f in cells(study)], study["seeds"], out)
    make(final, arguments.jobs)
    results = results_of(study, by_cell(study, out, tuning), by_cell(study, out, final))
    (out / "manifold.json").write_text(json.dumps(results, indent=1) + "\n")
    print(main_table(Results(results)))


if __name__ == "__main__":
    try:
        main()
    except AltGradError as error:
        sys.exit(str(error))
