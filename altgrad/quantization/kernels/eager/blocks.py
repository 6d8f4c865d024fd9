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
from altgrad.quantization.block_layout import BlockLayout
from altgrad.quantization.codec import code_dtype, value_tensor
from altgrad.quantization.kernels.block_result import BlockResult
from altgrad.quantization.kernels.eager import scalar as eager
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
        scale = torch.where(amax > 0, amax, 1.0) / fmt.element.max
        return torch.where(poisoned, torch.nan, scale.clamp(_FLOAT32.tiny, _FLOAT32.max)).to(torch.float32)
    ideal = amax / fmt.element.max
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


def scale_values(raw: Tensor, fmt: BlockFormat, upper: Tensor | None) -> Tensor:
    """Scales as float32 multipliers: the stored scale's value, times the tensor scale where there is one."""
    if fmt.has_float_scale:
        return raw
    values = value_tensor(fmt.scale_format, torch.float32, raw.device)[raw.to(torch.int64)]
    return values if upper is None else upper * values


def multipliers(x: Tensor, fmt: BlockFormat, layout: BlockLayout, upper: Tensor | None) -> Tensor:
    """The float32 multiplier of each tile, of shape `layout.grid`."""
    view = x.reshape(layout.outer, layout.rows, layout.columns).to(eager.compute_dtype(x.dtype))
    return scale_values(raw_scales(*tile_amax(view, layout), fmt, upper), fmt, upper)


def spread(scales: Tensor, layout: BlockLayout) -> Tensor:
    """Scales of shape `layout.grid` repeated over their tiles, of the 3-D view's shape."""
    full = scales.repeat_interleave(layout.tile_rows, 1)[:, : layout.rows]
    return full.repeat_interleave(layout.tile_columns, 2)[:, :, : layout.columns]


def round_blocks(
    x: Tensor,
    fmt: BlockFormat,
    layout: BlockLayout,
    element: FloatFormat,
    upper: Tensor | None,
    rounding: Rounding,
    overflow: Overflow,
    key: Tensor | None,
    random_bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(payload, overflow mask, element scales, stored scales): payload is float64, the first three of x's shape."""
    view = x.reshape(layout.outer, layout.rows, layout.columns).to(eager.compute_dtype(x.dtype))
    raw = raw_scales(*tile_amax(view, layout), fmt, upper)
    scales = spread(scale_values(raw, fmt, upper), layout).to(view.dtype)
    native_inf = overflow is Overflow.NATIVE and element.has_inf
    policy = Overflow.SATURATE if native_inf else overflow
    payload, over = eager.round_payload(
        view, element, scales, rounding, policy, key, random_bits, clamp=fmt.has_float_scale
    )
    if native_inf:  # a finite element saturates (OCP MX 1.0, 6.3), an infinite one has its code
        infinite = torch.isinf(view) & ~torch.isnan(scales)
        payload, over = torch.where(infinite, view.double(), payload), over & ~infinite
    over = over & ~torch.isnan(scales)
    shape = x.shape
    return payload.reshape(shape), over.reshape(shape), scales.reshape(shape), raw.reshape(layout.scale_shape)


def codes_of(payload: Tensor, element_scales: Tensor, element: FloatFormat) -> Tensor:
    """Element codes (int32), 0 under a NaN scale (OCP MX 1.0, 5.1: the block is NaN whatever its elements); -1 for none."""
    return torch.where(torch.isnan(element_scales), 0, eager.payload_codes(payload, element))


def run(
    x: Tensor,
    fmt: BlockFormat,
    layout: BlockLayout,
    element: FloatFormat,
    upper: Tensor | None,
    *,
    rounding: Rounding,
    overflow: Overflow,
    key: Tensor | None,
    random_bits: int,
    values: bool = True,
    codes: bool = False,
    stats: bool = False,
    out: Tensor | None = None,
) -> BlockResult:
    """Quantize x in blocks and return values, codes and statistics as asked; the interface that every kernel has."""
    payload, over, scales, raw = round_blocks(x, fmt, layout, element, upper, rounding, overflow, key, random_bits)
    result = (payload.to(scales.dtype) * scales).to(x.dtype)
    found = codes_of(payload, scales, element) if codes else None
    written = out.copy_(result) if out is not None else result if values else None
    return BlockResult(
        written,
        None if found is None else found.clamp(min=0).to(code_dtype(element)),
        raw,
        measure(x, result, over).vector if stats else None,
        None if found is None else (found < 0).sum(),
    )


def decode(codes: Tensor, fmt: BlockFormat, layout: BlockLayout, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Element values times their block's scale (float32 multipliers of shape `layout.scale_shape`), in `dtype`."""
    work = eager.compute_dtype(dtype)
    values = value_tensor(fmt.element, work, codes.device)[codes.to(torch.int64)]
    spreaded = spread(scales.reshape(layout.grid), layout).reshape(codes.shape)
    return (values * spreaded.to(work)).to(dtype)
