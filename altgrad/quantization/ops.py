"""The public face of the numerics: quantize, encode, decode and their variants, as functions of (tensor, format).

    quantize(x, fmt, scale) = scale * round_to_grid(x / scale)

The division and the product are IEEE operations in float32 (float64 for float64 tensors); bf16 and fp16 tensors are
computed in float32, scale included, and rounded once to their own dtype. Each function is a few words around a
`Cast` (`altgrad.quantization.cast`), which does the work.

Block formats share a scale among the elements of a block:

    X_b = scale of block b from its amax (`formats.block` has the rules);   v_i = X_b * round_to_grid(x_i / X_b)

Their edge values. The amax is taken over the finite elements. A block of zeros has the smallest scale (E8M0: 2^-127, as in
gfloat and torchao; FP32: 1 / element max) and stays zero. Scales end at the scale format's ends: beyond 2^127 the
elements saturate, below 2^-127 they underflow. NaN keeps its place where the element has a NaN code; where it has none
(MXFP4, MXFP6, MXINT8, NVFP4) the block's scale becomes NaN and with it every value of the block, the one way that OCP MX
1.0, 5.1 has to store a NaN. +-inf stays in place without touching the scale, as for scalar formats; where the element
has no code for it, encoding is an error. Under `native` finite elements beyond max saturate (6.3), in E5M2, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altgrad.errors import BlockError, FormatError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.cast import cast_for
from altgrad.quantization.codec import scale_values
from altgrad.quantization.implied_scale import resolved_scale
from altgrad.quantization.quantized import Quantized, QuantizedTensor, Want
from altgrad.quantization.stats import QuantStats
from altgrad.quantization.straight_through import fake_quantize

__all__ = [
    "block_scales",
    "decode",
    "encode",
    "encode_with_stats",
    "fake_quantize",
    "quantize",
    "quantize_and_encode",
    "quantize_and_encode_with_stats",
    "quantize_with_stats",
]

Format = FloatFormat | BlockFormat | str
Scale = Tensor | float | str | None


def quantize(
    x: Tensor,
    fmt: Format,
    scale: Scale = None,
    *,
    rounding: Rounding | str = Rounding.NEAREST_EVEN,
    overflow: Overflow | str = Overflow.NATIVE,
    key: tuple[int, int] | Tensor | None = None,
    random_bits: int = 24,
    subnormals: bool = True,
    clamp: bool = False,
    out: Tensor | None = None,
    kernel: str | None = None,
    axis: int = -1,
    pad: bool = False,
) -> Tensor:
    """scale * round_to_grid(x / scale): x with every element on the format's grid.

    Give `scale="amax"` unless x is known to fit the format: at the default scale 1 numbers below the format's smallest
    step become 0 (`UnderflowWarning` says so once, where it sees more than half of them go).

    >>> x = torch.tensor([0.001, -0.002, 0.0005])
    >>> quantize(x, "E3M4", scale="amax"), quantize(x, "E3M4", scale=1.0)
    (tensor([ 0.0010, -0.0020,  0.0005]), tensor([0., -0., 0.]))

    Args:
        x: float32, float64, bfloat16 or float16 tensor of any shape and layout; for block formats of at least one axis
            (two for tiles).
        fmt: a scalar or block format, or its name.
        scale: positive number, or tensor that broadcasts to x (per tensor, per channel, any other); "amax" for
            `amax_scale(x, fmt)`, with finite quotients clamped to +-max; None for 1. Leave it out for block formats, whose
            scales come from the blocks; for a two-level format (NVFP4) a number other than 1, or a tensor of one element,
            is taken as the tensor scale instead of amax / (element max * scale max).
        rounding: mode (`altgrad.formats.rounding.Rounding`).
        overflow: policy for results beyond the format's max (`Overflow`).
        key: (seed, stream) of stochastic rounding; two integers, or an int64 tensor of shape [2]. Elements are counted in
            C order of x, whatever its layout and the blocks' axis.
        random_bits: stochastic rounding rounds away from zero iff floor(frac * 2^R) + r >= 2^R, r of R bits.
        subnormals: False leaves one gap between 0 and the smallest normal number.
        clamp: clamp finite quotients to +-max first, as scaling by the current amax does (whose quotients can exceed
            max by a rounding error). No effect on block formats, whose scales follow the amax by themselves.
        out: tensor of x's shape and dtype to write to; may be x itself.
        kernel: implementation by name; None chooses by device.
        axis: for block formats: the axis that blocks run along; tiles lie on the last two axes.
        pad: for block formats: let the last block along the axis be short; otherwise the axis must be a multiple of the
            block.

    Returns:
        Tensor of x's shape and dtype, detached.

    Edge values: NaN stays NaN in every format, mode and policy; +-inf stays, except under `saturate` (+-max) and `nan`;
    the sign of zero is kept where the format has -0; an empty tensor gives an empty tensor.

    Raises:
        DtypeError, ScaleError, RandomKeyError, FormatError, BlockError, OptionError: with value, limit and remedy.
    """
    scale, clamp = resolved_scale(x, fmt, scale, clamp)
    cast = cast_for(fmt, rounding, overflow, subnormals, clamp, random_bits, axis, pad)
    return cast(x, scale, key=key, out=out, kernel=kernel).values  # type: ignore[return-value]


def encode(
    x: Tensor,
    fmt: Format,
    scale: Scale = None,
    *,
    rounding: Rounding | str = Rounding.NEAREST_EVEN,
    overflow: Overflow | str = Overflow.NATIVE,
    key: tuple[int, int] | Tensor | None = None,
    random_bits: int = 24,
    subnormals: bool = True,
    clamp: bool = False,
    kernel: str | None = None,
    axis: int = -1,
    pad: bool = False,
) -> Tensor | QuantizedTensor:
    """Codes of round_to_grid(x / scale): uint8 for formats of at most 8 bits, else int32, of x's shape.

    Arguments as for `quantize`; decode(encode(x, f, s), f, s) equals quantize(x, f, s) bit for bit. A block format, or
    scale="amax", gives a `QuantizedTensor` of codes and scales, which `decode` takes by itself.

    Raises:
        CodeError: an element (NaN, inf) or the overflow policy's result has no code in the format.
    """
    number, clamp = resolved_scale(x, fmt, scale, clamp)
    cast = cast_for(fmt, rounding, overflow, subnormals, clamp, random_bits, axis, pad)
    return _packed(cast(x, number, key=key, want=Want.CODES, kernel=kernel), fmt, axis, scale, number)


def decode(
    codes: Tensor | QuantizedTensor,
    fmt: Format | None = None,
    scale: Tensor | float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """scale * value(code), of the codes' shape and of `dtype`; a `QuantizedTensor` knows its format and scales.

    Raises:
        CodeError: codes of another dtype, or out of range.
        BlockError: codes and scales do not fit the format's blocks.
        DtypeError: `dtype` cannot hold the format.
    """
    if isinstance(codes, QuantizedTensor):
        if isinstance(codes.format, FloatFormat):
            return cast_for(codes.format).decode(codes.codes, codes.scales, dtype=dtype, out=out, kernel=kernel)
        return cast_for(codes.format, axis=codes.axis, pad=True).decode(codes, dtype=dtype, out=out, kernel=kernel)
    if fmt is None:
        raise FormatError("plain codes without a format; give a scalar format, or the QuantizedTensor of encode")
    return cast_for(fmt).decode(codes, scale, dtype=dtype, out=out, kernel=kernel)


def quantize_with_stats(x: Tensor, fmt: Format, scale: Scale = None, **options) -> tuple[Tensor, QuantStats]:
    """`quantize` and the statistics of the same pass; arguments as there."""
    found, _ = _pass(x, fmt, scale, _VALUES_STATS, **options)
    return found.values, found.stats  # type: ignore[return-value]


def encode_with_stats(
    x: Tensor, fmt: Format, scale: Scale = None, **options
) -> tuple[Tensor | QuantizedTensor, QuantStats]:
    """`encode` and the statistics of the same pass; arguments as there.

    For a block format overflow counts the elements beyond the element's max under their block's scale.
    """
    found, packed = _pass(x, fmt, scale, _CODES_STATS, **options)
    return packed, found.stats  # type: ignore[return-value]


def quantize_and_encode(
    x: Tensor, fmt: Format, scale: Scale = None, **options
) -> tuple[Tensor, Tensor | QuantizedTensor]:
    """(`quantize`, `encode`) in one pass over x; arguments as for `quantize`.

    A NaN or inf without a code keeps its place in the values and has code 0: nothing is raised, nothing is waited for.
    """
    found, packed = _pass(x, fmt, scale, _VALUES_CODES, **options)
    return found.values, packed  # type: ignore[return-value]


def quantize_and_encode_with_stats(
    x: Tensor, fmt: Format, scale: Scale = None, **options
) -> tuple[Tensor, Tensor | QuantizedTensor, QuantStats]:
    """`quantize_and_encode` and the statistics of the same pass."""
    found, packed = _pass(x, fmt, scale, _ALL, **options)
    return found.values, packed, found.stats  # type: ignore[return-value]


def block_scales(
    x: Tensor, fmt: BlockFormat | str, scale: Tensor | float = 1.0, *, axis: int = -1, pad: bool = False
) -> Tensor:
    """The multiplier of each block of x as float32 (a tensor scale included), of `QuantizedTensor.scales`' shape."""
    chosen = get_format(fmt)
    if not isinstance(chosen, BlockFormat):
        raise BlockError(f"{chosen} is a scalar format; give a block format such as MXFP8 or {chosen}/32:E8M0")
    found = cast_for(fmt, axis=axis, pad=pad)(x, scale)
    return scale_values(found.scales, chosen, found.tensor_scale)  # type: ignore[arg-type]


