"""The block functions as torch operators, so that torch.compile traces them as one node each.

Every operator takes (x, upper scale or None, key or None, format spec, axis, pad, subnormals, rounding, overflow,
random_bits, kernel): what `blocks` has checked. Outside of tracing the kernels are called directly.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from altgrad.errors import KernelError, OptionError
from altgrad.formats.block import BlockFormat, block_format_from_spec
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import float32_arithmetic_suffices
from altgrad.quantization.block_layout import block_layout
from altgrad.quantization.checks import traced
from altgrad.quantization.codec import code_dtype
from altgrad.quantization.kernels.block_result import BlockResult
from altgrad.quantization.kernels.eager import blocks as eager_blocks

KERNELS = ("eager", "cpu", "cuda")


class _Operator:
    """A function that is also a torch operator: called as the operator where it must be seen, directly elsewhere."""

    def __init__(self, name: str, mutates: tuple[str, ...], function):
        self.direct = function
        self.operator = torch.library.custom_op(name, function, mutates_args=mutates)
        self.register_fake = self.operator.register_fake

    def __call__(self, x: Tensor, *rest):
        return self.operator(x, *rest) if traced(x) else self.direct(x, *rest)


def chosen(device: torch.device, dtype: torch.dtype, fmt: BlockFormat, kernel: str | None) -> str:
    """The kernel that runs: the one asked for, else by device; `eager` where the device's kernel does not cover the case.

    The compiled kernels cover float32, bf16 and fp16 tensors in formats whose grids stay clear of float32's subnormals,
    which are all named ones.

    Raises:
        OptionError: no such kernel.
        KernelError: the kernel asked for does not cover the device, dtype or format.
    """
    if kernel is not None and kernel not in KERNELS:
        raise OptionError(f"kernel {kernel!r} is not one of {', '.join(KERNELS)}")
    covered = dtype != torch.float64 and all(map(float32_arithmetic_suffices, _grids(fmt)))
    if kernel is None:
        return {"cpu": "cpu", "cuda": "cuda"}.get(device.type, "eager") if covered else "eager"
    if kernel != "eager" and not covered:
        raise KernelError(f'kernel {kernel!r} does not cover {dtype} in {fmt}; use kernel="eager" or a float32 tensor')
    if kernel == "cpu" and device.type != "cpu":
        raise KernelError(f'kernel "cpu" cannot run on a tensor on {device}; use kernel="cuda", "eager", or move it')
    return kernel


def _grids(fmt: BlockFormat) -> list[FloatFormat]:
    return [fmt.element] if fmt.power_of_two or fmt.has_float_scale else [fmt.element, fmt.scale_format]


def _implementation(kernel: str):
    """The module of a kernel; Numba and Triton are imported here, on first use."""
    if kernel == "cpu":
        from altgrad.quantization.kernels.cpu import blocks as cpu_blocks

        return cpu_blocks
    if kernel == "cuda":
        from altgrad.quantization.kernels.cuda import blocks as cuda_blocks

        return cuda_blocks
    return eager_blocks


def _run(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel, **wanted) -> BlockResult:
    fmt = block_format_from_spec(spec)
    layout = block_layout(x.shape, fmt, axis, pad=pad)
    element = fmt.element if subnormals else fmt.element.without_subnormals()
    options = {
        "rounding": Rounding(rounding),
        "overflow": Overflow(overflow),
        "key": key,
        "random_bits": random_bits,
    }
    return _implementation(kernel).run(x, fmt, layout, element, upper, **options, **wanted)


@partial(_Operator, "altgrad::quantize_blocks", ())
def quantize(
    x: Tensor,
    upper: Tensor | None,
    key: Tensor | None,
    spec: str,
    axis: int,
    pad: bool,
    subnormals: bool,
    rounding: str,
    overflow: str,
    random_bits: int,
    kernel: str,
) -> Tensor:
    """Values of x's shape and dtype."""
    values = _run(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel).values
    assert values is not None
    return values


