"""Damages run folders in every way and reports on them: `python -m benchmarks.fuzz_records --count 2000 --seed 0`.

Each case is drawn from (seed, number): one of three finished runs (from the committed packs, with checksums) has a file cut,
flipped, emptied, deleted, replaced by a pipe, or rewritten with a hostile value; or it is forged: values are replaced or
dropped and the checksums made anew, as only a person would. Then both reports and a pack are written, and the folder is
verified. Counted are tracebacks (anything but an AltGradError), hangs (more than 10 s of processor time, or a read that never
ends), and silent cases (a record that was damaged, not forged, and `verify` says that the finished run is whole). Exit code 1
where one of them is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from altgrad.analysis import write_report, write_study
from altgrad.errors import AltGradError
from altgrad.records.documents import CONFIG, CRASHES, ENVIRONMENT, RESULT, write_environment, write_result
from altgrad.records.metrics_log import METRICS, line_of, record_of
from altgrad.records.pack import pack_runs
from altgrad.records.run import Run, find_runs
from altgrad.records.untrusted import Malformed, parse_json
from altgrad.records.verify import verify_run
from benchmarks.reliability import FUZZ_FAULTS, count_cases
from experiments.findings import RESULTS
from experiments.records import thin

FILES = (METRICS, METRICS, RESULT, RESULT, ENVIRONMENT, CONFIG)
HOSTILE = (
    *(
        "1e400",
        "NaN",
        "-Infinity",
        "null",
        "true",
        '"x"',
        '""',
        "[]",
        "{}",
        "[1, [2]]",
        '{"a": {"b": 1}}',
        "-1",
        "1.5",
        "1e300",
    ),
    *(
        "9" * 20,
        "9" * 5000,
        "9007199254740993",
        '"\\ud800"',
        '"nan"',
        '"=HYPERLINK(1)"',
        '"<img onerror=1>"',
        '"../../x"',
    ),
    *("[" * 70 + "]" * 70, "[" * 100_000, '"' + "x" * 3000 + '"'),
)
HANG_SECONDS = 10


class Hang(BaseException):
    """A case took too long."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `Hang` in the block when it takes more processor time (the machine may be busy with other work), or ten times as
    long by the clock: a read of a pipe takes none."""

    def ring(*_: object) -> None:
        raise Hang

    before = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def make_runs(folder: Path) -> None:
    """Three finished runs with checksums: a baseline, one that froze, one that was shifted."""
    for group in "acd":
        path = find_runs(RESULTS / group)[0]
        thin(Run(path), folder / path.name, every=1)


def damage(folder: Path, rng: random.Random) -> str:
    """Change one file of a run folder; returns what was done, which begins with "forged" where its checksums hold."""
    if rng.random() < 0.3:
        return forge(folder, rng)
    path = folder / rng.choice(FILES)
    content = path.read_bytes()
    how = rng.choice(("cut", "flip", "empty", "delete", "drop a line", "value", "value", "crashes", "pipe"))
    if how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 20))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "delete":
        path.unlink()
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "drop a line":
        lines = content.splitlines(keepends=True)
        del lines[rng.randrange(len(lines))]
        path.write_bytes(b"".join(lines))
    elif how == "value":
        path.write_bytes(_with_hostile_value(path.name, content, rng))
    else:
        (folder / RESULT).unlink(missing_ok=True)
        (folder / CRASHES).write_text(f'{{"state": {rng.choice(HOSTILE)}, "crashes": {rng.choice(HOSTILE)}}}')
    return f"{how} in {path.name}"


def _with_hostile_value(name: str, content: bytes, rng: random.Random) -> bytes:
    """The same document with one value, at any depth, replaced; of the metrics, one value of one line."""
    if name == METRICS:
        lines = content.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = _with_hostile_value(RESULT, lines[at], rng)
        return b"\n".join(lines) + b"\n"
    document = yaml.safe_load(content) if name == CONFIG else json.loads(content)
    node, key = _place(document, rng)
    node[key] = "@"
    return json.dumps(document).replace('"@"', rng.choice(HOSTILE)).encode("utf-8", "surrogatepass")


def _place(document: Any, rng: random.Random) -> tuple[Any, Any]:
    """A mapping or list at any depth of a document, and one of its keys."""
    node = document
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.4:
            return node, key
        node = node[key]


def _parsed(text: str) -> bool:
    with contextlib.suppress(Malformed):
        parse_json(text.encode("utf-8", "surrogatepass"))
        return True
    return False


PLAIN = tuple(json.loads(text) for text in HOSTILE if _parsed(text))
"""The hostile values that a sound document may hold."""


def forge(folder: Path, rng: random.Random) -> str:
    """Replace or drop some values of a run's records, and seal them again."""
    lines = [record_of(line) for line in (folder / METRICS).read_bytes().splitlines()]
    result, environment = (json.loads((folder / name).read_text()) for name in (RESULT, ENVIRONMENT))
    said = []
    for _ in range(rng.choice((1, 1, 2, 5))):
        name, document = rng.choice(((METRICS, rng.choice(lines)), (RESULT, result), (ENVIRONMENT, environment)))
        node, key = _place(document, rng)
        if key in ("kind", "step") and node in lines:
            continue  # a line without them is no record
        if rng.random() < 0.4:
            said.append(f"{name} without {key}")
            del node[key]
        else:
            node[key] = rng.choice(PLAIN)
            said.append(f"{name}: {key} = {str(node[key])[:40]!r}")
    if rng.random() < 0.2:
        node, key = _place(lines, rng) if rng.random() < 0.5 else (lines, 0)
        if node is lines:
            del lines[key if isinstance(key, int) else 0]
    (folder / METRICS).write_bytes(b"".join(map(line_of, lines)))
    write_environment(folder, environment)
    write_result(folder, result)
    return f"forged: {'; '.join(said)}"