_VALUES_STATS, _CODES_STATS = Want.VALUES | Want.STATS, Want.CODES | Want.STATS
_VALUES_CODES, _ALL = Want.VALUES | Want.CODES, Want.VALUES | Want.CODES | Want.STATS


def _pass(
    x: Tensor, fmt: Format, scale: Scale, want: Want, *, key=None, out=None, kernel=None, clamp=False, **facts: Any
) -> tuple[Quantized, Any]:
    """The results, and the codes as `encode` gives them."""
    number, clamp = resolved_scale(x, fmt, scale, clamp)
    found = cast_for(fmt, clamp=clamp, **facts)(x, number, key=key, out=out, want=want, kernel=kernel)
    return found, _packed(found, fmt, facts.get("axis", -1), scale, number)


def _packed(found: Quantized, fmt: Format, axis: int, scale: Scale, number: Tensor | float) -> Any:
    """The codes, with the scales where the caller does not have them."""
    codes = found.codes
    if codes is None:
        return None
    if found.scales is not None:
        return QuantizedTensor(codes, found.scales, get_format(fmt), axis, codes.shape, found.tensor_scale)
    if type(scale) is str:
        return QuantizedTensor(codes, number, get_format(fmt), axis, codes.shape)  # type: ignore[arg-type]
    return codes
