"""The quantized linear layer: y = x w^T + b over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from altgrad.nn.layer.contractions import Matrices
from altgrad.nn.layer.gemms import multiply
from altgrad.nn.layer.state import LayerState

_PLAIN, _TRANSPOSED = Matrices(), Matrices(transposed=True)


def linear_forward(state: LayerState, x: Tensor, w: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """The layer's forward: x [..., in], w [out, in] (or [in, out] where the state says so).

    bias: [out], or what else torch broadcasts to the result.
    """
    if state.is_plain(x, training):
        return F.linear(x, w.t() if state.transposed else w, bias)
    products = _TRANSPOSED if state.transposed else _PLAIN
    outputs = w.shape[1 if state.transposed else 0]
    apart = bias is not None and not torch.jit.is_tracing() and bias.shape != (outputs,)
    y = multiply(state, products, x, w, None if apart else bias, training, rows=True)
    return y + bias.to(y.dtype) if bias is not None and apart else y
