"""Forks side by side: in processes of this machine, or wherever an executor runs them, each from a state on disk.

A worker rebuilds the run from its folder once, shows that it repeats the run's bits, and then answers questions. The
answers come back one by one, so that the log of an interrupted autopsy holds every fork that ended.
"""

from __future__ import annotations

import multiprocessing
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from altgrad.autopsy.folder import rebuild
from altgrad.autopsy.fork import LOW, Fork, Outcome, Stop
from altgrad.autopsy.loop import TrainerLoop
from altgrad.autopsy.oracle import LoopOracle, cells_of, first_other, run_fork
from altgrad.errors import ConfigError
from altgrad.training.run.checkpoint import load_checkpoint, save_checkpoint

STATES = "states"
"""Folder below the autopsy's, with the states that workers start from; gone when the autopsy ends."""


class Executor(Protocol):
    """What `concurrent.futures` calls one, as far as it is needed here."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future: ...


@dataclass(frozen=True)
class Question:
    """A fork, and where a worker finds what it needs: the run's folder, the state, the seed of the draws."""

    run_dir: str
    state: str
    fork: Fork
    stop: Stop | None
    seed: int
    recorded: tuple[float, ...]


_OPENED: dict[str, Any] = {}
"""The one run that this process has rebuilt, by its folder."""


def answer(question: Question) -> Outcome:
    """Run a fork in this process.

    Raises:
        ConfigError: the run cannot be rebuilt here, or does not have its bits here.
    """
    loop = _opened(question.run_dir)
    state = load_checkpoint(Path(question.state)).state
    if question.recorded and "certified" not in _OPENED:
        _certify(loop, state, question.recorded)
    return run_fork(loop, _OPENED["specs"], state, question.fork, question.seed, question.stop)


def _opened(run_dir: str) -> Any:
    if _OPENED.get("run_dir") != run_dir:
        loop = TrainerLoop(rebuild(Path(run_dir))[0])
        _OPENED.clear()
        _OPENED.update(run_dir=run_dir, loop=loop, specs=cells_of(loop))
    return _OPENED["loop"]


def _certify(loop: Any, state: dict[str, Any], recorded: Sequence[float]) -> None:
    """Take the run's own steps from a state of it: they must be the recorded ones to the bit."""
    with loop.aside():
        loop.restore(state)
        own = [loop.advance() for _ in recorded]
    if (other := first_other(recorded, own)) is not None:
        raise ConfigError(
            f"this worker does not repeat the run: step {state['step'] + other + 1} has loss {own[other]!r}, recorded "
            f"{recorded[other]!r}; use workers with the same processor type and versions"
        )
    _OPENED["certified"] = True


class Workers:
    """A `LoopOracle` whose forks run in an executor; single forks run here.

    Args:
        oracle: of a run folder.
        run_dir: that folder, as workers find it.
        executor: where forks run; `jobs` of them at a time.
        scratch: folder that workers see, for the states.
    """

    def __init__(self, oracle: LoopOracle, run_dir: Path, executor: Executor, jobs: int, scratch: Path) -> None:
        self.oracle, self.executor, self.jobs = oracle, executor, jobs
        self.run_dir, self.states = run_dir.resolve(), scratch.resolve() / STATES
        self.cells, self.captures, self.history = oracle.cells, oracle.captures, oracle.history
        self.recorded, self.run = oracle.recorded, oracle.run

    def side_by_side(self, forks: Sequence[Fork], stop: Stop | None) -> Iterator[tuple[Fork, Outcome]]:
        """(fork, outcome) of each, as they end."""
        futures = {self.executor.submit(answer, self._question(fork, stop)): fork for fork in forks}
        try:
            for future in as_completed(futures):
                fork = futures[future]
                try:
                    yield fork, future.result()
                except BrokenExecutor as error:
                    warnings.warn(f"a worker died ({error}); its fork is run in this process", stacklevel=2)
                    yield fork, self.oracle.run(fork, stop)
        finally:
            for future in futures:
                future.cancel()

    def _question(self, fork: Fork, stop: Stop | None) -> Question:
        path = self.states / f"{fork.path}-{fork.start:08d}"
        if not path.exists():
            self.states.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self.states, fork.start, self.oracle.state(fork), label=fork.path)
        own = self.oracle.history(LOW)[fork.start : fork.start + 2] if fork.path == LOW else []
        return Question(str(self.run_dir), str(path), fork, stop, self.oracle.seed, tuple(own))

    def close(self) -> None:
        """Remove the states."""
        shutil.rmtree(self.states, ignore_errors=True)


@contextmanager
def processes(jobs: int) -> Iterator[Executor]:
    """An executor of `jobs` fresh processes on this machine; what waits is dropped at the end."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
