"""What a run costs beside other programs: CPU seconds on a machine that does nothing else, and beside busy processes.

    python -m benchmarks.bench_load [--busy 6] [--rounds 2] [--json FILE]

Each row is a command in processes of its own, alone and beside busy ones in turn; CPU seconds are user and system of all its
threads, so waiting costs nothing unless it spins. `as OpenMP waits` gives GNU OpenMP its own spin count back, which the
command line lowers; it is run once. The machine must be quiet: what else runs is load in both columns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from altgrad.training.run.demo import DEMO_SIZE
from benchmarks._timing import keep_record

BUDGET = 1.3  # CPU seconds beside busy processes over those alone
OPENMPS_OWN = {"GOMP_SPINCOUNT": "300000"}  # libgomp's default where threads do not outnumber cores
_DEMO = ["demo", "--steps", "10", "--minutes", "0", "--runs-dir", "{folder}"]
_TWO_THREADS = ["run", "{folder}/config.yaml", "fp8_format=E3M4", "threads=2", "max_steps=20"]
ROWS = {
    "altgrad demo, 10 steps": (_DEMO, {}),
    "a run of its size on two threads, 20 steps": (_TWO_THREADS, {}),
    "the same as OpenMP waits": (_TWO_THREADS, OPENMPS_OWN),
}


def cost(arguments: list[str], more: dict[str, str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one command in a fresh folder."""
    own = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    folder = tempfile.mkdtemp()
    try:
        config = {**DEMO_SIZE, "runs_dir": folder, "weight_storage": "grid"}
        Path(folder, "config.yaml").write_text(repr(config).replace("'", '"'))  # JSON is YAML
        command = [sys.executable, "-m", "altgrad", *(a.format(folder=folder) for a in arguments)]
        began = time.perf_counter()
        process = subprocess.Popen(command, env={**own, **more}, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        return used.ru_utime + used.ru_stime, time.perf_counter() - began
    finally:
        shutil.rmtree(folder)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--busy", type=int, default=6, help="processes beside it")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="also keep the record in this file")
    args = parser.parse_args()
    for arguments in (_DEMO, _TWO_THREADS):  # compiles what is not kept yet
        cost(arguments, {})
    print(f"{'CPU seconds (wall)':44} {'alone':>13} {f'beside {args.busy}':>14} {'ratio':>6}  budget {BUDGET}")
    rows = {}
    for name, (arguments, more) in ROWS.items():
        alone, loaded = [], []
        for _ in range(1 if more else args.rounds):  # what is only set beside the others, and slow, once
            alone.append(cost(arguments, more))
            with busy(args.busy):
                loaded.append(cost(arguments, more))
        middle = [[statistics.median(values) for values in zip(*runs, strict=True)] for runs in (alone, loaded)]
        (cpu, wall), (cpu_loaded, wall_loaded) = middle
        ratio = cpu_loaded / cpu
        said = "" if more else "holds" if ratio <= BUDGET else "missed"
        print(
            f"{name:44} {cpu:6.1f} ({wall:4.1f}) {cpu_loaded:7.1f} ({wall_loaded:4.1f}) {ratio:6.2f}  {said}",
            flush=True,
        )
        rows[name] = {"alone_cpu_s": cpu, "alone_s": wall, "loaded_cpu_s": cpu_loaded, "loaded_s": wall_loaded}
    if args.json:
        keep_record(args.json, "load", {"busy": args.busy, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
