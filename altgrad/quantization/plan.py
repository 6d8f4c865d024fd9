"""One cast resolved for one dtype, device, kernel and choice of outputs: what a kernel reads, and where it keeps its own.

A kernel is a module with `run(plan, x, scale, key, out) -> Quantized` and `decode(plan, codes, scale, upper, out) -> Tensor`.
What it can prepare once it keeps in `prepared`, and what depends on the shape of x in `shapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from altgrad.formats.block import BlockFormat
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.block_layout import BlockLayout, block_layout

SHAPES_KEPT = 256  # of one plan; dynamic shapes must not grow it without end


@dataclass(eq=False, slots=True)
class Plan:
    """What `Cast.plan` found; all of it is checked.

    format: as the cast has it. grid: the scalar format that elements are rounded to, without subnormals where they are
    off. dtype: of x and of the values. values, codes, stats: which outputs are wanted; none of them for a plan of
    `decode`. upper: None for scalar formats, else whether one scale of the tensor lies above the blocks' scales.
    """

    format: Any
    grid: FloatFormat
    rounding: Rounding
    overflow: Overflow
    clamp: bool
    random_bits: int
    axis: int
    pad: bool
    dtype: torch.dtype
    device: torch.device
    values: bool
    codes: bool
    stats: bool
    kernel: ModuleType
    draws: bool = field(init=False)
    upper: bool | None = field(init=False)
    run: Callable = field(init=False)
    prepared: Any = field(init=False, default=None)
    shapes: dict = field(init=False, default_factory=dict)
    layouts: dict = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.draws = self.rounding is Rounding.STOCHASTIC
        is_block = isinstance(self.format, BlockFormat)
        self.upper = self.format.tensor_scale if is_block else None
        self.run = self.kernel.run

    @property
    def compute_dtype(self) -> torch.dtype:
        """What x / scale and scale * q are computed in: float64 for float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def layout(self, shape: torch.Size) -> BlockLayout:
        """Where the blocks lie in a tensor of that shape.

        Raises:
            BlockError: as `block_layout`.
        """
        found = self.layouts.get(shape)
        return found or kept_in(self.layouts, shape, block_layout(shape, self.format, self.axis, pad=self.pad))

    def keep(self, shape: Hashable, found: Any) -> Any:
        """Remember what a kernel found for a shape, and return it."""
        return kept_in(self.shapes, shape, found)


def kept_in(table: dict, shape: Hashable, found: Any) -> Any:
    """Remember in a table of shapes what was found for one, and return it."""
    if len(table) >= SHAPES_KEPT:
        table.clear()
    table[shape] = found
    return found
