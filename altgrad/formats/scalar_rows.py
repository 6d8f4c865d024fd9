"""The rows of the scalar formats: each with its facts and the source that it follows.

Standards disagree (there are three E4M3s and two E3M4s), so each row names the one it follows and `note` says what the
name does not mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from altgrad.formats.scalar import FloatFormat, Specials

_OFP8 = "OCP 8-bit Floating Point Specification (OFP8) 1.0"
_MX = "OCP Microscaling Formats (MX) Specification 1.0"
_IEEE = "IEEE 754-2019"
_SPLIT = "AltGrad, finite-only split of the bits"
_ML_DTYPES = "ml_dtypes"
_FNUZ = "Noune et al. 2022, arXiv:2206.02915; ml_dtypes"
_P3109 = "IEEE SA P3109 interim report, signed extended domain; gfloat"

E0M7 = FloatFormat(
    "E0M7", 0, 7, None, source=_SPLIT, aliases=("fp8_e0m7",), note="k/128, sign and magnitude: a uniform grid"
)
E1M6 = FloatFormat(
    "E1M6", 1, 6, 0, source=_SPLIT, aliases=("fp8_e1m6",), note="the uniform grid of E0M7, four times as wide"
)
E2M5 = FloatFormat("E2M5", 2, 5, 1, source=_SPLIT, aliases=("fp8_e2m5",))
E3M4 = FloatFormat(
    "E3M4",
    3,
    4,
    1,
    source=_SPLIT,
    aliases=("fp8_e3m4",),
    note="bias 1, finite only; ml_dtypes' float8_e3m4 is E3M4_IEEE",
)
E4M3 = FloatFormat(
    "E4M3",
    4,
    3,
    7,
    Specials.NAN_ONLY,
    source=_OFP8,
    aliases=("fp8_e4m3", "float8_e4m3fn", "e4m3fn", "fp8_e4m3fn"),
    note="NaN at S.1111.111, no inf; ml_dtypes' float8_e4m3 is E4M3_IEEE",
)
E5M2 = FloatFormat("E5M2", 5, 2, 15, Specials.IEEE, source=_OFP8, aliases=("fp8_e5m2", "float8_e5m2"))
E6M1 = FloatFormat("E6M1", 6, 1, 31, source=_SPLIT, aliases=("fp8_e6m1",))
E7M0 = FloatFormat(
    "E7M0", 7, 0, 63, source=_SPLIT, aliases=("fp8_e7m0",), note="powers of two only; exponent field 0 is zero"
)

BF16 = FloatFormat(
    "BF16", 8, 7, 127, Specials.IEEE, source="Intel BFLOAT16 numerics definition, 2018", aliases=("bfloat16", "E8M7")
)
FP16 = FloatFormat(
    "FP16", 5, 10, 15, Specials.IEEE, source=f"{_IEEE} binary16", aliases=("float16", "half", "E5M10", "binary16")
)
TF32 = FloatFormat(
    "TF32", 8, 10, 127, Specials.IEEE, source="NVIDIA A100 whitepaper, 2020", aliases=("tensorfloat32", "E8M10")
)
FP32 = FloatFormat(
    "FP32", 8, 23, 127, Specials.IEEE, source=f"{_IEEE} binary32", aliases=("float32", "float", "E8M23", "binary32")
)

SCALAR_ROWS: tuple[FloatFormat, ...] = (
    E0M7,
    E1M6,
    E2M5,
    E3M4,
    E4M3,
    E5M2,
    E6M1,
    E7M0,
    BF16,
    FP16,
    TF32,
    FP32,
    # the other splits of 16 bits
    FloatFormat("E0M15", 0, 15, None, source=_SPLIT),
    FloatFormat("E1M14", 1, 14, 0, source=_SPLIT),
    FloatFormat("E2M13", 2, 13, 1, source=_SPLIT),
    FloatFormat("E3M12", 3, 12, 3, source=_SPLIT),
    FloatFormat("E4M11", 4, 11, 7, source=_SPLIT),
    FloatFormat("E6M9", 6, 9, 31, source=_SPLIT),
    FloatFormat("E7M8", 7, 8, 63, source=_SPLIT),
    # OCP MX elements and scale
    FloatFormat("E3M2", 3, 2, 3, source=_MX, aliases=("fp6_e3m2", "float6_e3m2fn")),
    FloatFormat("E2M3", 2, 3, 1, source=_MX, aliases=("fp6_e2m3", "float6_e2m3fn")),
    FloatFormat("E2M1", 2, 1, 1, source=_MX, aliases=("fp4", "fp4_e2m1", "float4_e2m1fn")),
    FloatFormat(
        "E8M0",
        8,
        0,
        127,
        Specials.NAN_ONLY,
        signed=False,
        has_zero=False,
        source=_MX,
        aliases=("ue8m0", "float8_e8m0fnu"),
        note="unsigned power-of-two scale, no zero; a scale format, not an element format",
    ),
    FloatFormat(
        "INT8",
        1,
        6,
        1,
        twos_complement=True,
        source=_MX,
        aliases=("mxint8_element",),
        note="two's complement k/64; quantization uses the symmetric range |k| <= 127 (MX 1.0, 5.3.4), code 0x80 decodes to -2",
    ),
    # AMD/Graphcore "fnuz" and Google's bias-11 variant
    FloatFormat("E4M3FNUZ", 4, 3, 8, Specials.FNUZ, source=_FNUZ, aliases=("float8_e4m3fnuz",)),
    FloatFormat("E5M2FNUZ", 5, 2, 16, Specials.FNUZ, source=_FNUZ, aliases=("float8_e5m2fnuz",)),
    FloatFormat("E4M3B11FNUZ", 4, 3, 11, Specials.FNUZ, source=_ML_DTYPES, aliases=("float8_e4m3b11fnuz", "E4M3B11")),
    # IEEE-style 8-bit formats as ml_dtypes has them
    FloatFormat(
        "E4M3_IEEE", 4, 3, 7, Specials.IEEE, source=_ML_DTYPES, aliases=("float8_e4m3",), note="has inf; max 240"
    ),
    FloatFormat(
        "E3M4_IEEE",
        3,
        4,
        3,
        Specials.IEEE,
        source=_ML_DTYPES,
        aliases=("float8_e3m4",),
        note="has inf; bias 3, max 15.5",
    ),
    # P3109: precision p leaves 8 - p exponent bits
    *(
        FloatFormat(
            f"binary8p{p}", 8 - p, p - 1, 2 ** (7 - p), Specials.P3109, source=_P3109, aliases=(f"p3109_k8p{p}se",)
        )
        for p in range(1, 8)
    ),
)

FORMAT_REGISTRY: Mapping[str, FloatFormat] = MappingProxyType({row.name: row for row in SCALAR_ROWS})
