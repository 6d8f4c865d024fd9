"""Claims that the training of a small GPT decides: arms are changes of one config, and most are judged by their losses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from altgrad.advise.stall import exact_stall, freeze_step
from altgrad.advise.trace import Snapshot
from altgrad.nn import Oscillation, quantize_model
from altgrad.quantization import quantize
from altgrad.records.schema import StepRecord
from altgrad.reproduce.claim import Facts, Values
from altgrad.reproduce.small_gpt import LARGER, step, trained, trainer_of

Arms = Mapping[str, Values]


def stored(fmt: str, rounding: str) -> dict[str, Any]:
    """Changes of a config: weights of linear layers on a format's grid, all operands in float32."""
    return {"formats": f"x:FP32 w:FP32 dy:FP32 grid({fmt},{rounding})"}


def compensated(name: str, fmt: str) -> dict[str, Any]:
    """Changes of a config: such weights under an optimizer that lands on the grid itself and remembers what it rounds off."""
    options = {"format": None, "off_grid_lr": 1e-3, "rounding": "nearest_even"}
    return {**stored(fmt, "nearest_even"), "optimizer.name": name, "optimizer.options": options}


def final_loss(facts: Facts, seed: int, quick: bool) -> Values:
    """Validation loss after training under `config`'s changes at `lr`, and the mean rates of flips and stalls."""
    rate = {"optimizer.lr": facts["lr"]} if "lr" in facts else {}
    records: list[StepRecord] = []
    loss = trained(trainer_of({**facts.get("config", {}), **rate}, seed, quick), records.append)
    rates = {"flips": [r.flip_rate for r in records], "stalls": [r.stall_rate for r in records]}
    known = {name: [value for value in values if value is not None] for name, values in rates.items()}
    return {"loss": loss, **{name: sum(values) / len(values) for name, values in known.items() if values}}


def losses(arms: Arms) -> dict[str, float]:
    """Final losses by arm."""
    return {name: values["loss"] for name, values in arms.items()}


def differences(*pairs: str, **named: str) -> Callable[[Arms], Values]:
    """Quantities that are differences of two arms' losses, each written "arm - other", and called so if not named."""

    def found(arms: Arms) -> Values:
        of = losses(arms)
        both = {name: text.split(" - ") for name, text in {**{p: p for p in pairs}, **named}.items()}
        return {name: of[arm] - of[other] for name, (arm, other) in both.items()}

    return found


# -- who freezes, by a float32 trace alone -----------------------------------------------------------------------

_FROZEN = 0.01  # of the coordinates move
STORED = ("E8M7", "E8M5_IEEE", "E8M4_IEEE", "E8M3_IEEE", "E4M3")


