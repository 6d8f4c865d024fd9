"""The monitor: attaches to a model and its optimizer, collects on the device, hands records over once per interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad.diagnostics.update import FIELD, NEAR_ZERO, UPDATE_FIELDS, measure_update, predict_stall
from altgrad.errors import FormatError, OptionError
from altgrad.formats.rounding import Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.monitor.attaching import layer_name, plain_name, watch_steps
from altgrad.monitor.rank import RankLimits, effective_rank, singular_values, stable_rank
from altgrad.monitor.records import Record, Watched, operand_records, update_records
from altgrad.monitor.reference import compare, reference_gradients
from altgrad.monitor.schedule import FUSED, Schedule, make_schedule
from altgrad.monitor.shadow import watch_layers
from altgrad.monitor.summary import summary_table
from altgrad.quantization import FP32, QuantStats, amax_scale, get_format

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
    handed over bare, compiled or wrapped for data parallelism.

    Args:
        model, optimizer: what is trained. Without an optimizer only operands and gradients are measured.
        handle: the storage handle of `attach_optimizer`, if there is one; nothing depends on it.
        format: grid for the layers of a model that is not quantized, a scalar format; None and FP32: the dtype's own.
        schedule: see `altgrad.monitor.schedule.make_schedule`; None measures everything on every step but the rank
            (every 250 steps) and the FP32 reference.
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
        self.schedule = make_schedule(schedule)
        self.near_zero, self.flush_every, self.rank_limits = near_zero, flush_every, rank_limits or RankLimits()
        self.latest: dict[tuple[str, str], Record] = {}  # the last record of each (layer, role)
        self.warnings: list[str] = []
        self._sink = sink
        self._model, self._format = model, None if format is None else get_format(format)
        named = list(model.named_parameters(remove_duplicate=False) if parameters is None else parameters.items())
        self._aliases: dict[int, list[str]] = {}  # all layers that share a parameter
        for name, p in named:
            if p.requires_grad:
                self._aliases.setdefault(id(p), []).append(layer_name(name))
        self._names = {key: names[0] for key, names in self._aliases.items()}
        self._parameters = {id(p): p for _, p in named if p.requires_grad}
        self._plain_names: dict[str, str] = {}
        self._embeddings = {plain_name(n) for n, module in model.named_modules() if isinstance(module, nn.Embedding)}
        self._own_counts = getattr(
            optimizer, "grid_step_counts", None
        )  # of an optimizer that rounds to the grid itself
        self._paused = 0
        self._pending: list[_Step] = []
        self._before: dict[int, Tensor] = {}
        self._due_cache: dict[tuple[frozenset[str], int], frozenset[str]] = {}
        self._published: set[int] = set()  # parameters whose updates a storage handle publishes
        self._last_updates: dict[int, Tensor] = {}  # histogram of each parameter's last measured update
        self._first_ranks: dict[str, float] = {}
        self._by_loop = False
        self._hooks: list[Any] = []
        self._attach(optimizer)
        self._begin(1)

    # -- the loop's side ----------------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Start a step, before its forward pass; from now on steps end with `end_step`."""
        self._by_loop = True
        self._begin(step)

    def end_step(self) -> None:
        """Close the step, also one whose optimizer step was skipped (its gradients are then measured as they are)."""
        self._measure_skipped()
        self._close_step()

    def overflow_rate(self) -> Tensor | None:
        """Largest overflow rate of this step over layers and roles, 0-d on the device; None if nothing was quantized."""
        rows = [stats for _, stats, _ in self._operands]
        if not rows or not (self._quantized or self._format):
            return None
        raw = torch.stack(rows)
        return (raw[:, 2] / raw[:, 1].clamp(min=1)).amax()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block (an evaluation, say) nothing is recorded."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def measure_reference(self, backward: Callable[[], object], *, force: bool = False) -> float | None:
        """Compare this step's gradients with FP32 ones, between backward and optimizer step, if the schedule says so.

        Args:
            backward: runs forward and backward once more on the same batch (with the same random state, if the model
                draws any), adding to `.grad`; it runs with quantization off and leaves the real gradients untouched.
            force: whatever the schedule.

        Returns:
            Its cost in seconds (also in the records, as `reference_seconds`), or None if it was not due.
        """
        if self._paused or not (force or "reference" in self._due):
            return None
        started = time.perf_counter()
        when = self.schedule.groups["reference"]
        chosen = [p for key, p in self._parameters.items() if p.grad is not None and when.covers(self._names[key])]
        with self.paused():
            references = reference_gradients(self._model, self._parameters.values(), backward)
        by_id = dict(zip(self._parameters, references, strict=True))
        rows, layers = [], []
        for p in chosen:
            reference = by_id[id(p)]
            if reference is not None and p.grad is not None:
                rows.append(compare(p.grad, reference))
                layers.append(self._names[id(p)])
        values = torch.stack(rows).tolist() if rows else []  # the one wait for the device, so that the time is true
        seconds = time.perf_counter() - started
        for layer, (snr, cosine) in zip(layers, values, strict=True):
            found = {"reference_snr_db": snr, "reference_cosine": cosine, "reference_seconds": seconds}
            self._extra.append(self._record(layer, "gradient", found))
        return seconds

    @property
    def reference_due(self) -> bool:
        """Whether the schedule wants `measure_reference` on this step."""
        return "reference" in self._due

    def flush(self) -> list[Record]:
        """Copy what is held on the device to the host, hand it to the sink, and return it."""
        records = _to_records(self._pending)
        self._pending = []
        for record in records:
            key = record["layer"], record["role"]
            old = self.latest.get(key, {})
            self.latest[key] = {**old, **record}
        if records and self._sink is not None:
            self._sink(records)
        return records

    def summary(self, *, rows: int = 40, width: int | None = None) -> str:
        """The last measurements as a table, one line per layer, and the warnings."""
        self.flush()
        return summary_table(self.latest, self.warnings, rows=rows, width=width)

    def close(self) -> None:
        """Hand over what is left and let go of the model and the optimizer."""
        self.flush()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for session, before in self._observed:
            if session.observer is self:
                session.observer = before
        self._observed = []

    # -- what layers and storage publish ------------------------------------------------------------------------------

    def observe(
        self, *, layer: str, role: str, gemm: str, stats: QuantStats, scale: Tensor | float, fmt: FloatFormat
    ) -> None:
        """An operand was quantized (`altgrad.quantization.Observer`)."""
        if self._paused:
            return
        plain = self._plain_names.get(layer)
        if plain is None:
            plain = self._plain_names[layer] = plain_name(layer)
        layer = plain
        self._operands.append(((layer, role, str(fmt)), stats.vector, scale))
        if role == "weight" and isinstance(fmt, FloatFormat):
            self._grids[layer] = fmt, scale

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
        if self._paused or not due:
            return
        found = measure_update(
            before,
            after,
            gradient=parameter.grad,
            attempted=attempted,
            format=fmt,
            scale=scale,
            near_zero=self.near_zero,
            histograms="stall" in due,
        )
        vector = found.vector
        counted = None if self._own_counts is None else self._own_counts(parameter)
        if counted is not None:
            vector = vector.clone()
            vector[[FIELD["attempted"], FIELD["flips"], FIELD["stalled"]]] = counted[:3].to(vector)
        watched = Watched(self._names[key], due, str(fmt), stored=True, shape=tuple(parameter.shape))
        self._measured.append(_Measured(key, vector, found.histograms, watched, rounding))

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _attach(self, optimizer: Optimizer | None) -> None:
        from altgrad.nn.layer.classes import is_quantized
        from altgrad.nn.session import sessions_of

        self._quantized = any(is_quantized(module) for module in self._model.modules())
        self._observed: list[tuple[Any, Any]] = []  # sessions of quantized layers, with their observers before this one
        if self._quantized:
            for session in sessions_of(self._model):
                self._observed.append((session, session.observer))
                session.observer = self
        else:
            if self._format is not None and not (isinstance(self._format, FloatFormat) and self._format.has_zero):
                raise FormatError(
                    f"{self._format} has no grid of its own to measure weights on; name an element format such as "
                    f"E4M3, or quantize the model with it and leave format out"
                )
            self._format = None if self._format is FP32 else self._format
            self._hooks += watch_layers(
                self._model,
                self._format,
                lambda layer, role, stats, scale, fmt: self.observe(
                    layer=layer, role=role, gemm="forward", stats=stats, scale=scale, fmt=fmt
                ),
            )
        if optimizer is not None:
            self._hooks += watch_steps(self, optimizer)

    def _begin(self, step: int) -> None:
        self.step = step
        self._due = self.schedule.due(step)
        self._fused = self._due & frozenset(FUSED)
        self._operands: list[tuple[tuple[str, str, str], Tensor, Tensor | float]] = []
        self._grids: dict[str, tuple[FloatFormat, Tensor | float]] = {}
        self._measured: list[_Measured] = []
        self._extra: list[Record] = []

    def _due_for(self, key: int) -> frozenset[str]:
        """The fused groups that this step measures on a parameter."""
        cached = self._due_cache.get((self._fused, key))
        if cached is None:
            name = self._names.get(key)
            covered = () if name is None else [g for g in self._fused if self.schedule.groups[g].covers(name)]
            groups = frozenset(covered)
            # A token that did not occur is not a dead unit.
            cached = groups - {"units"} if name in self._embeddings else groups
            self._due_cache[self._fused, key] = cached
        return cached

    @torch.no_grad()
    def before_update(self, *, closure: bool = False) -> None:
        """Copy the parameters that a step may change; which those are, a closure's gradients will tell."""
        if self._paused or not self._fused:
            return
        wanted = [
            k for k, p in self._parameters.items() if k not in self._published and (closure or p.grad is not None)
        ]
        wanted = [k for k in wanted if self._due_for(k)]
        for key in wanted:
            if key not in self._before:
                self._before[key] = torch.empty_like(self._parameters[key], memory_format=torch.contiguous_format)
        if wanted:
            torch._foreach_copy_([self._before[k] for k in wanted], [self._parameters[k].detach() for k in wanted])
        self._copied = wanted

    @torch.no_grad()
    def after_update(self) -> None:
        if not self._paused and self._fused:
            seen = {entry.key for entry in self._measured}
            for key in getattr(self, "_copied", ()):
                if key not in seen and key not in self._published and self._parameters[key].grad is not None:
                    self._measure(key, self._before[key], self._parameters[key].detach())
            self._copied = []
        if not self._by_loop:
            self._close_step()
            self._begin(self.step + 1)

    @torch.no_grad()
    def _measure_skipped(self) -> None:
        """Gradients of parameters that no optimizer stepped on."""
        if self._paused or not self._fused:
            return
        seen = {entry.key for entry in self._measured}
        for key, p in self._parameters.items():
            if key not in seen and p.grad is not None and self._due_for(key):
                self._measure(key, p.detach(), p.detach())

    def _measure(self, key: int, before: Tensor, after: Tensor) -> None:
        parameter = self._parameters[key]
        own = (self._grids[name] for name in self._aliases[key] if name in self._grids)
        fmt, scale = next(own, (None, 1.0)) if parameter.ndim > 1 else (None, 1.0)
        if fmt is None and self._format is not None and not self._quantized and parameter.ndim > 1:
            fmt = self._format
            scale = amax_scale(before, fmt) if fmt.emax < 127 else 1.0
        found = measure_update(
            before, after, gradient=parameter.grad, format=fmt, scale=scale, near_zero=self.near_zero
        )
        watched = Watched(
            self._names[key], self._due_for(key), None if fmt is None else str(fmt), shape=tuple(parameter.shape)
        )
        self._measured.append(_Measured(key, found.vector, None, watched, Rounding.NEAREST_EVEN))

    # -- the end of a step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _close_step(self) -> None:
        if self._paused:
            return
        step = _Step(self.step, extra=self._extra)
        if "operands" in self._due and self._operands:
            covers = self.schedule.groups["operands"].covers
            kept = [entry for entry in self._operands if covers(entry[0][0])]
            step.take_operands(kept)
        if self._measured:
            step.watched = [entry.watched for entry in self._measured]
            step.vectors = torch.stack([entry.vector for entry in self._measured])
            step.predicted = self._predictions(step.vectors)
        if "rank" in self._due:
            self._measure_ranks()
        if step.watched or step.slots or self._extra:
            self._pending.append(step)
        self._operands, self._measured, self._extra = [], [], []
        if len(self._pending) >= self.flush_every:
            self.flush()

    def _predictions(self, vectors: Tensor) -> Tensor:
        """Predicted stall of each measured parameter: weights before this step against the last measured update."""
        predicted = vectors.new_full((len(vectors),), torch.nan)
        groups: dict[tuple[str | None, Rounding], list[int]] = {}
        for i, entry in enumerate(self._measured):
            if entry.histograms is not None and entry.key in self._last_updates:
                groups.setdefault((entry.watched.format, entry.rounding), []).append(i)
        for (fmt, rounding), rows in groups.items():
            histograms = torch.stack([self._measured[i].histograms[0] for i in rows])
            updates = torch.stack([self._last_updates[self._measured[i].key] for i in rows])
            assert fmt is not None
            predicted[rows] = predict_stall(histograms, updates, fmt, rounding)
        for entry in self._measured:
            if entry.histograms is not None:
                self._last_updates[entry.key] = entry.histograms[1]
        return predicted

    def _measure_ranks(self) -> None:
        when = self.schedule.groups["rank"]
        for key, p in self._parameters.items():
            name = self._names[key]
            if p.ndim < 2 or not p.numel() or not when.covers(name):
                continue
            started = time.perf_counter()
            values = singular_values(p)
            stable, effective = torch.stack([stable_rank(values), effective_rank(values)]).tolist()
            found: Record = {"stable_rank": stable, "effective_rank": effective}
            first = self._first_ranks.setdefault(name, effective)
            if self.rank_limits.collapsed(name, first, effective):
                found["rank_collapsed"] = True
                limit = self.rank_limits.limit(name)
                self._warn(
                    f"step {self.step}: rank of {name} collapsed: effective rank {effective:.1f}, below {limit:g} of "
                    f"its first {first:.1f}"
                )
            found["rank_seconds"] = time.perf_counter() - started
            self._extra.append(self._record(name, "weight", found))

    def _warn(self, text: str) -> None:
        self.warnings.append(text)

    def _record(self, layer: str, role: str, found: Record) -> Record:
        kept = {name: value for name, value in found.items() if value == value}
        return {"kind": "monitor", "step": self.step, "layer": layer, "role": role, **kept}


