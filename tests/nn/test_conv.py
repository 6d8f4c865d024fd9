"""Quantized convolutions against float64 formulas, in every geometry that torch's convolutions have."""

import numpy as np
import pytest
import torch
from torch import nn

from altgrad.nn import quantize_model, restore_model, uniform
from altgrad.quantization import quantize
from tests.nn.oracle import on_grid

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
