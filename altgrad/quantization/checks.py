"""Checks of what a person passes to the quantization functions; each error gives value, limit and remedy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from altgrad.errors import CodeError, DtypeError, RandomKeyError, ScaleError
from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.rounding import Overflow, Rounding

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


def check_scale(x: Tensor, scale: Tensor | float) -> Tensor | float:
    """The scale as the kernels take it: a float, or a tensor of x's compute dtype on x's device.

    Values of a tensor on a GPU are not read (that would wait for the device); a bad one yields NaN there.

    Raises:
        ScaleError: not positive, not finite, or not broadcastable to x.
    """
    if not isinstance(scale, Tensor):
        scale = float(scale)
        carrier = scale if x.dtype == torch.float64 else float(torch.tensor(scale, dtype=torch.float32))
        if not (carrier > 0 and math.isfinite(carrier)):
            raise ScaleError(
                f"scale {scale} is not positive and finite in the compute dtype; it multiplies grid values back to x's range"
            )
        return carrier
    if not scale.dtype.is_floating_point:
        raise ScaleError(f"scale has dtype {scale.dtype}; pass a floating tensor or a number")
    try:
        fits = torch.broadcast_shapes(scale.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ScaleError(
            f"scale of shape {list(scale.shape)} does not broadcast to x of shape {list(x.shape)}; "
            "use one number, or size 1 on every axis that shares a scale"
        )
    scale = scale.detach().to(device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if scale.device.type == "cpu" and type(scale) is Tensor and scale.numel():
        low, high = (float(v) for v in torch.aminmax(scale))
        if not (low > 0 and high < math.inf):  # false for NaN, too
            raise ScaleError(f"scale holds {low if not low > 0 else high}; every scale must be positive and finite")
    return scale


def check_key(rounding: Rounding, key, random_bits: int) -> Tensor | None:
    """The key as an int64 tensor of shape [2], or None where the rounding draws nothing.

    Raises:
        RandomKeyError: stochastic rounding without a (seed, stream) key, a malformed key, or `random_bits` not in 1..32.
    """
    if rounding is not Rounding.STOCHASTIC:
        return None
    if not 1 <= random_bits <= 32:
        raise RandomKeyError(f"random_bits {random_bits} is outside 1..32")
    if key is None:
        raise RandomKeyError(
            'stochastic rounding needs key=(seed, stream), two integers; or use rounding="nearest_even"'
        )
    if isinstance(key, Tensor):
        if key.dtype != torch.int64 or key.shape != (2,):
            raise RandomKeyError(
                f"key tensor is {key.dtype} of shape {list(key.shape)}; pass int64 of shape [2]: seed, stream"
            )
        return key
    try:
        seed, stream = (int(word) for word in key)
    except (TypeError, ValueError):
        raise RandomKeyError(f"key {key!r} is not (seed, stream), two integers") from None
    words = []
    for name, word in (("seed", seed), ("stream", stream)):
        if not -(2**63) <= word < 2**64:
            raise RandomKeyError(f"{name} {word} does not fit 64 bits")
        words.append(word - 2**64 if word >= 2**63 else word)
    return torch.tensor(words, dtype=torch.int64)


def check_encodable(fmt: FloatFormat, overflow: Overflow) -> None:
    """Refuse overflow policies whose results have no code in the format.

    Raises:
        CodeError: `inf` for a format without inf, `nan` for one without NaN.
    """
    if (overflow is Overflow.INF and not fmt.has_inf) or (overflow is Overflow.NAN and not fmt.has_nan):
        raise CodeError(
            f'{fmt} has no code for {overflow.value}; encode with overflow="saturate", or quantize without encoding'
        )
