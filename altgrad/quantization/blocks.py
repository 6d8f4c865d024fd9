"""Quantization with block formats: the calls of `ops` for formats whose scale is shared by a block of elements.

    X_b = scale of block b from its amax (`formats.block` has the rules);   v_i = X_b * round_to_grid(x_i / X_b)

Everything is computed in float32 (float64 tensors: in float64) and rounded once to the tensor's own dtype.

Edge values. The amax is taken over the finite elements. A block of zeros has the smallest scale (E8M0: 2^-127, as in
gfloat and torchao; FP32: 1 / element max) and stays zero. Scales end at the scale format's ends: beyond 2^127 the
elements saturate, below 2^-127 they underflow. NaN keeps its place where the element has a NaN code; where it has none
(MXFP4, MXFP6, MXINT8, NVFP4) the block's scale becomes NaN and with it every value of the block, the one way that OCP MX
1.0, 5.1 has to store a NaN. +-inf stays in place without touching the scale, as for scalar formats; where the element
has no code for it, encoding is an error. Under `native` finite elements beyond max saturate (6.3), in E5M2, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altgrad.errors import BlockError, CodeError, DtypeError, ScaleError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Overflow, Rounding, as_option
from altgrad.quantization import block_ops
from altgrad.quantization.block_layout import block_layout
from altgrad.quantization.checks import check_encodable, check_key, check_scale
from altgrad.quantization.codec import check_codes
from altgrad.quantization.kernels.eager import blocks as eager_blocks
from altgrad.quantization.scaling import amax
from altgrad.quantization.stats import QuantStats

_MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in a block format: one code per element and one stored scale per block.

    codes: uint8 (int32 for elements of more than 8 bits), of the tensor's shape, one code per entry (not packed).
    scales: stored scales: uint8 codes of the scale format (E8M0: exponent + 127, 255 for NaN), or float32; the tensor's
        shape with each blocked axis divided by the block, rounded up.
    format, axis, shape: as given to `encode`.
    tensor_scale: 0-d float32 upper scale of a two-level format (NVFP4), else None.
    """

    codes: Tensor
    scales: Tensor
    format: BlockFormat
    axis: int
    shape: torch.Size
    tensor_scale: Tensor | None = None

    @property
    def scale_values(self) -> Tensor:
        """The multiplier of each block as float32, the tensor scale included; NaN for a NaN block."""
        return eager_blocks.scale_values(self.scales, self.format, self.tensor_scale)

    @property
    def storage_bits(self) -> int:
        """Bits that the packed format takes: elements, scales and tensor scale."""
        scales = self.scales.numel() * self.format.scale_format.bits
        return self.codes.numel() * self.format.element.bits + scales + (32 if self.tensor_scale is not None else 0)


def two_level_scale(tensor_amax: Tensor, fmt: BlockFormat) -> Tensor:
    """Tensor scale of a two-level format: amax / (element max * scale max) as float32; amax 0 counts as 1.

    The result is at least float32's smallest normal number.
    """
    largest = torch.where(tensor_amax > 0, tensor_amax, 1.0)
    limits = torch.finfo(torch.float32)
    return (largest / (fmt.element.max * fmt.scale_format.max)).clamp(limits.tiny, limits.max).to(torch.float32)


def _upper_scale(x: Tensor, fmt: BlockFormat, scale: Tensor | float) -> Tensor | None:
    given = isinstance(scale, Tensor) or scale != 1.0
    if not fmt.tensor_scale:
        if given:
            raise ScaleError(f"{fmt} takes its scales from its blocks, but a scale was given; leave scale at 1.0")
        return None
    if not given:
        return two_level_scale(amax(x), fmt)
    number = scale if isinstance(scale, Tensor) else torch.tensor(float(scale))
    if torch.numel(number) != 1:
        raise ScaleError(f"{fmt} takes one scale per tensor, not {torch.numel(number)}; pass a number or leave it out")
    checked = check_scale(x, torch.reshape(number, ()))
    return torch.as_tensor(checked, dtype=torch.float32, device=x.device)


def _check_dtype(x: Tensor, fmt: BlockFormat) -> None:
    if x.dtype not in _MANTISSA_BITS:
        raise DtypeError(
            f"tensor of dtype {x.dtype}; quantization takes float32, float64, bfloat16 or float16: cast it"
        )
    if fmt.element.mantissa_bits > _MANTISSA_BITS[x.dtype]:
        raise DtypeError(
            f"{x.dtype} has {_MANTISSA_BITS[x.dtype]} mantissa bits, {fmt.element} needs {fmt.element.mantissa_bits}; "
            "cast the tensor to float32"
        )


