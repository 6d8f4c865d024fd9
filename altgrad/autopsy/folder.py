"""Reads a run folder for replay: the trainer at its initial state, and what the run recorded; refuses what has no bits here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from altgrad.errors import ConfigError, ReportError
from altgrad.quantization import NUMERICS_VERSION
from altgrad.records.machine import threads_in
from altgrad.records.run import Run
from altgrad.records.schema import as_number
from altgrad.records.verify import verify_run
from altgrad.report.text import shortened
from altgrad.training.config.loading import load_config
from altgrad.training.trainer import Trainer


def rebuild(folder: Path) -> tuple[Trainer, list[float], Mapping[str, Any]]:
    """(trainer at the initial state, recorded losses of steps 1, 2, ..., result) of a run folder."""
    for name in ("config.yaml", "metrics.jsonl", "env.json"):
        if not (folder / name).is_file():
            raise ReportError(f"{folder} has no {name}; give the folder of a run, such as runs/e4m3-s42-1a2b3c4d")
    if problems := verify_run(folder, checkpoints=False).problems:
        raise ReportError(f"{folder} is damaged ({'; '.join(problems)}); an autopsy of it would be of another run")
    run = Run(folder)
    check_versions(folder, run.environment, run.result)
    config = load_config(folder / "config.yaml")
    torch.set_num_threads(threads_of(folder))
    trainer = Trainer(config.model_copy(update={"monitor": config.monitor.model_copy(update={"enabled": False})}))
    losses = recorded_losses(folder)
    if len(losses) < 10:
        raise ConfigError(f"{folder} records {len(losses)} steps; an autopsy needs at least 10")
    return trainer, losses, run.result


def threads_of(folder: Path) -> int:
    """CPU threads that the run had, which a replay needs for the same bits.

    Raises:
        ReportError: env.json does not say.
    """
    environment = Run(folder).environment
    if (threads := threads_in(environment)) is not None:
        return threads
    said = shortened(repr(environment.get("threads")))
    raise ReportError(f"{folder}: env.json says {said} threads; it is damaged, so the run cannot be replayed")


def recorded_losses(folder: Path) -> list[float]:
    """Training losses of steps 1, 2, ... of a run folder, up to the first that is missing; NaN where not finite."""
    recorded = {record["step"]: as_number(record.get("loss")) for record in Run(folder).records("step")}
    losses = []
    while len(losses) + 1 in recorded:
        loss = recorded[len(losses) + 1]
        losses.append(math.nan if loss is None or not math.isfinite(loss) else loss)
    return losses


def check_versions(folder: Path, environment: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Refuse a run whose replay here could not have its bits.

    Raises:
        ConfigError: it ran on several ranks, or under another torch or numerics version.
    """
    if environment.get("processes"):
        raise ConfigError(
            f"{folder} ran on {environment['processes']} ranks, and an autopsy replays runs of one process; run "
            f"{folder / 'config.yaml'} again without torchrun: up to the order of sums it is the same run"
        )
    versions = (
        ("torch", environment.get("torch"), version("torch")),
        ("numerics version", result.get("numerics_version"), NUMERICS_VERSION),
    )
    for name, then, now in versions:
        if then is not None and then != now:
            raise ConfigError(
                f"{folder} ran with {name} {then}, this is {now}: a replay would differ; run it again here"
            )
