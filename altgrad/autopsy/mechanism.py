"""The interventions that tell mechanisms apart, as rows, and the reading of their pattern.

Each intervention alters the formats of the cells found and nothing else; which of them save the run says what the format
lacked there. "One more exponent bit" keeps the mantissa and the bias rule 2^(e-1) - 1 (or the format's own where it has
another), and "one more mantissa bit" keeps the exponent range, so that range and resolution are altered one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One intervention. bits: storage per value that it adds; None where it adds none but costs otherwise."""

    name: str
    says: str
    bits: float


CHANGES = (
    Change("exponent", "one more exponent bit", 1),
    Change("mantissa", "one more mantissa bit", 1),
    Change("stochastic", "stochastic instead of deterministic rounding", 0),
    Change("nearest", "rounding to nearest even with all random bits", 0),
    Change("fresh_scale", "a scale from the tensor's own amax at every use", 0),
    Change("fine_blocks", "a scale for each 16 values", 0.5),
    Change("saturate", "saturation instead of inf or NaN", 0),
    Change("master", "float32 master weights", 24),
    Change("half_lr", "half the learning rate", 0),
)

SAVES = 0.6
"""An intervention that closes this share of the gap counts as saving."""

PART = 0.4
"""Share that another rounding closes from which a rounding in one direction counts as what is wrong, the rest being
resolution."""

RANGE, RESOLUTION, BIAS, OUTLIERS, SCALE, LOST_UPDATES, OVERFLOW, OPTIMISATION, UNKNOWN = (
    "range",
    "resolution",
    "bias of the rounding",
    "outliers",
    "scale",
    "lost updates",
    "overflow",
    "optimisation",
    "unknown",
)


def read(closed: Mapping[str, float], *, stored: bool) -> str:
    """The mechanism that a pattern of interventions shows.

    Args:
        closed: share of the gap closed, by intervention; those that could not be made are left out.
        stored: whether the cells are stored weights, whose rounding loses updates.
    """

    def saves(name: str) -> bool:
        return closed.get(name, 0.0) >= SAVES

    directed = "nearest" in closed and "stochastic" in closed  # it rounds in one direction, and may round otherwise
    unbiased = max(closed.get("nearest", 0.0), closed.get("stochastic", 0.0)) if directed else 0.0
    exponent, mantissa = closed.get("exponent", 0.0), closed.get("mantissa", 0.0)
    if (
        stored
        and (saves("stochastic") or saves("mantissa") or saves("master"))
        and not (saves("exponent") and exponent > mantissa + 0.2)
    ):
        return LOST_UPDATES
    if saves("saturate"):
        return OVERFLOW
    if saves("fresh_scale"):
        return SCALE
    if saves("nearest") and (directed or not saves("mantissa")):
        return BIAS
    if saves("exponent") and (mantissa < SAVES or exponent > mantissa + 0.2):
        return RANGE
    if saves("exponent") and saves("mantissa"):
        return RANGE if saves("stochastic") and not saves("nearest") else RESOLUTION
    if unbiased >= PART:
        return BIAS
    if saves("mantissa"):
        return RESOLUTION
    if saves("stochastic") or saves("nearest"):
        return BIAS
    if saves("fine_blocks"):
        return OUTLIERS
    return OPTIMISATION if saves("half_lr") else UNKNOWN
