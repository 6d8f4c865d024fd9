"""Which updates a stored weight's grid swallows: exactly where weights and updates were kept, else from their spectra.

Beyond the trace the spectra are scaled, step by step of the planned schedule, by three laws of a float32 run:

    updates follow the learning rate                                  d(t) = lr(t) r(t)
    Adam's r = rms(d) / lr falls to what noise alone gives            r(t) = f + (r(T) - f) (S(T) / S(t))^2
    weights walk at random                                            rms(w)^2 = w0^2 + (w(T)^2 - w0^2) S(t) / S(T)

with S the sum of learning rates so far, T a measured step, w0 the first measured weights, and f = sqrt((1 - beta1) /
(1 + beta1)), the rms of Adam's update for gradients that are pure noise. Optimizers without betas keep r(T).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from altgrad.advise.trace import Snapshot, Trace
from altgrad.errors import ConfigError
from altgrad.formats.rounding import Rounding
from altgrad.formats.spectrum import STORAGES
from altgrad.quantization import amax_scale, get_format, grid_index, quantize
from altgrad.randomness import seed_of

_POINTS = 9  # beyond the trace at which stall is computed; between them it is interpolated
_LAST = 2  # measured steps whose spectra are scaled


def exact_stall(snapshot: Snapshot, fmt: str, storage: str, factor: float = 1.0) -> float:
    """Fraction of a kept weight's nonzero updates that leave its code, coordinate by coordinate; NaN without any update.

    Args:
        storage: nearest, stochastic (a stored weight on the grid) or master (a float32 weight, quantized at use).
        factor: multiplies every update.
    """
    form = get_format(fmt)
    scale = 1.0 if form.emax >= 127 else amax_scale(snapshot.before, form, power_of_two=storage != "master")
    update = snapshot.update * factor
    tried = update != 0
    if not bool(tried.any()):
        return float("nan")
    start = snapshot.before if storage == "master" else quantize(snapshot.before, form, scale, overflow="saturate")
    rounding = Rounding.STOCHASTIC if storage == "stochastic" else Rounding.NEAREST_EVEN
    key = (snapshot.step, seed_of(snapshot.layer)) if storage == "stochastic" else None
    landed = quantize(start + update, form, scale, rounding=rounding, overflow="saturate", key=key)
    before = quantize(start, form, scale, overflow="saturate")
    same = grid_index(landed, form, scale) == grid_index(before, form, scale)
    return float((same & tried).sum() / tried.sum())


def predicted_stall(trace: Trace, layer: str, fmt: str, storage: str, step: int | None = None) -> float:
    """The same for a layer from spectra, at a step of the planned schedule; None: at the trace's last measured steps.

    Raises:
        ConfigError: the trace saw no update of the layer, or has no schedule that reaches the step.
    """
    owner = trace.layers[layer].shares
    if owner not in trace.updates:
        raise ConfigError(f"the trace saw no update of {layer!r}; a checkpoint's weights alone do not tell what stalls")
    if step is not None and not 1 <= step <= len(trace.schedule):
        raise ConfigError(f"step {step} is outside 1..{len(trace.schedule)}, the schedule that the trace was told")
    found = [_at(trace, owner, fmt, storage, i, step) for i in range(len(trace.steps))[-_LAST:]]
    return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")


def _at(trace: Trace, owner: str, fmt: str, storage: str, i: int, step: int | None) -> float:
    """Stall by the spectra of measured step number i, scaled to another step."""
    weights, updates = trace.weights[owner][i], trace.updates[owner][i]
    form = get_format(fmt)
    factor, growth = (1.0, 1.0) if step is None else _scaled(trace, owner, i, step)
    if form.emax >= 127:
        return weights.stall(updates, form, 1.0, storage, factor=factor)
    grown = replace(weights, amax=weights.amax * growth)
    scale = grown.scale_for(form, power_of_two=storage != "master") / growth
    return weights.stall(updates, form, scale, storage, factor=factor / growth)


def _scaled(trace: Trace, owner: str, i: int, step: int) -> tuple[float, float]:
    """(factor of the updates, factor of the weights) from measured step number i to another step."""
    walked = np.cumsum(trace.schedule)
    then, now = walked[trace.steps[i] - 1], walked[step - 1]
    lr = trace.lrs[i]
    if lr <= 0 or then <= 0:
        return 1.0, 1.0
    factor = trace.schedule[step - 1] / lr
    r, floor = trace.updates[owner][i].rms / lr, trace.noise_floor
    if floor is not None and r > floor:
        factor *= (floor + (r - floor) * min(1.0, then / now) ** 2) / r
    first, last = trace.weights[owner][0].rms ** 2, trace.weights[owner][i].rms ** 2
    if last <= 0 or last <= first:
        return float(factor), 1.0
    return float(factor), math.sqrt((first + (last - first) * now / then) / last)


def stall_over(trace: Trace, layers: Sequence[str], fmt: str, storage: str) -> np.ndarray:
    """Predicted stall at each step of the planned schedule, over all updates of these layers together; without a
    schedule at each measured step. NaN where no update was seen.

    Steps of the trace show their own stall, later ones that of the laws above.
    """
    owners = [name for name in dict.fromkeys(trace.layers[name].shares for name in layers) if name in trace.updates]
    count = len(trace.schedule)
    beyond = (
        np.unique(np.linspace(trace.steps[-1], count, _POINTS + 1).astype(int)[1:]) if count > trace.steps[-1] else []
    )
    points = [*trace.steps, *beyond]
    total, weight = np.zeros(len(points)), np.zeros(len(points))
    for owner in owners:
        n = trace.updates[owner][-1].nonzero
        curve = [_at(trace, owner, fmt, storage, i, None) for i in range(len(trace.steps))]
        curve += [predicted_stall(trace, owner, fmt, storage, int(step)) for step in beyond]
        known = ~np.isnan(curve)
        total, weight = total + np.where(known, n * np.nan_to_num(curve), 0), weight + n * known
    with np.errstate(invalid="ignore"):
        mean = total / weight
    return np.interp(np.arange(1, count + 1), points, mean) if count else mean


def freeze_step(curve: np.ndarray, threshold: float = 0.95, after: int = 0) -> int | None:
    """The first step (1, 2, ...) from which on the stall stays at or above the threshold to the end; None if never."""
    above = np.asarray(curve) >= threshold
    above[:after] = False
    if not above[-1]:
        return None
    below = np.flatnonzero(~above)
    return int(below[-1]) + 2 if len(below) else 1


def stall_error(trace: Trace, formats: Sequence[str]) -> dict[str, float]:
    """How far the spectra's stall is from the exact one on the kept weights: mean absolute error by storage."""
    found: dict[str, list[float]] = {storage: [] for storage in STORAGES}
    for snapshot in trace.snapshots:
        at = trace.steps.index(snapshot.step)
        weights, updates = trace.weights[snapshot.layer][at], trace.updates[snapshot.layer][at]
        for fmt in formats:
            for storage in STORAGES:
                exact = exact_stall(snapshot, fmt, storage)
                if exact == exact:
                    found[storage].append(abs(weights.stall(updates, fmt, storage=storage) - exact))
    return {storage: float(np.mean(errors)) for storage, errors in found.items() if errors}


