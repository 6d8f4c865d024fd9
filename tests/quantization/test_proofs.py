"""Proofs on all values: against search in float64, and against gfloat, ml_dtypes and torch."""

import math
import re
from pathlib import Path

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch

from altgrad.errors import DtypeError
from altgrad.quantization import FP32, Overflow, Rounding, decode, encode, get_format, quantize
from altgrad.quantization.checks import check_dtype
from altgrad.quantization.codec import value_table
from tests.quantization.oracles import (
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


ML_DTYPES = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "E4M3B11FNUZ": ml_dtypes.float8_e4m3b11fnuz,
    "E4M3_IEEE": ml_dtypes.float8_e4m3,
    "E3M4_IEEE": ml_dtypes.float8_e3m4,
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "BF16": ml_dtypes.bfloat16,
    "FP16": np.float16,
}
TORCH = {
    "E4M3": torch.float8_e4m3fn,
    "E5M2": torch.float8_e5m2,
    "E4M3FNUZ": torch.float8_e4m3fnuz,
    "E5M2FNUZ": torch.float8_e5m2fnuz,
    "BF16": torch.bfloat16,
    "FP16": torch.float16,
}
GFLOAT = {
    "E4M3": gfloat.formats.format_info_ocp_e4m3,
    "E5M2": gfloat.formats.format_info_ocp_e5m2,
    "E2M1": gfloat.formats.format_info_ocp_e2m1,
    "E2M3": gfloat.formats.format_info_ocp_e2m3,
    "E3M2": gfloat.formats.format_info_ocp_e3m2,
    "BF16": gfloat.formats.format_info_bfloat16,
    "FP16": gfloat.formats.format_info_binary16,
}
MODES = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}


def inputs(fmt) -> torch.Tensor:
    return torch.cat([random_patterns(20000, 1), dense_around(fmt, 20000, 2), all_patterns(torch.bfloat16).float()])


def comparable(x: torch.Tensor, fmt) -> torch.Tensor:
    """Inputs whose overflow the judge treats as we do: all for formats with inf, else those that stay in range."""
    if fmt.has_inf:
        return x
    return x[x.abs() <= fmt.max] if not fmt.has_nan else x[(x.abs() <= fmt.max) | x.isnan()]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_ml_dtypes_casts(name):
    fmt = get_format(name)
    x = comparable(inputs(fmt), fmt)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(x.numpy().astype(ML_DTYPES[name]).astype(np.float32))
        assert_same_bits(quantize(x, fmt), expected, x)


def test_float64_is_rounded_once():
    """NumPy rounds float64 to float16 directly; through float32 these halfway cases would round twice."""
    fmt = get_format("FP16")
    x = inputs(fmt).double() * (1 + 2.0**-40)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(x.numpy().astype(np.float16).astype(np.float64))
    assert_same_bits(quantize(x, fmt), expected, x)
    twice = torch.tensor([1 + 2.0**-11 + 2.0**-30], dtype=torch.float64)
    assert quantize(twice, fmt) != quantize(twice.float(), fmt).double()


@pytest.mark.parametrize("name", [n for n in ML_DTYPES if n not in ("BF16", "FP16")])
def test_ml_dtypes_codes(name):
    fmt = get_format(name)
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    theirs = codes.view(ML_DTYPES[name]).astype(np.float64)
    ours = value_table(fmt)
    assert np.array_equal(theirs, ours, equal_nan=True)
    finite = torch.from_numpy(codes[np.isfinite(ours)])
    again = encode(decode(finite, fmt), fmt)
    assert torch.equal(again, finite)


@pytest.mark.parametrize("name", TORCH)
def test_torch_casts(name):
    fmt = get_format(name)
    x = comparable(inputs(fmt), fmt)
    assert_same_bits(quantize(x, fmt), x.to(TORCH[name]).float(), x)
    if fmt.bits == 8:
        x = x[torch.isfinite(x)]
        x = x[x.abs() <= fmt.max]
        assert torch.equal(encode(x, fmt), x.to(TORCH[name]).view(torch.uint8))


def test_torchs_cast_to_e4m3_is_what_the_docs_say():
    said = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text(encoding="utf-8")
    claim = re.search(
        r"torch (\S+) saturates E4M3 on the CPU\s+\(465, 1000 and inf give 448\) and other versions and devices", said
    )
    found = torch.tensor([465.0, 1000.0, math.inf]).to(torch.float8_e4m3fn).float()
    if torch.__version__.startswith(claim[1] + "."):
        assert found.tolist() == [448, 448, 448]
    else:
        assert bool((found.isnan() | (found == 448)).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GFLOAT)
def test_gfloat_rounding(name, mode):
    fmt = get_format(name)
    x = torch.cat([random_patterns(3000, 3), dense_around(fmt, 5000, 4)])
    x = x if fmt.has_nan else x[~x.isnan()]
    x = x[torch.isfinite(x) | x.isnan()]  # gfloat has no inf for formats without it
    with np.errstate(all="ignore"):
        expected = gfloat.round_ndarray(GFLOAT[name], x.double().numpy(), MODES[mode], sat=True)
    found = quantize(x.double(), fmt, rounding=mode, overflow="saturate")
    assert_same_bits(found, torch.from_numpy(np.asarray(expected)), x)


@pytest.mark.parametrize("precision", range(1, 8))
def test_p3109_values_are_gfloats(precision):
    theirs = gfloat.formats.format_info_p3109(8, precision)
    ours = value_table(get_format(f"binary8p{precision}"))
    values = np.array([gfloat.decode_float(theirs, code).fval for code in range(256)])
    assert np.array_equal(values, ours, equal_nan=True)
