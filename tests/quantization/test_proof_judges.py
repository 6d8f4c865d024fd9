"""Proof by outside judges: ml_dtypes, gfloat and torch casts, wherever their semantics are ours.

Where they are not: ml_dtypes turns overflow of formats without inf into NaN (E4M3, all fnuz formats), torch that of the fnuz
formats (and of E4M3 in some versions and devices), while `native` saturates here: compared within range only. gfloat rounds float64 and saturates on request.
"""

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch

from altgrad.quantization import decode, encode, get_format, quantize
from altgrad.quantization.codec import value_table
from tests.quantization.kernels.samples import all_patterns, assert_same_bits, dense_around, random_patterns

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
