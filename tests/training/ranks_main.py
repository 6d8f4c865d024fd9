"""Trains a few steps of each case, alone or as one rank of a torchrun, and writes what happened for the tests to compare.

torchrun --nproc-per-node 2 -m tests.training.ranks_main OUT     or     python -m tests.training.ranks_main OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from altgrad.nn.spread import local
from altgrad.training.config.loading import load_config
from altgrad.training.data import corpus_from_bytes
from altgrad.training.format_runner import FormatExperimentRunner
from altgrad.training.trainer import Trainer

BASE = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16},
    "data": {"batch_size": 8, "max_bytes": 20_000},
    "optimizer": {"lr": 3e-3, "warmup_steps": 2},
    "evaluation": {"batches": 1},
    "max_steps": 4,
}
CASES: dict[str, dict] = {
    "fp32": {},
    "amax": {"fp8_format": "E4M3"},
    "fixed": {"fp8_format": "E5M2", "scaling": "none"},
    "delayed": {"fp8_format": "E4M3", "scaling": "delayed"},
    "grid": {"fp8_format": "E3M4", "weight_storage": "grid"},
    "accumulated": {"fp8_format": "E4M3", "data": {**BASE["data"], "grad_accumulation": 2}},
    "stochastic": {"fp8_format": "E4M3", "weight_storage": "grid", "rounding": "stochastic"},
    "clipped": {
        "fp8_format": "E4M3", "scaling": "delayed", "enable_partition_clipping": True,
        "clipping": {"overflow_threshold": 0.0, "base_clip": 0.1},
    },
    "sharded": {"fp8_format": "E4M3", "distributed": "fsdp2"},
    "sharded_accumulated": {
        "fp8_format": "E4M3", "distributed": "fsdp2", "data": {**BASE["data"], "grad_accumulation": 2},
    },
}  # fmt: skip
STEPS = 3


def run(case: dict) -> dict:
    """Losses of STEPS steps, the same again from a captured state, and the final state."""
    config = load_config({**BASE, **case})
    corpus = corpus_from_bytes(np.random.default_rng(0).zipf(1.5, 20_000).astype(np.uint8).tobytes(), 0.1, "test bytes")
    trainer = Trainer(config, data_dir=corpus)
    records, states = [], []
    for step in range(1, STEPS + 1):
        states.append(trainer.capture())
        records.append(trainer.train_step(*trainer.batch(step)))
    first = trainer.capture()
    trainer.restore(states[1])
    again = [trainer.train_step(*trainer.batch(step)).loss for step in range(2, STEPS + 1)]
    second = trainer.capture()
    return {
        "losses": [r.loss for r in records],
        "norms": [r.grad_norm for r in records],
        "stall": [r.stall_rate for r in records],
        "events": [[e["event"] for e in r.events] for r in records],
        "again": again,
        "val": trainer.evaluate(),
        "model": first["model"],
        "same_state": all(torch.equal(a, second["model"][n]) for n, a in first["model"].items()),
        "held": sum(local(p.detach()).numel() for p in trainer.parameters),
        "all": sum(p.numel() for p in trainer.parameters),
    }


def run_folder(runs: Path) -> list[tuple[str, int]]:
    """A run on disk, stopped by a signal to the last rank alone, then continued: (status, steps) of both."""
    config = load_config({**BASE, **CASES["sharded"], "name": "ranks", "runs_dir": str(runs)})
    ended = []
    for told_to_stop in (True, False):
        runner = FormatExperimentRunner(config)
        if told_to_stop and runner.ranks.rank == runner.ranks.world_size - 1:
            runner.stop.signal = 15
        result = runner.run()
        ended.append((result.status, result.steps))
    return ended


def main(out: Path) -> None:
    """Write `<out>/<rank>.pt` and the run folder below `<out>/runs`."""
    torch.set_num_threads(1)
    results = {name: run(case) for name, case in CASES.items()}
    ended = run_folder(out / "runs")
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save((results, ended), out / f"{rank}.pt")
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
