"""Checks of what a person passes to the quantization functions; each error gives value, limit and remedy.

`check_call` is the gate that every call passes, eager and traced (`cast.Cast` is the one that calls it): scale, key and
`out` are judged there and nowhere else. What holds for a cast whatever the tensor is judged once, when its plan is made.
"""

from __future__ import annotations

import math
import struct
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from altgrad.errors import BlockError, CodeError, DtypeError, OptionError, RandomKeyError, ScaleError
from altgrad.formats.block import BlockFormat
from altgrad.formats.rounding import Overflow
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import INF_PROBLEM
from altgrad.jit.subnormals import unflushed
from altgrad.quantization.block_layout import BlockLayout
from altgrad.quantization.codec import check_codes, stored_scale_dtype
from altgrad.quantization.memory import (
    PLAIN_TYPES,
    check_beside,
    check_dense,
    check_writable,
    detached,
    is_unusual,
    readable,
)

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_watching_modes, _transform = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_FLOAT = struct.Struct("f")
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


def check_block_dtype(dtype: torch.dtype, fmt: BlockFormat) -> None:
    """Refuse dtypes that are not floating, or have fewer mantissa bits than the elements; scales give the range.

    Raises:
        DtypeError: with the dtype and what to cast to.
    """
    if dtype not in FLOAT_DTYPES:
        raise DtypeError(f"tensor of dtype {dtype}; quantization takes float32, float64, bfloat16 or float16: cast it")
    mantissa = _NARROW[dtype][0] if dtype in _NARROW else 23
    if fmt.element.mantissa_bits > mantissa:
        raise DtypeError(
            f"{dtype} has {mantissa} mantissa bits, {fmt.element} needs {fmt.element.mantissa_bits}; "
            "cast the tensor to float32"
        )


def traced(x: Tensor) -> bool:
    """Whether x must go through a torch operator: it is being compiled, is no plain tensor, or a mode is watching."""
    if torch.compiler.is_compiling():
        return True
    return type(x) not in PLAIN_TYPES or _watching_modes() > 0 or _transform() is not None


def at_hand(x: Tensor) -> bool:
    """Whether kernels may take x as it is: a plain tensor, nothing watches, and its bytes in memory are its values.

    The one cheap question of a small call, `traced` and `is_unusual` in one.
    """
    if is_dynamo_compiling():
        return False
    kind = type(x)
    if (kind is not Tensor and kind is not Parameter) or _watching_modes() or _transform() is not None:
        return False
    return not is_unusual(x)


def hides_from_tracers(x: Tensor) -> bool:
    """Whether a subclass's __torch_function__ would replace every result, and a tracer that watches lose track of x."""
    if torch.compiler.is_compiling() or type(x) in PLAIN_TYPES or not _watching_modes():
        return False
    replaces = getattr(type(x).__torch_function__, "__func__", None) is Tensor.__torch_function__.__func__
    return replaces and torch._C._is_torch_function_enabled()


def as_float32(number: float) -> float:
    """The float32 nearest to a number; inf beyond float32's range."""
    try:
        return _FLOAT.unpack(_FLOAT.pack(number))[0]
    except OverflowError:
        return math.inf


