"""What one call costs on a tensor too small to matter: microseconds, against the budgets of the design.

    python -m benchmarks.bench_calls [--rounds 7] [--against CHECKOUT]

Each row is the fastest of many batches on one thread, in the thread's own processor time. `--against` takes
the path of another checkout of the repository, measures it in turn with this one, and prints the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from altgrad.records.machine import processor_name

ROOT = Path(__file__).parent.parent
BUDGETS_US = {"quantize E4M3, 128 elements": 4.0, "quantize MXFP8, 4x64": 8.0}
CALLS = """
import json, time, timeit
import torch
from altgrad.quantization import decode, encode, ops, quantize

torch.set_num_threads(1)
x, blocks = torch.linspace(-3, 3, 128), torch.linspace(-3, 3, 256).view(4, 64)
out, codes, packed = torch.empty_like(x), encode(x, "E4M3"), encode(blocks, "MXFP8")
calls = {
    "quantize E4M3, 128 elements": lambda: quantize(x, "E4M3"),
    "quantize E4M3, out=": lambda: quantize(x, "E4M3", out=out),
    "quantize E4M3, scale 0.3": lambda: quantize(x, "E4M3", 0.3),
    "quantize E4M3, stochastic": lambda: quantize(x, "E4M3", rounding="stochastic", key=(1, 2)),
    "encode E4M3": lambda: encode(x, "E4M3"),
    "decode E4M3": lambda: decode(codes, "E4M3"),
    "quantize and encode, with statistics": lambda: ops.quantize_and_encode_with_stats(x, "E4M3"),
    "quantize MXFP8, 4x64": lambda: quantize(blocks, "MXFP8"),
    "encode MXFP8, 4x64": lambda: encode(blocks, "MXFP8"),
    "decode MXFP8, 4x64": lambda: decode(packed),
    "torch: x.clone()": lambda: x.clone(),
}
found = {}
for name, call in calls.items():
    timeit.timeit(call, number=50)
    found[name] = min(timeit.repeat(call, number=200, repeat=30, timer=time.thread_time)) / 200 * 1e6
print(json.dumps(found))
"""


def measured(checkout: Path) -> dict[str, float]:
    """Microseconds of each call, in a fresh process that imports the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", CALLS]
    ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def fastest(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The least of each row over the rounds."""
    return {name: min(found[name] for found in rounds) for name in rounds[0]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="processes per checkout")
    parser.add_argument("--against", type=Path, default=None, help="another checkout to measure in turn")
    options = parser.parse_args()
    mine, theirs = [], []
    for _ in range(options.rounds):
        mine.append(measured(ROOT))
        if options.against is not None:
            theirs.append(measured(options.against))
    here, there = fastest(mine), fastest(theirs) if theirs else {}
    table = Table(title=f"Microseconds per call, one thread, {processor_name()}")
    for column in ("call", "us", "budget", *(("there", "ratio") if there else ())):
        table.add_column(column, justify="left" if column == "call" else "right")
    for name, time in here.items():
        budget = BUDGETS_US.get(name)
        verdict = "" if budget is None else f"{budget:g} {'holds' if time <= budget else 'MISSED'}"
        compared = (f"{there[name]:.2f}", f"{time / there[name]:.2f}") if there else ()
        table.add_row(name, f"{time:.2f}", verdict, *compared)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
