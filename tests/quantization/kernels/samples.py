"""Inputs and comparisons that the kernel and proof tests share."""

from __future__ import annotations

import numpy as np
import torch

from altgrad.formats.rounding import Rounding
from altgrad.quantization import FORMAT_REGISTRY, FloatFormat

ELEMENT_FORMATS = [fmt for fmt in FORMAT_REGISTRY.values() if fmt.has_zero]
LISTED_FORMATS = [fmt for fmt in ELEMENT_FORMATS if fmt.bits <= 19]
EIGHT_BIT_FORMATS = [fmt for fmt in ELEMENT_FORMATS if fmt.bits <= 8]
DETERMINISTIC = [mode for mode in Rounding if mode is not Rounding.STOCHASTIC]
SPECIALS = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a floating tensor, every NaN made the same."""
    canonical = torch.where(torch.isnan(x), torch.full_like(x, torch.nan), x)
    return canonical.contiguous().view(_INTEGERS[x.element_size()])


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor | None = None) -> None:
    """Equality of every bit, NaN payloads apart; a failure shows the first element that differs."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    wrong = (bits(found) != bits(expected)).flatten().nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        given = "" if x is None else f" from {x.flatten()[i].item()!r}"
        raise AssertionError(
            f"{len(wrong)} of {found.numel()} differ; element {i}{given}: "
            f"{found.flatten()[i].item()!r} instead of {expected.flatten()[i].item()!r}"
        )


def random_patterns(count: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Floats of uniformly random bit patterns: all magnitudes, subnormals, inf and NaN."""
    words = np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)
    integers = {torch.float32: np.uint32, torch.float64: np.uint64}.get(dtype, np.uint16)
    signed = {np.uint32: np.int32, np.uint64: np.int64, np.uint16: np.int16}[integers]
    return torch.from_numpy(words.astype(integers).view(signed)).view(dtype)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def critical_points(fmt: FloatFormat) -> torch.Tensor:
    """Every value and every midpoint of neighbours, the overflow threshold's too, each with its float32 neighbours."""
    values = fmt.values()
    top = values[-1] + fmt.ulp(values[-1])
    ladder = np.concatenate([[-top], values, [top, 2 * top]])
    with np.errstate(over="ignore"):
        points = np.concatenate([ladder, (ladder[1:] + ladder[:-1]) / 2]).astype(np.float32)
        around = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    return torch.from_numpy(np.concatenate([*around, np.array(SPECIALS, np.float32)]))


def dense_around(fmt: FloatFormat, count: int, seed: int) -> torch.Tensor:
    """Random float32 values whose magnitudes lie in and around the format's range."""
    generator = np.random.default_rng(seed)
    exponents = generator.uniform(np.log2(fmt.min_subnormal) - 3, np.log2(fmt.max) + 2, count)
    with np.errstate(over="ignore", under="ignore"):
        x = np.exp2(exponents) * generator.choice([-1.0, 1.0], count)
        return torch.from_numpy(x.astype(np.float32))
