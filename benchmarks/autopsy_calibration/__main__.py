"""What the verdicts of `altgrad autopsy` are worth: faults drawn from a seed, and what it said of them.

    python -m benchmarks.autopsy_calibration --set develop --jobs 2
    python -m benchmarks.autopsy_calibration --set sealed --jobs 2 --pack experiments/results/autopsy-calibration-sealed.tar.xz
    python -m benchmarks.autopsy_calibration --score experiments/results/autopsy-calibration-sealed.tar.xz
    python -m benchmarks.autopsy_calibration --fit experiments/results/autopsy-calibration-{develop,sealed}.tar.xz

A case's acceptable answers are in NAME.case.json before it runs, its record in NAME.json when it has ended; the same command
goes on where it was stopped. A set follows one state of the rules: where the sources of the autopsy have changed since, the
sealed set refuses to go on, and the development set is judged anew with `--again`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from altgrad.autopsy.confidence import fitted
from altgrad.errors import AltGradError, ConfigError
from altgrad.records.files import write_bytes, write_text
from altgrad.records.folders import open_archive, write_archive
from benchmarks.autopsy_calibration.chart import page
from benchmarks.autopsy_calibration.one import COMMIT, RULES, drawn, run
from benchmarks.autopsy_calibration.score import evidence, held_out, is_null, report

SETS: dict[str, tuple[int, int, int]] = {"develop": (1802, 50, 30), "sealed": (30112026, 100, 59)}
"""Name -> (seed, faults, nulls)."""


def names_of(faults: int, nulls: int) -> list[str]:
    """Names of a set's cases, nulls among the faults, so that a part of the set is like the whole."""
    named = [(n / max(1, faults), f"fault-{n:03d}") for n in range(faults)]
    named += [(n / max(1, nulls), f"null-{n:03d}") for n in range(nulls)]
    return [name for _, name in sorted(named)]


def check_rules(out: Path, again: bool) -> None:
    """One state of the rules for all records of a folder; with `again`, records of another one are removed.

    Raises:
        ConfigError: there are records of other rules.
    """
    for path in sorted(p for p in out.glob("*.json") if not p.name.endswith(".case.json")):
        if (record := json.loads(path.read_text("utf-8")))["rules"] == RULES:
            continue
        if not again:
            raise ConfigError(
                f"{path} follows rules {record['rules']} (commit {record['commit']}), the autopsy here has {RULES}; go on "
                "from that commit, name another --out, or judge a development set anew with --again"
            )
        path.unlink()


def pack(out: Path, target: Path) -> None:
    """Every file of a set in one archive."""
    write_archive(target, {path.name: path.read_bytes() for path in sorted(out.glob("*.json"))})


def unpack(source: Path, out: Path) -> None:
    """The files of an archive that are not in the folder yet."""
    out.mkdir(parents=True, exist_ok=True)
    for name, content in open_archive(source).items():
        if not (out / name).exists():
            write_bytes(out / name, bytes(content))


def records_of(source: Path) -> list[dict[str, Any]]:
    """The finished records of a folder or a pack, by name."""
    if source.is_dir():
        return [
            json.loads(p.read_text("utf-8")) for p in sorted(source.glob("*.json")) if not p.name.endswith(".case.json")
        ]
    files = open_archive(source)
    return [json.loads(bytes(files[n])) for n in sorted(files) if not n.endswith(".case.json")]


def main() -> None:
    """Run what is left of a set, pack it, and print its score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=list(SETS), dest="which")
    parser.add_argument("--seed", type=int, help="another set of the same kind")
    parser.add_argument("--count", type=int, help="only so many cases, nulls included")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", action="store_true", help="only write down the cases and what counts as right")
    parser.add_argument("--again", action="store_true", help="judge anew what other rules have judged")
    parser.add_argument(
        "--pack", type=Path, help="archive that the records are put into, and taken from where they are missing"
    )
    parser.add_argument("--score", type=Path, help="only print the figures of a folder or a pack")
    parser.add_argument("--figure", type=Path, help="HTML page to write beside the figures of --score")
    parser.add_argument(
        "--fit", type=Path, nargs="+", help="print the classes of confidence that folders or packs give together"
    )
    arguments = parser.parse_args()
    if arguments.fit is not None:
        faults = [record for source in arguments.fit for record in records_of(source) if not is_null(record)]
        print(*fitted(evidence(faults)), f"held out, in five parts: {held_out(faults)}", sep="\n")
        return
    if arguments.score is not None:
        print(report(records_of(arguments.score)))
        if arguments.figure is not None:
            write_text(arguments.figure, page(records_of(arguments.score)))
        return
    if arguments.which is None:
        parser.error("name a --set, a --score or a --fit")
    seed, faults, nulls = SETS[arguments.which]
    seed = arguments.seed if arguments.seed is not None else seed
    out = arguments.out or Path("runs/autopsy-calibration") / f"{arguments.which}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    if arguments.pack is not None and arguments.pack.exists():
        unpack(arguments.pack, out)
    if arguments.again and arguments.which == "sealed":
        raise ConfigError("a sealed set is run once; --seed makes a fresh one")
    check_rules(out, arguments.again)
    print(f"{out}: rules {RULES}, commit {COMMIT}, seed {seed}", flush=True)
    names = names_of(faults, nulls)[: arguments.count]
    if arguments.draw:
        for name in names:
            print(drawn(seed, name, out).as_dict(), flush=True)
        return
    left = [name for name in names if not (out / f"{name}.json").exists()]
    records = (record for record in ended(seed, left, out, arguments.jobs) if record is not None)
    for done, record in enumerate(records, len(names) - len(left) + 1):
        print(line(record, done, len(names)), flush=True)
        if arguments.pack is not None and done % 10 == 0:
            pack(out, arguments.pack)
    if arguments.pack is not None:
        pack(out, arguments.pack)
    print(report(records_of(out)))


def ended(seed: int, names: Sequence[str], out: Path, jobs: int) -> Iterator[dict[str, Any] | None]:
    """The records of cases as they end: in this process, or in several."""
    if jobs == 1:
        yield from (run(seed, name, out) for name in names)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, seed, name, out) for name in names]):
            yield future.result()


def line(record: dict[str, Any], done: int, of: int) -> str:
    """Progress: the case and the verdict."""
    case, verdict = record["case"], record["verdict"]
    fault = case["fault"]
    what = case["null"] or f"{fault['kind']} in {' and '.join(fault['cells'])} from {fault['onset']}"
    found = f"{verdict['kind']}: {', '.join(verdict['cells'])} ({verdict['mechanism']}, {verdict['onset']})"
    return f"{done}/{of} {case['name']}: {what} -> {found}"


if __name__ == "__main__":
    try:
        main()
    except AltGradError as error:
        sys.exit(str(error))
