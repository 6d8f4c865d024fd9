"""One step on the device: what layers and optimizers publish becomes a few tensors, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from altgrad.diagnostics.fields import FIELD, half_steps, predict_stall
from altgrad.diagnostics.update import measure_update
from altgrad.formats.rounding import Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.monitor.added import StepTensors, added_metrics, measure_added
from altgrad.monitor.interval import Published, Step, places
from altgrad.monitor.records import Record, Watched
from altgrad.monitor.schedule import Schedule
from altgrad.monitor.sources import layer_name, plain_name
from altgrad.nn.spread import from_part, local, whole
from altgrad.quantization import QuantStats, amax_scale


class Measured(NamedTuple):
    """One parameter's measurement of this step."""

    key: int
    vector: Tensor
    histograms: Any  # of weights and updates, int64 [2, BINS], of a stored parameter whose stall is due; else None
    watched: Watched
    rounding: Rounding


class Collector:
    """Collects a step between `begin` and `finish`.

    Args:
        named: name -> parameter, aliases included; those without `requires_grad` are left out.
        embeddings: layers in which a row without a gradient is no dead unit (its token did not occur).
        own_counts: of an optimizer that rounds to the grid itself: parameter -> its counts of the step, or None.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        schedule: Schedule,
        near_zero: float,
        embeddings: set[str],
        own_counts: Any = None,
    ) -> None:
        self.schedule, self.near_zero = schedule, near_zero
        self.format: FloatFormat | None = None  # grid of the weights of a model that is not quantized
        self.paused = 0
        self.parameters = {id(p): p for p in named.values() if p.requires_grad}
        self._aliases: dict[int, list[str]] = {}  # all layers that share a parameter
        for name, p in named.items():
            if p.requires_grad:
                self._aliases.setdefault(id(p), []).append(layer_name(name))
        self.names = {key: names[0] for key, names in self._aliases.items()}
        self.added = added_metrics()
        self._parameter_groups = frozenset(schedule.groups) - {"operands", "rank", "reference", "oscillation"}
        self._embeddings, self._own_counts = embeddings, own_counts
        self._plain_names: dict[str, str] = {}
        self._before: dict[int, Tensor] = {}
        self._copied: list[int] = []
        self._due_cache: dict[tuple[frozenset[str], int], frozenset[str]] = {}
        self._published: set[int] = set()  # parameters whose updates a storage handle publishes
        self._last_updates: dict[int, Tensor] = {}  # histogram of each parameter's last measured update
        self.begin(1)

    def begin(self, step: int) -> None:
        """A step starts; what the last one left is gone."""
        self.step = step
        self.due = self.schedule.due(step)
        self._due_of_parameters = self.due & self._parameter_groups
        self._operands: list[Published] = []
        self._grids: dict[str, tuple[FloatFormat, Tensor | float]] = {}
        self._measured: list[Measured] = []
        self.extra: list[Record] = []
        self._later: list[tuple[Record, tuple[str, ...], Tensor]] = []

    def finish(self) -> Step | None:
        """What the step left on the device; None if nothing was due, or while paused."""
        if self.paused:
            return None
        step = Step(self.step, extra=self.extra, added=tuple(one.row for one in self.added))
        if "operands" in self.due and self._operands:
            covers = self.schedule.groups["operands"].covers
            step.take_operands([entry for entry in self._operands if covers(entry.slot[0])])
        if self._measured:
            step.watched = [entry.watched for entry in self._measured]
            step.vectors = torch.stack([entry.vector for entry in self._measured])
            step.of_histograms = self._from_histograms(step.vectors)
        if self._later:
            step.later = [(record, names) for record, names, _ in self._later]
            step.of_later = torch.cat([values for *_, values in self._later])
        self._operands, self._measured, self.extra, self._later = [], [], [], []
        return step if step.watched or step.slots or step.extra or step.later else None

    def covered(self, group: str) -> dict[int, str]:
        """Parameters that a group of statistics covers: key to name."""
        covers = self.schedule.groups[group].covers
        return {key: name for key, name in self.names.items() if covers(name)}

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Nothing is recorded within the block."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def overflow_rate(self) -> Tensor | None:
        """Largest overflow rate of this step so far, 0-d on the device; None without any operand."""
        if not self._operands:
            return None
        raw = torch.stack([entry.vector for entry in self._operands])
        return (raw[:, 2] / raw[:, 1].clamp(min=1)).amax()

    def record(self, layer: str, role: str, found: Record) -> None:
        """Add a record of numbers that are on the host already; NaN is left out."""
        kept = {name: value for name, value in found.items() if value == value}
        self.extra.append({**self._headed(layer, role), **kept})

    def record_later(self, layer: str, role: str, names: tuple[str, ...], values: Tensor) -> None:
        """Add a record of numbers that are on the device, float64 [names]; NaN is left out."""
        self._later.append((self._headed(layer, role), names, values))

    def _headed(self, layer: str, role: str) -> Record:
        return {"kind": "monitor", "step": self.step, "layer": layer, "role": role}

    # -- what sources publish -----------------------------------------------------------------------------------------

    def observe(
        self, *, layer: str, role: str, gemm: str, stats: QuantStats, scale: Tensor | float, fmt: FloatFormat
    ) -> None:
        """An operand was quantized (`altgrad.quantization.Observer`)."""
        if self.paused:
            return
        plain = self._plain_names.get(layer)
        if plain is None:
            plain = self._plain_names[layer] = plain_name(layer)
        self._operands.append(Published((plain, role, str(fmt)), stats.vector, scale, stats.blocks))
        if role == "weight" and isinstance(fmt, FloatFormat):
            self._grids[plain] = fmt, scale

    def observe_update(
        self,
        *,
        layer: str,
        parameter: nn.Parameter,
        before: Tensor,
        attempted: Tensor,
        after: Tensor,
        scale: Tensor,
        fmt: FloatFormat,
        rounding: Rounding,
    ) -> None:
        """A grid weight was updated (`altgrad.quantization.Observer`)."""
        key = id(parameter)
        self._published.add(key)
        self._before.pop(key, None)
        due = self._due_for(key)
        if self.paused or not due:
            return
        tensors = StepTensors(before, parameter.grad, attempted, after, fmt, scale)
        watched = Watched(self.names[key], due, str(fmt), stored=True, shape=tuple(parameter.shape))
        self._take(key, tensors, watched, rounding, histograms="stall" in due)

    # -- the optimizer's step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_update(self, *, closure: bool = False) -> None:
        """Copy the parameters that a step may change; which those are, a closure's gradients will tell."""
        if self.paused or not self._due_of_parameters:
            return
        wanted = [k for k, p in self.parameters.items() if k not in self._published and (closure or p.grad is not None)]
        wanted = [k for k in wanted if self._due_for(k)]
        for key in wanted:
            if key not in self._before:
                self._before[key] = torch.empty_like(local(self.parameters[key]), memory_format=torch.contiguous_format)
        if wanted:
            torch._foreach_copy_(
                [self._before[k] for k in wanted], [local(self.parameters[k]).detach() for k in wanted]
            )
        self._copied = wanted

    @torch.no_grad()
    def after_update(self) -> None:
        """Measure the parameters that were copied and whose updates nobody published."""
        if self.paused or not self._due_of_parameters:
            return
        seen = {entry.key for entry in self._measured}
        for key in self._copied:
            if key not in seen and key not in self._published and self.parameters[key].grad is not None:
                p = self.parameters[key]
                self._measure(key, from_part(p, self._before[key]), p.detach())
        self._copied = []

    @torch.no_grad()
    def measure_skipped(self) -> None:
        """Measure gradients of parameters that no optimizer stepped on."""
        if self.paused or not self._due_of_parameters:
            return
        seen = {entry.key for entry in self._measured}
        for key, p in self.parameters.items():
            if key not in seen and p.grad is not None and self._due_for(key):
                self._measure(key, p.detach(), p.detach())

    def _due_for(self, key: int) -> frozenset[str]:
        """The groups of a parameter's step that this step measures on a parameter."""
        cached = self._due_cache.get((self._due_of_parameters, key))
        if cached is None:
            name = self.names.get(key)
            due = () if name is None else [g for g in self._due_of_parameters if self.schedule.groups[g].covers(name)]
            groups = frozenset(due)
            # A token that did not occur is not a dead unit.
            cached = groups - {"units"} if name in self._embeddings else groups
            self._due_cache[self._due_of_parameters, key] = cached
        return cached

    def _measure(self, key: int, before: Tensor, after: Tensor) -> None:
        """Measure a parameter on the grid on which its layer was seen to use it, if there is one."""
        parameter, before, after = self.parameters[key], whole(before), whole(after)
        own = (self._grids[name] for name in self._aliases[key] if name in self._grids)
        fmt, scale = next(own, (None, 1.0)) if parameter.ndim > 1 else (None, 1.0)
        if fmt is None and self.format is not None and parameter.ndim > 1:
            fmt = self.format
            scale = amax_scale(before, fmt) if fmt.emax < 127 else 1.0
        tensors = StepTensors(before, parameter.grad, after, after, fmt, scale)
        name = None if fmt is None else str(fmt)
        watched = Watched(self.names[key], self._due_for(key), name, shape=tuple(parameter.shape))
        self._take(key, tensors, watched, Rounding.NEAREST_EVEN, histograms=False)

    def _take(self, key: int, tensors: StepTensors, watched: Watched, rounding: Rounding, *, histograms: bool) -> None:
        before, gradient, attempted, after, fmt, scale = tensors = _gathered(tensors)
        found = measure_update(
            before,
            after,
            gradient=gradient,
            attempted=attempted,
            format=fmt,
            scale=scale,
            near_zero=self.near_zero,
            histograms=histograms,
        )
        vector = found.vector
        counted = self._own_counts(self.parameters[key]) if watched.stored and self._own_counts is not None else None
        if counted is not None:
            at = places(tuple(FIELD[name] for name in ("attempted", "flips", "stalled")), vector.device)
            vector = vector.index_copy(0, at, counted[:3].to(vector))
        more = measure_added(self.added, watched.due, tensors)
        if more is not None:
            vector = torch.cat([vector, more])
        self._measured.append(Measured(key, vector, found.histograms if histograms else None, watched, rounding))

    def last_updates(self) -> dict[str, Tensor]:
        """Histogram of each stored parameter's last measured update, by its name; the next predicted stall rests on it."""
        return {self.names[key]: histogram.clone() for key, histogram in self._last_updates.items()}

    def load_last_updates(self, histograms: Mapping[str, Tensor]) -> None:
        """Go on from `last_updates`' result."""
        keys = {name: key for key, name in self.names.items()}
        known = {keys[name]: histogram for name, histogram in histograms.items() if name in keys}
        self._last_updates = {key: h.to(self.parameters[key].device, copy=True) for key, h in known.items()}

    def _from_histograms(self, vectors: Tensor) -> Tensor:
        """Of each measured parameter: the stall predicted from its weights before this step and its last measured update,
        and this update's `half_steps`."""
        found = vectors.new_full((len(vectors), 2), torch.nan)
        alike: dict[tuple[str | None, Rounding], list[int]] = {}
        for i, entry in enumerate(self._measured):
            if entry.histograms is not None:
                alike.setdefault((entry.watched.format, entry.rounding), []).append(i)
        for (fmt, rounding), rows in alike.items():
            assert fmt is not None
            now = torch.stack([self._measured[i].histograms for i in rows])
            found[:, 1].index_copy_(
                0, places(tuple(rows), found.device), half_steps(now[:, 0], now[:, 1], fmt).to(found)
            )
            known = [(i, k) for k, i in enumerate(rows) if self._measured[i].key in self._last_updates]
            if known:
                updates = torch.stack([self._last_updates[self._measured[i].key] for i, _ in known])
                weights = now[:, 0].index_select(0, places(tuple(k for _, k in known), now.device))
                predicted = predict_stall(weights, updates, fmt, rounding)
                found[:, 0].index_copy_(0, places(tuple(i for i, _ in known), found.device), predicted.to(found))
        for entry in self._measured:
            if entry.histograms is not None:
                self._last_updates[entry.key] = entry.histograms[1]
        return found


def _gathered(step: StepTensors) -> StepTensors:
    """The step of a parameter that is spread over processes, with whole tensors."""
    gradient = None if step.gradient is None else whole(step.gradient)
    return step._replace(
        before=whole(step.before), gradient=gradient, attempted=whole(step.attempted), after=whole(step.after)
    )


def embeddings_of(model: nn.Module) -> set[str]:
    """Names of the embedding layers."""
    return {plain_name(name) for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
