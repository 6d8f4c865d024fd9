"""Block quantization against the oracle, against its own scales, and on values worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad.errors import BlockError, CodeError, DtypeError, KernelError, RandomKeyError, ScaleError
from altgrad.quantization import (
    BLOCK_FORMATS,
    QuantizedTensor,
    block_format,
    block_scales,
    decode,
    encode,
    encode_with_stats,
    fake_quantize,
    get_format,
    quantize,
    quantize_with_stats,
)
from altgrad.quantization.ops import quantize_and_encode
from tests.quantization.oracles import quantize_last_axis, same_bits

inf, nan = float("inf"), float("nan")
OTHERS = ("MXFP4:ceil", "MXFP8:nearest", "MXFP6:even", "E3M4/16:ceil", "E0M7/32", "E4M3/32:FP32", "E3M2/16:E4M3")
KERNELS = ("eager", "cpu")


def spread_data(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose magnitude varies by element and by block, some of them ties and powers of two."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(
        torch.randint(-6, 7, (rows, columns), generator=generator).float()
    )
    x[0] = torch.arange(columns) / 8 - 3
    x[1] = torch.exp2(torch.arange(columns).float() % 16)
    return x


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", [*BLOCK_FORMATS, *OTHERS])
def test_values_and_scales_are_the_oracles(name, kernel):
    fmt = get_format(name)
    x = spread_data(6, 64)
    values, scales = quantize_last_axis(x, fmt)
    assert same_bits(quantize(x, fmt, kernel=kernel), values)
    assert same_bits(encode(x, fmt, kernel=kernel).scale_values, scales)
    assert same_bits(block_scales(x, fmt), scales)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, *OTHERS, "E4M3/4x16:FP32", "E2M1/8x8"])
def test_decoding_an_encoding_is_quantizing(name):
    x = spread_data(8, 64)
    for axis in (-1,) if "x" in name else (-1, 0):
        encoded = encode(x, name, axis=axis, pad=True)
        assert isinstance(encoded, QuantizedTensor)
        assert encoded.codes.dtype == torch.uint8
        assert encoded.shape == x.shape
        expected = quantize(x, name, axis=axis, pad=True)
        assert same_bits(decode(encoded), expected)
        out = torch.empty_like(x)
        assert decode(encoded, out=out) is out
        assert same_bits(out, expected)
        both, again = quantize_and_encode(x, name, axis=axis, pad=True)
        assert same_bits(both, expected)
        assert torch.equal(again.codes, encoded.codes)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["MXFP8", "NVFP4"])
def test_another_axis_is_the_last_axis_of_the_transposed_tensor(name, kernel):
    x = spread_data(64, 3 * 40).reshape(64, 3, 40)
    for axis in (0, 1, -2):
        fmt = block_format("E4M3", 3) if name == "MXFP8" and axis else get_format(name)
        pad = x.shape[axis] % fmt.tile[1] != 0
        moved = x.movedim(axis, -1).contiguous()
        expected = quantize(moved, fmt, kernel=kernel, pad=pad).movedim(-1, axis)
        assert same_bits(quantize(x, fmt, axis=axis, kernel=kernel, pad=pad), expected)
        scales = encode(x, fmt, axis=axis, kernel=kernel, pad=pad).scales
        assert torch.equal(scales, encode(moved, fmt, kernel=kernel, pad=pad).scales.movedim(-1, axis))


@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_have_one_scale_each(kernel):
    x = spread_data(8, 64).reshape(2, 4, 64)
    for name in ("E4M3/2x16:FP32", "E2M1/4x32"):
        fmt = get_format(name)
        r, c = fmt.tile
        tiles = x.reshape(2, 4 // r, r, 64 // c, c).transpose(2, 3).reshape(2, 4 // r, 64 // c, r * c)
        flat = block_format(fmt.element, r * c, fmt.scale_format)
        scales = block_scales(tiles, flat)[..., 0]
        assert same_bits(block_scales(x, fmt), scales)
        spread = scales.repeat_interleave(r, 1).repeat_interleave(c, 2)
        assert same_bits(quantize(x, fmt, kernel=kernel), quantize(x, fmt.element, spread, overflow="saturate"))


@pytest.mark.parametrize("rounding", ["nearest_away", "toward_zero", "up", "down", "odd", "stochastic"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_every_mode_is_scalar_rounding_under_the_blocks_scales(rounding, axis):
    """The random bits of an element depend on its place in the tensor alone, not on the axis of the blocks."""
    x = spread_data(64, 64)
    key = (3, 5) if rounding == "stochastic" else None
    scales = block_scales(x, "MXFP8", axis=axis).repeat_interleave(32, axis)
    expected = quantize(x, "E4M3", scales, rounding=rounding, overflow="saturate", key=key, kernel="eager")
    assert same_bits(quantize(x, "MXFP8", axis=axis, rounding=rounding, key=key), expected)


def test_hand_worked_blocks():
    x = torch.zeros(32)
    x[:5] = torch.tensor([1.0, -2.5, 6.9, 0.2, -0.0])
    assert quantize(x, "MXFP4")[:5].tolist() == [1.0, -2.0, 6.0, 0.0, 0.0]  # X = 2^(2 - 2) = 1; 6.9 is clamped (6.3)
    assert quantize(x, "MXFP4:ceil")[:5].tolist() == [1.0, -2.0, 6.0, 0.0, 0.0]  # X = 2; 6.9 / 2 = 3.45 -> 3
    x[2] = 7.5
    assert quantize(x, "MXFP4:ceil")[2] == 8.0  # 7.5 / 2 = 3.75 -> 4
    encoded = encode(x, "MXFP4")
    assert encoded.scales.tolist() == [127]
    assert encoded.codes[:5].tolist() == [2, 0b1100, 7, 0, 0b1000]
    assert encoded.storage_bits == 32 * 4 + 8


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["MXFP8", "MXFP4", "NVFP4", "E4M3/32:FP32"])
def test_a_block_of_zeros_stays_zero_under_the_smallest_scale(name, kernel):
    x = torch.zeros(2, 32)
    x[1] = -0.0
    encoded = encode(x, name, kernel=kernel)
    assert same_bits(decode(encoded), x)
    assert same_bits(quantize(x, name, kernel=kernel), x)
    fmt = encoded.format
    smallest = {"E8M0": 2.0**-127, "FP32": 1 / fmt.element.max}.get(fmt.scale_format.name)
    if smallest is not None:
        assert set(encoded.scale_values.flatten().tolist()) == {torch.tensor(smallest).item()}
    else:
        assert set(encoded.scales.flatten().tolist()) == {1}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_nan_stays_in_place_or_takes_its_block(kernel, axis):
    x = spread_data(64, 64)
    x[40, 3] = nan
    alone = torch.zeros(64, 64, dtype=torch.bool)
    alone[40, 3] = True
    block = torch.zeros(64, 64, dtype=torch.bool)
    block[(slice(40, 41), slice(0, 32)) if axis == -1 else (slice(32, 64), slice(3, 4))] = True
    for name, expected in (("MXFP8", alone), ("MXFP8_E5M2", alone), ("MXFP4", block), ("MXINT8", block)):
        values = quantize(x, name, axis=axis, kernel=kernel)
        encoded = encode(x, name, axis=axis, kernel=kernel)
        assert torch.equal(values.isnan(), expected), name
        assert same_bits(decode(encoded), values)
        clean = quantize(torch.where(expected, 0.0, x), name, axis=axis, kernel=kernel)
        if expected is block:
            assert torch.equal(values[~expected], clean[~expected])
            assert (encoded.scales == 255).sum() == 1
            assert encoded.codes[expected].unique().tolist() == [0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_inf_keeps_its_place_and_leaves_the_scale_alone(kernel, axis):
    x = spread_data(64, 64)
    x[40, 3], x[41, 3] = inf, -inf
    finite = torch.where(x.isinf(), 0.0, x)
    for name in ("MXFP8", "MXFP8_E5M2", "MXINT8", "NVFP4"):
        values = quantize(x, name, axis=axis, kernel=kernel)
        assert values[40, 3] == inf
        assert values[41, 3] == -inf
        assert same_bits(
            torch.where(x.isinf(), 0.0, values), quantize(finite, name, axis=axis, kernel=kernel).where(~x.isinf(), 0.0)
        )
        saturated = encode(x, name, axis=axis, kernel=kernel, overflow="saturate")
        assert bool(decode(saturated).isfinite().all())
        if name == "MXFP8_E5M2":
            assert same_bits(decode(encode(x, name, axis=axis, kernel=kernel)), values)
        else:
            with pytest.raises(CodeError, match="no code for inf"):
                encode(x, name, axis=axis, kernel=kernel)


@pytest.mark.parametrize("problem", [inf, nan], ids=str)
@pytest.mark.parametrize("name", ["MXFP8", "MXINT8", "NVFP4", "E2M1/16x16:E8M0"])
def test_what_several_threads_find_no_code_for_is_found(name, problem):
    """Threads add up what they found: twice inf must not look like nothing."""
    torch.set_num_threads(4)
    for count in (1, 2, 3, 4):
        x = torch.ones(512, 512)
        x[:: 512 // count, 7] = problem
        if problem is nan:
            assert bool(decode(encode(x, name))[::512].isnan().any())  # in the scales
            continue
        with pytest.raises(CodeError, match="no code for inf"):
            encode(x, name)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ends_of_e8m0(kernel):
    low = torch.full((32,), 2.0**-149)
    low[0] = 2.0**-130
    encoded = encode(low, "MXFP8", kernel=kernel)
    assert encoded.scales.tolist() == [0]  # 2^-127, not 2^(-130 - 8)
    assert same_bits(decode(encoded), quantize(low, "MXFP8", kernel=kernel))
    assert quantize(low, "MXFP8", kernel=kernel)[0] == 2.0**-130
    assert quantize(low, "MXFP8", kernel=kernel)[1] == 0.0
    high = torch.full((32,), torch.finfo(torch.float32).max)
    encoded = encode(high, "MXINT8", kernel=kernel)
    assert encoded.scales.tolist() == [254]
    assert encoded.codes.unique().tolist() == [127]
    wide = torch.full((32,), 1e300, dtype=torch.float64)
    assert quantize(wide, "MXINT8").unique().tolist() == [127 / 64 * 2.0**127]


def test_finite_e5m2_elements_saturate_where_scalars_overflow_to_inf():
    """OCP MX 1.0, 6.3: normal values beyond the element's max are clamped to it."""
    x = torch.full((32,), 1.99)
    assert quantize(x, "MXFP8_E5M2").unique().tolist() == [1.75]
    assert quantize(x, "E5M2", 2.0**-15).unique().tolist() == [inf]
    assert quantize(x, "MXFP8_E5M2", overflow="inf").unique().tolist() == [inf]


