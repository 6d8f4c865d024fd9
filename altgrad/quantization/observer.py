"""The protocol by which quantized layers publish what they measure, so that they need not know who listens."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from altgrad.formats.rounding import Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.stats import QuantStats


class Observer(Protocol):
    """Listener of quantized layers; tensors are valid only during the call, and nothing is synced."""

    def observe(
        self, *, layer: str, role: str, gemm: str, stats: QuantStats, scale: Tensor | float, fmt: FloatFormat
    ) -> None:
        """One operand was quantized in training.

        Called once for each distinct quantization of a tensor, not again when activation checkpointing recomputes it.

        Args:
            layer: the layer's qualified name.
            role: "input", "weight" or "grad_output".
            gemm: "forward", "input_grad" or "weight_grad": the first GEMM that uses the result.
            scale: the multiplier that dequantizes (1.0 for block formats, which have their own).
            fmt: the format (scalar or block).
        """
        ...

    def observe_update(
        self,
        *,
        layer: str,
        parameter: Parameter,
        before: Tensor,
        attempted: Tensor,
        after: Tensor,
        scale: Tensor,
        fmt: FloatFormat,
        rounding: Rounding,
    ) -> None:
        """An optimizer step on a weight that lives on a grid, before `after` is written to the parameter.

        Args:
            before: the weight at the start of the step; attempted: what the optimizer wrote; after: `attempted` rounded
                back to the grid. All of the parameter's shape and dtype.
        """
        ...
