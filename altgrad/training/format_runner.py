"""Run one experiment in its run folder: start, resume, checkpoint, evaluate, stop, conclude.

A finished run is not repeated: its result is returned. A run that was interrupted or killed continues from its newest
sound checkpoint, and its losses are bit-identical to those of a run that was left alone.
"""

from __future__ import annotations

import shlex
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from altgrad.errors import CheckpointError, ReportError
from altgrad.loop.states import tensors_of, to_device
from altgrad.optim import state_bytes
from altgrad.quantization import NUMERICS_VERSION
from altgrad.records.documents import (
    ENVIRONMENT,
    RESULT,
    load_result,
    read_json,
    write_config,
    write_environment,
    write_result,
)
from altgrad.records.files import new_folder, read_file, remove_leftovers
from altgrad.records.lock import RunLock
from altgrad.records.machine import threads_in
from altgrad.records.metrics_log import METRICS, Mark, MetricsLog, cut_back, until
from altgrad.records.run import Run, read_run
from altgrad.records.schema import Evaluation, ExperimentResult, StepRecord, event_row
from altgrad.records.tally import Tally
from altgrad.records.verify import broken_checkpoint
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.formats import format_facts
from altgrad.training.config.loading import dump_config, load_config
from altgrad.training.data import Corpus
from altgrad.training.run.checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    load_newest,
    lock_directory,
    prune,
    save_checkpoint,
)
from altgrad.training.run.folder import RunPlan, environment, plan_run
from altgrad.training.run.stop import StopRequest
from altgrad.training.run.trackers import Trackers, make_trackers
from altgrad.training.step.distributed import Ranks
from altgrad.training.step.formats_of_run import all_finite
from altgrad.training.step.stepping import usable_device
from altgrad.training.trainer import LossFunction, Trainer, next_token_loss

TRAINED = "_altgrad_run"
"""Attribute of a model that a run was given to train: that run's id."""
REPORTED = ("freeze", "no_learning", "far_above")
"""Remarks that get a failure report although the run completed."""


class RunListener:
    """What a run tells while it goes on; every method may be left as it is."""

    def said(self, line: str) -> None:
        """Something that a person should know."""

    def started(self, plan: RunPlan, step: int) -> None:
        """The run begins or continues after `step` steps."""

    def stepped(self, record: StepRecord, tokens_per_s: float) -> None:
        """A step was taken."""

    def evaluated(self, step: int, val_loss: float) -> None:
        """The validation loss was measured."""

    def ended(self, result: ExperimentResult) -> None:
        """The run stopped, for whatever reason."""


