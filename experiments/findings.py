"""Prints the tables of docs/findings/custom-formats.md from the committed records: `python -m experiments.findings`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from altgrad.analysis.statistics import estimate, noise_floor, paired
from altgrad.records.metrics import OPERANDS
from altgrad.records.run import Run, find_runs, read_run
from altgrad.report.numbers import percent

RESULTS = Path(__file__).parent / "results" / "custom-formats.tar.xz"


def group(name: str) -> list[Run]:
    """The records of one experiment."""
    return [read_run(path) for path in find_runs(RESULTS / name)]


def events(run: Run) -> list[dict[str, Any]]:
    """The run's event records in file order."""
    return run.records("event")


def by_name(runs: list[Run]) -> dict[str, dict[int, Run]]:
    """{name: {seed: run}}, names sorted."""
    table: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        table[run.name][run.result["seed"]] = run
    return dict(sorted(table.items()))


def verdict_words(run: Run) -> str:
    """The verdict with its steps, or "trained"."""
    verdict = run.result["verdict"]
    return f"{verdict['kind']} from step {verdict['onset_step']}" if verdict else "no collapse"


def number(value: float | str | None, digits: int = 3) -> str:
    """A number ("nan" and "inf" are recorded as words), or a dash where there is none."""
    return "-" if value is None else f"{float(value):.{digits}f}"


def interval(found) -> str:
    """mean [low, high], n."""
    if found.low is None:
        return f"{found.mean:+.4f} (n = {found.n})"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}] (n = {found.n}, {found.method})"