@quantize.register_fake
def _(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@partial(_Operator, "altgrad::quantize_blocks_out", ("out",))
def quantize_out(
    x: Tensor,
    upper: Tensor | None,
    key: Tensor | None,
    spec: str,
    axis: int,
    pad: bool,
    subnormals: bool,
    rounding: str,
    overflow: str,
    random_bits: int,
    kernel: str,
    out: Tensor,
) -> None:
    """Writes the values to `out`, which may be x."""
    _run(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel, out=out)


@quantize_out.register_fake
def _(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel, out):
    return None


@partial(_Operator, "altgrad::quantize_blocks_stats", ())
def quantize_stats(
    x: Tensor,
    upper: Tensor | None,
    key: Tensor | None,
    spec: str,
    axis: int,
    pad: bool,
    subnormals: bool,
    rounding: str,
    overflow: str,
    random_bits: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """(values, statistics vector)."""
    found = _run(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel, stats=True)
    assert found.values is not None
    assert found.stats is not None
    return found.values, found.stats


@quantize_stats.register_fake
def _(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(7, dtype=torch.float64)


@partial(_Operator, "altgrad::encode_blocks", ())
def encode(
    x: Tensor,
    upper: Tensor | None,
    key: Tensor | None,
    spec: str,
    axis: int,
    pad: bool,
    subnormals: bool,
    rounding: str,
    overflow: str,
    random_bits: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, stored scales, number of elements without a code)."""
    found = _run(
        x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel, values=False, codes=True
    )
    assert found.codes is not None
    return found.codes, found.scales, found.missing if found.missing is not None else x.new_zeros((), dtype=torch.int64)


def _fake_codes(x, spec, axis) -> tuple[Tensor, Tensor, Tensor]:
    fmt = block_format_from_spec(spec)
    shape = block_layout(x.shape, fmt, axis, pad=True).scale_shape
    scale_dtype = torch.float32 if fmt.has_float_scale else code_dtype(fmt.scale_format)
    codes = torch.empty(x.shape, dtype=code_dtype(fmt.element), device=x.device)
    return codes, x.new_empty(shape, dtype=scale_dtype), x.new_empty((), dtype=torch.int64)


@encode.register_fake
def _(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel):
    return _fake_codes(x, spec, axis)


@partial(_Operator, "altgrad::encode_blocks_stats", ())
def encode_stats(
    x: Tensor,
    upper: Tensor | None,
    key: Tensor | None,
    spec: str,
    axis: int,
    pad: bool,
    subnormals: bool,
    rounding: str,
    overflow: str,
    random_bits: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, stored scales, number of elements without a code, statistics vector)."""
    arguments = (x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel)
    found = _run(*arguments, values=False, codes=True, stats=True)
    assert found.codes is not None
    assert found.stats is not None
    missing = found.missing if found.missing is not None else x.new_zeros((), dtype=torch.int64)
    return found.codes, found.scales, missing, found.stats


@encode_stats.register_fake
def _(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel):
    return (*_fake_codes(x, spec, axis), x.new_empty(7, dtype=torch.float64))


@partial(_Operator, "altgrad::quantize_encode_blocks", ())
def quantize_encode(
    x: Tensor,
    upper: Tensor | None,
    key: Tensor | None,
    spec: str,
    axis: int,
    pad: bool,
    subnormals: bool,
    rounding: str,
    overflow: str,
    random_bits: int,
    kernel: str,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(values, codes, stored scales, number of elements without a code, statistics vector or an empty tensor)."""
    arguments = (x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel)
    found = _run(*arguments, codes=True, stats=stats)
    assert found.values is not None
    assert found.codes is not None
    missing = found.missing if found.missing is not None else x.new_zeros((), dtype=torch.int64)
    vector = found.stats if found.stats is not None else x.new_empty(0, dtype=torch.float64)
    return found.values, found.codes, found.scales, missing, vector


@quantize_encode.register_fake
def _(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel, stats):
    vector = x.new_empty(7 if stats else 0, dtype=torch.float64)
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device), *_fake_codes(x, spec, axis), vector)


@partial(_Operator, "altgrad::decode_blocks", ())
def decode(
    codes: Tensor, scales: Tensor, upper: Tensor | None, spec: str, axis: int, dtype: torch.dtype, kernel: str
) -> Tensor:
    """Values of codes and stored scales."""
    fmt = block_format_from_spec(spec)
    layout = block_layout(codes.shape, fmt, axis, pad=True)
    return eager_blocks.decode(codes, fmt, layout, eager_blocks.scale_values(scales, fmt, upper), dtype)


@decode.register_fake
def _(codes, scales, upper, spec, axis, dtype, kernel):
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


@partial(_Operator, "altgrad::block_scales", ())
def scales(x: Tensor, upper: Tensor | None, spec: str, axis: int, pad: bool) -> Tensor:
    """The float32 multiplier of each block."""
    fmt = block_format_from_spec(spec)
    layout = block_layout(x.shape, fmt, axis, pad=pad)
    return eager_blocks.multipliers(x, fmt, layout, upper).reshape(layout.scale_shape)


@scales.register_fake
def _(x, upper, spec, axis, pad):
    shape = block_layout(x.shape, block_format_from_spec(spec), axis, pad=True).scale_shape
    return x.new_empty(shape, dtype=torch.float32)


@partial(_Operator, "altgrad::saturated_blocks", ())
def saturated(x: Tensor, upper: Tensor | None, spec: str, axis: int, pad: bool) -> Tensor:
    """Mask of x's shape: |x / scale| is beyond the element's max (or NaN)."""
    fmt = block_format_from_spec(spec)
    layout = block_layout(x.shape, fmt, axis, pad=pad)
    each = eager_blocks.spread(eager_blocks.multipliers(x, fmt, layout, upper), layout).reshape(x.shape)
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return ~((wide / each).abs() <= fmt.element.max)


@saturated.register_fake
def _(x, upper, spec, axis, pad):
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)