def judge(base: Path, scratch: Path, rng: random.Random) -> tuple[str, str]:
    """(verdict, what was done) of one case."""
    runs = scratch / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(base, runs)
    victim = rng.choice(sorted(runs.iterdir()))
    before = {file.name: file.read_bytes() for file in victim.iterdir()}
    done = damage(victim, rng)
    changed = {file.name: file.read_bytes() for file in victim.iterdir() if file.is_file()} != before
    refused = False
    try:
        with limited(HANG_SECONDS):
            for write in (write_report, write_study, pack_runs):
                try:
                    if write is pack_runs:
                        pack_runs([runs], scratch / "pack.tar.xz")
                    else:
                        write(find_runs(runs), scratch / f"{write.__name__}.html", force=True)  # type: ignore[operator]
                except AltGradError:
                    refused = True
            finding = verify_run(victim)
    except Hang:
        return "hang", done
    except Exception:
        return "traceback", f"{done}\n{traceback.format_exc(limit=-3)}"
    forged = done.startswith("forged")
    if changed and not forged and finding.whole and finding.status in ("completed", "collapsed"):
        return "silent", done
    return ("refused" if refused else "reported"), done


def main() -> int:
    """Run the cases and print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case by its number")
    parser.add_argument("--record", type=Path, help="also keep the counts in this file, and go on from those in it")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        make_runs(Path(folder) / "base")

        def judged(number: int) -> str:
            verdict, done = judge(Path(folder) / "base", Path(folder), random.Random(f"{arguments.seed} {number}"))
            if verdict not in ("reported", "refused"):
                print(f"case {number}: {verdict}: {done}", flush=True)
            return verdict

        if arguments.only is not None:
            print(judged(arguments.only))
            return 0
        verdicts = count_cases(arguments.record, "fuzz records", arguments.seed, arguments.count, judged)
    print(f"{sum(verdicts.values())} damaged folders, seed {arguments.seed}: {dict(verdicts)}")
    return int(any(verdicts[fault] for fault in FUZZ_FAULTS))


if __name__ == "__main__":
    sys.exit(main())
