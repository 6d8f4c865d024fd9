"""The model that claims on training are tried on: the project's GPT on the standard library's sources, one arm at a time.

0.13M parameters: 2 layers, 64 wide, context 64, 768 bytes a step, AdamW at 3e-3 with cosine decay (the best rate of float32
in docs/findings/manifold.md). Everything random is a function of the seed, so that arms of one seed are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor

from altgrad.monitor.sources import watch_operands
from altgrad.records.schema import StepRecord
from altgrad.sweep.keys import changed
from altgrad.training.config.experiment import DataSection
from altgrad.training.config.loading import load_config
from altgrad.training.data import Corpus, load_corpus
from altgrad.training.trainer import Trainer

BASE: Mapping[str, Any] = {
    "name": "claim",
    "max_steps": 300,
    "model": {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64},
    "data": {"source": "stdlib", "batch_size": 12},
    "optimizer": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.0, "warmup_steps": 20},
    "evaluation": {"batches": 16},
    "verdict": {"stop": False},
}
LARGER: Mapping[str, Any] = {"model.n_layer": 4, "model.n_embd": 128, "optimizer.lr": 1e-3}
"""Changes that make it the 0.85M model of docs/findings/custom-formats.md."""
QUICK_STEPS = 6
DIVERGED = 10.0
"""Nats per byte: what a loss that is not finite, or larger, counts as; chance is 5.5."""


@cache
def _corpus() -> Corpus:
    return load_corpus(DataSection(**BASE["data"]), None)


def trainer_of(changes: Mapping[str, Any], seed: int, quick: bool = False) -> Trainer:
    """A trainer of the base config with dotted keys changed; quick ones take `QUICK_STEPS` steps at most."""
    config = load_config(changed(BASE, {**changes, "seed": seed}))
    if quick:
        evaluation = config.evaluation.model_copy(update={"batches": 1})
        optimizer = config.optimizer.model_copy(update={"warmup_steps": 2})
        steps = min(config.max_steps, QUICK_STEPS)
        config = config.model_copy(update={"max_steps": steps, "evaluation": evaluation, "optimizer": optimizer})
    return Trainer(config, data_dir=_corpus())


def step(trainer: Trainer) -> StepRecord:
    """Train on the next batch."""
    return trainer.train_step(*trainer.batch(trainer.step + 1))


def trained(trainer: Trainer, each: Callable[[StepRecord], None] = lambda record: None) -> float:
    """Train to the config's last step; the validation loss, at most `DIVERGED`."""
    for _ in range(trainer.config.max_steps):
        each(step(trainer))
    return validation_loss(trainer)


def validation_loss(trainer: Trainer) -> float:
    """At most `DIVERGED`, which stands for NaN as well."""
    loss = trainer.evaluate()
    return loss if loss < DIVERGED else DIVERGED


def operands(seed: int, steps: int) -> list[Tensor]:
    """Weight, input and output gradient of every linear layer at the step after so many float32 steps, as matrices."""
    trainer = trainer_of({"max_steps": steps + 1}, seed)
    for _ in range(steps):
        step(trainer)
    found: list[Tensor] = []
    hooks = watch_operands(trainer.model, lambda layer, role, x: found.append(x.flatten(0, -2).clone()))
    step(trainer)
    for hook in hooks:
        hook.remove()
    return found
