"""`advise`: from a model with its data, a trace, or a checkpoint to advice."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from altgrad.advise.advice import Advice, advise_trace
from altgrad.advise.checkpoint import advise_weights
from altgrad.advise.choose import Budget
from altgrad.advise.loop import Batches, PlainLoop
from altgrad.advise.trace import STEPS, Tell, Trace, layers_of, take_trace
from altgrad.advise.verify import verify as verify_by_forks
from altgrad.errors import ConfigError
from altgrad.loop.loop import Loop


def advise(
    model: nn.Module | str | Path,
    data: Batches | Trace | None = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Callable[[Any], Any] | None = None,
    schedule: Sequence[float] = (),
    steps: int = STEPS,
    budget: Budget | None = None,
    sensitivity: bool = True,
    verify: int = 0,
    tell: Tell | None = None,
) -> Advice:
    """Which format for which operand of a model, and what recipe follows.

        advice = advise(model, batches, loss=lambda model, x, y: F.cross_entropy(model(x), y))
        quantize_model(model, advice.recipe)

    Args:
        model: in float32; it is copied, not trained. Or a checkpoint (a path), whose weights alone are then looked at.
        data: tuples of tensors, or a function from the step to one; or a `Trace` taken before.
        loss: of (model, *batch). optimizer: a function from parameters to an optimizer; None: AdamW with lr 1e-3.
        schedule: learning rate of each step of the run that is planned; without it stall is told at the traced rate only.
        steps: of the float32 trace.
        sensitivity: ask which operands matter (one forward and backward for each in each format).
        verify: steps of paired forks that check the recipe; 0: none.

    Raises:
        ConfigError: nothing to trace, no loss, or a model that is quantized. CheckpointError: an unusable checkpoint.
    """
    if verify and (data is None or isinstance(data, Trace) or isinstance(model, str | Path)):
        raise ConfigError(f"verify={verify} trains; give a model, its batches and its loss")
    if isinstance(model, str | Path) and data is not None:
        raise ConfigError(
            f"{model} is a checkpoint, whose weights alone are looked at; leave data out, or give a model"
        )
    if isinstance(model, str | Path):
        return advise_weights(model, budget, tell=tell)
    if data is None:
        return advise_weights(model, budget, tell=tell)
    if isinstance(data, Trace):
        return advise_trace(data, budget, tell=tell)
    if loss is None:
        raise ConfigError("advise needs loss=, a function of (model, *batch) that returns what training minimizes")
    layers_of(model)  # refuses what cannot be traced, before anything is copied
    loop = PlainLoop(copy.deepcopy(model), data, loss, optimizer, schedule)
    return advise_loop(loop, budget, schedule=schedule, steps=steps, sensitivity=sensitivity, verify=verify, tell=tell)


def advise_loop(
    loop: Loop,
    budget: Budget | None = None,
    *,
    schedule: Sequence[float] = (),
    steps: int = STEPS,
    sensitivity: bool = True,
    verify: int = 0,
    tell: Tell | None = None,
) -> Advice:
    """The same for a training loop in float32, which is left after the trace's steps.

        advice = advise_loop(StepLoop(model, optimizer, step_fn, also=[scheduler]))

    Raises:
        ConfigError: forks to verify with, but no sensitivity, from which the neighbours follow.
    """
    budget = budget or Budget()
    if verify and not sensitivity:
        raise ConfigError("verify needs sensitivity, by which the recipe's neighbours are found; ask for both")
    trace = take_trace(loop, steps, schedule=schedule, blocks=budget.block_shapes, tell=tell)
    started = time.perf_counter()
    advice = advise_trace(trace, budget, loop=loop if sensitivity else None, tell=tell)
    advice.seconds["advice"] = time.perf_counter() - started
    if verify:
        started = time.perf_counter()
        advice = verify_by_forks(loop, trace, advice, verify, tell=tell)
        advice.seconds["verify"] = time.perf_counter() - started
    return advice
