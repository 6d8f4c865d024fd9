"""A text and a model small enough to train for a few steps in milliseconds, and what tests compare of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.loading import load_config
from altgrad.training.data import Corpus, corpus_from_bytes
from altgrad.training.trainer import StepRecord, Trainer

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "max_steps": 30,
    "threads": 1,
    "checkpoint_interval": 5,
    "model": {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16},
    "optimizer": {"warmup_steps": 2, "lr": 1e-2},
    "data": {"batch_size": 4, "max_bytes": 50_000},
    "evaluation": {"interval": 10, "batches": 2},
}


def tiny_config(*overrides: str, **top_level: Any) -> ExperimentConfig:
    return load_config({**TINY, **top_level}, overrides)


def tiny_corpus() -> Corpus:
    return corpus_from_bytes(b"the quick brown fox jumps over the lazy dog. " * 200, 0.1, "test text")


def tiny_trainer(*overrides: str, **top_level: Any) -> Trainer:
    return Trainer(tiny_config(*overrides, **top_level), data_dir=tiny_corpus())


def train(trainer: Trainer, steps: int) -> list[StepRecord]:
    return [trainer.train_step(*trainer.batch(trainer.step + 1)) for _ in range(steps)]


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """A nested state as one dict of leaves, tensors as (dtype, shape, bytes)."""
    if isinstance(node, torch.Tensor):
        return {path: (str(node.dtype), tuple(node.shape), node.contiguous().flatten().view(torch.uint8).tolist())}
    if isinstance(node, dict):
        return {key: leaf for name, child in node.items() for key, leaf in flat(child, f"{path}/{name}").items()}
    if isinstance(node, list | tuple):
        return {key: leaf for i, child in enumerate(node) for key, leaf in flat(child, f"{path}/{i}").items()}
    return {path: repr(node)}


def differing(a: Any, b: Any) -> list[str]:
    """Paths of the leaves in which two states differ in any bit."""
    one, other = flat(a), flat(b)
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def metrics(run_dir: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step; a step recorded twice is an error."""
    found = {record["step"]: record["loss"] for record in metrics(run_dir)}
    assert len(found) == len(metrics(run_dir))
    return found


TEXT = "".join(f"{n} squared is {n * n}, and {n} cubed is {n**3}. " for n in range(1, 900)).encode()


def corpus_overrides(folder: Path) -> list[str]:
    """Config overrides that train on `TEXT`, written into the folder."""
    path = folder / "corpus.txt"
    path.write_bytes(TEXT)
    return ["data.source=text", f"data.path={path}"]
