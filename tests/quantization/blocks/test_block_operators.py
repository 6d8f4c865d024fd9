"""Block quantization inside torch.compile, and its operators under torch.library.opcheck."""

import pytest
import torch

from altgrad.quantization import decode, encode, fake_quantize, quantize, quantize_with_stats
from tests.quantization.blocks.oracle import same_bits


@pytest.fixture
def x():
    torch.compiler.reset()
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["MXFP8", "NVFP4"])
def test_compiles_without_a_graph_break(x, name):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, key):
        rounded = quantize(x, name, rounding="stochastic", key=key, axis=0, pad=True)
        back = decode(encode(x, name))
        values, stats = quantize_with_stats(x, name)
        return rounded * 2, back, values, stats.vector

    key = torch.tensor([3, 4])
    rounded, back, values, vector = step(x, key)
    assert same_bits(rounded, quantize(x, name, rounding="stochastic", key=key, axis=0, pad=True) * 2)
    assert same_bits(back, quantize(x, name))
    assert same_bits(values, back)
    assert torch.equal(vector, quantize_with_stats(x, name)[1].vector)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
def test_gradient_through_a_compiled_graph(x):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x):
        return (fake_quantize(x, "MXFP8", mask_saturated=True) ** 2).sum()

    x.requires_grad_()
    loss(x).backward()
    compiled, x.grad = x.grad, None
    (fake_quantize(x, "MXFP8", mask_saturated=True) ** 2).sum().backward()
    assert same_bits(compiled, x.grad)


@pytest.mark.parametrize("name", ["MXFP8", "NVFP4"])
def test_operators_keep_their_promises(x, name):
    upper = torch.tensor(0.01) if name == "NVFP4" else None
    for want in (1, 2, 3, 5, 6, 7):
        torch.library.opcheck(torch.ops.altgrad.cast, (x, upper, None, f"{name}(saturate)", want, "eager"))
    found = encode(x, name)
    parts = (found.codes, found.scales, found.tensor_scale)
    torch.library.opcheck(torch.ops.altgrad.decode, (*parts, name, torch.float32, "eager"))
