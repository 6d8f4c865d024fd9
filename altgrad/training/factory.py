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
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from altgrad.errors import AltGradError, ConfigError
from altgrad.loop.loop import buffers_kept, generators_kept
from altgrad.training.config.experiment import ExperimentConfig

ALLOWED = "ALTGRAD_FACTORIES"


def made_model(config: ExperimentConfig, vocab_size: int) -> nn.Module:
    """The module that `config.model.factory` makes; its initial weights are a function of the config's seed, as torch, numpy
    and Python draw from it.

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
    with generators_kept():
        torch.manual_seed(config.seed)
        np.random.seed(config.seed % 2**32)
        random.seed(config.seed)
        try:
            model = make(**arguments)
        except AltGradError:
            raise
        except Exception as error:
            raise ConfigError(f"model.factory {given} failed by {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.factory {given} made a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def check_model(model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Refuse a person's own model that gives no loss for tokens x and y, before anything is trained; nothing of it changes.

    A model whose parameters have no values yet is left to its first step.

    Raises:
        ConfigError: with what the model said, and what it must take and return.
    """
    if any(isinstance(p, UninitializedParameter) or p.is_meta for p in model.parameters()):
        return
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"{type(model).__name__} has no parameter to train: all have requires_grad=False")
    training = model.training
    asked = (
        "it must take int64 tokens [batch, time] and return logits [batch, time, vocabulary], (logits, ...) or an object with "
        f"`logits`; tokens here are below {int(max(x.max(), y.max())) + 1} or more, {x.shape[1]} in a row (model.block_size)"
    )
    with buffers_kept(model), generators_kept(), torch.no_grad():
        try:
            value = loss(model.eval(), x, y)
        except AltGradError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{type(model).__name__} gives no loss by {type(error).__name__}: {error}; {asked}"
            ) from error
        finally:
            model.train(training)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"the loss of {type(model).__name__} is a {shape}; it must be a tensor of one element")


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What a run's records say of a model of one's own: its class, its size, and a hash of its initial values."""
    size = sum(0 if isinstance(p, UninitializedParameter) else p.numel() for p in model.parameters())
    return {"class": type(model).__qualname__, "parameters": size, "weights": fingerprint(model)}


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's class, names, shapes and initial values."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"|{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
