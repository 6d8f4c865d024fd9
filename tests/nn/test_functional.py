"""The public `linear` and `matmul` against float64 formulas."""

import numpy as np
import pytest
import torch

from altgrad.errors import RandomKeyError, RecipeError
from altgrad.nn import GemmRecipe, LayerRecipe, OperandSpec, functional, layer_recipe
from altgrad.quantization import quantize
from tests.nn.oracle import close, on_grid

SIX = LayerRecipe(
    forward=GemmRecipe(input=OperandSpec("E4M3"), weight=OperandSpec("E3M4")),
    input_grad=GemmRecipe(grad_output=OperandSpec("E5M2"), weight=OperandSpec("E2M5")),
    weight_grad=GemmRecipe(grad_output=OperandSpec("E1M6"), input=OperandSpec("E0M7")),
)


def test_matmul_in_batches():
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, 5, 8, requires_grad=True), torch.randn(2, 8, 7, requires_grad=True)
    dy = torch.randn(3, 2, 5, 7)
    y = functional.matmul(a, b, recipe=SIX)
    y.backward(dy)
    aq, bq = on_grid(a, "E4M3"), on_grid(b, "E3M4")
    close(y, aq @ bq, np.abs(aq) @ np.abs(bq))
    dyq, bq = on_grid(dy, "E5M2"), on_grid(b, "E2M5")
    close(a.grad, dyq @ bq.swapaxes(-1, -2), np.abs(dyq) @ np.abs(bq.swapaxes(-1, -2)))
    dyq, aq = on_grid(dy, "E1M6"), on_grid(a, "E0M7")
    expected = (aq.swapaxes(-1, -2) @ dyq).sum(0)
    close(b.grad, expected, (np.abs(aq.swapaxes(-1, -2)) @ np.abs(dyq)).sum(0))


def test_matmul_in_blocks_along_each_reduction():
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 64, requires_grad=True), torch.randn(2, 64, 96, requires_grad=True)
    dy = torch.randn(2, 32, 96)
    y = functional.matmul(a, b, recipe="MXFP8")
    y.backward(dy)

    def q(t, axis):
        return quantize(t, "MXFP8", axis=axis)

    torch.testing.assert_close(y, q(a, -1) @ q(b, -2), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(a.grad, q(dy, -1) @ q(b, -1).mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(b.grad, q(a, -2).mT @ q(dy, -2), rtol=1e-5, atol=1e-4)


def test_linear_is_the_layer():
    from altgrad.nn import quantize_model

    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 6), torch.randn(4, 8)
    y = functional.linear(x, layer.weight, layer.bias, recipe=SIX)
    quantize_model(layer, SIX)
    assert torch.equal(layer(x), y)


def test_stochastic_products_take_a_key_and_replay():
    a, b = torch.randn(4, 8), torch.randn(8, 4)
    recipe = layer_recipe("E2M5", rounding="stochastic")
    first = functional.matmul(a, b, recipe=recipe, key=(1, 2))
    assert torch.equal(first, functional.matmul(a, b, recipe=recipe, key=(1, 2)))
    assert not torch.equal(first, functional.matmul(a, b, recipe=recipe, key=(1, 3)))
    assert not torch.equal(first, functional.matmul(a, b, recipe=recipe, key=(2, 2)))
    with pytest.raises(RandomKeyError, match=r"needs key=\(seed, stream\)"):
        functional.matmul(a, b, recipe=recipe)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (layer_recipe("E4M3", scaling="delayed"), "remember something between calls"),
        (layer_recipe("E4M3", storage="grid"), "remember something between calls"),
        (layer_recipe("E4M3", scaling={"policy": "amax", "axis": 0}), "drop the scaling's axis"),
    ],
)
def test_recipes_that_need_a_layer_are_refused(recipe, message):
    with pytest.raises(RecipeError, match=message):
        functional.matmul(torch.randn(4, 4), torch.randn(4, 4), recipe=recipe)
