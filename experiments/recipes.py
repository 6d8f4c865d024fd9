"""Tables of the recipe studies: `python -m experiments.recipes` reads the committed packs, or the folder that it is given.

Every removal is set against what it is removed from, seed by seed; the criterion stands in the matrices
(`experiments/matrix/recipes.yaml`, `accumulators.yaml`) and was written before any run: a difference counts if the 95 %
interval of the paired differences in final validation loss excludes 0.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path

from altgrad.analysis.statistics import Comparison, noise_floor, paired
from altgrad.nn import Recipe
from altgrad.records.run import Run, find_runs, read_run
from experiments.findings import interval

RESULTS = Path(__file__).parent / "results"
_HIGH = "; name='blocks.3.*': FP32"
_TE = "te_current without accumulator"
_NVFP4 = f"nvfp4_te without accumulator{_HIGH}"
_UNIT = (
    "x:E4M3(amax(arithmetic='multiply')) w:E4M3(amax(arithmetic='multiply')) dy:E5M2(amax(arithmetic='multiply')) "
    "sum:accumulator(products=32,fraction_bits={0},output=E8M{0}); name='head': FP32; type='Embedding': FP32"
)
REMOVALS = {
    "recipes": [
        ("FP8 per tensor (te_current)", _TE, "FP32"),
        ("NVFP4 with a high last block", _NVFP4, "FP32"),
        ("- stochastic rounding", f"nvfp4_te without accumulator, stochastic_rounding{_HIGH}", _NVFP4),
        ("- Hadamard transform", f"nvfp4_te without accumulator, hadamard{_HIGH}", _NVFP4),
        ("- square weight tiles", f"nvfp4_te without accumulator, tiles{_HIGH}", _NVFP4),
        ("- high last block", "nvfp4_te without accumulator", _NVFP4),
        ("MXFP8, scales rounded up", "te_mxfp8 without accumulator", "FP32"),
        (
            "- rounding up (OCP's floor)",
            "x:MXFP8 w:MXFP8 dy:MXFP8; name='head': FP32; type='Embedding': FP32",
            "te_mxfp8 without accumulator",
        ),
        ("TetraJet (MXFP4)", "tetrajet", "FP32"),
        ("- requantization", "tetrajet without requantization", "tetrajet"),
        ("- stochastic rounding", "tetrajet without stochastic_rounding", "tetrajet"),
        ("DeepSeek-V3 (FP8 blocks)", "deepseek_v3 without accumulator", "FP32"),
        (
            "- requantization",
            "deepseek_v3 without accumulator, requantization",
            "deepseek_v3 without accumulator",
        ),
    ],
    "accumulators": [
        ("FP8 operands, float32 sums", _TE, "FP32"),
        ("Hopper, promoted in the gradients", "te_current", _TE),
        ("Hopper, not promoted", "te_current without promotion", _TE),
        ("not promoted against promoted", "te_current without promotion", "te_current"),
        ("10 fraction bits", _UNIT.format(10), _TE),
        ("7 fraction bits", _UNIT.format(7), _TE),
    ],
}
"""Of each study: (what is asked, the variant, what it is set against), variants as the matrix spells them."""


def losses_by_recipe(folder: Path) -> dict[Recipe | None, dict[int, float]]:
    """{recipe: {seed: final validation loss}} of the finished runs of a folder or pack; NaN where there is none."""
    found: dict[Recipe | None, dict[int, float]] = defaultdict(dict)
    for run in map(read_run, find_runs(folder)):
        if run.finished:
            loss = run.result["final_val_loss"]
            found[_recipe_of(run)][run.result["seed"]] = math.nan if loss is None else float(loss)
    return found


def _recipe_of(run: Run) -> Recipe | None:
    return _read(run.config.get("formats") or run.config.get("fp8_format") or "FP32")


def _read(formats) -> Recipe | None:
    made = Recipe.from_dict(formats)
    return made if made.quantizes else None


def verdict(found: Comparison) -> str:
    """What the criterion says of a difference variant - base."""
    low, high = found.difference.low, found.difference.high
    if low is None or high is None:
        return "unresolved: one seed"
    return "worse" if low > 0 else "better" if high < 0 else "unresolved"


def print_study(name: str, folder: Path) -> None:
    """The table of one study, and what FP32 varies by."""
    losses = losses_by_recipe(folder)
    print(f"\n### {name}\n\n| variant | set against | mean loss | difference, 95 % interval | verdict |")
    print("|---|---|---|---|---|")
    for label, variant, base in REMOVALS[name]:
        made = losses.get(_read(variant), {})
        found = paired(made, losses.get(_read(base), {}))
        if found is None:
            print(f"| {label} | {base.partition(';')[0]} | - | no run | open |")
            continue
        mean = sum(made.values()) / len(made)
        print(f"| {label} | {base.partition(';')[0]} | {mean:.4f} | {interval(found.difference)} | {verdict(found)} |")
    if floor := noise_floor(losses.get(None, {})):
        print(f"\nFP32 varies from seed to seed with a standard deviation of {floor.sd:.4f} (n = {floor.n}).")


def main() -> None:
    """Print both studies from their packs, or one from a folder of runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", help="a folder named like a study; else the committed packs")
    given = parser.parse_args().runs
    for name in REMOVALS if given is None else [given.name]:
        path = RESULTS / f"{name}.tar.xz" if given is None else given
        if path.exists():
            print_study(name, path)
        else:
            print(f"\n### {name}\n\nno records: {path.name} is not there")


if __name__ == "__main__":
    main()
