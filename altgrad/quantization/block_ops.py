"""The block functions as torch operators, so that torch.compile traces them as one node each.

Every operator takes (x, upper scale or None, key or None, format spec, axis, pad, subnormals, rounding, overflow,
random_bits, kernel): what `blocks` has checked. Outside of tracing the kernels are called directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.errors import OptionError
from altgrad.quantization.block_formats import block_format_from_spec
from altgrad.quantization.block_layout import block_layout
from altgrad.quantization.codec import code_dtype
from altgrad.quantization.kernels import eager_blocks
from altgrad.quantization.kernels.eager_blocks import BlockResult
from altgrad.quantization.rounding import Overflow, Rounding

KERNELS = ("eager",)


def chosen(x: Tensor, kernel: str | None) -> str:
    """The name of the kernel that runs: the one asked for, else by device.

    Raises:
        OptionError: no such kernel.
    """
    if kernel is None:
        return "eager"
    if kernel not in KERNELS:
        raise OptionError(f"kernel {kernel!r} is not one of {', '.join(KERNELS)}")
    return kernel


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
    return eager_blocks.run(x, fmt, layout, element, upper, **options, **wanted)


@torch.library.custom_op("altgrad::quantize_blocks", mutates_args=())
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


@torch.library.custom_op("altgrad::quantize_blocks_out", mutates_args=("out",))
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


@torch.library.custom_op("altgrad::quantize_blocks_stats", mutates_args=())
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


@torch.library.custom_op("altgrad::encode_blocks", mutates_args=())
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
    found = _run(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel, codes=True)
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


@torch.library.custom_op("altgrad::encode_blocks_stats", mutates_args=())
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
    found = _run(*arguments, codes=True, stats=True)
    assert found.codes is not None
    assert found.stats is not None
    missing = found.missing if found.missing is not None else x.new_zeros((), dtype=torch.int64)
    return found.codes, found.scales, missing, found.stats


@encode_stats.register_fake
def _(x, upper, key, spec, axis, pad, subnormals, rounding, overflow, random_bits, kernel):
    return (*_fake_codes(x, spec, axis), x.new_empty(7, dtype=torch.float64))


@torch.library.custom_op("altgrad::decode_blocks", mutates_args=())
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
