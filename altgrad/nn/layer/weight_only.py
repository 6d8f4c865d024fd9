"""Layers whose weight alone is quantized at use: embeddings (by rows) and normalisations.

The gradient passes straight through. An embedding's rows are gathered first and then rounded under the scale of the
whole weight, which is the same as gathering from the rounded weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altgrad.nn.layer.operand import Operand, carrier
from altgrad.nn.layer.state import LayerState


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, operand: Operand, options: dict, observed: bool):
        mask = operand.saturated(w, scale)
        ctx.masked = mask is not None
        if mask is not None:
            ctx.save_for_backward(mask)
        values = operand.quantize_and_save(w, scale, options, observed)[0] if operand.block else None
        values = operand.quantize(w, scale, options, observed) if values is None else values
        return values.to(w.dtype) if values is not w else w.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return (grad * ctx.saved_tensors[0] if ctx.masked else grad), None, None, None, None


def quantized_weight(state: LayerState, operand: Operand, w: Tensor, scale, record: bool) -> Tensor:
    """w (or rows of it) on the operand's grid, in w's dtype, with the straight-through gradient."""
    if operand.fmt is None:
        return w
    return _StraightThrough.apply(w, scale, operand, operand.options(), state.observed(record))


def embedding_forward(state: LayerState, module: nn.Embedding, index: Tensor) -> Tensor:
    """The forward of an embedding: rows of the quantized weight. Stochastic rounding rounds the whole weight."""
    operand, w = state.w, module.weight
    rest = (module.padding_idx, None, 2.0, module.scale_grad_by_freq, module.sparse)
    if state.session.bypass or operand.fmt is None:
        return F.embedding(index, w, *rest)
    record = state.records(module.training)
    scale = operand.scale_of(w, record)
    per_row = isinstance(scale, Tensor) and scale.numel() > 1  # pyright: ignore[reportAttributeAccessIssue]
    if per_row or operand.stochastic:
        return F.embedding(index, quantized_weight(state, operand, w, scale, record), *rest)
    rows = F.embedding(index, w, *rest)
    return quantized_weight(state, operand, rows, scale, record)


def with_quantized_weight(state: LayerState, module: nn.Module, forward, *args, **kwargs):
    """Call `forward(*args)` of a normalisation while `module.weight` reads as its quantized value."""
    w, operand = module._parameters.get("weight"), state.norm
    if state.session.bypass or operand.fmt is None or w is None:
        return forward(*args, **kwargs)
    record = state.records(module.training)
    scale = operand.scale_of(carrier(w), record)
    module.__dict__["weight"] = quantized_weight(state, operand, w, scale, record)  # shadows the parameter
    try:
        return forward(*args, **kwargs)
    finally:
        del module.__dict__["weight"]