def predicted_freeze(facts: Facts, seed: int, quick: bool) -> Values:
    """Stall by layer and step of weights stored in each format, beside what a float32 run's weights and updates predict.

    All runs go side by side from one start on the same batches. A weight is predicted to stay where rounding its stored
    value plus the float32 run's update gives the stored value again.
    """
    steps = {"max_steps": 300, "optimizer.lr": 1e-3, "optimizer.min_lr_ratio": 0.0}
    twin = trainer_of(steps, seed, quick)
    runs = {fmt: trainer_of({**steps, **stored(fmt, "nearest_even")}, seed, quick) for fmt in STORED}
    runs["stochastic"] = trainer_of({**steps, **stored("E8M3_IEEE", "stochastic")}, seed, quick)
    names = [name for name, module in twin.model.named_modules() if isinstance(module, nn.Linear)]
    size = sum(_weight(twin.model, name).numel() for name in names)
    errors: dict[str, list[float]] = {fmt: [] for fmt in STORED}
    moved: dict[str, list[float]] = {name: [] for name in runs}
    foretold: dict[str, list[float]] = {fmt: [] for fmt in STORED}
    for _ in range(twin.config.max_steps):
        before = {name: _weight(twin.model, name).clone() for name in names}
        step(twin)
        for fmt, run in runs.items():
            moved[fmt].append(step(run).flip_rate or 0.0)
        for fmt in STORED:
            counts = runs[fmt].formats.handle.last_step_stats()
            flips = 0.0
            for name in names:
                update = _weight(twin.model, name) - before[name]
                expected = exact_stall(Snapshot(twin.step, name, before[name], update), fmt, "nearest")
                tried = float((update != 0).sum())
                flips += (1 - expected) * tried if tried else 0.0
                found = next(value for key, value in counts.items() if key.removesuffix(".weight") == name)
                if tried and found.attempted:
                    errors[fmt].append(abs(expected - found.stalled / found.attempted))
            foretold[fmt].append(flips / size)
    values = {f"error_{fmt}": sum(found) / len(found) for fmt, found in errors.items()}
    last = twin.config.max_steps + 1
    for fmt in STORED:
        values[f"froze_{fmt}"] = float(freeze_step(np.asarray(moved[fmt]) < _FROZEN, 1) or last)
        values[f"foretold_{fmt}"] = float(freeze_step(np.asarray(foretold[fmt]) < _FROZEN, 1) or last)
    then = min(int(values["froze_E8M3_IEEE"]), len(moved["stochastic"])) - 1
    return {**values, "moved_stochastic": moved["stochastic"][then], "moved_nearest": moved["E8M3_IEEE"][then]}


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def freezing(arms: Arms) -> Values:
    (values,) = arms.values()
    both = [(values[f"froze_{fmt}"], values[f"foretold_{fmt}"]) for fmt in STORED]
    return {
        "error": max(values[f"error_{fmt}"] for fmt in STORED),
        "date": max(abs(found - expected) / found for found, expected in both),
        **values,
    }


# -- bf16 copies that do not change ------------------------------------------------------------------------------

_SMALL_RATES = (3e-6, 3e-5, 3e-4)


def unchanged_copies(facts: Facts, seed: int, quick: bool) -> Values:
    """Share of weights whose bf16 copy is the same after a step at a small rate, behind 300 float32 steps; mean of 5 steps."""
    trainer = trainer_of({**LARGER, "max_steps": 300}, seed, quick)
    for _ in range(trainer.config.max_steps):
        step(trainer)
    weights = [p for p in trainer.model.parameters() if p.ndim == 2]
    state, found = trainer.capture(), {}
    for rate in _SMALL_RATES:
        trainer.restore(state)
        same = []
        for _ in range(5):
            before = [p.detach().bfloat16() for p in weights]
            trainer.train_step(*trainer.batch(trainer.step + 1), schedule=lambda _, rate=rate: rate)
            equal = sum(int((p.detach().bfloat16() == b).sum()) for p, b in zip(weights, before, strict=True))
            same.append(equal / sum(p.numel() for p in weights))
        found[f"same_{rate:g}"] = sum(same) / len(same)
    sizes = torch.cat([p.detach().abs().flatten() for p in weights])
    return {**found, "median": float(sizes.median()), "above": float((sizes / 256 > 3e-6).double().mean())}


def falling(arms: Arms) -> Values:
    (values,) = arms.values()
    least, middle, most = (values[f"same_{rate:g}"] for rate in _SMALL_RATES)
    return {**values, "falls": min(least - middle, middle - most)}


# -- rounding after training -------------------------------------------------------------------------------------


def rounded_after(facts: Facts, seed: int, quick: bool) -> Values:
    """Validation loss of a model trained with weights in float32, and in powers of two by rounding at the end or from
    the start."""
    plain = trainer_of({}, seed, quick)
    trained_loss = trained(plain)
    quantize_model(plain.model, facts["formats"], seed=seed)
    after = plain.evaluate()
    with_it = trained(trainer_of({"formats": facts["formats"]}, seed, quick))
    return {"float32": trained_loss, "after": after, "from_start": with_it}


