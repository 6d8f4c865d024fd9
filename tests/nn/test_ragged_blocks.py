"""Layers of any size in block formats: a last block that is short, as if zeros were behind it; and layers without features."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from altgrad.errors import BlockError, RecipeError
from altgrad.nn import functional, quantize_model, uniform
from altgrad.nn.recipe.text import parse_layer

BLOCK_FORMATS = ["MXFP8", "MXFP4", "NVFP4", "E4M3/32:FP32"]


def run(layer, x, dy):
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    return y.detach(), leaf.grad, layer.weight.grad


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("n", [1, 3, 20, 33])
def test_a_linear_layer_of_any_size_is_its_zero_padded_self(name, n):
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=False)
    padded = nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        padded.weight.copy_(F.pad(layer.weight, (0, 24, 0, 8)))
    x, dy = torch.randn(n, 40), torch.randn(n, 24)
    for one in (layer, padded):
        quantize_model(one, uniform(name))
    found = run(layer, x, dy)
    rows = -n % 64
    y, dx, dw = run(padded, F.pad(x, (0, 24, 0, rows)), F.pad(dy, (0, 8, 0, rows)))
    for a, b in zip(found, (y[:n, :24], dx[:n, :40], dw[:24, :40]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)  # the larger product may take another route
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), found[0])


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("n", "c", "o"), [(2, 3, 5), (33, 40, 24), (1, 33, 1)])
def test_a_convolution_of_any_channels_and_batch_is_its_zero_padded_self(kind, name, n, c, o):
    """In training and in evaluation: the last block of an axis is short, as if zeros were behind it."""
    torch.manual_seed(0)
    layer, padded = kind(c, o, 2, bias=False), kind(64, 64, 2, bias=False)
    rows, columns = layer.weight.shape[:2]

    def pad(t):
        return F.pad(t, (*(0, 0) * (t.ndim - 2), 0, 64 - t.shape[1], 0, 64 - t.shape[0]))

    with torch.no_grad():
        padded.weight.copy_(pad(layer.weight))
    quantize_model(layer, uniform(name))
    quantize_model(padded, uniform(name, whole_blocks=True))
    x = torch.randn(n, c, *(5, 4, 3)[: layer.weight.ndim - 2])
    dy = torch.randn_like(layer(x))
    found, (y, dx, dw) = run(layer, x, dy), run(padded, pad(x), pad(dy))
    for a, b in zip(found, (y[:n, :o], dx[:n, :c], dw[:rows, :columns]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), found[0])


def test_a_packed_sequence_in_evaluation_and_matmul():
    layer = nn.Linear(32, 32)
    quantize_model(layer, uniform("MXFP8"))
    with torch.no_grad():
        assert layer(torch.randn(3, 32)).shape == (3, 32)
    a, b = torch.randn(2, 5, 20, requires_grad=True), torch.randn(20, 7, requires_grad=True)
    y = functional.matmul(a, b, recipe="MXFP8")
    y.sum().backward()
    padded = functional.matmul(F.pad(a, (0, 12)), F.pad(b, (0, 0, 0, 12)), recipe="MXFP8")
    torch.testing.assert_close(y, padded, rtol=1e-6, atol=1e-6)


def test_whole_blocks_on_demand():
    strict = uniform("MXFP8", whole_blocks=True)
    assert parse_layer(str(strict.default)) == strict.default
    with pytest.raises(RecipeError, match=r"in_features 40 is not a multiple of MXFP8's block 32; drop whole_blocks"):
        quantize_model(nn.Linear(40, 32), strict)
    with pytest.raises(RecipeError, match="E4M3 has no blocks"):
        parse_layer("x:E4M3(whole blocks) w:E4M3 dy:E4M3")
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_model(model, strict)
    with pytest.raises(BlockError, match=r"layer '0': .*20 is not a multiple of block 32.*drop whole_blocks"):
        model(torch.randn(20, 32, requires_grad=True))
    relaxed = copy.deepcopy(uniform("MXFP8"))
    assert relaxed.default.forward.input.whole_blocks is False


@pytest.mark.parametrize("recipe", [uniform("E4M3"), uniform("MXFP8"), uniform("E3M4", storage="grid")], ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_features_are_nn_linear(recipe, shape):
    plain = nn.Linear(*shape)
    layer = copy.deepcopy(plain)
    quantize_model(layer, recipe)
    for n in (2, 0):
        x = torch.randn(n, shape[0], requires_grad=True)
        y = layer(x)
        assert torch.equal(y, plain(x))
        y.sum().backward()
        assert x.grad.shape == x.shape
    assert layer.weight.grad.shape == plain.weight.shape
