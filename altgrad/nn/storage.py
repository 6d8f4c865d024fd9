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

from altgrad.formats.rounding import Overflow, Rounding
from altgrad.nn.recipe.spec import StorageSpec
from altgrad.nn.session import Session, stream_base
from altgrad.quantization import amax, code_index, ops, scale_from_amax
from altgrad.quantization.parameter_grid import ParameterGrid, declare_grid

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
        largest = amax(weight, self.channel_axis if self.spec.per_channel else None)
        if self.fmt.emax >= 127:  # the range of float32: nothing to scale
            return torch.ones_like(largest)
        return scale_from_amax(largest, self.fmt, power_of_two=self.spec.power_of_two) * 2.0**self.spec.headroom

    @torch.no_grad()
    def snap(self, weight: Tensor, *, keep_original: bool = False) -> None:
        """Set the scale and round the weight to the grid, to nearest."""
        if keep_original:
            self.original = weight.detach().clone()
        self.scale = self.fresh_scale(weight)
        self._write(weight, *self._rounded(weight, {"overflow": Overflow.SATURATE, "clamp": True}))
        self.declare(weight)

    def declare(self, weight: Tensor) -> None:
        """State the grid on the parameter, for optimizers that step along it."""
        declare_grid(weight, ParameterGrid(self.fmt, self.scale))

    def _rounded(self, weight: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        """Values on the grid and their codes; a NaN stays in the values, and has the code of 0 where it has none."""
        return ops.quantize_and_encode(weight, self.fmt, self.scale, **options)

    def _write(self, weight: Tensor, values: Tensor, codes: Tensor) -> None:
        weight.copy_(values)
        self.codes, self.version = codes, weight._version

    def restore(self, weight: Tensor, scale: Tensor, steps: int) -> None:
        """Take the scale and the step count of an earlier state; the codes follow from the weight when next needed."""
        self.scale, self.steps = scale.to(weight.device), steps
        self.codes, self.original = None, None
        self.declare(weight)

    def resync(self, weight: Tensor) -> None:
        """Take over values that something other than an optimizer wrote, such as load_state_dict."""
        if self.codes is None or weight._version != self.version or self.codes.device != weight.device:
            if self.scale.device != weight.device:
                self.scale = self.scale.to(weight.device)
            with torch.no_grad():
                self._write(weight, *self._rounded(weight, {"overflow": Overflow.SATURATE}))
            self.declare(weight)

    # -- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def round_back(self, weight: Tensor, observer=None, layer: str = "", counted: Tensor | None = None) -> Tensor:
        """Round what the optimizer wrote back to the grid; returns the step's counts, int64 [5] in `COUNTS`' order.

        Args:
            counted: counts (attempted, flips, stalled, sign flips, clipped, overflow) of an optimizer that rounds to
                the grid itself; None counts here.
        """
        assert self.codes is not None
        self.original = None
        before = ops.decode(self.codes, self.fmt, self.scale, dtype=weight.dtype)
        options: dict = {"rounding": self.spec.rounding, "overflow": Overflow.SATURATE}
        if self.spec.rounding is Rounding.STOCHASTIC:
            options |= {"key": self.session.key(self._base, per_rank=False), "random_bits": self.spec.random_bits}
        after, codes, stats = ops.quantize_and_encode_with_stats(weight, self.fmt, self.scale, **options)
        attempted = weight != before
        if not self.spec.power_of_two:  # fl(s * p) / s may lie off the grid: what was not touched stays
            after, codes = torch.where(attempted, after, before), torch.where(attempted, codes, self.codes)
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
        if counted is None:
            flips = code_index(codes, self.fmt) != code_index(self.codes, self.fmt)
            counts = [attempted.sum(), flips.sum(), (attempted & ~flips).sum(), stats.overflow]
        else:
            counts = [counted[0], counted[1], counted[2], counted[5]]
        hidden = None if counted is None else counted[5]
        after, codes, regridded = self._refreshed(weight, after, codes, options, hidden)
        self._write(weight, after, codes)
        return torch.stack([count.to(torch.int64) for count in (*counts, regridded)])

    def _refreshed(
        self, weight: Tensor, after: Tensor, codes: Tensor, options: dict, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The values to write, under a fresh scale where one is due; and the number of values that it changed.

        Args:
            hidden: how many weights an optimizer that lands by itself aimed beyond max. It hands over the landed values,
                so how far beyond is not known: grids with a weight at their edge grow by a binade.
        """
        self.steps += 1
        none = torch.zeros((), dtype=torch.int64, device=weight.device)
        if not self.spec.refresh_every:
            return after, codes, none
        scale = self.fresh_scale(weight)  # of what was attempted: stored values could only shrink it
        if hidden is not None:
            largest = amax(weight, self.channel_axis if self.spec.per_channel else None)
            scale = torch.where((hidden > 0) & (largest >= self.fmt.max * self.scale), 2 * scale, scale)
        if self.steps % self.spec.refresh_every:
            scale = torch.maximum(scale, self.scale)
        if torch.equal(scale, self.scale):
            return after, codes, none
        self.scale = scale
        self.declare(weight)
        regridded, codes = self._rounded(weight, options)
        return regridded, codes, (regridded != after).sum()