class _Measured(NamedTuple):
    """One parameter's measurement of this step."""

    key: int
    vector: Tensor
    histograms: Any  # of weights and updates, int64 [2, BINS], of a stored parameter whose stall is due; else None
    watched: Watched
    rounding: Rounding


class _Step:
    """What one step left on the device."""

    def __init__(self, step: int, extra: list[Record]) -> None:
        self.step, self.extra = step, extra
        self.slots: list[tuple[str, str, str]] = []
        self.operands: Tensor | None = None  # float64 [slots, 8]
        self.watched: list[Watched] = []
        self.vectors: Tensor | None = None  # float64 [parameters, len(UPDATE_FIELDS)]
        self.predicted: Tensor | None = None

    def take_operands(self, entries: list[tuple[tuple[str, str, str], Tensor, Tensor | float]]) -> None:
        """Sum the micro-batches of each operand."""
        if not entries:
            return
        index = {slot: i for i, slot in enumerate(dict.fromkeys(entry[0] for entry in entries))}
        rows = torch.stack([entry[1] for entry in entries])
        where = torch.tensor([index[entry[0]] for entry in entries], device=rows.device)
        total = rows.new_zeros(len(index), 8)
        total[:, :7].index_add_(0, where, rows)
        total[:, 0] = rows.new_zeros(len(index)).scatter_reduce_(0, where, rows[:, 0], "amax", include_self=True)
        last = {entry[0]: entry[2] for entry in entries}
        total[:, 7] = _scales(list(last.values()), rows)
        self.slots, self.operands = list(index), total


