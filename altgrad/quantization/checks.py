"""Checks of what a person passes to the quantization functions; each error gives value, limit and remedy."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from altgrad.errors import CodeError, DtypeError, RandomKeyError, ScaleError
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import INF_PROBLEM

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NARROW = {torch.bfloat16: (7, -126, 127), torch.float16: (10, -14, 15)}  # mantissa bits, emin, emax


def check_dtype(dtype: torch.dtype, fmt: FloatFormat) -> None:
    """Refuse dtypes that are not floating, or too narrow to hold the format's values.

    Raises:
        DtypeError: with the dtype and what to cast to.
    """
    if dtype not in FLOAT_DTYPES:
        raise DtypeError(
            f"tensor of dtype {dtype}; quantization takes float32, float64, bfloat16 or float16: cast it first"
        )
    if dtype in _NARROW:
        mantissa, emin, emax = _NARROW[dtype]
        smallest = fmt.emin - (fmt.mantissa_bits if fmt.has_subnormals and fmt.has_zero else 0)
        if fmt.mantissa_bits > mantissa or fmt.emax > emax or smallest < emin - mantissa:
            raise DtypeError(
                f"{dtype} cannot hold {fmt}: it has {mantissa} mantissa bits and exponents {emin - mantissa}..{emax}, "
                f"{fmt} needs {fmt.mantissa_bits} and {smallest}..{fmt.emax}; cast the tensor to float32"
            )


def traced(x: Tensor) -> bool:
    """Whether x must go through a torch operator: it is being compiled, is no plain tensor, or a mode is watching."""
    if torch.compiler.is_compiling():
        return True
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return (
        not plain
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _as_float32(number: float) -> float:
    """The float32 nearest to a number; inf beyond float32's range."""
    try:
        return struct.unpack("f", struct.pack("f", number))[0]
    except OverflowError:
        return math.inf


def check_scale(x: Tensor, scale: Tensor | float, dtype: torch.dtype | None = None) -> Tensor | float:
    """The scale as the kernels take it: a float, or a tensor of x's (or `dtype`'s) compute dtype on x's device.

    Values of a tensor on a GPU are not read (that would wait for the device); a bad one yields NaN there.

    Raises:
        ScaleError: not positive, not finite, or not broadcastable to x.
    """
    wide = (dtype or x.dtype) == torch.float64
    return _scale_tensor(x, scale, wide) if isinstance(scale, Tensor) else _scale_number(float(scale), wide)


def _scale_number(scale: float, wide: bool) -> float:
    carrier = scale if wide else _as_float32(scale)
    if not (carrier > 0 and math.isfinite(carrier)):
        raise ScaleError(
            f"scale {scale} is not positive and finite in the compute dtype; it multiplies grid values back to x's range"
        )
    return carrier


def _scale_tensor(x: Tensor, scale: Tensor, wide: bool) -> Tensor:
    if not scale.dtype.is_floating_point:
        raise ScaleError(f"scale has dtype {scale.dtype}; pass a floating tensor or a number")
    lead = x.ndim - scale.ndim
    if scale.ndim and (lead < 0 or any(n not in (1, x.shape[lead + d]) for d, n in enumerate(scale.shape))):
        raise ScaleError(
            f"scale of shape {list(scale.shape)} does not broadcast to x of shape {list(x.shape)}; "
            "use one number, or size 1 on every axis that shares a scale"
        )
    tensor = scale.detach().to(device=x.device, dtype=torch.float64 if wide else torch.float32)
    if traced(x) or type(tensor) is not Tensor or tensor.device.type != "cpu" or not tensor.numel():
        return tensor
    low, high = (tensor.item(),) * 2 if tensor.numel() == 1 else (float(v) for v in torch.aminmax(tensor))
    if not (low > 0 and high < math.inf):  # false for NaN, too
        raise ScaleError(f"scale holds {low if not low > 0 else high}; every scale must be positive and finite")
    return tensor


def check_key(rounding: Rounding | str, key, random_bits: int) -> Tensor | None:
    """The key as an int64 tensor of shape [2], or None where the rounding draws nothing.

    Raises:
        RandomKeyError: stochastic rounding without a (seed, stream) key, a malformed key, or `random_bits` not in 1..32.
    """
    if rounding != Rounding.STOCHASTIC:
        return None
    if isinstance(key, Tensor):
        _check_draw(key, random_bits)
        return key
    return torch.tensor(key_words(Rounding.STOCHASTIC, key, random_bits), dtype=torch.int64)


def key_words(rounding: Rounding, key, random_bits: int) -> tuple[int, int] | None:
    """The key as two signed 64-bit integers, or None where the rounding draws nothing.

    Raises:
        RandomKeyError: as `check_key`.
    """
    if rounding is not Rounding.STOCHASTIC:
        return None
    _check_draw(key, random_bits)
    if isinstance(key, Tensor):
        seed, stream = key.tolist()
        return seed, stream
    try:
        seed, stream = (int(word) for word in key)
    except (TypeError, ValueError):
        raise RandomKeyError(f"key {key!r} is not (seed, stream), two integers") from None
    for name, word in (("seed", seed), ("stream", stream)):
        if not -(2**63) <= word < 2**64:
            raise RandomKeyError(f"{name} {word} does not fit 64 bits")
    return seed - 2**64 if seed >= 2**63 else seed, stream - 2**64 if stream >= 2**63 else stream


def _check_draw(key, random_bits: int) -> None:
    if not 1 <= random_bits <= 32:
        raise RandomKeyError(f"random_bits {random_bits} is outside 1..32")
    if key is None:
        raise RandomKeyError(
            'stochastic rounding needs key=(seed, stream), two integers; or use rounding="nearest_even"'
        )
    if isinstance(key, Tensor) and (key.dtype != torch.int64 or key.shape != (2,)):
        raise RandomKeyError(
            f"key tensor is {key.dtype} of shape {list(key.shape)}; pass int64 of shape [2]: seed, stream"
        )


def check_encodable(fmt: FloatFormat, overflow: Overflow) -> None:
    """Refuse overflow policies whose results have no code in the format.

    Raises:
        CodeError: `inf` for a format without inf, `nan` for one without NaN.
    """
    if (overflow is Overflow.INF and not fmt.has_inf) or (overflow is Overflow.NAN and not fmt.has_nan):
        raise CodeError(
            f'{fmt} has no code for {overflow.value}; encode with overflow="saturate", or quantize without encoding'
        )


def check_problems(problems: int | Tensor, fmt: FloatFormat) -> None:
    """Refuse the codes of a pass that met a value without one.

    Raises:
        CodeError: a NaN or inf met a format that has no code for it.
    """
    if problems:
        bad = "inf" if problems >= INF_PROBLEM else "NaN"
        raise CodeError(
            f"{fmt} has no code for {bad}; remove it first, or quantize (which keeps it) instead of encoding"
        )
