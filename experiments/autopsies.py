"""Autopsies of damaged runs whose cause is known or expected, as one command: `python -m experiments.autopsies`.

Each case says before it runs what damages it and which verdict counts as right (`Expected`). A finished case is kept, an
interrupted one goes on from its forks; at the end the records are packed and tabled.

    python -m experiments.autopsies --list
    python -m experiments.autopsies --case dead_head
    python -m experiments.autopsies --out runs/autopsies --pack experiments/results/autopsies.tar.xz
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from altgrad.autopsy import autopsy
from altgrad.errors import AltGradError
from altgrad.nn import Recipe, uniform
from altgrad.nn.recipe.spec import OperandSpec
from altgrad.quantization import NoScaling, StaticScaling
from altgrad.records.files import write_json, write_text
from altgrad.records.machine import processor_name
from altgrad.records.run import Run
from altgrad.training.config.loading import load_config
from altgrad.training.format_runner import FormatExperimentRunner
from altgrad.training.run.demo import DEMO_SIZE
from experiments.autopsy_loops import LOOPS
from experiments.records import collect

SMALL: dict[str, Any] = {
    "max_steps": 200,
    "threads": 1,
    "checkpoint_interval": 200,
    "model": {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32},
    "data": {"source": "stdlib", "batch_size": 8},
    "optimizer": {"lr": 2e-3, "warmup_steps": 10},
    "evaluation": {"interval": 50, "batches": 2},
    "verdict": {"stop": False},
}
"""A GPT of 0.13M parameters on 256 bytes a step: an autopsy takes tens of seconds."""
DEMO: dict[str, Any] = {**DEMO_SIZE, "threads": 2, "weight_storage": "grid", "verdict": {"stop": False}}
"""The runs of `altgrad demo`: 0.85M parameters, weights on the grid."""


@dataclass(frozen=True)
class Expected:
    """The verdict that counts as right, fixed before the case runs.

    kind: of the verdict. cells: patterns; every cell found must match one of them, and each of `all_of` must match a cell
    found. mechanisms: those that count as right; empty where none is asked for.
    """

    kind: str
    cells: tuple[str, ...] = ()
    all_of: tuple[str, ...] = ()
    mechanisms: tuple[str, ...] = ()
    structure: tuple[str, ...] = ()

    def misses(self, verdict: dict[str, Any]) -> list[str]:
        """What the verdict says otherwise; empty where it is right."""
        found = verdict["cells"]
        wrong = []
        if verdict["kind"] != self.kind:
            wrong.append(f"kind {verdict['kind']!r}, expected {self.kind!r}")
        strangers = [c for c in found if not any(fnmatchcase(c, p) for p in self.cells)]
        if strangers:
            wrong.append(f"cells not expected: {', '.join(strangers)}")
        lacking = [p for p in self.all_of if not any(fnmatchcase(c, p) for c in found)]
        if lacking:
            wrong.append(f"not found: {', '.join(lacking)}")
        for name, allowed in (("mechanism", self.mechanisms), ("structure", self.structure)):
            if allowed and verdict[name] not in allowed:
                wrong.append(f"{name} {verdict[name]!r}, expected {' or '.join(map(repr, allowed))}")
        return wrong


@dataclass(frozen=True)
class Case:
    """A damaged run: a config, or the name of a loop in `experiments.autopsy_loops`."""

    name: str
    says: str
    expected: Expected
    config: dict[str, Any] | None = None
    loop: str | None = None
    budget: int = 200
    settings: dict[str, Any] = field(default_factory=dict)


def broken(base: Recipe, *cells: tuple[str, str, str], spec: OperandSpec) -> dict[str, Any]:
    """A recipe with one spec in some cells, as a config takes it."""
    for layer, gemm, role in cells:
        base = base.with_cell(layer, gemm, role, spec)
    return base.to_dict()


def fixed(fmt: str, scale: float, **options: Any) -> OperandSpec:
    """A format under a fixed scale."""
    return OperandSpec(fmt, scaling=StaticScaling(scale), **options)


E4M3 = uniform("E4M3")
HEAD_GRADIENTS = (("head", "input_grad", "grad_output"), ("head", "weight_grad", "grad_output"))
UP = ("blocks.1.mlp.up", "forward", "input")
TWO_OUTS = tuple((f"blocks.{i}.mlp.out", "forward", "input") for i in (0, 1))
DECOYS = (("blocks.0.attention.qkv", "weight_grad", "grad_output"), ("blocks.1.attention.qkv", "weight_grad", "input"))

CASES = (
    Case(
        "e7m0_grid",
        "the demo's E7M0 run: weights on a grid of powers of two, nearest rounding",
        Expected("cause", ("*.storage",), ("*.storage",), ("lost updates",)),
        {**DEMO, "fp8_format": "E7M0"},
    ),
    Case(
        "e5m2_grid",
        "the demo's E5M2 run: weights on the grid, nearest rounding",
        Expected("cause", ("*.storage",), ("*.storage",), ("lost updates",)),
        {**DEMO, "fp8_format": "E5M2"},
    ),
    Case(
        "e3m4_inf",
        "unscaled E3M4 with inf (max 15.5) and IEEE overflow, gradients in E5M2: activations outgrow the format",
        Expected("cause", ("*.input",), ("*.forward.input",), ("range", "scale", "overflow")),
        {
            **SMALL,
            "fp8_format": "E3M4_IEEE",
            "gradient_format": "E5M2",
            "scaling": "none",
            "overflow": "native",
            "optimizer": {"lr": 5e-3, "warmup_steps": 10},
        },
    ),
    Case(
        "dead_head",
        "the head's output gradient in unscaled E1M6, whose smallest step is 1/32: all of it underflows",
        Expected("cause", ("head.*.grad_output",), ("head.input_grad.grad_output",), ("range", "scale")),
        {**SMALL, "formats": broken(E4M3, *HEAD_GRADIENTS, spec=OperandSpec("E1M6", scaling=NoScaling()))},
    ),
    Case(
        "decoys",
        "one MLP input saturates at a fixed scale; two gradient operands have only one mantissa bit, a worse SQNR",
        Expected("cause", (".".join(UP), *(".".join(d) for d in DECOYS)), (".".join(UP),), ("range", "scale")),
        {
            **SMALL,
            "formats": broken(
                Recipe.from_dict(broken(E4M3, *DECOYS, spec=OperandSpec("E4M1"))), UP, spec=fixed("E4M3", 2.0**-12)
            ),
        },
    ),
    Case(
        "same_inf_twice",
        "the inputs of both MLP output layers overflow to inf at a fixed scale: no single rescue helps",
        Expected(
            "cause",
            tuple(".".join(c) for c in TWO_OUTS),
            tuple(".".join(c) for c in TWO_OUTS),
            ("overflow", "range", "scale"),
            ("redundant",),
        ),
        {**SMALL, "formats": broken(E4M3, *TWO_OUTS, spec=fixed("E5M2", 2.0**-20, overflow="native"))},
    ),
    Case(
        "high_lr",
        "E4M3 under current amax, trained at a learning rate of 0.3, which float32 does not survive either",
        Expected("not precision", mechanisms=("learning rate",)),
        {**SMALL, "fp8_format": "E4M3", "optimizer": {"lr": 0.3, "warmup_steps": 10, "decay": "constant"}},
    ),
    Case(
        "scrambled",
        "E4M3 under current amax, whose targets are shuffled from step 101 on",
        Expected("not precision", mechanisms=("batches",)),
        loop="scrambled",
    ),
    Case(
        "stale_scale",
        "the head's input keeps a scale that saturates its outermost values and does no damage yet",
        Expected("no damage in the window"),
        {**SMALL, "max_steps": 100, "formats": broken(E4M3, ("head", "forward", "input"), spec=fixed("E4M3", 2.0**-7))},
    ),
    Case(
        "norm_weights",
        "student and teacher of residual MLPs with every operand, norm weights included, in MXFP8 (E4M3, floor scale)",
        Expected("cause", ("*norm*.norm.weight",), ("*norm*.norm.weight",)),
        loop="norm_weights",
    ),
)


def run(case: Case, out: Path) -> dict[str, Any]:
    """The record of a case; a finished one is read back."""
    target = out / f"{case.name}.json"
    if target.exists():
        return json.loads(target.read_text(encoding="utf-8"))
    started = time.monotonic()
    extra: dict[str, Any] = {}
    if case.config is not None:
        config = load_config({"name": case.name, "runs_dir": str(out), **case.config})
        folder = FormatExperimentRunner(config).run().run_dir
        autopsy(folder, budget=case.budget, told=_tell)
        verdict = json.loads((folder / "autopsy" / "verdict.json").read_text(encoding="utf-8"))
    else:
        assert case.loop is not None
        verdict, extra = LOOPS[case.loop](out / case.loop, case.budget, _tell)
    verdict.pop("losses", None)
    verdict.pop("places", None)
    verdict.pop("command", None)
    record = {
        "case": case.name,
        "says": case.says,
        "expected": asdict(case.expected),
        "misses": case.expected.misses(verdict),
        "verdict": verdict,
        **extra,
        "wall_s": round(time.monotonic() - started, 1),
        "cpu": processor_name(),
        "torch": torch.__version__,
    }
    write_json(target, record)
    return record


def _tell(told: Any) -> None:
    print(f"  {told.stage}: fork {told.done}, {told.outcome.seconds:.1f} s", flush=True)


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = [
        "# Autopsies of damaged runs",
        "",
        "Written by `python -m experiments.autopsies`; the expectations are in that script and were fixed before the runs.",
        "",
        "| case | verdict | structure | mechanism | damage | onset | rescue closes | alone does | forks | fork s | as expected |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in records:
        v = one["verdict"]
        cells = f"{', '.join(v['cells'][:3])}{', ...' if len(v['cells']) > 3 else ''}" if v["cells"] else ""
        shares = [_share(v[key]) for key in ("rescue", "alone")]
        damage = "" if v["damage"] is None else f"{v['damage']:.3f}"
        met = "yes" if not one["misses"] else "; ".join(one["misses"])
        cause = f"{v['kind']}: {cells} ({len(v['cells'])})" if cells else v["kind"]
        facts = [one["case"], cause, v["structure"], v["mechanism"], damage, v["onset"], *shares, v["forks"]]
        row = ["" if fact is None else str(fact) for fact in [*facts, f"{v['seconds']:.0f}", met]]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def _share(share: dict[str, Any] | None) -> str:
    return "" if share is None else f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"


STALLS = [(fmt, decay, seed) for seed in (42, 43, 44) for decay in ("cosine", "constant") for fmt in ("FP32", "E1M6")]
STALLS += [("E5M2", "cosine", 42), ("E7M0", "cosine", 42)]
"""The demo's runs whose stall is dated: (format, decay of the learning rate, seed)."""


