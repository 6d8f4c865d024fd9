"""Quantization with a gradient: forward the values of `quantize`, backward the gradient as if nothing had been rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.block_layout import block_layout
from altgrad.quantization.cast import cast_for
from altgrad.quantization.codec import divided
from altgrad.quantization.implied_scale import resolved_scale
from altgrad.quantization.kernels.eager.blocks import spread
from altgrad.quantization.memory import detached
from altgrad.quantization.quantized import Quantized


class _StraightThrough(torch.autograd.Function):
    """The values of `quantized`, the gradient of `x` where `kept` says so (None: everywhere)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, quantized, kept):
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        return _where(ctx.saved_tensors[0], grad), None, None


class _WithForwardMode(_StraightThrough):
    """The same in forward mode, too, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx, x, quantized, kept):
        return _where(ctx.saved_tensors[0], x)


def _where(kept: Tensor | None, grad: Tensor) -> Tensor:
    return grad if kept is None else torch.where(kept, grad, 0.0)


def fake_quantize(
    x: Tensor,
    fmt: FloatFormat | BlockFormat | str,
    scale: Tensor | float | str | None = None,
    *,
    mask_saturated: bool = False,
    clamp: bool = False,
    key: tuple[int, int] | Tensor | None = None,
    kernel: str | None = None,
    **options,
) -> Tensor:
    """`quantize` with the straight-through gradient dy/dx = 1; works under `torch.func`.

    As there, give `scale="amax"` unless x is known to fit the format.

    Args:
        mask_saturated: let no gradient through where |x / scale| > max.
        scale, clamp, key, kernel, options: as for `quantize`, without `out`.
    """
    scale, clamp = resolved_scale(x, fmt, scale, clamp)
    found = cast_for(fmt, clamp=clamp, **options)(x, scale, key=key, kernel=kernel)
    kept = None
    if mask_saturated:
        where = {name: options[name] for name in ("axis", "pad") if name in options}
        kept = _unsaturated(detached(x), fmt, scale, found, **where)
    function = _StraightThrough if torch.compiler.is_compiling() else _WithForwardMode
    return function.apply(x, found.values, kept)


def _unsaturated(
    x: Tensor, fmt: FloatFormat | BlockFormat | str, scale: Tensor | float, found: Quantized, **where
) -> Tensor:
    """Where |x / scale| <= max, under the blocks' own scales for a block format."""
    work = x if x.dtype == torch.float64 else x.float()
    if found.scales is not None:
        block = get_format(fmt)
        layout = block_layout(x.shape, block, **where)
        each = found.scales
        if not block.has_float_scale:
            upper = 1.0 if found.tensor_scale is None else found.tensor_scale
            each = cast_for(block.scale_format).decode(each, upper)
        scale = spread(each.reshape(layout.grid), layout).reshape(x.shape)
    return divided(work, scale).abs() <= _largest(fmt)


def _largest(fmt: FloatFormat | BlockFormat | str) -> float:
    found = get_format(fmt)
    return found.element.max if isinstance(found, BlockFormat) else found.max


_largest._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, without the compiler
