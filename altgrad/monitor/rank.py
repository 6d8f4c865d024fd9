"""Rank of weight matrices: how many directions a layer still uses, and when that has collapsed."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PROJECTIONS = r"(^|\.)(lm_head|head|out|out_proj|o_proj|c_proj|down|down_proj|proj|output)$"
"""Names of output heads and output projections: what they lose no later layer can restore."""


def singular_values(weight: Tensor) -> Tensor:
    """Singular values in float32, largest first, of the weight as a matrix [out, everything else].

    NaN for a weight that is not finite (without waiting for the device on account of it).
    """
    matrix = weight.detach().float().flatten(1)
    finite = torch.isfinite(matrix).all()
    return torch.where(finite, torch.linalg.svdvals(torch.where(finite, matrix, 0.0)), torch.nan)


def stable_rank(values: Tensor) -> Tensor:
    """||W||_F^2 / ||W||_2^2 from the singular values; between 1 and the rank; NaN for a zero matrix."""
    values = values.double()
    return (values**2).sum() / values.amax() ** 2


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of the normalized singular values (Roy and Vetterli 2007); NaN for a zero matrix."""
    p = values.double() / values.double().sum()
    return torch.exp(-torch.special.xlogy(p, p).sum())


@dataclass(frozen=True)
class RankLimits:
    """When a fall of the effective rank is a collapse.

    Args:
        fraction: of its first measured value, below which a layer has collapsed; 0.5, half of its directions.
        projection_fraction: the same for heads and output projections; 0.7, stricter: later layers cannot make up for
            directions that these lose.
        projections: regular expression of their names.
    """

    fraction: float = 0.5
    projection_fraction: float = 0.7
    projections: str = field(default=PROJECTIONS)

    def limit(self, layer: str) -> float:
        """The fraction that applies to a layer."""
        return self.projection_fraction if re.search(self.projections, layer) else self.fraction

    def collapsed(self, layer: str, first: float, now: float) -> bool:
        """Whether the effective rank fell from `first` to below the layer's fraction of it."""
        return now < self.limit(layer) * first


class RankWatch:
    """Measures the ranks of weight matrices and warns of those that fell below what they were at first."""

    def __init__(self, limits: RankLimits) -> None:
        self.limits = limits
        self.warnings: list[str] = []
        self._first: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """The first effective rank of each layer, and the warnings."""
        return {"first": dict(self._first), "warnings": list(self.warnings)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`'s result."""
        self._first = dict(state["first"])
        self.warnings[:] = state["warnings"]

    def measure(self, step: int, layer: str, weight: Tensor) -> dict[str, Any]:
        """The metrics of one layer's weight, [out, ...], with at least one element; waits for the device."""
        started = time.perf_counter()
        values = singular_values(weight)
        stable, effective = torch.stack([stable_rank(values), effective_rank(values)]).tolist()
        found: dict[str, Any] = {"stable_rank": stable, "effective_rank": effective}
        first = self._first.setdefault(layer, effective)
        if self.limits.collapsed(layer, first, effective):
            found["rank_collapsed"] = True
            self.warnings.append(
                f"step {step}: rank of {layer} collapsed: effective rank {effective:.1f}, below "
                f"{self.limits.limit(layer):g} of its first {first:.1f}"
            )
        found["rank_seconds"] = time.perf_counter() - started
        return found
