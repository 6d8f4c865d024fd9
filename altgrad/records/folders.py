"""Folders on the disk and folders inside packs, read by the same paths: `study.tar.xz/a/e3m4-s42-1a2b3c4d/result.json`.

A path leads into a pack where one of its parents is a file whose name ends in .tar.xz.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from altgrad.errors import ReportError
from altgrad.records.archive import SUFFIX, is_archive_name, open_archive


def pack_of(path: Path) -> tuple[Path, str] | None:
    """(the pack, the name inside of it, "" for its root) where a path is a pack or leads into one; else None."""
    for place in (path, *path.parents):
        try:
            mode = os.stat(place).st_mode
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(mode) and is_archive_name(place):
            inner = path.relative_to(place).as_posix()
            return place, "" if inner == "." else inner
        return None
    return None


def page_path(folder: Path, name: str) -> Path:
    """Where a page about a folder goes: into it under `name`, or beside the pack that it lies in, under the pack's name."""
    packed = pack_of(folder)
    return (
        folder / name
        if packed is None
        else packed[0].with_name(packed[0].name.removesuffix(SUFFIX) + Path(name).suffix)
    )


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        OSError: it is not there or cannot be read. ReportError: it lies in a damaged pack.
    """
    if (packed := pack_of(path)) is None:
        return path.read_bytes()
    found = open_archive(packed[0]).get(packed[1])
    if found is None:
        raise FileNotFoundError(f"{path} is not in the pack")
    return bytes(found)


def is_file(path: Path) -> bool:
    """Whether there is such a file."""
    packed = pack_of(path)
    return path.is_file() if packed is None else packed[1] in open_archive(packed[0])


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; a pack is one."""
    packed = pack_of(path)
    if packed is None:
        return path.is_dir()
    return not packed[1] or any(name.startswith(f"{packed[1]}/") for name in open_archive(packed[0]))


def children(folder: Path) -> list[Path]:
    """The folders directly in a folder, sorted; hidden ones and links are left out.

    Raises:
        ReportError: it cannot be listed.
    """
    packed = pack_of(folder)
    if packed is not None:
        start = f"{packed[1]}/" if packed[1] else ""
        below = (name[len(start) :] for name in open_archive(packed[0]) if name.startswith(start))
        return [folder / name for name in sorted({name.partition("/")[0] for name in below if "/" in name})]
    try:
        found = sorted(folder.iterdir())
        return [c for c in found if c.is_dir() and not c.name.startswith(".") and not c.is_symlink()]
    except OSError as error:
        raise ReportError(f"{folder} cannot be listed: {error.strerror or error}") from None
