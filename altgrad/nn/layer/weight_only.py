"""Layers whose weight alone is quantized at use: embeddings (by rows) and normalisations.

The gradient passes straight through. An embedding's rows are gathered first and then rounded under the scale of the
whole weight, which is the same as gathering from the rounded weight.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from altgrad.nn.layer.computed import reading_as
from altgrad.nn.layer.gemms import Quantizer, straight, transformed
from altgrad.nn.layer.operand import Operand
from altgrad.nn.layer.state import LayerState


def quantized_weight(state: LayerState, operand: Operand, w: Tensor, scale, training: bool) -> Tensor:
    """w (or rows of it) on the operand's grid, in w's dtype, with the straight-through gradient.

    scale: None finds it from w.
    """
    record, key = state.records(training), operand.key_of(state.use(training), w)
    return straight(Quantizer(operand, key, record, state.observed(record), scale), w).to(w.dtype)


def embedding_forward(state: LayerState, module: nn.Embedding, index: Tensor) -> Tensor:
    """The forward of an embedding: rows of the quantized weight. Stochastic rounding rounds the whole weight."""
    operand, w = state.w, module.weight
    rest = (module.padding_idx, None, 2.0, module.scale_grad_by_freq, module.sparse)
    if state.is_plain(w, module.training) or operand.fmt is None:
        return F.embedding(index, w, *rest)
    if transformed():
        return F.embedding(index, quantized_weight(state, operand, w, None, module.training), *rest)
    scale = operand.scale_of(w, state.records(module.training))
    per_row = isinstance(scale, Tensor) and scale.numel() > 1  # pyright: ignore[reportAttributeAccessIssue]
    if per_row or operand.stochastic:
        return F.embedding(index, quantized_weight(state, operand, w, scale, module.training), *rest)
    rows = F.embedding(index, w, *rest)
    return quantized_weight(state, operand, rows, scale, module.training)


def with_quantized_weight(state: LayerState, operand: Operand, module: nn.Module, forward, *args, **kwargs):
    """Call `forward(*args)` of a normalisation or a bag of embeddings while `module.weight` reads as its quantized value."""
    w = getattr(module, "weight", None)
    if w is None or state.is_plain(w, module.training) or operand.fmt is None:
        return forward(*args, **kwargs)
    with reading_as(module, "weight", quantized_weight(state, operand, w, None, module.training)):
        return forward(*args, **kwargs)
