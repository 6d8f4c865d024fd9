"""Quantized products as functions under a recipe, for code that has no layer to swap.

They keep no state between calls: delayed scaling and grid storage belong to layers, and stochastic rounding takes its
key as an argument.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from altgrad.errors import RandomKeyError, RecipeError
from altgrad.formats.rounding import Rounding
from altgrad.nn.layer.attention import AttentionStates, attention_forward
from altgrad.nn.layer.batched import grouped_forward
from altgrad.nn.layer.contractions import LINEAR_REDUCED, MATMUL_REDUCED, Matrices
from altgrad.nn.layer.gemms import multiply
from altgrad.nn.layer.linear import linear_forward
from altgrad.nn.layer.state import LayerState
from altgrad.nn.recipe.layer_recipe import LayerRecipe, layer_recipe
from altgrad.nn.recipe.scaling_choice import DelayedScaling
from altgrad.nn.session import Session
from altgrad.quantization.inverse_scaling import RegionScaling

_MATMUL = Matrices(transposed=True)  # the other factor is [..., in, out]


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
    return multiply(_state(recipe, key, matmul=True), _MATMUL, input, other, None, training=False)


def grouped_mm(
    input: Tensor, weight: Tensor, offsets: Tensor, *, recipe: LayerRecipe | str, key: tuple[int, int] | None = None
) -> Tensor:
    """The groups of a mixture of experts: rows of input that end at offsets[i] times weight[i], each pair by itself.

    Args:
        input: [s, k], sorted by group. weight: [e, k, n]. offsets: int [e], the end of each group's rows; rows behind the
            last give zeros. A group may be empty.
        recipe, key: as for `linear`; each group is quantized with scales of its own.

    Raises:
        RecipeError, RandomKeyError: as `linear`. OptionError: offsets that are none.
    """
    state = _state(recipe, key, matmul=False)
    return grouped_forward(state, input, weight.transpose(-2, -1), offsets, training=False)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    recipe: LayerRecipe | str,
    random_key: tuple[int, int] | None = None,
) -> Tensor:
    """As torch's, with quantized scores Q(query) Q(key)^T and values Q(p) Q(value); the softmax p is unquantized before.

    Args:
        recipe: as for `matmul`, for both products. random_key: (seed, stream) of stochastic rounding.

    Raises:
        RecipeError, RandomKeyError: as `matmul`.
    """
    scores = _state(recipe, random_key, matmul=True, name="random_key")
    values = scores if random_key is None else _state(recipe, (random_key[0], random_key[1] + 1), matmul=True)
    states = AttentionStates(scores, values)
    return attention_forward(
        states, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, training=False
    )


def _state(recipe: LayerRecipe | str, key, *, matmul: bool, name: str = "key") -> LayerState:
    recipe = layer_recipe(recipe) if isinstance(recipe, str) else recipe
    if not (recipe.mixes_at_random or any(spec.rounding is Rounding.STOCHASTIC for _, _, spec in recipe.entries())):
        return _stateless(recipe, matmul)
    if key is None:
        raise RandomKeyError(f"a functional product with random bits needs {name}=(seed, stream), two integers")
    state = _stateless.__wrapped__(recipe, matmul)
    state.session.seed = int(key[0])
    state.session.set_clock(int(key[1]), 0)
    return state


@lru_cache(maxsize=256)
def _stateless(recipe: LayerRecipe, matmul: bool) -> LayerState:
    scalings = [spec.scaling for _, _, spec in recipe.entries()]
    if recipe.storage is not None or any(isinstance(s, DelayedScaling | RegionScaling) for s in scalings):
        raise RecipeError(
            "delayed scaling and grid storage remember something between calls, which a function cannot; "
            "use current amax and master storage, or quantize_model"
        )
    if matmul and any(getattr(s, "axis", None) is not None for s in scalings):
        raise RecipeError("matmul takes one scale per tensor or a block format; drop the scaling's axis")
    name = "functional.matmul" if matmul else "functional.linear"
    return LayerState(recipe, Session(), name, reduced=MATMUL_REDUCED if matmul else LINEAR_REDUCED)
