"""Find the scale of a policy whose grid already holds given values, so that taking values over changes none of them.

Values that were trained on a grid and are loaded elsewhere come without their scale. With powers of two and without
headroom the policy's own scale holds them: it is at most the old one, and up to its max the grid of a smaller power of
two contains that of a larger one. Otherwise the scale is searched for: it is amax / v for one of the format's values v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.formats.rounding import Overflow
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization import amax, quantize
from altgrad.quantization.parameter_grid import ParameterGrid

_SAMPLES = (16, 256, 4096)  # sizes of the samples that sieve the candidates before all values are looked at
_ULPS = (0, -1, 1, -2, 2)  # amax = fl(s * v) and fl(amax / v) round once each


def lies_on(values: Tensor, grid: ParameterGrid) -> bool:
    """Whether every value is one of the grid (a NaN is)."""
    return bool(_kept(values, grid.format, grid.scale).all())


def kept_scale(
    weight: Tensor, fmt: FloatFormat, scale: Tensor, axis: int | None, *, power_of_two: bool, headroom: int
) -> Tensor:
    """The policy's `scale`, or for each channel the largest other one whose grid holds all its values, if there is one.

    Args:
        weight: the values. axis: of the channels with scales of their own; None: one scale.
        scale: what the policy gives for their amax: 0-d, or 1 on every axis but `axis`.
        power_of_two, headroom: of the policy.

    A scale that is no power of two is not searched for in formats of more than 16 bits.
    """
    if not weight.numel():
        return scale
    if power_of_two:
        return _with_less_headroom(weight, fmt, scale, axis, headroom) if headroom else scale
    if fmt.bits > 16:
        return scale
    if axis is None:
        return _searched(weight.reshape(-1), fmt, scale)
    rows = weight.movedim(axis, 0).reshape(weight.shape[axis], -1)
    found = [_searched(row, fmt, own) for row, own in zip(rows, scale.reshape(-1), strict=True)]
    return torch.stack(found).reshape(scale.shape) if found else scale


def _kept(values: Tensor, fmt: FloatFormat, scale: Tensor | float) -> Tensor:
    return (quantize(values, fmt, scale, overflow=Overflow.SATURATE, clamp=True) == values) | values.isnan()


def _with_less_headroom(weight: Tensor, fmt: FloatFormat, scale: Tensor, axis: int | None, headroom: int) -> Tensor:
    others = [d for d in range(weight.ndim) if axis is None or d != axis % weight.ndim]
    found, done = scale, torch.zeros_like(scale, dtype=torch.bool)
    for binades in range(headroom + 1):
        candidate = scale * 2.0**-binades
        kept = _kept(weight, fmt, candidate)
        kept = (kept.amin(dim=others, keepdim=True) if others else kept).reshape(scale.shape)
        found, done = torch.where(kept & ~done, candidate, found), done | kept
        if bool(done.all()):
            break
    return found


def _searched(row: Tensor, fmt: FloatFormat, scale: Tensor) -> Tensor:
    largest = amax(row)
    if not bool(largest > 0) or bool(_kept(row, fmt, scale).all()):
        return scale
    magnitudes = torch.from_numpy(fmt.magnitudes().copy()).to(largest)
    exact = largest / magnitudes[magnitudes > 0].flip(0)
    bits = exact.view(torch.int64 if exact.dtype == torch.float64 else torch.int32)
    candidates = torch.stack([bits + ulps for ulps in _ULPS], dim=1).view(exact.dtype).reshape(-1)
    candidates = candidates[candidates.isfinite() & (candidates >= torch.finfo(torch.float32).tiny)]
    for size in _SAMPLES:
        sample = row[:: max(1, row.numel() // size)][:size]
        kept = _kept(sample.expand(candidates.numel(), -1).contiguous(), fmt, candidates[:, None])
        candidates = candidates[kept.all(dim=1)]
    for candidate in candidates:
        if bool(_kept(row, fmt, candidate).all()):
            return candidate
    return scale
