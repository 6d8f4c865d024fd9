"""What is measured during a step: the overflow rate for the clip, and `altgrad.monitor`'s diagnostics when asked for.

The quantized layers have one observer. With the monitor on it is the monitor, which also knows the overflow; with only
the clip on it is a small meter; with neither there is none and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.quantization.stats import QuantStats
from altgrad.training.config.experiment import ExperimentConfig, MonitorSection
from altgrad.training.step.formats_of_run import FormatsOfRun


def rank_limits(plan: MonitorSection) -> Any:
    """When a fall of the effective rank is a collapse, as the config says."""
    from altgrad.monitor import RankLimits

    return RankLimits(plan.rank_fraction, plan.rank_fraction_projections)


class OverflowMeter:
    """An observer that keeps each operand's overflow rate of the present step, on the device."""

    def __init__(self) -> None:
        self._rates: list[Tensor] = []

    def clear(self) -> None:
        """A new step begins."""
        self._rates = []

    def rate(self) -> Tensor | None:
        """Largest rate over layers and roles, 0-dim; None if nothing was quantized."""
        return torch.stack(self._rates).amax() if self._rates else None

    def observe(self, *, stats: QuantStats, **_: Any) -> None:
        """One operand was quantized."""
        self._rates.append(stats.overflow_rate)

    def observe_update(self, **_: Any) -> None:
        """Updates are no operands."""


class Measuring:
    """The observer of one run's layers."""

    def __init__(
        self, config: ExperimentConfig, model: nn.Module, optimizer: torch.optim.Optimizer, formats: FormatsOfRun
    ) -> None:
        self._model = model
        self.sink: Callable[[list[dict[str, Any]]], None] = lambda records: None  # the runner puts its file here
        self.monitor: Any = None
        self.meter: OverflowMeter | None = None
        self._clips = config.enable_partition_clipping and formats.active
        if config.monitor.enabled:
            from altgrad.monitor import Monitor

            plan = config.monitor
            self.monitor = Monitor(
                model,
                optimizer,
                handle=formats.handle,
                schedule={"default": plan.interval, **plan.schedule},
                sink=lambda records: self.sink(records),
                near_zero=plan.near_zero,
                rank_limits=rank_limits(plan),
            )
        elif self._clips:
            from altgrad.nn import set_observer

            self.meter = OverflowMeter()
            set_observer(model, self.meter)

    def begin_step(self, step: int) -> None:
        """Before the forward pass."""
        if self.monitor is not None:
            self.monitor.begin_step(step)
        elif self.meter is not None:
            self.meter.clear()

    def overflow_rate(self) -> Tensor | None:
        """This step's largest overflow rate over layers and roles, 0-dim; None where it is not measured."""
        source = self.monitor.overflow_rate() if self.monitor is not None else None
        return self.meter.rate() if self.meter is not None else source

    def reference(self, backward: Callable[[], Any]) -> None:
        """After the backward pass: compare the gradients with FP32 ones, which `backward()` computes, when due."""
        if self.monitor is not None and self.monitor.reference_due:
            self.monitor.measure_reference(backward)

    def end_step(self) -> None:
        """After the optimizer's step, or in its place when the step was skipped."""
        if self.monitor is not None:
            self.monitor.end_step()

    def paused(self) -> AbstractContextManager[Any]:
        """Within the block nothing is recorded."""
        return self.monitor.paused() if self.monitor is not None else nullcontext()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within the block nothing is recorded; what the clip asks for is metered all the same, by a meter of the block's own."""
        monitor, meter = self.monitor, self.meter
        own = OverflowMeter() if self._clips else None
        with self.paused(), _observed_by(self._model, own):
            self.monitor, self.meter = None, own
            try:
                yield
            finally:
                self.monitor, self.meter = monitor, meter

    def flush(self) -> None:
        """Hand over what is held back: a checkpoint must not be newer than its records."""
        if self.monitor is not None:
            self.monitor.flush()

    def state(self) -> dict[str, Any]:
        """What later records depend on; empty without a monitor."""
        return {} if self.monitor is None else self.monitor.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`'s result; a checkpoint of before there was one has none."""
        if self.monitor is not None and state:
            self.monitor.load_state(state)

    def close(self) -> None:
        """Hand over what is still held back, and let go of the model."""
        if self.monitor is not None:
            self.monitor.close()


def diagnose_collapse(trainer: Any) -> list[dict[str, Any]]:
    """Monitor records of one step taken from a `Trainer`'s state on its next batch, everything measured, then undone.

    Empty for a run on several ranks (one of them cannot step alone).
    """
    from altgrad.monitor import Monitor

    if not trainer.ranks.alone:
        return []
    state = trainer.capture()
    own = trainer.measuring.monitor
    records: list[dict[str, Any]] = []
    monitor = Monitor(
        trainer.model,
        trainer.optimizer,
        handle=trainer.formats.handle,
        schedule={"default": 1, "rank": 1},
        sink=records.extend,
        near_zero=trainer.config.monitor.near_zero,
        rank_limits=rank_limits(trainer.config.monitor),
    )
    trainer.measuring.monitor = monitor
    try:
        trainer.train_step(*trainer.batch(trainer.step + 1))
    finally:
        monitor.close()
        trainer.measuring.monitor = own
        trainer.restore(state)
    return records


@contextmanager
def _observed_by(model: nn.Module, observer: OverflowMeter | None) -> Iterator[None]:
    """Within the block the model's quantized layers, if it has any, have this observer and no other."""
    from altgrad.errors import RecipeError
    from altgrad.nn.session import sessions_of

    try:
        sessions = sessions_of(model)
    except RecipeError:
        sessions = []
    observers = [session.observer for session in sessions]
    for session in sessions:
        session.observer = observer
    try:
        yield
    finally:
        for session, before in zip(sessions, observers, strict=True):
            session.observer = before
