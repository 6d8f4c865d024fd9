"""What advice costs: a trace against plain float32 steps, the advice after it, and a checkpoint of GPT-2's size.

    python -m benchmarks.bench_advice [--rounds 3] [--skip-checkpoint] [--json FILE]

The model has 0.85M parameters. A trace of 60 steps and 60 plain steps alternate, each from the same start; the ratio is the
median over rounds. The checkpoint holds GPT-2's 124M weights, drawn, in bfloat16, and is read in a process of its own, whose
largest memory is that of the process, torch included. Budgets: 1.3; 60 s; 3 minutes and 4 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from altgrad.advise import Budget, PlainLoop, advise_trace, advise_weights, take_trace
from altgrad.training.config.experiment import DataSection
from altgrad.training.data import load_corpus
from altgrad.training.model import GPT, GPTConfig
from altgrad.training.trainer import next_token_loss
from benchmarks._timing import keep_record

STEPS = 60
BUDGETS = {"trace_ratio": 1.3, "advice_s": 60.0, "checkpoint_s": 180.0, "checkpoint_gb": 4.0}


def fresh_loop() -> PlainLoop:
    """0.85M parameters on 768 bytes a step."""
    corpus = load_corpus(DataSection())
    model = GPT(GPTConfig(corpus.vocab_size, 4, 4, 128, 64))
    return PlainLoop(model, lambda step: corpus.batch(0, step, 12, 64), next_token_loss)


def measure_trace(rounds: int) -> dict[str, float]:
    """Ratio of a trace to plain steps, and seconds of the advice after the last one."""
    ratios, plain_s = [], []
    loop, trace = fresh_loop(), None
    loop.advance()
    for i in range(rounds):
        times: dict[str, float] = {}
        for kind in ("plain", "trace") if i % 2 else ("trace", "plain"):
            loop = fresh_loop()
            begun = time.perf_counter()
            if kind == "trace":
                traced, trace = loop, take_trace(loop, STEPS)
            else:
                for _ in range(STEPS):
                    loop.advance()
            times[kind] = time.perf_counter() - begun
        ratios.append(times["trace"] / times["plain"])
        plain_s.append(times["plain"])
    assert trace is not None
    begun = time.perf_counter()
    advise_trace(trace, Budget(), loop=traced)
    return {
        "plain_s": statistics.median(plain_s),
        "trace_ratio": statistics.median(ratios),
        "advice_s": time.perf_counter() - begun,
    }


def write_checkpoint(path: Path) -> int:
    """GPT-2's weight matrices, drawn; how many weights."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    for i in range(12):
        for name, shape in (
            ("attn.c_attn", (768, 2304)),
            ("attn.c_proj", (768, 768)),
            ("mlp.c_fc", (768, 3072)),
            ("mlp.c_proj", (3072, 768)),
        ):
            shapes[f"h.{i}.{name}.weight"] = shape
    save_file({name: (torch.randn(*shape, generator=draw) * 0.02).bfloat16() for name, shape in shapes.items()}, path)
    return sum(a * b for a, b in shapes.values())


def read_checkpoint(path: str) -> dict[str, float]:
    """Seconds and largest memory of advice from a checkpoint, blocks of 32 and 16 included."""
    begun = time.perf_counter()
    advise_weights(path, Budget(bits=8.25, hardware="blackwell"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"checkpoint_s": time.perf_counter() - begun, "checkpoint_gb": peak}


def main() -> int:
    """Print what was measured; 0 if all budgets hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-checkpoint", action="store_true")
    parser.add_argument("--json", type=Path, default=None, help="also keep the record in this file")
    parser.add_argument("--read", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read_checkpoint(options.read)))
        return 0
    found: dict[str, Any] = measure_trace(options.rounds)
    if not options.skip_checkpoint:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            found["checkpoint_weights"] = write_checkpoint(path)
            call = [sys.executable, "-m", "benchmarks.bench_advice", "--read", str(path)]
            found |= json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    for name, budget in BUDGETS.items():
        if name in found:
            print(f"{name:14} {found[name]:8.2f}  budget {budget:g}: {'held' if found[name] <= budget else 'MISSED'}")
    if options.json:
        keep_record(options.json, "advice", found)
    return 0 if all(found.get(name, 0) <= budget for name, budget in BUDGETS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
