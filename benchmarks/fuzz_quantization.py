"""Calls `altgrad.quantization` with whatever a person can hand it, and counts what is neither right nor refused.

    python -m benchmarks.fuzz_quantization --count 100000 --seed 0 --work FOLDER
    python -m benchmarks.fuzz_quantization --count 100000 --seed 0 --work FOLDER --again    # its faults alone, once more
    python -m benchmarks.fuzz_quantization --seed 0 --only 4711     # one case, in this process, with its traceback

Every case is drawn from (seed, number): function, format, tensors of every layout, device, dtype and subclass, scales, keys,
options, `out`, flags and functional transforms. A sound call must give the oracle's bits; a call that makes no sense must
raise an AltGradError; one between may do either. Workers are processes, so that a crash or a hang is counted with the
number that reproduces it, and the rest goes on.

What was judged stays in the folder, one line per case, and is not run again: a run that is cut off goes on where it was.
Each stretch of lines stands under the hash of the sources that judged it, and the summary says how many are by the present.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RIGHT = ("bits", "refused", "shape")
FAULTS = ("crash", "hang", "foreign", "wrong", "accepted", "overrefused")
HANG_SECONDS = 300.0  # a case may compile several loops, on a busy machine
RANGE = 500  # cases of one file
ROOT = Path(__file__).parent.parent
JUDGED = ("altgrad/errors.py", "altgrad/formats", "altgrad/jit", "altgrad/quantization", "altgrad/randomness.py")


class Line(NamedTuple):
    """What the folder keeps of one case."""

    index: int
    verdict: str
    fault: dict  # empty where the verdict is right
    sources: str


def sources_hash() -> str:
    """A hash of what decides a verdict: the numerics, and the fuzzer itself."""
    files = [ROOT / name for name in (*JUDGED, "benchmarks/fuzz")]
    found = sorted(f for path in files for f in ([path] if path.is_file() else path.rglob("*.py")))
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in found)).hexdigest()[:12]


def _file(folder: Path, seed: int, first: int) -> Path:
    return folder / f"seed{seed}-{first:08d}.txt"


def kept(path: Path) -> Iterator[Line]:
    """The lines of one file; a line that a stopped process left behind half written is none."""
    sources = ""
    for line in path.read_text().splitlines() if path.exists() else ():
        first, _, rest = line.partition(" ")
        if first == "#":
            sources = rest
        elif rest and (rest[0] != "{" or rest[-1] == "}"):
            fault = json.loads(rest) if rest[0] == "{" else {}
            yield Line(int(first), fault.get("verdict", rest), fault, sources)


def _keep(path: Path, lines: list[Line]) -> None:
    """Replace a file by these lines."""
    text, sources = "", ""
    for line in lines:
        text += f"# {line.sources}\n" if line.sources != sources else ""
        sources = line.sources
        text += f"{line.index} {json.dumps(line.fault) if line.fault else line.verdict}\n"
    path.write_text(text)


def work(seed: int, folder: Path, ranges: list[tuple[int, int]]) -> None:
    """Judge what the files of some ranges lack; a number stands in its file before its case runs."""
    import torch

    from benchmarks.fuzz.calls import draw_case
    from benchmarks.fuzz.judge import judge

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sources = sources_hash()
    for first, count in ranges:
        path = _file(folder, seed, first)
        done = {line.index for line in kept(path)}
        waiting = [index for index in range(first, first + count) if index not in done]
        if not waiting:
            continue
        with path.open("a", buffering=1) as lines:
            lines.write(f"# {sources}\n")
            for index in waiting:
                lines.write(f"{index} ")
                lines.flush()
                case = draw_case(seed, index)
                verdict, words = judge(case)
                fault = {"index": index, "verdict": verdict, "says": case.says, "words": words}
                lines.write((json.dumps(fault) if verdict in FAULTS else verdict) + "\n")


class Worker:
    """A process that works through some ranges and is started again behind a case that ends or stops it."""

    def __init__(self, seed: int, folder: Path, ranges: list[tuple[int, int]]):
        self.seed, self.folder, self.ranges = seed, folder, ranges
        self.last_size, self.moved = -1, time.monotonic()
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        self.moved = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.fuzz_quantization", "--seed", str(self.seed)]
        command += ["--work", str(self.folder), "--ranges", json.dumps(self.ranges)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _newest(self) -> Path | None:
        """The file that was written to last."""
        found = [path for first, _ in self.ranges if (path := _file(self.folder, self.seed, first)).exists()]
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)

    def step(self) -> bool:
        """Look after the process; whether its ranges are done."""
        code, path = self.process.poll(), self._newest()
        if code == 0:
            return True
        size = path.stat().st_size if path else 0
        if size != self.last_size:
            self.last_size, self.moved = size, time.monotonic()
        hung = code is None and time.monotonic() - self.moved > HANG_SECONDS
        if hung:
            self.process.kill()
            self.process.wait()
        if hung or code is not None:
            if path is None or path.read_text()[-1] == "\n":
                raise RuntimeError("a worker ended before its first case; run it with --only 0 to see why")
            words = f"no answer in {HANG_SECONDS:.0f} s" if hung else f"exit status {code}"
            at = int(path.read_text().splitlines()[-1])
            with path.open("a") as lines:
                lines.write(json.dumps({"index": at, "verdict": "hang" if hung else "crash", "words": words}) + "\n")
            self.process = self._start()
        return False


def run(count: int, seed: int, workers: int, folder: Path, first: int = 0, again: bool = False) -> list[Line]:
    """What the folder has of cases first .. first + count - 1 once all of them are judged, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    ranges = [(start, min(RANGE, first + count - start)) for start in range(first, first + count, RANGE)]
    files = [_file(folder, seed, start) for start, _ in ranges]
    for path in files:
        if path.exists():
            _keep(path, [line for line in kept(path) if not (again and line.fault)])
    crew = [Worker(seed, folder, ranges[part::workers]) for part in range(min(workers, len(ranges)))]
    try:
        waiting = list(crew)
        while waiting:
            waiting = [worker for worker in waiting if not worker.step()]
            time.sleep(0.2)
    finally:
        for worker in crew:
            if worker.process.poll() is None:
                worker.process.kill()
    return sorted(line for path in files for line in kept(path) if first <= line.index < first + count)


