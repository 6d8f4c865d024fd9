"""Linear, convolution and the functional products against an independent statement: search over the values, float64 products."""

import numpy as np
import pytest
import torch
from torch import nn

from altgrad.errors import DtypeError, RandomKeyError, RecipeError
from altgrad.nn import (
    GemmRecipe,
    LayerRecipe,
    OperandSpec,
    Recipe,
    functional,
    layer_recipe,
    quantize_model,
    restore_model,
    uniform,
)
from altgrad.quantization import get_format, quantize


def scale_of(x: torch.Tensor, name: str, axis: int | None = None) -> np.ndarray:
    """amax / max in float32, as numpy computes it; `axis` keeps scales of its own."""
    data = x.detach().float().numpy()
    kept = None if axis is None else tuple(d for d in range(data.ndim) if d != axis)
    largest = np.abs(data).max(axis=kept, keepdims=axis is not None)
    largest = np.where(largest > 0, largest, np.float32(1)).astype(np.float32)
    return largest / np.float32(get_format(name).max)


def on_grid(x: torch.Tensor, name: str | None, axis: int | None = None, scale=None) -> np.ndarray:
    """scale * (nearest value of the format to x / scale), float64; refuses ties, which random data do not have."""
    data = x.detach().float().numpy()
    if name is None:
        return data.astype(np.float64)
    scale = scale_of(x, name, axis) if scale is None else np.float32(scale)
    values = get_format(name).values()
    quotient = np.clip((data / scale).astype(np.float64), values[0], values[-1])
    right = np.clip(np.searchsorted(values, quotient), 1, len(values) - 1)
    below, above = values[right - 1], values[right]
    assert not np.any((quotient - below == above - quotient) & (quotient != 0)), "a tie: choose other data"
    nearest = np.where(quotient - below < above - quotient, below, above)
    return (scale.astype(np.float32) * nearest.astype(np.float32)).astype(np.float64)


def close(got: torch.Tensor, expected: np.ndarray, magnitude: np.ndarray, relative: float = 2e-6) -> None:
    """|got - expected| <= relative * (|A| |B|), elementwise: float32 accumulation of exact products."""
    error = np.abs(got.detach().double().numpy() - expected)
    assert np.all(error <= relative * magnitude), (error.max(), (error / (magnitude + 1e-300)).max())


SIX = {  # a different format for each of the six operands
    ("forward", "input"): "E4M3",
    ("forward", "weight"): "E3M4",
    ("input_grad", "grad_output"): "E5M2",
    ("input_grad", "weight"): "E2M5",
    ("weight_grad", "grad_output"): "E1M6",
    ("weight_grad", "input"): "E0M7",
}
UNIFORM = dict.fromkeys(SIX, "E4M3")
MIXED = {
    **UNIFORM,
    ("forward", "weight"): None,
    ("weight_grad", "grad_output"): "BF16",
    ("input_grad", "weight"): "E6M1",
}


def recipe_of(formats) -> LayerRecipe:
    gemms = {}
    for (gemm, role), name in formats.items():
        gemms.setdefault(gemm, {})[role] = OperandSpec(name)
    return LayerRecipe(**{gemm: GemmRecipe(**operands) for gemm, operands in gemms.items()})


def data(n=12, k=20, o=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, k, generator=generator, dtype=dtype) * 3
    layer = nn.Linear(k, o, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(o, k, generator=generator) * 0.3)
        layer.bias.copy_(torch.randn(o, generator=generator))
    return x, layer, torch.randn(n, o, generator=generator, dtype=dtype) * 1e-3


def operand(formats, gemm, role, tensor):
    name = formats[(gemm, role)]
    return on_grid(tensor, name, scale=1.0 if name == "BF16" else None)


@pytest.mark.parametrize("formats", [SIX, UNIFORM, MIXED], ids=["six", "uniform", "mixed"])
def test_each_gemm_uses_the_operands_that_its_recipe_names(formats):
    x, layer, dy = data()
    w, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    x.requires_grad_()
    quantize_model(layer, Recipe(recipe_of(formats)))
    y = layer(x)
    y.backward(dy)

    xq, wq = operand(formats, "forward", "input", x), operand(formats, "forward", "weight", w)
    close(y, xq @ wq.T + b.double().numpy(), np.abs(xq) @ np.abs(wq.T) + np.abs(b.numpy()))
    dyq, wq = operand(formats, "input_grad", "grad_output", dy), operand(formats, "input_grad", "weight", w)
    close(x.grad, dyq @ wq, np.abs(dyq) @ np.abs(wq))
    dyq, xq = operand(formats, "weight_grad", "grad_output", dy), operand(formats, "weight_grad", "input", x)
    close(layer.weight.grad, dyq.T @ xq, np.abs(dyq.T) @ np.abs(xq))
    close(layer.bias.grad, dy.double().sum(0).numpy(), dy.abs().sum(0).double().numpy())


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_per_channel_follow_the_matrix_axis(axis):
    x, layer, dy = data()
    w, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    x.requires_grad_()
    quantize_model(layer, uniform("E4M3", scaling={"policy": "amax", "axis": axis}))
    y = layer(x)
    y.backward(dy)
    xq, wq, dyq = (on_grid(t, "E4M3", axis) for t in (x, w, dy))
    close(y, xq @ wq.T + b.double().numpy(), np.abs(xq) @ np.abs(wq.T) + 1)
    close(x.grad, dyq @ wq, np.abs(dyq) @ np.abs(wq))
    close(layer.weight.grad, dyq.T @ xq, np.abs(dyq.T) @ np.abs(xq))


