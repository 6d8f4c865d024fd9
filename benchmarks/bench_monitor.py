"""What the monitor costs: a training step with every diagnostic on every step against the same step without it.

    python -m benchmarks.bench_monitor [--models 0.8M,10M] [--storage grid,master] [--rounds 15] [--json FILE]

Everything but the rank and the FP32 reference is measured on every step; copying to the host and writing the records
as JSON lines are included. Steps of both variants alternate in one process; the ratio is the median over rounds of
(with - without) / without. Budgets: 5% of the 10M model's step, 25% of the 0.8M model's. The rank and the FP32
reference are timed apart and not budgeted: they say their cost in their records.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from altgrad.monitor import Monitor
from altgrad.nn import attach_optimizer, quantize_model, uniform
from altgrad.training.model import GPT, GPTConfig
from benchmarks._timing import keep_record

MODELS = {
    "0.8M": (GPTConfig(vocab_size=256, n_layer=4, n_head=4, n_embd=128, block_size=64, style="gpt2"), 12, 0.25),
    "10M": (GPTConfig(vocab_size=256, n_layer=6, n_head=6, n_embd=384, block_size=256, style="gpt2"), 8, 0.05),
}


class Variant:
    """A quantized model with its optimizer and data, monitored or not."""

    def __init__(self, config: GPTConfig, batch: int, storage: str, schedule: dict | None) -> None:
        self.model = GPT(config)
        quantize_model(self.model, uniform("E3M4", storage=storage))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.handle = attach_optimizer(self.model, self.optimizer)
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randint(config.vocab_size, (2, batch, config.block_size), generator=generator)
        self.file = tempfile.TemporaryFile("w")  # noqa: SIM115 (it lives as long as the process)
        self.records = 0
        self.monitor = None
        if schedule is not None:
            self.monitor = Monitor(self.model, self.optimizer, handle=self.handle, schedule=schedule, sink=self.write)

    def write(self, records: list[dict]) -> None:
        """One line each, as a run writes them."""
        self.records += len(records)
        self.file.write("".join(json.dumps(record) + "\n" for record in records))

    def step(self) -> float:
        """Seconds of one whole step."""
        start = time.perf_counter()
        _, loss = self.model(self.x, self.y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def measure(name: str, storage: str, rounds: int) -> dict:
    """Times of one model and storage."""
    config, batch, budget = MODELS[name]
    plain = Variant(config, batch, storage, None)
    watched = Variant(config, batch, storage, {"rank": 0})
    for variant in (plain, watched):
        for _ in range(3):
            variant.step()
    pairs = []
    for i in range(rounds):
        order = (plain, watched) if i % 2 else (watched, plain)
        times = {id(variant): variant.step() for variant in order}
        pairs.append((times[id(plain)], times[id(watched)]))
    overhead = statistics.median((b - a) / a for a, b in pairs)
    assert watched.monitor is not None
    start = time.perf_counter()
    watched.monitor.measure_ranks()
    rank = time.perf_counter() - start
    reference = watched.monitor.measure_reference(lambda: watched.model(watched.x, watched.y)[1].backward(), force=True)
    return {
        "model": name,
        "storage": storage,
        "step_s": statistics.median(a for a, _ in pairs),
        "monitored_s": statistics.median(b for _, b in pairs),
        "overhead": overhead,
        "budget": budget,
        "records_per_step": watched.records / max(1, watched.monitor.step - 1),
        "rank_s": rank,
        "reference_s": reference,
    }


def main() -> int:
    """Print one line per model and storage; 0 if all budgets hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="0.8M,10M")
    parser.add_argument("--storage", default="grid,master")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None, help="also keep the records in this file")
    options = parser.parse_args()
    rows = []
    print(f"{torch.get_num_threads()} threads, E3M4, median of {options.rounds} rounds")
    for name in options.models.split(","):
        for storage in options.storage.split(","):
            row = measure(name, storage, options.rounds)
            rows.append(row)
            held = "held" if row["overhead"] <= row["budget"] else f"MISSED by {row['overhead'] / row['budget']:.1f}x"
            print(
                f"{name:>5} {storage:<6} step {row['step_s'] * 1e3:7.1f} ms, monitored {row['monitored_s'] * 1e3:7.1f} ms: "
                f"{row['overhead']:+.1%} (budget {row['budget']:.0%}: {held}); rank {row['rank_s'] * 1e3:.0f} ms, "
                f"FP32 reference {row['reference_s'] * 1e3:.0f} ms",
                flush=True,
            )
    if options.json:
        keep_record(options.json, "monitor", rows)
    return 0 if all(row["overhead"] <= row["budget"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
