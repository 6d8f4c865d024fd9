"""The public face of the numerics: quantize, encode, decode and their variants, as functions of (tensor, format).

    quantize(x, fmt, scale) = scale * round_to_grid(x / scale)

The division and the product are IEEE operations in float32 (float64 for float64 tensors); bf16 and fp16 tensors are
computed in float32, scale included, and rounded once to their own dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.errors import DtypeError, FormatError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Overflow, Rounding, as_option
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization import blocks, operators
from altgrad.quantization.blocks import QuantizedTensor
from altgrad.quantization.checks import (
    check_dtype,
    check_encodable,
    check_key,
    check_problems,
    check_scale,
    key_words,
    traced,
)
from altgrad.quantization.codec import check_codes
from altgrad.quantization.kernels.choose import kernel_name, load
from altgrad.quantization.quantized import Outputs
from altgrad.quantization.stats import QuantStats


def _is_block_format(fmt) -> bool:
    return not isinstance(fmt, FloatFormat) and isinstance(get_format(fmt), BlockFormat)


_is_block_format._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, without the compiler


class _Request(NamedTuple):
    """Options of a call, checked once per combination."""

    given: FloatFormat | str
    fmt: FloatFormat
    rounding: Rounding
    overflow: Overflow
    words: tuple[str, str, str]  # spec, rounding and overflow as operators take them


_requests: dict[tuple, _Request] = {}


def _request(fmt: FloatFormat | str, dtype: torch.dtype, rounding, overflow, subnormals: bool) -> _Request:
    """The format and options as members of their types; the dtype can hold the format."""
    key = (fmt if isinstance(fmt, str) else id(fmt), dtype, rounding, overflow, subnormals)
    found = _requests.get(key)
    if found is None or (found.given is not fmt and not isinstance(fmt, str)):
        chosen = get_format(fmt)
        if not chosen.has_zero:
            raise FormatError(
                f"{chosen} is a scale format without zero; put an element format such as E4M3 on a tensor"
            )
        chosen = chosen if subnormals else chosen.without_subnormals()
        check_dtype(dtype, chosen)
        rounding, overflow = as_option(Rounding, rounding), as_option(Overflow, overflow)
        found = _Request(fmt, chosen, rounding, overflow, (chosen.spec, rounding.value, overflow.value))
        _requests[key] = found
    return found


def _words(fmt: FloatFormat | str, dtype: torch.dtype, rounding, overflow, subnormals: bool) -> tuple[str, str, str]:
    """The request as the strings that operators take."""
    return _request(fmt, dtype, rounding, overflow, subnormals).words


_words._dynamo_marked_constant = True


def _pass(
    x: Tensor,
    fmt: FloatFormat | str,
    scale: Tensor | float,
    wanted: tuple[bool, bool, bool],
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
) -> Outputs:
    """One pass of a kernel: `wanted` says whether values, codes and statistics come out."""
    scale = check_scale(x, scale)
    values, codes, stats = wanted
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise DtypeError(f"out is {out.dtype} {list(out.shape)}; it must be x's {x.dtype} {list(x.shape)}")
    name = kernel_name(x, kernel)
    if traced(x):
        return _traced_pass(x, fmt, scale, wanted, rounding, overflow, key, random_bits, subnormals, clamp, out, name)
    request = _request(fmt, x.dtype, rounding, overflow, subnormals)
    if codes and not values:
        check_encodable(request.fmt, request.overflow)
    outputs = load(name).process(
        x,
        request.fmt,
        scale,
        rounding=request.rounding,
        overflow=request.overflow,
        key=key_words(request.rounding, key, random_bits),
        random_bits=random_bits,
        clamp=clamp,
        out=out,
        values=values,
        codes=codes,
        stats=stats,
    )
    if codes and not values:
        check_problems(outputs.problems, request.fmt)
    return outputs


def _traced_pass(
    x, fmt, scale, wanted, rounding, overflow, key, random_bits, subnormals, clamp, out, kernel
) -> Outputs:
    """The pass as one operator."""
    spec, rounding, overflow = _words(fmt, x.dtype, rounding, overflow, subnormals)
    if not isinstance(scale, Tensor):
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = torch.full((), scale, dtype=work, device=x.device)
    key = check_key(rounding, key, random_bits)
    found = operators.BY_OUTPUTS[wanted](x.detach(), scale, key, spec, rounding, overflow, random_bits, clamp, kernel)
    parts = iter(found if isinstance(found, tuple | list) else (found,))
    result = Outputs(*(next(parts) if part else None for part in wanted))
    return result if out is None else result._replace(values=out.copy_(result.values))


def quantize(
    x: Tensor,
    fmt: FloatFormat | str,
    scale: Tensor | float = 1.0,
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

    Args:
        x: float32, float64, bfloat16 or float16 tensor of any shape and layout.
        fmt: a format or its name.
        scale: positive number, or tensor that broadcasts to x (per tensor, per channel, any other).
        rounding: mode (`altgrad.formats.rounding.Rounding`).
        overflow: policy for results beyond the format's max (`Overflow`).
        key: (seed, stream) of stochastic rounding; two integers, or an int64 tensor of shape [2].
        random_bits: stochastic rounding rounds away from zero iff floor(frac * 2^R) + r >= 2^R, r of R bits.
        subnormals: False leaves one gap between 0 and the smallest normal number.
        clamp: clamp finite quotients to +-max first, as scaling by the current amax does (whose quotients can exceed
            max by a rounding error).
        out: tensor of x's shape and dtype to write to; may be x itself.
        kernel: implementation by name; None chooses by device.
        axis, pad: for block formats: the axis that blocks run along, and whether the last block may be short
            (`blocks.quantize`).

    Returns:
        Tensor of x's shape and dtype, detached.

    Edge values: NaN stays NaN in every format, mode and policy; +-inf stays, except under `saturate` (+-max) and `nan`;
    the sign of zero is kept where the format has -0; an empty tensor gives an empty tensor.

    Raises:
        DtypeError, ScaleError, RandomKeyError, FormatError, OptionError: with value, limit and remedy.
    """
    options = {"rounding": rounding, "overflow": overflow, "key": key, "random_bits": random_bits}
    if _is_block_format(fmt):
        return blocks.quantize(
            x, get_format(fmt), scale, axis=axis, pad=pad, subnormals=subnormals, out=out, kernel=kernel, **options
        )
    options.update(subnormals=subnormals, clamp=clamp, out=out, kernel=kernel)
    return _pass(x, fmt, scale, (True, False, False), **options).values


