"""What is measured, when, and on which layers: facts that a config or a person states.

Metrics are scheduled in groups, since those of a group come out of one computation; which group a metric belongs to says
its row (`altgrad.records.metrics`). Three groups cost more than a pass over the data: `rank` a singular value decomposition
of every matrix, `reference` another backward pass, `oscillation` every weight's quantization on every step. The first
two say their seconds in their records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from altgrad.errors import ConfigError
from altgrad.records.metrics import groups
from altgrad.records.untrusted import Malformed, parse_pattern
from altgrad.report.text import shortened

GROUPS = groups()
"""The groups of AltGrad's own metrics; added metrics (`altgrad.monitor.add_metric`) may have further ones."""

RANK_EVERY = 250
"""Default steps between ranks: an SVD of every matrix costs about a training step."""


@dataclass(frozen=True)
class When:
    """Steps and layers of one group of metrics.

    Args:
        every: measured at steps 1, 1 + every, 1 + 2 every, ...; 0 never.
        window: first and last step, both included; None has no end.
        layers: regular expression searched in the layer's name; "" matches all.

    Raises:
        ConfigError: `every` is negative, the window is empty, or the pattern does not compile.
    """

    every: int = 1
    window: tuple[int, int | None] = (1, None)
    layers: str = ""

    def __post_init__(self) -> None:
        first, last = self.window
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 0:
            raise ConfigError(f"every: {self.every!r} is not a number of steps; use 1 for every step, 0 for never")
        if last is not None and last < first:
            raise ConfigError(f"window: [{first}, {last}] is empty; give [first step, last step]")
        try:
            parse_pattern(self.layers)
        except Malformed as error:
            raise ConfigError(f"layers: {shortened(repr(self.layers))} is not a regular expression: {error}") from None

    def due(self, step: int) -> bool:
        """Whether this step is measured."""
        first, last = self.window
        return self.every > 0 and step >= first and (last is None or step <= last) and (step - 1) % self.every == 0

    def covers(self, layer: str) -> bool:
        """Whether this layer is measured."""
        return parse_pattern(self.layers).search(layer) is not None


@dataclass(frozen=True)
class Schedule:
    """A `When` for each group of metrics."""

    groups: Mapping[str, When]

    def due(self, step: int) -> frozenset[str]:
        """The groups that this step measures."""
        return frozenset(name for name, when in self.groups.items() if when.due(step))


def make_schedule(plan: int | Mapping[str, Any] | Schedule | None = None) -> Schedule:
    """A schedule from what a person writes.

    Args:
        plan: None: everything on every step, but rank every 250 steps, and neither reference nor oscillation. A number
            n: the same every n steps. A mapping: group (or "default") to a number of steps, or to any of {every,
            window: [first, last], layers: pattern}; groups that are not named follow "default".

    Raises:
        ConfigError: unknown group or key (with the valid ones), or a wrong value.
    """
    if isinstance(plan, Schedule):
        return plan
    if plan is None or isinstance(plan, int):
        plan = {"default": 1 if plan is None else plan}
    known = groups()
    given = {name: _when(name, value) for name, value in plan.items()}
    if unknown := sorted(set(given) - {*known, "default"}):
        raise ConfigError(f"schedule: unknown group {unknown[0]!r}; groups are default, {', '.join(known)}")
    default = given.get("default", When())
    costly = {
        "rank": replace(default, every=RANK_EVERY if default.every else 0),
        "reference": replace(default, every=0),
        "oscillation": replace(default, every=0),
    }
    return Schedule({name: given.get(name, costly.get(name, default)) for name in known})


def _when(name: str, value: Any) -> When:
    if isinstance(value, When):
        return value
    if isinstance(value, int):
        return When(every=value)
    if not isinstance(value, Mapping) or set(value) - {"every", "window", "layers"}:
        raise ConfigError(f"schedule: {name}: {value!r} is not a number of steps or some of every, window, layers")
    window = value.get("window", (1, None))
    if not isinstance(window, list | tuple) or len(window) != 2:
        raise ConfigError(f"schedule: {name}: window {window!r} is not [first step, last step]")
    return When(value.get("every", 1), (window[0], window[1]), value.get("layers", ""))
