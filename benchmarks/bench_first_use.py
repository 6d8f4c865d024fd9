"""What a newcomer waits for: imports and compilation, with nothing kept on disk and again with what the first run kept.

    python -m benchmarks.bench_first_use [--json FILE]

Each row is a process of its own. `three lines` quantizes two linear layers, E4M3 with E5M2 gradients, and takes two steps;
`demo` runs `altgrad demo --steps 12 --minutes 0`, which compiles all that its runs need. Compilation is the time inside
`jit.template`, where every loop is compiled or loaded; seconds of CPU, beside the wall time of the whole process.
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

from benchmarks._timing import keep_record

BUDGETS = {"demo": (15.0, 0.5)}  # seconds of compilation: nothing kept, all kept

_THREE_LINES = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
from altgrad.nn import quantize_model, uniform
quantize_model(model, uniform("E4M3", grad="E5M2"))
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    model(torch.randn(64, 256)).pow(2).mean().backward()
    optimizer.step()
"""
_DEMO = """
import sys
from altgrad.cli import demo_pages, main
demo_pages.LONG = float("inf")  # every run in this process, whose compilations are counted
sys.argv = ["altgrad", "demo", "--steps", "12", "--minutes", "0", "--runs-dir", FOLDER + "/runs"]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
"""
_AROUND = """
import json, time
from altgrad.jit import template
spent, made = [], template._kept_on_disk
def timed(compile_):
    began = time.process_time()
    try:
        return made(compile_)
    finally:
        spent.append(time.process_time() - began)
template._kept_on_disk = timed
{program}
print(json.dumps([len(spent), sum(spent)]))
"""


def run(program: str, folder: str) -> dict:
    """One process whose compiled loops are kept in a folder: functions, seconds of compilation and of the whole."""
    code = _AROUND.format(program=program.replace("FOLDER", repr(folder)))
    began = time.perf_counter()
    environment = {**os.environ, "NUMBA_CACHE_DIR": f"{folder}/numba"}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    wall = time.perf_counter() - began
    if ran.returncode:
        raise RuntimeError(f"the program failed:\n{ran.stderr[-2000:]}")
    functions, compilation = json.loads(ran.stdout.splitlines()[-1])
    return {"functions": functions, "compilation_s": compilation, "wall_s": wall}


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="also keep the record in this file")
    args = parser.parse_args()
    rows = []
    print(f"{'':14} {'kept':8} {'functions':>9} {'compiled s':>11} {'process s':>10}")
    for name, program in (("three lines", _THREE_LINES), ("demo", _DEMO)):
        with tempfile.TemporaryDirectory() as folder:
            for index, kept in enumerate(("nothing", "all")):
                found = {"row": name, "kept": kept, **run(program, folder)}
                rows.append(found)
                line = (
                    f"{name:14} {kept:8} {found['functions']:9} {found['compilation_s']:11.2f} {found['wall_s']:10.1f}"
                )
                budget = BUDGETS.get(name)
                if budget is not None:
                    over = found["compilation_s"] / budget[index]
                    line += f"  budget {budget[index]:g} s: " + ("met" if over <= 1 else f"MISSED by {over:.2f}x")
                print(line)
                for made in Path(folder).glob("runs*"):  # the second demo trains again
                    made.rename(made.with_name(f"seen{index}-{made.name}"))
    if args.json is not None:
        keep_record(args.json, "first use", rows)


if __name__ == "__main__":
    main()
