"""The study of updates by grid steps, from nothing to its table, as one command: `python -m experiments.manifold`.

Two sweeps: every arm of `experiments/manifold.yaml` at each of its learning rates on the first seed, then every
arm at its best rate with all seeds. The best rate is the one of lowest validation loss at the end; the first seed is
tuned on, so comparisons are also given without it. Finished runs are kept, so the command can be repeated and extended.

    python -m experiments.manifold --dry-run           # how many runs, how long
    python -m experiments.manifold --jobs 2 --out runs/manifold
    python -m experiments.manifold max_steps=100 formats=[E4M3] seeds=[42,43]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from altgrad.analysis.runs import Run, read_run
from altgrad.analysis.statistics import estimate
from altgrad.sweep import Plan, SweepOptions, describe_plan, describe_result, make_plan, matrix_from_mapping, run_sweep

OFF_GRID = {"format": None, "off_grid_lr": 1e-3}
"""Options of every optimizer that steps weights on the grid: which follow the storage, the rest is trained by AdamW."""
MATRIX = Path(__file__).parent / "manifold.yaml"


def read_study(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The study's file with `key=value` settings: formats, seeds, arms, or any key of the base config."""
    study = OmegaConf.load(path)
    for setting in overrides:
        key = setting.split("=", 1)[0]
        own = key.split(".", 1)[0] in ("formats", "seeds", "arms", "control", "base")
        study = OmegaConf.merge(study, OmegaConf.from_dotlist([setting if own else f"base.{setting}"]))
    return OmegaConf.to_container(study, resolve=True)  # type: ignore[return-value]


def cells(study: dict[str, Any]) -> list[tuple[str, str]]:
    """(arm, format) of every cell; an arm may list the formats that it is for."""
    return [(a, f) for f in study["formats"] for a, arm in study["arms"].items() if f in arm.get("formats", [f])]


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


def loss(run: Run) -> float:
    """Validation loss at the end; inf where it is not finite or missing."""
    value = run.number("final_val_loss")
    return float("inf") if value is None or value != value else value


def by_cell(study: dict[str, Any], out: Path, plan: Plan) -> dict[tuple[str, str], list[Run]]:
    """Finished runs of a plan by (arm, format)."""
    found: dict[tuple[str, str], list[Run]] = {}
    arms = {
        (v["optimizer"], v["storage_rounding"], json.dumps(v["options"], sort_keys=True)): k
        for k, v in study["arms"].items()
    }
    for planned in plan.runs:
        folder = out / planned.name
        if not (folder / "result.json").exists():
            continue
        run = read_run(folder)
        optimizer = run.config["optimizer"]
        own = {k: v for k, v in optimizer["options"].items() if k not in OFF_GRID}
        arm = arms[(optimizer["name"], run.config["storage_rounding"], json.dumps(own, sort_keys=True))]
        found.setdefault((arm, run.config["fp8_format"]), []).append(run)
    return found


def best_rates(study: dict[str, Any], tuned: dict[tuple[str, str], list[Run]]) -> dict[tuple[str, str], float]:
    """Learning rate of lowest final validation loss per cell."""
    return {cell: float(min(runs, key=loss).config["optimizer"]["lr"]) for cell, runs in tuned.items()}


def table(study: dict[str, Any], rates: dict, final: dict[tuple[str, str], list[Run]]) -> list[dict[str, Any]]:
    """One row per cell: loss, paired difference to the control with its 95% interval, stall, and whether lr is at an edge."""
    rows = []
    for arm, fmt in cells(study):
        runs = {run.seed: loss(run) for run in final.get((arm, fmt), [])}
        control = {run.seed: loss(run) for run in final.get((study["control"], fmt), [])}
        shared = sorted(set(runs) & set(control))
        tuned_on = study["seeds"][0]
        difference = estimate([runs[s] - control[s] for s in shared]) if len(shared) > 1 else None
        untuned = [runs[s] - control[s] for s in shared if s != tuned_on]
        stalls = [v for run in final.get((arm, fmt), []) if (v := run.number("stall_rate")) is not None]
        lrs = study["arms"][arm]["lr"]
        rows.append(
            {
                "format": fmt,
                "arm": arm,
                "lr": rates.get((arm, fmt)),
                "lr_at_edge": rates.get((arm, fmt)) in (min(lrs), max(lrs)),
                "seeds": len(runs),
                "val_loss": sum(runs.values()) / len(runs) if runs else None,
                "difference": None if difference is None else difference.mean,
                "low": None if difference is None else difference.low,
                "high": None if difference is None else difference.high,
                "difference_without_tuning_seed": sum(untuned) / len(untuned) if untuned else None,
                "stall_rate": sum(stalls) / len(stalls) if stalls else None,
            }
        )
    return rows


def describe(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    head = "| format | arm | lr | val loss | minus control [95%] | stall |\n|---|---|---|---|---|---|"
    lines = [head]
    for row in rows:
        interval = (
            "" if row["difference"] is None else f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        )
        mean = "" if row["val_loss"] is None else f"{row['val_loss']:.4f} (n={row['seeds']})"
        stall = "" if row["stall_rate"] is None else f"{row['stall_rate']:.3f}"
        rate = "" if row["lr"] is None else f"{row['lr']:g}{' (edge)' if row['lr_at_edge'] else ''}"
        lines.append(f"| {row['format']} | {row['arm']} | {rate} | {mean} | {interval} | {stall} |")
    return "\n".join(lines)


def main() -> None:
    """Tune, run, and print the table; it is also written to `<out>/manifold.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("settings", nargs="*", help="key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/manifold"))
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    study, out = read_study(MATRIX, arguments.settings), arguments.out
    tuning = plan(study, [entry(study, a, f, study["arms"][a]["lr"]) for a, f in cells(study)], study["seeds"][:1], out)
    if arguments.dry_run:
        describe_plan(tuning, SweepOptions(jobs=arguments.jobs))
        print(
            f"then {len(cells(study)) * (len(study['seeds']) - 1)} more runs: every cell at its best rate, further seeds"
        )
        return
    describe_result(run_sweep(tuning, SweepOptions(jobs=arguments.jobs)))
    rates = best_rates(study, by_cell(study, out, tuning))
    final = plan(
        study, [entry(study, a, f, [rates[a, f]]) for a, f in cells(study) if (a, f) in rates], study["seeds"], out
    )
    describe_result(run_sweep(final, SweepOptions(jobs=arguments.jobs)))
    rows = table(study, rates, by_cell(study, out, final))
    (out / "manifold.json").write_text(json.dumps(rows, indent=1))
    (out / "manifold.md").write_text(describe(rows) + "\n")
    print(describe(rows))


if __name__ == "__main__":
    main()
