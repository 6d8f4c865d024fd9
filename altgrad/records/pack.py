"""Packs: the records of a study's runs in one compressed file, which everything that reads runs reads like a folder.

A pack keeps what a run left as data: its config, environment, metrics, result, crashes and failure reports, and the
JSON files that lie beside the runs. Checkpoints, logs and pages stay behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from altgrad.errors import ReportError
from altgrad.records.documents import CONFIG, CRASHES, ENVIRONMENT, RESULT
from altgrad.records.files import write_bytes
from altgrad.records.folders import open_archive, pack_of, read_bytes, write_archive
from altgrad.records.metrics_log import METRICS
from altgrad.records.run import FAILURE_REPORTS, Run, find_runs, is_run

KEPT = (CONFIG, ENVIRONMENT, METRICS, RESULT, CRASHES, "failure.md", "failure.json")


def pack_runs(sources: Sequence[str | Path], out: str | Path) -> list[str]:
    """Pack every run at or below `sources` (folders or packs) into the file `out`; returns the runs' names in it.

    A single folder's runs are named from that folder on, those of several begin with their folder's name. The same records
    make the same bytes.

    Raises:
        ReportError: there is no run, two have the same name, or the pack would exceed its limits.
    """
    files: dict[str, bytes] = {}
    names: list[str] = []
    for source in map(Path, sources):
        below = f"{_stem(source)}/" if len(sources) > 1 or is_run(source) else ""
        for run in find_runs(source):
            inner = run.relative_to(source).as_posix()
            name = (below + ("" if inner == "." else inner)).rstrip("/")
            if name in names:
                raise ReportError(f"two runs would be {name} in the pack; pack the folder above them")
            names.append(name)
            files |= {f"{name}/{file}": content for file, content in _records_of(run).items()}
        if not is_run(source):
            files |= {f"{below}{file}": content for file, content in _documents_of(source).items()}
    if not names:
        raise ReportError(f"no run folders in {', '.join(map(str, sources))}; name the folder that holds the runs")
    write_archive(Path(out), files)
    return names


def unpack(pack: str | Path, out: str | Path) -> int:
    """Write the files of a pack into the folder `out`, which must not exist or be empty; returns how many there were.

    Raises:
        ReportError: the pack is damaged or no pack, or the folder has something in it.
    """
    pack, out = Path(pack), Path(out)
    files = open_archive(pack)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ReportError(f"{out} is there already; name a new folder, so that nothing is overwritten")
    for name, content in files.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, bytes(content))
    return len(files)


def _records_of(run: Path) -> dict[str, bytes]:
    found = {}
    for name in KEPT:
        if (content := _read(run / name)) is not None:
            found[name] = content
    for page in Run(run).failure_reports:
        for file in (page, page.with_suffix(".md"), page.with_suffix(".json")):
            if (content := _read(file)) is not None:
                found[f"{FAILURE_REPORTS}/{file.name}"] = content
    if (packed := pack_of(run)) is not None:
        start = f"{packed[1]}/{FAILURE_REPORTS}/"
        inside = open_archive(packed[0])
        found |= {name[len(packed[1]) + 1 :]: bytes(c) for name, c in inside.items() if name.startswith(start)}
    return found


def _documents_of(folder: Path) -> dict[str, bytes]:
    """JSON files directly in a folder of runs, such as a study's own results."""
    if (packed := pack_of(folder)) is not None:
        start = f"{packed[1]}/" if packed[1] else ""
        names = [n[len(start) :] for n in open_archive(packed[0]) if n.startswith(start) and n.endswith(".json")]
        names = [name for name in names if "/" not in name]
    else:
        names = sorted(file.name for file in folder.glob("*.json") if file.is_file() and not file.name.startswith("."))
    return {name: content for name in names if (content := _read(folder / name)) is not None}


def _read(path: Path) -> bytes | None:
    try:
        return read_bytes(path)
    except OSError:
        return None


def _stem(source: Path) -> str:
    name = source.resolve().name
    return name.removesuffix(".tar.xz")
