"""Is advice held to what it says? Traces, and the true runs that they predict, as one command: `python -m experiments.advice`.

For every model, seed and learning rate schedule a float32 trace over the first quarter of the run predicts what each
format does; then every format is trained from the start. A run that is in the record is not repeated, so the command can
be stopped and goes on; seeds come one after the other, so whatever there is can be told. The convolutional model needs
scikit-learn (its digits; `pip install altgrad[studies]`).

    python -m experiments.advice --list                      # how many runs there are to make
    python -m experiments.advice                             # make them; appends to experiments/results/advice.jsonl
    python -m experiments.advice --tell                      # the tables of docs/findings/advice.md; --seeds 2 3 4: of those

`experiments/advice_scores.py` states the criteria, which were written before the first run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from altgrad.advise import PlainLoop, Trace, take_trace
from altgrad.advise.advice import sqnr_error
from altgrad.advise.sensitivity import attribute, everywhere
from altgrad.advise.stall import Snapshot, exact_stall, freeze_step, moment_ratchet, stall_error, stall_over
from altgrad.errors import AltGradError
from altgrad.formats.spectrum import STORAGES
from altgrad.nn import Recipe, attach_optimizer, quantize_model, uniform
from altgrad.optim import make_optimizer
from altgrad.records.metrics import OPERANDS
from altgrad.training.config.experiment import DataSection, OptimizerSection
from altgrad.training.data import load_corpus
from altgrad.training.model import GPT, GPTConfig
from altgrad.training.step.stepping import lr_at

RECORD = Path(__file__).parent / "results" / "advice.jsonl"
STEPS, TRACED = 100, 25
SEEDS = (0, 1, 2, 3, 4)
DECAYS = ("constant", "cosine")
FORMATS = ("E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1")
HELD_OUT = ("E3M3", "E4M2")
"""Formats that nothing was tuned on."""
GPTS = {"gpt-S": (2, 2, 32), "gpt-M": (3, 4, 64)}
"""Layers, heads, width; 32 bytes of context, 8 sequences a step."""
HELD_OUT_MODEL = "conv"
X, W, DY = ("E1M4", "E2M3", "E3M2"), ("E1M4", "E2M3", "E3M2"), ("E1M4", "E2M3", "E3M2", "E4M1")
"""The recipes that are enumerated: one six-bit format for each of the three operands of all layers."""
MOMENTS = ("E4M3", "E5M2", "E6M1")
BETA2 = 0.95
SETTINGS = {decay: OptimizerSection(lr=3e-3, warmup_steps=5, decay=decay) for decay in DECAYS}  # type: ignore[arg-type]


# -- models -----------------------------------------------------------------------------------------------------------


@cache
def _corpus():
    return load_corpus(DataSection(max_bytes=1_000_000))


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)


def _conv(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def _text_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def _class_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _text_batch(seed: int, step: int) -> tuple[Tensor, ...]:
    return _corpus().batch(seed, step, 8, 32)


def _digit_batch(seed: int, step: int) -> tuple[Tensor, ...]:
    images, labels = _digits()
    draw = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(32) % np.uint64(len(images))
    rows = torch.from_numpy(draw.astype(np.int64))
    return images[rows], labels[rows]


def make_loop(model: str, seed: int, decay: str, moment: str | None = None) -> PlainLoop:
    """A run at its start: weights and batches are functions of the seed."""
    if model == HELD_OUT_MODEL:
        module, loss, batches = _conv(seed), _class_loss, partial(_digit_batch, seed)
    else:
        layers, heads, width = GPTS[model]
        module, loss = GPT(GPTConfig(_corpus().vocab_size, layers, heads, width, 32), seed=seed), _text_loss
        batches = partial(_text_batch, seed)
    settings = SETTINGS[decay]
    schedule = [lr_at(step, STEPS, settings) for step in range(1, STEPS + 1)]
    shared: dict[str, Any] = {"lr": settings.lr, "betas": (0.9, BETA2), "weight_decay": 0.1}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if moment is None:
            return make_optimizer("adamw", list(parameters), **shared)
        return make_optimizer(
            "sr_adamw", list(parameters), moment_format=(None, moment), **shared
        )  # AdamW off the grid

    return PlainLoop(module, batches, loss, optimizer, schedule)


# -- true runs --------------------------------------------------------------------------------------------------------


def recipe_of(fmt: str, storage: str) -> Recipe | None:
    """One format for everything; weights stored on its grid, or float32 masters."""
    if fmt == "FP32":
        return None
    if storage == "master":
        return uniform(fmt)
    return uniform(fmt, storage="grid", storage_rounding="nearest_even" if storage == "nearest" else "stochastic")


def train(loop: PlainLoop, recipe: Recipe | None, storage: str = "", fmt: str = "") -> dict[str, Any]:
    """Losses and the stall of a run from its start to its end."""
    handle = None
    if recipe is not None:
        quantize_model(loop.model, recipe, seed=1)
        handle = attach_optimizer(loop.model, loop.optimizer) if storage in ("nearest", "stochastic") else None
    weights = {name: p for name, p in loop.model.named_parameters() if p.dim() > 1}
    losses, stalls = [], []
    for step in range(1, STEPS + 1):
        looked = storage == "master" and step % 5 == 0
        before = {name: p.detach().clone() for name, p in weights.items()} if looked else {}
        losses.append(loop.advance())
        if handle is not None and handle.counts is not None:
            attempted, _, stalled, *_ = handle.counts.sum(0).tolist()
            stalls.append(stalled / attempted if attempted else math.nan)
        elif looked:
            sizes = np.array([p.numel() for p in weights.values()])
            found = [
                exact_stall(Snapshot(step, name, before[name], p.detach() - before[name]), fmt, "master")
                for name, p in weights.items()
            ]
            stalls.append(float(np.nansum(np.array(found) * sizes) / sizes.sum()))
    curve = np.array(stalls)
    return {
        "loss": round(float(np.mean(losses[-20:])), 5),
        "loss20": round(float(np.mean(losses[10:20])), 5),
        "stall": None if not len(curve) else round(float(np.nanmean(curve)), 4),
        "freeze": freeze_step(np.nan_to_num(curve, nan=1.0)) if handle is not None else None,
    }


# -- predictions ------------------------------------------------------------------------------------------------------


def trace_of(model: str, seed: int, decay: str) -> tuple[PlainLoop, Trace]:
    loop = make_loop(model, seed, decay)
    return loop, take_trace(loop, TRACED, measured=5)


def predicted(model: str, seed: int, decay: str) -> dict[str, Any]:
    """What a trace says of every format."""
    loop, trace = trace_of(model, seed, decay)
    attribution = attribute(loop, trace)
    formats = (*FORMATS, *HELD_OUT)
    stalls = {}
    for storage, fmt in itertools.product(STORAGES, formats):
        curve = stall_over(trace, list(trace.layers), fmt, storage)
        stalls[f"{storage}|{fmt}"] = [round(float(curve.mean()), 4), freeze_step(curve)]
    return {
        "stall": stalls,
        "damage": {fmt: float(f"{error:.4g}") for fmt, error in everywhere(loop, trace, formats).items()},
        "sqnr": {fmt: round(_mean_sqnr(trace, fmt), 3) for fmt in formats},
        "sqnr_error": {fmt: round(sqnr_error(loop, trace, (fmt,)), 3) for fmt in formats},
        "spectral_stall_error": {k: round(v, 5) for k, v in stall_error(trace, formats).items()},
        "completeness": round(attribution.completeness, 4),
    }


def _mean_sqnr(trace: Trace, fmt: str, role: str | None = None) -> float:
    return float(np.mean([trace.predict(*cell, fmt, 3).sqnr_db for cell in trace.cells if role in (None, cell[1])]))


def predicted_choice(model: str, seed: int) -> dict[str, Any]:
    """Damages by role and format for the enumerated recipes, and what other methods would choose."""
    loop, trace = trace_of(model, seed, "cosine")
    attribution = attribute(loop, trace, tuple(dict.fromkeys((*X, *W, *DY))))
    by_role = {
        role: {
            fmt: sum(
                attribution.cells[cell].damage(fmt, trace.predict(*cell, fmt, 3).noise)
                for cell in trace.cells
                if cell[1] == role
            )
            for fmt in offered
        }
        for role, offered in zip(OPERANDS, (X, W, DY), strict=True)
    }
    sqnr = {
        role: {fmt: _mean_sqnr(trace, fmt, role) for fmt in offered}
        for role, offered in zip(OPERANDS, (X, W, DY), strict=True)
    }
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        curvature = hessian_traces(loop)
    hawq = {
        fmt: sum(
            curvature[f"{layer}.weight"]
            * trace.operands[layer, "weight"][-1].sum_sq
            * trace.predict(layer, "weight", fmt, 3).noise
            for layer in trace.layers
            if f"{layer}.weight" in curvature
        )
        for fmt in W
    }
    return {
        "damage": {role: {k: float(f"{v:.4g}") for k, v in one.items()} for role, one in by_role.items()},
        "sqnr": {role: {k: round(v, 3) for k, v in one.items()} for role, one in sqnr.items()},
        "hawq": {k: float(f"{v:.4g}") for k, v in hawq.items()},
    }


def hessian_traces(loop: PlainLoop, draws: int = 8) -> dict[str, float]:
    """Mean of the Hessian's diagonal of each weight matrix by Hutchinson's estimator (as HAWQ-V2, arXiv:1911.03852)."""
    named = {name: p for name, p in loop.model.named_parameters() if p.dim() > 1}
    loss = loop._loss(loop.model, *loop._batches(loop.taken + 1))
    grads = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    generator = torch.Generator().manual_seed(0)
    total = dict.fromkeys(named, 0.0)
    for _ in range(draws):
        signs = [torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1 for p in named.values()]
        products = torch.autograd.grad(grads, list(named.values()), signs, retain_graph=True)
        for name, sign, product in zip(named, signs, products, strict=True):
            total[name] += float((sign * product).sum()) / draws / sign.numel()
    return total


# -- moments ----------------------------------------------------------------------------------------------------------


def ratchet(model: str, seed: int) -> dict[str, Any]:
    """sqrt(v / v of the float32 twin), median over all weights, as a trace predicts it and as runs show it."""
    loop, trace = trace_of(model, seed, "constant")
    gradients = np.concatenate(list(trace.coordinates.values()), axis=1)
    shown, said = {}, {}
    exact = make_loop(model, seed, "constant")
    lows = {fmt: make_loop(model, seed, "constant", fmt) for fmt in MOMENTS}
    series: dict[str, list[float]] = {fmt: [] for fmt in MOMENTS}
    for _ in range(STEPS):
        exact.advance()
        for fmt, low in lows.items():
            low.advance()
            series[fmt].append(_moment_ratio(exact, low, fmt))
    for fmt in MOMENTS:
        shown[fmt] = [round(v, 3) for v in series[fmt][4::5]]
        said[fmt] = [round(float(v), 3) for v in moment_ratchet(gradients, fmt, BETA2, STEPS)[4::5]]
    del loop
    return {"measured": shown, "predicted": said}


def _moment_ratio(exact: PlainLoop, low: PlainLoop, fmt: str) -> float:
    from altgrad.optim.moments import moment_format, read

    ratios = []
    for a, b in zip(exact.model.parameters(), low.model.parameters(), strict=True):
        if a.dim() > 1:
            known, state = exact.optimizer.state[a]["exp_avg_sq"].flatten(), low.optimizer.state[b]
            ratios.append(read(state, "exp_avg_sq", b, moment_format(fmt)).flatten()[known > 0] / known[known > 0])
    return float(torch.cat(ratios).sqrt().median())


# -- the record -------------------------------------------------------------------------------------------------------


def jobs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(key, how to make it) of everything: moments first, then seed by seed, what is held out before what is repeated."""
    for seed, model in itertools.product(SEEDS, GPTS):
        yield f"moments|{model}|{seed}", lambda m=model, s=seed: ratchet(m, s)
    for seed in SEEDS:
        yield from _trained(seed, "gpt-S", "cosine")
        yield from _trained(seed, HELD_OUT_MODEL, "constant")
        yield from _trained(seed, "gpt-M", "cosine")
        yield f"choice|gpt-S|{seed}", lambda s=seed: predicted_choice("gpt-S", s)
        for x, w, dy in itertools.product(X, W, DY):
            recipe = uniform(x, weight=w, grad=dy)
            yield (
                f"recipe|gpt-S|{seed}|{x},{w},{dy}",
                lambda s=seed, r=recipe: train(make_loop("gpt-S", s, "cosine"), r),
            )
        yield from _trained(seed, "gpt-S", "constant")
        yield from _trained(seed, HELD_OUT_MODEL, "cosine")
        yield from _trained(seed, "gpt-M", "constant")


