"""Metrics that people add: a row and a function of a parameter's step, measured with the monitor's own.

    add_metric(
        Metric("kurtosis", group="shape", roles=("weight",), unit=NUMBER, over_layers=max, needs_grid=False),
        lambda step: (step.before.double() ** 4).mean() / (step.before.double() ** 2).mean() ** 2,
    )

The row's group is then one of the schedule's, and the metric shows wherever metrics are listed. A monitor takes the
metrics that exist when it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.errors import OptionError
from altgrad.formats.scalar import FloatFormat
from altgrad.records.metrics import PARAMETERS, Metric, register, unregister


class StepTensors(NamedTuple):
    """One parameter over one step, all of its shape (the scale may broadcast).

    `after` is the parameter after storage rounding, `attempted` before it (the same tensor without grid storage);
    `gradient` is None where there is none; `format` is None without a grid other than the dtype's own.
    """

    before: Tensor
    gradient: Tensor | None
    attempted: Tensor
    after: Tensor
    format: FloatFormat | None
    scale: Tensor | float


Function = Callable[[StepTensors], Tensor]


class Added(NamedTuple):
    """An added metric: its row, and what computes it."""

    row: Metric
    function: Function


_ADDED: dict[str, Added] = {}


def add_metric(row: Metric, function: Function) -> Metric:
    """Measure one more metric of parameters.

    Args:
        row: its roles are some of weight, gradient, update; with several each records the same number.
        function: a 0-d tensor from `StepTensors`, NaN where it is undefined; it must not wait for the device, nor
            change what it is given.

    Raises:
        OptionError: the row is refused (`altgrad.records.metrics.register`), or is not of parameters.
    """
    if not set(row.roles) <= set(PARAMETERS) or row.of_operands:
        raise OptionError(
            f"metric {row.name}: group {row.group!r}, roles {row.roles}: a function sees a parameter's step, so give it "
            f"roles among {PARAMETERS} and another group"
        )
    register(row)
    _ADDED[row.name] = Added(row, function)
    return row


def remove_metric(name: str) -> None:
    """Forget an added metric; nothing happens without one of that name."""
    if _ADDED.pop(name, None) is not None:
        unregister(name)


def added_metrics() -> tuple[Added, ...]:
    """What was added, in order."""
    return tuple(_ADDED.values())


def measure_added(added: tuple[Added, ...], due: frozenset[str], step: StepTensors) -> Tensor | None:
    """float64 [added], NaN for those that are not due; None without any added metric."""
    if not added:
        return None
    nothing = torch.full((), torch.nan, dtype=torch.float64, device=step.before.device)
    values = [
        one.function(step).detach().to(nothing).reshape(())
        if one.row.group in due and not (one.row.needs_grid and step.format is None)
        else nothing
        for one in added
    ]
    return torch.stack(values)