class FormatExperimentRunner:
    """One experiment on disk.

    Args:
        config: the experiment, or what `load_config` takes: a mapping, a YAML file, a shipped config's name.
        model: any module to train in place of the config's GPT; its initial weights become part of the run's identity.
        data_dir: a corpus or path in place of `config.data`.
        device: in place of `config.device`.
        listener: is told what happens.
        loss: the loss of (model, x, y).
        command: the shell command that repeats this run, for its failure report.
        twin: run folder of the same run in FP32, finished or not: what this run loses is judged against it.
    """

    def __init__(
        self,
        config: ExperimentConfig | Mapping[str, Any] | str | Path,
        model: nn.Module | None = None,
        data_dir: Corpus | str | Path | None = None,
        device: str | None = None,
        *,
        listener: RunListener | None = None,
        loss: LossFunction = next_token_loss,
        command: str | None = None,
        twin: Path | None = None,
    ) -> None:
        loaded = config if isinstance(config, ExperimentConfig) else load_config(config)
        self.config = loaded.model_copy(update={"device": device}) if device else loaded
        if (before := getattr(model, TRAINED, None)) is not None:
            warnings.warn(
                f"this {type(model).__name__} was trained by the run {before}: the new run starts from its weights, and is not "
                "paired with runs from fresh ones; make a model for each run",
                stacklevel=2,
            )
        self.model, self.loss, self.command, self.twin = model, loss, command, twin
        self.from_config = model is None and data_dir is None and loss is next_token_loss
        self.ranks = Ranks.from_environment(self.config)
        self.listener = (listener if self.ranks.is_main else None) or RunListener()
        self.plan = plan_run(self.config, data_dir, model)
        self.trainer: Trainer | None = None
        self.stop = StopRequest()

    @property
    def run_dir(self) -> Path:
        return self.plan.path

    def run(self) -> ExperimentResult:
        """Bring the run to its end (or to an interruption) and return its result.

        Raises:
            RunBusyError: another process works on this run.
            CheckpointError: there are checkpoints, and all are damaged.
        """
        main = self.ranks.is_main
        finished = self.ranks.broadcast(self._finished_before() if main else None)
        if finished is not None and finished.finished:
            return finished
        device = usable_device(self.ranks.device(self.config.device))
        threads_before = torch.get_num_threads()
        with RunLock.acquire(self.run_dir) if main else nullcontext(), self.stop:
            try:
                torch.set_num_threads(self.ranks.broadcast(self._open_folder(device) if main else None))
                result = self._train()
            finally:
                torch.set_num_threads(threads_before)
        self.ranks.barrier()
        self.listener.ended(result)
        return result

    def _finished_before(self) -> ExperimentResult | None:
        """The result in the folder; a damaged one counts as none, and is made again from the checkpoints."""
        try:
            found = load_result(self.run_dir)
        except ReportError as error:
            self.listener.said(f"{error.args[0].partition('; ')[0]}; it is made again")
            return None
        if found is not None and found.finished and (damage := Run(self.run_dir).damage()):
            self.listener.said(
                f"{self.plan.run_id}: {damage.said()}; delete its {RESULT} and repeat the command to make what can be made again"
            )
        return found

    def _open_folder(self, device: torch.device) -> int:
        """Write what identifies the run, once; the thread count to use."""
        remove_leftovers(self.run_dir)
        (self.run_dir / RESULT).unlink(missing_ok=True)  # a run that goes on has no result yet
        record = read_json(self.run_dir / ENVIRONMENT)
        begun, wanted = record.content, self.config.threads
        threads = threads_in(begun)
        if threads is not None:
            now = environment(self.plan, device, 0)
            for name in ("device", "torch", "numba", "altgrad"):
                if begun.get(name) != now[name]:
                    self.listener.said(
                        f"this run began with {name} {begun.get(name)} and goes on with {now[name]}: "
                        "its losses may differ in the last bits from those of an unbroken run"
                    )
            if wanted not in (None, threads):
                self.listener.said(f"this run began with {threads} CPU threads and keeps them (threads={wanted} asked)")
            return threads
        if begun or record.problem:
            self.listener.said(
                f"{record.problem or f'{ENVIRONMENT} is incomplete'}; it is made again with the versions and threads of now"
            )
        threads = wanted or torch.get_num_threads()
        write_config(self.run_dir, dump_config(self.config))
        write_environment(self.run_dir, {**environment(self.plan, device, threads), **self.ranks.facts()})
        return threads

    def _train(self) -> ExperimentResult:
        trainer = self.trainer = Trainer(self.config, self.model, self.plan.corpus, self.config.device, loss=self.loss)
        if self.model is not None:
            object.__setattr__(self.model, TRAINED, self.plan.run_id)
        twin = read_run(self.twin).metrics().validation if self.twin is not None else None
        trainer.judge.twin = None if twin is None else dict(zip(twin.steps.tolist(), twin.values.tolist(), strict=True))
        wanted = self.plan.wanted_checkpoint_dir  # claimed only now: a config that cannot be trained claims nothing
        directory, said, lock = None, None, None
        if self.ranks.is_main:
            directory, said, lock = lock_directory(wanted, self.plan.hash, self.run_dir)
        directory, said = self.ranks.broadcast((directory, said) if self.ranks.is_main else None)
        with lock or nullcontext():
            return self._train_in(directory, said)

    def _train_in(self, directory: Path, said: str | None) -> ExperimentResult:
        trainer = self.trainer
        assert trainer is not None
        if said:
            self.listener.said(said)
        if self.config.enable_emergency_shift and not trainer.interventions.can_shift:
            self.listener.said(
                f"enable_emergency_shift: {trainer.formats.label} has no fallback, so this run cannot shift; "
                "shift.chain can name one"
            )
        self.directory, self.tally = directory, Tally()
        resumed = self._resume()
        self.metrics, self.trackers = _NoLog(), Trackers()
        if self.ranks.is_main:
            self.trackers = make_trackers(self.config, self.run_dir, self.plan.run_id, self.listener.said)
            self.metrics = MetricsLog(self.run_dir / METRICS, self.trackers.log)
        self._stopping = self.ranks.any(bool(self.stop))
        trainer.measuring.sink = self._log_all
        self._since = time.monotonic() - self.tally.elapsed_s
        try:
            self.listener.started(self.plan, trainer.step)
            if not resumed:
                self._evaluate()
                self._checkpoint()
            while not self._over():
                self._step()
            trainer.measuring.close()
            self.metrics.sync()
        finally:
            self.metrics.close()
        return self._conclude()

    def _resume(self) -> bool:
        """Go back to the newest sound checkpoint (or, to make damaged records again, to one before), and the metrics with it."""
        assert self.trainer is not None
        found = load_newest(self.directory)
        for line in found.damaged if found else ():
            self.listener.said(line)
        if found:
            wanted = self.ranks.broadcast(self._with_sound_records(found) if self.ranks.is_main else None)
            found = found if wanted == found.path else load_checkpoint(wanted)
            self.trainer.restore(to_device(found.state["trainer"], self.trainer.device))
            self.trainer.measuring.load_state(found.state.get("monitor", {}))
            self.tally = Tally(**found.state["tally"])
            self.tally.resumed_after.append(found.step)
            self.listener.said(f"continuing {self.plan.run_id} after step {found.step}")
        if self.ranks.is_main:
            damage = cut_back(self.run_dir / METRICS, found.step if found else -1, _mark(found))
            if damage:
                self.listener.said(f"{damage.said()}; no checkpoint is old enough to make them again")
        return found is not None

    def _with_sound_records(self, newest: Checkpoint) -> Path:
        """The newest checkpoint until which the metrics are as they were written; the newest of all where none is."""
        path = self.run_dir / METRICS
        data = read_file(path) if path.exists() else b""
        mark = _mark(newest)
        if mark is None or until(data, mark) is not None:
            return newest.path
        for older in checkpoints(self.directory):
            with suppress(CheckpointError):
                candidate = load_checkpoint(older)
                mark = _mark(candidate)
                if candidate.step < newest.step and mark is not None and until(data, mark) is not None:
                    self.listener.said(
                        f"{METRICS} was damaged before step {newest.step}; the steps after {candidate.step} are taken "
                        "again, which makes the same records"
                    )
                    return older
        return newest.path

    def _over(self) -> bool:
        assert self.trainer is not None
        collapsed = self.tally.verdict is not None and self.config.verdict.stop
        return collapsed or self.trainer.step >= self.config.max_steps or self._stopping

    def _step(self) -> None:
        trainer, config = self.trainer, self.config
        assert trainer is not None
        begun = time.monotonic()
        x, y = trainer.batch(trainer.step + 1)
        record = trainer.train_step(x, y)
        seconds = time.monotonic() - begun
        had_verdict = self.tally.verdict is not None
        self.tally.add_step(record, x.numel(), seconds, record.step <= config.optimizer.warmup_steps)
        self.tally.elapsed_s = time.monotonic() - self._since
        tokens_per_s = x.numel() / seconds
        self._log_step(record, tokens_per_s, new_verdict=self.tally.verdict is not None and not had_verdict)
        self.listener.stepped(record, tokens_per_s)
        self._stopping = self.ranks.any(bool(self.stop))
        last = trainer.step == config.max_steps or (record.verdict is not None and config.verdict.stop)
        if last or trainer.step % config.evaluation.interval == 0:
            self._evaluate()
        planned = last or trainer.step % config.checkpoint_interval == 0
        if planned or self._stopping:
            self._checkpoint(planned=planned)

    def _log_all(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self.metrics.write(record)

    def _log_step(self, record: StepRecord, tokens_per_s: float, *, new_verdict: bool) -> None:
        self._log_all([record.row(tokens_per_s, self.tally.elapsed_s), *record.event_rows()])
        if new_verdict:
            self.metrics.write(event_row(record.step, "verdict", {"verdict": self.tally.verdict}))

    def _evaluate(self) -> None:
        assert self.trainer is not None
        loss = self.trainer.evaluate()
        self.trainer.judge.see_evaluation(self.trainer.step, loss)
        self.tally.add_evaluation(loss)
        self.metrics.write(Evaluation(self.trainer.step, loss).row())
        self.listener.evaluated(self.trainer.step, loss)

    def _checkpoint(self, *, planned: bool = True) -> None:
        """Save everything. What the monitor holds back is handed over first, or, where an unbroken run would have no
        checkpoint, saved with it: the records must come in the same order whether the run is broken or not."""
        assert self.trainer is not None
        self.tally.elapsed_s = time.monotonic() - self._since
        if planned:
            self.trainer.measuring.flush()
        self.metrics.sync()
        state = self._state()  # on every rank: spread tensors are gathered
        if not self.ranks.is_main:
            return
        save_checkpoint(self.directory, self.trainer.step, state)
        limits, since = self.config.verdict, self.trainer.judge.stalled_since
        stalling = 0 if since is None else self.trainer.step - since + 1  # a freeze begins with its stall
        reach = max(limits.divergence_window, limits.freeze_window, stalling)
        prune(self.directory, self.config.keep_checkpoints, reach=reach)

    def _state(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {
            "trainer": self.trainer.capture(),
            "tally": self.tally.state_dict(),
            "monitor": self.trainer.measuring.state(),
            "metrics": list(self.metrics.mark),
        }

    def _conclude(self) -> ExperimentResult:
        assert self.trainer is not None
        config, tally, steps = self.config, self.tally, self.trainer.step
        said = format_facts(config)
        interrupted = steps < config.max_steps and not (tally.verdict and config.verdict.stop)
        if not interrupted and not tally.verdict:
            self.trainer.judge.conclude(steps)
        remarks = self.trainer.judge.remarks
        details: dict[str, Any] = {
            **({"resumed_after": tally.resumed_after} if tally.resumed_after else {}),
            "skipped_steps": tally.skipped_steps,
            "optimizer_state_bytes": state_bytes(self.trainer.optimizer),
            "checkpoint_dir": str(self.directory),
        }
        result = ExperimentResult(
            name=config.name,
            run_id=self.plan.run_id,
            seed=config.seed,
            format=said["format"],
            storage=said["storage"],
            rounding=said["rounding"],
            **tally.result(not interrupted),
            remarks=remarks,
            steps=steps,
            max_steps=config.max_steps,
            config_hash=self.plan.hash,
            data_fingerprint=self.plan.corpus.fingerprint,
            numerics_version=NUMERICS_VERSION,
            details=details,
            run_dir=self.run_dir,
        )
        if self.stop.signal is not None:
            details["signal"] = self.stop.signal
        failed = tally.verdict or next((r for r in remarks if r["kind"] in REPORTED and not interrupted), None)
        state = self._state() if failed is not None and not interrupted else None
        if not self.ranks.is_main:
            return result
        if state is not None and failed is not None:
            details["failure_report"] = str(self._report_failure(result, state, failed))
        write_result(self.run_dir, result.as_dict())  # last: its presence says that all else is there
        self.trackers.finish(result.as_dict())
        return result

    def _report_failure(self, result: ExperimentResult, state: dict[str, Any], verdict: dict[str, Any]) -> Path:
        """Keep the last good state and the collapsed (or last) one, and write the report on both."""
        from altgrad.monitor.failure_report import write_failure_report
        from altgrad.training.step.measuring import diagnose_collapse

        assert self.trainer is not None
        label = "collapsed" if result.status == "collapsed" else "ended"
        collapsed = save_checkpoint(self.directory, self.trainer.step, state, label=label)
        good = last_good_checkpoint(self.directory, verdict["onset_step"])
        if good is not None:
            kept = good.with_name(good.name.replace("step-", "last-good-"))
            if broken_checkpoint(kept):  # missing, or from a run that was killed while it was copied
                with new_folder(kept) as copy:
                    shutil.copytree(good, copy, dirs_exist_ok=True)
            good = kept
        return write_failure_report(
            run_dir=self.run_dir,
            checkpoint_dir=self.directory,
            result=result.as_dict() | {"verdict": verdict},
            config=self.config.model_dump(mode="json"),
            command=self._repeating_command(),
            last_good=good,
            collapsed=collapsed,
            records=diagnose_collapse(self.trainer),
        )

    def _repeating_command(self) -> str | None:
        """What repeats the run in a folder of its own; None where the config alone does not make it."""
        if not self.from_config:
            return None
        command = self.command or shlex.join(["altgrad", "run", str(self.run_dir / "config.yaml")])
        again = shlex.quote(str(Path(self.config.runs_dir) / "again"))
        return f"{command} runs_dir={again}" + (" checkpoint_dir=null" if self.config.checkpoint_dir else "")


def _mark(checkpoint: Checkpoint | None) -> Mark | None:
    """How far the metrics were at a checkpoint; None for those of before this was noted."""
    return Mark(*checkpoint.state["metrics"]) if checkpoint is not None and "metrics" in checkpoint.state else None


class _NoLog:
    """In place of the metrics on ranks that write no files."""

    mark = Mark(0, 0)

    def write(self, record: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def last_good_checkpoint(directory: Path, onset_step: int) -> Path | None:
    """The newest sound checkpoint from before `onset_step` whose weights are all finite."""
    for path in checkpoints(directory):
        if int(path.name[5:]) >= onset_step:
            continue
        try:
            state = load_checkpoint(path).state
        except CheckpointError:
            continue
        if all_finite(list(tensors_of(state["trainer"]["model"]))):
            return path
    return None


def run_format_experiment(
    config: ExperimentConfig | str | Path | dict[str, Any],
    device: str | None = None,
    *,
    overrides: Sequence[str] = (),
    model: nn.Module | None = None,
    data_dir: Corpus | str | Path | None = None,
    listener: RunListener | None = None,
) -> ExperimentResult:
    """Run (or resume, or look up) the experiment of a config file, mapping or `ExperimentConfig`.

    >>> run_format_experiment("experiments/configs/e3m4_uniform.yaml", "cpu")  # doctest: +SKIP
    """
    loaded = load_config(config, overrides)
    return FormatExperimentRunner(loaded, model, data_dir, device, listener=listener).run()
