"""Jobs that run `fake_run.py` in place of `altgrad run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from altgrad.sweep.job import Job

FAKE_RUN = Path(__file__).with_name("fake_run.py")


def fake_job(
    runs: Path,
    kind: str,
    *,
    seed: int = 0,
    steps: int = 4,
    threads: int = 1,
    gpus: int = 0,
) -> Job:
    """A job whose run behaves as `kind` says (see `fake_run.py`)."""
    name = f"fake-{kind}"
    config = yaml.safe_dump({"name": name, "seed": seed, "max_steps": steps})
    return Job(
        f"{name}-s{seed}", str(runs), config, steps, threads, gpus, (sys.executable, str(FAKE_RUN), "{config}"), {},
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], seconds: float = 100.0) -> None:
    """Poll until `condition` holds.

    Raises:
        TimeoutError: it did not in `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.02)
