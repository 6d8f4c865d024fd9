"""A short float32 trace: spectra of every operand, weights with the updates they met, gradients of a few coordinates.

Everything that `advise` predicts for a format follows from these; nothing in a trace depends on any format.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from altgrad.errors import ConfigError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.spectrum import Block, Prediction, Spectrum
from altgrad.loop.loop import Loop
from altgrad.monitor.spectra import SpectrumWatch
from altgrad.nn import places
from altgrad.records.metrics import OPERANDS

HOOKED = ("linear", "conv", "conv_transpose")
STEPS, MEASURED = 60, 6
"""Steps of a trace, and how many of them are measured, where nothing is said."""

Tell = Callable[[str, int, int], None]
"""Called with (what is done, done, of how many)."""


@dataclass(frozen=True)
class Layer:
    """A layer that a recipe can quantize.

    name: qualified name. kind: linear, conv, ... or embedding. shape: of its weight. shares: the layer that it shares its
    weight with, its own name where with none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    shares: str

    @property
    def roles(self) -> tuple[str, ...]:
        """The operands that a recipe can quantize."""
        return OPERANDS if self.kind in HOOKED else ("weight",)


@dataclass(frozen=True)
class Snapshot:
    """A weight and the update that it met, kept whole."""

    step: int
    layer: str
    before: Tensor
    update: Tensor


@dataclass
class Trace:
    """What was seen.

    layers: in the model's order. untraced: other places that a recipe could quantize, with the reason.
    operands: a spectrum for each measured step, by (layer, role). weights, updates: the same by layer.
    snapshots: of some steps. steps, lrs: the measured steps and their learning rates; schedule: of the run planned.
    noise_floor: rms of Adam's update over lr where gradients are noise; None for other optimizers.
    coordinates: gradients of some coordinates of each layer's weight at every step, float32 [steps, n].
    """

    layers: dict[str, Layer]
    operands: dict[tuple[str, str], list[Spectrum]]
    untraced: dict[str, str] = field(default_factory=dict)
    weights: dict[str, list[Spectrum]] = field(default_factory=dict)
    updates: dict[str, list[Spectrum]] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    schedule: tuple[float, ...] = ()
    noise_floor: float | None = None
    coordinates: dict[str, np.ndarray] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    blocks: tuple[Block, ...] = ()

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(layer, role) of every operand that was seen, in the model's order."""
        return [
            (name, role) for name, one in self.layers.items() for role in one.roles if (name, role) in self.operands
        ]

    def values(self, layer: str, role: str) -> int:
        """Elements of the operand in a step."""
        return self.operands[layer, role][-1].count

    def refusal(self, layer: str, role: str, fmt: str) -> str | None:
        """Why nothing can be said of a format on this operand; None where something can."""
        form = get_format(fmt)
        if not isinstance(form, BlockFormat):
            return None
        if self.layers[layer].kind in HOOKED and self.layers[layer].kind != "linear" and role != "weight":
            return "blocks of a convolution's unfolded input are not traced"
        if form.block not in self.operands[layer, role][-1].blocks:
            return f"blocks of {form.block} were not traced"
        return None

    def predict(self, layer: str, role: str, fmt: str, last: int | None = None) -> Prediction:
        """What a format does to the operand under each step's own scale: the mean over the measured steps.

        Args:
            last: only so many of the last measured steps.
        """
        kept = self.operands[layer, role][-last:] if last else self.operands[layer, role]
        return _mean([spectrum.predict(fmt) for spectrum in kept])


def _mean(found: Sequence[Prediction]) -> Prediction:
    """The mean of noise and rates; NaN where nothing but zeros was seen."""
    known = [one for one in found if not np.isnan(one.sqnr_db)]
    if not known:
        return found[-1]
    noise = float(np.mean([one.noise for one in known]))
    mean = {
        name: float(np.mean([getattr(one, name) for one in known]))
        for name in ("overflow", "underflow", "spread_db", "saturation", "flushed")
    }
    return Prediction(float("inf") if noise == 0 else -10 * float(np.log10(noise)), **mean)


