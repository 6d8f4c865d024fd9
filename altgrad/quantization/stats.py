"""What one pass over a tensor counts while it is quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from altgrad.report.notebook import notebook_table

FIELDS = ("amax", "count", "overflow", "underflow", "nonfinite", "sse", "sum_sq")
EXACT_FIELDS = FIELDS[:5]
SUM_ERROR = 8e-6
"""Largest relative error of `sse` and `sum_sq`; all other fields are exact."""


@dataclass(frozen=True)
class QuantStats:
    """Statistics of one quantization, in one float64 tensor of shape [7] on the tensor's device; nothing is synced.

    amax: largest finite |x|. count: elements. overflow: finite x beyond the largest value after rounding, or whose result
    is inf because scale * value exceeds the tensor's own dtype (and, under `saturate` and `nan`, x = +-inf). underflow:
    nonzero x whose result is zero. nonfinite: x that are inf or NaN.
    sse, sum_sq: sums of (x - result)^2 and of x^2 over finite x with a finite result. On the CPU 512 elements at a time
    are summed in 16 float32 lanes, these sums in float64 (`jit.lanes`): the same bits whatever else is asked for, on every
    processor and number of threads, off by at most 2e-6 of the sum (2^-24 for each of 32 additions, and the square's
    own), by 1e-8 on random data; the other fields are exact. `SUM_ERROR` holds for every kernel.

    blocks: what the blocks look like, of a layer's operand in a block format that an observer hears of; else None.
    """

    vector: Tensor
    blocks: Tensor | None = None

    @property
    def amax(self) -> Tensor:
        """Largest finite |x|."""
        return self.vector[0]

    @property
    def count(self) -> Tensor:
        """Number of elements."""
        return self.vector[1]

    @property
    def overflow(self) -> Tensor:
        """Number of overflowed elements."""
        return self.vector[2]

    @property
    def underflow(self) -> Tensor:
        """Number of nonzero elements that became zero."""
        return self.vector[3]

    @property
    def nonfinite(self) -> Tensor:
        """Number of inf and NaN elements of the input."""
        return self.vector[4]

    @property
    def sse(self) -> Tensor:
        """Sum of squared errors."""
        return self.vector[5]

    @property
    def sum_sq(self) -> Tensor:
        """Sum of squares of the input."""
        return self.vector[6]

    @property
    def overflow_rate(self) -> Tensor:
        """overflow / count; 0 for an empty tensor."""
        return self.overflow / self.count.clamp(min=1)

    @property
    def underflow_rate(self) -> Tensor:
        """underflow / count; 0 for an empty tensor."""
        return self.underflow / self.count.clamp(min=1)

    @property
    def sqnr_db(self) -> Tensor:
        """10 log10(sum_sq / sse) in dB; inf without error, NaN for an all-zero or empty tensor."""
        return 10 * torch.log10(self.sum_sq / self.sse)

    def __repr__(self) -> str:
        return f"QuantStats({', '.join(f'{name}={value}' for name, value in self._shown())})"

    def _repr_html_(self) -> str:
        return notebook_table("QuantStats", self._shown())

    def _shown(self) -> list[tuple[str, str]]:
        if (
            self.vector.device.type != "cpu"
            or type(self.vector) is not Tensor
            or is_functorch_wrapped_tensor(self.vector)
        ):
            return [("vector", f"{type(self.vector).__name__} on {self.vector.device}")]  # reading it would wait
        found = self.to_dict()
        rates = [(name, f"{float(getattr(self, name + '_rate')):.2%}") for name in ("overflow", "underflow")]
        return [("amax", f"{found['amax']:g}"), *rates, ("sqnr", f"{float(self.sqnr_db):.1f} dB")]

    def to_dict(self) -> dict[str, float]:
        """All fields as Python numbers (waits for the device)."""
        return dict(zip(FIELDS, self.vector.tolist(), strict=True))


def measure(x: Tensor, result: Tensor, overflow: Tensor) -> QuantStats:
    """The statistics of x, its quantized `result` and the mask of overflowed elements, in plain torch."""
    wide, quantized = x.detach().double(), result.detach().double()
    finite = torch.isfinite(wide)
    both = finite & torch.isfinite(quantized)
    error = torch.where(both, wide - quantized, 0.0)
    kept = torch.where(both, wide, 0.0)
    magnitude = torch.where(finite, wide.abs(), 0.0)
    vector = torch.stack(
        [
            magnitude.amax() if x.numel() else magnitude.new_zeros(()),
            torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device),
            (overflow | (finite & torch.isinf(quantized))).sum().double(),
            ((wide != 0) & (quantized == 0)).sum().double(),
            (~finite).sum().double(),
            (error * error).sum(),
            (kept * kept).sum(),
        ]
    )
    return QuantStats(vector)