def only(seed: int, index: int) -> None:
    """Run one case here, with its traceback."""
    import faulthandler

    import torch

    from benchmarks.fuzz.calls import draw_case
    from benchmarks.fuzz.judge import judge

    faulthandler.enable()
    torch.set_num_threads(1)
    print(draw_case(seed, index).says, flush=True)
    print(*judge(draw_case(seed, index)), flush=True)
    draw_case(seed, index).call()


def summary(lines: list[Line], seed: int, seconds: float) -> str:
    """The one line that the documents quote."""
    verdicts = Counter(line.verdict for line in lines)
    sources = sources_hash()
    present = sum(line.sources == sources for line in lines)
    words = ", ".join(f"{name} {verdicts[name]}" for name in (*RIGHT, *FAULTS))
    return f"{len(lines)} calls ({present} by the present sources), seed {seed}, {seconds:.0f} s: {words}"


def main() -> None:
    """Parse, run, print; exit status 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="folder that keeps what was judged, to go on from")
    parser.add_argument("--again", action="store_true", help="judge once more what the folder has as faults")
    parser.add_argument("--only", type=int, help="run one case in this process")
    parser.add_argument("--ranges", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranges:
        work(arguments.seed, arguments.work, json.loads(arguments.ranges))
        return
    if arguments.only is not None:
        only(arguments.seed, arguments.only)
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        given = (arguments.count, arguments.seed, arguments.workers, arguments.work or Path(scratch))
        lines = run(*given, arguments.first, arguments.again)
    for fault in (line.fault for line in lines if line.fault):
        print(f"{fault['verdict']:12s} {fault['index']:7d}  {fault['words']}\n{'':22s}{fault.get('says', '')}")
    print(summary(lines, arguments.seed, time.monotonic() - started))
    sys.exit(any(line.fault for line in lines))


if __name__ == "__main__":
    main()
