"""What one measurement of an update counts, and how many updates a grid would swallow, predicted from its histograms.

`measure_update` counts |w| and |update| in bins; an update is lost where it is small against the spacing at the weight.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Rounding, as_option
from altgrad.formats.scalar import FloatFormat

NEAR_ZERO = 1e-8
"""Gradients below this magnitude count as near zero: the customary eps of Adam, under which its update fades."""

BINS = 1024
"""Magnitude histograms have four linear bins per binade of float32: bin = bits of |x| >> 21; bin 0 holds zero."""

UPDATE_FIELDS = (
    "count",  # elements
    # the weight at the start of the step
    "w_zero",
    "w_nonfinite",
    "w_amax",  # over finite elements, as all sums below
    "w_sum_sq",
    # its gradient
    "g_count",  # 0 where there is no gradient
    "g_zero",
    "g_near_zero",  # 0 < |g| < near_zero
    "g_nonfinite",
    "g_amax",
    "g_sum_sq",
    "dead_rows",  # rows of a matrix whose gradient is all zero; NaN without gradient or matrix
    "dead_columns",
    # stiffness S of nonzero weights, and pairs (S, |g|)
    "s_count",
    "s_sum",
    "pairs",
    "pair_s_sum",
    "pair_s_sum_sq",
    "pair_s_min",
    "pair_s_max",
    "pair_g_sum",
    "pair_g_sum_sq",
    "pair_g_min",
    "pair_g_max",
    "pair_gs_sum",
    "ratio_sum",  # |g| / S
    "below",  # |g| < S
    # alignment error of the weight on its grid, saturating
    "error_sum",
    "error_sum_sq",
    "error_max",
    "on_grid",
    # what the optimizer attempted, and what became of it
    "attempted",  # finite, nonzero updates
    "u_nonfinite",
    "u_amax",
    "u_sum_sq",
    "stalled",  # attempted, and the code did not change
    "moves",  # elements finite before and after
    "flips",  # the code changed
    "steps_sum",  # movement in steps of the grid
    "steps_max",
    "steps_median",  # lower edge of the median's bin: exact up to 8 steps
    "moved",  # the carrier value changed
    "ulp_sum",  # movement in ULPs of the carrier
    "ulp_max",
    "ulp_median",  # lower edge of the median's bin: at most a quarter of a binade low
)
FIELD = {name: i for i, name in enumerate(UPDATE_FIELDS)}


_OCTAVES = torch.arange(-160, 129)  # exponents of grid spacings


def bin_edges(device: torch.device | str = "cpu") -> Tensor:
    """Lower edge of each bin as float32 (from 255 * 4 on: inf and NaN)."""
    return (torch.arange(BINS, dtype=torch.int32, device=device) << 21).view(torch.float32)


def stall_chances(update_histogram: Tensor, rounding: Rounding | str = Rounding.NEAREST_EVEN) -> Tensor:
    """Chance that an update drawn from the histogram leaves a weight whose grid spacing is 2^t, for t = -160 .. 128.

    Args:
        update_histogram: [..., BINS] counts of |update / scale|.
        rounding: nearest modes lose updates below half a spacing; stochastic rounding loses an update u with chance
            1 - u / spacing (taken at the middle of its bin); rounding toward zero (and the directed modes, to a side)
            those below a spacing.

    Returns:
        float64 [..., 289]; NaN where the histogram is empty.
    """
    rounding = as_option(Rounding, rounding)
    counts = update_histogram.double()
    total = counts.sum(-1, keepdim=True)
    if rounding is Rounding.STOCHASTIC:
        return counts @ _chances_by_chance(counts.device) / total
    reach = 1 if rounding in (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY) else 0  # half a spacing, or a whole one
    below = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    return below[..., _first_kept(reach, counts.device)] / total


@lru_cache(maxsize=16)
def _first_kept(reach: int, device: torch.device) -> Tensor:
    """Of each octave the bin that begins at its grid's spacing, or with `reach` 1 at half of it."""
    return ((_OCTAVES - reach + 127) * 4).clamp(0, BINS).to(device)


@lru_cache(maxsize=8)
def _chances_by_chance(device: torch.device) -> Tensor:
    """[BINS, octaves]: 1 - u / spacing at the middle u of each bin, at least 0."""
    edges = bin_edges(device).double()
    middle = torch.cat([(edges[:-1] + edges[1:]) / 2, edges[-1:]])
    spacing = torch.exp2(_OCTAVES.double()).to(device)
    return torch.nan_to_num((1 - middle[:, None] / spacing).clamp(0, 1))


def predict_stall(
    weight_histogram: Tensor,
    update_histogram: Tensor,
    format: FloatFormat | str,
    rounding: Rounding | str = Rounding.NEAREST_EVEN,
) -> Tensor:
    """Fraction of updates that a grid would swallow, from magnitudes alone: sum over weights of `stall_chances` at each.

    Exact for updates that are independent of the weights they meet, whose grid spacing is that of their own binade
    (a weight at a power of two has half the spacing below it).

    Args:
        weight_histogram, update_histogram: [..., BINS] counts of |w / scale| on the grid and |update / scale|, as
            `UpdateMeasurement` holds them.
        format: the grid.
        rounding: of the storage.

    Returns:
        float64 [...] in [0, 1]; NaN where either histogram is empty.
    """
    chances = stall_chances(update_histogram, rounding)
    per_binade = _per_binade(weight_histogram)
    at_weight = chances[..., (_spacings(get_format(format), per_binade) - int(_OCTAVES[0])).clamp(0, len(_OCTAVES) - 1)]
    return (per_binade * at_weight).sum(-1) / per_binade.sum(-1)


def half_steps(weight_histogram: Tensor, update_histogram: Tensor, format: FloatFormat | str) -> Tensor:
    """The median update over half the grid's spacing at the median weight: below 1, rounding to nearest loses most updates.

    Args:
        weight_histogram, update_histogram, format: as for `predict_stall`.

    Returns:
        float64 [...], of the lower edge of the median's bin, which is at most a quarter of a binade low; NaN where either
        histogram is empty.
    """
    update = bin_edges(update_histogram.device).double()[_median(update_histogram)]
    per_binade = _per_binade(weight_histogram)
    spacing = torch.exp2(_spacings(get_format(format), per_binade).double())[_median(per_binade)]
    known = (weight_histogram.sum(-1) > 0) & (update_histogram.sum(-1) > 0)
    return torch.where(known, update / (spacing / 2), torch.nan)


def _median(counts: Tensor) -> Tensor:
    """Index of the bin that holds the median."""
    below = counts.double().cumsum(-1)
    return torch.searchsorted(below, below[..., -1:] / 2).squeeze(-1).clamp(max=counts.shape[-1] - 1)


def _per_binade(histogram: Tensor) -> Tensor:
    counts = histogram.double()
    return counts.view(*counts.shape[:-1], BINS // 4, 4).sum(-1)


def _spacings(fmt: FloatFormat, per_binade: Tensor) -> Tensor:
    """log2 of the grid's spacing in each binade."""
    exponent = torch.arange(per_binade.shape[-1], device=per_binade.device) - 127
    if fmt.bias is None:
        return torch.full_like(exponent, -fmt.mantissa_bits)
    return exponent.clamp(min=fmt.emin) - fmt.mantissa_bits
