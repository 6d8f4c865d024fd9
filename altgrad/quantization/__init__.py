"""Numerics: number formats and functions of (tensor, format); no modules, no training, no files."""

from altgrad.quantization.catalog import (
    BF16,
    E0M7,
    E1M6,
    E2M5,
    E3M4,
    E4M3,
    E5M2,
    E6M1,
    E7M0,
    FORMAT_REGISTRY,
    FP16,
    FP32,
    TF32,
    get_format,
)
from altgrad.quantization.codec import code_index, from_code_index
from altgrad.quantization.formats import FloatFormat, FP8Format, Specials
from altgrad.quantization.observer import Observer
from altgrad.quantization.ops import (
    decode,
    encode,
    encode_with_stats,
    fake_quantize,
    quantize,
    quantize_with_stats,
)
from altgrad.quantization.rounding import Overflow, Rounding
from altgrad.quantization.scaling import (
    CurrentScaling,
    DelayedScaling,
    NoScaling,
    StaticScaling,
    amax,
    amax_scale,
    scale_from_amax,
)
from altgrad.quantization.stats import QuantStats

__all__ = [
    "BF16",
    "CurrentScaling",
    "DelayedScaling",
    "E0M7",
    "E1M6",
    "E2M5",
    "E3M4",
    "E4M3",
    "E5M2",
    "E6M1",
    "E7M0",
    "FORMAT_REGISTRY",
    "FP16",
    "FP32",
    "FP8Format",
    "FloatFormat",
    "NoScaling",
    "Observer",
    "Overflow",
    "QuantStats",
    "Rounding",
    "Specials",
    "StaticScaling",
    "TF32",
    "amax",
    "amax_scale",
    "code_index",
    "decode",
    "encode",
    "encode_with_stats",
    "fake_quantize",
    "from_code_index",
    "get_format",
    "quantize",
    "quantize_with_stats",
    "scale_from_amax",
]
