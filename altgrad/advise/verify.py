"""Short paired forks: the advised recipe against float32 and against its neighbours, from one state on the same batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from altgrad.advise.advice import Advice, expected_snr, gradient_snr
from altgrad.advise.choose import bits_of
from altgrad.advise.loop import quantized
from altgrad.advise.sensitivity import recipe_from
from altgrad.advise.trace import Tell, Trace
from altgrad.errors import ConfigError
from altgrad.loop.loop import Loop
from altgrad.nn import Recipe
from altgrad.records.metrics import OPERANDS

STARTS = 3
"""States that forks leave from, `steps` float32 steps apart: what differs from start to start is chance."""


def verify(loop: Loop, trace: Trace, advice: Advice, steps: int = 20, *, tell: Tell | None = None) -> Advice:
    """The advice with what forks of `steps` steps showed, corrected where a neighbour was better beyond chance.

    Neighbours: for each role, every layer's next best format of no more bits. A neighbour is better where its mean loss
    over the second half of its forks is lower than the recipe's by more than twice the standard error of that difference
    over the starts. The loop is left where it was.

    Raises:
        ConfigError: fewer than 2 steps, or weights on a grid.
    """
    if steps < 2:
        raise ConfigError(f"forks of {steps} steps tell nothing; take at least 2")
    if advice.budget.storage != "master":
        raise ConfigError("forks compare recipes over float32 masters; use storage master, or leave verify out")
    begun = loop.capture()
    candidates = {"advised": (advice.recipe, advice.choice.formats), **_neighbours(trace, advice)}
    losses: dict[str, list[float]] = {name: [] for name in ("float32", *candidates)}
    total, done = STARTS * len(losses), 0
    state = begun
    try:
        for _ in range(STARTS):
            following = state
            for name in losses:
                loop.restore(state)
                with quantized(loop, candidates[name][0] if name in candidates else None, seed=1):
                    found = [loop.advance() for _ in range(steps)]
                losses[name].append(float(np.mean(found[steps // 2 :])))
                if name == "float32":
                    following = loop.capture()
                done += 1
                if tell is not None:
                    tell("paired forks", done, total)
            state = following
    finally:
        loop.restore(begun)
    exact = np.array(losses.pop("float32"))
    gaps = {name: np.array(found) - exact for name, found in losses.items()}
    means = {name: float(gap.mean()) for name, gap in gaps.items()}
    best = min(means, key=lambda name: means[name] if math.isfinite(means[name]) else math.inf)
    better = gaps["advised"] - gaps[best]
    error = float(better.std(ddof=1)) / math.sqrt(STARTS)
    corrected = best != "advised" and not bool(better.mean() <= 2 * error)  # a recipe that broke is not finite
    verified: dict[str, Any] = {
        "steps": steps,
        "starts": STARTS,
        "float32_loss": float(exact.mean()),
        "gaps": {name: mean if math.isfinite(mean) else None for name, mean in means.items()},
        "errors": {name: float(gap.std(ddof=1)) / math.sqrt(STARTS) for name, gap in gaps.items()},
        "corrected_to": best if corrected else None,
    }
    if not corrected:
        return replace(advice, verified=verified)
    recipe, formats = candidates[best]
    damage = sum(row.damage or 0.0 for row in advice.rows if formats.get((row.layer, row.role)) == row.format)
    ties = {cell: found for cell, found in advice.choice.ties.items() if formats[cell] == advice.choice.formats[cell]}
    choice = replace(advice.choice, formats=dict(formats), damage=damage, ties=ties)
    said = expected_snr(damage, advice.errors.get("completeness", 1.0))
    snr = {"gradient_snr_db": said, "measured_snr_db": gradient_snr(loop, recipe)}
    return replace(advice, recipe=recipe, choice=choice, verified=verified, **snr)


def _neighbours(trace: Trace, advice: Advice) -> dict[str, tuple[Recipe, dict[tuple[str, str], str]]]:
    """The recipe with one role's formats replaced by each operand's second choice."""
    offered: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for row in advice.rows:
        if row.damage is not None:
            offered.setdefault((row.layer, row.role), []).append((row.damage, row.format))
    found = {}
    for role in OPERANDS:
        formats = dict(advice.choice.formats)
        for cell in formats:
            if cell[1] == role:
                limit = bits_of(formats[cell])
                others = [o for o in offered.get(cell, []) if o[1] != formats[cell] and bits_of(o[1]) <= limit]
                if others:
                    formats[cell] = min(others)[1]
        if formats != advice.choice.formats:
            found[f"other {role}"] = (recipe_from(formats, trace), formats)
    return found
