"""Reports on a folder of 2,000 synthetic runs and prints how long it took and how much memory: `python -m benchmarks.bench_study`.

Budget: 60 s and 2 GB. Half of the runs carry monitor records (12 layers, 3 roles, 10 steps).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.run_folders import make_run

FORMATS = ("FP32", "E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E7M0")
OPTIMIZERS = ("adamw", "madam", "manifold_adamw", "sgd", "lion")
PROGRAM = """
import resource, sys, time
start, cpu = time.perf_counter(), time.process_time()
from altgrad.analysis import write_study
page = write_study(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
print(f"{time.perf_counter() - start:.1f} s ({time.process_time() - cpu:.1f} s of CPU), {peak:.2f} GiB, page {page.stat().st_size / 1e6:.1f} MB")
"""


def make_runs(root: Path, runs: int) -> None:
    """`runs` runs of 500 steps: 8 formats x 5 optimizers x 2 storages x seeds."""
    made = 0
    seed = 0
    while made < runs:
        for optimizer in OPTIMIZERS:
            for storage in ("grid", "master"):
                for fmt in FORMATS:
                    if made == runs:
                        return
                    frozen = fmt == "E7M0" and storage == "grid"
                    make_run(
                        root,
                        fmt,
                        seed=seed,
                        optimizer=optimizer,
                        storage=storage,
                        collapse="freeze" if frozen else None,
                        monitor_interval=50 if made % 2 else 0,
                    )
                    made += 1
        seed += 1


def main(runs: int = 2000) -> None:
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        make_runs(Path(root), runs)
        print(f"made {runs} runs in {time.perf_counter() - start:.0f} s", flush=True)
        subprocess.run([sys.executable, "-c", PROGRAM, root], check=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
