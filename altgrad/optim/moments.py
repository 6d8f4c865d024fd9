"""Optimizer moments kept in a number format: how a moment is stored between steps, and read back.

Formats of at most 8 bits are stored as uint8 codes, BF16 and FP16 as the torch dtypes, so the memory is really saved;
other formats are stored as float32 values on the grid. Formats with fewer than 8 exponent bits get a power-of-two
scale from the moment's amax at each step. An exponential average changes by at most (1 - beta) of its distance to the
new value: where that is below half a grid step, nearest rounding never lets it move, and stochastic rounding does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.errors import OptionError
from altgrad.optim.grid import scalar_format
from altgrad.quantization import FloatFormat, Overflow, Rounding, amax_scale, decode, encode, quantize

_NATIVE = {"BF16": torch.bfloat16, "FP16": torch.float16}
MOMENT_ROUNDINGS = (Rounding.NEAREST_EVEN.value, Rounding.STOCHASTIC.value)


def moment_format(name: str | FloatFormat | None) -> FloatFormat | None:
    """The format that a moment is kept in; None (also for "FP32") keeps it in the compute dtype."""
    if name is None:
        return None
    fmt = scalar_format(name)
    return None if fmt.name == "FP32" else fmt


def moment_formats(option) -> tuple[FloatFormat | None, FloatFormat | None]:
    """(first moment's, second moment's) format from one name for both, or a pair of names.

    Raises:
        OptionError: neither.
    """
    if option is None or isinstance(option, str | FloatFormat):
        return moment_format(option), moment_format(option)
    if isinstance(option, list | tuple) and len(option) == 2:
        return moment_format(option[0]), moment_format(option[1])
    raise OptionError(f"moment_format {option!r} is neither a format nor a pair (first moment, second moment)")


def has_scale(fmt: FloatFormat) -> bool:
    """Whether a moment of this format carries an amax scale."""
    return fmt.exponent_bits < 8


def create(state: dict, name: str, like: Tensor, fmt: FloatFormat | None) -> None:
    """Put a zero moment of `like`'s shape under `name` into a parameter's state, unless it is there."""
    if name in state:
        return
    if fmt is None:
        dtype = like.dtype
    else:
        dtype = torch.uint8 if fmt.bits <= 8 else _NATIVE.get(fmt.name, torch.float32)
    state[name] = torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)
    if fmt is not None and has_scale(fmt):
        state[f"{name}_scale"] = torch.ones((), dtype=torch.float32, device=like.device)


def read(state: dict, name: str, like: Tensor, fmt: FloatFormat | None) -> Tensor:
    """The moment in `like`'s dtype: the state's own tensor where no format is set, else a decoded copy."""
    stored = state[name]
    if fmt is None:
        return stored
    scale = state[f"{name}_scale"] if has_scale(fmt) else 1.0
    if fmt.bits <= 8:
        return decode(stored, fmt, scale, dtype=like.dtype)
    return stored.to(like.dtype) * scale


def write(
    state: dict, name: str, value: Tensor, fmt: FloatFormat | None, rounding: str, key: tuple[int, int] | None
) -> None:
    """Store the moment; a no-op where no format is set (it was updated in place).

    Args:
        key: (seed, stream) of stochastic rounding.

    Raises:
        CodeError: a moment is NaN and its format has no NaN code.
    """
    if fmt is None:
        return
    scale: Tensor | float = 1.0
    if has_scale(fmt):
        scale = amax_scale(value, fmt, power_of_two=True).to(torch.float32)
        state[f"{name}_scale"].copy_(scale)
    options = {"rounding": rounding, "overflow": Overflow.SATURATE, "key": key if rounding == "stochastic" else None}
    if fmt.bits <= 8:
        state[name].copy_(encode(value, fmt, scale, **options))
    else:
        quantized = quantize(value, fmt, scale, **options)
        state[name].copy_(quantized / scale if has_scale(fmt) else quantized)
