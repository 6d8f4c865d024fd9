"""Which run a config is: the settings that decide its losses, their hash, and the FP32 twin that a run is compared with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.formats import SHORT_DEFAULTS, WHOLE, identity_keys

ADDED_LATER = (
    ("model", "factory"),
    ("model", "options"),
    ("optimizer", "reset_every"),
    ("optimizer", "reset_moments"),
    ("data", "token_dtype"),
    ("verdict", "divergence_smoothing"),
    ("verdict", "freeze_flip_rate"),
    ("verdict", "no_learning_window"),
    ("verdict", "twin_gap"),
    ("monitor", "near_zero"),
    ("monitor", "rank_fraction"),
    ("monitor", "rank_fraction_projections"),
)
"""Settings that runs before them did not have: at their defaults they are no part of a run's identity."""

NOT_IDENTITY = ("runs_dir", "checkpoint_dir", "device", "threads", "distributed", "trackers")
"""Where and how a run is made, not what it computes."""


def identity(config: ExperimentConfig) -> dict[str, Any]:
    """What a run computes, as plain data: the config without paths, device and trackers, formats spelled in one way."""
    resolved = identity_keys(config.model_dump(mode="json", exclude=set(NOT_IDENTITY)))
    for section, key in ADDED_LATER:
        if resolved[section][key] == type(getattr(config, section)).model_fields[key].get_default(
            call_default_factory=True
        ):
            del resolved[section][key]
    return resolved


OF_FORMATS = (
    *(*SHORT_DEFAULTS, *WHOLE, "include", "exclude"),
    *("enable_partition_clipping", "enable_emergency_shift", "clipping", "shift"),
)
"""Settings by which a run differs from its FP32 twin."""


def is_twin(fp32: ExperimentConfig, other: ExperimentConfig) -> bool:
    """Whether `fp32` is the run of `other` without its formats: unquantized, and the same seed, model, data and schedule."""
    if fp32.quantized or not other.quantized:
        return False
    apart = {*OF_FORMATS, *NOT_IDENTITY, "name", "verdict", "monitor", "checkpoint_interval", "keep_checkpoints"}
    return fp32.model_dump(exclude=apart) == other.model_dump(exclude=apart)


def setup_of(config: ExperimentConfig) -> str:
    """What decides whether a run can be set up at all: not its seed, length, learning rate or limits."""
    apart = {
        *NOT_IDENTITY,
        "name",
        "seed",
        "max_steps",
        "evaluation",
        "verdict",
        "checkpoint_interval",
        "keep_checkpoints",
    }
    facts = config.model_dump(mode="json", exclude=apart)
    for key in ("lr", "weight_decay", "warmup_steps", "decay", "min_lr_ratio", "grad_clip", "reset_every"):
        facts["optimizer"].pop(key)
    facts["resets"] = config.optimizer.reset_every > 0
    return json.dumps(facts, sort_keys=True)


def experiment_hash(config: ExperimentConfig, data_fingerprint: str, numerics_version: str, model: str = "") -> str:
    """SHA-256 (hex) of a config's identity, the data, and the numerics: runs of the same hash give the same losses.

    Args:
        model: fingerprint of a model that was handed in instead of built from the config; "" for none.
    """
    resolved = identity(config)
    del resolved["data"]["path"]  # the fingerprint stands for the content
    facts = {"config": resolved, "data": data_fingerprint, "numerics": numerics_version, "model": model}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