def test_static_scale_and_mask_of_saturated_elements():
    x, layer, dy = data()
    w = layer.weight.detach().clone()
    x.requires_grad_()
    scale = 2.0**-7  # x / scale reaches beyond 448, w / scale does not
    quantize_model(layer, uniform("E4M3", scaling={"policy": "static", "scale": scale}, mask_saturated=True))
    layer(x).backward(dy)
    masked = (x.detach() / scale).abs() > 448
    assert 0 < int(masked.sum()) < x.numel()
    dyq, wq = on_grid(dy, "E4M3", scale=scale), on_grid(w, "E4M3", scale=scale)
    expected = np.where(masked.numpy(), 0.0, dyq @ wq)
    close(x.grad, expected, np.abs(dyq) @ np.abs(wq))
    assert torch.equal(x.grad == 0, masked | torch.from_numpy(expected == 0))


def test_leading_axes_strides_and_expanded_gradients():
    x, layer, _ = data(n=24)
    flat = x.clone()
    quantize_model(layer, uniform("E4M3"))
    batched = layer(flat.view(2, 3, 4, 20))
    assert torch.equal(batched.view(24, -1), layer(flat))
    strided = torch.randn(20, 24).t()
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()), rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()  # grad_output is an expanded scalar
    expanded = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).backward(torch.ones(24, 9))
    assert torch.equal(expanded, layer.weight.grad)


def test_evaluation_and_no_grad_are_quantized_as_training_is():
    x, layer, _ = data()
    plain = layer(x)
    quantize_model(layer, uniform("E5M2"))
    trained = layer(x)
    assert not torch.equal(trained, plain)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), trained)


def test_float64_is_rounded_once_and_multiplied_in_float64():
    x, layer, dy = data(dtype=torch.float64)
    quantize_model(layer, uniform("E4M3", scaling="none"))
    y = layer(x)
    y.backward(dy)
    wq, xq = on_grid(layer.weight, "E4M3", scale=1.0), on_grid(x, "E4M3", scale=1.0)
    expected = xq @ wq.T + layer.bias.detach().numpy()
    assert y.dtype == layer.weight.grad.dtype == torch.float64
    assert np.abs(y.detach().numpy() - expected).max() < 1e-14


def test_a_nan_stays_a_nan_in_a_format_that_has_none():
    x, layer, _ = data()
    x[3, 5] = torch.nan
    quantize_model(layer, uniform("E3M4"))
    y = layer(x)
    assert torch.isnan(y[3]).all()
    assert torch.isfinite(torch.cat([y[:3], y[4:]])).all()
    y.sum().backward()


@pytest.mark.parametrize(
    "recipe", [uniform("E4M3"), uniform("E5M2", grad=None), uniform("MXFP8")], ids=["E4M3", "x,w", "MX"]
)
def test_what_is_kept_for_the_backward_is_8_bits_wide(recipe):
    x, w, o = torch.randn(64, 32), nn.Linear(32, 64), []
    quantize_model(w, recipe)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: o.append(t) or t, lambda t: t):
        w(x.requires_grad_())
    kept = {t.dtype for t in o if t.numel() >= x.numel()}
    assert kept == {torch.uint8}, [(t.dtype, t.shape) for t in o]


def test_only_what_the_gradients_need_is_kept():
    x, layer, _ = data()
    quantize_model(layer, uniform("E4M3"))
    layer.weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_())
    assert not any(t.shape == x.shape for t in kept)
    y.sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_two_dtypes_without_autocast_are_refused():
    x, layer, _ = data()
    quantize_model(layer, uniform("E4M3"))
    with pytest.raises(DtypeError, match=r"input is torch.bfloat16 and weight torch.float32.*autocast"):
        layer(x.bfloat16())


def test_bf16_model_rounds_the_output_once():
    x, layer, dy = data()
    w, b = layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16()
    layer.bfloat16()
    quantize_model(layer, uniform("E4M3"))
    x16 = x.bfloat16().requires_grad_()
    y = layer(x16)
    y.backward(dy.bfloat16())
    xq, wq = on_grid(x16.float(), "E4M3"), on_grid(w.float(), "E4M3")
    exact = xq @ wq.T + b.double().numpy()
    assert y.dtype == layer.weight.grad.dtype == x16.grad.dtype == torch.bfloat16
    assert np.all(np.abs(y.detach().double().numpy() - exact) <= 2.0**-8 * np.abs(exact) + 1e-5)