def stalls(out: Path) -> str:
    """When the demo's runs stall, what they are called for it, and how far they end above float32, as Markdown."""
    ends: dict[tuple[str, str, int], float] = {}
    lines = [
        "| format | decay | seed | stall since | verdict, remarks | last change of a code | above float32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for fmt, decay, seed in STALLS:
        storage = "master" if fmt == "FP32" else "grid"
        schedule = {**DEMO_SIZE["optimizer"], "decay": decay}
        more = {"name": f"{fmt.lower()}-{decay}", "fp8_format": fmt, "weight_storage": storage, "seed": seed}
        config = load_config({**DEMO, **more, "optimizer": schedule, "runs_dir": str(out / "stalls")})
        result = FormatExperimentRunner(config).run()
        if result.status == "interrupted":
            sys.exit("interrupted; the same command goes on from there")
        assert result.final_val_loss is not None
        ends[fmt, decay, seed] = result.final_val_loss
        if fmt == "FP32":
            continue
        steps = Run(result.run_dir).records("step")
        below = [r["step"] for r in steps if r["stall_rate"] < 0.95]
        since = "never" if below[-1] == steps[-1]["step"] else str(below[-1] + 1)
        moved = max(r["step"] for r in steps if r["flip_rate"])
        judged = [*([result.verdict] if result.verdict else []), *result.remarks]
        remark = ", ".join(f"{r['kind']} from {r['onset_step']}" for r in judged) or "none"
        above = f"{ends[fmt, decay, seed] - ends['FP32', decay, seed]:+.3f}" if ("FP32", decay, seed) in ends else ""
        lines.append(f"| {fmt} | {decay} | {seed} | {since} | {remark} | {moved} | {above} |")
        print(lines[-1], flush=True)
    return "\n".join(["## When the demo's runs stall", "", *lines, ""])


def main() -> None:
    """Run the cases asked for, print the table, and pack the records where a pack is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--out", type=Path, default=Path("runs/autopsies"))
    parser.add_argument("--pack", type=Path, help="such as experiments/results/autopsies.tar.xz")
    parser.add_argument(
        "--stalls", action="store_true", help="also date the stalls of the demo's runs, at two schedules"
    )
    parser.add_argument("--list", action="store_true", help="say what the cases are and expect; run none")
    arguments = parser.parse_args()
    if arguments.case is None and arguments.pack is not None:
        arguments.stalls = True
    chosen = [case for case in CASES if arguments.case is None or case.name in arguments.case]
    if arguments.list:
        for case in chosen:
            print(f"{case.name}: {case.says}\n  {case.expected}")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = []
    for case in chosen:
        print(case.name, flush=True)
        records.append(run(case, arguments.out))
        print(f"  {records[-1]['verdict']['sentence']}  {records[-1]['misses'] or 'as expected'}", flush=True)
    text = table(records) + ("\n" + stalls(arguments.out) if arguments.stalls else "")
    print(text)
    if arguments.pack is not None:
        collect(arguments.out, arguments.pack)
        write_text(arguments.pack.with_name(arguments.pack.name.removesuffix(".tar.xz") + ".md"), text)


if __name__ == "__main__":
    try:
        main()
    except AltGradError as error:
        sys.exit(str(error))
