"""The lock of a folder of records: one process at a time works in it.

The lock belongs to the open file (flock), so a child process that inherits
the descriptor holds it too: when a sweep is killed, the runs that it started keep their folders locked until they end,
and nobody starts them a second time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from altgrad.errors import RunBusyError

LOCK = ".lock"
INHERITED = "ALTGRAD_RUN_LOCK"
"""Environment variable that names the folder whose lock a process got from its parent."""


_ANOTHER_RUN = "change the config (another seed or name is another folder)"


class RunLock:
    """The held lock of one run folder; a context manager that releases it.

    Use `RunLock.try_acquire` or `RunLock.acquire`.
    """

    def __init__(self, folder: Path, descriptor: int | None) -> None:
        self.folder = folder
        self._descriptor = descriptor

    @classmethod
    def try_acquire(cls, folder: str | Path) -> RunLock | None:
        """The lock of `folder` (made if missing), or None while another process holds it.

        A process that inherited this folder's lock from its parent gets it at once.
        """
        folder = Path(folder)
        if os.environ.get(INHERITED) == _identity(folder):
            return cls(folder, None)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(folder, descriptor)

    @classmethod
    def acquire(cls, folder: str | Path, instead: str = _ANOTHER_RUN) -> RunLock:
        """The lock of `folder`. `instead`: what one can do but wait.

        Raises:
            RunBusyError: another process holds it.
        """
        for _ in range(5):  # somebody may only be looking (`is_locked`)
            if lock := cls.try_acquire(folder):
                return lock
            time.sleep(0.02)
        raise RunBusyError(f"another process is working in {folder}; wait until it ends, or {instead}")

    def handover(self) -> tuple[tuple[int, ...], Mapping[str, str]]:
        """(pass_fds, environment) for a child process that shall hold this lock as well."""
        if self._descriptor is None:
            return (), {INHERITED: _identity(self.folder)}
        return (self._descriptor,), {INHERITED: _identity(self.folder)}

    def release(self) -> None:
        """Let go; children that inherited the lock still hold it. Releasing twice does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(folder: str | Path) -> bool:
    """Whether some process is working in `folder` right now; a missing folder is not locked."""
    try:
        descriptor = _open_to_look(Path(folder) / LOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open_to_look(path: Path) -> int:
    """For writing, which some file systems need for a lock; for reading where nothing can be written."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _identity(folder: Path) -> str:
    return str(folder.resolve())
