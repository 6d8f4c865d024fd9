"""A step of every optimizer on 10 million parameters against torch's fused AdamW: `python -m benchmarks.bench_optim`.

Budgets: 1.5 times for ManifoldAdamW, SRAdamW and GridOptim, 4 times for the others. Each row is
the median of ratios of one step to the AdamW step right after it, so that a busy moment weighs on both.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch.nn import Parameter

from altgrad.optim import make_optimizer

ELEMENTS = 10_000_000
ROUNDS = 9
ROWS = {
    "ManifoldAdamW E4M3": ("manifold_adamw", {"format": "E4M3", "lr": 0.1}, 1.5),
    "ManifoldAdamW E4M3, stochastic landing": (
        "manifold_adamw",
        {"format": "E4M3", "lr": 0.1, "rounding": "stochastic"},
        1.5,
    ),
    "SRAdamW E4M3": ("sr_adamw", {"format": "E4M3"}, 1.5),
    "GridOptim E4M3": ("grid_optim", {"format": "E4M3"}, 1.5),
    "KahanAdamW E4M3": ("kahan_adamw", {"format": "E4M3"}, 4.0),
    "ECO E4M3": ("eco", {"format": "E4M3"}, 4.0),
    "Madam E4M3, stochastic landing": ("madam", {"format": "E4M3", "rounding": "stochastic"}, 4.0),
    "LNSMadam E7M0": ("lns_madam", {"format": "E7M0"}, 4.0),
    "Lion E4M3, stochastic landing": ("lion", {"format": "E4M3", "rounding": "stochastic"}, 4.0),
    "SignSGD E4M3, stochastic landing": ("signsgd", {"format": "E4M3", "rounding": "stochastic"}, 4.0),
}


def prepared(make, elements: int):
    """An optimizer over one parameter of typical weights and gradients, after two steps."""
    generator = torch.Generator().manual_seed(0)
    weight = Parameter(torch.randn(elements, generator=generator) * 0.02)
    weight.grad = torch.randn(elements, generator=generator) * 1e-3
    optimizer = make([weight])
    optimizer.step()
    optimizer.step()
    return optimizer


def seconds(optimizer) -> float:
    """Time of one step."""
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def main(elements: int = ELEMENTS) -> bool:
    """Print the table; whether all budgets hold."""
    reference = prepared(lambda p: torch.optim.AdamW(p, fused=True), elements)
    print(f"{elements:,} float32 parameters, {torch.get_num_threads()} threads, median of {ROUNDS} rounds")
    held = True
    times = [seconds(reference) for _ in range(ROUNDS)]
    print(f"{'torch AdamW, fused':45s} {statistics.median(times) * 1e3:8.1f} ms")
    for label, (name, options, budget) in ROWS.items():
        optimizer = prepared(lambda p, n=name, o=options: make_optimizer(n, p, **o), elements)
        ratios = [seconds(optimizer) / seconds(reference) for _ in range(ROUNDS)]
        ratio = statistics.median(ratios)
        held &= ratio <= budget
        print(f"{label:45s} {ratio:8.2f} x   budget {budget:.1f}  {'ok' if ratio <= budget else 'MISSED'}", flush=True)
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
