"""Calls `altgrad.quantization` with whatever a person can hand it, and counts what is neither right nor refused.

    python -m benchmarks.fuzz_quantization --count 100000 --seed 0
    python -m benchmarks.fuzz_quantization --seed 0 --only 4711     # one case, in this process, with its traceback

Every case is drawn from (seed, number): function, format, tensors of every layout, device, dtype and subclass, scales, keys,
options, `out`, flags and functional transforms. A sound call must give the oracle's bits; a call that makes no sense must
raise an AltGradError; one between may do either. Workers are processes, so that a crash or a hang is counted with the
number that reproduces it, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

RIGHT = ("bits", "refused", "shape")
FAULTS = ("crash", "hang", "foreign", "wrong", "accepted", "overrefused")
HANG_SECONDS = 300.0  # a case may compile several loops, on a busy machine


def work(seed: int, first: int, count: int, report: Path) -> None:
    """Run cases first .. first + count - 1, writing each number to the report before it runs and its fault after."""
    import torch

    from benchmarks.fuzz.calls import draw_case
    from benchmarks.fuzz.judge import judge

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with report.open("a", buffering=1) as lines:
        verdicts: Counter[str] = Counter()
        for index in range(first, first + count):
            lines.write(f"{index}\n")
            case = draw_case(seed, index)
            verdict, words = judge(case)
            verdicts[verdict] += 1
            if verdict in FAULTS:
                lines.write(json.dumps({"index": index, "verdict": verdict, "says": case.says, "words": words}) + "\n")
            if index % 50 == 49 or index == first + count - 1:
                lines.write(json.dumps({"verdicts": verdicts}) + "\n")
                verdicts = Counter()


class Worker:
    """A process that works through a range of cases and is started again behind one that ends or stops it."""

    def __init__(self, seed: int, first: int, count: int, folder: Path):
        self.seed, self.first, self.end = seed, first, first + count
        self.report = folder / f"{first}.txt"
        self.faults: list[dict] = []
        self.verdicts: Counter[str] = Counter()
        self.at, self.read, self.moved = first, 0, time.monotonic()
        self.process = self._start(first)

    def _start(self, first: int) -> subprocess.Popen:
        self.moved = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.fuzz_quantization", "--seed", str(self.seed)]
        command += ["--work", str(first), str(self.end - first), str(self.report)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _follow(self) -> None:
        if not self.report.exists():
            return
        with self.report.open() as lines:
            lines.seek(self.read)
            for line in iter(lines.readline, ""):
                if not line.endswith("\n"):
                    break
                self.read += len(line.encode())
                self.moved = time.monotonic()
                if line[0] != "{":
                    self.at = int(line)
                    continue
                entry = json.loads(line)
                self.verdicts.update(entry.get("verdicts", {}))
                if "index" in entry:
                    self.faults.append(entry)

    def step(self) -> bool:
        """Look after the process; whether its range is done."""
        code = self.process.poll()
        self._follow()
        if code == 0:
            return True
        hung = code is None and time.monotonic() - self.moved > HANG_SECONDS
        if hung:
            self.process.kill()
            self.process.wait()
        if hung or code is not None:
            words = f"no answer in {HANG_SECONDS:.0f} s" if hung else f"exit status {code}"
            self.faults.append({"index": self.at, "verdict": "hang" if hung else "crash", "words": words})
            if not self.report.exists():
                raise RuntimeError("a worker ended before its first case; run it with --only 0 to see why")
            if self.at + 1 >= self.end:
                return True
            self.process = self._start(self.at + 1)
        return False


def run(count: int, seed: int, workers: int, first: int = 0) -> tuple[Counter[str], list[dict]]:
    """(verdicts, faults) of cases first .. first + count - 1; the faults of crashed ranges are among them."""
    with tempfile.TemporaryDirectory() as name:
        each = -(-count // workers)
        ranges = [(first + i * each, min(each, count - i * each)) for i in range(workers) if i * each < count]
        crew = [Worker(seed, start, size, Path(name)) for start, size in ranges]
        try:
            waiting = list(crew)
            while waiting:
                waiting = [worker for worker in waiting if not worker.step()]
                time.sleep(0.2)
        finally:
            for worker in crew:
                if worker.process.poll() is None:
                    worker.process.kill()
    faults = sorted((fault for worker in crew for fault in worker.faults), key=lambda fault: fault["index"])
    verdicts = sum((worker.verdicts for worker in crew), Counter())
    for fault in faults:
        if fault["verdict"] in ("crash", "hang"):
            verdicts[fault["verdict"]] += 1
    return verdicts, faults


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


def main() -> None:
    """Parse, run, print; exit status 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, help="run one case in this process")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.seed, int(arguments.work[0]), int(arguments.work[1]), Path(arguments.work[2]))
        return
    if arguments.only is not None:
        only(arguments.seed, arguments.only)
        return
    started = time.monotonic()
    verdicts, faults = run(arguments.count, arguments.seed, arguments.workers, arguments.first)
    for fault in faults:
        print(f"{fault['verdict']:12s} {fault['index']:7d}  {fault['words']}\n{'':22s}{fault.get('says', '')}")
    words = ", ".join(f"{name} {verdicts[name]}" for name in (*RIGHT, *FAULTS))
    print(f"{arguments.count} calls, seed {arguments.seed}, {time.monotonic() - started:.0f} s: {words}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