def test_layer_recipe_is_a_whole_recipe():
    x, layer, _ = data()
    quantize_model(layer, layer_recipe("E4M3", activation=None))
    w = on_grid(layer.weight, "E4M3")
    expected = x.double().numpy() @ w.T + layer.bias.detach().double().numpy()
    close(layer(x), expected, np.abs(x.numpy()) @ np.abs(w.T) + 1)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_scale_found_on_the_host_is_that_of_the_tensor(power_of_two):
    from altgrad.quantization import FORMAT_REGISTRY, scale_from_amax
    from altgrad.quantization.scaling import host_scale

    generator = np.random.default_rng(0)
    amaxes = np.concatenate(
        [2.0 ** generator.uniform(-149, 127, 300), 2.0 ** np.arange(-149.0, 128.0), [0.0, 448.0, 3.4028234663852886e38]]
    ).astype(np.float32)
    for fmt in FORMAT_REGISTRY.values():
        if fmt.has_zero:
            expected = scale_from_amax(torch.from_numpy(amaxes), fmt, power_of_two=power_of_two).double().numpy()
            got = np.array([host_scale(float(a), fmt.max, power_of_two) for a in amaxes])
            fits = (
                amaxes.astype(np.float64) / fmt.max < 2.0**127
            )  # beyond it no float32 scale is finite, and quantizing raises
            assert np.array_equal(got[fits], expected[fits]), fmt


CASES = {
    "1d": (nn.Conv1d(4, 6, 3), (2, 4, 11)),
    "2d": (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 8, 7)),
    "3d": (nn.Conv3d(2, 4, 2, stride=2), (2, 2, 6, 4, 4)),
    "strided, dilated, grouped": (nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, padding=2), (2, 4, 11, 9)),
    "same": (nn.Conv2d(3, 5, (3, 5), dilation=2, padding="same"), (2, 3, 8, 7)),
    "reflect": (nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"), (2, 3, 8, 7)),
    "circular, no bias": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 11)),
    "unbatched": (nn.Conv2d(3, 5, 3), (3, 8, 7)),
}


@pytest.mark.parametrize(("layer", "shape"), CASES.values(), ids=CASES.keys())
def test_three_products_use_their_own_operands(layer, shape):
    torch.manual_seed(0)
    layer = layer.requires_grad_()
    layer.zero_grad()
    x = torch.randn(shape)
    xq, wq = (torch.from_numpy(on_grid(t, "E4M3")) for t in (x, layer.weight))
    dy = torch.randn_like(layer(x))
    dyq = torch.from_numpy(on_grid(dy, "E5M2"))

    def gradients(x64, w64, dy64):
        """y, dx and dw of the same geometry in float64."""
        x64, w64 = x64.clone().requires_grad_(), w64.clone().requires_grad_()
        bias = None if layer.bias is None else layer.bias.detach().double()
        y = layer._conv_forward(x64, w64, bias)
        return y.detach(), *torch.autograd.grad(y, (x64, w64), dy64)

    expected = gradients(xq, wq, dyq)
    quantize_model(layer, uniform("E4M3", grad="E5M2"))
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    for got, want in zip((y, leaf.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(got.detach().double(), want, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got.shape, want.shape)
    if layer.bias is not None:
        spatial = [d for d in range(dy.ndim) if d != (0 if len(shape) == 3 and isinstance(layer, nn.Conv2d) else 1)]
        torch.testing.assert_close(layer.bias.grad, dy.sum(spatial), rtol=1e-5, atol=1e-5)
    restore_model(layer)


def test_blocks_run_along_channels_and_batch():
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 64, 3)
    x = torch.randn(32, 32, 6, 6)
    weight = layer.weight.detach().clone()
    dy = torch.randn_like(layer(x))
    expected_y = nn.functional.conv2d(quantize(x, "MXFP8", axis=1), quantize(weight, "MXFP8", axis=1), layer.bias)
    x0, dy0 = quantize(x, "MXFP8", axis=0), quantize(dy, "MXFP8", axis=0)
    expected_dw = torch.nn.grad.conv2d_weight(x0, weight.shape, dy0)
    expected_dx = torch.nn.grad.conv2d_input(x.shape, quantize(weight, "MXFP8", axis=0), quantize(dy, "MXFP8", axis=1))
    quantize_model(layer, uniform("MXFP8"))
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, expected_dw, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(leaf.grad, expected_dx, rtol=1e-4, atol=1e-4)


SIX_RECIPE = LayerRecipe(
    forward=GemmRecipe(input=OperandSpec("E4M3"), weight=OperandSpec("E3M4")),
    input_grad=GemmRecipe(grad_output=OperandSpec("E5M2"), weight=OperandSpec("E2M5")),
    weight_grad=GemmRecipe(grad_output=OperandSpec("E1M6"), input=OperandSpec("E0M7")),
)


def test_matmul_in_batches():
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, 5, 8, requires_grad=True), torch.randn(2, 8, 7, requires_grad=True)
    dy = torch.randn(3, 2, 5, 7)
    y = functional.matmul(a, b, recipe=SIX_RECIPE)
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
    y = functional.linear(x, layer.weight, layer.bias, recipe=SIX_RECIPE)
    quantize_model(layer, SIX_RECIPE)
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
