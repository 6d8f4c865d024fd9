"""One training run of somebody else's loop: its clock, its monitor, its records, its judge, and what a checkpoint keeps.

A loop says what happens and the run does the rest:

    run.attach(model, optimizers)        once, after a checkpoint's parameters are loaded
    run.load_state(state)                on resume
    run.begin_step(); run.next_micro_batch(); run.see_loss(loss)
    run.see_gradients()                  between backward and step, where no hook of the optimizer can
    run.end_step(); run.see_evaluation(loss)
    run.state()                          for a checkpoint
    run.finish()

Numbers of a step stay on the device until `FLUSH_EVERY` steps are together, or somebody asks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from altgrad.errors import AltGradError, CheckpointError
from altgrad.integrations.plain import plain, tensors
from altgrad.monitor import Monitor
from altgrad.monitor.judge import Judge, StepFacts
from altgrad.monitor.limits import VerdictLimits
from altgrad.nn.layer.classes import is_quantized
from altgrad.nn.model.optimizer_hook import attach_optimizer, bare_optimizer, closure_of
from altgrad.nn.model.state import load_quant_state, quant_state
from altgrad.nn.recipe.facts import recipe_facts
from altgrad.nn.session import sessions_of
from altgrad.quantization import NUMERICS_VERSION
from altgrad.records.documents import RESULT, write_config, write_environment, write_result
from altgrad.records.lock import RunLock
from altgrad.records.machine import circumstances
from altgrad.records.metrics_log import METRICS, Mark, MetricsLog, cut_back
from altgrad.records.schema import Evaluation, ExperimentResult, StepRecord, event_row
from altgrad.records.tally import Tally

FLUSH_EVERY = 10
LOG = logging.getLogger("altgrad")


@dataclass
class _Step:
    """A step whose numbers are still on the device: loss, gradient norm, attempted, stalled and flipped weights."""

    step: int
    lr: float
    stepped: bool
    seconds: float
    tokens: int
    elapsed_s: float
    loss: Tensor | None
    numbers: Tensor
    overflow: Tensor | None = None


@dataclass
class _Micro:
    """What the micro-batches of the present step added up to."""

    loss: Tensor | None = None
    share: float = 0.0
    tokens: int = 0
    batch: int = 0


@dataclass
class RecordedRun:
    """See the module.

    Args:
        run_dir: the run's folder, as `altgrad run` writes one; None: no records, no verdicts, the clock and state only.
        monitor: the schedule of what is measured per layer (`altgrad.monitor.make_schedule`): a number of steps between
            measured ones, or a mapping; None switches the monitor off.
        verdict: limits other than the usual (`VerdictLimits`), by name.
        stop: whether a collapse asks the loop to end; it is recorded and reported either way.
        overwrite: whether a run of a fresh start may replace the records that the folder has.
    """

    run_dir: str | Path | None = None
    monitor: int | Mapping[str, Any] | None = 10
    verdict: Mapping[str, Any] = field(default_factory=dict)
    stop: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.limits = VerdictLimits(**{"stop": self.stop, **self.verdict})
        self.model: nn.Module | None = None
        self.step = 0
        self.collapsed = False  # and the loop should end
        self._closers: list[Callable[[], None]] = []

    # -- beginning and end ----------------------------------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        facts: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
        warmup_steps: int = 0,
        resumed: bool = False,
        writes: bool = True,
    ) -> None:
        """Begin: hooks on the optimizers, the monitor, and the run's folder.

        Args:
            facts: what the records shall say of the run beside what is known here, for config.yaml.
            max_steps: how many steps there will be, if that is known. warmup_steps: of the learning rate.
            resumed: whether a checkpoint is continued, of which `load_state` may follow.
            writes: whether this process writes records; one of several does.

        Raises:
            CheckpointError: a fresh start in a folder that has the records of a run.
            RunBusyError: another process writes there.
        """
        self._release()
        self.model, self.step, self.collapsed = model, 0, False
        self.optimizers = [
            bare_optimizer(o) for o in (optimizers if isinstance(optimizers, Sequence) else [optimizers])
        ]
        self.max_steps, self.warmup_steps = max_steps, warmup_steps
        self._sessions = sessions_of(model) if any(map(is_quantized, model.modules())) else []
        self._handles = [attach_optimizer(model, o) for o in self.optimizers] if self._sessions else []
        self._micro, self._norm, self._stepped, self._waiting = _Micro(), None, [], []
        self._judge, self._tally = Judge(self.limits), Tally()
        self._log: MetricsLog | None = None
        self._lock: RunLock | None = None
        self._monitor: Monitor | None = None
        self._since = self._begun = time.monotonic()
        if self.run_dir is not None and writes:
            self._open(Path(self.run_dir), dict(facts or {}), resumed)
        if self.run_dir is not None and self.monitor is not None:
            self._monitor = Monitor(model, self.optimizers[0], schedule=self.monitor, sink=self._write_all)
            self._closers.insert(0, self._monitor.close)
        self._closers += [o.register_step_pre_hook(self._before_step).remove for o in self.optimizers]
        # one for all optimizers: these run after an optimizer's own, and after the monitor's, which was there before
        self._closers.append(register_optimizer_step_post_hook(self._after_any_step).remove)
        self.begin_step()

    def _open(self, folder: Path, facts: dict[str, Any], resumed: bool) -> None:
        metrics = folder / METRICS
        if not resumed and not self.overwrite and metrics.exists() and metrics.stat().st_size:
            raise CheckpointError(
                f"{folder} has the records of a run; give a new folder, resume from a checkpoint, or overwrite=True"
            )
        self._lock = _locked(folder)
        (folder / RESULT).unlink(missing_ok=True)  # the run goes on
        recipe = self._sessions[0].recipe if self._sessions else None
        self._formats, self._seed = recipe_facts(recipe), self._sessions[0].seed if self._sessions else 0
        self._facts = {
            "name": folder.name,
            "seed": self._seed,
            "max_steps": self.max_steps,
            "formats": None if recipe is None else recipe.text,
            "optimizer": {
                "name": type(self.optimizers[0]).__name__,
                "lr": float(self.optimizers[0].param_groups[0]["lr"]),
            },
            "verdict": self.limits.model_dump(),
            **facts,
        }
        write_config(folder, yaml.safe_dump(_as_text(self._facts), sort_keys=False))
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))  # type: ignore[union-attr]
        threads = torch.get_num_threads()
        write_environment(folder, {**circumstances(device, threads), "format": self._formats, "data_fingerprint": ""})
        if not resumed:
            cut_back(metrics, -1)
        self._log = MetricsLog(metrics)
        self._closers.append(self._log.close)

    def finish(self, *, completed: bool | None = None) -> ExperimentResult | None:
        """The loop is over: hand over what is held back, write result.json, let go of model and optimizers.

        completed: whether the loop came to its end; None: whether `max_steps` were taken. A run that did not is
        "interrupted", and may be resumed.
        """
        if self.model is None:
            return None
        self.flush(every=True)
        if self._monitor is not None:
            self._monitor.flush()
        result = None if self._log is None else self._result(completed)
        if result is not None:
            self._log.sync()  # type: ignore[union-attr]
            self._release()
            write_result(result.run_dir, result.as_dict())
        self._release()
        if self._lock is not None:
            self._lock.release()
        self.model = None
        return result

    def _release(self) -> None:
        while self._closers:
            self._closers.pop(0)()

    def _result(self, completed: bool | None) -> ExperimentResult:
        tally, folder = self._tally, Path(self.run_dir)  # type: ignore[arg-type]
        completed = completed if completed is not None else self.max_steps is None or self.step >= self.max_steps
        ended = completed or (tally.verdict is not None and self.limits.stop)
        if completed and not tally.verdict:
            self._judge.conclude(self.step)
        return ExperimentResult(
            name=str(self._facts["name"]),
            run_id=folder.name,
            seed=self._seed,
            format=self._formats["name"],
            storage=self._formats["storage"],
            rounding=self._formats["rounding"],
            **tally.result(ended),
            remarks=self._judge.remarks,
            steps=self.step,
            max_steps=self.max_steps or self.step,
            config_hash="",
            data_fingerprint="",
            numerics_version=NUMERICS_VERSION,
            details={"skipped_steps": tally.skipped_steps, "resumed_after": tally.resumed_after},
            run_dir=folder,
        )

    # -- a step -----------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Before the first forward of a step."""
        self._begun, self._micro, self._norm, self._stepped = time.monotonic(), _Micro(), None, []
        if self._monitor is not None:
            self._monitor.begin_step(self.step + 1)

    def next_micro_batch(self) -> None:
        """Between the backward of one micro-batch and the forward of the next of the same step."""
        self._micro.batch += 1
        for session in self._sessions:
            session.set_clock(session.step, self._micro.batch)

    def see_loss(self, loss: Tensor | float, *, summed: bool = False, tokens: int = 0) -> None:
        """The loss of a micro-batch: the step's is their mean or, where they are parts of one, their sum."""
        found = torch.as_tensor(loss).detach().double()
        self._micro.loss = found if self._micro.loss is None else self._micro.loss + found
        self._micro.share = 1.0 if summed else self._micro.share + 1.0
        self._micro.tokens += tokens

    @torch.no_grad()
    def see_gradients(self) -> None:
        """Take the norm of the gradients as they are now."""
        if self.run_dir is None:
            return
        grads = [
            p.grad for o in self.optimizers for group in o.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._norm is None and closure_of(args, kwargs) is None:
            self.see_gradients()

    def _after_any_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(optimizer is one for one in self.optimizers):
            self._after_step(optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        self._stepped.append(optimizer)
        if self._norm is None:  # a closure made them: those of its last evaluation
            self.see_gradients()

    def end_step(self) -> bool:
        """After the optimizers' steps, or in their place where the loop skipped them; whether the loop should end."""
        self.step += 1
        if not self._stepped:  # the clock stays, and the count of uses starts anew, as it does in a resumed run
            for session in self._sessions:
                session.set_clock(session.step, 0)
        if self.run_dir is None:
            self.begin_step()
            return False
        overflow = None if self._monitor is None else self._monitor.overflow_rate()
        if self._monitor is not None:
            self._monitor.end_step()
        micro, now = self._micro, time.monotonic()
        loss = None if micro.loss is None else micro.loss / micro.share
        norm = torch.zeros(()) if self._norm is None else self._norm.detach()
        ran = {id(optimizer) for optimizer in self._stepped}  # the others' counts are those of an earlier step
        handles = [h for o, h in zip(self.optimizers, self._handles, strict=False) if id(o) in ran]
        counts = [h.counts.sum(0)[:3] for h in handles if h.counts is not None]
        moved = torch.stack(counts).sum(0).double() if counts else torch.zeros(3, dtype=torch.float64)
        numbers = torch.cat([norm.double().reshape(1).to(moved.device), moved])
        lr = float(self.optimizers[0].param_groups[0]["lr"])
        spent, elapsed = now - self._begun, now - self._since
        self._waiting.append(_Step(self.step, lr, bool(ran), spent, micro.tokens, elapsed, loss, numbers, overflow))
        if len(self._waiting) >= FLUSH_EVERY or self.step == self.max_steps:
            self.flush()
        self.begin_step()
        return self.collapsed

    def report_loss(self, loss: float) -> None:
        """The framework's own mean loss since it last said one, for steps whose loss was not seen."""
        for step in self._waiting:
            if step.loss is None:
                step.loss = torch.tensor(float(loss), dtype=torch.float64)

    def see_evaluation(self, loss: float) -> None:
        """A validation loss after the steps taken so far, in nats."""
        if self.run_dir is None:
            return
        self.flush()
        self._judge.see_evaluation(self.step, loss)
        self._tally.add_evaluation(loss)
        self._write_all([Evaluation(self.step, loss).row()])

    # -- records ----------------------------------------------------------------------------------------------------------

    def flush(self, *, every: bool = False) -> None:
        """Record and judge the steps whose numbers are still on the device; `every`: also those without a loss."""
        while self._waiting and (every or self._waiting[0].loss is not None):
            self._take(self._waiting.pop(0))

    def _take(self, step: _Step) -> None:
        loss = math.nan if step.loss is None else float(step.loss)
        norm, attempted, flips, stalled = step.numbers.tolist()
        elements = self._grid_elements()
        finite = math.isfinite(norm) and (math.isfinite(loss) or step.loss is None)
        facts = StepFacts(
            step.step,
            loss,
            finite,
            norm,
            stalled / attempted if attempted else None,
            step.step <= self.warmup_steps,
            flips / elements if elements and attempted else None,
        )
        verdict = None if self._tally.verdict is not None else self._judge.see(facts)
        record = StepRecord(
            step.step,
            loss,
            step.lr,
            norm,
            finite,
            facts.stall_rate,
            facts.flip_rate,
            None if step.overflow is None else float(step.overflow),
            [] if finite or step.stepped else [{"event": "skip_nonfinite"}],
            verdict,
        )
        self._tally.add_step(record, step.tokens, step.seconds, facts.warmup)
        self._tally.elapsed_s = step.elapsed_s
        self._write_all([record.row(step.tokens / max(step.seconds, 1e-9), step.elapsed_s), *record.event_rows()])
        if verdict is not None:
            self._report(verdict.as_dict())

    def _grid_elements(self) -> int:
        return sum(
            stats.elements for h in self._handles if h.counts is not None for stats in h.last_step_stats().values()
        )

    def _report(self, verdict: dict[str, Any]) -> None:
        LOG.warning("collapse: %s (step %d): %s", verdict["kind"], verdict["detected_step"], verdict["reason"])
        self.collapsed = self.limits.stop
        if self._log is None:
            return
        from altgrad.monitor.failure_report import write_failure_report

        self._write_all([event_row(verdict["detected_step"], "verdict", {"verdict": verdict})])
        if self._monitor is not None:
            self._monitor.flush()
        page = write_failure_report(
            run_dir=Path(self.run_dir),  # type: ignore[arg-type]
            checkpoint_dir=Path(self.run_dir),  # type: ignore[arg-type]
            result=self._result(False).as_dict() | {"verdict": verdict},
            config=self._facts,
            command=None,
            last_good=None,
            collapsed=None,
        )
        LOG.warning("the failure report is %s", page)

    def _write_all(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records if self._log is not None else ():
            self._log.write(dict(record))  # type: ignore[union-attr]

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a checkpoint must keep beside parameters and optimizers, as plain values. Call it between steps."""
        if self.model is None:
            return {}
        state: dict[str, Any] = {"step": self.step}
        if self._sessions:
            state["quantization"] = quant_state(self.model)
        if self.run_dir is not None:
            self.flush()
            if self._monitor is not None:
                self._monitor.flush()
                state["monitor"] = self._monitor.state()
            state |= {"judge": self._judge.state_dict(), "tally": self._tally.state_dict()}
        if self._log is not None:
            self._log.sync()
            state["metrics"] = list(self._log.mark)
        return plain(state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`'s result; the parameters were loaded before.

        Raises:
            RecipeError: it is the state of a model that was quantized otherwise.
            CheckpointError: it is no state of a recorder.
        """
        try:
            self._load_state(tensors(dict(state)))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, AltGradError):
                raise
            raise CheckpointError(
                f"the checkpoint's state of AltGrad is damaged ({type(error).__name__}: {error}); resume from another one"
            ) from None

    def _load_state(self, state: dict[str, Any]) -> None:
        load_quantization(self.model, state)  # type: ignore[arg-type]
        self.step = int(state.get("step", 0))
        if self.run_dir is None or "tally" not in state:
            return
        self._judge.load_state_dict(state["judge"])
        self._tally = Tally(**state["tally"])
        self._tally.resumed_after.append(self.step)
        self._since = time.monotonic() - self._tally.elapsed_s
        if self._monitor is not None and "monitor" in state:
            self._monitor.load_state(state["monitor"])
        if self._log is not None:
            self._closers.remove(self._log.close)
            self._log.close()
            mark = Mark(*state["metrics"]) if "metrics" in state else None
            damage = cut_back(self._log.path, self.step, mark)
            if damage:
                LOG.warning("%s", damage.said())
            self._log = MetricsLog(self._log.path)
            self._closers.append(self._log.close)
        self.begin_step()


_OPEN: dict[Path, RunLock] = {}
"""Folders that trainings of this process write to. One that broke off without an end is followed by the next."""


def _locked(folder: Path) -> RunLock:
    """The lock of a run's folder, which is made if missing.

    Raises:
        RunBusyError: another process writes there.
    """
    place = folder.resolve()
    if (left := _OPEN.pop(place, None)) is not None:
        left.release()
    _OPEN[place] = RunLock.acquire(folder, "give another run_dir")
    return _OPEN[place]


def load_quantization(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put the quantization of a `RecordedRun.state` on a model; one without says so and changes nothing."""
    if "quantization" in state:
        load_quant_state(model, tensors(state["quantization"]))
    elif any(map(is_quantized, model.modules())):
        LOG.warning("the checkpoint has no state of the quantization: clock and scale histories start anew")


def _as_text(node: Any) -> Any:
    """Plain data; what a framework says of itself in other types becomes text."""
    if isinstance(node, Mapping):
        return {str(key): _as_text(value) for key, value in node.items()}
    if isinstance(node, list | tuple | set):
        return [_as_text(value) for value in node]
    return node if node is None or type(node) in (bool, int, float, str) else str(node)


def tokens_in(*inputs: Any) -> int:
    """Tokens of a batch: the elements of its first tensor of integers, else the length of its first tensor."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    integers = next((leaf for leaf in leaves if not leaf.is_floating_point()), None)
    return integers.numel() if integers is not None else len(leaves[0]) if leaves else 0
