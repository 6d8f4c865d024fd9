"""Interleaved timing: medians of rounds in one process, as ratios against a baseline; and the files of records."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from altgrad.nn.layer.gemm import PROCESSOR
from altgrad.records.files import write_text
from altgrad.records.machine import processor_name

WARM_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Median seconds of each variant, and the median over rounds of baseline time / variant time."""

    seconds: dict[str, float]
    ratios: dict[str, float]


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, baseline: str, rounds: int = 15, budget_s: float = 3.0
) -> Timing:
    """Time every variant once per round, in alternating order, so that a drift of the machine's speed meets them all.

    Args:
        variants: what to call, by name.
        baseline: the variant that the ratios are against; a ratio above 1 is faster than it.
        rounds: rounds at least (an odd number keeps the median one of the values); more are run while the budget lasts.
        budget_s: seconds to spend on rounds beyond that.
    """
    for _ in range(WARM_ROUNDS):
        for call in variants.values():
            call()
    names = list(variants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    done = 0
    while done < rounds or (time.perf_counter() - began < budget_s and done < 100 * rounds):
        for name in names if done % 2 == 0 else reversed(names):
            start = time.perf_counter()
            variants[name]()
            taken[name].append(time.perf_counter() - start)
        done += 1
    base = taken[baseline]
    return Timing(
        {name: statistics.median(times) for name, times in taken.items()},
        {name: statistics.median(b / t for b, t in zip(base, times, strict=True)) for name, times in taken.items()},
    )


def machine() -> dict[str, Any]:
    """What a record was measured on: the CPU, the units that multiply codes there, torch, and the GPU if there is one."""
    found = {"cpu": processor_name(), "units": str(PROCESSOR), "cores": os.cpu_count(), "torch": torch.__version__}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def keep_record(path: Path, name: str, record: Any, on: dict[str, Any] | None = None) -> None:
    """Put a benchmark's record under its name into a file such as `results/cpu-avx2.json`; the other records stay.

    Under `machines` the file says, by the record's name, what each was measured on: `on`, or this machine.
    """
    records = json.loads(path.read_text()) if path.exists() else {}
    machines = records.pop("machines", {}) | {name: on or machine()}
    write_text(path, json.dumps({"machines": machines} | records | {name: record}, indent=1) + "\n")
