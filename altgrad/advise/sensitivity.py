"""Which operands matter: one forward and backward each, with that operand alone in a low format.

    damage(c, f) = sum over parameters (|g' - a g|^2 + max(0, 1 - 2a)^2 |g|^2) / sum |g|^2
                   g = g(float32), g' = g(c in f), a = <g', g> / |g|^2

the relative squared error across the gradient, parameter by parameter. What lies along it makes a step longer or shorter, and
optimizers that divide by the gradient's own magnitude (Adam and its kin) undo that; only what leaves less than half of it counts,
up to 1 for a gradient that is lost and more for one that is reversed. For other optimizers this says too little. A
format with one mantissa bit shortens the gradient and turns it little; one that loses small values turns it
(docs/findings/advice.md has what this changed).

Every format that is offered is tried on every operand: two formats that put the same noise on a tensor may differ by ten
times in what they do to the gradient (small values that become zero all err in one direction, and such errors add up in
the products that follow). Of formats that were not tried the damage is that of their noise, on a line in logarithms
through those that were. Damages of operands that are low together add up as far as their errors are independent; how far
they do is measured and said (`completeness`).

For a whole model in one format the gradient is taken over several batches (`everywhere`): of an error that differs from
batch to batch little is left in the mean, as in training, and what is left is bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from altgrad.advise.loop import quantized
from altgrad.advise.trace import Tell, Trace
from altgrad.errors import ConfigError
from altgrad.loop.loop import Loop
from altgrad.nn import LayerRecipe, Override, Recipe, layer_recipe
from altgrad.nn.recipe.recipe import ATTENTION_NAME

REFERENCES = ("E3M4", "E4M3", "E2M1")
"""The formats that are tried on each operand where nothing is said, from fine to coarse."""
BATCHES = 8
"""Batches whose mean gradient tells what one format everywhere does."""

_OPTION = {"input": "activation", "weight": "weight", "grad_output": "grad"}


@dataclass(frozen=True)
class Sensitivity:
    """Damage of one operand by format.

    measured: (noise, damage) of each format that was tried. Elsewhere log damage is a line in log noise, its slope held
    within 0.5 .. 1.5.
    """

    measured: Mapping[str, tuple[float, float]]

    @cached_property
    def _line(self) -> tuple[float, float, float] | None:
        """(slope, log noise and log damage of a point on the line); None where no format did damage."""
        known = [(math.log(n), math.log(d)) for n, d in self.measured.values() if n > 0 and d > 0]
        if not known:
            return None
        x, y = (np.array(side) for side in zip(*known, strict=True))
        spread = float(((x - x.mean()) ** 2).sum())
        slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 1e-4 else 1.0
        return min(1.5, max(0.5, slope)), float(x.mean()), float(y.mean())

    def damage(self, fmt: str, noise: float) -> float:
        """Damage in a format that puts this noise on the operand.

        As measured where the format was tried; else by its noise, 0 without noise or where no format did damage. A tensor
        that is all error does no more than lose itself: noise counts up to 1.
        """
        if fmt in self.measured:
            return self.measured[fmt][1]
        if noise <= 0 or self._line is None:
            return 0.0
        slope, x, y = self._line
        return math.exp(y + slope * (math.log(min(noise, 1.0)) - x))


@dataclass(frozen=True)
class Attribution:
    """Sensitivity by (layer, role); completeness: damage of all in one of the formats together / the sum for each alone."""

    cells: Mapping[tuple[str, str], Sensitivity]
    completeness: float


def attribute(
    loop: Loop, trace: Trace, formats: Sequence[str] = REFERENCES, *, tell: Tell | None = None
) -> Attribution:
    """One-step attribution at the loop's present state, on its next batch; the loop is left where it was.

    Args:
        formats: tried on each operand; where one cannot be (`Trace.refusal`) it is left out there.

    Raises:
        ConfigError: the gradient in float32 is zero or not finite.
    """
    exact = exact_gradient(loop)
    found: dict[tuple[str, str], Sensitivity] = {}
    cells = trace.cells
    for i, (layer, role) in enumerate(cells):
        found[layer, role] = Sensitivity(
            {
                fmt: (
                    trace.predict(layer, role, fmt).noise,
                    damage_of(loop, one_operand(layer, role, fmt), exact),
                )
                for fmt in formats
                if trace.refusal(layer, role, fmt) is None
            }
        )
        if tell is not None:
            tell("one-step attribution", i + 1, len(cells))
    middle = formats[len(formats) // 2]
    tried = [cell for cell in cells if middle in found[cell].measured]
    alone = sum(found[cell].measured[middle][1] for cell in tried)
    together = damage_of(loop, recipe_from(dict.fromkeys(tried, middle), trace), exact)
    return Attribution(found, together / alone if alone > 0 else math.nan)


def everywhere(
    loop: Loop, trace: Trace, formats: Sequence[str], batches: int = BATCHES, *, tell: Tell | None = None
) -> dict[str, float]:
    """What one format for every operand that was traced does to the mean gradient of the next batches, by format.

    Damage as above, of the mean gradients; 1e6 where it is not finite. The loop is left where it was.

    Raises:
        ConfigError: the mean gradient in float32 is zero or not finite.
    """
    exact = exact_gradient(loop, batches)
    found: dict[str, float] = {}
    for i, fmt in enumerate(formats):
        found[fmt] = damage_of(loop, recipe_from(dict.fromkeys(trace.cells, fmt), trace), exact, batches)
        if tell is not None:
            tell("one format everywhere", i + 1, len(formats))
    return found


def exact_gradient(loop: Loop, batches: int = 1) -> torch.Tensor:
    """Mean gradient of the next batches without low precision, float64.

    Raises:
        ConfigError: it is zero or not finite.
    """
    exact = _mean_gradient(loop, batches)
    size = float(exact.square().sum())
    if not 0 < size < math.inf:
        raise ConfigError(f"the float32 gradient's squared norm is {size}; there is no damage to measure against it")
    return exact


def damage_of(loop: Loop, recipe: Recipe, exact: torch.Tensor, batches: int = 1) -> float:
    """Damage of a recipe against the exact mean gradient of the next batches; 1e6 where the gradient is not finite.

    Raises:
        ConfigError: the loop's gradients are not those in the parameters' `grad`.
    """
    with quantized(loop, recipe):
        low = _mean_gradient(loop, batches)
    sizes = [p.numel() for p in loop.model.parameters() if p.grad is not None]
    if not len(low) == len(exact) == sum(sizes):
        raise ConfigError(
            f"the loop's gradient has {len(exact)} values in float32, {len(low)} in low precision, and its parameters' grad "
            f"{sum(sizes)}; gradient() must leave the same gradients in the parameters' grad each time"
        )
    error = 0.0
    for one, true in zip(low.split(sizes), exact.split(sizes), strict=True):
        size = float(true @ true)
        along = float(one @ true) / size if size > 0 else 0.0
        error += float((one - along * true).square().sum()) + max(0.0, 1 - 2 * along) ** 2 * size
    error /= float(exact.square().sum())
    return error if math.isfinite(error) else 1e6


def _mean_gradient(loop: Loop, batches: int) -> torch.Tensor:
    total = loop.gradient()[1].double()
    for ahead in range(1, batches):
        total += loop.gradient(ahead)[1].double()
    return total / batches


def one_operand(layer: str, role: str, fmt: str) -> Recipe:
    """One operand of one layer in a format, in both of its products; everything else in full precision."""
    return Recipe(None, (Override(layer_of({role: fmt}), name=layer),))


def layer_of(formats: Mapping[str, str | None], **options) -> LayerRecipe:
    """A layer's recipe from formats by role; roles without one stay in full precision."""
    return layer_recipe(None, **{_OPTION[role]: formats.get(role) for role in _OPTION}, **options)


