"""metrics.jsonl: its one writer and its one reader; a line that is torn or altered is counted here and nowhere else.

Each line is a JSON object {"kind": "step" | "eval" | "event" | "monitor", "step": n, ..., "crc": "1a2b3c4d"}, the CRC-32 of
the line's bytes before `, "crc"` in hex. Files from before there were checksums have none on any line and are read as
they are; in a file that has one anywhere, a line without it is damaged.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from altgrad.records.files import open_regular, read_file, write_bytes
from altgrad.records.schema import as_number, jsonable
from altgrad.records.untrusted import Malformed, parse_line

METRICS = "metrics.jsonl"
KINDS = ("step", "eval", "event", "monitor")
_LAST_STEP = 2**31
_CRC, _CRC_BYTES = b', "crc": "', 20

Row = Mapping[str, Any]


# -- one line ----------------------------------------------------------------------------------------------------------


def line_of(record: Row) -> bytes:
    """A record's line with its checksum; non-finite floats become text."""
    text = json.dumps(jsonable(dict(record)), allow_nan=False)[:-1].encode()
    return text + _CRC + b'%08x"}\n' % zlib.crc32(text)


def is_sealed(line: bytes) -> bool:
    """Whether a line (without its line break) ends in a checksum."""
    return line[-_CRC_BYTES:-10] == _CRC and line.endswith(b'"}')


def seal_holds(line: bytes) -> bool:
    """Whether a sealed line's checksum is that of its bytes."""
    return line[-10:-2] == b"%08x" % zlib.crc32(line[:-_CRC_BYTES])


def record_of(line: bytes) -> dict[str, Any]:
    """A line's record, without its checksum, which must have been looked at.

    Raises:
        Malformed: it is no JSON object with one of the kinds and a step.
    """
    record = parse_line(line)
    kind, step = record.get("kind"), record.get("step")
    if kind not in KINDS or type(step) is not int or not 0 <= step < _LAST_STEP:
        raise Malformed("no record: its kind or its step is missing or wrong")
    record.pop("crc", None)
    return record


@dataclass
class Damage:
    """What is wrong with a metrics file.

    Args:
        torn: numbers (from 1) of lines that are no records, as a crash leaves them.
        altered: numbers of lines that do not match their checksum, or lack one that the others have.
        missing: sound lines that the run's result or checkpoint counts and the file no longer has.
        sealed: whether the file has checksums; None for a file without lines.
    """

    torn: list[int] = field(default_factory=list)
    altered: list[int] = field(default_factory=list)
    missing: int = 0
    sealed: bool | None = None

    @property
    def count(self) -> int:
        """How many lines are not as they were written."""
        return len(self.torn) + len(self.altered) + self.missing

    def __bool__(self) -> bool:
        return self.count > 0

    def said(self) -> str:
        """A clause such as "2 lines of metrics.jsonl could not be read and were skipped (line 4, 7)"; empty without damage."""
        parts = []
        for lines, what in ((self.torn, "could not be read"), (self.altered, "did not match the checksum")):
            if lines:
                some = ", ".join(map(str, lines[:5])) + (" and more" if len(lines) > 5 else "")
                parts.append(
                    f"{_lines(len(lines))} {what} and {'was' if len(lines) == 1 else 'were'} skipped (line {some})"
                )
        if self.missing:
            parts.append(f"{_lines(self.missing)} {'is' if self.missing == 1 else 'are'} lost")
        return "; ".join(parts)


def _lines(number: int) -> str:
    return f"1 line of {METRICS}" if number == 1 else f"{number} lines of {METRICS}"