def test_overflow_policies_reach_the_elements():
    x = torch.tensor([1.99] * 31 + [0.1])
    assert bool(quantize(x, "MXFP4", overflow="nan")[:31].isnan().all())
    assert quantize(x, "MXFP4", overflow="inf").tolist()[:31] == [inf] * 31
    with pytest.raises(CodeError, match="no code for inf"):
        encode(x, "MXFP4", overflow="inf")


@pytest.mark.parametrize(
    ("name", "axis", "kernel"),
    [("MXFP8", -1, "cpu"), ("NVFP4", 0, "cpu"), ("MXFP8", 0, "eager"), ("E4M3/32:FP32", -1, "eager")],
)
def test_statistics_count_what_they_say(name, axis, kernel):
    x = spread_data(64, 64)
    x[3, 5] = inf
    values, stats = quantize_with_stats(x, name, axis=axis, kernel=kernel)
    assert same_bits(values, quantize(x, name, axis=axis))
    finite = torch.where(x.isfinite(), x, 0).double()
    result = torch.where(x.isfinite(), values, 0).double()
    scales = block_scales(x, name, axis=axis)
    limit = get_format(name).element.max * scales.repeat_interleave(x.shape[axis] // scales.shape[axis], axis)
    assert stats.count == x.numel()
    assert stats.amax == finite.abs().max()
    assert stats.nonfinite == 1
    assert stats.underflow == ((finite != 0) & (result == 0)).sum()
    assert stats.overflow <= (finite.abs() > limit).sum()
    assert (name != "MXFP8") or stats.overflow > 0
    assert float(stats.sse) == pytest.approx(float(((finite - result) ** 2).sum()), rel=1e-12)
    assert float(stats.sum_sq) == pytest.approx(float((finite**2).sum()), rel=1e-12)
    saturating, again = encode_with_stats(x, name, axis=axis, overflow="saturate", kernel=kernel)
    assert again.nonfinite == 1
    assert again.overflow == stats.overflow + 1
    assert same_bits(decode(saturating)[~x.isinf()], values[~x.isinf()])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    block=st.integers(1, 7),
    axis=st.integers(-4, 3),
    tile=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape_axis_and_block(shape, block, axis, tile, seed):
    """Padded blocks of any size along any axis of any shape: both kernels, and decode, agree with each other."""
    if not -len(shape) <= axis < len(shape):
        axis = -1
    if tile and len(shape) > 1:
        fmt, axis = block_format("E3M4", (tile, block)), -1
    else:
        fmt = block_format("E3M4", block)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    expected = quantize(x, fmt, axis=axis, pad=True, kernel="eager")
    assert same_bits(quantize(x, fmt, axis=axis, pad=True), expected)
    assert same_bits(decode(encode(x, fmt, axis=axis, pad=True)), expected)


def test_layout_in_memory_does_not_matter():
    x = spread_data(64, 64)
    strided = torch.empty(64, 128)[:, ::2].copy_(x)
    assert not x.t().is_contiguous()
    assert same_bits(quantize(x.t(), "MXFP8"), quantize(x.t().contiguous(), "MXFP8"))
    assert same_bits(quantize(strided, "MXFP8"), quantize(x, "MXFP8"))
    key = {"rounding": "stochastic", "key": (1, 2)}
    assert same_bits(quantize(strided, "MXFP8", **key), quantize(x, "MXFP8", **key))
    out = torch.empty(64, 128)[:, ::2]
    assert quantize(x, "MXFP8", out=out) is out
    assert same_bits(out.contiguous(), quantize(x, "MXFP8"))
    in_place = x.clone()
    quantize(in_place, "MXFP8", out=in_place)
    assert same_bits(in_place, quantize(x, "MXFP8"))


@pytest.mark.parametrize(("name", "dtype"), [("MXFP8", torch.bfloat16), ("NVFP4", torch.float16)])
def test_half_precision_is_computed_in_float32_and_rounded_once(name, dtype):
    x = spread_data(8, 64).to(dtype)
    values = quantize(x, name)
    assert same_bits(values, quantize(x.float(), name).to(dtype))
    assert same_bits(decode(encode(x, name), dtype=dtype), values)


def test_float64_is_never_rounded_to_float32():
    x = spread_data(8, 64).double()
    assert same_bits(quantize(x, "MXFP8"), quantize(x.float(), "MXFP8").double())
    tie = torch.full((32,), 1.0, dtype=torch.float64)
    tie[1] = 1.0625 + 2.0**-40  # just above the midpoint of 1 and 1.125; float32 would see the tie and round to 1
    assert quantize(tie, "MXFP8")[1] == 1.125
    assert quantize(tie.float(), "MXFP8")[1] == 1.0
    assert same_bits(decode(encode(x, "NVFP4"), dtype=torch.float64), quantize(x, "NVFP4"))


def test_a_given_tensor_scale_is_taken():
    x = spread_data(4, 32)
    default = encode(x, "NVFP4")
    assert default.tensor_scale == x.abs().max() / (448 * 6)
    doubled = encode(x, "NVFP4", default.tensor_scale * 2)
    assert doubled.tensor_scale == default.tensor_scale * 2
    assert same_bits(decode(encode(x, "NVFP4", default.tensor_scale)), quantize(x, "NVFP4"))


def test_gradient_goes_straight_through_and_can_be_masked():
    x = torch.linspace(0.1, 1.99, 128).reshape(4, 32).requires_grad_()
    fake_quantize(x, "MXFP4").sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    x.grad = None
    fake_quantize(x, "MXFP4", mask_saturated=True).sum().backward()
    limit = 6 * block_scales(x, "MXFP4").repeat_interleave(32, -1)
    assert torch.equal(x.grad, (x.abs() <= limit).float())
    assert 0 < x.grad.sum() < x.numel()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize(torch.ones(3, 100), "MXFP4"), BlockError, "100 is not a multiple of block 32; pad it to 128"),
        (lambda: quantize(torch.ones(3, 100), "MXFP4"), BlockError, "block of 2, 4, 5, 10, 20, 25, 50, 100"),
        (lambda: quantize(torch.ones(3, 32), "MXFP4", axis=2), BlockError, "axis 2 is outside"),
        (lambda: quantize(torch.tensor(1.0), "MXFP4"), BlockError, "at least 1 axes"),
        (lambda: quantize(torch.ones(32), "E4M3/4x4:FP32"), BlockError, "at least 2 axes"),
        (lambda: quantize(torch.ones(4, 4), "E4M3/4x4:FP32", axis=0), BlockError, "leave axis at -1"),
        (lambda: quantize(torch.ones(32), "MXFP4", 2.0), ScaleError, "takes its scales from its blocks"),
        (lambda: quantize(torch.ones(32), "NVFP4", torch.ones(2)), ScaleError, "one scale per tensor"),
        (lambda: quantize(torch.ones(32), "NVFP4", -2.0), ScaleError, "positive and finite"),
        (lambda: quantize(torch.ones(32, dtype=torch.int32), "MXFP4"), DtypeError, "int32"),
        (lambda: quantize(torch.ones(32).bfloat16(), "FP16/32"), DtypeError, "mantissa bits"),
        (lambda: quantize(torch.ones(32), "MXFP4", rounding="stochastic"), RandomKeyError, "key"),
        (lambda: quantize(torch.ones(32).double(), "MXFP4", kernel="cpu"), KernelError, "float64"),
    ],
)
def test_errors_give_value_limit_and_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()