def _trained(seed: int, model: str, decay: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """A prediction and the runs that it is held against."""
    where = f"{model}|{seed}|{decay}"
    yield f"{where}|advice", lambda: predicted(model, seed, decay)
    yield f"{where}|FP32|FP32", lambda: train(make_loop(model, seed, decay), None)
    for storage, fmt in itertools.product(STORAGES, (*FORMATS, *HELD_OUT)):
        yield (
            f"{where}|{storage}|{fmt}",
            lambda t=storage, f=fmt: train(make_loop(model, seed, decay), recipe_of(f, t), t, f),
        )


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """What is there by key; a line that was cut off counts as not there."""
    found = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            found[entry.pop("key")] = entry
        except ValueError:
            continue
    return found


def seed_of(key: str) -> int:
    """The seed of an entry; keys begin with a model, or with the kind of what is of one."""
    parts = key.split("|")
    return int(next(part for part in parts[1:] if part.isdecimal()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, list it, or tell what there is."""
    parser = argparse.ArgumentParser(prog="python -m experiments.advice", description="The study of advice.")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--list", action="store_true", help="how many runs there are to make")
    parser.add_argument("--tell", action="store_true", help="the tables, as Markdown")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="what --tell rests on")
    parser.add_argument("--only", default="", help="keys that hold this text")
    options = parser.parse_args(arguments)
    known = read_record(options.record)
    if options.tell:
        from experiments.advice_scores import tell

        print(tell(known, options.seeds))
        return 0
    todo = [(key, make) for key, make in jobs() if key not in known and options.only in key]
    print(f"{len(todo)} to make, {len(known)} in {options.record}")
    if options.list:
        return 0
    torch.set_num_threads(1)
    options.record.parent.mkdir(parents=True, exist_ok=True)
    for i, (key, make) in enumerate(todo):
        begun = time.perf_counter()
        try:
            result = make()
        except AltGradError as error:
            result = {"refused": str(error)}
        with options.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **result}) + "\n")
        print(f"{i + 1}/{len(todo)} {key} {time.perf_counter() - begun:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
