"""Forks side by side: in processes of this machine, or wherever an executor runs them, each from a state on disk.

A worker makes the loop once, shows that it repeats the run's bits, and then answers questions. The answers come back one by
one, so that the log of an interrupted autopsy holds every fork that ended.
"""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from altgrad.autopsy.folder import rebuild
from altgrad.autopsy.fork import TWIN, Fork, Outcome, Stop
from altgrad.autopsy.loop import RecipeLoop, RunLoop
from altgrad.autopsy.oracle import LoopOracle, cells_of, first_other, put_low, run_fork
from altgrad.errors import ConfigError, OptionError
from altgrad.records.machine import MOST_THREADS
from altgrad.training.run.checkpoint import load_checkpoint, save_checkpoint

STATES = "states"
"""Folder below the autopsy's, with the states that workers start from; gone when the autopsy ends."""


class Executor(Protocol):
    """What `concurrent.futures` calls one, as far as it is needed here."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future: ...


@dataclass(frozen=True)
class OfRun:
    """Makes the loop of a run folder."""

    run_dir: str

    def __call__(self) -> RecipeLoop:
        return RunLoop(rebuild(Path(self.run_dir))[0])


@dataclass(frozen=True)
class Built:
    """Makes a person's own loop by their function, under the number of threads that its bits need.

    Raises:
        OptionError: the function cannot be sent to another process.
    """

    build: Callable[[], RecipeLoop]
    threads: int

    def __post_init__(self) -> None:
        try:
            pickle.dumps(self.build)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise OptionError(
                f"build={self.build!r} cannot be sent to another process ({error}); define it at the top of a module"
            ) from None

    def __call__(self) -> RecipeLoop:
        torch.set_num_threads(self.threads)
        return self.build()


@dataclass(frozen=True)
class Question:
    """A fork, and what a worker needs to answer it: how to make the loop, where the state is, the seed of the draws."""

    make: Callable[[], RecipeLoop]
    state: str
    fork: Fork
    stop: Stop | None
    seed: int
    recorded: tuple[float, ...]


_MADE: dict[str, Any] = {}
"""The one loop that this process has made, by what made it."""


def answer(question: Question) -> Outcome:
    """Run a fork in this process.

    Raises:
        ConfigError: the run cannot be made here, or does not have its bits here.
    """
    loop = _made(question.make)
    state = load_checkpoint(Path(question.state)).state
    if question.recorded and "certified" not in _MADE:
        _certify(loop, state, question)
    return run_fork(loop, _MADE["specs"], state, question.fork, question.seed, question.stop)


def _made(make: Callable[[], RecipeLoop]) -> RecipeLoop:
    if _MADE.get("make") != make:
        loop = make()
        _MADE.clear()
        _MADE.update(make=make, loop=loop, specs=cells_of(loop))
    return _MADE["loop"]


def _certify(loop: RecipeLoop, state: dict[str, Any], question: Question) -> None:
    """Take a trajectory's own steps from a state of it: they must be the recorded ones to the bit."""
    with loop.aside():
        loop.restore(state)
        put_low(loop, {} if question.fork.path == TWIN else _MADE["specs"])
        own = [loop.advance() for _ in question.recorded]
    if (other := first_other(question.recorded, own)) is not None:
        raise ConfigError(
            f"this worker does not repeat the run: step {question.fork.start + other + 1} has loss {own[other]!r}, recorded "
            f"{question.recorded[other]!r}; use workers with the same processor type and versions, that build the same loop"
        )
    _MADE["certified"] = True


class Workers:
    """A `LoopOracle` whose forks run in an executor; single forks run here.

    Args:
        oracle: of the loop.
        make: makes the same loop in a worker.
        executor: where forks run; `jobs` of them at a time.
        scratch: folder that workers see, for the states; what a killed autopsy left there is removed.
    """

    def __init__(
        self, oracle: LoopOracle, make: Callable[[], RecipeLoop], executor: Executor, jobs: int, scratch: Path
    ) -> None:
        self.oracle, self.make, self.executor, self.jobs = oracle, make, executor, jobs
        self.states = scratch.resolve() / STATES
        self.cells, self.captures, self.history = oracle.cells, oracle.captures, oracle.history
        self.recorded, self.run, self.moved = oracle.recorded, oracle.run, oracle.moved
        self.close()

    def side_by_side(self, forks: Sequence[Fork], stop: Stop | None) -> Iterator[tuple[Fork, Outcome]]:
        """(fork, outcome) of each, as they end; here, where workers died."""
        futures = {self._submit(self._question(fork, stop)): fork for fork in forks}
        try:
            for future in as_completed(futures):
                fork = futures[future]
                try:
                    outcome = future.result()
                except BrokenExecutor as error:
                    warnings.warn(f"a worker died ({error}); its fork is run in this process", stacklevel=2)
                    outcome = self.oracle.run(fork, stop)
                yield fork, outcome
        finally:
            for future in futures:
                future.cancel()

    def _submit(self, question: Question) -> Future:
        try:
            return self.executor.submit(answer, question)
        except BrokenExecutor as error:  # as a pool of processes does from the first death on
            broken: Future = Future()
            broken.set_exception(error)
            return broken

    def _question(self, fork: Fork, stop: Stop | None) -> Question:
        path = self.states / f"{fork.path}-{fork.start:08d}"
        if not path.exists():
            self.states.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self.states, fork.start, self.oracle.state(fork), label=fork.path)
        own = self.oracle.history(fork.path)[fork.start : fork.start + 2]
        return Question(self.make, str(path), fork, stop, self.oracle.seed, tuple(own))

    def close(self) -> None:
        """Remove the states."""
        shutil.rmtree(self.states, ignore_errors=True)


def check_jobs(jobs: int) -> None:
    """Raises OptionError on fewer than 1 job, or more than any machine runs."""
    if not 1 <= jobs <= MOST_THREADS:
        raise OptionError(f"{jobs} forks at a time are none, or too many; use 1 to {MOST_THREADS}")


@contextmanager
def side_by_side(
    oracle: LoopOracle, make: Callable[[], RecipeLoop], jobs: int, executor: Executor | None, scratch: Path
) -> Iterator[LoopOracle | Workers]:
    """The oracle whose forks run `jobs` at a time: in the executor, else in processes of this machine, else here."""
    if executor is None and jobs == 1:
        yield oracle
        return
    with _processes(jobs) if executor is None else nullcontext(executor) as hands:
        workers = Workers(oracle, make, hands, jobs, scratch)
        try:
            yield workers
        finally:
            workers.close()


@contextmanager
def _processes(jobs: int) -> Iterator[Executor]:
    """An executor of `jobs` fresh processes on this machine; what waits is dropped at the end."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
