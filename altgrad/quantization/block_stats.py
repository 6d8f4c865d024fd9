"""What the blocks of one quantization look like: how their scales are distributed, how many are saturated or flushed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from altgrad.formats.block import BlockFormat
from altgrad.quantization.block_layout import block_layout

BINADES = 256
"""One bin for each exponent of float32: bin e holds scales in [2^(e - 127), 2^(e - 126)), bin 0 all below 2^-126."""
COLUMNS = 3 + BINADES


@torch.no_grad()
def measure_blocks(x: Tensor, values: Tensor, scales: Tensor, fmt: BlockFormat, axis: int = -1) -> Tensor:
    """Counts of x's blocks, float64 [3 + 256] on x's device: one reduction of x and one of its quantized values;
    nothing is synced.

    Counted are blocks that hold a number other than 0 and no NaN or inf: all of them; saturated ones, whose largest element lies
    beyond the largest value at their scale, after rounding to nearest; flushed ones, which became zeros altogether; then
    blocks by the binade of their scale (the tensor's scale included), in the order of `BINADES`; a scale of 0 is in none.

    Args:
        x: the tensor that was quantized. values: the result, of its shape.
        scales: what dequantizes each block, as numbers, in the layout of `QuantizedTensor.scales`.
        axis: the axis that blocks run along.
    """
    layout = block_layout(x.shape, fmt, axis, pad=True)
    _, rows, columns = layout.grid
    filled = (0, columns * layout.tile_columns - layout.columns, 0, rows * layout.tile_rows - layout.rows)

    def largest(t: Tensor) -> Tensor:
        view = t.detach().reshape(layout.outer, layout.rows, layout.columns)
        view = pad(view, filled) if any(filled) else view
        tiles = view.view(layout.outer, rows, layout.tile_rows, columns, layout.tile_columns)
        return torch.linalg.vector_norm(tiles, torch.inf, (2, 4)).flatten()

    if not x.numel():
        return torch.zeros(COLUMNS, dtype=torch.float64, device=x.device)
    size, kept, scale = largest(x).float(), largest(values), scales.float().flatten()
    counted = (size > 0) & size.isfinite()
    element = fmt.element
    step = element.ulp(element.max)
    limit = scale.double() * (element.max + step / 2)
    odd = (element.max / step) % 2 == 1  # a tie goes beyond then
    beyond = size.double() >= limit if odd else size.double() > limit
    exponents = (scale.view(torch.int32) >> 23).clamp(0, BINADES - 1).long()
    bins = torch.zeros(BINADES, dtype=torch.float64, device=x.device)
    bins.scatter_add_(
        0, exponents, (counted & (scale > 0)).double()
    )  # integers, so in any order; and no wait for the host
    counts = torch.stack([counted.sum(), (beyond & counted).sum(), ((kept == 0) & counted).sum()])
    return torch.cat([counts.double(), bins])
