"""Numerics: number formats and functions of (tensor, format); no modules, no training, no files."""

from altgrad.formats.accumulator import ACCUMULATORS, Accumulator
from altgrad.formats.block import BlockFormat, ScaleRule
from altgrad.formats.catalog import BLOCK_FORMATS, block_format, get_format
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat, FP8Format, Specials
from altgrad.formats.scalar_rows import (
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
)
from altgrad.quantization import operators as operators  # registers them
from altgrad.quantization.accumulation import accumulate
from altgrad.quantization.advanced_diagnostics import (
    compute_stiffness_field,
    compute_ulp_distance,
    gradient_stiffness_correlation,
    grid_alignment_error,
    grid_alignment_statistics,
    grid_index,
    grid_spacing,
    ulp_statistics,
)
from altgrad.quantization.cast import Cast
from altgrad.quantization.codec import code_index, from_code_index
from altgrad.quantization.observer import Observer
from altgrad.quantization.ops import (
    block_scales,
    decode,
    encode,
    encode_with_stats,
    fake_quantize,
    quantize,
    quantize_with_stats,
)
from altgrad.quantization.quantized import Quantized, QuantizedTensor, Want
from altgrad.quantization.scaling import (
    CurrentScaling,
    DelayedScaling,
    NoScaling,
    StaticScaling,
    amax,
    amax_scale,
    scale_from_amax,
)
from altgrad.quantization.stability import EmergencyMantissaShift, PartitionRelativeClipper
from altgrad.quantization.stats import QuantStats

NUMERICS_VERSION = "2"
"""Part of every run's identity; raised whenever a change of the numerics changes results."""

__all__ = [
    "ACCUMULATORS",
    "BF16",
    "BLOCK_FORMATS",
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
    "NUMERICS_VERSION",
    "TF32",
    "Accumulator",
    "BlockFormat",
    "Cast",
    "CurrentScaling",
    "DelayedScaling",
    "EmergencyMantissaShift",
    "FP8Format",
    "FloatFormat",
    "NoScaling",
    "Observer",
    "Overflow",
    "PartitionRelativeClipper",
    "QuantStats",
    "Quantized",
    "QuantizedTensor",
    "Rounding",
    "ScaleRule",
    "Specials",
    "StaticScaling",
    "Want",
    "accumulate",
    "amax",
    "amax_scale",
    "block_format",
    "block_scales",
    "code_index",
    "compute_stiffness_field",
    "compute_ulp_distance",
    "decode",
    "encode",
    "encode_with_stats",
    "fake_quantize",
    "from_code_index",
    "get_format",
    "gradient_stiffness_correlation",
    "grid_alignment_error",
    "grid_alignment_statistics",
    "grid_index",
    "grid_spacing",
    "quantize",
    "quantize_with_stats",
    "scale_from_amax",
    "ulp_statistics",
]
