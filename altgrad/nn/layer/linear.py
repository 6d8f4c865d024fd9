"""The quantized linear layer: y = x w^T + b over the last axis."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from altgrad.nn.layer.contractions import Matrices
from altgrad.nn.layer.gemms import multiply
from altgrad.nn.layer.state import LayerState

_PLAIN, _TRANSPOSED = Matrices(), Matrices(transposed=True)


def linear_forward(state: LayerState, x: Tensor, w: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """The layer's forward: x [..., in], w [out, in] (or [in, out] where the state says so), bias [out]."""
    if state.is_plain(x, training):
        return F.linear(x, w.t() if state.transposed else w, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 would be ambiguous where there are no features
    y = multiply(state, _TRANSPOSED if state.transposed else _PLAIN, rows, w, bias, training)
    return y.view(*x.shape[:-1], y.shape[-1])