def layers_of(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that a trace sees, and the other places of a recipe with why it does not.

    Raises:
        ConfigError: the model is quantized, or there is nothing that a recipe could quantize.
    """
    from altgrad.nn.layer.classes import is_quantized

    if any(is_quantized(module) for module in model.modules()):
        raise ConfigError("the model is quantized; advice starts from float32, so restore_model(model) first")
    modules = dict(model.named_modules())
    found: dict[str, Layer] = {}
    untraced: dict[str, str] = {}
    owner: dict[int, str] = {}
    for place in places(model):
        weight: Any = getattr(modules.get(place.name), "weight", None)
        if place.kind not in (*HOOKED, "embedding") or not isinstance(weight, Tensor):
            if place.kind == "raw":
                untraced[place.name] = "multiplied by function calls, which no hook sees"
            continue
        shares = owner.setdefault(id(weight), place.name)
        found[place.name] = Layer(place.name, place.kind, tuple(weight.shape), shares)
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linear layer, convolution or embedding to advise on")
    return found, untraced


def take_trace(
    loop: Loop,
    steps: int = STEPS,
    *,
    measured: int = MEASURED,
    schedule: Sequence[float] = (),
    blocks: Sequence[Block] = (),
    coordinates: int = 512,
    keep_bytes: int = 256 * 2**20,
    tell: Tell | None = None,
) -> Trace:
    """Take `steps` float32 steps and return what they showed; the loop is left after them.

    Args:
        measured: steps of them, evenly spread, whose tensors are counted.
        schedule: learning rate of each step of the whole run that is planned; empty: the loop's own `schedule`, where it
            has one, as a `PlainLoop` has, else it is not known.
        blocks: block sizes along the last axis, for block formats.
        coordinates: of each layer's weight whose gradients are kept at every step.
        keep_bytes: for weights and updates kept whole, of the last measured step and the middle one.

    Raises:
        ConfigError: no step, a quantized model, or a loss that is not finite.
    """
    if steps < 1 or measured < 1:
        raise ConfigError(f"a trace of {steps} steps, {measured} measured: take at least one of each")
    layers, untraced = layers_of(loop.model)
    every = max(1, -(-steps // measured))
    last = 1 + (steps - 1) // every * every
    whole = {last, 1 + (last - 1) // every // 2 * every}
    modules = dict(loop.model.named_modules())
    weights = {name: modules[name].weight for name, one in layers.items() if one.shares == name}
    room = [keep_bytes]
    trace = Trace(layers, {}, untraced, schedule=tuple(schedule or getattr(loop, "schedule", ())), blocks=tuple(blocks))
    if (betas := loop.optimizer.param_groups[0].get("betas")) is not None:
        trace.noise_floor = math.sqrt((1 - betas[0]) / (1 + betas[0]))

    def seen(layer: str, before: Tensor, after: Tensor) -> None:
        size = 8 * before.numel()
        if watch.step in whole and room[0] >= size:
            room[0] -= size
            trace.snapshots.append(Snapshot(watch.step, layer, before, (after - before).detach()))

    picks = {name: _spread(w.numel(), coordinates) for name, w in weights.items()}
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in weights}
    started = time.perf_counter()
    watch = SpectrumWatch(loop.model, loop.optimizer, layers=weights, every=every, blocks=blocks, seen=seen)
    try:
        for step in range(1, steps + 1):
            loss = loop.advance()
            if loss != loss:
                raise ConfigError(
                    f"the loss of step {step} is not finite in float32; mend that before choosing formats"
                )
            trace.losses.append(loss)
            if step in watch.steps:
                trace.lrs.append(float(loop.optimizer.param_groups[0]["lr"]))
            for name, weight in weights.items():
                if weight.grad is not None and not weight.grad.is_sparse:
                    gradients[name].append(weight.grad.detach().reshape(-1)[picks[name]].float().cpu().numpy())
            if tell is not None:
                tell("float32 trace", step, steps)
    finally:
        watch.close()
    trace.operands, trace.weights, trace.updates = watch.operands, watch.weights, watch.updates
    for name, one in layers.items():
        if one.kind == "embedding":
            trace.operands[name, "weight"] = watch.weights.get(one.shares, [])
        elif (name, "input") not in trace.operands:
            trace.untraced[name] = "its forward did not run in the trace"
    trace.steps = watch.steps
    trace.coordinates = {name: np.stack(rows) for name, rows in gradients.items() if len(rows) == steps}
    trace.seconds = time.perf_counter() - started
    return trace


def _spread(count: int, wanted: int) -> Tensor:
    """Indices evenly spread over `count` elements."""
    return torch.linspace(0, count - 1, min(count, wanted)).long()
