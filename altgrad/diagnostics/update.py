"""One measurement of a parameter's step: weight, gradient, attempted update and movement, in one pass over the data.

`measure_update` returns sums and counts in one float64 vector (`UPDATE_FIELDS`) and two histograms of magnitudes, all on
the tensors' device; `altgrad.monitor` turns them into the named statistics. On the CPU a fused kernel computes them; the
plain torch version here defines them and serves every other device, dtype and layout. From the two histograms
`diagnostics.fields.predict_stall` says how many updates a grid would swallow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from altgrad.diagnostics.fields import BINS, FIELD, NEAR_ZERO, UPDATE_FIELDS, bin_edges
from altgrad.errors import KernelError, OptionError
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Overflow
from altgrad.formats.scalar import FloatFormat
from altgrad.formats.scalar_rows import BF16, FP16, FP32
from altgrad.quantization.advanced_diagnostics import compute_stiffness_field, compute_ulp_distance, grid_index
from altgrad.quantization.ops import quantize


@dataclass(frozen=True)
class UpdateMeasurement:
    """What `measure_update` found; tensors on the device of the weights."""

    vector: Tensor  # float64 [len(UPDATE_FIELDS)]
    histograms: Tensor | None  # int64 [2, BINS], of |w / scale| over finite weights and |update / scale| over attempts

    @property
    def weight_histogram(self) -> Tensor:
        """Counts of |w / scale| over finite weights, int64 [BINS]."""
        assert self.histograms is not None
        return self.histograms[0]

    @property
    def update_histogram(self) -> Tensor:
        """Counts of |update / scale| over attempted updates, int64 [BINS]."""
        assert self.histograms is not None
        return self.histograms[1]

    def __getitem__(self, field: str) -> Tensor:
        return self.vector[FIELD[field]]


def measure_update(
    before: Tensor,
    after: Tensor,
    *,
    gradient: Tensor | None = None,
    attempted: Tensor | None = None,
    format: FloatFormat | str | None = None,
    scale: Tensor | float = 1.0,
    near_zero: float = NEAR_ZERO,
    histograms: bool = True,
    kernel: str | None = None,
) -> UpdateMeasurement:
    """Measure one parameter over one step.

    Args:
        before, after: the parameter at the start of the step and after it (optimizer and storage rounding).
        gradient: its gradient, dense or sparse; None leaves those fields 0 (extremes and dead units NaN).
        attempted: the parameter as the optimizer computed it, before storage rounding; None: that is `after`.
        format: grid on which stiffness, alignment and code movement are measured; None: the dtype's own
            (`carrier_format`).
        scale: of the grid at the start of the step; a number, or a tensor that broadcasts.
        near_zero: gradients below it count as near zero.
        histograms: whether the two histograms, which `diagnostics.fields.predict_stall` takes, are wanted.
        kernel: "cpu" or "eager"; None: the fused CPU kernel for contiguous float32 on the CPU and formats that it
            knows (`diagnostics.kernels.cpu.supports`), else eager.

    Returns:
        Sums and counts, nothing synced. Stiffness is counted for weights whose stiffness is a normal float32 number.
        Counts and extremes are exact, `ulp_max` to a float32 rounding; sums are right to 4e-6 at worst, 1e-8 on random
        data, as `diagnostics.kernels.tiles` says.

    Raises:
        OptionError: the shapes differ. KernelError: `kernel="cpu"` for tensors that it does not take.
    """
    shape = before.shape
    for name, other in (("after", after), ("gradient", gradient), ("attempted", attempted)):
        if other is not None and other.shape != shape:
            raise OptionError(f"{name} has shape {list(other.shape)}, before {list(shape)}; pass one parameter")
    fmt = carrier_format(before.dtype) if format is None else get_format(format)
    if gradient is not None and gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    tensors = (before, gradient, after if attempted is None else attempted, after)
    if kernel not in (None, "cpu", "eager"):
        raise OptionError(f"kernel {kernel!r} is not one of cpu, eager")
    if kernel != "eager" and before.device.type == "cpu" and before.numel():
        fused = _fused()
        if fused.supports(fmt, scale, *tensors):
            return UpdateMeasurement(*fused.measure(fmt, scale, near_zero, *tensors, histograms))
    if kernel == "cpu":
        raise KernelError(
            f"the CPU kernel takes nonempty contiguous float32 on the CPU, not {before.dtype} on {before.device}, "
            f"format {fmt}; use kernel=None"
        )
    return _measure_in_torch(fmt, scale, near_zero, *(None if t is None else t.detach() for t in tensors))


@cache
def _fused():
    from altgrad.diagnostics.kernels import cpu

    return cpu


def carrier_format(dtype: torch.dtype) -> FloatFormat:
    """The format whose grid a dtype's values are on; float64, which no format describes, counts as FP32."""
    return _CARRIERS.get(dtype, FP32)


_CARRIERS = {torch.bfloat16: BF16, torch.float16: FP16}


