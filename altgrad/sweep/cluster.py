"""The cluster executor: Ray Core schedules the runs, restarts them when a worker dies, and places them by resources.

Each task makes its run with the same `execute` as the local executor does, in a process of its own below the Ray worker.
Results come back through the shared folder where the workers see it, else as an archive of the run folder.
"""

from __future__ import annotations

import io
import os
import socket
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from altgrad.errors import SweepError
from altgrad.records.documents import RESULT
from altgrad.sweep.job import Job, Outcome
from altgrad.sweep.local import Event, Observer, stop_on_signals
from altgrad.sweep.worker import Stop, execute
from altgrad.training.config.document import read_document, write_document

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_FETCHED_AT_MOST = 64 << 20  # bytes per file; larger ones (checkpoints) stay on the worker


class RayExecutor:
    """Runs jobs as Ray tasks.

    Args:
        address: of a running cluster ("auto" finds the local one); None starts Ray on this machine for the sweep.
        jobs: runs at a time; None leaves it to the cluster's resources.
        retries: how often a run is started again, after its own crash and after its worker's death.
        shared: whether the workers see the runs' folder under the same path; None looks, by a file put there.
    """

    def __init__(
        self, address: str | None = None, jobs: int | None = None, retries: int = 1, shared: bool | None = None
    ) -> None:
        self.address, self.jobs, self.retries, self.shared = address, jobs, retries, shared

    def run(self, jobs: Sequence[Job], observe: Observer = lambda event: None) -> dict[str, Outcome]:
        """Outcome per job name. Ctrl-C ends the runs in order where the folder is shared, a second one by force.

        Raises:
            SweepError: Ray is not installed, no cluster answers at the address, or no node can hold a run.
        """
        ray = _ray()
        ours = not ray.is_initialized()
        if ours:
            self._connect(ray, jobs)
        try:
            _check_room(ray, jobs)
            return self._run(ray, jobs, observe)
        finally:
            if ours:
                ray.shutdown()

    def _connect(self, ray: Any, jobs: Sequence[Job]) -> None:
        _connect(ray, self.address, _cores_for(jobs, self.jobs))

    def _run(self, ray: Any, jobs: Sequence[Job], observe: Observer) -> dict[str, Outcome]:
        out = Path(jobs[0].runs_dir)
        out.mkdir(parents=True, exist_ok=True)
        marker = out / f".sweep-{uuid.uuid4().hex}"
        marker.touch()
        task = ray.remote(_make_run)
        stop, waiting, running, outcomes = Stop(), list(jobs), {}, {}
        try:
            with stop_on_signals(stop):
                while running or (waiting and not stop.requested.is_set()):
                    while waiting and not stop.requested.is_set() and (self.jobs is None or len(running) < self.jobs):
                        job = replace(waiting.pop(0), directory=os.getcwd())
                        running[self._submit(task, job, marker)] = job
                        observe(Event("started", job))
                    if stop.requested.is_set():
                        self._end(ray, running, marker, stop)
                    done, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
                    for reference in done:
                        job = running.pop(reference)
                        outcomes[job.name] = outcome = self._fetch(ray, reference, job)
                        if outcome.crash:
                            observe(Event("crashed", job, outcome, outcome.crash))
                        observe(Event(outcome.status, job, outcome))
                    observe(None)
        finally:
            marker.unlink(missing_ok=True)
        return {**outcomes, **{job.name: Outcome("stopped") for job in waiting}}

    def _submit(self, task: Any, job: Job, marker: Path) -> Any:
        options = {"num_cpus": job.threads, "num_gpus": job.gpus, "max_retries": self.retries}
        return task.options(name=job.name, **options).remote(job, str(marker.resolve()), self.shared, self.retries)

    def _end(self, ray: Any, running: Mapping[Any, Job], marker: Path, stop: Stop) -> None:
        """The marker's disappearance ends runs in order; runs that cannot see it, and all on a second Ctrl-C, at once."""
        marker.unlink(missing_ok=True)
        if self.shared is False or stop.forced.is_set():
            for reference in running:
                ray.cancel(reference, force=True)

    def _fetch(self, ray: Any, reference: Any, job: Job) -> Outcome:
        try:
            outcome, archive = ray.get(reference)
        except ray.exceptions.TaskCancelledError:
            return Outcome("stopped")
        except ray.exceptions.RayError as error:
            return Outcome("failed", crash={"reason": f"{type(error).__name__}: its worker died", "exit_code": None})
        if archive is not None:
            _unpack(archive, job.folder)
        return outcome


def _connect(ray: Any, address: str | None, cores: int | None) -> None:
    """Join the cluster at the address; without one, start Ray here with that many cores (None: all)."""
    os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
    if address:
        _knock(address)
    here = {} if address else {"include_dashboard": False, "num_cpus": cores}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SweepError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, "
            "or use --executor local"
        ) from None


