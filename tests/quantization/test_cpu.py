"""The CPU kernel's torch side: layouts, scales, outputs, statistics, large indices."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad.errors import CodeError, KernelError, OptionError
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import family_of, grid_table
from altgrad.jit.threads import run_range
from altgrad.quantization import (
    E4M3,
    FORMAT_REGISTRY,
    FP16,
    amax,
    decode,
    encode,
    fake_quantize,
    get_format,
    ops,
    quantize,
    quantize_with_stats,
)
from altgrad.quantization.kernels.cpu import loops, scalar
from altgrad.randomness import random_bits
from tests.quantization.oracles import (
    ELEMENT_FORMATS,
    LISTED_FORMATS,
    assert_same_bits,
    bits,
    dense_around,
    random_patterns,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """x [24, 10, 6] as tensors of equal values in other memory layouts."""
    return {
        "contiguous": x.contiguous(),
        "permuted": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": torch.stack([x, x], dim=2)[:, :, 0],
        "reversed pieces": torch.cat([x, x])[: x.shape[0]],
        "offset": torch.cat([x[:1], x])[1:],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_any_scale(dtype):
    x = (torch.randn(24, 10, 6, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    rand = torch.Generator().manual_seed(1)
    shapes = [(), (1,), (6,), (10, 1), (24, 1, 1), (10, 6), (24, 10, 1), (24, 1, 6), (24, 10, 6)]
    for (name, y), shape in itertools.product(layouts(x).items(), shapes):
        scale = torch.rand(shape, generator=rand) + 0.01
        expected = quantize(x, E4M3, scale, kernel="reference")
        assert_same_bits(quantize(y, E4M3, scale), expected)
        codes = encode(y, E4M3, scale)
        assert torch.equal(codes, encode(x, E4M3, scale, kernel="reference")), name
        assert_same_bits(decode(codes, E4M3, scale, dtype=dtype), expected)
        out = torch.empty_like(y)
        assert quantize(y, E4M3, scale, out=out) is out
        assert_same_bits(out, expected)
        target = y.clone()
        assert_same_bits(quantize(target, E4M3, scale, out=target), expected)
        spread = torch.empty(24, 20, 6, dtype=dtype)[:, ::2]
        assert_same_bits(quantize(y, E4M3, scale, out=spread), expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (2049,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_shapes(shape, dtype):
    x = torch.linspace(-3, 3, max(1, int(np.prod(shape)))).to(dtype)[: int(np.prod(shape))].view(shape)
    q, codes, stats = ops.quantize_and_encode_with_stats(x, E4M3, 0.3)
    assert_same_bits(q, quantize(x, E4M3, 0.3, kernel="reference"))
    assert codes.shape == x.shape
    assert stats.count == x.numel()
    assert_same_bits(decode(codes, E4M3, 0.3, dtype=dtype), q)
    assert amax(x) == (x.abs().max() if x.numel() else 0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 3000),
    axis=st.sampled_from([0, 1]),
    flip=st.booleans(),
    name=st.sampled_from(["E4M3", "E0M7", "E7M0", "BF16", "INT8"]),
    low=st.floats(1e-30, 1e30),
    seed=st.integers(0, 1000),
)
def test_scales_and_shapes(rows, columns, axis, flip, name, low, seed):
    x = dense_around(get_format(name), rows * columns, seed).view(rows, columns)
    shape = (rows, 1) if axis == 0 else (1, columns)
    exponents = np.random.default_rng(seed).integers(-20, 20, shape)
    scale = torch.from_numpy((low * np.exp2(exponents)).astype(np.float32))
    if flip:
        x, scale = x.t(), scale.t()
    for rounding, key in ((Rounding.NEAREST_EVEN, None), (Rounding.STOCHASTIC, (seed, 1))):
        options = {"rounding": rounding, "key": key}
        assert_same_bits(
            quantize(x, name, scale, **options), quantize(x, name, scale, kernel="reference", **options), x
        )


@pytest.mark.parametrize("fmt", LISTED_FORMATS, ids=str)
def test_codes_and_decoding(fmt):
    x = torch.cat([dense_around(fmt, 3000, 3), torch.tensor([0.0, -0.0, fmt.max, -fmt.max, 2 * fmt.max])])
    for rounding in (Rounding.NEAREST_EVEN, Rounding.UP, Rounding.STOCHASTIC):
        key = (1, 2) if rounding is Rounding.STOCHASTIC else None
        for overflow in (Overflow.NATIVE, Overflow.SATURATE):
            options = {"rounding": rounding, "overflow": overflow, "key": key}
            codes = encode(x, fmt, 0.75, **options)
            assert torch.equal(codes, encode(x, fmt, 0.75, kernel="reference", **options))
            expected = quantize(x, fmt, 0.75, **options)
            for kernel in ("cpu", "eager", "reference"):
                assert_same_bits(decode(codes, fmt, 0.75, kernel=kernel), expected, x)


@pytest.mark.parametrize("fmt", [f for f in ELEMENT_FORMATS if f.bits <= 8], ids=str)
def test_special_inputs_have_their_codes_or_none(fmt):
    nan, inf = torch.tensor([0.5, torch.nan]), torch.tensor([0.5, -torch.inf])
    for special, has in ((nan, fmt.has_nan), (inf, fmt.has_inf)):
        if has:
            assert_same_bits(decode(encode(special, fmt), fmt), special)
        else:
            with pytest.raises(CodeError, match="no code"):
                encode(special, fmt)
            values, codes = ops.quantize_and_encode(special, fmt)
            assert_same_bits(values, special)
            assert codes[1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overflow", list(Overflow), ids=lambda o: o.value)
def test_statistics(dtype, overflow):
    x = torch.cat([torch.randn(20000) * 300, random_patterns(3000, 5), torch.tensor([0.0, torch.inf, torch.nan])])
    x = x.to(dtype)
    for options in ({}, {"clamp": True}, {"rounding": "stochastic", "key": (1, 1)}, {"rounding": "up"}):
        q, stats = ops.quantize_with_stats(x, "E4M3", 0.5, overflow=overflow, **options)
        expected = ops.quantize_with_stats(x, "E4M3", 0.5, overflow=overflow, kernel="reference", **options)
        assert_same_bits(q, expected[0], x)
        torch.testing.assert_close(stats.vector, expected[1].vector, rtol=4e-6, atol=0)
        assert torch.equal(stats.vector[:5], expected[1].vector[:5])


def _with(x, index, value):
    x = x.clone()
    x[index] = value
    return x


RANDOM = torch.randn(5000, generator=torch.Generator().manual_seed(9))
SUMMED = {
    "random": (RANDOM, 1e-6),
    "constant": (torch.full((5000,), 0.71), 4e-6),  # every addition is rounded the same way
    "two sizes": (torch.tensor([1.3, 1e-4]).repeat(2500), 4e-6),
    "tiny": (RANDOM * 1e-30, 1e-12),  # squares vanish in float32
    "huge": (RANDOM * 1e30, 1e-12),  # squares overflow in float32
    "one huge": (_with(RANDOM, 700, 1e25), 1e-6),
    "tiny errors": (_with(RANDOM.sign(), 700, 1e-30), 1e-12),  # one error, whose square vanishes in float32
    "exact": (RANDOM.sign(), 0),
    "nonfinite": (_with(_with(RANDOM, 10, torch.nan), 3000, -torch.inf), 1e-6),
}


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_float64(name, dtype):
    x, tolerance = SUMMED[name]
    x = x.to(dtype)
    for scale in (0.5, 0.37) if name not in ("exact", "tiny errors") else (0.5,):
        for out in (None, x.clone()):  # the second in place
            source = x if out is None else out
            q, stats = ops.quantize_with_stats(source, "E3M4", scale, out=out, overflow="saturate")
            both = x.double().isfinite() & q.double().isfinite()
            wide, error = x.double()[both], x.double()[both] - q.double()[both]
            torch.testing.assert_close(stats.sse, error.square().sum(), rtol=tolerance, atol=0)
            torch.testing.assert_close(stats.sum_sq, wide.square().sum(), rtol=tolerance, atol=0)
            assert stats.nonfinite == (~x.isfinite()).sum()
            assert stats.amax == torch.where(x.isfinite(), x.abs(), 0).max()
            assert stats.underflow == ((x != 0) & (q == 0)).sum()


def test_statistics_do_not_depend_on_threads():
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(3))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        q, codes, stats = ops.quantize_and_encode_with_stats(x, "E4M3", 0.01)
        found.append((q, codes, stats.vector))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_amax_skips_nonfinite():
    for dtype in DTYPES:
        x = torch.tensor([[1.0, -7.5, torch.inf], [torch.nan, 3.0, -torch.inf]], dtype=dtype)
        assert amax(x) == 7.5
        assert amax(x.t()) == 7.5
        assert amax(torch.full((3,), torch.nan, dtype=dtype)) == 0


@pytest.mark.parametrize("first", [2**31 - 1000, 2**32 - 1000, 2**33 + 5])
def test_indices_beyond_32_bits(first):
    """The loops take an index range; the tensor is only as large as the part they touch."""
    count = 3000
    x = dense_around(FP16, count, 9)
    out = torch.empty_like(x)
    codes = torch.empty(count, dtype=torch.int32)
    scales = torch.rand(7) + 0.5
    family = int(family_of(FP16, Rounding.STOCHASTIC, Overflow.NATIVE, 24, False))
    loop = loops.compiled(loops.Variant(0, family, False, True, 4, False))
    table = grid_table(FP16, Rounding.STOCHASTIC, Overflow.NATIVE, False, 24, False)
    addresses = [t.data_ptr() - first * 4 for t in (x, out, codes)]
    arguments = (table.ctypes.data, *addresses, scales.data_ptr(), 1.0, 3, 7, 11, 12, 0)
    run_range()(loop, *arguments, first, first + count)
    index = torch.arange(first, first + count)
    scale = scales[index // 3 % 7]
    drawn = random_bits(torch.tensor([11, 12]), count, 24, first=first)
    y = (x / scale).double()
    step = torch.from_numpy(FP16.ulp(y.numpy()))
    fraction = (y.abs() / step).frac()
    away = (fraction * 2**24).floor() + drawn >= 2**24
    expected = torch.copysign(((y.abs() / step).floor() + away) * step, y).float() * scale
    within = y.abs() < FP16.max
    assert within.sum() > 1000
    assert torch.equal(out[within], expected[within])
    assert torch.equal(decode(codes, FP16)[within] * scale[within], expected[within])


def test_loops_over_every_unit_of_a_tile_border():
    for count in (2047, 2048, 2049, 8191, 8192, 8193, 70001):
        x = dense_around(E4M3, count, count)
        expected = quantize(x, E4M3, 0.3, kernel="eager")
        assert torch.equal(bits(quantize(x, E4M3, 0.3)), bits(expected))
        torch.set_num_threads(2)
        assert torch.equal(bits(quantize(x, E4M3, 0.3)), bits(expected))
        torch.set_num_threads(1)


def test_dense_layouts_are_recognized():
    x = torch.zeros(4, 5, 6)
    assert scalar.is_dense(x)
    assert scalar.is_dense(x.permute(2, 0, 1))
    assert scalar.is_dense(x[:, :1].permute(2, 1, 0)[:, 0].t()) is False
    assert not scalar.is_dense(x[::2])
    assert not scalar.is_dense(torch.zeros(1).expand(7))


def test_the_catalog_is_covered():
    assert {f.name for f in LISTED_FORMATS} | {"FP32", "E8M0"} >= set(FORMAT_REGISTRY)


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
    for layout in (codes, codes.t(), codes[::2]):
        arguments = (layout, torch.tensor(0.5), None, "E4M3", torch.float32, "cpu")
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