def closed(arms: Arms) -> Values:
    (values,) = arms.values()
    gap, left = values["after"] - values["float32"], values["from_start"] - values["float32"]
    return {"left": left / gap, "gap_after": gap, "gap_from_start": left}


# -- damage, layer by layer --------------------------------------------------------------------------------------


def _inner_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]


def damage_of_subsets(facts: Facts, seed: int, quick: bool) -> Values:
    """How much of the damage to the loss, over all subsets of 8 layers in a low format, the sum over single layers explains.

    The layers' weights are rounded after training; the share is R^2 of the least-squares fit of one number for each layer.
    """
    trainer = trainer_of({"evaluation.batches": 4}, seed, quick)
    base = trained(trainer)
    names = _inner_layers(trainer.model)[: 4 if quick else None]
    plain = {name: _weight(trainer.model, name).clone() for name in names}
    low = {name: quantize(weight, facts["format"]) for name, weight in plain.items()}
    subsets = np.array(list(itertools.product((0.0, 1.0), repeat=len(names))))
    damage = np.zeros(len(subsets))
    for number, chosen in enumerate(subsets):
        for name, is_low in zip(names, chosen, strict=True):
            _weight(trainer.model, name).copy_(low[name] if is_low else plain[name])
        damage[number] = trainer.evaluate() - base
    design = np.column_stack([np.ones(len(subsets)), subsets])
    fitted = design @ np.linalg.lstsq(design, damage, rcond=None)[0]
    alone = damage[(subsets.sum(axis=1) == 1)].sum()
    explained = 1 - float(np.square(damage - fitted).sum() / np.square(damage - damage.mean()).sum())
    return {"explained": explained, "all_low": float(damage[-1]), "sum_alone": float(alone)}


_HALF_OF = ((0, 1, 2), (0, 1, 3), (1, 2, 3, 4))  # factors 6 to 8 of a 2^(8-3) plan: products of these; resolution IV


def plan_of_subsets() -> np.ndarray:
    """32 subsets of 8 layers, 0 or 1 in [32, 8], in which no effect of a layer mixes with one of a pair of layers."""
    base = np.array(list(itertools.product((-1, 1), repeat=5)))
    more = np.column_stack([base[:, list(columns)].prod(axis=1) for columns in _HALF_OF])
    return (np.column_stack([base, more]) + 1) // 2


def outcome_of_subsets(facts: Facts, seed: int, quick: bool) -> Values:
    """How much of the loss that training with subsets of 8 layers in a low format ends above float32, a sum over layers explains.

    32 subsets of a plan; R^2 of one number for each layer and one for all, adjusted for their count.
    """
    steps = {"max_steps": facts["steps"]}
    base = trainer_of(steps, seed, quick)
    names, plain, plan = _inner_layers(base.model), trained(base), plan_of_subsets()
    damage = np.zeros(len(plan))
    for number, chosen in enumerate(plan):
        low = list(itertools.compress(names, chosen))
        change = {**steps, "formats": facts["format"], "include": low}
        damage[number] = trained(trainer_of(change, seed, quick)) - plain
    design = np.column_stack([np.ones(len(plan)), plan])
    effects = np.linalg.lstsq(design, damage, rcond=None)[0]
    left = np.square(damage - design @ effects).sum() / (len(plan) - design.shape[1])
    return {
        "explained": 1 - float(left / damage.var(ddof=1)),
        "mean": float(damage.mean()),
        "largest": float(damage.max()),
        "sum": float(effects[1:].sum()),
        "rest": float(np.sqrt(left)),
    }


# -- gradients in MXFP8 ------------------------------------------------------------------------------------------