def each_row(
    data: bytes, damage: Damage, skip: Callable[[bytes], bool] = lambda line: False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, record) of the sound lines in file order; what is not sound is put into `damage`.

    Args:
        skip: lines not to parse, told by their bytes; their checksums are looked at all the same.
    """
    sealed = _CRC in data
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        damage.sealed = sealed
        if sealed and not (is_sealed(line) and seal_holds(line)):
            (damage.altered if is_sealed(line) or _is_record(line) else damage.torn).append(number)
            continue
        if skip(line):
            continue
        try:
            yield number, record_of(line)
        except Malformed:
            damage.torn.append(number)


def _is_record(line: bytes) -> bool:
    try:
        record_of(line)
    except Malformed:
        return False
    return True


def read_rows(data: bytes | None) -> tuple[list[dict[str, Any]], Damage]:
    """All sound records of a metrics file's bytes (None: there is no file) in file order, and what was not sound."""
    damage = Damage()
    return [record for _, record in each_row(data or b"", damage)], damage


# -- curves ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A quantity over training: `values[i]` was measured at `steps[i]`; steps ascend without repetition."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last_finite(self) -> float | None:
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else None

    @staticmethod
    def of(pairs: Iterable[tuple[int, float]]) -> Curve:
        """From (step, value) pairs in file order; of two records of one step the later one counts."""
        latest = dict(pairs)
        steps = np.fromiter(latest.keys(), dtype=np.int64, count=len(latest))
        values = np.fromiter(latest.values(), dtype=np.float64, count=len(latest))
        order = np.argsort(steps, kind="stable")
        return Curve(steps[order], values[order])


@dataclass(frozen=True)
class Metrics:
    """The records of one run, by kind. `columns` maps a field of the step records ("loss", "lr", ...) to its curve."""

    columns: Mapping[str, Curve]
    evaluations: Mapping[str, Curve]
    events: Sequence[Row]
    monitor: Sequence[Row]
    damage: Damage

    @property
    def torn(self) -> Sequence[int]:
        """Line numbers (from 1) that are no records, as a crash leaves them."""
        return self.damage.torn

    @property
    def train(self) -> Curve:
        return self.columns.get("loss", Curve.of(()))

    @property
    def validation(self) -> Curve:
        return self.evaluations.get("val_loss", Curve.of(()))

    @property
    def last_step(self) -> int | None:
        return int(self.train.steps[-1]) if len(self.train) else None


def read_metrics(data: bytes | None, monitor_steps: int | None = 0, keep: Collection[str] | None = None) -> Metrics:
    """The records of a metrics file's bytes (None: there is no file).

    Args:
        monitor_steps: how many of the monitored steps to parse, evenly thinned (None: all, 0: none). Monitor lines
            outnumber all others by layers x roles, and most reports draw few of them, so the others are never parsed.
        keep: the fields of step and evaluation records to keep; None: all that are numbers.
    """
    data = data or b""
    wanted = None if monitor_steps is None else _thinned(data, monitor_steps)
    columns: dict[str, list[tuple[int, float]]] = {}
    evaluations: dict[str, list[tuple[int, float]]] = {}
    events: list[Row] = []
    monitor: dict[tuple[int, str, str], Row] = {}
    damage = Damage()

    def skip(line: bytes) -> bool:
        step = _monitored_step(line)
        return step is not None and wanted is not None and step not in wanted and line.rstrip().endswith(b"}")

    for _, record in each_row(data, damage, skip):
        kind, step = record["kind"], record["step"]
        if kind in ("step", "eval"):
            target = columns if kind == "step" else evaluations
            for key in record if keep is None else keep:
                if key not in ("kind", "step") and (number := as_number(record.get(key))) is not None:
                    target.setdefault(key, []).append((step, number))
        elif kind == "event":
            events.append(record)
        elif wanted is None or step in wanted:
            monitor[step, str(record.get("layer")), str(record.get("role"))] = record
    return Metrics(
        {key: Curve.of(pairs) for key, pairs in columns.items()},
        {key: Curve.of(pairs) for key, pairs in evaluations.items()},
        events,
        list(monitor.values()),
        damage,
    )


_MONITORED = re.compile(rb'\s*\{\s*"kind":\s*"monitor",\s*"step":\s*(\d{1,17})\b')


