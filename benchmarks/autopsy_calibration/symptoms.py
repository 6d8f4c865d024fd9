"""The baselines: what a person reads off a monitor, asked to name the guilty cell of the same run.

Each gives every cell a number; its answer is the cell with the largest. They see the damaged run itself, from its middle to
its end, which is more than they would have had on the day.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from altgrad.autopsy.fork import LOW, TWIN
from altgrad.autopsy.moments import MomentCell
from altgrad.autopsy.oracle import LoopOracle, put_low
from altgrad.formats.catalog import get_format
from altgrad.nn.recipe.cells import Cell
from altgrad.nn.recipe.scaling_choice import NoScaling
from altgrad.nn.recipe.spec import OperandSpec, StorageSpec
from altgrad.quantization import StaticScaling, amax_scale, quantize
from benchmarks.autopsy_calibration.faults import Case
from benchmarks.autopsy_calibration.loop import EVERY, STEPS, operands_of

LOOKED_AT = (STEPS // 4, STEPS // 2, 3 * STEPS // 4, STEPS - EVERY)
"""Steps of the states at which the tensors are measured."""
TROUBLE_DB = 10.0
"""Signal-to-noise ratio below which a cell is in trouble."""


def rounded(x: Tensor, spec: Any) -> Tensor:
    """What a cell makes of a tensor."""
    fmt = get_format(spec.format)
    options: dict[str, Any] = {"rounding": spec.rounding, "subnormals": spec.subnormals}
    if options["rounding"].value == "stochastic":
        options |= {"key": (1, 1), "random_bits": spec.random_bits}
    if isinstance(spec, OperandSpec):
        options["overflow"] = spec.overflow
        if hasattr(fmt, "element"):
            return quantize(x, fmt)
        if isinstance(spec.scaling, StaticScaling):
            return quantize(x, fmt, spec.scaling.scale, **options)
        if isinstance(spec.scaling, NoScaling):
            return quantize(x, fmt, **options)
    return quantize(x, fmt, amax_scale(x, fmt), **options)


def measured(x: Tensor, spec: Any) -> dict[str, float]:
    """Noise (-SQNR in dB), underflow and overflow of a tensor in a cell."""
    y = rounded(x, spec)
    finite = torch.isfinite(x)
    there = finite & (x != 0)
    count = max(1, int(there.sum()))
    noise = float((y - x)[finite].square().sum())
    signal = float(x[finite].square().sum())
    sqnr = (
        math.inf
        if noise == 0
        else -math.inf
        if not math.isfinite(noise) or signal == 0
        else 10 * math.log10(signal / noise)
    )
    top = float(y[torch.isfinite(y)].abs().max()) if bool(torch.isfinite(y).any()) else 0.0
    return {
        "worst SQNR": -sqnr,
        "largest underflow": float((there & (y == 0)).sum()) / count,
        "largest overflow": float((there & (~torch.isfinite(y) | (x.abs() > top * 1.06))).sum()) / count,
    }


def baselines(oracle: LoopOracle, case: Case) -> dict[str, Any]:
    """{baseline: the cell it names, or None}."""
    loop, cells = oracle.loop, oracle.cells
    worst: dict[str, dict[Any, float]] = {}
    first: dict[Any, float] = {}

    def note(name: str, cell: Any, value: float) -> None:
        if value == value:
            table = worst.setdefault(name, {})
            table[cell] = max(table.get(cell, -math.inf), value)

    captures = oracle.captures(LOW)
    looked = [max(c for c in captures if c <= step) for step in LOOKED_AT]
    with loop.aside():
        for step in looked:
            loop.restore(oracle._rings[LOW][step])
            put_low(loop, oracle.specs)
            before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
            tensors = operands_of(loop)  # type: ignore[arg-type]
            put_low(loop, {c: s for c, s in oracle.specs.items() if c.role != "storage"})
            loop.advance()
            after = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
            for cell, spec in oracle.specs.items():
                if isinstance(cell, MomentCell):
                    continue
                if isinstance(spec, StorageSpec):
                    name = f"{cell.layer}.weight"
                    note("highest stall", cell, _stall(before[name], after[name], spec))
                    values = measured(after[name], spec)
                elif (cell.layer, cell.role) in tensors:
                    values = measured(tensors[cell.layer, cell.role], spec)
                else:
                    continue
                for baseline, value in values.items():
                    note(baseline, cell, value)
                if -values["worst SQNR"] < TROUBLE_DB:
                    first.setdefault(cell, -step)
        norms = {path: _norms(loop, oracle, path, looked[1:]) for path in (LOW, TWIN)}
        suspicion = oracle.prior(looked[2], [c for c in cells if isinstance(c, Cell)])
    tables: dict[str, dict[Any, float]] = {**worst, "first trouble": first, "one-step attribution": suspicion}
    named: dict[str, Any] = {name: _largest(table) for name, table in tables.items()}
    for name in ("worst SQNR", "largest underflow", "largest overflow", "highest stall", "first trouble"):
        named.setdefault(name, None)
    ratios = {layer: abs(math.log((norms[LOW][layer] + 1e-12) / (norms[TWIN][layer] + 1e-12))) for layer in norms[LOW]}
    named["gradient norm (layer only)"] = max(ratios, key=lambda layer: ratios[layer], default=None)
    return named


def _stall(before: Tensor, after: Tensor, spec: Any) -> float:
    moved = before != after
    lost = moved & (rounded(after, spec) == before)
    return float(lost.sum()) / max(1, int(moved.sum()))


def _norms(loop: Any, oracle: LoopOracle, path: str, steps: list[int]) -> dict[str, float]:
    """Largest gradient norm of each layer along a trajectory."""
    found: dict[str, float] = {}
    for step in steps:
        loop.restore(oracle._rings[path][step])
        put_low(loop, oracle.specs if path == LOW else {})
        loop.gradient()
        for name, parameter in loop.model.named_parameters():
            if (
                name.endswith(".weight")
                and parameter.dim() > 1
                and "embedding" not in name
                and parameter.grad is not None
            ):
                norm = float(parameter.grad.norm())
                layer = name.removesuffix(".weight")
                found[layer] = max(found.get(layer, 0.0), norm if math.isfinite(norm) else 1e30)
    return found


def _largest(table: dict[Any, float]) -> str | None:
    best = max(table.values(), default=-math.inf)
    if best in (-math.inf, 0.0):
        return None
    return str(min((cell for cell, value in table.items() if value == best), key=str))
