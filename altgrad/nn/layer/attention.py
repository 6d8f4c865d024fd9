"""Attention with quantized products: scores Q(q) Q(k)^T and values Q(p) Q(v), the softmax between them unquantized.

Each product is one of a layer: q and p are its inputs, k and v its weights, quantized as whole tensors (batch and heads
included) or in blocks along the axis that each product reduces.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from altgrad.nn.layer.contractions import MATMUL_REDUCED, Matrices
from altgrad.nn.layer.gemms import multiply
from altgrad.nn.layer.state import LayerState
from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.nn.session import Session

_MATMUL = Matrices(transposed=True)


class AttentionStates(NamedTuple):
    """The two products of one attention."""

    scores: LayerState
    values: LayerState


def attention_states(recipe: LayerRecipe, session: Session, name: str) -> AttentionStates:
    """The states of an attention's products, which take the same recipe."""
    scores, values = (
        LayerState(recipe, session, f"{name}.{part}", reduced=MATMUL_REDUCED) for part in ("scores", "values")
    )
    return AttentionStates(scores, values)


def product_forward(state: LayerState, a: Tensor, b: Tensor, training: bool) -> Tensor:
    """a [..., m, k] @ b [..., k, n] of two activations."""
    return a @ b if state.is_plain(a, training) else multiply(state, _MATMUL, a, b, None, training)


def attention_forward(
    states: AttentionStates,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    training: bool,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`, with its two products quantized: [..., queries, dv]."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = product_forward(states.scores, query, key.transpose(-2, -1), training) * scale
    if is_causal:
        ones = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(~ones.tril(), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    p = torch._safe_softmax(scores, -1)  # as torch's: a row that may look nowhere is 0
    p = F.dropout(p, dropout_p, training=True).to(value.dtype)
    return product_forward(states.values, p, value, training)
