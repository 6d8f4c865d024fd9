"""What captures, replays and an autopsy cost: measured here per element, worked out for larger models.

    python -m benchmarks.bench_replay [--models 0.8M,10M] [--rounds 9] [--json FILE]

Measured: bytes of a captured state per parameter, milliseconds to capture and to restore it, and the time of a replayed
step against the trainer's own (medians of interleaved rounds). Worked out, with the formula printed: ring and autopsy of
models of 124M, 7B and 70B parameters on accelerators, whose numbers are stated assumptions and not measurements.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from altgrad.loop.states import state_bytes
from altgrad.nn import uniform
from altgrad.records.machine import processor_name
from altgrad.training import load_config
from altgrad.training.data import corpus_from_bytes
from altgrad.training.trainer import Trainer

MODELS = {
    "0.8M": {"n_layer": 4, "n_embd": 128, "n_head": 4, "block_size": 64},
    "10M": {"n_layer": 6, "n_embd": 384, "n_head": 6, "block_size": 256},
}
FORKS, HORIZON = 60, 40
"""Forks of a typical autopsy, and the steps of each."""


@dataclass(frozen=True)
class Machine:
    """What a larger model is assumed to train on; the sources are the vendor's data sheets."""

    name: str
    parameters: float
    devices: int
    tokens_per_step: float
    flops_per_device: float  # dense BF16 at 40% utilisation
    host_bytes_per_s: float  # from the devices of one node to its host memory
    disk_bytes_per_s: float  # a node's local NVMe


MACHINES = (
    Machine("124M on one H100", 124e6, 1, 0.5e6, 4e14, 50e9, 5e9),
    Machine("7B on 8 H100 (one node)", 7e9, 8, 4e6, 4e14, 200e9, 5e9),
    Machine("70B on 256 H100 (32 nodes)", 70e9, 256, 16e6, 4e14, 200e9, 5e9),
)


def trainer_of(model: str) -> Trainer:
    """A quantized trainer of one of the models on fixed text."""
    text = b"".join(b"%d squared is %d, and " % (i, i * i) for i in range(20_000))
    config = {
        "fp8_format": "E4M3",
        "rounding": "stochastic",
        "model": MODELS[model],
        "data": {"batch_size": 8},
        "verdict": {"stop": False},
    }
    return Trainer(load_config(config), data_dir=corpus_from_bytes(text, 0.1, "squares"))


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(model: str, rounds: int) -> dict[str, float]:
    """Costs of one model: parameters, bytes of a state per parameter, milliseconds, and ratios to a step."""
    trainer = trainer_of(model)
    for _ in range(3):
        trainer.train_step(*trainer.batch(trainer.step + 1))
    state = trainer.capture()
    other = uniform("E5M2")
    takes: dict[str, list[float]] = {name: [] for name in ("step", "capture", "restore", "replay", "changed")}
    trainer.replay(state, 1, recipe=other)
    for _ in range(rounds):
        takes["step"].append(timed(lambda: trainer.train_step(*trainer.batch(trainer.step + 1))))
        takes["capture"].append(timed(trainer.capture))
        takes["restore"].append(timed(lambda: trainer.restore(state)))
        takes["replay"].append(timed(lambda: trainer.replay(state, 10)) / 10)
        takes["changed"].append(timed(lambda: trainer.replay(state, 10, recipe=other)) / 10)
    count = sum(p.numel() for p in trainer.parameters)
    median = {name: statistics.median(values) for name, values in takes.items()}
    return {
        "parameters": count,
        "bytes_per_parameter": state_bytes(state) / count,
        **{f"{name}_ms": 1e3 * median[name] for name in ("step", "capture", "restore")},
        "replay_ratio": statistics.median(r / s for r, s in zip(takes["replay"], takes["step"], strict=True)),
        "changed_ratio": statistics.median(r / s for r, s in zip(takes["changed"], takes["step"], strict=True)),
    }


def worked_out(machine: Machine, bytes_per_parameter: float, replay_ratio: float) -> dict[str, float]:
    """Bytes and seconds of the ring and the autopsy of a larger model, from the measured bytes and ratio.

    A step is 6 N D FLOPs; a state is sharded over the devices, each node offloading its own part.
    """
    state = machine.parameters * bytes_per_parameter
    step = 6 * machine.parameters * machine.tokens_per_step / (machine.flops_per_device * machine.devices)
    nodes = max(1, machine.devices // 8)
    fork = HORIZON * step * replay_ratio
    return {
        "state_gb": state / 1e9,
        "state_gb_per_node": state / nodes / 1e9,
        "step_s": step,
        "to_host_s": state / nodes / machine.host_bytes_per_s,
        "to_disk_s": state / nodes / machine.disk_bytes_per_s,
        "ring_of_8_gb_per_node": 8 * state / nodes / 1e9,
        "fork_s": fork,
        "autopsy_h": FORKS * (fork + 2 * state / nodes / machine.host_bytes_per_s) / 3600,
        "autopsy_device_h": FORKS * fork * machine.devices / 3600,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="0.8M,10M")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"CPU: {processor_name()}, {torch.get_num_threads()} threads")
    found = {name: measure(name, arguments.rounds) for name in arguments.models.split(",")}
    for name, row in found.items():
        print(f"\n{name}: {row['parameters']:,.0f} parameters, {row['bytes_per_parameter']:.1f} bytes of state each")
        print(f"  step {row['step_ms']:.1f} ms, capture {row['capture_ms']:.2f} ms, restore {row['restore_ms']:.2f} ms")
        print(
            f"  a replayed step costs {row['replay_ratio']:.2f} steps, {row['changed_ratio']:.2f} under another recipe"
        )
    base = next(reversed(found.values()))
    print(f"\nWorked out for {FORKS} forks of {HORIZON} steps; devices at 4e14 FLOP/s are assumed, not measured")
    large = {m.name: worked_out(m, base["bytes_per_parameter"], base["changed_ratio"]) for m in MACHINES}
    for name, row in large.items():
        print(f"\n{name}")
        for key, value in row.items():
            print(f"  {key:24s} {value:10.3g}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"cpu": processor_name(), "measured": found, "worked_out": large}, indent=1)
        )


if __name__ == "__main__":
    main()