def _arguments(x, fmt, scale, axis, pad, rounding, overflow, key, random_bits, subnormals, kernel) -> tuple:
    """Checked arguments in the order of the operators in `block_ops`."""
    _check_dtype(x, fmt)
    block_layout(x.shape, fmt, axis, pad=pad)
    rounding, overflow = as_option(Rounding, rounding), as_option(Overflow, overflow)
    key = check_key(rounding, key, random_bits)
    upper = _upper_scale(x, fmt, scale)
    if not subnormals:
        fmt.element.without_subnormals()
    facts = (fmt.spec, axis, pad, subnormals, rounding.value, overflow.value, random_bits)
    return x.detach(), upper, key, *facts, block_ops.chosen(x.device, x.dtype, fmt, kernel)


def quantize(
    x: Tensor,
    fmt: BlockFormat | str,
    scale: Tensor | float = 1.0,
    *,
    axis: int = -1,
    pad: bool = False,
    rounding: Rounding | str = Rounding.NEAREST_EVEN,
    overflow: Overflow | str = Overflow.NATIVE,
    key: tuple[int, int] | Tensor | None = None,
    random_bits: int = 24,
    subnormals: bool = True,
    clamp: bool = False,
    out: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """x with every block on the grid of its own scale; a tensor of x's shape and dtype, detached.

    Args:
        x: float32, float64, bfloat16 or float16 tensor of any layout, of at least one axis (two for tiles).
        fmt: a block format or its name.
        scale: leave at 1.0: the scales come from the blocks. For a two-level format (NVFP4) any other number, or a
            tensor of one element, is taken as the tensor scale instead of amax / (element max * scale max).
        axis: axis that the blocks run along; tiles lie on the last two axes.
        pad: let the last block along the axis be short; otherwise the axis must be a multiple of the block.
        clamp: has no effect; a block's scale already follows its amax.
        rounding, overflow, key, random_bits, subnormals, out, kernel: as in `ops.quantize`; stochastic rounding counts
            elements in C order of x, whatever the axis.

    Raises:
        BlockError: the axis does not exist or is no multiple of the block.
        DtypeError, ScaleError, RandomKeyError, OptionError: as for scalar formats.
    """
    fmt = _block_format(fmt)
    arguments = _arguments(x, fmt, scale, axis, pad, rounding, overflow, key, random_bits, subnormals, kernel)
    if out is None:
        return block_ops.quantize(*arguments)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise DtypeError(f"out is {out.dtype} {list(out.shape)}; it must be x's {x.dtype} {list(x.shape)}")
    block_ops.quantize_out(*arguments, out)
    return out


def quantize_with_stats(x: Tensor, fmt: BlockFormat | str, scale: Tensor | float = 1.0, **options):
    """(`quantize`, `QuantStats` of the same pass); overflow counts elements beyond the element's max under the scale."""
    result, stats = block_ops.quantize_stats(*_from_options(x, _block_format(fmt), scale, options))
    return result, QuantStats(stats)


def encode(x: Tensor, fmt: BlockFormat | str, scale: Tensor | float = 1.0, **options) -> QuantizedTensor:
    """Codes and scales of x; decode(encode(x)) equals quantize(x) bit for bit. Options as for `quantize`, but `out`.

    Raises:
        CodeError: an infinite element, or the overflow policy's result, has no code.
    """
    return _encode(x, _block_format(fmt), scale, options, block_ops.encode)[0]


def encode_with_stats(x: Tensor, fmt: BlockFormat | str, scale: Tensor | float = 1.0, **options):
    """(`encode`, `QuantStats` of the same pass)."""
    quantized, rest = _encode(x, _block_format(fmt), scale, options, block_ops.encode_stats)
    return quantized, QuantStats(rest[0])


def quantize_and_encode(x: Tensor, fmt: BlockFormat | str, scale: Tensor | float = 1.0, **options):
    """(`quantize`, `encode`) of one pass; an element without a code gets code 0 and no error, the values keep it."""
    fmt = _block_format(fmt)
    arguments = _from_options(x, fmt, scale, options)
    values, codes, scales, _, _ = block_ops.quantize_encode(*arguments, False)
    return values, QuantizedTensor(codes, scales, fmt, options.get("axis", -1), x.shape, arguments[1])


def quantize_and_encode_with_stats(x: Tensor, fmt: BlockFormat | str, scale: Tensor | float = 1.0, **options):
    """(`quantize`, `encode`, `QuantStats`) of one pass."""
    fmt = _block_format(fmt)
    arguments = _from_options(x, fmt, scale, options)
    values, codes, scales, _, stats = block_ops.quantize_encode(*arguments, True)
    quantized = QuantizedTensor(codes, scales, fmt, options.get("axis", -1), x.shape, arguments[1])
    return values, quantized, QuantStats(stats)


def _encode(x, fmt, scale, options, operator) -> tuple[QuantizedTensor, tuple]:
    overflow = as_option(Overflow, options.get("overflow", Overflow.NATIVE))
    check_encodable(fmt.element, overflow)
    arguments = _from_options(x, fmt, scale, options)
    codes, scales, missing, *rest = operator(*arguments)
    may_miss = not fmt.element.has_inf and overflow is Overflow.NATIVE
    if may_miss and not torch.compiler.is_compiling() and int(missing):
        raise CodeError(
            f'{fmt.element} of {fmt} has no code for inf; remove it first, or encode with overflow="saturate"'
        )
    axis = options.get("axis", -1)
    return QuantizedTensor(codes, scales, fmt, axis, x.shape, arguments[1]), tuple(rest)


def _from_options(x, fmt, scale, options) -> tuple:
    options = {"clamp": False, "out": None, **options}
    for name in ("clamp", "out"):
        options.pop(name)
    defaults = {
        "axis": -1,
        "pad": False,
        "rounding": Rounding.NEAREST_EVEN,
        "overflow": Overflow.NATIVE,
        "key": None,
        "random_bits": 24,
        "subnormals": True,
        "kernel": None,
    }
    return _arguments(x, fmt, scale, **{**defaults, **options})


def decode(
    quantized: QuantizedTensor,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Values of an encoded tensor: scale times element value, rounded once to `dtype`.

    Raises:
        CodeError: codes of another dtype, or out of range.
        BlockError: codes and scales do not fit the format's blocks.
        DtypeError: `dtype` cannot hold the element.
    """
    fmt, codes = quantized.format, quantized.codes
    _check_dtype(torch.empty(0, dtype=dtype), fmt)
    if not torch.compiler.is_compiling():
        check_codes(codes, fmt.element)
    layout = block_layout(codes.shape, fmt, quantized.axis, pad=True)
    if tuple(quantized.scales.shape) != layout.scale_shape:
        raise BlockError(
            f"scales of shape {list(quantized.scales.shape)} for codes of shape {list(codes.shape)}; {fmt} along axis "
            f"{quantized.axis} has {list(layout.scale_shape)}"
        )
    where = (fmt.spec, quantized.axis, dtype, block_ops.chosen(codes.device, dtype, fmt, kernel))
    values = block_ops.decode(codes, quantized.scales, quantized.tensor_scale, *where)
    return values if out is None else out.copy_(values)


def block_scales(
    x: Tensor, fmt: BlockFormat | str, scale: Tensor | float = 1.0, *, axis: int = -1, pad: bool = False
) -> Tensor:
    """The multiplier of each block of x as float32 (a tensor scale included), of `QuantizedTensor.scales`' shape."""
    fmt = _block_format(fmt)
    return block_ops.scales(x.detach(), _upper_scale(x, fmt, scale), fmt.spec, axis, pad)


def saturated(
    x: Tensor, fmt: BlockFormat | str, scale: Tensor | float = 1.0, *, axis: int = -1, pad: bool = False
) -> Tensor:
    """Mask of x's shape: |x / X| > element max, where a masked straight-through gradient stops."""
    fmt = _block_format(fmt)
    return block_ops.saturated(x.detach(), _upper_scale(x, fmt, scale), fmt.spec, axis, pad)


def _block_format(fmt: BlockFormat | str) -> BlockFormat:
    found = get_format(fmt)
    if not isinstance(found, BlockFormat):
        raise BlockError(f"{found} is a scalar format; give a block format such as MXFP8 or {found}/32:E8M0")
    return found
