"""The command line in forked processes that a storm may hit, and what of a run is compared with an unbroken one."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import altgrad.cli.run_pages  # noqa: F401  (forked processes have it)
from altgrad.cli import main as command_line
from altgrad.records.documents import RESULT, read_json
from altgrad.records.metrics_log import METRICS, record_of

TIMES = ("tokens_per_s", "elapsed_s", "rank_seconds", "reference_seconds", "wall_s", "run_dir", "crc", "files")


class Attempt:
    """The command line in a forked process that leads a session; what it prints is kept."""

    def __init__(self, arguments: Sequence[object], prepare: Callable[[], None] = lambda: None) -> None:
        self.begun, self.code, self._said = time.monotonic(), None, bytearray()
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _become_command(writing, [str(argument) for argument in arguments], prepare)
        os.close(writing)
        self._pipe: int | None = reading
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()

    def _read(self, pipe: int) -> None:
        with contextlib.suppress(OSError):
            while part := os.read(pipe, 65536):
                self._said += part

    def hang_up(self) -> None:
        """Close our end of its output: what it prints from now on meets a closed pipe."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float) -> int | None:
        """Exit code, -N when signal N ended it; None when it still runs after `seconds`."""
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        return self.code

    def send(self, number: int) -> bool:
        """Whether it was still there to get the signal."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    @property
    def said(self) -> str:
        """All that it printed; call it after its end."""
        self._reader.join(5)
        self.hang_up()
        return self._said.decode("utf-8", "replace")


def _become_command(output: int, arguments: list[str], prepare: Callable[[], None]) -> None:
    code = 99
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        prepare()
        sys.argv = ["altgrad", *arguments]
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        try:
            command_line()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
    finally:
        os._exit(code)


def records(run: Path) -> list[dict[str, Any]]:
    """Every line of a run's metrics, times aside."""
    lines = (run / METRICS).read_bytes().splitlines()
    return [{key: value for key, value in record_of(line).items() if key not in TIMES} for line in lines]


def result(run: Path) -> dict[str, Any]:
    """A run's result, times and paths aside."""
    content = dict(read_json(run / RESULT).content)
    details = {
        k: v for k, v in (content.get("details") or {}).items() if k in ("skipped_steps", "optimizer_state_bytes")
    }
    return {
        **{k: v for k, v in content.items() if k not in (*TIMES, "checksum", "crc32", "sha256")},
        "details": details,
    }


def differences(run: Path, reference: Path) -> list[str]:
    """What of a finished run is not as in an unbroken one."""
    try:
        found, wanted = records(run), records(reference)
    except (OSError, ValueError) as error:
        return [f"records: {error}"]
    said = []
    if found != wanted:
        at = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), None)
        where = "one is longer" if at is None else f"{found[at]} instead of {wanted[at]}"
        said.append(f"{len(found)} records instead of {len(wanted)}: {where}"[:600])
    one, other = result(run), result(reference)
    said += [f"result.{k}: {one.get(k)!r} instead of {other.get(k)!r}"[:300] for k in other if one.get(k) != other[k]]
    return said


def wrong_losses(run: Path, reference: Path) -> list[int]:
    """Steps whose loss is not that of the unbroken run."""
    right = {r["step"]: r["loss"] for r in records(reference) if r["kind"] == "step"}
    with contextlib.suppress(OSError, ValueError):
        return [r["step"] for r in records(run) if r["kind"] == "step" and r["loss"] != right.get(r["step"])]
    return []
