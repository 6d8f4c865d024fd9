"""Where noise of a set size stops a small GPT's progress: the model half of the claim on gradient norm and quantization noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from altgrad.reproduce.claim import Facts, Values
from altgrad.reproduce.small_gpt import step, trainer_of, validation_loss
from altgrad.reproduce.tensors import drawing

RATIOS = tuple(8.0 * 2.0 ** (-k / 2) for k in range(10))  # gradient norm over noise norm, 8 down to 0.35
RATES = (3e-4, 1e-3, 3e-3)
TRAINED, STEPS = 100, 60


def progress_under_gradient_noise(facts: Facts, seed: int, quick: bool) -> Values:
    """Fall of the validation loss in `STEPS` steps at the better of `RATES`, from one state, without noise and with normal noise
    on every parameter's gradient whose norm is the gradient's over a ratio."""
    trainer = trainer_of({"optimizer.decay": "constant", "max_steps": TRAINED + STEPS}, seed, quick)
    before, after = (3, 3) if quick else (TRAINED, STEPS)
    for _ in range(before):
        step(trainer)
    state, start, found = trainer.capture(), validation_loss(trainer), {}
    for number, ratio in enumerate((math.inf, *RATIOS)):
        ends = []
        for rate in RATES[-1:] if quick else RATES:
            trainer.restore(state)
            generator = drawing(seed, number)

            def disturb(optimizer: torch.optim.Optimizer, *_: object, ratio=ratio, generator=generator) -> None:
                for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                    noise = torch.randn(p.shape, generator=generator)
                    p.grad += noise * (p.grad.norm() / (ratio * noise.norm()))

            hook = trainer.optimizer.register_step_pre_hook(disturb)
            for _ in range(after):
                trainer.train_step(*trainer.batch(trainer.step + 1), schedule=lambda _, rate=rate: rate)
            hook.remove()
            ends.append(validation_loss(trainer))
        found[f"progress_{ratio:.3g}"] = start - min(ends)
    return found


def bend(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(where two lines that meet fit y best, the first of them level; their squared error over that of one line)."""
    best, error = float(x[0]), math.inf
    for knee in np.linspace(x.min(), x.max(), 401)[1:-1]:
        design = np.column_stack([np.ones(len(x)), np.minimum(x - knee, 0.0)])
        fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
        if (found := float(np.square(y - fitted).sum())) < error:
            best, error = float(knee), found
    line = np.polyval(np.polyfit(x, y, 1), x)
    return best, error / float(np.square(y - line).sum())


def knee(arms: Mapping[str, Values]) -> Values:
    """Progress as a share of that without noise, and the bend of it over log2 of the ratio."""
    (values,) = arms.values()
    share = [values[f"progress_{ratio:.3g}"] / values["progress_inf"] for ratio in RATIOS]
    at, left = bend(np.log2(RATIOS), np.asarray(share))
    return {
        "knee": 2.0**at,
        "kink": left,
        "plain": values["progress_inf"],
        "share_high": share[0],
        "share_sqrt3": float(np.interp(math.log2(math.sqrt(3)), np.log2(RATIOS)[::-1], share[::-1])),
        "share_low": share[-1],
    }
