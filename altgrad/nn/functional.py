"""Quantized products as functions: `linear` and `matmul` under a recipe, for code that has no layer to swap.

They keep no state between calls: delayed scaling and grid storage belong to layers, and stochastic rounding takes its
key as an argument.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from altgrad.errors import RandomKeyError, RecipeError
from altgrad.formats.rounding import Rounding
from altgrad.nn.layer.linear import linear_forward, output_dtype
from altgrad.nn.layer.products import product, ready_and_saved, restored, stash, unstash
from altgrad.nn.layer.state import LINEAR_REDUCED, LayerState
from altgrad.nn.recipe.layer_recipe import layer_recipe
from altgrad.nn.recipe.scaling_choice import DelayedScaling
from altgrad.nn.recipe.spec import LayerRecipe
from altgrad.nn.session import Session

MATMUL_REDUCED = {  # a [..., m, k] is the input, b [..., k, n] the weight, dy [..., m, n]
    ("forward", "input"): -1,
    ("forward", "weight"): -2,
    ("input_grad", "grad_output"): -1,
    ("input_grad", "weight"): -1,
    ("weight_grad", "grad_output"): -2,
    ("weight_grad", "input"): -2,
}


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: LayerRecipe | str,
    key: tuple[int, int] | None = None,
) -> Tensor:
    """input @ weight^T + bias, each of the three GEMMs on the operands that the recipe names.

    Args:
        input: [..., in]. weight: [out, in]. bias: [out] or None.
        recipe: a layer's recipe, or a format name for `layer_recipe(name)`.
        key: (seed, stream) of stochastic rounding; each operand draws from a stream of its own made from it.

    Raises:
        RecipeError: the recipe needs state (delayed scaling, grid storage); use `quantize_model`.
        RandomKeyError: stochastic rounding without a key.
    """
    return linear_forward(_state(recipe, key, matmul=False), input, weight, bias, training=False)


def matmul(input: Tensor, other: Tensor, *, recipe: LayerRecipe | str, key: tuple[int, int] | None = None) -> Tensor:
    """input @ other for matrices with broadcasting batch axes, under the recipe's input and weight operands.

    Args:
        input: [..., m, k]. other: [..., k, n], quantized as the recipe's weight.
        recipe, key: as for `linear`. Scales are per tensor (the batch included), or those of a block format, whose
            blocks run along the axis that each GEMM reduces.

    Raises:
        RecipeError: the recipe needs state, or its scales are per channel.
        RandomKeyError: stochastic rounding without a key.
    """
    state = _state(recipe, key, matmul=True)
    sa, sa_back = state.scale_pair(state.x, state.x_back, input, False)
    sb, sb_back = state.scale_pair(state.w, state.w_back, other, False)
    return _Matmul.apply(input, other, sa, sa_back, sb, sb_back, state, output_dtype(input, other))


def _state(recipe: LayerRecipe | str, key, *, matmul: bool) -> LayerState:
    recipe = layer_recipe(recipe) if isinstance(recipe, str) else recipe
    if not any(spec.rounding is Rounding.STOCHASTIC for _, _, spec in recipe.entries()):
        return _stateless(recipe, matmul)
    if key is None:
        raise RandomKeyError("stochastic rounding in a functional product needs key=(seed, stream), two integers")
    state = _stateless.__wrapped__(recipe, matmul)
    state.session.seed = int(key[0])
    state.session.set_clock(int(key[1]), 0)
    return state


@lru_cache(maxsize=256)
def _stateless(recipe: LayerRecipe, matmul: bool) -> LayerState:
    scalings = [spec.scaling for _, _, spec in recipe.entries()]
    if recipe.storage is not None or any(isinstance(s, DelayedScaling) for s in scalings):
        raise RecipeError(
            "delayed scaling and grid storage remember something between calls, which a function cannot; "
            "use current amax and master storage, or quantize_model"
        )
    if matmul and any(getattr(s, "axis", None) is not None for s in scalings):
        raise RecipeError("matmul takes one scale per tensor or a block format; drop the scaling's axis")
    name = "functional.matmul" if matmul else "functional.linear"
    return LayerState(recipe, Session(), name, reduced=MATMUL_REDUCED if matmul else LINEAR_REDUCED)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, sa, sa_back, sb, sb_back, state: LayerState, dtype: torch.dtype):
        need_a, need_b = ctx.needs_input_grad[:2]
        work = torch.float64 if a.dtype == torch.float64 else torch.float32
        route = state.route("forward", (a.shape[-2], b.shape[-1], a.shape[-1]), a.device, work)
        keep_a, keep_b = need_b and state.x_back is state.x, need_a and state.w_back is state.w
        qa, saved_a = ready_and_saved(state.x, a, sa, state.x.options(), route, False, keep=keep_a)
        qb, saved_b = ready_and_saved(state.w, b, sb, state.w.options(), route, False, keep=keep_b)
        y = product(qa, qb, route).to(dtype)
        if need_b and not keep_a:
            saved_a = state.x_back.save(a, sa_back, state.x_back.options())
        if need_a and not keep_b:
            saved_b = state.w_back.save(b, sb_back, state.w_back.options())
        mask_a = state.x.saturated(a, sa) if need_a else None
        mask_b = state.w.saturated(b, sb) if need_b else None
        stash(
            ctx,
            a=saved_a,
            b=saved_b,
            sa=sa if keep_a else sa_back,
            sb=sb if keep_b else sb_back,
            mask_a=mask_a,
            mask_b=mask_b,
        )
        ctx.state, ctx.like = state, ((a.shape, a.dtype), (b.shape, b.dtype))
        ctx.dy_options = (state.dy.options(), state.dy_back.options())
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        state, kept = ctx.state, unstash(ctx)
        (shape_a, dtype_a), (shape_b, dtype_b) = ctx.like
        work = torch.float64 if dy.dtype == torch.float64 else torch.float32
        da = db = None
        m, n, k = dy.shape[-2], dy.shape[-1], shape_a[-1]
        if ctx.needs_input_grad[0]:
            route = state.route("input_grad", (m, k, n), dy.device, work)
            scale = state.dy.scale_of(dy, False)
            qdy, _ = ready_and_saved(state.dy, dy, scale, ctx.dy_options[0], route, False, keep=False)
            da = product(qdy, restored(state.w_back, kept["b"], kept["sb"], route, work).t(), route)
            da = _reduced(da, shape_a, kept["mask_a"]).to(dtype_a)
        if ctx.needs_input_grad[1]:
            route = state.route("weight_grad", (k, n, m), dy.device, work)
            scale = state.dy_back.scale_of(dy, False)
            qdy, _ = ready_and_saved(state.dy_back, dy, scale, ctx.dy_options[1], route, False, keep=False)
            db = product(restored(state.x_back, kept["a"], kept["sa"], route, work).t(), qdy, route)
            db = _reduced(db, shape_b, kept["mask_b"]).to(dtype_b)
        return da, db, None, None, None, None, None, None


def _reduced(grad: Tensor, shape: torch.Size, mask: Tensor | None) -> Tensor:
    """The gradient summed over broadcast batch axes, masked."""
    grad = grad.sum_to_size(shape)
    return grad if mask is None else grad * mask
