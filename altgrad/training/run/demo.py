"""The demonstration: a baseline and five 8-bit formats on the same text, seed and batches, and what saves the worst."""

from __future__ import annotations

from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.loading import load_config

DEMO_FORMATS = ("FP32", "E5M2", "E3M4", "E1M6", "E0M7", "E7M0")
DEMO_SIZE = {
    "max_steps": 200,
    "checkpoint_interval": 50,
    "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
    "data": {"source": "stdlib", "batch_size": 8},
    "optimizer": {"lr": 2e-3, "warmup_steps": 10},
    "evaluation": {"interval": 25, "batches": 4},
}
"""Chosen by step time: a run ends in about 12 s on one core at 30 GFLOP/s (benchmarks measure it)."""


def demo_configs(runs_dir: str, steps: int | None = None, device: str = "cpu") -> list[ExperimentConfig]:
    """One config per format, differing in nothing else: weights on the grid, nearest-even, amax scaling, the monitor on.

    One thread: a step of this size is no faster on two, and an autopsy forks as many runs at a time as there are cores.
    """
    shared = {**DEMO_SIZE, "runs_dir": runs_dir, "device": device, "weight_storage": "grid", "threads": 1}
    shared["monitor"] = {"enabled": True, "interval": 5, "schedule": {"rank": 0}}
    if steps is not None:
        shared["max_steps"] = steps
    return [
        load_config({**shared, "name": "fp32" if fmt == "FP32" else fmt.lower(), "fp8_format": fmt})
        for fmt in DEMO_FORMATS
    ]


SAVING = ("storage_rounding=stochastic",)
"""What saves a run whose updates are lost to rounding: an update smaller than half a grid step then moves its weight with
the chance that keeps its mean."""


def saving_arm(config: ExperimentConfig) -> ExperimentConfig:
    """The same run with `SAVING`, as `altgrad run <its folder>/config.yaml` makes it with these settings."""
    return load_config(config, [*SAVING])
