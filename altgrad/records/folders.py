"""Folders on the disk and inside archives, read by the same paths: `study.tar.xz/a/e3m4-s42-1a2b3c4d/result.json`.

An archive is a tar file of regular files (POSIX ustar, names sorted, all times 0) in one xz stream with a SHA-256 check:
the same bytes for the same content. The reader knows this form and no other, so nothing that an archive says can reach
past its own bytes: it never writes, follows no link, and refuses names that leave their folder.
"""

from __future__ import annotations

import io
import lzma
import os
import stat
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from altgrad.errors import ReportError
from altgrad.records.files import open_regular, read_file, write_bytes

SUFFIX = ".tar.xz"
MOST_BYTES = 1 << 30
"""Of all files of an archive together, unpacked."""
MOST_FILES = 100_000
_MEMORY = 128 << 20  # bytes that decoding may take beside its output; the highest preset needs 65 MiB
_BLOCK = 512


def is_archive_name(path: Path) -> bool:
    """Whether a file of this name is read as an archive."""
    return path.name.endswith(SUFFIX)


def write_archive(path: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (name with "/" between folders -> content) to `path`; the same files make the same bytes.

    Raises:
        ReportError: `path` does not end in .tar.xz, a name is unfit or too long, or the files exceed the reader's limits.
    """
    if not is_archive_name(path):
        raise ReportError(f"the pack {path} does not end in {SUFFIX}; name it so, such as study{SUFFIX}")
    if len(files) > MOST_FILES or sum(map(len, files.values())) > MOST_BYTES:
        raise ReportError(
            f"{len(files):,} files of {sum(map(len, files.values())):,} bytes are too much for one pack "
            f"({MOST_FILES:,} files, {MOST_BYTES:,} bytes); make several"
        )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as archive:
        for name in sorted(files, key=lambda name: (name.rpartition("/")[2], name)):  # like beside like packs smaller
            if problem := _unfit(name):
                raise ReportError(f"{name!r} cannot go into a pack: {problem}")
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            try:
                archive.addfile(member, io.BytesIO(files[name]))
            except ValueError:
                raise ReportError(f"{name!r} cannot go into a pack: the name is too long; shorten the run's") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, lzma.compress(buffer.getvalue(), check=lzma.CHECK_SHA256, preset=9))


def open_archive(path: Path) -> Mapping[str, memoryview]:
    """The files of an archive by name, unpacked in memory; read anew when the file has changed.

    Raises:
        ReportError: it is damaged, no archive of this form, or larger than `MOST_BYTES`.
    """
    try:
        facts = path.stat()
        return _opened(path.resolve(), facts.st_mtime_ns, facts.st_size)
    except OSError as error:
        raise ReportError(
            f"{path} cannot be read: {error.strerror or error}; name a pack, such as study.tar.xz"
        ) from None


@lru_cache(maxsize=4)
def _opened(path: Path, _changed: int, _size: int) -> Mapping[str, memoryview]:
    return _files(path, memoryview(_unpacked(path)))


def _unpacked(path: Path) -> bytearray:
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY)
    found = bytearray()
    try:
        with open_regular(path) as stream:
            while not decoder.eof:
                packed = stream.read(1 << 20) if decoder.needs_input else b""
                if decoder.needs_input and not packed:
                    raise ReportError(f"{path} is damaged: it ends in the middle; fetch or make it again")
                found += decoder.decompress(packed, max_length=1 << 22)
                if len(found) > MOST_BYTES:
                    raise ReportError(
                        f"{path} unpacks to more than {MOST_BYTES:,} bytes; that is no pack of run records"
                    )
            if decoder.unused_data or stream.read(1):
                raise ReportError(f"{path} is damaged: something follows its end; fetch or make it again")
    except lzma.LZMAError as error:
        raise ReportError(f"{path} is damaged or no {SUFFIX} file ({error}); fetch or make it again") from None
    return found


def _files(path: Path, content: memoryview) -> dict[str, memoryview]:
    found: dict[str, memoryview] = {}
    at = 0
    while at + _BLOCK <= len(content) and any(header := bytes(content[at : at + _BLOCK])):
        name, size, is_folder = _header(path, header)
        begin = at + _BLOCK
        at = begin + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if begin + size > len(content):
            raise ReportError(f"{path} is damaged: {name!r} ends after the pack does")
        if is_folder:
            continue
        if (problem := _unfit(name)) or name in found:
            raise ReportError(f"{path} is refused: it names a file {name!r}, {problem or 'twice'}")
        found[name] = content[begin : begin + size]
        if len(found) > MOST_FILES:
            raise ReportError(f"{path} is refused: it holds more than {MOST_FILES:,} files")
    folders = {str(parent) for name in found for parent in _parents(name)}
    if both := folders & found.keys():
        raise ReportError(f"{path} is refused: {min(both)!r} is a file and a folder in it")
    return found


def _header(path: Path, header: bytes) -> tuple[str, int, bool]:
    """(name, size, whether it is a folder) of a ustar header."""
    try:
        if sum(header[:148]) + 8 * 32 + sum(header[156:]) != int(header[148:156].strip(b"\0 "), 8):
            raise ValueError("its checksum is wrong")
        if header[257:262] != b"ustar" or header[156:157] not in b"0\x005":
            raise ValueError("it is no regular file in ustar form")
        name, prefix = (header[a:b].split(b"\0")[0].decode("utf-8") for a, b in ((0, 100), (345, 500)))
        size = int(header[124:136].strip(b"\0 ") or b"0", 8)
        if size < 0:
            raise ValueError("its size is negative")
    except ValueError as error:
        raise ReportError(f"{path} is refused: an entry cannot be read ({error})") from None
    return f"{prefix}/{name}" if prefix else name, size, header[156:157] == b"5"


def _unfit(name: str) -> str:
    """Why a name cannot stand in an archive; empty where it can."""
    if len(name) > 255 or not name.isprintable() or "\\" in name or ":" in name:
        return "which is too long or has letters that file names cannot have everywhere"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "which leads out of its folder"
    return ""


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


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
        return read_file(path)
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
