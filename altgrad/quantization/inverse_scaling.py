"""Scales that x is multiplied by: the arithmetic of Transformer Engine and torchao, where AltGrad's own divides.

They find s = fl(max / amax), round x * s, and dequantize by fl(1 / s). The quotients differ from x / fl(amax / max) by a
rounding error, which decides ties: amax 0.8125 and x 0.01904296875 have the exact quotient 10.5 in E4M3, which x * s makes
10.500001. Blocks of NVFP4 are scaled in the same manner, by two levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from altgrad.formats.block import BlockFormat
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.cast import cast_for
from altgrad.quantization.codec import divided
from altgrad.quantization.powers import leading_power
from altgrad.quantization.scaling import DelayedScaling

_LARGEST = torch.finfo(torch.float32).max


def largest_of(x: Tensor, axis: int | None = None) -> Tensor:
    """The largest magnitude, inf and NaN among them, of a matrix or of each index of `axis`; 0 of no elements."""
    size = x.abs()
    if axis is None:
        return size.amax() if x.numel() else x.new_zeros(())
    shape = [n if d == axis else 1 for d, n in enumerate(x.shape)]
    return size.amax(1 - axis, keepdim=True) if x.numel() else x.new_zeros(shape)


def inverse_scale(amax: Tensor, largest: float, *, power_of_two: bool = False, floor: float = 0.0) -> Tensor:
    """s = fl(max / amax) in float32, which x is multiplied by: 1 where amax is 0, inf or NaN, at most float32's largest.

    The quotient of the float64 numbers rounds to the float32 quotient, so both ways of the libraries are this one.

    Args:
        power_of_two: round s down to a power of two.
        floor: what a smaller amax counts as.
    """
    usable = (amax > 0) & amax.isfinite()
    divisor = torch.where(usable, amax.clamp(min=floor), largest).double()
    s = (largest / divisor).float().clamp(max=_LARGEST)
    return leading_power(s.double()).float() if power_of_two else s


class RegionState(NamedTuple):
    """window: amaxes of the last regions, newest first, float32 [history]; s: 0-d float32, what x is multiplied by."""

    window: Tensor
    s: Tensor


@dataclass(frozen=True)
class RegionScaling:
    """Transformer Engine's delayed scaling: x is multiplied by s, which a region's end finds for the next region.

    A region is one forward (x and w) or one backward (dy). Before the first one s is 1. At its end s = fl(fl(max * 2^-margin)
    / amax) with the largest amax of the last `history` regions, this one among them; s stays where that amax is not finite,
    and a region whose amax is 0 leaves no trace.

    Args:
        history: regions remembered. margin: binades left free.
        most_recent: take the amax of the last region alone.

    Source: NVIDIA Transformer Engine d0067d0d, common/recipe/delayed_scaling.cu.
    """

    history: int = 1024
    margin: int = 0
    most_recent: bool = False
    clamps = False
    needs_amax = True

    def __post_init__(self) -> None:
        DelayedScaling(self.history, self.margin)  # which refuses what is out of range

    def init(self) -> RegionState:
        """Nothing seen, s = 1."""
        return RegionState(torch.zeros(self.history), torch.ones(()))

    def close(self, amax: Tensor, state: RegionState, fmt: FloatFormat) -> RegionState:
        """The state after a region of this amax; pure."""
        state = RegionState(*(part.to(amax.device) for part in state))
        window = torch.cat([amax.reshape(1).to(state.window), state.window[:-1]])
        largest = window[0] if self.most_recent else window.amax()
        s = inverse_scale(largest, fmt.max * 2.0**-self.margin)
        s = torch.where(largest.isfinite() & (largest > 0), s, state.s)
        moved = amax != 0
        return RegionState(torch.where(moved, window, state.window), torch.where(moved, s, state.s))


class ScaledBlocks(NamedTuple):
    """A matrix in a two-level block format.

    payload: [rows, columns] element values. scales: [block rows, block columns], the stored scales' values. tensor_scale:
    0-d, what dequantizes beside them. values: payload * scale * tensor_scale.
    """

    payload: Tensor
    scales: Tensor
    tensor_scale: Tensor
    values: Tensor


def multiply_blocks(
    x: Tensor, fmt: BlockFormat, *, rounding: Rounding = Rounding.NEAREST_EVEN, key: Tensor | None = None
) -> ScaledBlocks:
    """A matrix in a block format with a tensor scale, by Transformer Engine's arithmetic for NVFP4.

    S = fl(E * M / amax) for element max E and scale max M; a block's scale is the rounded amax_b * fl(S * fl(1 / E)), and x
    is multiplied by fl(1 / fl(scale * fl(1 / S))), which is float32's largest number where the scale is 0.

    Args:
        x: float32 [rows, columns]; blocks run along the last axis, tiles from the upper left corner; short ends count as
            filled up with zeros.
        key: of stochastic rounding of the elements; scales round to nearest even.

    A NaN or inf stays where it is and has no part in the scales.

    Source: NVIDIA Transformer Engine d0067d0d, NVFP4BlockScaling and its Python reference.
    """
    (down, across), element, upper = fmt.tile, fmt.element, fmt.scale_format
    rows, columns = x.shape
    finite = x.isfinite()
    filled = pad(torch.where(finite, x.abs(), 0), (0, -columns % across, 0, -rows % down))
    blocks = filled.view(-(-rows // down), down, -(-columns // across), across)
    amaxes = blocks.amax((1, 3)) if x.numel() else x.new_zeros((blocks.shape[0], blocks.shape[2]))
    largest = largest_of(amaxes)
    whole = inverse_scale(largest, element.max * upper.max)
    one = torch.ones((), device=x.device)
    scales = amaxes * (whole * (one / element.max))
    scales = cast_for(upper, overflow=Overflow.SATURATE)(scales).values
    assert scales is not None
    multipliers = (one / (scales * (one / whole))).clamp(max=_LARGEST)
    spread = multipliers.repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]
    rounded = cast_for(element, rounding, Overflow.SATURATE)
    payload = rounded((torch.where(finite, x, 0) * spread).clamp(-_LARGEST, _LARGEST), key=key).values
    assert payload is not None
    tensor_scale = divided(torch.where(largest > 0, largest, 1.0), element.max * upper.max)
    stored = scales.repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]
    values = torch.where(finite, payload * stored * tensor_scale, x)
    return ScaledBlocks(torch.where(finite, payload, x), scales, tensor_scale, values)


def outer_blocks(
    x: Tensor, fmt: BlockFormat, outer: int, *, rounding: Rounding = Rounding.NEAREST_EVEN, key: Tensor | None = None
) -> ScaledBlocks:
    """A matrix in blocks along its last axis, under scales of `outer` elements, by TetraJet-v2's arithmetic.

    T = fl(fl(amax_o / M) / E) of each `outer` elements, 1 where that is 0, for element max E and scale max M; a block's scale
    is the rounded fl(fl(amax_b / T) / E), the scale format's smallest where that is 0; x is multiplied by fl(1 / fl(T *
    scale)). `scales` of the result are fl(T * scale), and its tensor_scale is 1. NaN and inf as in `multiply_blocks`.

    Source: thu-ml/TetraJet-v2-NVFP4Training ca5953f6 (arXiv 2510.27527).
    """
    across, element, upper = fmt.tile[1], fmt.element, fmt.scale_format
    finite = x.isfinite()
    sizes = pad(torch.where(finite, x.abs(), 0), (0, -x.shape[1] % outer)).unflatten(-1, (-1, outer // across, across))
    amaxes = sizes.amax(-1)
    whole = divided(divided(amaxes.amax(-1, keepdim=True), upper.max), element.max)
    whole = torch.where(whole > 0, whole, 1.0)
    scales = cast_for(upper, overflow=Overflow.SATURATE)(divided(amaxes / whole, element.max)).values
    assert scales is not None
    both = (whole * torch.where(scales > 0, scales, upper.min_subnormal)).flatten(-2)[:, : -(-x.shape[1] // across)]
    spread = both.repeat_interleave(across, 1)[:, : x.shape[1]]
    multiplied = (torch.where(finite, x, 0) * (1 / spread).clamp(max=_LARGEST)).clamp(-_LARGEST, _LARGEST)
    payload = cast_for(element, rounding, Overflow.SATURATE)(multiplied, key=key).values
    assert payload is not None
    one = torch.ones((), device=x.device)
    return ScaledBlocks(torch.where(finite, payload, x), both, one, torch.where(finite, payload * spread, x))
