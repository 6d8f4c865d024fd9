"""The circumstances of a run that a result may depend on: versions, commit, machine."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altgrad

if TYPE_CHECKING:
    import torch

MOST_THREADS = 1024


def threads_in(environment: Mapping[str, Any]) -> int | None:
    """CPU threads that a run recorded in its environment; None where that is no number of threads."""
    threads = environment.get("threads")
    return threads if type(threads) is int and 1 <= threads <= MOST_THREADS else None


def circumstances(device: torch.device, threads: int) -> dict[str, Any]:
    """Versions, commit and machine. `device`: that of the run; `threads`: of the CPU."""
    return {
        "altgrad": altgrad.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "numba", "triton")},
        "platform": platform.platform(),
        "device": _device_name(device),
        "threads": threads,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        import torch  # which whoever has a device has loaded

        return torch.cuda.get_device_name(device)
    return f"{device.type}: {processor_name()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree that AltGrad runs from, with "+" if it has changes; None for an installed package."""
    root = Path(altgrad.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        asked = [["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]]
        head, changes = (
            subprocess.run(
                ["git", "--no-optional-locks", "-C", str(root), *a],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout
            for a in asked
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changes.strip() else "")


def processor_name() -> str:
    """The CPU's name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
