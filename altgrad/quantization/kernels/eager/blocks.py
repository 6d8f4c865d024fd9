"""Block formats in plain torch operations, for any device: the readable specification of the fast block kernels.

Each tile's scale is found from its amax and spread over its elements; what remains is scalar rounding under a tensor of
scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.formats.block import BlockFormat
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import INF_PROBLEM
from altgrad.jit.subnormals import unflushed
from altgrad.quantization.block_layout import BlockLayout
from altgrad.quantization.codec import code_dtype, divided, scale_values, value_tensor
from altgrad.quantization.kernels.eager import scalar as eager
from altgrad.quantization.plan import Plan
from altgrad.quantization.quantized import Quantized
from altgrad.quantization.stats import measure

E8M0_BIAS, E8M0_NAN = 127, 255
_FLOAT32 = torch.finfo(torch.float32)


def tile_amax(x: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """(largest finite magnitude, whether it holds a NaN) of each tile, of shape `layout.grid`; x is the 3-D view."""
    outer, tiles_down, tiles_across = layout.grid
    rows, columns = tiles_down * layout.tile_rows, tiles_across * layout.tile_columns
    whole = torch.nn.functional.pad(x, (0, columns - layout.columns, 0, rows - layout.rows))
    tiles = whole.view(outer, tiles_down, layout.tile_rows, tiles_across, layout.tile_columns)
    if tiles.numel() == 0:
        return x.new_zeros(layout.grid), torch.zeros(layout.grid, dtype=torch.bool, device=x.device)
    amax = torch.where(torch.isfinite(tiles), tiles.abs(), 0).amax(dim=(2, 4))
    return amax, torch.isnan(tiles).any(dim=4).any(dim=2)


def raw_scales(amax: Tensor, has_nan: Tensor, fmt: BlockFormat, upper: Tensor | None) -> Tensor:
    """Stored scales: E8M0 exponent codes (uint8), codes of the scale format (uint8 or int32), or float32 scales."""
    poisoned = has_nan if not fmt.element.has_nan else torch.zeros_like(has_nan)
    if fmt.power_of_two:
        exponent = amax_exponent(amax, fmt) - fmt.element_emax
        return torch.where(poisoned, E8M0_NAN, exponent.clamp(-127, 127) + E8M0_BIAS).to(torch.uint8)
    if fmt.has_float_scale:
        scale = divided(torch.where(amax > 0, amax, 1.0), fmt.element.max)
        return torch.where(poisoned, torch.nan, scale.clamp(_FLOAT32.tiny, _FLOAT32.max)).to(torch.float32)
    ideal = divided(amax, fmt.element.max)
    if upper is not None:
        ideal = ideal / upper
    payload, _ = eager.round_payload(ideal, fmt.scale_format, 1.0, Rounding.NEAREST_EVEN, Overflow.SATURATE)
    payload = torch.where(poisoned, torch.nan, payload.clamp(min=fmt.scale_format.min_subnormal))
    return eager.payload_codes(payload, fmt.scale_format).to(code_dtype(fmt.scale_format))


def amax_exponent(amax: Tensor, fmt: BlockFormat) -> Tensor:
    """e + up of amax = m * 2^e under the format's rule, int64; far below any scale's exponent for amax 0."""
    mantissa, exponent = torch.frexp(amax)  # 0.5 <= mantissa < 1
    bits = 52 if amax.dtype == torch.float64 else 23
    fraction = ((mantissa.double() * 2 - 1) * 2.0**bits).to(torch.int64)
    up = fraction >= fmt.round_up_from(bits)
    return torch.where(amax > 0, exponent.to(torch.int64) - 1 + up, -2000)


def spread(scales: Tensor, layout: BlockLayout) -> Tensor:
    """Scales of shape `layout.grid` repeated over their tiles, of the 3-D view's shape."""
    full = scales.repeat_interleave(layout.tile_rows, 1)[:, : layout.rows]
    return full.repeat_interleave(layout.tile_columns, 2)[:, :, : layout.columns]


def round_blocks(
    plan: Plan, x: Tensor, upper: Tensor | None, key: tuple[int, int] | Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(payload, overflow mask, element scales, stored scales): payload is float64, the first three of x's shape."""
    fmt, layout = plan.format, plan.layout(x.shape)
    view = x.reshape(layout.outer, layout.rows, layout.columns).to(plan.compute_dtype)
    raw = raw_scales(*tile_amax(view, layout), fmt, upper)
    scales = spread(scale_values(raw, fmt, upper), layout).to(view.dtype)
    native_inf = plan.overflow is Overflow.NATIVE and plan.grid.has_inf
    policy = Overflow.SATURATE if native_inf else plan.overflow
    payload, over = eager.round_payload(
        view, plan.grid, scales, plan.rounding, policy, key, plan.random_bits, clamp=fmt.has_float_scale
    )
    if native_inf:  # a finite element saturates (OCP MX 1.0, 6.3), an infinite one has its code
        infinite = torch.isinf(view) & ~torch.isnan(scales)
        payload, over = torch.where(infinite, view.double(), payload), over & ~infinite
    over = over & ~torch.isnan(scales)
    shape = x.shape
    return payload.reshape(shape), over.reshape(shape), scales.reshape(shape), raw.reshape(layout.scale_shape)


def codes_of(payload: Tensor, element_scales: Tensor, element: FloatFormat) -> Tensor:
    """Element codes (int64), 0 under a NaN scale (OCP MX 1.0, 5.1: the block is NaN whatever its elements); -1 for none."""
    return torch.where(torch.isnan(element_scales), 0, eager.payload_codes(payload, element))


@unflushed
def run(
    plan: Plan, x: Tensor, scale: Tensor | None, key: tuple[int, int] | Tensor | None, out: Tensor | None
) -> Quantized:
    """One pass of a block format; `scale` is the upper scale of a two-level format."""
    x = x.detach()
    payload, over, scales, raw = round_blocks(plan, x, scale, key)
    result = (payload.to(scales.dtype) * scales).to(x.dtype)
    found = codes_of(payload, scales, plan.grid) if plan.codes else None
    written = out.copy_(result) if out is not None else result if plan.values else None
    return Quantized(
        written,
        None if found is None else found.clamp(min=0).to(code_dtype(plan.grid)),
        raw,
        measure(x, result, over) if plan.stats else None,
        scale,
        0 if found is None else (found < 0).any() * INF_PROBLEM,
    )


@unflushed
def decode(plan: Plan, codes: Tensor, scale: Tensor, upper: Tensor | None, out: Tensor | None) -> Tensor:
    """Element values times their block's multiplier: its stored scale's value, times the tensor scale `upper`."""
    layout = plan.layout(codes.shape)
    scale = scale_values(scale, plan.format, upper)
    values = value_tensor(plan.format.element, plan.compute_dtype, codes.device)[codes.to(torch.int64)]
    spreaded = spread(scale.reshape(layout.grid), layout).reshape(codes.shape)
    result = (values * spreaded.to(plan.compute_dtype)).to(plan.dtype)
    return result if out is None else out.copy_(result)
