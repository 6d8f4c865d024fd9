"""Runs the numeric tests as other CPUs would: three classes by the switches of torch, oneDNN, MKL and Numba.

    python -m benchmarks.cpu_classes                  # every class the host can stand for, and every route forced
    python -m benchmarks.cpu_classes --classes avx2   # one of them; `--write` leaves the others' rows of the record

A class limits which instructions are used; it cannot add any, so a class above the host is printed as not run. Compiled
loops of each class are kept apart in `.cpu_classes/`. Run are the tests whose figures a CPU can change: compiled loops,
matrix products and layers; refusals, formats and texts are the same everywhere. On the host itself `make test` runs them,
so there the routes are forced alone: each wherever its products are exact (`--gemm-route` of the tests). Prints one table
and ends with status 1 where a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from altgrad.nn.layer.gemm import Route
from altgrad.records.machine import processor_name

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).parent / "results" / "cpu-classes.json"
NUMERIC = tuple(f"tests/quantization/test_{name}.py" for name in ("blocks", "cpu", "products", "scaling"))
FUSED = ("tests/optim/test_fused.py",)
PRODUCTS = ("tests/nn/test_gemm.py", "tests/nn/test_layers.py")
WORKERS = ("-n", "2", "--dist", "loadfile")  # a file's loops are compiled once


@dataclass(frozen=True)
class CpuClass:
    """A class of CPU: the capability that the host must have, and the switches that hold every library to it."""

    says: str
    needs: str
    switches: dict[str, str]


CLASSES = {
    "avx2": CpuClass(
        "AVX2, no AVX-512 (Intel before 2017 servers, AMD before Zen 4)",
        "avx2",
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "NUMBA_CPU_NAME": "haswell",
            "NUMBA_CPU_FEATURES": "",
        },
    ),
    "avx512": CpuClass(
        "AVX-512 with VNNI, without BF16 and AMX (Cascade Lake)",
        "avx512_vnni",
        {
            "ATEN_CPU_CAPABILITY": "avx512",
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
            "MKL_ENABLE_INSTRUCTIONS": "AVX512",
            "NUMBA_CPU_NAME": "cascadelake",
            "NUMBA_CPU_FEATURES": "+avx512vnni",
        },
    ),
    "host": CpuClass("the host as it is", "", {}),
}


@dataclass
class Outcome:
    """One line of the table."""

    cpu: str
    tests: str
    passed: int = 0
    failed: int = 0
    other: str = ""
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


def can_stand_for(cpu: CpuClass) -> bool:
    """Whether the host has the instructions of the class."""
    return not cpu.needs or bool(torch.cpu.get_capabilities().get(cpu.needs))


def run(name: str, label: str, tests: tuple[str, ...], extra: tuple[str, ...] = ()) -> Outcome:
    """Run tests as that class of CPU."""
    switches = {**CLASSES[name].switches, "NUMBA_CACHE_DIR": str(ROOT / ".cpu_classes" / name)}
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *WORKERS, *tests, *extra]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **switches}, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or ["no output"]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    broken = tuple(line.split(" - ")[0][7:] for line in lines if line.startswith(("FAILED ", "ERROR  ")))
    failed = counts.get("failed", 0) + counts.get("error", 0)
    words = f"{counts['skipped']} skipped" if "skipped" in counts else ""
    if done.returncode not in (0, 1):
        words, failed = f"exit status {done.returncode}: {lines[-1][:80]}", max(failed, 1)
    return Outcome(name, label, counts.get("passed", 0), failed, words, round(time.monotonic() - started), broken)


def main() -> None:
    """Run the classes, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--classes", nargs="*", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/cpu-classes.json")
    arguments = parser.parse_args()
    outcomes = []
    for name in arguments.classes:
        if not can_stand_for(CLASSES[name]):
            outcomes.append(Outcome(name, "numeric", other=f"not run: this CPU has no {CLASSES[name].needs}"))
            continue
        if CLASSES[name].switches:
            outcomes.append(run(name, "loops, products, optimizers", NUMERIC + FUSED))
        outcomes += [run(name, f"products by {r.value}", PRODUCTS, (f"--gemm-route={r.value}",)) for r in cpu_routes()]
    print(f"{processor_name()}, torch {torch.__version__}")
    print(f"{'class':8s} {'tests':28s} {'passed':>7s} {'failed':>7s} {'s':>6s}")
    for o in outcomes:
        print(f"{o.cpu:8s} {o.tests:28s} {o.passed:7d} {o.failed:7d} {o.seconds:6.0f}  {o.other}".rstrip())
        for failure in o.failures:
            print(f"{'':8s} failed: {failure}")
    if arguments.write:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": []}
        others = [row for row in record["rows"] if row["cpu"] not in arguments.classes]
        rows = sorted(others + [asdict(o) for o in outcomes], key=lambda row: list(CLASSES).index(row["cpu"]))
        record = {"cpu": processor_name(), "torch": torch.__version__, "rows": rows}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(any(o.failed for o in outcomes))


def cpu_routes() -> list[Route]:
    """The routes that a CPU can take."""
    return [route for route in Route if route.value != "tf32"]


if __name__ == "__main__":
    main()
