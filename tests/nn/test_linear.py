"""The three GEMMs of a quantized linear layer against explicit float64 formulas, operand by operand."""

import numpy as np
import pytest
import torch
from torch import nn

from altgrad.errors import DtypeError
from altgrad.nn import GemmRecipe, LayerRecipe, OperandSpec, Recipe, layer_recipe, quantize_model, uniform
from tests.nn.oracle import close, on_grid

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
