"""What one pass of a scalar kernel returns, whichever kernel it is."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """Results of one pass over a tensor; None for what was not asked for."""

    values: Tensor | None  # scale * payload, in x's shape and dtype
    codes: Tensor | None  # uint8 (int32 above 8 bits), in x's shape; 0 where a NaN or inf has no code
    stats: Tensor | None  # float64 of shape [7], as altgrad.quantization.stats.FIELDS
    problems: int | Tensor = 0  # nonzero if codes were asked for and a NaN or inf has none: NAN_PROBLEM, INF_PROBLEM
