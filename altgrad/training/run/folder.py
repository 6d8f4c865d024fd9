"""A run's folder: its name, which follows from what is run, and the circumstances that are recorded with it.

    runs/<name>-s<seed>-<hash8>/  config.yaml  env.json  metrics.jsonl  result.json  checkpoints/

The hash covers the resolved config, the data and the numerics version, but no paths, device or trackers: the same
experiment finds its folder again, a changed one gets another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from altgrad.nn.recipe.facts import recipe_facts
from altgrad.quantization import NUMERICS_VERSION
from altgrad.records.machine import circumstances
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.formats import recipe_of
from altgrad.training.config.identity import experiment_hash
from altgrad.training.data import Corpus, resolve_corpus
from altgrad.training.factory import facts_of, made_model


@dataclass(frozen=True)
class RunPlan:
    """Where an experiment's run lives, before anything is written.

    Args:
        hash: SHA-256 (hex) that identifies the run; the folder's name ends in its first 8 digits.
        model: `facts_of` a model of the person's own, at its initial weights; None: the config's GPT.
    """

    config: ExperimentConfig
    corpus: Corpus
    hash: str
    model: Mapping[str, Any] | None = None

    @property
    def run_id(self) -> str:
        return f"{self.config.name}-s{self.config.seed}-{self.hash[:8]}"

    @property
    def path(self) -> Path:
        return Path(self.config.runs_dir) / self.run_id

    @property
    def wanted_checkpoint_dir(self) -> Path:
        """Where checkpoints go, unless that directory belongs to another run."""
        return Path(self.config.checkpoint_dir) if self.config.checkpoint_dir else self.path / "checkpoints"


def plan_run(
    config: ExperimentConfig, data: Corpus | str | Path | None = None, model: nn.Module | None = None
) -> RunPlan:
    """The plan of `config`'s run; reads the data for its fingerprint, writes nothing.

    Args:
        model: that is handed in, at its initial weights; what the config's factory makes is built for its facts.

    Raises:
        DataError: the data cannot be read. ConfigError: the factory cannot be used.
    """
    corpus = resolve_corpus(data, config.data, config.model.vocab_size)
    if model is None and config.model.factory is not None:
        model = made_model(config, corpus.vocab_size)
    facts = None if model is None else facts_of(model)
    identity = experiment_hash(config, corpus.fingerprint, NUMERICS_VERSION, facts["weights"] if facts else "")
    return RunPlan(config, corpus, identity, facts)


def environment(plan: RunPlan, device: torch.device, threads: int) -> dict[str, Any]:
    """What a result may depend on besides the config: versions, commit, machine, data."""
    return {
        **circumstances(device, threads),
        "data_fingerprint": plan.corpus.fingerprint,
        "data": {
            "source": plan.config.data.source,
            "description": plan.corpus.description,
            "train_tokens": len(plan.corpus.train),
            "val_tokens": len(plan.corpus.val),
            "vocab_size": plan.corpus.vocab_size,
        },
        "format": recipe_facts(recipe_of(plan.config)),
        **({} if plan.model is None else {"model": dict(plan.model)}),
    }
