"""The monitor: attaches to a model and its optimizer, collects on the device, hands records over once per interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from html import escape
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad.diagnostics.fields import NEAR_ZERO
from altgrad.errors import OptionError
from altgrad.formats.scalar import FloatFormat
from altgrad.monitor.collector import Collector, embeddings_of
from altgrad.monitor.interval import Step, to_records
from altgrad.monitor.rank import RankLimits, RankWatch
from altgrad.monitor.records import Record
from altgrad.monitor.reference import against_reference
from altgrad.monitor.schedule import Schedule, make_schedule
from altgrad.monitor.sources import Sources, plain_name, watch_steps
from altgrad.monitor.summary import summary_table
from altgrad.nn.model.optimizer_hook import bare_optimizer
from altgrad.nn.oscillation import Oscillation
from altgrad.nn.spread import whole
from altgrad.quantization import get_format

Sink = Callable[[list[Record]], None]


class Monitor:
    """Measures a training run per layer and role, on a schedule.

    Works on any model and `torch.optim` optimizer. Quantized layers publish their operands to it; grid weights their
    attempted updates. Other models are measured through hooks; with `format` given, as if their operands and weights
    were put in that format. Nothing that the model computes is changed.

        monitor = Monitor(model, optimizer, sink=records.extend)
        ...train...
        monitor.close()
        print(monitor.summary())

    Without `begin_step` and `end_step` a step ends with each `optimizer.step()`, after all that hangs on it (grid
    storage). A loop that skips steps calls the two itself. Layers go by their names in the bare model, whether it is
    handed over bare, compiled or wrapped for data parallelism. Parameters that FSDP2 spreads over processes are gathered on
    the steps that measure them, one at a time: every process then needs a monitor with the same schedule.

    Args:
        model, optimizer: what is trained; an optimizer that another library wrapped (accelerate) is unwrapped. Without
            an optimizer only operands and gradients are measured.
        handle: the storage handle of `attach_optimizer`, if there is one; nothing depends on it.
        format: grid for the layers of a model that is not quantized, a scalar format; None and FP32: the dtype's own.
        schedule: see `altgrad.monitor.schedule.make_schedule`; None measures everything on every step but the rank
            (every 250 steps), the FP32 reference and the ways of weights (`oscillation`).
        sink: called with a list of records once per interval; None keeps only the last ones, for the summary.
        flush_every: measured steps per interval: one copy to the host each.
        near_zero: gradients below this magnitude count as near zero (1e-8, the customary eps of Adam).
        rank_limits: when a fall of the effective rank is a collapse.
        parameters: name to parameter; None: all of the model's that require gradients.

    Raises:
        OptionError: `flush_every` below 1. ConfigError: a schedule that is none. FormatError: an unknown format, or one
            without a grid of its own for a model that is not quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        handle: object | None = None,
        format: FloatFormat | str | None = None,
        schedule: int | Mapping[str, Any] | Schedule | None = None,
        sink: Sink | None = None,
        flush_every: int = 10,
        near_zero: float = NEAR_ZERO,
        rank_limits: RankLimits | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        if flush_every < 1:
            raise OptionError(f"flush_every {flush_every} is below 1; it counts measured steps per copy to the host")
        optimizer = None if optimizer is None else bare_optimizer(optimizer)
        named = dict(model.named_parameters(remove_duplicate=False)) if parameters is None else parameters
        own_counts = getattr(optimizer, "grid_step_counts", None)
        self.schedule, self.flush_every = make_schedule(schedule), flush_every
        self.latest: dict[tuple[str, str], Record] = {}  # the last record of each (layer, role)
        self._model, self._sink, self._by_loop = model, sink, False
        self._pending: list[Step] = []
        self._collector = collector = Collector(named, self.schedule, near_zero, embeddings_of(model), own_counts)
        self._ways = self._counter()
        self._ranks = RankWatch(rank_limits or RankLimits())
        self.warnings = self._ranks.warnings  # sentences on what collapsed, oldest first
        self.observe, self.observe_update = collector.observe, collector.observe_update  # for the sources
        self.before_update = collector.before_update
        self._sources = Sources(model, None if format is None else get_format(format), self)
        collector.format = self._sources.format
        self._hooks = [] if optimizer is None else watch_steps(self, optimizer)

    @property
    def step(self) -> int:
        """The step that is being measured, from 1."""
        return self._collector.step

    def begin_step(self, step: int) -> None:
        """Start a step, before its forward pass; from now on steps end with `end_step`."""
        self._by_loop = True
        self._collector.begin(step)

    def end_step(self) -> None:
        """Close the step, also one whose optimizer step was skipped (its gradients are then measured as they are)."""
        self._collector.measure_skipped()
        self._close_step()

    def after_update(self) -> None:
        """The optimizer has stepped, grid storage included (`altgrad.monitor.sources.StepWatcher`)."""
        self._collector.after_update()
        if not self._by_loop:
            self._close_step()
            self._collector.begin(self.step + 1)

    def overflow_rate(self) -> Tensor | None:
        """Largest overflow rate of this step over layers and roles, 0-d on the device; None if nothing was quantized."""
        known = self._sources.quantized or self._sources.format is not None
        return self._collector.overflow_rate() if known else None

    def paused(self) -> AbstractContextManager[None]:
        """Within the block (an evaluation, say) nothing is recorded."""
        return self._collector.pausing()

    @property
    def reference_due(self) -> bool:
        """Whether the schedule wants `measure_reference` on this step."""
        return "reference" in self._collector.due

    def measure_reference(self, backward: Callable[[], object], *, force: bool = False) -> float | None:
        """Compare this step's gradients with FP32 ones, between backward and optimizer step, if the schedule says so.

        Args:
            backward: runs forward and backward once more on the same batch (with the same random state, if the model
                draws any), adding to `.grad`; it runs with quantization off and leaves the real gradients untouched.
            force: whatever the schedule.

        Returns:
            Its cost in seconds (also in the records, as `reference_seconds`), or None if it was not due.
        """
        if self._collector.paused or not (force or self.reference_due):
            return None
        chosen = self._collector.covered("reference")
        with self.paused():
            found, seconds = against_reference(self._model, self._collector.parameters, chosen, backward)
        for key, values in found.items():
            self._collector.record(chosen[key], "gradient", values)
        return seconds

    def measure_ranks(self) -> None:
        """Measure the ranks of the weight matrices that the schedule covers, now, into this step's records."""
        for key, name in self._collector.covered("rank").items():
            p = self._collector.parameters[key]
            if p.ndim >= 2 and p.numel():
                self._collector.record(name, "weight", self._ranks.measure(self.step, name, whole(p.detach())))

    def _counter(self) -> Oscillation | None:
        """A count of the ways of weights from here on, where the schedule has its group."""
        when = self.schedule.groups["oscillation"]
        if not when.every:
            return None
        return Oscillation(self._model, or_none=True, covers=lambda name: when.covers(plain_name(name)))

    def _count_ways(self, ways: Oscillation) -> None:
        first, last = self.schedule.groups["oscillation"].window
        over = last is not None and self.step >= last
        if first <= self.step and (self.step == last or not over):
            ways.update()
        due = "oscillation" in self._collector.due
        if due:
            for name, way in ways.layers.items():
                names = ("oscillation", "oscillating", "code_flips")
                self._collector.record_later(plain_name(name), "weight", names, way.measured())
        if over:
            self._ways = None
        elif due or self.step == first - 1:
            self._ways = self._counter()

    def flush(self) -> list[Record]:
        """Copy what is held on the device to the host, hand it to the sink, and return it."""
        records, self._pending = to_records(self._pending), []
        for record in records:
            self.latest.setdefault((record["layer"], record["role"]), {}).update(record)
        if records and self._sink is not None:
            self._sink(records)
        return records

    def state(self) -> dict[str, Any]:
        """What later records depend on, as plain data: first ranks, last measured updates, records not yet handed over."""
        return {
            "ranks": self._ranks.state(),
            "updates": self._collector.last_updates(),
            "ways": {} if self._ways is None else self._ways.state(),
            "pending": [[step.step, to_records([step])] for step in self._pending],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`'s result, so that the records that follow are those that would have followed then."""
        self._ranks.load_state(state["ranks"])
        self._ways = self._counter()
        if self._ways is not None:
            self._ways.load_state(state.get("ways", {}))
        self._collector.load_last_updates(state["updates"])
        self._pending = [Step(step, list(records)) for step, records in state["pending"]]

    def summary(self, *, rows: int = 40, width: int | None = None) -> str:
        """The last measurements as a table, one line per layer, and the warnings."""
        self.flush()
        return summary_table(self.latest, self.warnings, rows=rows, width=width)

    def __repr__(self) -> str:
        layers = len({layer for layer, _ in self.latest})
        last = max((record["step"] for record in self.latest.values()), default=None)
        return (
            f"Monitor({'nothing measured yet' if last is None else f'{layers} layers, last measured at step {last}'})"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.summary())}</pre>"

    def close(self) -> None:
        """Hand over what is left and let go of the model and the optimizer."""
        self.flush()
        self._sources.close()
        while self._hooks:
            self._hooks.pop().remove()

    def _close_step(self) -> None:
        if "rank" in self._collector.due and not self._collector.paused:
            self.measure_ranks()
        if self._ways is not None and not self._collector.paused:
            self._count_ways(self._ways)
        if (step := self._collector.finish()) is not None:
            self._pending.append(step)
        if len(self._pending) >= self.flush_every:
            self.flush()
