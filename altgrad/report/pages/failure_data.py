"""What a failure report is made of, as data: measured by others, drawn by `altgrad.report.pages.failure`.

A field that is None was not measured, and the report says so in those words; it never prints a number in its place.
Rates are fractions in 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from altgrad.report.numbers import Unit


@dataclass(frozen=True)
class RunFacts:
    """Which run failed."""

    name: str
    run_id: str
    seed: int | None = None
    format: str | None = None
    storage: str | None = None
    rounding: str | None = None
    step: int | None = None
    """Last step that ran."""
    max_steps: int | None = None


@dataclass(frozen=True)
class VerdictFacts:
    """What kind of collapse (or remark), when it began, when it was detected, and the number that proves it."""

    kind: str
    onset_step: int | None
    detected_step: int | None
    metric: str | None = None
    value: float | None = None
    threshold: float | None = None
    reason: str | None = None
    judged_on: str | None = None
    """The loss on which progress was judged."""
    evidence: Sequence[tuple[str, str]] = ()
    """Further (label, text) pairs."""


@dataclass(frozen=True)
class LossAround:
    """(step, loss) before the onset, at it, and after it (the last one recorded)."""

    before: tuple[int, float] | None = None
    at: tuple[int, float] | None = None
    after: tuple[int, float] | None = None
    best: tuple[int, float] | None = None


@dataclass(frozen=True)
class GradientFacts:
    """Gradient sparsity at one step, over all elements of all parameters."""

    step: int | None = None
    zero_frac: float | None = None
    near_zero_frac: float | None = None
    near_zero_threshold: float | None = None
    nonfinite_frac: float | None = None
    elements: int | None = None

    @property
    def all_nonfinite(self) -> bool:
        return self.nonfinite_frac is not None and self.nonfinite_frac >= 1.0


@dataclass(frozen=True)
class LayerColumn:
    """A metric in the table of layers; `lost`: it is a share of numbers lost, alarming when large."""

    name: str
    heading: str
    unit: Unit = Unit.NUMBER
    lost: bool = False


@dataclass(frozen=True)
class LayerRow:
    """What was measured of one layer and role at the collapse: a metric's name -> its value."""

    layer: str
    role: str
    values: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Trend:
    """A diagnostic over the last steps, of one layer and role or (both None) of the whole model."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    layer: str | None = None
    role: str | None = None
    unit: Unit = Unit.NUMBER
    title: str = ""
    """What it is called; "" makes a title of the name."""


@dataclass(frozen=True)
class Intervention:
    """What was done at a step, and what it changed (None: its effect was not measured)."""

    step: int
    kind: str
    detail: str = ""
    effect: str | None = None
    to_format: str | None = None
    """Of a shift: the format in force afterwards."""


@dataclass(frozen=True)
class FailureData:
    """Everything a failure report says. Only `run` and `verdict` are required."""

    run: RunFacts
    verdict: VerdictFacts
    loss: LossAround | None = None
    loss_steps: Sequence[int] | None = None
    loss_values: Sequence[float] | None = None
    gradient: GradientFacts | None = None
    zero_update_layers: Sequence[str] | None = None
    """Layers with attempted updates of which none changed a code; an empty list means: measured, none."""
    layers_measured: int | None = None
    layers: Sequence[LayerRow] | None = None
    layer_columns: Sequence[LayerColumn] = ()
    layers_step: int | None = None
    trends: Sequence[Trend] | None = None
    interventions: Sequence[Intervention] | None = None
    checkpoint_good: tuple[str, int | None] | None = None
    checkpoint_collapsed: tuple[str, int | None] | None = None
    continue_with: str | None = None
    """Command that continues from the last good state."""
    reproduce: str | None = None
    """Command that reproduces the run."""
    explain: str | None = None
    """Command that finds the cause by replay."""
    explained_at: str | None = None
    """Where that command leaves its page, relative to this report."""
    environment: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
