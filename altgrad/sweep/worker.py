"""Makes one run in a process of its own: under the folder's lock, retried after a crash, stopped in an orderly way.

Whatever happens to the process (segmentation fault, out of memory, kill -9) happens to it alone; here it becomes an
entry in the run's crashes.json. Every executor, local or on a cluster, runs its jobs through `execute`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from altgrad.records.documents import CRASHES, read_json
from altgrad.records.files import write_json, write_text
from altgrad.records.lock import RunLock
from altgrad.records.run import finished_result
from altgrad.sweep.job import CONFIG, LOG, TIMES, Job, Outcome, position

USAGE = 2  # the exit code of a person's mistake: the same command would make it again
_LOG_TAIL_LINES = 15
_DIES_WITH_ITS_PARENT = (
    "import ctypes, os, signal, sys\n"
    "with __import__('contextlib').suppress(AttributeError, OSError):\n"
    "    ctypes.CDLL(None).prctl(1, 9)\n"  # PR_SET_PDEATHSIG, SIGKILL; Linux only
    "signal.pthread_sigmask(signal.SIG_SETMASK, [])\n"  # a Ray worker blocks SIGINT, and children inherit that
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])\n"
)


class Stop:
    """A request to end, shared by all jobs of an executor: first in an orderly way, then by force."""

    def __init__(self, grace_s: float = 120.0) -> None:
        self.grace_s = grace_s
        """How long a run may take to write its checkpoint."""
        self.requested = threading.Event()
        self.forced = threading.Event()


def execute(
    job: Job,
    stop: Stop | None = None,
    *,
    retries: int = 1,
    dies_with_parent: bool = False,
    crashed: Callable[[Mapping[str, Any]], None] = lambda crash: None,
) -> Outcome:
    """Make `job`'s run, or find it made.

    Args:
        stop: ends the run when it is requested.
        retries: how often a crashed run is started again. A usage error (exit code 2) is never retried.
        dies_with_parent: kill the run when this process dies (Linux); else it goes on, holding its folder's lock.
        crashed: told of each crash.

    Returns:
        "busy" when another process works in the folder; nothing was done then.
    """
    stop = stop or Stop()
    start = time.monotonic()
    lock = RunLock.try_acquire(job.folder)
    if lock is None:
        return Outcome("busy")
    with lock:
        if result := finished_result(job.folder):
            return Outcome("done", result=result, by_another=True)
        crash: dict[str, Any] | None = None
        for attempt in range(retries + 1):
            if stop.requested.is_set():
                return Outcome("stopped", time.monotonic() - start, crash=crash, crashes=attempt)
            begun = datetime.now(UTC)
            code = _run_process(job, lock, stop, dies_with_parent)
            if result := finished_result(job.folder):
                _close_record(job.folder)
                seconds = time.monotonic() - start
                write_json(job.folder / TIMES, {"seconds": seconds, "threads": job.threads, "crashes": attempt})
                return Outcome("done", seconds, result, crash, attempt)
            if stop.requested.is_set():
                return Outcome("stopped", time.monotonic() - start, crash=crash, crashes=attempt)
            again = attempt < retries and code != USAGE
            crash = _describe(job, code, begun)
            _record(job.folder, crash, "retrying" if again else "failed")
            crashed(crash)
            if not again:
                break
    return Outcome("failed", time.monotonic() - start, crash=crash, crashes=attempt + 1)


def _run_process(job: Job, lock: RunLock, stop: Stop, dies_with_parent: bool) -> int:
    """Exit code of the run's process; -N when signal N ended it."""
    config = job.folder / CONFIG
    write_text(config, job.config)
    arguments = job.arguments(config)
    if dies_with_parent and sys.platform == "linux":
        arguments = [sys.executable, "-c", _DIES_WITH_ITS_PARENT, *arguments]
    descriptors, held = lock.handover()
    with (job.folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=descriptors,
            env={**job.variables(), **held}, cwd=job.directory if os.path.isdir(job.directory) else None,
            start_new_session=True,
        )  # fmt: skip  # a session of its own: Ctrl-C reaches this process only, which then ends the run in order
    _offer_to_the_oom_killer(process.pid)
    try:
        return _wait(process, stop)
    except BaseException:
        _end(process, stop)
        raise


def _wait(process: subprocess.Popen, stop: Stop) -> int:
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stop.requested.is_set():
                return _end(process, stop)


def _end(process: subprocess.Popen, stop: Stop) -> int:
    """Interrupt the run, give it time for its checkpoint, then kill what is left of its process group."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + stop.grace_s
    while time.monotonic() < deadline and not stop.forced.is_set():
        try:
            return process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _offer_to_the_oom_killer(pid: int) -> None:
    """When memory runs out, Linux shall end this run rather than the sweep that looks after all of them."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("500")


def _describe(job: Job, code: int, begun: datetime) -> dict[str, Any]:
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        reason = f"ended by {name}" + (" (killed, or out of memory)" if -code == signal.SIGKILL else "")
    elif code == 0:
        reason = "ended without a result"
    else:
        reason = f"exit code {code}"
    return {
        "reason": reason,
        "exit_code": code,
        "step": position(job.folder).step,
        "begun": begun.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "log_tail": _tail(job.folder / LOG),
    }


def _tail(path: Path) -> list[str]:
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8192))
        return stream.read().decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:]


def _record(folder: Path, crash: Mapping[str, Any], state: str) -> None:
    known = read_json(folder / CRASHES).content.get("crashes")
    write_json(folder / CRASHES, {"state": state, "crashes": [*(known if isinstance(known, list) else []), crash]})


def _close_record(folder: Path) -> None:
    """The crashes of a run that came through stay on record, marked as overcome."""
    if known := read_json(folder / CRASHES).content:
        write_json(folder / CRASHES, {**known, "state": "recovered"})