def moment_ratchet(
    gradients: np.ndarray,
    fmt: str,
    beta: float,
    steps: int,
    *,
    rounding: str = "nearest_even",
    seed: int = 0,
) -> np.ndarray:
    """How far a second moment in a format runs away from the one in float32: median of sqrt(v / v_float32) by step.

    v <- beta v + (1 - beta) g^2 is repeated for the traced coordinates, whose later gradients are drawn from the last half
    of the trace. Above 1 the updates shrink by that factor: nearest rounding lets v grow but not decay where
    1 - beta is below half a grid step.

    Args:
        gradients: float32 [steps, n], of one parameter.
        steps: to look ahead, the traced ones included.
        rounding: of the moment, nearest_even or stochastic.
    """
    form = get_format(fmt)
    draw = np.random.default_rng(seed)
    traced = torch.from_numpy(np.ascontiguousarray(gradients, dtype=np.float32))
    half = len(traced) // 2
    exact, low = torch.zeros(traced.shape[1]), torch.zeros(traced.shape[1])
    ratio = np.ones(steps)
    for step in range(steps):
        row = step if step < len(traced) else half + int(draw.integers(len(traced) - half))
        square = traced[row] ** 2
        exact = beta * exact + (1 - beta) * square
        low = beta * low + (1 - beta) * square
        scale = 1.0 if form.exponent_bits >= 8 else amax_scale(low, form, power_of_two=True)
        key = (seed, step) if rounding == "stochastic" else None
        low = quantize(low, form, scale, rounding=rounding, overflow="saturate", key=key)
        known = exact > 0
        if bool(known.any()):
            ratio[step] = float((low[known] / exact[known]).sqrt().median())
    return ratio