def _monitored_step(line: bytes) -> int | None:
    """The step of a monitor's line, from its first bytes; None for other lines."""
    found = _MONITORED.match(line)
    return int(found[1]) if found else None


def _thinned(data: bytes, keep: int) -> set[int]:
    """At most `keep` of the steps that have monitor lines, evenly spaced, first and last included."""
    if keep == 0:
        return set()
    steps = sorted({step for line in data.split(b"\n") if (step := _monitored_step(line)) is not None})
    if len(steps) <= keep:
        return set(steps)
    return {steps[i] for i in np.linspace(0, len(steps) - 1, keep).round().astype(int)}


# -- a run at work -----------------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """How far a metrics file was when a checkpoint was made: its lines and the CRC-32 of all its bytes."""

    lines: int
    crc: int


class MetricsLog:
    """Appends records to a metrics file, each by one system call; a kill tears the last line at most.

    Args:
        mirror: is given each record once it is written.
    """

    def __init__(self, path: Path, mirror: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path, self._mirror = path, mirror
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.mark = mark_of(read_file(path))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        line = line_of(record)
        if os.write(self._descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, "a record could not be written whole", str(self.path))
        self.mark = Mark(self.mark.lines + 1, zlib.crc32(line, self.mark.crc))
        if self._mirror is not None:
            self._mirror(record)

    def sync(self) -> None:
        """Put everything written so far on the disk: a checkpoint must not be newer than its metrics."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def mark_of(data: bytes) -> Mark:
    """The mark of a file with these bytes."""
    return Mark(data.count(b"\n"), zlib.crc32(data))


def until(data: bytes, mark: Mark) -> bytes | None:
    """The first `mark.lines` lines, where they are those that were marked; else None."""
    end = 0
    for _ in range(mark.lines):
        end = data.find(b"\n", end) + 1
        if not end:
            return None
    return data[:end] if zlib.crc32(data[:end]) == mark.crc else None


def cut_back(path: Path, step: int, mark: Mark | None = None) -> Damage:
    """Drop what was recorded after a checkpoint, atomically.

    Args:
        step: the checkpoint's; -1 without one.
        mark: the checkpoint's; None (or a file that is no longer as it was marked): every sound record until `step` stays.

    Returns:
        What of the records until the checkpoint is damaged or gone. Lines after it are made again and do not count.
    """
    data = read_file(path) if path.exists() else b""
    if mark is not None and (whole := until(data, mark)) is not None:
        if len(whole) < len(data):
            write_bytes(path, whole)
        return Damage(sealed=True)
    damage = Damage()
    kept = {number: record for number, record in each_row(data, damage) if record["step"] <= step}
    if mark is not None:
        damage = Damage(missing=max(0, mark.lines - len(kept)), sealed=damage.sealed)  # whatever has become of them
    else:
        last = max(kept, default=0)
        damage = Damage([n for n in damage.torn if n < last], [n for n in damage.altered if n < last], 0, damage.sealed)
    if (text := b"".join(map(line_of, kept.values()))) != data:
        write_bytes(path, text)
    return damage


def last_step(path: Path) -> dict[str, Any] | None:
    """The last whole step record, from the file's end: its last 16 KiB, or 1 MiB where those hold none."""
    try:
        with open_regular(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            for length in (1 << 14, 1 << 20):
                stream.seek(max(0, size - length))
                for line in reversed(stream.read().split(b"\n")):
                    if (record := _step_record(line)) is not None:
                        return record
                if size <= length:
                    break
    except OSError:
        pass
    return None


def _step_record(line: bytes) -> dict[str, Any] | None:
    if b'"step"' not in line or (is_sealed(line) and not seal_holds(line)):
        return None
    try:
        record = record_of(line)
    except Malformed:
        return None  # torn, or the first line of what was read
    return record if record["kind"] == "step" else None
