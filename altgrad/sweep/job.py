"""One run of a sweep as a value that can be sent anywhere, and what is known of it from its folder alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from altgrad.records.documents import CRASHES, read_json
from altgrad.records.metrics_log import METRICS, last_step
from altgrad.records.run import finished_result
from altgrad.records.schema import as_number

CONFIG, LOG, TIMES = "sweep.yaml", "log.txt", "sweep.json"  # what a sweep adds to a run's own files


class State(str, Enum):
    """What a run folder says about its run."""

    DONE = "done"
    MISSING = "missing"
    PARTIAL = "partial"
    """Begun, then interrupted or killed; it goes on from its last checkpoint."""
    FAILED = "failed"
    """It crashed more often than it is retried; another sweep tries it again."""
    BUSY = "busy"
    """Another process is working in it."""


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        name: the run folder's name.
        runs_dir: folder that holds the run folders.
        config: the whole config, as YAML.
        max_steps: planned steps.
        threads: CPU threads that it may use.
        gpus: devices that it needs.
        command: program and arguments that make the run, "{config}" standing for the config's file; empty for
            `altgrad run`.
        environment: variables on top of the process's own.
        directory: working directory, where it exists; paths of corpora may be relative to it.
    """

    name: str
    runs_dir: str
    config: str
    max_steps: int
    threads: int = 1
    gpus: int = 0
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name

    def arguments(self, config: Path) -> list[str]:
        """The program and its arguments, for a config written to `config`."""
        command = self.command or (sys.executable, "-m", "altgrad", "run", "{config}")
        return [part.replace("{config}", str(config)) for part in command]

    def variables(self) -> dict[str, str]:
        """The process's environment: its share of the threads, and this job's own variables."""
        share = str(self.threads)
        budget = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), share)
        return {**os.environ, **budget, **self.environment}


@dataclass(frozen=True)
class Outcome:
    """How a job ended: "done" (with its result), "failed" (with the last crash), "stopped", or "busy"."""

    status: str
    seconds: float = 0.0
    result: Mapping[str, Any] | None = None
    crash: Mapping[str, Any] | None = None
    crashes: int = 0
    by_another: bool = False
    """The run was already finished when the job got its folder."""


@dataclass(frozen=True)
class Position:
    """How far a run is, from the end of its metrics: step, loss and speed of the last whole step record."""

    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    elapsed_s: float | None = None


def state_of(folder: Path, busy: bool = False) -> State:
    """The state of the run in `folder`; `busy` says that its lock is held."""
    if finished_result(folder):
        return State.DONE
    if busy:
        return State.BUSY
    if read_json(folder / CRASHES).content.get("state") == "failed":
        return State.FAILED
    return State.PARTIAL if (folder / METRICS).is_file() else State.MISSING


def position(folder: Path) -> Position:
    """Where the run is now, from the end of its metrics; step 0 before its first record."""
    record = last_step(folder / METRICS)
    if record is None:
        return Position()
    facts = (as_number(record.get(name)) for name in ("loss", "tokens_per_s", "elapsed_s"))
    return Position(record["step"], *facts)
