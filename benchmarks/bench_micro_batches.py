"""What it saves to quantize weights once per optimizer step (`altgrad.nn.cached_weights`) where gradients accumulate.

    python -m benchmarks.bench_micro_batches [--threads 1]

Forward and backward of all micro-batches of a step of the 0.8M GPT, with and without, interleaved, as ratios; the bits are equal.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table

from altgrad.nn import cached_weights, quantize_model, uniform
from altgrad.training.model import GPT, GPTConfig
from altgrad.training.trainer import next_token_loss
from benchmarks._timing import interleaved

MICRO_BATCHES = 4
FORMATS = ("E4M3", "E0M7", "MXFP8", "FP16")


def step_of(fmt: str, rows: int):
    """A function of `caches` that runs forward and backward of MICRO_BATCHES micro-batches of so many sequences."""
    config = GPTConfig(vocab_size=256, n_layer=4, n_embd=128, n_head=4, block_size=128)
    model = GPT(config, seed=0).train()
    quantize_model(model, uniform(fmt))
    x = torch.randint(0, 256, (MICRO_BATCHES, rows, 129), generator=torch.Generator().manual_seed(0))

    def run(caches: bool) -> None:
        with cached_weights(model) if caches else nullcontext():
            for part in x:
                next_token_loss(model, part[:, :-1], part[:, 1:]).backward()
        model.zero_grad()

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    table = Table(title=f"{MICRO_BATCHES} micro-batches of GPT 0.8M with weights quantized once / each time")
    table.add_column("format")
    sizes = (1, 4)
    for rows in sizes:
        table.add_column(f"{rows} x 128 tokens", justify="right")
    for fmt in FORMATS:
        cells = []
        for rows in sizes:
            run = step_of(fmt, rows)
            variants = {"each": lambda run=run: run(False), "once": lambda run=run: run(True)}
            found = interleaved(variants, baseline="each", rounds=9, budget_s=0.5)
            cells.append(f"{1 / found.ratios['once']:.2f}")
        table.add_row(fmt, *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
