"""Says of a run folder whether its records are as they were written: every checksum looked at, nothing loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from altgrad.records.documents import CONFIG, ENVIRONMENT, RESULT, read_json
from altgrad.records.files import file_sha256
from altgrad.records.folders import pack_of, read_bytes
from altgrad.records.metrics_log import METRICS
from altgrad.records.run import Run
from altgrad.records.schema import as_whole

CHECKSUMS = "checksums.json"  # of a checkpoint: name of each of its files -> SHA-256


@dataclass(frozen=True)
class Finding:
    """What was found of one run.

    Args:
        problems: what is damaged or lost, as clauses; empty for a whole run.
        remarks: what is as it should be and worth saying: the run goes on, has no checksums, was cut off by a kill.
    """

    path: Path
    status: str
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return not self.problems

    def said(self) -> str:
        """A line, and one more for each problem."""
        about = "; ".join((self.status, *self.remarks))
        lines = [
            f"{'whole' if self.whole else 'DAMAGED'}  {self.path}  ({about})",
            *(f"    {p}" for p in self.problems),
        ]
        return "\n".join(line.encode("utf-8", "replace").decode() for line in lines)


def verify_run(path: Path, *, checkpoints: bool = True) -> Finding:
    """Look at every record of the run in a folder, on the disk or in a pack, and, if wanted, at its checkpoints.

    An unfinished run is whole without a result and with a last line that a kill tore: the same command goes on with it.
    """
    run = Run(path)
    begun = run.finished or bool(_checkpoints(path))
    missing = () if run.finished else (RESULT,) if begun else (RESULT, METRICS, ENVIRONMENT)
    problems = [p for p in run.problems if p not in {f"{name} is missing" for name in missing}]
    damage, remarks = run.damage(), []
    if not begun:
        remarks.append("it has no checkpoint yet")
    if not run.finished and damage.torn and damage.torn[-1] == _last_line(path):
        damage.torn.pop()
        remarks.append("its last line is cut off, as by a kill")
    problems += [damage.said()] if damage else []
    files = run.result.get("files")
    if isinstance(files, dict):
        problems += [
            f"{name} is not as it was when the run ended"
            for name in (CONFIG, ENVIRONMENT, METRICS)
            if _differs(path / name, files.get(name)) and not any(name in known for known in problems)
        ]
    elif run.finished or damage.sealed is False:
        remarks.append("an older record without checksums")
    if checkpoints and pack_of(path) is None:
        problems += [f"checkpoint {f.name}: {broken}" for f in _checkpoints(path) if (broken := broken_checkpoint(f))]
    return Finding(path, run.status, tuple(problems), tuple(remarks))


def broken_checkpoint(folder: Path, files: Sequence[str] = ()) -> str | None:
    """What of a checkpoint does not match its checksums, as a clause; None for a whole one. `files`: what it must have."""
    sums = read_json(folder / CHECKSUMS)
    if sums.problem or not sums.content:
        return sums.problem or f"{CHECKSUMS} is missing or empty"
    for name in sorted({*files, *sums.content}):
        try:
            if Path(name).name != name or file_sha256(folder / name) != sums.content.get(name):
                return f"{name} does not match its checksum"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return None


def _checkpoints(path: Path) -> list[Path]:
    places = sorted((path / "checkpoints").glob("*-[0-9]*"))
    return [place for place in places if place.is_dir() and not place.name.startswith(".")]


def _differs(path: Path, listed: object) -> bool:
    if not isinstance(listed, Mapping):
        return False
    try:
        content = read_bytes(path)
    except OSError:
        return True
    lines = as_whole(listed.get("lines"))
    same_lines = lines is None or lines == content.count(b"\n")
    return not same_lines or hashlib.sha256(content).hexdigest() != listed.get("sha256")


def _last_line(path: Path) -> int:
    try:
        content = read_bytes(path / METRICS)
    except OSError:
        return 0
    return content.count(b"\n") + (not content.endswith(b"\n"))