def encode(
    x: Tensor,
    fmt: FloatFormat | str,
    scale: Tensor | float = 1.0,
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

    Arguments as for `quantize`; decode(encode(x, f, s), f, s) equals quantize(x, f, s) bit for bit. A block format
    gives a `QuantizedTensor` of codes and scales, which `decode` takes by itself.

    Raises:
        CodeError: an element (NaN, inf) or the overflow policy's result has no code in the format.
    """
    options = {"rounding": rounding, "overflow": overflow, "key": key, "random_bits": random_bits}
    if _is_block_format(fmt):
        return blocks.encode(
            x, get_format(fmt), scale, axis=axis, pad=pad, subnormals=subnormals, kernel=kernel, **options
        )
    options.update(subnormals=subnormals, clamp=clamp, kernel=kernel)
    return _pass(x, fmt, scale, (False, True, False), **options).codes


def decode(
    codes: Tensor | QuantizedTensor,
    fmt: FloatFormat | str | None = None,
    scale: Tensor | float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """scale * value(code), of the codes' shape and of `dtype`; a `QuantizedTensor` knows its format and scales.

    Raises:
        CodeError: codes of another dtype, or out of range.
        DtypeError: `dtype` cannot hold the format.
    """
    if isinstance(codes, QuantizedTensor):
        return blocks.decode(codes, dtype=dtype, out=out)
    scale = check_scale(codes, scale, dtype)
    name = kernel_name(codes, kernel)
    if not traced(codes):
        scalar = _scalar_format_of(fmt, dtype)
        check_codes(codes, scalar)
        return load(name).decode(codes, scalar, scale, dtype, out)
    spec = _decoding_spec(fmt, dtype)
    if not isinstance(scale, Tensor):
        work = torch.float64 if dtype == torch.float64 else torch.float32
        scale = torch.full((), scale, dtype=work, device=codes.device)
    result = operators.decode(codes, scale, spec, dtype, name)
    return result if out is None else out.copy_(result)


def _scalar_format_of(fmt: FloatFormat | str | None, dtype: torch.dtype) -> FloatFormat:
    found = None if fmt is None else get_format(fmt)
    if not isinstance(found, FloatFormat):
        raise FormatError(
            f"format {found} with plain codes; give a scalar format, or the QuantizedTensor that encode gave"
        )
    check_dtype(dtype, found)
    return found


def _decoding_spec(fmt: FloatFormat | str | None, dtype: torch.dtype) -> str:
    return _scalar_format_of(fmt, dtype).spec


_decoding_spec._dynamo_marked_constant = True


def quantize_with_stats(
    x: Tensor, fmt: FloatFormat | str, scale: Tensor | float = 1.0, **options
) -> tuple[Tensor, QuantStats]:
    """`quantize` and the statistics of the same pass; arguments as there."""
    if _is_block_format(fmt):
        return blocks.quantize_with_stats(x, get_format(fmt), scale, **options)
    found = _pass(x, fmt, scale, (True, False, True), **options)
    return found.values, QuantStats(found.stats)


def encode_with_stats(
    x: Tensor, fmt: FloatFormat | str, scale: Tensor | float = 1.0, **options
) -> tuple[Tensor | QuantizedTensor, QuantStats]:
    """`encode` and the statistics of the same pass; arguments as there."""
    if _is_block_format(fmt):
        return blocks.encode_with_stats(x, get_format(fmt), scale, **options)
    found = _pass(x, fmt, scale, (False, True, True), **options)
    return found.codes, QuantStats(found.stats)


def quantize_and_encode(
    x: Tensor, fmt: FloatFormat | str, scale: Tensor | float = 1.0, **options
) -> tuple[Tensor, Tensor | QuantizedTensor]:
    """(`quantize`, `encode`) in one pass over x; arguments as for `quantize`.

    A NaN or inf without a code keeps its place in the values and has code 0: nothing is raised, nothing is waited for.
    """
    if _is_block_format(fmt):
        return blocks.quantize_and_encode(x, get_format(fmt), scale, **options)
    found = _pass(x, fmt, scale, (True, True, False), **options)
    return found.values, found.codes


def quantize_and_encode_with_stats(
    x: Tensor, fmt: FloatFormat | str, scale: Tensor | float = 1.0, **options
) -> tuple[Tensor, Tensor | QuantizedTensor, QuantStats]:
    """`quantize_and_encode` and the statistics of the same pass."""
    if _is_block_format(fmt):
        return blocks.quantize_and_encode_with_stats(x, get_format(fmt), scale, **options)
    found = _pass(x, fmt, scale, (True, True, True), **options)
    return found.values, found.codes, QuantStats(found.stats)


def _max(fmt: FloatFormat | str) -> float:
    return get_format(fmt).max


_max._dynamo_marked_constant = True


class _StraightThrough(torch.autograd.Function):
    """The values of `quantized`, the gradient of `x` where `kept` says so (None: everywhere)."""

    @staticmethod
    def forward(ctx, x, quantized, kept):
        ctx.masked = kept is not None
        if kept is not None:
            ctx.save_for_backward(kept)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0] if ctx.masked else grad), None, None


def _unsaturated(x: Tensor, fmt: FloatFormat | str, scale: Tensor | float, options: dict) -> Tensor:
    """Where |x / scale| <= max."""
    if _is_block_format(fmt):
        where = {name: options[name] for name in ("axis", "pad") if name in options}
        return ~blocks.saturated(x, get_format(fmt), scale, **where)
    work = x if x.dtype == torch.float64 else x.float()
    return (work / scale).abs() <= _max(fmt)


def fake_quantize(
    x: Tensor, fmt: FloatFormat | str, scale: Tensor | float = 1.0, *, mask_saturated: bool = False, **options
) -> Tensor:
    """`quantize` with the straight-through gradient dy/dx = 1.

    Args:
        mask_saturated: let no gradient through where |x / scale| > max.
        options: as for `quantize`, without `out`.
    """
    values = quantize(x, fmt, scale, **options)
    kept = _unsaturated(x.detach(), fmt, scale, options) if mask_saturated else None
    return _StraightThrough.apply(x, values, kept)