def _measure_in_torch(fmt, scale, near_zero, before, gradient, attempted, after) -> UpdateMeasurement:
    """The definition of every field, one torch expression each."""
    wide, later = before.double().flatten(), after.double().flatten()
    finite = torch.isfinite(wide)
    w = torch.where(finite, wide, 0.0)
    field: dict[str, Tensor | float] = {
        "count": before.numel(),
        "w_zero": (wide == 0).sum(),
        "w_nonfinite": (~finite).sum(),
        "w_amax": _largest(w.abs()),
        "w_sum_sq": (w * w).sum(),
    }

    stiffness = compute_stiffness_field(before.float(), fmt).double().flatten()
    tiny = torch.finfo(torch.float32).tiny
    stiff = (stiffness >= tiny) & (stiffness < 2.0**127) & (w.abs() >= tiny)
    field["s_count"], field["s_sum"] = stiff.sum(), torch.where(stiff, stiffness, 0.0).sum()
    if gradient is not None:
        field |= _gradient_fields(gradient, near_zero, stiffness, stiff)

    if fmt is FP32:
        error = torch.zeros_like(wide)
    else:
        error = (before - quantize(before, fmt, scale, overflow=Overflow.SATURATE)).double().abs().flatten()
    error = torch.where(finite, error, 0.0)
    field["error_sum"], field["error_sum_sq"], field["error_max"] = error.sum(), (error**2).sum(), _largest(error)
    field["on_grid"] = ((error == 0) & finite).sum()

    raw = (attempted - before).flatten()
    update = torch.where(torch.isfinite(raw), raw, 0.0)
    tried = update != 0
    field["attempted"], field["u_nonfinite"] = tried.sum(), (~torch.isfinite(raw)).sum()
    field["u_amax"], field["u_sum_sq"] = _largest(update.double().abs()), (update.double() ** 2).sum()

    both = finite & torch.isfinite(later)
    steps = (grid_index(after, fmt, scale) - grid_index(before, fmt, scale)).abs().flatten()
    steps = torch.where(both, steps, 0)
    ulps = torch.where(both, compute_ulp_distance(before, after).flatten(), 0.0)
    field["moves"], field["flips"] = both.sum(), (steps > 0).sum()
    field["stalled"] = (tried & both & (steps == 0)).sum()
    field["steps_sum"], field["steps_max"] = steps.sum(), _largest(steps.double())
    field["steps_median"] = _median(_histogram(steps.float(), both))
    field["moved"] = (both & (ulps != 0)).sum()
    field["ulp_sum"], field["ulp_max"] = ulps.sum(), _largest(ulps)
    field["ulp_median"] = _median(_histogram(ulps.float(), both))

    vector = torch.stack([_number(field.get(name, _absent(name)), before.device) for name in UPDATE_FIELDS])
    weight_histogram = _histogram((before / scale).flatten(), finite)
    update_histogram = _histogram((update.view(before.shape) / scale).flatten(), tried)
    return UpdateMeasurement(vector, torch.stack([weight_histogram, update_histogram]))


def _gradient_fields(gradient, near_zero, stiffness, stiff) -> dict[str, Tensor | float]:
    raw = gradient.double().flatten()
    finite = torch.isfinite(raw)
    g = torch.where(finite, raw, 0.0).abs()
    pair = stiff & finite
    s = torch.where(pair, stiffness, 0.0)
    p = torch.where(pair, g, 0.0)
    field: dict[str, Tensor | float] = {
        "g_count": gradient.numel(),
        "g_zero": (raw == 0).sum(),
        "g_near_zero": (finite & (g > 0) & (g < near_zero)).sum(),
        "g_nonfinite": (~finite).sum(),
        "g_amax": _largest(g),
        "g_sum_sq": (g * g).sum(),
        "pairs": pair.sum(),
        "pair_s_sum": s.sum(),
        "pair_s_sum_sq": (s * s).sum(),
        "pair_s_min": -_largest(torch.where(pair, -stiffness, -torch.inf), -torch.inf),
        "pair_s_max": _largest(torch.where(pair, stiffness, -torch.inf), -torch.inf),
        "pair_g_sum": p.sum(),
        "pair_g_sum_sq": (p * p).sum(),
        "pair_g_min": -_largest(torch.where(pair, -g, -torch.inf), -torch.inf),
        "pair_g_max": _largest(torch.where(pair, g, -torch.inf), -torch.inf),
        "pair_gs_sum": (p * s).sum(),
        "ratio_sum": torch.where(pair, g / stiffness, 0.0).sum(),
        "below": (pair & (g < stiffness)).sum(),
    }
    if gradient.ndim == 2:
        used = gradient != 0
        field["dead_rows"], field["dead_columns"] = (~used.any(1)).sum(), (~used.any(0)).sum()
    return field


def _number(value: Tensor | float, device: torch.device) -> Tensor:
    """0-d float64 on the device, without a copy from host memory, which a GPU would be waited for with."""
    if isinstance(value, int | float):
        return torch.full((), value, dtype=torch.float64, device=device)
    return value.to(torch.float64)


def _absent(name: str) -> float:
    if name in ("dead_rows", "dead_columns"):
        return math.nan
    return {"pair_s_min": math.inf, "pair_g_min": math.inf, "pair_s_max": -math.inf, "pair_g_max": -math.inf}.get(
        name, 0
    )


def _largest(x: Tensor, empty: float = 0.0) -> Tensor:
    return x.amax() if x.numel() else x.new_full((), empty)


def _histogram(x: Tensor, valid: Tensor) -> Tensor:
    """Counts of |x| in the bins of float32's upper bits, over the valid elements."""
    bins = (x.float().abs().view(torch.int32) >> 21).to(torch.int64)
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(0, torch.where(valid, bins, BINS), torch.ones_like(bins)).narrow(
        0, 0, BINS
    )  # bincount waits


def _median(histogram: Tensor) -> Tensor:
    """Lower edge of the bin that holds the lower median; NaN for an empty histogram."""
    below = histogram.cumsum(0)
    total = below.narrow(0, BINS - 1, 1)
    position = torch.searchsorted(below, (total + 1) // 2).clamp(max=BINS - 1)
    edge = bin_edges(histogram.device).index_select(0, position).double()  # indexing by a number on a GPU would wait
    return torch.where(total > 0, edge, torch.nan).squeeze(0)
