"""Mirrors of a run's metrics in W&B and TensorBoard, behind one small interface.

metrics.jsonl stays the source of truth: a tracker gets the same records, and one that fails (no network, no login, a
full disk, a package that is not installed) is announced once and left out from then on. It never fails the run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from altgrad.training.config.experiment import ExperimentConfig


class Tracker(Protocol):
    """Somewhere that a run's records go."""

    name: str

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record of metrics.jsonl."""
        ...

    def finish(self, result: Mapping[str, Any]) -> None:
        """Take the run's result and close."""
        ...


class TensorBoardTracker:
    """Scalars in the run folder's `tensorboard/`, for `tensorboard --logdir runs`."""

    name = "tensorboard"

    def __init__(self, config: ExperimentConfig, run_dir: Path, run_id: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, record: Mapping[str, Any]) -> None:
        """Numbers become scalars, events text."""
        step = record["step"]
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)
        if record.get("kind") == "event":
            self._writer.add_text("event", _as_text(record), step)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write what is held back."""
        self._writer.add_text("result", _as_text(result))
        self._writer.close()


class WandbTracker:
    """A W&B run; its mode is W&B's own setting (`WANDB_MODE=offline` keeps everything in the run folder)."""

    name = "wandb"

    def __init__(self, config: ExperimentConfig, run_dir: Path, run_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project="altgrad", name=run_id, id=run_id, resume="allow", dir=str(run_dir),
            config=config.model_dump(mode="json"),
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        """All records, with the training step as their axis."""
        values = scalars(record)
        if record.get("kind") == "event":
            values[f"event/{record.get('event')}"] = 1.0
        if values:
            self._run.log({**values, "step": record["step"]})

    def finish(self, result: Mapping[str, Any]) -> None:
        """Put the result into the run's summary; a run that did not complete is marked as failed."""
        for key, value in result.items():
            if isinstance(value, str | int | float):
                self._run.summary[key] = value
        self._run.finish(exit_code=0 if result.get("status") == "completed" else 1)


TRACKERS: dict[str, Callable[[ExperimentConfig, Path, str], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}
"""By their key in the config's `trackers` section; to add one, add a row here and a key there."""


class Trackers:
    """Several trackers that cannot hurt: an error of one ends that one, is announced, and is kept in `problems`."""

    def __init__(self, announce: Callable[[str], None] | None = None) -> None:
        self.problems: list[str] = []
        self._active: list[Tracker] = []
        self._announce = announce or (lambda text: print(f"altgrad: {text}", file=sys.stderr))

    def open(self, name: str, make: Callable[[], Tracker]) -> None:
        """Add the tracker that `make` opens."""
        tracker = self._guarded(name, make)
        if tracker is not None:
            self._active.append(tracker)

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand one record to every tracker that still works."""
        self._each(lambda tracker: tracker.log(record))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Hand over the result and close; calling it again does nothing."""
        self._each(lambda tracker: tracker.finish(result))
        self._active = []

    @property
    def names(self) -> Sequence[str]:
        """The trackers that work."""
        return [tracker.name for tracker in self._active]

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self._active):
            before = len(self.problems)
            self._guarded(tracker.name, lambda tracker=tracker: act(tracker))
            if len(self.problems) > before:
                self._active.remove(tracker)

    def _guarded(self, name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except ImportError:
            problem = f"the tracker {name} is not installed; pip install 'altgrad[{name}]'. The run goes on without it"
        except (Exception, SystemExit) as error:  # whatever a service's client raises must not end a run
            problem = f"the tracker {name} failed ({type(error).__name__}: {error}); the run goes on without it"
        self.problems.append(problem)
        self._announce(problem)
        return None


def make_trackers(
    config: ExperimentConfig, run_dir: str | Path, run_id: str, announce: Callable[[str], None] | None = None
) -> Trackers:
    """The trackers that `config.trackers` switches on; opening them never raises."""
    trackers = Trackers(announce)
    for name, make in TRACKERS.items():
        if getattr(config.trackers, name):
            trackers.open(name, lambda make=make: make(config, Path(run_dir), run_id))
    return trackers


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers by name, such as train/loss, eval/val_loss, monitor/blocks.0.mlp.up/weight/stall."""
    kind = record.get("kind")
    if kind == "monitor":
        place = "/".join(str(record[part]) for part in ("layer", "role") if record.get(part) is not None)
        prefix = f"monitor/{place}" if place else "monitor"
    elif kind in ("step", "eval"):
        prefix = "train" if kind == "step" else "eval"
    else:
        return {}
    numbers = {}
    for key, value in record.items():
        if key in ("kind", "step", "layer", "role") or isinstance(value, bool):
            continue
        if value in ("nan", "inf", "-inf"):
            value = float(value)
        if isinstance(value, int | float):
            numbers[f"{prefix}/{key}"] = float(value)
    return numbers


def _as_text(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())
