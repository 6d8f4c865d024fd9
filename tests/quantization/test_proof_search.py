"""Proof: the eager and the CPU kernel against the oracle, on all 16-bit inputs, critical points and random patterns."""

import pytest
import torch

from altgrad.errors import DtypeError
from altgrad.quantization import FP32, Overflow, Rounding, get_format, quantize
from altgrad.quantization.checks import check_dtype
from tests.quantization.kernels.samples import (
    DETERMINISTIC,
    EIGHT_BIT_FORMATS,
    LISTED_FORMATS,
    all_patterns,
    assert_same_bits,
    critical_points,
    dense_around,
    random_patterns,
)

POLICIES = list(Overflow)
KEY = (20240229, -7)


def check(x, fmt, scale=1.0, kernels=("cpu", "eager"), **options):
    expected = quantize(x, fmt, scale, kernel="reference", **options)
    for kernel in kernels:
        assert_same_bits(quantize(x, fmt, scale, kernel=kernel, **options), expected, x)


def holds(dtype, fmt) -> bool:
    try:
        check_dtype(dtype, fmt)
    except DtypeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", LISTED_FORMATS, ids=str)
def test_every_16_bit_input(fmt, dtype):
    if not holds(dtype, fmt):
        with pytest.raises(DtypeError):
            quantize(torch.zeros(1, dtype=dtype), fmt)
        return
    x = all_patterns(dtype)
    for rounding in DETERMINISTIC:
        check(x, fmt, rounding=rounding, kernels=("cpu",))
    check(x, fmt, 0.37, overflow="saturate", clamp=True)
    check(x, fmt, rounding="stochastic", key=KEY, overflow="inf", kernels=("cpu",))


@pytest.mark.parametrize("fmt", EIGHT_BIT_FORMATS, ids=str)
def test_every_critical_point(fmt):
    x = critical_points(fmt)
    for rounding in DETERMINISTIC:
        for overflow in POLICIES:
            check(x, fmt, rounding=rounding, overflow=overflow, kernels=("cpu", "eager"))
            check(x, fmt, rounding=rounding, overflow=overflow, clamp=True, kernels=("cpu",))
    for overflow in POLICIES:
        check(x, fmt, rounding="stochastic", key=KEY, overflow=overflow)
        check(x.double() * (1 + 2**-40), fmt, rounding="nearest_even", overflow=overflow)


@pytest.mark.parametrize("fmt", LISTED_FORMATS, ids=str)
def test_random_patterns(fmt):
    x = torch.cat([random_patterns(3000, 1), dense_around(fmt, 3000, 2)])
    for rounding in Rounding:
        key = KEY if rounding is Rounding.STOCHASTIC else None
        for overflow in POLICIES:
            check(x, fmt, rounding=rounding, overflow=overflow, key=key, kernels=("cpu",))
        check(x, fmt, 0.0625, rounding=rounding, key=key, kernels=("cpu",))
        check(x, fmt, 3.3e-3, rounding=rounding, key=key)
        check(x.double() * (1 + 2**-30), fmt, 3.3e-3, rounding=rounding, key=key, kernels=("cpu",))


@pytest.mark.parametrize("fmt", [f for f in LISTED_FORMATS if f.bias is not None and f.mantissa_bits], ids=str)
def test_without_subnormals(fmt):
    points = critical_points(fmt)
    x = torch.cat([points[:: 1 + len(points) // 2000], dense_around(fmt, 1000, 3)])
    for rounding in Rounding:
        key = KEY if rounding is Rounding.STOCHASTIC else None
        check(x, fmt, rounding=rounding, key=key, subnormals=False)


@pytest.mark.parametrize("random_bits", [1, 2, 8, 16, 23, 24, 25, 32])
def test_random_bits(random_bits):
    for name in ("E4M3", "E0M7", "E7M0", "FP16", "BF16"):
        fmt = get_format(name)
        x = torch.cat([random_patterns(500, 4), dense_around(fmt, 2000, 5), critical_points(fmt)[:300]])
        check(x, fmt, 0.7, rounding="stochastic", key=KEY, random_bits=random_bits)
        check(x.double(), fmt, 0.7, rounding="stochastic", key=KEY, random_bits=random_bits)


def test_formats_below_float32s_normal_range():
    for fmt in (
        type(FP32)("low", 4, 3, 140),
        type(FP32)("lower", 2, 6, 143),
        type(FP32)("high", 3, 2, -119),
    ):
        x = torch.cat([critical_points(fmt)[::3], random_patterns(2000, 6), dense_around(fmt, 2000, 7)])
        for rounding in Rounding:
            key = KEY if rounding is Rounding.STOCHASTIC else None
            check(x, fmt, rounding=rounding, key=key)


def test_fp32_is_the_identity():
    x = random_patterns(20000, 8)
    for rounding in DETERMINISTIC:
        for kernel in ("cpu", "eager"):
            assert_same_bits(quantize(x, FP32, rounding=rounding, kernel=kernel), x, x)
