"""A person's own model in a config: `model.factory` names the function that makes it.

    model:
      factory: my_package.models:make        # make(vocab_size=..., n_layer=6) returns a torch module
      options: {n_layer: 6}

The module must return logits as `next_token_loss` takes them. A config may come from anybody and this names code to run, so
the package must be allowed by the person who runs it: ALTGRAD_FACTORIES=my_package (several: commas).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os

import torch
from torch import nn

from altgrad.errors import ConfigError
from altgrad.training.config.experiment import ExperimentConfig

ALLOWED = "ALTGRAD_FACTORIES"


def made_model(config: ExperimentConfig, vocab_size: int) -> nn.Module:
    """The module that `config.model.factory` makes; its initial weights are a function of the config's seed.

    Raises:
        ConfigError: the package is not allowed, there is no such function, or it makes no module.
    """
    given = config.model.factory
    assert given is not None
    package, _, name = given.partition(":")
    allowed = [word.strip() for word in os.environ.get(ALLOWED, "").split(",")]
    if package.partition(".")[0] not in allowed:
        raise ConfigError(
            f"model.factory {given} names code to run; if you trust it, allow its package: "
            f"{ALLOWED}={package.partition('.')[0]}"
        )
    try:
        make = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.factory {given} cannot be found: {error}; is its folder on PYTHONPATH?") from None
    arguments = {"vocab_size": config.model.vocab_size or vocab_size, **config.model.options}
    try:
        inspect.signature(make).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.factory {given} does not take vocab_size and model.options: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = make(**arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.factory {given} made a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's class, names, shapes and initial values."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"|{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
