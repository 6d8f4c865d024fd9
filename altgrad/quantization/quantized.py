"""What a cast returns: one result type for scalar and block formats, and the packed tensor of a block format."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.formats.block import BlockFormat
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.codec import scale_values
from altgrad.quantization.stats import QuantStats


class Want(IntFlag):
    """Which outputs a cast computes, in one pass over the tensor; combine them with `|`."""

    VALUES = 1
    CODES = 2
    STATS = 4


class Quantized(NamedTuple):
    """Results of one cast; None for what was not asked for.

    values: scale * payload, of x's shape and dtype. codes: uint8 (int32 above 8 bits) of x's shape, 0 where a NaN or inf
    has no code. scales: the stored scales of a block format's blocks (`QuantizedTensor.scales`), None for scalar formats.
    stats: statistics of the pass. tensor_scale: 0-d float32 upper scale of a two-level format. problems: nonzero where
    codes were asked for and a NaN or inf has none (`NAN_PROBLEM`, `INF_PROBLEM` of `altgrad.jit.grid_table`).
    """

    values: Tensor | None = None
    codes: Tensor | None = None
    scales: Tensor | None = None
    stats: QuantStats | None = None
    tensor_scale: Tensor | None = None
    problems: int | Tensor = 0


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in a block format, or in a scalar one under its amax: one code per element, and the stored scales.

    codes: uint8 (int32 for elements of more than 8 bits), of the tensor's shape, one code per entry (not packed).
    scales: of a block format one per block: uint8 codes of the scale format (E8M0: exponent + 127, 255 for NaN), or
        float32; the tensor's shape with each blocked axis divided by the block, rounded up. Of a scalar format the 0-d
        multiplier.
    format, axis, shape: as given to `encode`.
    tensor_scale: 0-d float32 upper scale of a two-level format (NVFP4), else None.
    """

    codes: Tensor
    scales: Tensor
    format: BlockFormat | FloatFormat
    axis: int
    shape: torch.Size
    tensor_scale: Tensor | None = None

    @property
    def scale_values(self) -> Tensor:
        """The multiplier of each block as float32, the tensor scale included; NaN for a NaN block."""
        if isinstance(self.format, FloatFormat):
            return self.scales
        return scale_values(self.scales, self.format, self.tensor_scale)

    @property
    def storage_bits(self) -> int:
        """Bits that the packed format takes: elements, scales and tensor scale."""
        if isinstance(self.format, FloatFormat):
            return self.codes.numel() * self.format.bits + 32
        scales = self.scales.numel() * self.format.scale_format.bits
        return self.codes.numel() * self.format.element.bits + scales + (32 if self.tensor_scale is not None else 0)
