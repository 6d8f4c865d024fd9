"""Weights that live on a grid: after each optimizer step the stored weight is rounded back to its format's values.

    before     the grid values at the start of the step, kept as codes
    attempted  what the optimizer wrote: before + update, in float32
    after      attempted, rounded to the grid under the scale at the start of the step

An element is *attempted* if the optimizer changed it at all, a *flip* if its code changed, *stalled* if it was attempted
and its code stayed. +0 and -0 count as one code. A scale that is refreshed afterwards is a *regrid*, counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altgrad.nn.recipe import StorageSpec
from altgrad.nn.session import Session, stream_base
from altgrad.quantization import amax, amax_scale, code_index, ops
from altgrad.quantization.rounding import Overflow, Rounding

COUNTS = ("attempted", "flips", "stalled", "overflow", "regridded")


@dataclass(frozen=True)
class UpdateCounts:
    """Counts of one step over some weights; numbers of elements.

    elements: all. attempted, flips, stalled: see the module. overflow: attempted values beyond the format's max.
    regridded: values changed by a refresh of the scale.
    """

    elements: int
    attempted: int
    flips: int
    stalled: int
    overflow: int
    regridded: int

    @property
    def stall_rate(self) -> float | None:
        """stalled / attempted; None where nothing was attempted."""
        return self.stalled / self.attempted if self.attempted else None

    @property
    def flip_rate(self) -> float:
        """flips / elements."""
        return self.flips / self.elements if self.elements else 0.0

    @property
    def overflow_rate(self) -> float:
        """overflow / elements."""
        return self.overflow / self.elements if self.elements else 0.0


class GridStorage:
    """The grid of one stored weight: its scale and the codes of its present values.

    Args:
        spec: format, rounding and scale policy.
        session: clock and seed of the stochastic rounding.
        name: the parameter's qualified name.
        channel_axis: axis of the output channels, for per-channel scales.
    """

    def __init__(self, spec: StorageSpec, session: Session, name: str, channel_axis: int = 0) -> None:
        self.spec, self.session, self.name, self.channel_axis = spec, session, name, channel_axis
        self.fmt = spec.resolved
        self.scale: Tensor = torch.ones(())
        self.codes: Tensor | None = None
        self.version = -1  # the parameter's version counter when `codes` was made
        self.original: Tensor | None = None  # float values before the first rounding, until the first step
        self.steps = 0
        self._base = stream_base(name, "storage", "update")

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has a scale of its own."""
        return self.spec.per_channel

    # -- grid and scale -------------------------------------------------------------------------------------------

    def fresh_scale(self, weight: Tensor) -> Tensor:
        """The scale that the spec gives these values."""
        if self.spec.scale is not None:
            return torch.tensor(self.spec.scale, dtype=torch.float32, device=weight.device)
        axis = self.channel_axis if self.spec.per_channel else None
        if self.fmt.emax >= 127:
            return torch.ones_like(amax(weight, axis))
        return amax_scale(weight, self.fmt, axis=axis, power_of_two=self.spec.power_of_two) * 2.0**self.spec.headroom

    @torch.no_grad()
    def snap(self, weight: Tensor, *, keep_original: bool = False) -> Tensor:
        """Set the scale and round the weight to the grid, to nearest; returns the 0-d count of changed values."""
        if keep_original:
            self.original = weight.detach().clone()
        self.scale = self.fresh_scale(weight)
        values = ops.quantize(weight, self.fmt, self.scale, overflow=Overflow.SATURATE, clamp=True)
        changed = (values != weight).sum()
        self._write(weight, values, self._encode(values))
        return changed

    def _encode(self, values: Tensor) -> Tensor:
        """Codes of values on the grid; NaN, which only some formats have a code for, gets that of 0."""
        return ops.encode(torch.nan_to_num(values, nan=0.0), self.fmt, self.scale, overflow=Overflow.SATURATE)

    def _write(self, weight: Tensor, values: Tensor, codes: Tensor) -> None:
        weight.copy_(values)
        self.codes, self.version = codes, weight._version

    def restore(self, scale: Tensor, steps: int) -> None:
        """Take the scale and the step count of an earlier state; the codes follow from the weight when next needed."""
        self.scale, self.steps = scale.to(self.scale.device), steps
        self.codes, self.original = None, None

    def resync(self, weight: Tensor) -> None:
        """Take over values that something other than an optimizer wrote, such as load_state_dict."""
        if self.codes is None or weight._version != self.version or self.codes.device != weight.device:
            if self.scale.device != weight.device:
                self.scale = self.scale.to(weight.device)
            with torch.no_grad():
                on_grid = ops.quantize(weight, self.fmt, self.scale, overflow=Overflow.SATURATE)
                self._write(weight, on_grid, self._encode(on_grid))

    # -- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def round_back(self, weight: Tensor, observer=None, layer: str = "") -> Tensor:
        """Round what the optimizer wrote back to the grid; returns the step's counts, int64 [5] in `COUNTS`' order."""
        assert self.codes is not None
        self.original = None
        before = ops.decode(self.codes, self.fmt, self.scale, dtype=weight.dtype)
        options: dict = {"rounding": self.spec.rounding, "overflow": Overflow.SATURATE}
        if self.spec.rounding is Rounding.STOCHASTIC:
            options |= {"key": self.session.key(self._base, per_rank=False), "random_bits": self.spec.random_bits}
        after, stats = ops.quantize_with_stats(weight, self.fmt, self.scale, **options)
        attempted = weight != before
        if not self.spec.power_of_two:
            after = torch.where(attempted, after, before)  # fl(s * p) / s may lie off the grid
        codes = self._encode(after)
        flips = code_index(codes, self.fmt) != code_index(self.codes, self.fmt)
        if observer is not None:
            observer.observe_update(
                layer=layer,
                parameter=weight,
                before=before,
                attempted=weight.detach(),
                after=after,
                scale=self.scale,
                fmt=self.fmt,
                rounding=self.spec.rounding,
            )
        counts = [attempted.sum(), flips.sum(), (attempted & ~flips).sum(), stats.overflow.to(torch.int64)]
        self._write(weight, after, codes)
        self.steps += 1
        due = self.spec.refresh_every and self.steps % self.spec.refresh_every == 0
        counts.append(self._refresh(weight) if due else torch.zeros_like(counts[0]))
        return torch.stack(counts)

    def _refresh(self, weight: Tensor) -> Tensor:
        scale = self.fresh_scale(weight)
        if torch.equal(scale, self.scale):
            return torch.zeros((), dtype=torch.int64, device=weight.device)
        return self.snap(weight)
