"""The kernels as torch operators: opcheck, torch.compile without graph breaks, the same bits as outside."""

import pytest
import torch

from altgrad.errors import KernelError, OptionError
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization import decode, encode, fake_quantize, ops, quantize, quantize_with_stats
from tests.quantization.kernels.samples import assert_same_bits


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("want", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_opcheck(want, rounding):
    key = torch.tensor([1, 2]) if rounding == "stochastic" else None
    for x in (
        torch.randn(5, 4),
        torch.randn(6, 5)[::2],
        torch.randn(4, 3, 2).permute(2, 0, 1),
        torch.randn(3).double(),
    ):
        scale = torch.tensor(0.5, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        torch.library.opcheck(torch.ops.altgrad.cast, (x, scale, key, f"E4M3({rounding})", want, "cpu"))


def test_opcheck_decode():
    codes = torch.randint(0, 127, (6, 4), dtype=torch.uint8)  # no NaN: opcheck compares results by ==
    for given in (codes, codes.t(), codes[::2]):
        arguments = (given, torch.tensor(0.5), None, "E4M3", torch.float32, "cpu")
        torch.library.opcheck(torch.ops.altgrad.decode, arguments)


@pytest.mark.parametrize("shape", [(33,), (4, 33)])
def test_compiled_functions_equal_eager_ones(shape):
    x = torch.randn(shape)
    scale = torch.rand(shape[-1]) + 0.1

    def forward(x, scale, key):
        q, stats = quantize_with_stats(x, "E4M3", scale, clamp=True)
        both = ops.quantize_and_encode(x, "E5M2", 0.3)
        noisy = quantize(x, "E3M4", scale, rounding="stochastic", key=key)
        return q, stats.vector, *both, noisy, decode(encode(x, "FP16"), "FP16", scale)

    key = torch.tensor([3, 4])
    found, expected = compiled(forward)(x, scale, key), forward(x, scale, key)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_new_key_does_not_recompile():
    x = torch.randn(100)
    function = compiled(lambda x, key: quantize(x, "E4M3", rounding="stochastic", key=key))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for stream in range(3):
            key = torch.tensor([7, stream])
            assert torch.equal(function(x, key), quantize(x, "E4M3", rounding="stochastic", key=(7, stream)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer does it
@pytest.mark.parametrize("mask", [False, True])
def test_compiled_straight_through(mask):
    weight = torch.linspace(-1000, 1000, 64)

    def loss(x):
        return (fake_quantize(x, "E4M3", 0.5, mask_saturated=mask) * weight).sum()

    gradients = []
    for function in (loss, compiled(loss)):
        x = torch.linspace(-300, 300, 64, requires_grad=True)
        function(x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    inside = torch.linspace(-300, 300, 64).abs() / 0.5 <= 448
    assert torch.equal(gradients[0], torch.where(inside, weight, 0.0) if mask else weight)


def test_formats_of_ones_own_compile():
    own = FloatFormat("own", 3, 2, 5)
    x = torch.randn(50)
    assert_same_bits(compiled(lambda x: quantize(x, own))(x), quantize(x, own))


def test_fake_tensors_get_shapes_without_running():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(3, 4))
        assert quantize(x, "E4M3").shape == (3, 4)
        assert encode(x, "E4M3").dtype == torch.uint8


def test_unknown_and_misplaced_kernels():
    with pytest.raises(OptionError, match="one of reference"):
        quantize(torch.ones(2), "E4M3", kernel="fpga")
    with pytest.raises(KernelError, match="works on cuda"):
        quantize(torch.ones(2), "E4M3", kernel="cuda")
