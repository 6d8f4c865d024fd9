"""Codes and their values: decoding tables, ordered indices, and the checks that a value has a code.

A code is the bit pattern of `fmt.bits` bits, held in uint8 (formats of at most 8 bits) or int32. The ordered index counts
grid steps from zero: sign * magnitude code, so +0 and -0 share 0 and neighbours differ by 1.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from altgrad.errors import CodeError, FormatError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.scalar import FloatFormat, Specials
from altgrad.jit.subnormals import gradual_underflow
from altgrad.quantization.memory import check_dense

CODE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def code_dtype(fmt: FloatFormat) -> torch.dtype:
    """uint8 for formats of at most 8 bits, else int32."""
    return torch.uint8 if fmt.bits <= 8 else torch.int32


@cache
def value_table(fmt: FloatFormat) -> np.ndarray:
    """Value of every code 0 .. 2^bits - 1 as read-only float64; NaN and inf where the code says so.

    Raises:
        FormatError: the format has more than 2^19 codes.
    """
    magnitudes = fmt.magnitudes()
    half = 2**fmt.magnitude_bits
    positive = np.full(half, np.nan)
    positive[: len(magnitudes)] = magnitudes
    if fmt.specials is Specials.IEEE:
        positive[len(magnitudes)] = np.inf
    elif fmt.specials is Specials.P3109:
        positive[-1] = np.inf
    if not fmt.signed:
        table = positive
    elif fmt.twos_complement:
        table = np.concatenate([positive, -2 * positive[half // 2 : half // 2 + 1], -positive[:0:-1]])
    else:
        negative = -positive
        if fmt.specials in (Specials.FNUZ, Specials.P3109):
            negative[0] = np.nan
        table = np.concatenate([positive, negative])
    table.setflags(write=False)
    return table


@lru_cache(maxsize=64)
def value_tensor(fmt: FloatFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`value_table` as a tensor; shared, not to be written."""
    with gradual_underflow():
        return torch.from_numpy(value_table(fmt).copy()).to(dtype).to(device)


def stored_scale_dtype(fmt: BlockFormat) -> torch.dtype:
    """What a block format's scales are stored in: float32, or codes of the scale format."""
    return torch.float32 if fmt.has_float_scale else code_dtype(fmt.scale_format)


def divided(x: Tensor, by: Tensor | float) -> Tensor:
    """x / by, rounded once on every device, in compiled code, too; -0 becomes 0 on CUDA.

    CUDA multiplies by the reciprocal of a divisor that is a number. Its compiler does so for constants, and divides
    tensors within two units of the last place; `addcdiv` is what it leaves a division that rounds.
    """
    divisor = torch.full_like(x, by) if isinstance(by, float | int) else by
    if x.device.type != "cuda":
        return x / divisor
    return torch.addcdiv(x.new_zeros(()), x, divisor.to(x.device))


def scale_values(stored: Tensor, fmt: BlockFormat, upper: Tensor | None) -> Tensor:
    """Stored scales as float32 multipliers: the stored scale's value, times the tensor scale where there is one."""
    if fmt.has_float_scale:
        return stored
    values = value_tensor(fmt.scale_format, torch.float32, stored.device)[stored.to(torch.int64)]
    return values if upper is None else upper * values


def check_codes(codes: Tensor, fmt: FloatFormat, *, in_range: bool = True) -> None:
    """Refuse codes of the wrong dtype or, where `in_range` is asked for, out of range: those are read and waited for.

    Raises:
        CodeError: with the offending value and the limit.
    """
    check_dense(codes, "codes", CodeError)
    if codes.dtype not in CODE_DTYPES:
        raise CodeError(f"codes have dtype {codes.dtype}; {fmt} codes are {code_dtype(fmt)} (from encode)")
    if in_range and codes.numel() and not (codes.dtype == torch.uint8 and fmt.bits >= 8):
        low, high = (int(v) for v in torch.aminmax(codes))
        if low < 0 or high >= 2**fmt.bits:
            raise CodeError(f"code {low if low < 0 else high} is outside 0..{2**fmt.bits - 1}, the codes of {fmt}")


def _scalar(fmt: FloatFormat | str) -> FloatFormat:
    found = get_format(fmt)
    if not isinstance(found, FloatFormat):
        raise FormatError(f"{found} is a block format; name its element format, {found.element}")
    return found


def check_integers(codes: Tensor, what: str = "codes") -> None:
    """Refuse what holds no integers.

    Raises:
        CodeError: no dense tensor of uint8, int16, int32 or int64.
    """
    check_dense(codes, what, CodeError)
    if codes.dtype not in CODE_DTYPES:
        raise CodeError(f"{what} has dtype {codes.dtype}; pass integers, as encode gives them")


def code_index(codes: Tensor, fmt: FloatFormat | str) -> Tensor:
    """Ordered index (int32) of each code: sign * magnitude code; both zeros are 0.

    NaN codes are ordered as their bit pattern says and have no meaning; inf lies one step beyond max.

    Raises:
        CodeError: codes are no integers. FormatError: no scalar format.
    """
    fmt = _scalar(fmt)
    check_integers(codes, "codes")
    codes = codes.to(torch.int32)
    if not fmt.signed:
        return codes
    half = 2**fmt.magnitude_bits
    if fmt.twos_complement:
        return torch.where(codes >= half, codes - 2 * half, codes)
    return torch.where(codes >= half, half - codes, codes)


def from_code_index(index: Tensor, fmt: FloatFormat | str) -> Tensor:
    """Codes of ordered indices; indices beyond the finite range are clamped to it. 0 becomes +0.

    Raises:
        CodeError: indices are no integers. FormatError: no scalar format.
    """
    fmt = _scalar(fmt)
    check_integers(index, "index")
    top = len(fmt.magnitudes()) - 1
    index = index.to(torch.int64).clamp(-top if fmt.signed else 0, top).to(torch.int32)
    half = 2**fmt.magnitude_bits
    negative = index + 2 * half if fmt.twos_complement else half - index
    return torch.where(index < 0, negative, index).to(code_dtype(fmt))
