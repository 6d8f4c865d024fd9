"""Powers of two from the bits of floats: exact on every device, where log2 and pow are not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EXPONENT_FIELD = {torch.float32: (torch.int32, 0xFF << 23), torch.float64: (torch.int64, 0x7FF << 52)}


def floor_log2(x: Tensor) -> Tensor:
    """floor(log2|x|) as int64, by frexp: float log2 can be one off next to a power of two. 0, inf and NaN give -1."""
    return torch.frexp(x)[1].to(torch.int64) - 1


def leading_power(x: Tensor) -> Tensor:
    """2^floor(log2|x|) of float32 or float64 numbers, in their dtype; 0 for zero and subnormals, inf for inf and NaN."""
    integers, field = _EXPONENT_FIELD[x.dtype]
    return (x.view(integers) & field).view(x.dtype)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, for -1022 <= exponent <= 1023."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def factor_of(scale: float, powers: tuple[int, int], device: torch.device) -> Tensor | None:
    """m of a scale m * 2^p, 0-d float32; None where it is 1. 1 <= m < 2 unless p is clamped to the lowest or highest power."""
    low, high = powers
    m = math.ldexp(scale, -min(max(math.frexp(scale)[1] - 1, low), high))
    return None if m == 1 else torch.full((), m, dtype=torch.float32, device=device)