def print_runs(name: str) -> None:
    """One row a run: how it ended."""
    print(
        f"\n### {name}\n\n| run | seed | steps | final train loss | final val loss | best val loss | stall | verdict | shift |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for runs in by_name(group(name)).values():
        for seed, run in sorted(runs.items()):
            r = run.result
            shifts = "; ".join(
                f"step {e['step']}: {e['from_format']} to {e['to_format']} ({e['reason']})"
                for e in events(run)
                if e["event"] == "shift"
            )
            print(
                f"| {run.name} | {seed} | {r['steps']} | {number(r['final_loss'])} | {number(r['final_val_loss'])} "
                f"| {number(r['best_val_loss'])} | {number(r['stall_rate'])} | {verdict_words(run)} | {shifts or '-'} |"
            )


PAIRS = {
    "a": {
        "E3M4 - E5M2, grid": ("a", "a-e5m2"),
        "E3M4 - E5M2, master": ("a-master", "a-e5m2-master"),
        "E3M4 - FP32, grid": ("a", "a-fp32-master"),
        "E5M2 - FP32, grid": ("a-e5m2", "a-fp32-master"),
        "E3M4 - FP32, master": ("a-master", "a-fp32-master"),
        "E5M2 - FP32, master": ("a-e5m2-master", "a-fp32-master"),
    },
    "b": {
        "E1M6 behind LayerNorms - FP32": ("b-recipe_e60858", "b"),
        "E1M6 on every operand - FP32": ("b-e1m6-none", "b"),
        "E1M6 on every operand, grid - FP32": ("b-e1m6-none-grid", "b"),
    },
}
FP32 = {"a": "a-fp32-master", "b": "b"}


def print_paired(name: str) -> None:
    """Differences in final validation loss by seed, and the seed-to-seed spread of FP32."""
    losses = {
        run: {s: r.result["final_val_loss"] for s, r in found.items()} for run, found in by_name(group(name)).items()
    }
    print(
        f"\n### {name}: paired differences in final validation loss (nats per byte)\n\n| pair | difference, 95% interval | Hedges' g |"
    )
    print("|---|---|---|")
    for label, (first, second) in PAIRS[name].items():
        found = paired(losses.get(first, {}), losses.get(second, {}))
        if found:
            print(f"| {label} | {interval(found.difference)} | {number(found.effect, 1)} |")
    if floor := noise_floor(losses[FP32[name]]):
        print(f"\nFP32 varies from seed to seed with a standard deviation of {floor.sd:.4f}.")
        print(f"FP32 final validation loss: {interval(estimate(list(losses[FP32[name]].values())))}")


def print_overflow() -> None:
    """Overflow and underflow of E1M6 operands at the last recorded step: per layer where only a norm's outputs are in
    E1M6, and the range over layers where everything is; first seed of each variant of b.
    """
    print(
        "\n### b: E1M6 unscaled at the last recorded step, first seed\n\n| run | operand | overflow | underflow | amax |"
    )
    print("|---|---|---|---|---|")
    for runs in by_name(group("b")).values():
        run = runs[min(runs)]
        records = [r for r in monitored(run) if r.get("format") == "E1M6"]
        if "recipe" in run.name:
            rows = {r["layer"]: [r] for r in records}
        else:
            rows = {f"every {role}": [r for r in records if r["role"] == role] for role in OPERANDS}
        for operand, found in rows.items():
            if found:
                overflow, underflow, amax = (span(found, key) for key in ("overflow", "underflow", "amax"))
                print(f"| {run.name} | {operand} | {overflow} | {underflow} | {amax} |")


def print_gradients() -> None:
    """What is left of the output gradients where everything is in E1M6: the head's, and behind it; and the first loss."""
    runs = by_name(group("b"))
    print("\n### b: E1M6 on everything: output gradients at the last recorded step\n")
    for name in ("b-e1m6-none", "b-e1m6-none-grid"):
        run = runs[name][min(runs[name])]
        gradients = [r for r in monitored(run) if r["role"] == "grad_output"]
        for where, found in (
            ("head", [r for r in gradients if r["layer"] == "head"]),
            ("all other layers", [r for r in gradients if r["layer"] != "head"]),
        ):
            print(f"{name}, {where}: amax {span(found, 'amax')}, rounded to zero {span(found, 'underflow')}")
        print(f"{name}: validation loss at step 0 {losses_of(run)['eval', 0]:.3f}")


def print_collapse_reports() -> None:
    """What the failure reports of c say of gradients, of layers that no longer move, and of the others' stall."""
    print("\n### c: failure reports of the runs that were recorded as frozen\n")
    print(
        "| run | seed | exact zeros | NaN or infinite | no attempted update changed a code | lowest stall | overflow |"
    )
    print("|---|---|---|---|---|---|---|")
    for runs in by_name(group("c")).values():
        for seed, run in sorted(runs.items()):
            report = run.text("failure.json")
            if report is None:
                continue
            data = json.loads(report)
            weights = [row["values"].get("stall_rate") for row in data["layers"]]
            stalls = [value for value in weights if value is not None]
            overflow = sorted({share(row["values"]["overflow"]) for row in data["layers"]})
            print(
                f"| {run.name} | {seed} | {share(data['gradient']['zero_frac'])} "
                f"| {share(data['gradient']['nonfinite_frac'])} | {len(data['zero_update_layers'])} of {len(stalls)} "
                f"| {share(min(stalls, key=least))} | {', '.join(overflow)} |"
            )


def share(value: float | str) -> str:
    """A fraction as a percentage; the records of before failure.json have some as the words of their page, such as ">99.9%"."""
    return value if isinstance(value, str) else percent(value)


def least(value: float | str) -> float:
    """What a fraction is at least."""
    return float(value.strip("<>%")) / 100 if isinstance(value, str) else value


def print_recorded_freezes() -> None:
    """What the runs that were once called frozen say to the rule of today: do codes change, does the evaluation loss fall?"""
    print("\n### Runs recorded as `freeze`: stored codes that changed per step since, and the best evaluation\n")
    print(
        "| run | seed | recorded at | codes changed, least | most | best evaluation | last evaluation |\n|---|---|---|---|---|---|---|"
    )
    for name in "acde":
        for runs in by_name(group(name)).values():
            for seed, run in sorted(runs.items()):
                verdict = run.verdict or {}
                if verdict.get("kind") != "freeze":
                    continue
                onset, records = verdict["onset_step"], run.metrics()
                flips = records.columns["flip_rate"]
                since = flips.values[flips.steps >= onset]
                best = records.validation.steps[records.validation.values.argmin()]
                print(
                    f"| {run.name} | {seed} | {onset} | {since.min():.3%} | {since.max():.3%} "
                    f"| step {best} | step {records.validation.steps[-1]} |"
                )


def print_around_shift() -> None:
    """Best validation loss before and after the shift of d, and the non-finite steps after it."""
    print("\n### d: around the shift\n\n| run | seed | shift | best val loss before | after | non-finite steps after |")
    print("|---|---|---|---|---|---|")
    for runs in by_name(group("d")).values():
        for seed, run in sorted(runs.items()):
            shift = next((e["step"] for e in events(run) if e["event"] == "shift"), None)
            if shift is None:
                continue
            evals = [(s, float(v)) for (kind, s), v in losses_of(run).items() if kind == "eval"]
            before = min(v for s, v in evals if s <= shift)
            after = min(v for s, v in evals if s > shift)
            bad = sum(1 for e in events(run) if e["event"] == "skip_nonfinite" and e["step"] > shift)
            print(f"| {run.name} | {seed} | {shift} | {before:.3f} | {after:.3f} | {bad} |")


def monitored(run: Run) -> list[dict[str, Any]]:
    """The operand records of the last step that has any."""
    records = [r for r in run.records("monitor") if r.get("overflow") is not None]
    last = max((r["step"] for r in records), default=0)
    return [r for r in records if r["step"] == last and r["role"] in OPERANDS]


def span(records: list[dict[str, Any]], key: str) -> str:
    """The value, or the smallest and the largest over layers."""
    text = "{:.3g}" if key == "amax" else "{:.4%}"
    values = sorted(r[key] for r in records)
    low, high = text.format(values[0]), text.format(values[-1])
    return low if low == high else f"{low} to {high}"


def print_identity() -> None:
    """Whether E0M7 and E1M6 recorded the same losses to the bit."""
    runs = by_name(group("e"))
    print("\n### e: E0M7 and E1M6 under amax scaling\n")
    for storage, first, second in (("grid", "e", "e-e1m6"), ("master", "e-master", "e-e1m6-master")):
        if first in runs and second in runs:
            a, b = (losses_of(next(iter(runs[name].values()))) for name in (first, second))
            same = sum(a[step] == b.get(step) for step in a)
            print(f"{storage}: {same} of {len(a)} recorded losses (training and validation) are equal to the bit")
            moves = [e["values"] for e in events(next(iter(runs[first].values()))) if e["event"] == "regrid"]
            print(f"{storage}: {len(moves)} renewals of scales moved {sum(moves)} stored values of {first}")


def losses_of(run: Run) -> dict[tuple[str, int], float]:
    """{(kind, step): loss} of every recorded training and validation loss."""
    losses = {"step": "loss", "eval": "val_loss"}
    return {(r["kind"], r["step"]): r[losses[r["kind"]]] for r in run.records() if r["kind"] in losses}


def main() -> None:
    """Print every table."""
    for name in PAIRS:
        print_paired(name)
    for name in "abcde":
        print_runs(name)
    print_overflow()
    print_gradients()
    print_collapse_reports()
    print_recorded_freezes()
    print_around_shift()
    print_identity()


if __name__ == "__main__":
    main()