def gradient_formats(facts: Facts, seed: int, quick: bool) -> Values:
    """Validation loss, and the mean signal to quantization noise of output gradients over layers and every tenth step."""
    changes = {**LARGER, "max_steps": 200, "formats": facts["formats"], "monitor": {"enabled": True, "interval": 10}}
    trainer = trainer_of(changes, seed, quick)
    records: list[dict[str, Any]] = []
    trainer.measuring.sink = records.extend
    loss = trained(trainer)
    trainer.measuring.close()
    seen = [r["sqnr_db"] for r in records if r.get("role") == "grad_output" and "sqnr_db" in r]
    return {"loss": loss, "sqnr": sum(seen) / len(seen)}


# -- oscillation -------------------------------------------------------------------------------------------------


def oscillating(facts: Facts, seed: int, quick: bool) -> Values:
    """R of all weights together over 30 steps behind the warmup, and over the last 30, and the share of quantized
    weights that change in a step."""
    trainer = trainer_of({"formats": facts["formats"]}, seed, quick)
    last, window = trainer.config.max_steps, 2 if quick else 30
    begin = trainer.config.optimizer.warmup_steps
    counter, found = Oscillation(trainer.model), {}
    for number in range(1, last + 1):
        step(trainer)
        if begin < number <= begin + window or number > last - window:
            counter.update()
            found["first" if number <= begin + window else "last"] = counter.total
            found["flips"] = counter.flip_rate
        if number in (begin, last - window):
            counter.reset()
    return found


# -- rates that are tolerated ------------------------------------------------------------------------------------

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def best_rate(rates: tuple[float, ...], found: list[float]) -> float:
    """log2 of the rate at the vertex of the parabola through the least loss and its neighbours; the edge's own at an edge."""
    at, log = int(np.argmin(found)), np.log2(rates)
    if at in (0, len(rates) - 1):
        return float(log[at])
    left, middle, right = found[at - 1 : at + 2]
    bend = left - 2 * middle + right
    return float(log[at] + (0.5 * (left - right) / bend * (log[at + 1] - log[at]) if bend > 0 else 0.0))


def tolerance(arms: Arms) -> Values:
    found = losses(arms)
    of = {kind: [found[f"{kind} at {rate:g}"] for rate in RATES] for kind in ("stochastic", "master")}
    best = {kind: best_rate(RATES, values) for kind, values in of.items()}
    return {
        "ratio": best["stochastic"] - best["master"],
        "gap": min(of["stochastic"]) - min(of["master"]),
        "at_most": of["stochastic"][-1] - of["master"][-1],
    }


WIDE_RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
NARROWED = ("E8M7", "E5M7", "E4M7", "E3M7", "E8M5_IEEE", "E8M3_IEEE", "E8M1_IEEE")


def stable(arms: Arms) -> Values:
    """Octaves of rates up to the largest whose loss is within 0.3 nats of the arm's best."""
    found = losses(arms)
    width = {}
    for fmt in NARROWED:
        of = [found[f"{fmt} at {rate:g}"] for rate in WIDE_RATES]
        width[fmt] = np.log2(
            max(rate for rate, loss in zip(WIDE_RATES, of, strict=True) if loss <= min(of) + 0.3) / 1e-3
        )
    best = {fmt: min(found[f"{fmt} at {rate:g}"] for rate in WIDE_RATES) for fmt in NARROWED}
    return {
        "exponents": width["E8M7"] - width["E3M7"],
        "more_than_mantissa": width["E8M1_IEEE"] - width["E3M7"],
        "loss_exponents": best["E3M7"] - best["E8M7"],
        "loss_mantissa": best["E8M1_IEEE"] - best["E8M7"],
    }


COARSE = "E8M3_IEEE"


def compensation(arms: Arms) -> Values:
    found = losses(arms)
    gap = found["nearest"] - found["float32"]
    return {
        "nearest_stochastic": found["nearest"] - found["stochastic"],
        "stochastic_kahan": found["stochastic"] - found["kahan"],
        "kahan_float32": found["kahan"] - found["float32"],
        "activations": (found["activations"] - found["float32"]) / gap,
        "stochastic_kahan_e8m2": found["stochastic E8M2"] - found["kahan E8M2"],
        "gap": gap,
    }