def _scales(scales: list[Any], like: Tensor) -> Tensor:
    """Numbers and tensors as one tensor like `like`; NaN for a tensor of several."""
    if all(isinstance(scale, float | int) for scale in scales):
        return torch.tensor(scales, dtype=like.dtype, device=like.device)
    several = torch.tensor(torch.nan)
    single = (torch.as_tensor(scale).reshape(-1) for scale in scales)
    return torch.stack([(one[0] if one.numel() == 1 else several).to(like) for one in single])


def _to_records(steps: list[_Step]) -> list[Record]:
    """Everything of the interval in one copy to the host, cut up again into each step's records."""
    parts = [t.flatten() for s in steps for t in (s.operands, s.vectors, s.predicted) if t is not None]
    if not parts:
        return [record for s in steps for record in s.extra]
    host = torch.cat(parts).cpu().numpy()
    records: list[Record] = []
    at = 0
    for s in steps:
        if s.operands is not None:
            size = s.operands.numel()
            records += operand_records(s.step, s.slots, host[at : at + size].reshape(-1, 8))
            at += size
        if s.vectors is not None and s.predicted is not None:
            size, n = s.vectors.numel(), len(s.watched)
            raw = host[at : at + size].reshape(n, len(UPDATE_FIELDS))
            records += update_records(s.step, s.watched, raw, host[at + size : at + size + n])
            at += size + n
        records += s.extra
    return records