@dataclass(frozen=True)
class RayCalls:
    """Calls of functions as Ray tasks, by the interface of `concurrent.futures`; a call whose node is lost is made again.

    threads: cores that a call takes. places: calls that fit at a time.
    """

    ray: Any
    threads: int
    places: int

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future:
        """The future of `function(*arguments)`; a `BrokenExecutor` where its workers died `RETRIES` times more."""
        task = self.ray.remote(function).options(num_cpus=self.threads, max_retries=RETRIES)
        future: Future = Future()
        task.remote(*arguments).future().add_done_callback(lambda theirs: self._settle(theirs, future))
        return future

    def _settle(self, theirs: Future, ours: Future) -> None:
        if not ours.set_running_or_notify_cancel():
            return
        error = theirs.exception()
        if error is None:
            ours.set_result(theirs.result())
        elif isinstance(error, self.ray.exceptions.RayError) and not isinstance(
            error, self.ray.exceptions.RayTaskError
        ):
            ours.set_exception(BrokenExecutor(f"{type(error).__name__}: its worker died"))
        else:
            ours.set_exception(error)


RETRIES = 3
"""How often a call is made again after the loss of its worker or node."""


@contextmanager
def ray_calls(address: str | None = None, *, threads: int = 1, jobs: int | None = None) -> Iterator[RayCalls]:
    """Calls on the cluster at the address; None starts Ray on this machine with room for `jobs` calls.

    Raises:
        SweepError: Ray is not installed, no cluster answers at the address, or no node has that many cores.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, None if jobs is None else jobs * threads)
    try:
        room = [int(node["Resources"].get("CPU", 0)) // threads for node in ray.nodes() if node["Alive"]]
        if not sum(room):
            raise SweepError(f"no node of the cluster has {threads} CPUs, as the run's {threads} threads need; add one")
        yield RayCalls(ray, threads, min(sum(room), jobs or sum(room)))
    finally:
        if ours:
            ray.shutdown()


def _make_run(job: Job, marker: str, shared: bool | None, retries: int) -> tuple[Outcome, bytes | None]:
    """On the worker: make the run in place, or aside with the folder's files as an archive."""
    if shared or (shared is None and Path(marker).exists()):
        runs = Path(marker).parent  # absolute: the worker's own working directory may be another
        return _in_place(_moved(job, str(runs)), Path(marker), retries), None
    with tempfile.TemporaryDirectory(prefix="altgrad-run-") as scratch:
        outcome = execute(_moved(job, scratch), retries=retries, dies_with_parent=True)
        return outcome, _pack(Path(scratch) / job.name)


def _in_place(job: Job, marker: Path, retries: int) -> Outcome:
    """Make the run where it belongs, once nobody else does, and for as long as the sweep's marker is there."""
    stop, over = Stop(), threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if not marker.exists():
                stop.requested.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        while (outcome := execute(job, stop, retries=retries, dies_with_parent=True)).status == "busy":
            if stop.requested.wait(1.0):
                return Outcome("stopped")
        return outcome
    finally:
        over.set()


def _moved(job: Job, runs: str) -> Job:
    """The job with its run folder under `runs`; where a run lives is no part of what it is."""
    config = {**read_document(job.config), "runs_dir": runs}
    return replace(job, runs_dir=runs, config=write_document(config))


def _pack(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and path.stat().st_size <= _FETCHED_AT_MOST:
                archive.add(path, str(path.relative_to(folder)))
    return buffer.getvalue()


def _unpack(archive: bytes, folder: Path) -> None:
    """Result last: a fetch that is cut short leaves an unfinished run, which is made again."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        for member in sorted(packed.getmembers(), key=lambda member: member.name == RESULT):
            packed.extract(member, folder, filter="data")


def _knock(address: str) -> None:
    """Find out in seconds that nobody listens at host:port; Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise SweepError(
            f"nothing listens at {address!r} ({error.strerror or error}); start a cluster with `ray start --head`, or use "
            "--executor local"
        ) from None


def _check_room(ray: Any, jobs: Sequence[Job]) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for job in jobs:
        if not any(n.get("CPU", 0) >= job.threads and n.get("GPU", 0) >= job.gpus for n in nodes):
            largest = max((n.get("CPU", 0) for n in nodes), default=0)
            raise SweepError(
                f"no node of the cluster has {job.threads} CPUs and {job.gpus} GPUs, as {job.name} needs "
                f"(the largest has {largest:.0f} CPUs); raise --jobs for fewer threads per run, or add nodes"
            )


def _cores_for(jobs: Sequence[Job], at_a_time: int | None) -> int | None:
    """Cores to offer when Ray runs here: what `at_a_time` runs take; None: all."""
    return None if at_a_time is None else at_a_time * max(job.threads for job in jobs)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise SweepError("--executor ray needs Ray; install it with: pip install 'altgrad[ray]'") from None
    return ray
