"""Long runs and large studies: `python -m benchmarks.long_run [steps] [lines] [study]`, each printed with its limit.

`steps`: 10,000 steps with everything on; memory and open files must be flat: after the first fifth no more than 16 MB and no
file are added. `lines`: a report on a metrics file of a million lines, in 60 s and 1 GB. `study`: a report on 2,000 synthetic
runs of 500 steps, half of them with monitor records, in 60 s and 2 GB. Exit code 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._timing import keep_record
from tests.run_folders import make_run

FORMATS = ("FP32", "E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E7M0")
OPTIMIZERS = ("adamw", "madam", "manifold_adamw", "sgd", "lion")
REPORT = """
import json, resource, sys, time
start = time.perf_counter()
from altgrad.analysis import {write}
page = {write}({runs})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(dict(seconds=time.perf_counter() - start, peak_mb=peak, page_mb=page.stat().st_size / 1e6)))
"""
MOST_ADDED_MB = 16
ALL_ON: dict[str, Any] = {
    "name": "long", "seed": 7, "threads": 1, "checkpoint_interval": 250, "keep_checkpoints": 3, "fp8_format": "E3M4",
    "weight_storage": "grid", "rounding": "stochastic", "enable_partition_clipping": True, "enable_emergency_shift": True,
    "model": {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16}, "data": {"batch_size": 4},
    "optimizer": {"warmup_steps": 10, "lr": 1e-3}, "evaluation": {"interval": 50, "batches": 1}, "verdict": {"stop": False},
    "monitor": {"enabled": True, "interval": 5, "schedule": {"rank": 50}}, "trackers": {"tensorboard": True},
}  # fmt: skip


def steps(count: int, folder: Path) -> dict[str, Any]:
    """Train with everything on; memory (MB) and open files at twenty places."""
    from altgrad.training.config.loading import load_config
    from altgrad.training.data import corpus_from_bytes
    from altgrad.training.format_runner import FormatExperimentRunner, RunListener

    class Watch(RunListener):
        seen: list[tuple[int, float, int]] = []  # noqa: RUF012

        def stepped(self, record: Any, tokens_per_s: float) -> None:
            if record.step % max(1, count // 20) == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
                self.seen.append((record.step, round(memory, 1), len(os.listdir("/proc/self/fd"))))

    corpus = corpus_from_bytes(b"the quick brown fox jumps over the lazy dog. " * 400, 0.1, "a sentence")
    config = load_config({**ALL_ON, "max_steps": count, "runs_dir": str(folder)})
    begun = time.monotonic()
    FormatExperimentRunner(config, data_dir=corpus, listener=Watch()).run()
    _, memory, files = Watch.seen[len(Watch.seen) // 5]
    added = max(m for _, m, _ in Watch.seen[len(Watch.seen) // 5 :]) - memory
    more_files = max(f for *_, f in Watch.seen[len(Watch.seen) // 5 :]) - files
    held = added <= MOST_ADDED_MB and more_files <= 0
    seconds = round(time.monotonic() - begun)
    return {"steps": count, "seconds": seconds, "added_mb": round(added, 1), "files_added": more_files, "held": held,
            "memory_mb": Watch.seen}  # fmt: skip


def lines(count: int, folder: Path) -> dict[str, Any]:
    """Report on a run whose metrics file has that many lines, most of them the monitor's."""
    from altgrad.records.metrics_log import line_of

    run = make_run(folder, "E3M4", steps=500)
    monitored = {"overflow": 1e-3, "underflow": 0.02, "stall_rate": 0.5, "flip_rate": 0.1, "sqnr_db": 25.5, "amax": 3.5}
    with (run / "metrics.jsonl").open("wb") as stream:
        written = 0
        while written < count:
            step = written // 41 + 1
            stream.write(line_of({"kind": "step", "step": step, "loss": 5 / step**0.1, "lr": 1e-3, "stall_rate": 0.5}))
            for layer in range(20):
                for role in ("input", "weight"):
                    stream.write(
                        line_of({"kind": "monitor", "step": step, "layer": f"l{layer}", "role": role, **monitored})
                    )
            written += 41
    result = json.loads((run / "result.json").read_text())
    result.pop("checksum", None)
    result.pop("files", None)
    (run / "result.json").write_text(json.dumps(result))
    size = (run / "metrics.jsonl").stat().st_size / 1e6
    measured = _report("write_report", f"{[str(run)]!r}, {str(folder / 'page.html')!r}")
    held = measured["seconds"] <= 60 and measured["peak_mb"] <= 1000
    return {"lines": written, "file_mb": round(size), **measured, "held": held}


def study(count: int, folder: Path) -> dict[str, Any]:
    """Report on many synthetic runs: 8 formats x 5 optimizers x 2 storages x seeds."""
    made = 0
    while made < count:
        seed, place = divmod(made, len(OPTIMIZERS) * 2 * len(FORMATS))
        optimizer = OPTIMIZERS[place // (2 * len(FORMATS))]
        storage, fmt = ("grid", "master")[place // len(FORMATS) % 2], FORMATS[place % len(FORMATS)]
        frozen = "freeze" if fmt == "E7M0" and storage == "grid" else None
        interval = 50 if made % 2 else 0
        make_run(
            folder, fmt, seed=seed, optimizer=optimizer, storage=storage, collapse=frozen, monitor_interval=interval
        )
        made += 1
    measured = _report("write_study", repr(str(folder)))
    return {"runs": made, **measured, "held": measured["seconds"] <= 60 and measured["peak_mb"] <= 2000}


def _report(write: str, runs: str) -> dict[str, float]:
    program = REPORT.format(write=write, runs=runs)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return {name: round(value, 1) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


PARTS = {"steps": (steps, 10_000), "lines": (lines, 1_000_000), "study": (study, 2000)}


def main() -> int:
    """Run the parts and print what they took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--count", type=int, help="fewer or more steps, lines or runs")
    parser.add_argument("--record", type=Path, help="also keep the numbers in this file")
    arguments = parser.parse_args()
    held = True
    for name in arguments.parts:
        part, count = PARTS[name]
        with tempfile.TemporaryDirectory() as folder:
            found = part(arguments.count or count, Path(folder))
        held &= found["held"]
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
        if arguments.record is not None:
            keep_record(arguments.record, f"long {name}", found)
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
