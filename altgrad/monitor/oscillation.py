"""Oscillation: how far quantized weights walk for what the weights themselves walk.

R = sum |W_Q(t+1) - W_Q(t)| / sum |W(t+1) - W(t)| over a window of steps. Where a weight only drifts, its quantized value follows in
rare steps that add up to the same way, and R is near 1; where it hovers about the middle between two grid values its quantized
value jumps back and forth, a whole grid step each, and R is large. Source: Chen et al. 2025 (TetraJet), arXiv:2502.20853.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from altgrad.errors import OptionError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.nn.layer.classes import is_quantized
from altgrad.quantization import quantize

Quantizer = Callable[[Tensor], Tensor]


class Oscillation:
    """Counts R of weights, from step to step.

        counter = Oscillation(quantizers_of(model))
        for batch in window:
            ...                      # a training step
            counter.see()
        counter.ratios()             # name -> R

    Args:
        weights: name -> (weight, what its product gets of it). Weights are read where they are; two copies of each are kept.
    """

    def __init__(self, weights: Mapping[str, tuple[Tensor, Quantizer]]) -> None:
        if not weights:
            raise OptionError("no weight to watch; quantize the model first, or name weights with their quantizers")
        self._weights = dict(weights)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Begin a new window at the present weights."""
        self._last = {name: (w.detach().clone(), q(w.detach())) for name, (w, q) in self._weights.items()}
        self._walked = {name: torch.zeros_like(w, dtype=torch.float32) for name, (w, _) in self._weights.items()}
        self._jumped = {name: torch.zeros_like(w, dtype=torch.float32) for name, (w, _) in self._weights.items()}

    @torch.no_grad()
    def see(self) -> None:
        """After a step: add what each weight, and its quantized value, moved."""
        for name, (weight, quantizer) in self._weights.items():
            before, low = self._last[name]
            now, now_low = weight.detach().clone(), quantizer(weight.detach())
            self._walked[name] += (now - before).abs()
            self._jumped[name] += (now_low - low).abs()
            self._last[name] = now, now_low

    def elements(self, name: str) -> Tensor:
        """R of every element of one weight, float32 of its shape; NaN where it did not move at all."""
        return self._jumped[name] / self._walked[name].masked_fill(self._walked[name] == 0, torch.nan)

    def ratios(self) -> dict[str, float]:
        """R of each weight, sums over its elements; NaN for one that did not move."""
        return {name: _ratio(self._jumped[name].sum(), self._walked[name].sum()) for name in self._weights}

    def ratio(self) -> float:
        """R of all weights together."""
        jumped, walked = (sum(t.double().sum() for t in found.values()) for found in (self._jumped, self._walked))
        return _ratio(jumped, walked)


def _ratio(jumped: Tensor | int, walked: Tensor | int) -> float:
    return float(jumped) / float(walked) if float(walked) else math.nan


def quantizers_of(model: nn.Module) -> dict[str, tuple[Tensor, Quantizer]]:
    """Weights of a model's quantized layers with the cast that their forward product makes of them, for `Oscillation`.

    To nearest, under the current amax (blocks along the last axis); layers whose forward weight is in float32 are left out.
    """
    found: dict[str, tuple[Tensor, Quantizer]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not is_quantized(module) or not isinstance(weight, Tensor):
            continue
        spec = module.quantization.recipe.forward.weight  # type: ignore[union-attr]
        if spec is not None and spec.format is not None:
            found[name] = weight, _nearest(spec.format)
    return found


def _nearest(name: str) -> Quantizer:
    fmt = get_format(name)
    if isinstance(fmt, BlockFormat):
        return lambda x: quantize(x, fmt, pad=True)
    return lambda x: quantize(x, fmt, "amax", overflow="saturate")
