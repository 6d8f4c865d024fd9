"""The local executor: N runs at a time on this machine, each in a process of its own, with its share of cores and devices.

A thread per slot waits for its run's process; nothing is computed here. A run whose folder another sweep is working in
is looked at again until that one ends, so two sweeps on one folder share the work and both end with all of it done.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from altgrad.errors import SweepError
from altgrad.sweep.job import Job, Outcome
from altgrad.sweep.worker import Stop, execute


@dataclass(frozen=True)
class Event:
    """What an executor tells its observer: a job "started", "crashed", "waiting", or ended (the outcome's status)."""

    kind: str
    job: Job
    outcome: Outcome | None = None
    crash: Mapping | None = None


Observer = Callable[[Event | None], None]
"""Called on every event, in any thread, and about twice a second with None, to redraw."""


@dataclass(frozen=True)
class LocalExecutor:
    """Runs jobs in `jobs` slots.

    Args:
        jobs: runs at a time.
        devices: names of the devices (as CUDA_VISIBLE_DEVICES takes them) that runs with `gpus` > 0 share; one run per
            entry, so a device named twice holds two runs.
        retries: how often a crashed run is started again.
        grace_s: seconds that a run has for its checkpoint when the sweep is stopped.
        poll_s: seconds between looks at a run that another process is working in.
    """

    jobs: int = 1
    devices: Sequence[str] = ()
    retries: int = 1
    grace_s: float = 120.0
    poll_s: float = 1.0

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise SweepError(f"{self.jobs} jobs; use at least 1 (this machine has {available_cores()} cores)")

    def run(self, jobs: Sequence[Job], observe: Observer = lambda event: None) -> dict[str, Outcome]:
        """Outcome per job name. Ctrl-C (or SIGTERM) ends the runs in order, a second one by force; then the outcomes
        of what was done are returned and the others are "stopped".

        Raises:
            SweepError: a job needs more devices than there are.
        """
        needed = max((job.gpus for job in jobs), default=0)
        if needed > len(self.devices):
            raise SweepError(
                f"a run needs {needed} GPU(s) and there are {len(self.devices)} device slots; name them with --devices, "
                "or train on the CPU with device=cpu"
            )
        stop = Stop(self.grace_s)
        slots = _Devices(self.devices)
        outcomes: dict[str, Outcome] = {}
        with ThreadPoolExecutor(self.jobs, thread_name_prefix="run") as pool, stop_on_signals(stop):
            try:
                futures = {pool.submit(self._one, job, slots, stop, observe): job for job in jobs}
                while futures:
                    done, _ = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        outcomes[futures.pop(future).name] = self._settle(future)
                    observe(None)
            finally:
                stop.requested.set()  # an observer's error must not leave runs behind
        return outcomes

    def _one(self, job: Job, slots: _Devices, stop: Stop, observe: Observer) -> Outcome:
        with slots.take(job.gpus, stop) as taken:
            if taken:
                job = replace(job, environment={**job.environment, "CUDA_VISIBLE_DEVICES": ",".join(taken)})
            waiting = False
            while not stop.requested.is_set():
                if not waiting:
                    observe(Event("started", job))
                outcome = execute(
                    job, stop, retries=self.retries, crashed=lambda crash: observe(Event("crashed", job, crash=crash))
                )
                if outcome.status != "busy":
                    observe(Event(outcome.status, job, outcome))
                    return outcome
                if not waiting:
                    observe(Event("waiting", job))
                    waiting = True
                stop.requested.wait(self.poll_s)
        return Outcome("stopped")

    @staticmethod
    def _settle(future: Future[Outcome]) -> Outcome:
        """A job's outcome; an error of ours (a full disk, a folder without permission) fails that job alone."""
        error = future.exception()
        if error is None:
            return future.result()
        return Outcome("failed", crash={"reason": f"{type(error).__name__}: {error}", "exit_code": None, "step": None})


class _Devices:
    """Device slots, handed out to one run at a time."""

    def __init__(self, names: Sequence[str]) -> None:
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._several = threading.Lock()  # a run that needs two must not hold one while another run holds the other
        for name in names:
            self._free.put(name)

    @contextlib.contextmanager
    def take(self, count: int, stop: Stop) -> Iterator[list[str]]:
        taken: list[str] = []
        try:
            if count:
                with self._several:
                    while len(taken) < count and not stop.requested.is_set():
                        with contextlib.suppress(queue.Empty):
                            taken.append(self._free.get(timeout=0.2))
            yield taken
        finally:
            for name in taken:
                self._free.put(name)


@contextlib.contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """Ctrl-C and SIGTERM request the stop, a second one forces it; where handlers can be set (the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [
        signal.signal(number, lambda *_: (stop.forced if stop.requested.is_set() else stop.requested).set())
        for number in signals
    ]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def available_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def threads_per_run(jobs: int) -> int:
    """The cores divided among the runs at a time, at least 1 each."""
    return max(1, available_cores() // jobs)


def cuda_devices() -> list[str]:
    """The GPUs of this machine as the driver numbers them, or those that CUDA_VISIBLE_DEVICES leaves; torch-free."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.split() if listed.returncode == 0 else []