@unflushed
def check_scale(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """The scale as the kernels take it: a float, or a tensor of the compute dtype of `dtype`, on x's device.

    Values of a tensor on a GPU are not read (that would wait for the device); a bad one yields NaN there.

    Raises:
        ScaleError: not positive, not finite, or not broadcastable to x.
    """
    wide = dtype == torch.float64
    if isinstance(scale, Tensor):
        return _scale_tensor(x, scale, wide)
    if torch.compiler.is_compiling() and isinstance(scale, np.ndarray):  # a NumPy number, to the compiler
        return _scale_tensor(x, torch.as_tensor(scale, device="cpu"), wide)
    if not isinstance(scale, Real):
        raise ScaleError(f"scale is a {type(scale).__name__}; pass one positive number, or a floating tensor")
    if torch.compiler.is_compiling():  # the operator checks the number when it runs
        return float(scale)
    return _scale_number(float(scale), wide)


def _scale_number(scale: float, wide: bool) -> float:
    carrier = scale if wide else as_float32(scale)
    if not (carrier > 0 and math.isfinite(carrier)):
        raise ScaleError(
            f"scale {scale} is not positive and finite in the compute dtype; it multiplies grid values back to x's range"
        )
    return carrier


def _scale_tensor(x: Tensor, scale: Tensor, wide: bool) -> Tensor:
    is_traced = traced(x)
    if not torch.compiler.is_compiling() and (type(scale) not in PLAIN_TYPES or is_unusual(scale)):
        check_beside(scale, x, "scale", ScaleError)
        scale = _plain_type(scale) if is_traced else _scale_in_memory(x, scale)
    if not scale.dtype.is_floating_point or scale.dtype.itemsize == 1:
        raise ScaleError(f"scale has dtype {scale.dtype}; pass a float32 or float64 tensor, or a number")
    if scale.device != x.device and (scale.ndim or scale.device.type != "cpu"):
        raise ScaleError(f"scale is on {scale.device}, x on {x.device}; move the scale to x's device")
    lead = x.ndim - scale.ndim
    if scale.ndim and (lead < 0 or any(n not in (1, x.shape[lead + d]) for d, n in enumerate(scale.shape))):
        raise ScaleError(
            f"scale of shape {list(scale.shape)} does not broadcast to x of shape {list(x.shape)}; "
            "use one number, or size 1 on every axis that shares a scale"
        )
    tensor = detached(scale).to(torch.float64 if wide else torch.float32)
    if traced(tensor) or tensor.device.type != "cpu" or not tensor.numel():
        return tensor.to(x.device)
    low, high = (tensor.item(),) * 2 if tensor.numel() == 1 else (float(v) for v in torch.aminmax(tensor))
    if not (low > 0 and high < math.inf):  # false for NaN, too
        raise ScaleError(f"scale holds {low if not low > 0 else high}; every scale must be positive and finite")
    return tensor if x.device == tensor.device else tensor.to(x.device)


def _plain_type(scale: Tensor) -> Tensor:
    """The same values without a subclass that only names them; where a tracer watches, it must go on seeing its own."""
    names = type(scale).__torch_dispatch__ is Tensor.__torch_dispatch__ and not _watching_modes()
    return scale.as_subclass(Tensor) if names else scale


def _scale_in_memory(x: Tensor, scale: Tensor) -> Tensor:
    """A scale that is no plain tensor, as one.

    Raises:
        ScaleError: it has no values that a kernel could read.
    """
    compiled = torch.compiler.is_compiling()  # Dynamo lets a backward ask for no layout, and has no such tensors
    if scale.is_meta or (not compiled and scale.layout is torch.strided and scale._is_zerotensor()):
        kind = "meta" if scale.is_meta else "efficient zero"
        raise ScaleError(f"scale is a {kind} tensor on {scale.device} without values, x is on {x.device}; pass values")
    found = readable(scale, "scale", ScaleError)
    if hasattr(type(found), "__torch_dispatch__") and type(found).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ScaleError(
            f"scale is a {type(scale).__name__} on {scale.device}, x a plain tensor on {x.device}; pass values"
        )
    return found.as_subclass(Tensor)


def check_call(
    x: Tensor,
    scale: Tensor | float | None,
    key: tuple[int, int] | Tensor | None,
    out: Tensor | None,
    draws: bool,
    upper: bool | None,
    dtype: torch.dtype | None,
    decodes: bool = False,
) -> tuple[Any, Any]:
    """The gate of every call, eager and traced: (scale, key) as kernels and operators take them.

    Args:
        x: the tensor, or its codes where the call `decodes`.
        draws: whether the rounding is stochastic.
        upper: None for scalar formats, else whether one scale of the tensor lies above the blocks' scales.
        dtype: of the values that the call returns; None where it returns none.

    Raises:
        ScaleError, RandomKeyError, DtypeError, OptionError: with value, limit and remedy.
    """
    if upper is None:
        if type(scale) is not float or scale != 1.0:
            scale = check_scale(x, scale, dtype if decodes else x.dtype)
    elif not decodes:
        scale = check_upper_scale(x, scale, upper)
    if out is not None:
        if dtype is None:
            raise OptionError("out takes the values, and this call returns none; leave out away")
        check_writable(out, x, dtype, is_traced=traced(x))
    return scale, check_key(x, key) if draws else None


def check_upper_scale(x: Tensor, scale: Any, two_levels: bool) -> Tensor | None:
    """The upper scale of a two-level format, 0-d float32, or None where none is given (by None or 1.0).

    Raises:
        ScaleError: the format has no upper scale, or it is not one positive number.
    """
    if scale is None or (not isinstance(scale, Tensor) and scale == 1.0):
        return None
    if not two_levels:
        raise ScaleError("a block format takes its scales from its blocks, but a scale was given; leave scale at 1.0")
    if isinstance(scale, Tensor):
        check_beside(scale, x, "scale", ScaleError)
        if scale.numel() != 1:
            raise ScaleError(
                f"a two-level format takes one scale per tensor, not {scale.numel()}; pass a number or leave it out"
            )
        scale = scale if scale.ndim == 0 else detached(scale).reshape(())
    return as_scale(x, check_scale(x, scale, torch.float32), torch.float32)


def as_scale(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """The scale as a tensor of the compute dtype beside x, as operators take it."""
    if isinstance(scale, Tensor):
        return scale
    return x.new_full((), scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def as_key(key: tuple[int, int] | Tensor | None) -> Tensor | None:
    """The key as an int64 tensor of shape [2], as operators take it.

    Raises:
        RandomKeyError: as `key_words`.
    """
    if key is None or isinstance(key, Tensor):
        return key
    return torch.tensor(key_words(key), dtype=torch.int64, device="cpu")


def check_key(x: Tensor, key: Any) -> tuple[int, int] | Tensor:
    """The key as kernels take it: two signed 64-bit integers, or a tensor where reading it would wait for a device.

    Raises:
        RandomKeyError: no key, or a malformed one.
    """
    if key is None:
        raise RandomKeyError(
            'stochastic rounding needs key=(seed, stream), two integers; or use rounding="nearest_even"'
        )
    if not isinstance(key, Tensor):
        return key_words(key)
    check_beside(key, x, "key", RandomKeyError)
    if key.dtype != torch.int64 or key.shape != (2,):
        raise RandomKeyError(
            f"key tensor is {key.dtype} of shape {list(key.shape)}; pass int64 of shape [2]: seed, stream"
        )
    if traced(x) or x.is_meta or not (key.device.type == "cpu" or x.device.type == "cpu"):
        return key  # an operator reads it when it runs
    if key.is_meta:
        raise RandomKeyError(f"key tensor is a {type(key).__name__} on {key.device} without values; pass two integers")
    seed, stream = readable(key, "key", RandomKeyError).tolist()
    return seed, stream


def key_words(key: tuple[int, int]) -> tuple[int, int]:
    """(seed, stream) as two signed 64-bit integers.

    Raises:
        RandomKeyError: not two integers of 64 bits.
    """
    words = tuple(key) if isinstance(key, tuple | list) else ()
    if len(words) != 2 or any(not isinstance(word, Integral) or isinstance(word, bool) for word in words):
        raise RandomKeyError(f"key {key!r} is not (seed, stream), two integers of 64 bits")
    seed, stream = int(words[0]), int(words[1])
    for name, word in (("seed", seed), ("stream", stream)):
        if not -(2**63) <= word < 2**64:
            raise RandomKeyError(f"{name} {word} does not fit 64 bits")
    return seed - 2**64 if seed >= 2**63 else seed, stream - 2**64 if stream >= 2**63 else stream


def check_encodable(fmt: FloatFormat, overflow: Overflow) -> None:
    """Refuse overflow policies whose results have no code in the format.

    Raises:
        CodeError: `inf` for a format without inf, `nan` for one without NaN.
    """
    if (overflow is Overflow.INF and not fmt.has_inf) or (overflow is Overflow.NAN and not fmt.has_nan):
        raise CodeError(
            f'{fmt} has no code for {overflow.value}; encode with overflow="saturate", or quantize without encoding'
        )


def check_problems(problems: int | Tensor, fmt: FloatFormat | BlockFormat) -> None:
    """Refuse the codes of a pass that met a value without one.

    Raises:
        CodeError: a NaN or inf met a format that has no code for it.
    """
    if problems:
        bad = "inf" if problems >= INF_PROBLEM else "NaN"
        raise CodeError(
            f"{fmt} has no code for {bad}; remove it first, or quantize (which keeps it) instead of encoding"
        )


def check_stored_scales(
    codes: Tensor, stored: Tensor, upper: Tensor | None, fmt: BlockFormat, layout: BlockLayout
) -> Tensor | None:
    """Refuse what are no stored scales of a block format for these codes; returns the upper scale as 0-d float32.

    Raises:
        ScaleError: not of the dtype that the format stores, or on another device than the codes; CodeError, BlockError:
        codes out of range, or shapes that do not belong to each other.
    """
    for name, given in (("scales", stored),) if upper is None else (("scales", stored), ("tensor_scale", upper)):
        if at_hand(given) and given.device == codes.device:
            continue
        check_dense(given, name, ScaleError)
        if given.device != codes.device or given.is_meta or (given.numel() and is_unusual(given)):
            raise ScaleError(f"{name} are on {given.device}, the codes on {codes.device}; pass both on one device")
    if stored.dtype != stored_scale_dtype(fmt):
        raise ScaleError(f"scales have dtype {stored.dtype}; {fmt} stores {stored_scale_dtype(fmt)} (from encode)")
    check_scale_shape(codes.shape, stored.shape, fmt, layout)
    if not fmt.has_float_scale:
        check_codes(stored, fmt.scale_format)
    if upper is None or (upper.dtype == torch.float32 and not upper.ndim):
        return upper
    if not upper.dtype.is_floating_point or upper.numel() != 1:
        raise ScaleError(
            f"tensor_scale is {upper.dtype} {list(upper.shape)}; {fmt} has one float32 number (from encode)"
        )
    return upper.reshape(()).to(torch.float32)


def check_scale_shape(codes: torch.Size, scales: torch.Size, fmt: BlockFormat, layout: BlockLayout) -> None:
    """Refuse stored scales that do not fit the codes of a block format.

    Raises:
        BlockError: their shapes do not belong to each other.
    """
    if scales != layout.scale_shape:
        raise BlockError(
            f"scales of shape {list(scales)} for codes of shape {list(codes)}; {fmt} has {list(layout.scale_shape)}"
        )
