"""Files that appear whole or not at all: write aside, fsync, rename. What is read back is a regular file of bounded size.

After a kill at any instant a reader sees the old file or the new one, and nothing in between.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

MOST_FILE_BYTES = 4 << 30
"""Of a file that is read whole."""
ASIDE = ".aside-"  # prefix of what is being written; left over only by a kill


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, atomically and durably; several processes may do so at once."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, atomically and durably; several processes may do so at once."""
    aside = path.with_name(f"{ASIDE}{secrets.token_hex(8)}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except Exception as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(aside):
            error.filename = str(path)  # what a person has named
        raise
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as JSON; `content` must already be free of NaN and inf (see `schema.jsonable`)."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends without an error; an old `path` is replaced."""
    aside = path.with_name(f"{ASIDE}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for file in aside.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(aside)
    if path.exists():
        remove_folder(path)
    os.rename(aside, path)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder: at once for every reader, whose parts then go; a kill leaves at most what `remove_leftovers` takes."""
    aside = path.with_name(f"{ASIDE}{secrets.token_hex(8)}")
    os.rename(path, aside)
    shutil.rmtree(aside)


def remove_leftovers(folder: Path) -> None:
    """Delete what an earlier process was writing when it was killed; the caller must be the only writer."""
    for leftover in folder.glob(f"{ASIDE}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (where the system can open folders)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: Path) -> BufferedReader:
    """A regular file, open for reading; a pipe or a device, which may never end, is none.

    Raises:
        OSError: it is not there, cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # nor wait until somebody writes into a pipe
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        code, said = (
            (errno.EISDIR, os.strerror(errno.EISDIR)) if stat.S_ISDIR(mode) else (errno.EINVAL, "It is no regular file")
        )
        raise OSError(code, said, str(path))
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, most: int = MOST_FILE_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: as `open_regular`, or it has more than `most` bytes.
    """
    with open_regular(path) as stream:
        if os.fstat(stream.fileno()).st_size > most:
            raise OSError(errno.EINVAL, f"It is longer than {most:,} bytes", str(path))
        return stream.read()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a regular file's bytes. Raises OSError as `open_regular`."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
