"""How blocks lie in a tensor: every block format is a grid of tiles on a 3-D view [outer, rows, columns].

    blocks of b along the last axis    [1, everything before, n]     tiles of 1 x b
    blocks of b along another axis     [before, n, after]            tiles of b x 1
    tiles of r x c                     [before, n, m]                tiles of r x c

A padded last tile is simply shorter: the zeros it would be filled with change neither its amax nor any element.
This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from altgrad.errors import BlockError
from altgrad.formats.block import BlockFormat


class BlockLayout(NamedTuple):
    """The 3-D view of a tensor, its tile, and the shape of its scales."""

    outer: int
    rows: int
    columns: int
    tile_rows: int
    tile_columns: int
    scale_shape: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of tiles along each axis of the view."""
        return self.outer, -(-self.rows // self.tile_rows), -(-self.columns // self.tile_columns)

    @property
    def is_padded(self) -> bool:
        """Whether the last tile along an axis is shorter than the others."""
        return self.rows % self.tile_rows != 0 or self.columns % self.tile_columns != 0


def block_layout(shape: Sequence[int], fmt: BlockFormat, axis: int = -1, *, pad: bool = False) -> BlockLayout:
    """Where the blocks of `fmt` lie in a tensor of that shape.

    Args:
        shape: the tensor's shape; at least one axis (two for tiles).
        axis: the axis that blocks run along; tiles take the last two axes and -1.
        pad: let the last block be short where the axis is no multiple of the block.

    Raises:
        BlockError: the axis does not exist, or is no multiple of the block without `pad`.
    """
    shape = tuple(shape)
    needed = 2 if fmt.is_tile else 1
    if len(shape) < needed:
        raise BlockError(f"{fmt} needs a tensor of at least {needed} axes, not shape {list(shape)}; reshape it first")
    if not -len(shape) <= axis < len(shape):
        raise BlockError(f"axis {axis} is outside {-len(shape)}..{len(shape) - 1} for shape {list(shape)}")
    axis %= len(shape)
    tile_rows, tile_columns = fmt.tile
    if fmt.is_tile:
        if axis != len(shape) - 1:
            raise BlockError(f"{fmt} tiles the last two axes; leave axis at -1, or permute the tensor first")
        _check_divides(shape[-2], tile_rows, "second-to-last", pad)
        _check_divides(shape[-1], tile_columns, "last", pad)
        scale_shape = (*shape[:-2], -(-shape[-2] // tile_rows), -(-shape[-1] // tile_columns))
        return BlockLayout(math.prod(shape[:-2]), shape[-2], shape[-1], tile_rows, tile_columns, scale_shape)
    length, block = shape[axis], tile_columns
    which = "last" if axis == len(shape) - 1 else f"axis-{axis}"
    _check_divides(length, block, which, pad)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    scale_shape = (*shape[:axis], -(-length // block), *shape[axis + 1 :])
    if axis == len(shape) - 1:
        return BlockLayout(1, before, length, 1, block, scale_shape)
    return BlockLayout(before, length, after, block, 1, scale_shape)


def _check_divides(length: int, block: int, which: str, pad: bool) -> None:
    if pad or length % block == 0:
        return
    divisors = [d for d in range(2, min(length, 4096) + 1) if length % d == 0]
    use = f", or use a block of {', '.join(map(str, divisors[:12]))}" if divisors else ""
    whole = -(-length // block) * block
    raise BlockError(
        f"{which} dimension {length} is not a multiple of block {block}; pad it to {whole}, "
        f"pass pad=True (the last block is then short){use}"
    )
