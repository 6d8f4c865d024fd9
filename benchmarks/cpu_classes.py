"""Runs the numeric tests as other CPUs would: three classes by the switches of torch, oneDNN, MKL and Numba.

    python -m benchmarks.cpu_classes                  # every class the host can stand for, and every route forced
    python -m benchmarks.cpu_classes --classes avx2   # one of them; `--write` leaves the others' rows as they are

A class limits which instructions are used; it cannot add any, so a class above the host is printed as not run. Compiled
loops of each class are kept apart in `.cpu_classes/`. Run are the tests whose numbers a CPU can change: compiled loops,
matrix products and layers; refusals, formats and texts are the same everywhere. On the host itself `make test` runs them,
so there the routes are forced alone: each wherever its products are exact (`--gemm-routes` of the tests). A row of the
table is one file of tests on one class; `--write` keeps each as it ends, and rows that passed are not run again on the
same CPU with the same sources. Prints one table and ends with status 1 where a test failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from altgrad.nn.layer.gemm import Route
from altgrad.records.machine import processor_name

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).parent / "results" / "cpu-classes.json"
NUMERIC = (
    *(f"tests/quantization/test_{name}.py" for name in ("accumulator", "blocks", "cpu", "products", "scaling")),
    "tests/optim/test_fused.py",
    "tests/nn/test_code_products.py",
)
PRODUCTS = ("tests/nn/test_gemm.py", "tests/nn/test_layers.py", "tests/nn/test_ragged_blocks.py")
ROUTES = tuple(route.value for route in Route)
AT_ONCE = 2


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
            "NUMBA_CPU_FEATURES": "+avx2,+fma",
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
            "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx512f,+avx512bw,+avx512vnni",
        },
    ),
    "host": CpuClass("the host as it is", "", {}),
}


@dataclass
class Row:
    """One line of the table: a file of tests on one class of CPU."""

    cpu: str
    tests: str
    routes: tuple[str, ...] = ()
    passed: int = 0
    failed: int = 0
    other: str = ""
    seconds: int = 0
    failures: tuple[str, ...] = ()
    sources: str = ""


def can_stand_for(cpu: CpuClass) -> bool:
    """Whether the host has the instructions of the class."""
    return not cpu.needs or bool(torch.cpu.get_capabilities().get(cpu.needs))


def sources(row: Row) -> str:
    """A checksum of the library and of a row's tests (and, with routes, of what forces them)."""
    tests = [ROOT / row.tests, *([ROOT / "tests/conftest.py"] if row.routes else [])]
    files = sorted((ROOT / "altgrad").rglob("*.py")) + tests
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def rows_of(name: str) -> list[Row]:
    """What is to be run as that class of CPU."""
    if not can_stand_for(CLASSES[name]):
        return [Row(name, "all", other=f"not run: this CPU has no {CLASSES[name].needs}")]
    numeric = [Row(name, file) for file in NUMERIC] if CLASSES[name].switches else []
    return numeric + [Row(name, file, ROUTES) for file in PRODUCTS]


def run(row: Row) -> Row:
    """Run a row's tests as that class of CPU."""
    if row.other:
        return row
    switches = {**CLASSES[row.cpu].switches, "NUMBA_CACHE_DIR": str(ROOT / ".cpu_classes" / row.cpu)}
    started = time.monotonic()
    routes = [f"--gemm-routes={','.join(row.routes)}"] if row.routes else []
    options = ["-q", "-p", "no:cacheprovider", "-rfE", "--timeout=1800"]  # each class compiles its own loops
    command = [sys.executable, "-m", "pytest", *options, row.tests, *routes]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **switches}, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or ["no output"]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    failures = tuple(line.split(" - ")[0].split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR ")))
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if row.routes:
        other = f"{counts.get('skipped', 0)} have no product for the route"
    else:
        other = f"{counts['skipped']} skipped" if "skipped" in counts else ""
    if done.returncode not in (0, 1):
        other, failed = f"exit status {done.returncode}: {lines[-1][:80]}", max(failed, 1)
    found = {"passed": counts.get("passed", 0), "failed": failed, "other": other, "failures": failures}
    return replace(row, **found, seconds=round(time.monotonic() - started), sources=sources(row))


def kept(processor: str) -> list[Row]:
    """The record's rows, of this CPU."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": []}
    rows = [Row(**row | {"routes": tuple(row["routes"]), "failures": tuple(row["failures"])}) for row in record["rows"]]
    return rows if record.get("cpu") == processor else []


def main() -> None:
    """Run the classes, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--classes", nargs="*", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/cpu-classes.json")
    arguments = parser.parse_args()
    processor, asked = processor_name(), arguments.classes
    rows = {(row.cpu, row.tests): row for row in kept(processor)} if arguments.write else {}
    wanted = [row for name in asked for row in rows_of(name)]
    whole = [(row.cpu, row.tests) for name in CLASSES for row in rows_of(name)]

    def is_done(row: Row) -> bool:
        known = rows.get((row.cpu, row.tests))
        return known is not None and known.sources == sources(row) and not known.failed

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for row in pool.map(run, [row for row in wanted if not is_done(row)]):
            rows[row.cpu, row.tests] = row
            print(line_of(row), flush=True)
            if arguments.write:
                ordered = [asdict(rows[key]) for key in whole if key in rows]
                record = {"cpu": processor, "torch": torch.__version__, "rows": ordered}
                RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{processor}, torch {torch.__version__}\n{HEAD}")
    table = [rows[key] for key in whole if key in rows and key[0] in asked]
    print("\n".join(line_of(row) for row in table))
    sys.exit(any(row.failed for row in table))


HEAD = f"{'class':8s} {'tests':38s} {'passed':>7s} {'failed':>7s} {'s':>6s}"


def line_of(row: Row) -> str:
    """One line of the table, and one for each failure."""
    tests = row.tests + (", every route" if row.routes else "")
    line = f"{row.cpu:8s} {tests:38s} {row.passed:7d} {row.failed:7d} {row.seconds:6d}  {row.other}".rstrip()
    return "\n".join([line, *(f"{'':8s} failed: {failure}" for failure in row.failures)])


if __name__ == "__main__":
    main()
