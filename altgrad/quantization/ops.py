"""The public face of the numerics: quantize, encode, decode and their variants, as functions of (tensor, format).

    quantize(x, fmt, scale) = scale * round_to_grid(x / scale)

The division and the product are IEEE operations in float32 (float64 for float64 tensors); bf16 and fp16 tensors are
computed in float32, scale included, and rounded once to their own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.errors import CodeError, DtypeError, FormatError
from altgrad.quantization import blocks
from altgrad.quantization.block_formats import BlockFormat
from altgrad.quantization.blocks import QuantizedTensor
from altgrad.quantization.catalog import get_format
from altgrad.quantization.checks import check_dtype, check_encodable, check_key, check_scale
from altgrad.quantization.codec import check_codes, code_dtype, value_tensor
from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.kernels import eager
from altgrad.quantization.kernels.dispatch import choose
from altgrad.quantization.rounding import Overflow, Rounding, as_option
from altgrad.quantization.stats import QuantStats, measure


def _scalar_format(fmt: FloatFormat | str, subnormals: bool) -> FloatFormat:
    fmt = get_format(fmt)
    if not fmt.has_zero:
        raise FormatError(f"{fmt} is a scale format without zero; put an element format such as E4M3 on a tensor")
    return fmt if subnormals else fmt.without_subnormals()


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
        rounding: mode (`altgrad.quantization.rounding.Rounding`).
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
    if isinstance(fmt := get_format(fmt), BlockFormat):
        return blocks.quantize(
            x, fmt, scale, axis=axis, pad=pad, subnormals=subnormals, out=out, kernel=kernel, **options
        )
    fmt = _scalar_format(fmt, subnormals)
    options = _options(x, fmt, rounding, overflow, key, random_bits, clamp)
    scale = check_scale(x, scale)
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise DtypeError(f"out is {out.dtype} {list(out.shape)}; it must be x's {x.dtype} {list(x.shape)}")
    return choose(x, kernel).quantize(x.detach(), fmt, scale, out, **options)


def _options(x, fmt, rounding, overflow, key, random_bits, clamp) -> dict:
    check_dtype(x.dtype, fmt)
    rounding = as_option(Rounding, rounding)
    return {
        "rounding": rounding,
        "overflow": as_option(Overflow, overflow),
        "key": check_key(rounding, key, random_bits),
        "random_bits": random_bits,
        "clamp": clamp,
    }


def _encode(x, fmt, scale, kernel, options) -> tuple[Tensor, Tensor, Tensor]:
    check_encodable(fmt, options["overflow"])
    payload, over = eager.round_payload(x.detach(), fmt, scale, **options)
    codes = eager.payload_codes(payload, fmt)
    if x.numel() and int(codes.min()) < 0:
        bad = "NaN" if bool(torch.isnan(payload).any()) else "inf"
        raise CodeError(
            f"{fmt} has no code for {bad}; remove it first, or quantize (which keeps it) instead of encoding"
        )
    return codes.to(code_dtype(fmt)), payload, over


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
    if isinstance(fmt := get_format(fmt), BlockFormat):
        return blocks.encode(x, fmt, scale, axis=axis, pad=pad, subnormals=subnormals, kernel=kernel, **options)
    fmt = _scalar_format(fmt, subnormals)
    options = _options(x, fmt, rounding, overflow, key, random_bits, clamp)
    return _encode(x, fmt, check_scale(x, scale), kernel, options)[0]


def decode(
    codes: Tensor | QuantizedTensor,
    fmt: FloatFormat | str | None = None,
    scale: Tensor | float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """scale * value(code), of the codes' shape and of `dtype`; a `QuantizedTensor` knows its format and scales.

    Raises:
        CodeError: codes of another dtype, or out of range.
        DtypeError: `dtype` cannot hold the format.
    """
    if isinstance(codes, QuantizedTensor):
        return blocks.decode(codes, dtype=dtype, out=out)
    if fmt is None or isinstance(fmt := get_format(fmt), BlockFormat):
        raise FormatError(f"format {fmt} with plain codes; give a scalar format, or the QuantizedTensor that encode gave")
    check_dtype(dtype, fmt)
    check_codes(codes, fmt)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = value_tensor(fmt, work, codes.device)[codes.to(torch.int64)]
    result = (values * check_scale(values, scale)).to(dtype)
    return result if out is None else out.copy_(result)


def quantize_with_stats(
    x: Tensor, fmt: FloatFormat | str, scale: Tensor | float = 1.0, **options
) -> tuple[Tensor, QuantStats]:
    """`quantize` and the statistics of the same pass; arguments as there."""
    if isinstance(fmt := get_format(fmt), BlockFormat):
        return blocks.quantize_with_stats(x, fmt, scale, **options)
    subnormals, kernel = options.pop("subnormals", True), options.pop("kernel", None)
    fmt = _scalar_format(fmt, subnormals)
    chosen = _options(x, fmt, **_defaults(options))
    scale = check_scale(x, scale)
    payload, over = eager.round_payload(x.detach(), fmt, scale, **chosen)
    result = (payload.to(eager.compute_dtype(x.dtype)) * scale).to(x.dtype)
    return result, measure(x, result, over)


def encode_with_stats(
    x: Tensor, fmt: FloatFormat | str, scale: Tensor | float = 1.0, **options
) -> tuple[Tensor | QuantizedTensor, QuantStats]:
    """`encode` and the statistics of the same pass; arguments as there."""
    if isinstance(fmt := get_format(fmt), BlockFormat):
        return blocks.encode_with_stats(x, fmt, scale, **options)
    subnormals, kernel = options.pop("subnormals", True), options.pop("kernel", None)
    fmt = _scalar_format(fmt, subnormals)
    chosen = _options(x, fmt, **_defaults(options))
    scale = check_scale(x, scale)
    codes, payload, over = _encode(x, fmt, scale, kernel, chosen)
    result = (payload.to(eager.compute_dtype(x.dtype)) * scale).to(x.dtype)
    return codes, measure(x, result, over)


def _defaults(options: dict) -> dict:
    defaults = {
        "rounding": Rounding.NEAREST_EVEN,
        "overflow": Overflow.NATIVE,
        "key": None,
        "random_bits": 24,
        "clamp": False,
    }
    return {**defaults, **options}


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, fmt, mask_saturated, options):
        if mask_saturated and isinstance(fmt, BlockFormat):
            where = {name: options[name] for name in ("axis", "pad") if name in options}
            ctx.save_for_backward(~blocks.saturated(x, fmt, scale, **where))
        elif mask_saturated:
            work = x.to(eager.compute_dtype(x.dtype))
            ctx.save_for_backward((work / scale).abs() <= fmt.max)
        ctx.masked = mask_saturated
        return quantize(x, fmt, scale, **options)

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0] if ctx.masked else grad), None, None, None, None


def fake_quantize(
    x: Tensor, fmt: FloatFormat | str, scale: Tensor | float = 1.0, *, mask_saturated: bool = False, **options
) -> Tensor:
    """`quantize` with the straight-through gradient dy/dx = 1.

    Args:
        mask_saturated: let no gradient through where |x / scale| > max.
        options: as for `quantize`, without `out`.
    """
    return _StraightThrough.apply(x, scale, get_format(fmt), mask_saturated, options)
