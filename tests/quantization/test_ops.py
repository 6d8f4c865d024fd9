"""The public functions: the semantics a person relies on, on values worked out by hand."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from altgrad.errors import CodeError, DtypeError, FormatError, OptionError, RandomKeyError, ScaleError, UnderflowWarning
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.quantization import (
    E0M7,
    E1M6,
    E3M4,
    E4M3,
    E5M2,
    E7M0,
    FORMAT_REGISTRY,
    amax_scale,
    code_index,
    decode,
    encode,
    encode_with_stats,
    fake_quantize,
    from_code_index,
    get_format,
    implied_scale,
    quantize,
    quantize_with_stats,
)
from altgrad.quantization.pointwise import facts_of, nearest
from tests.quantization import oracles

SCALAR = [fmt for fmt in FORMAT_REGISTRY.values() if fmt.has_zero]
EIGHT_BIT = [fmt for fmt in SCALAR if fmt.bits == 8]
inf, nan = float("inf"), float("nan")


def same_bits(a, b) -> bool:
    return oracles.same_bits(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("nearest_even", [2.0, 2.0, 2.25, 2.5, -2.0, -2.5]),
        ("nearest_away", [2.0, 2.25, 2.25, 2.5, -2.25, -2.5]),
        ("toward_zero", [2.0, 2.0, 2.0, 2.25, -2.0, -2.25]),
        ("up", [2.25, 2.25, 2.25, 2.5, -2.0, -2.25]),
        ("down", [2.0, 2.0, 2.0, 2.25, -2.25, -2.5]),
        ("odd", [2.25, 2.25, 2.25, 2.25, -2.25, -2.25]),
    ],
)
def test_rounding_modes_on_ties_and_between(rounding, expected):
    x = torch.tensor([2.0625, 2.125, 2.1875, 2.375, -2.125, -2.375])
    assert quantize(x, "E4M3", rounding=rounding).tolist() == expected


def test_ties_of_a_format_without_mantissa_go_to_even_multiples():
    x = torch.tensor([3.0, 0.75, 1.4, -3.0, 2.0**-63, 1.1 * 2.0**-63])
    assert quantize(x, E7M0).tolist() == [4.0, 1.0, 1.0, -4.0, 0.0, 2.0**-62]


def test_overflow_is_decided_after_rounding():
    x = torch.tensor([448.0, 464.0, 464.001, 61439.0, 61440.0])
    assert quantize(x, "E4M3", overflow="inf").tolist() == [448.0, 448.0, inf, inf, inf]
    assert quantize(x, "E5M2").tolist() == [448.0, 448.0, 448.0, 57344.0, inf]


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("toward_zero", [57344.0, -57344.0]),
        ("up", [inf, -57344.0]),
        ("down", [57344.0, -inf]),
        ("odd", [57344.0, -57344.0]),
    ],
)
def test_native_overflow_of_formats_with_inf_follows_ieee_754(rounding, expected):
    assert quantize(torch.tensor([7e4, -7e4]), "E5M2", rounding=rounding).tolist() == expected


@pytest.mark.parametrize("fmt", SCALAR, ids=str)
@pytest.mark.parametrize("overflow", ["native", "saturate", "saturate_finite", "inf", "nan"])
@pytest.mark.parametrize("rounding", ["nearest_even", "up", "stochastic"])
def test_nan_stays_nan_and_inf_follows_the_policy(fmt, overflow, rounding):
    q = quantize(torch.tensor([nan, inf, -inf]), fmt, rounding=rounding, overflow=overflow, key=(1, 2))
    assert q[0].isnan()
    expected = {"saturate": [fmt.max, -fmt.max], "nan": [nan, nan]}.get(overflow, [inf, -inf])
    assert same_bits(q[1:], torch.tensor(expected))


def test_a_finite_value_whose_quotient_is_infinite_overflows():
    x = torch.tensor([1e30, -1e30])
    q, stats = quantize_with_stats(x, "E3M4", 1e-20, overflow="saturate")
    assert q.tolist() == pytest.approx([124e-20, -124e-20])
    assert float(stats.overflow) == 2
    assert quantize(x, "E5M2", 1e-20).tolist() == [inf, -inf]


@pytest.mark.parametrize("fmt", SCALAR, ids=str)
def test_sign_of_zero(fmt):
    q = quantize(torch.tensor([-0.0, 0.0, -1e-40]), fmt)
    if fmt.name in ("BF16", "TF32", "FP32"):
        q = q[:2]
    assert (q == 0).all()
    assert torch.signbit(q[0]) == fmt.has_negative_zero
    assert not torch.signbit(q[1])


def test_subnormals_off_leaves_one_gap():
    x = torch.tensor([2**-7, 1.01 * 2**-7, 2**-8, -0.9 * 2**-6, 2**-6 * 1.2])
    assert quantize(x, "E4M3", subnormals=False).tolist() == [0.0, 2**-6, 0.0, -(2**-6), quantize(x, "E4M3")[4]]
    assert quantize(x, "E4M3", subnormals=False, rounding="up").tolist()[:3] == [2**-6] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", [E3M4, E4M3, E0M7], ids=str)
def test_dtypes_shapes_and_layouts(dtype, fmt):
    base = (torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    expected = quantize(base.contiguous().double(), fmt).to(dtype)
    for view in (
        lambda t: t,
        lambda t: t.transpose(0, 2),
        lambda t: t[::2, :, 1:],
        lambda t: t[2, 3, 4],
        lambda t: t[:0],
    ):
        q = quantize(view(base), fmt)
        assert same_bits(q, view(expected))
    expanded = base[:1].expand(6, 4, 5)
    assert same_bits(quantize(expanded, fmt), expected[:1].expand(6, 4, 5))


def test_float64_is_rounded_once():
    just_above_tie = torch.tensor([2.125 + 2.0**-40], dtype=torch.float64)
    assert quantize(just_above_tie, "E4M3").item() == 2.25
    assert quantize(just_above_tie.float(), "E4M3").item() == 2.0


def test_out_and_in_place():
    x = torch.randn(3, 5)
    expected = quantize(x, "E4M3")
    buffer = torch.empty(5, 3).t()
    assert quantize(x, "E4M3", out=buffer) is buffer
    assert same_bits(buffer.contiguous(), expected)
    assert quantize(x, "E4M3", out=x) is x
    assert same_bits(x, expected)
    with pytest.raises(DtypeError, match="out is"):
        quantize(x, "E4M3", out=torch.empty(5, 3))


@pytest.mark.parametrize("fmt", [fmt for fmt in SCALAR if fmt.name != "FP32"], ids=str)  # FP32 has no code table
def test_decode_of_encode_is_quantize(fmt):
    x = torch.randn(400, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 4, 400)
    for scale in (1.0, torch.tensor(0.037), torch.rand(400) + 0.1):
        codes = encode(x, fmt, scale, overflow="saturate")
        assert codes.dtype == (torch.uint8 if fmt.bits <= 8 else torch.int32)
        expected = quantize(x, fmt, scale, overflow="saturate")
        assert same_bits(decode(codes, fmt, scale), expected)


@pytest.mark.parametrize("fmt", EIGHT_BIT, ids=str)
def test_every_code_survives_decode_and_encode(fmt):
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode(codes, fmt)
    usable = values.isfinite() | (values.isinf() & torch.tensor(fmt.has_inf))
    if fmt.twos_complement:
        usable &= codes != 0x80
    assert torch.equal(encode(values[usable], fmt), codes[usable])
    finite = values.isfinite() & usable
    index = code_index(codes[finite], fmt)
    assert torch.equal(torch.sort(index, stable=True)[1], torch.sort(values[finite], stable=True)[1])
    assert index.tolist() == [fmt.index_of(v) for v in values[finite].tolist()]
    back = from_code_index(index, fmt)
    assert torch.equal(decode(back, fmt), values[finite])


def test_amax_scaled_e0m7_and_e1m6_are_one_grid():
    for seed in range(20):
        x = torch.randn(999, generator=torch.Generator().manual_seed(seed)) * 10.0**seed / 1e10
        a = quantize(x, E0M7, amax_scale(x, E0M7), clamp=True)
        b = quantize(x, E1M6, amax_scale(x, E1M6), clamp=True)
        assert same_bits(a, b)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(EIGHT_BIT),
    st.floats(2.0**-60, 2.0**60, width=32),
    st.lists(st.integers(0, 5), max_size=3),
)
def test_quantizing_twice_changes_nothing(seed, fmt, scale, shape):
    power = 2.0 ** round(torch.log2(torch.tensor(scale)).item())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    once = quantize(x, fmt, power, overflow="saturate")
    assert once.shape == x.shape
    assert same_bits(quantize(once, fmt, power, overflow="saturate"), once)


def test_stochastic_rounding_is_a_function_of_key_and_position():
    x = torch.full((4096,), 1.03)
    first = quantize(x, "E4M3", rounding="stochastic", key=(7, 9))
    state = torch.get_rng_state()
    assert same_bits(first, quantize(x, "E4M3", rounding="stochastic", key=torch.tensor([7, 9])))
    assert torch.equal(state, torch.get_rng_state())
    assert set(first.tolist()) == {1.0, 1.125}
    assert first.mean().item() == pytest.approx(1.03, abs=4 * 0.125 / 2 / 64)
    assert not torch.equal(first, quantize(x, "E4M3", rounding="stochastic", key=(8, 9)))
    assert not torch.equal(first, quantize(x, "E4M3", rounding="stochastic", key=(7, 10)))
    assert same_bits(quantize(x.view(64, 64).t(), "E4M3", rounding="stochastic", key=(7, 9)).reshape(-1), first)


def test_gradients_pass_straight_through():
    x = torch.tensor([0.3, 500.0, -500.0, 448.0], requires_grad=True)
    fake_quantize(x, "E4M3").sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1]
    x.grad = None
    y = fake_quantize(x, "E4M3", mask_saturated=True)
    assert same_bits(y.detach(), quantize(x, "E4M3"))
    y.sum().backward()
    assert x.grad.tolist() == [1, 0, 0, 1]
    x.grad = None
    fake_quantize(x, "E4M3", 2.0, mask_saturated=True).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1]


def test_statistics_of_one_pass():
    x = torch.tensor([1.0, 500.0, -0.0001, 0.0, nan, inf, 2.2])
    q, stats = quantize_with_stats(x, "E4M3")
    assert same_bits(q, quantize(x, "E4M3"))
    assert stats.to_dict() == {
        "amax": 500.0,
        "count": 7.0,
        "overflow": 1.0,
        "underflow": 1.0,
        "nonfinite": 2.0,
        "sse": pytest.approx(52.0**2 + 0.0001**2 + (2.2 - 2.25) ** 2, rel=1e-6),
        "sum_sq": pytest.approx(1 + 500.0**2 + 2.2**2 + 1e-8, rel=1e-6),
    }
    codes, coded = encode_with_stats(x[:4], "E4M3")
    assert torch.equal(codes, encode(x[:4], "E4M3"))
    assert coded.to_dict()["overflow"] == 1
    assert float(quantize_with_stats(torch.empty(0), "E4M3")[1].overflow_rate) == 0
    assert float(quantize_with_stats(torch.ones(3), "E4M3")[1].sqnr_db) == inf


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: quantize(x.int(), "E4M3"), DtypeError, "int32.*cast"),
        (lambda x: quantize(x.half(), "E7M0"), DtypeError, "float16 cannot hold E7M0"),
        (lambda x: quantize(x.bfloat16(), "FP16"), DtypeError, "bfloat16 cannot hold FP16"),
        (lambda x: quantize(x, "E4M3", 0.0), ScaleError, "not positive"),
        (lambda x: quantize(x, "E4M3", -1.0), ScaleError, "not positive"),
        (lambda x: quantize(x, "E4M3", nan), ScaleError, "not positive"),
        (lambda x: quantize(x, "E4M3", 1e-60), ScaleError, "compute dtype"),
        (lambda x: quantize(x, "E4M3", torch.tensor([1.0, inf, 1.0])), ScaleError, "inf"),
        (lambda x: quantize(x, "E4M3", torch.tensor([1.0, nan, 1.0])), ScaleError, "nan"),
        (lambda x: quantize(x, "E4M3", torch.ones(2)), ScaleError, r"\[2\] does not broadcast to x of shape \[2, 3\]"),
        (lambda x: quantize(x, "E4M3", torch.ones(4, 2, 3)), ScaleError, "does not broadcast"),
        (lambda x: quantize(x, "E4M3", rounding="stochastic"), RandomKeyError, "needs key"),
        (lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1,)), RandomKeyError, "not \\(seed, stream\\)"),
        (lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1, 2**64)), RandomKeyError, "64 bits"),
        (lambda x: quantize(x, "E4M3", rounding="stochastic", key=(1, 2), random_bits=33), RandomKeyError, "1..32"),
        (lambda x: quantize(x, "E4M3", rounding="nearest"), OptionError, "nearest_even"),
        (lambda x: quantize(x, "E4M3", overflow="wrap"), OptionError, "saturate"),
        (lambda x: quantize(x, "E4M3", kernel="fast"), OptionError, "eager"),
        (lambda x: quantize(x, "E8M0"), FormatError, "scale format"),
        (lambda x: encode(torch.tensor([nan]), "E3M4"), CodeError, "no code for NaN"),
        (lambda x: encode(torch.tensor([inf]), "E4M3"), CodeError, "no code for inf"),
        (lambda x: encode(x, "E3M4", overflow="inf"), CodeError, "no code for inf"),
        (lambda x: decode(torch.tensor([64], dtype=torch.uint8), "E3M2"), CodeError, "64 is outside 0..63"),
        (lambda x: decode(torch.tensor([-1], dtype=torch.int32), "BF16"), CodeError, "-1 is outside"),
        (lambda x: decode(x, "E3M2"), CodeError, "dtype"),
        (lambda x: decode(torch.zeros(1, dtype=torch.uint8), "E7M0", dtype=torch.float16), DtypeError, "cannot hold"),
    ],
)
def test_errors_give_value_limit_and_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))


def test_formats_with_nan_or_inf_encode_them():
    assert decode(encode(torch.tensor([nan]), "E4M3"), "E4M3").isnan().all()
    assert decode(encode(torch.tensor([nan, inf, -inf]), "E5M2"), "E5M2")[1:].tolist() == [inf, -inf]
    assert encode(torch.tensor([1e9]), "E3M4").item() == get_format("E3M4").index_of(124.0)
    assert E5M2.has_inf


# -- scale="amax", and no scale ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["E4M3", "E3M4", "E0M7", "E5M2", "E7M0"])
def test_scale_amax_is_the_amax_scale_with_finite_quotients_clamped(fmt):
    x = torch.randn(257, generator=torch.Generator().manual_seed(1)) * 1e-3
    x[3], x[4] = torch.inf, torch.nan
    scale = amax_scale(x, fmt)
    assert same_bits(quantize(x, fmt, scale="amax"), quantize(x, fmt, scale, clamp=True))
    assert same_bits(fake_quantize(x, fmt, "amax"), quantize(x, fmt, scale, clamp=True))
    values, stats = quantize_with_stats(x, fmt, "amax")
    assert same_bits(values, quantize(x, fmt, scale, clamp=True))
    assert same_bits(stats.vector, quantize_with_stats(x, fmt, scale, clamp=True)[1].vector)
    finite = x[5:]
    packed = encode(finite, fmt, scale="amax")
    assert packed.scales == amax_scale(finite, fmt)
    assert packed.storage_bits == 252 * get_format(fmt).bits + 32
    assert same_bits(decode(packed), quantize(finite, fmt, scale="amax"))


@pytest.mark.parametrize("fmt", ["MXFP8", "NVFP4"])
def test_block_formats_find_their_scales_with_amax_as_without(fmt):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * 1e-3
    assert same_bits(quantize(x, fmt, scale="amax"), quantize(x, fmt))


def test_another_text_for_a_scale_is_refused():
    with pytest.raises(ScaleError, match="'max' is no scale; give a positive number, a tensor, or \"amax\""):
        quantize(torch.ones(3), "E4M3", "max")


def test_one_warning_says_that_most_of_a_tensor_underflows_where_no_scale_was_given(monkeypatch):
    monkeypatch.setattr(implied_scale, "_looks_left", implied_scale.LOOKS)
    small = torch.full((5000,), 0.01)
    small[:2000] = 1.0
    quantize(small, "E3M4", 1.0)  # which is meant
    quantize(small[:3000], "E3M4")  # two thirds survive
    with pytest.warns(UnderflowWarning, match=r"6\d% of the nonzero elements underflow to 0 in E3M4 at scale 1"):
        encode(small, "E3M4")
    quantize(small, "E3M4")  # said once


@pytest.mark.parametrize("call", [quantize, encode, fake_quantize, quantize_with_stats, encode_with_stats])
def test_the_warning_counts_nonzero_elements_and_names_the_callers_line(call, monkeypatch):
    monkeypatch.setattr(implied_scale, "_looks_left", implied_scale.LOOKS)
    mostly_zero = torch.zeros(100)
    mostly_zero[:3] = 0.001
    with pytest.warns(UnderflowWarning, match="100% of the nonzero") as said:
        call(mostly_zero, "E3M4")
    assert said[0].filename == __file__


@pytest.mark.parametrize("fmt", [f for f in SCALAR if facts_of(f, f, Rounding.NEAREST_EVEN, Overflow.NATIVE)], ids=str)
def test_rounding_in_pointwise_operations_has_the_kernels_bits(fmt):
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int32, generator=generator).view(torch.float32)
    near = torch.randn(4000, generator=generator) * torch.exp2(torch.arange(4000) % 48 - 24)
    edges = torch.tensor([0.0, -0.0, inf, -inf, nan, fmt.max, fmt.max * 1.04, fmt.min_subnormal / 2])
    for dtype in (torch.float32, torch.bfloat16) if fmt.significant_bits <= 8 and fmt.bits <= 8 else (torch.float32,):
        x = torch.cat([any_bits, near, edges]).to(dtype)
        for overflow in Overflow:
            facts = facts_of(fmt, fmt, Rounding.NEAREST_EVEN, overflow)
            for scale in (1.0, 0.3, 2.0**-126, 3e37) if facts else ():
                expected = quantize(x, fmt, scale, overflow=overflow)
                assert same_bits(nearest(x, scale, facts), expected), (dtype, overflow, scale)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler's own
def test_a_compiler_fuses_nearest_rounding_with_what_goes_before():
    def call(x):
        y = torch.nn.functional.gelu(x)
        return y, quantize(y, "E4M3", 0.3, overflow="saturate_finite")

    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) * 300
    x[0, :3] = torch.tensor([nan, inf, -0.0])
    (y, rounded), (code,) = run_and_get_code(torch.compile(call, fullgraph=True), x)
    assert same_bits(rounded, quantize(y, "E4M3", 0.3, overflow="saturate_finite"))
    assert ["gelu" in name for name in set(re.findall(r"cpp_fused_\w+", code))] == [True], "one kernel, for both"
    assert "altgrad" not in code
