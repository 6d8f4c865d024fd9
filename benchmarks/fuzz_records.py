"""Damages run folders in every way and reports on them: `python -m benchmarks.fuzz_records --count 2000 --seed 0`.

Each case is drawn from (seed, number): one of three finished runs (from the committed packs, with checksums) has a file cut,
flipped, emptied, deleted or rewritten with a hostile value. Then both reports are written and the folder is verified. Counted
are tracebacks (anything but an AltGradError), hangs (more than 10 s of processor time), and silent cases (the records differ
from what was written and `verify` says that the finished run is whole). Exit code 1 where one of them is not 0.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import yaml

from altgrad.analysis import write_report, write_study
from altgrad.errors import AltGradError
from altgrad.records.documents import CONFIG, CRASHES, ENVIRONMENT, RESULT
from altgrad.records.metrics_log import METRICS
from altgrad.records.run import Run, find_runs
from altgrad.records.verify import verify_run
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
HANG_SECONDS = 10.0


def make_runs(folder: Path) -> None:
    """Three finished runs with checksums: a baseline, one that froze, one that was shifted."""
    for group in "acd":
        path = find_runs(RESULTS / group)[0]
        thin(Run(path), folder / path.name, every=1)


def damage(folder: Path, rng: random.Random) -> str:
    """Change one file of a run folder; returns what was done."""
    path = folder / rng.choice(FILES)
    content = path.read_bytes()
    how = rng.choice(("cut", "flip", "empty", "delete", "drop a line", "value", "value", "value", "crashes"))
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
    node = document
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.4:
            node[key] = "@"
            break
        node = node[key]
    return json.dumps(document).replace('"@"', rng.choice(HOSTILE)).encode("utf-8", "surrogatepass")


def judge(base: Path, scratch: Path, rng: random.Random) -> tuple[str, str]:
    """(verdict, what was done) of one case."""
    runs = scratch / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(base, runs)
    victim = rng.choice(sorted(runs.iterdir()))
    before = {file.name: file.read_bytes() for file in victim.iterdir()}
    done = damage(victim, rng)
    changed = {file.name: file.read_bytes() for file in victim.iterdir()} != before
    begun, refused = time.process_time(), False
    for write in (write_report, write_study):
        try:
            folders = find_runs(runs)
            write(folders, scratch / f"{write.__name__}.html", force=True)
        except AltGradError:
            refused = True
        except Exception:
            return "traceback", f"{done}\n{traceback.format_exc(limit=-3)}"
    finding = verify_run(victim)
    if time.process_time() - begun > HANG_SECONDS:
        return "hang", done
    if changed and finding.whole and finding.status in ("completed", "collapsed"):
        return "silent", done
    return ("refused" if refused else "reported"), done


def main() -> int:
    """Run the cases and print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case by its number")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    verdicts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        make_runs(Path(folder) / "base")
        for number in range(arguments.count) if arguments.only is None else (arguments.only,):
            rng = random.Random(f"{arguments.seed} {number}")
            verdict, done = judge(Path(folder) / "base", Path(folder), rng)
            verdicts[verdict] += 1
            if verdict not in ("reported", "refused"):
                print(f"case {number}: {verdict}: {done}", flush=True)
    print(f"{sum(verdicts.values())} damaged folders, seed {arguments.seed}: {dict(verdicts)}")
    return int(any(verdicts[fault] for fault in ("traceback", "hang", "silent")))


if __name__ == "__main__":
    sys.exit(main())