def recipe_from(
    choice: Mapping[tuple[str, str], str | None], trace: Trace, storage: Mapping[str, object] | None = None
) -> Recipe:
    """The recipe of a choice of formats by (layer, role): what most layers have is the default, others are overrides.

    Layers that the trace did not see stay in full precision. storage: a `StorageSpec` by layer, for weights on a grid.
    """
    made: dict[str, LayerRecipe | None] = {}
    for name, one in trace.layers.items():
        formats = {role: choice.get((name, role)) for role in one.roles}
        stored = (storage or {}).get(name)
        if all(_high(fmt) for fmt in formats.values()) and stored is None:
            made[name] = None
            continue
        made[name] = layer_of(formats, **({} if stored is None else {"storage": stored}))
    for name in trace.untraced:
        if not name.endswith(ATTENTION_NAME):  # which a recipe reaches only where it says so
            made.setdefault(name, None)
    whole = [made[name] for name, one in trace.layers.items() if len(one.roles) > 1] or list(made.values())
    default = max(whole, key=lambda one: (whole.count(one), one is not None))
    overrides = tuple(
        Override(one, name=name)
        for name, one in made.items()
        if one != default and not (name in trace.layers and _same_weight(trace.layers[name].roles, one, default))
    )
    return Recipe(default, overrides)


def _same_weight(roles: Sequence[str], one: LayerRecipe | None, default: LayerRecipe | None) -> bool:
    """Whether a layer that has a weight alone, an embedding, needs no override."""
    if len(roles) > 1 or one is None or default is None:
        return False
    return one.forward.weight == default.forward.weight and one.storage == default.storage


def _high(fmt: str | None) -> bool:
    return fmt is None or fmt == "FP32"
