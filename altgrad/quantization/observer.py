"""The protocol by which quantized layers publish what they measure, so that they need not know who listens."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.stats import QuantStats


class Observer(Protocol):
    """Listener of quantized layers; tensors are valid only during the call."""

    def observe(self, *, layer: str, role: str, stats: QuantStats, scale: Tensor | float, fmt: FloatFormat) -> None:
        """One operand was quantized: `role` is input, weight or grad_output of the layer of that qualified name."""
        ...
