"""When a run counts as collapsed: three kinds, each with its exact steps, evidence and threshold.

nonfinite   loss or gradients were NaN or inf in `nonfinite_patience` consecutive steps, and no format is left to shift to
divergence  for `divergence_window` consecutive steps the loss was above where it started, or far above its best
freeze      for `freeze_window` consecutive steps nearly all attempted weight updates were lost to rounding while the
            gradients were nonzero, and the smoothed loss set no new best (so noise alone does not make one)

A run that merely ends worse than another has not collapsed. The judge's state is plain data, so it is checkpointed and
replayed with the rest of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from altgrad.records.schema import Verdict
from altgrad.training.config.experiment import VerdictSection


@dataclass(frozen=True)
class StepFacts:
    """What the judge sees of a step. `stall_rate` is None where no weight is stored on a grid."""

    step: int
    loss: float
    finite: bool
    grad_norm: float
    stall_rate: float | None
    warmup: bool = False


@dataclass
class Judge:
    """Watches a run's steps; `see` returns the verdict at the step that completes one."""

    limits: VerdictSection
    first_loss: float | None = None
    best_mean: float = math.inf
    nonfinite_since: int | None = None
    above_start_since: int | None = None
    above_best_since: int | None = None
    stalled_since: int | None = None
    best_smoothed: float | None = None  # of the loss smoothed over `freeze_smoothing` steps
    best_at: int = 0  # the step of that best
    improved_at: int = 0  # the same, but 0 while it is the first, which improved on nothing
    losses: list[float] = field(default_factory=list)  # the last ones, finite only, as many as smoothing needs

    def see(self, facts: StepFacts, *, can_shift: bool = False) -> Verdict | None:
        """Take a step into account.

        Args:
            can_shift: another format will be tried for non-finite steps, so they do not end the run yet.
        """
        if not facts.finite:
            return self._see_nonfinite(facts, can_shift)
        self.nonfinite_since = None
        if self.first_loss is None:
            self.first_loss = facts.loss
        self.losses = [*self.losses, facts.loss][-max(self.limits.divergence_smoothing, self.limits.freeze_smoothing) :]
        return self._see_divergence(facts) or self._see_freeze(facts)

    def forget(self) -> None:
        """Start every stretch anew: the format changed, what led here no longer counts."""
        self.nonfinite_since = self.above_start_since = self.above_best_since = self.stalled_since = None

    def _see_nonfinite(self, facts: StepFacts, can_shift: bool) -> Verdict | None:
        self.nonfinite_since = facts.step if self.nonfinite_since is None else self.nonfinite_since
        self.above_start_since = self.above_best_since = self.stalled_since = None
        steps, patience = facts.step - self.nonfinite_since + 1, self.limits.nonfinite_patience
        if steps < patience or can_shift:
            return None
        reason = f"loss or gradients were not finite in {steps} consecutive steps; no update was applied in them"
        return Verdict(
            "nonfinite", self.nonfinite_since, facts.step, "consecutive_nonfinite_steps", steps, patience, reason
        )

    def _see_divergence(self, facts: StepFacts) -> Verdict | None:
        assert self.first_loss is not None
        window, smoothing = self.limits.divergence_window, self.limits.divergence_smoothing
        recent = self.losses[-smoothing:]
        start_limit = self.first_loss * (1 + self.limits.divergence_margin)
        best_limit = self.best_mean * self.limits.divergence_ratio
        self.above_start_since = _streak(self.above_start_since, facts.step, facts.loss > start_limit)
        self.above_best_since = _streak(self.above_best_since, facts.step, facts.loss > best_limit)
        if len(recent) == smoothing:
            self.best_mean = min(self.best_mean, sum(recent) / smoothing)
        for since, limit, what in (
            (self.above_start_since, start_limit, f"its first value {self.first_loss:.4g}"),
            (self.above_best_since, best_limit, f"its best mean {self.best_mean:.4g}"),
        ):
            if since is not None and facts.step - since + 1 >= window:
                reason = f"the loss stayed above {limit:.4g} for {window} steps, set by {what}"
                return Verdict("divergence", since, facts.step, "loss", facts.loss, limit, reason)
        return None

    def _see_freeze(self, facts: StepFacts) -> Verdict | None:
        limits = self.limits
        self._note_improvement(facts.step)
        stalled = (
            facts.stall_rate is not None
            and facts.stall_rate >= limits.freeze_stall_rate
            and facts.grad_norm > 0
            and not facts.warmup
        )
        self.stalled_since = _streak(self.stalled_since, facts.step, stalled)
        if self.stalled_since is None or self.best_smoothed is None:
            return None
        if facts.step - max(self.stalled_since - 1, self.best_at) < limits.freeze_window:
            return None
        onset = max(self.stalled_since, self.improved_at + 1)
        assert facts.stall_rate is not None
        reason = (
            f"for {limits.freeze_window} steps with nonzero gradients at least {limits.freeze_stall_rate:.0%} of the "
            f"attempted weight updates were lost to rounding, and the loss (mean of {limits.freeze_smoothing} steps) did "
            f"not come {limits.freeze_improvement:.2%} below its best, {self.best_smoothed:.4f}"
        )
        return Verdict("freeze", onset, facts.step, "stall_rate", facts.stall_rate, limits.freeze_stall_rate, reason)

    def _note_improvement(self, step: int) -> None:
        """Compare the smoothed loss with its best; the first one has nothing to improve on."""
        recent = self.losses[-self.limits.freeze_smoothing :]
        if len(recent) < self.limits.freeze_smoothing:
            return
        smoothed = sum(recent) / len(recent)
        if self.best_smoothed is None:
            self.best_smoothed, self.best_at = smoothed, step
        elif smoothed < self.best_smoothed * (1 - self.limits.freeze_improvement):
            self.best_smoothed, self.best_at, self.improved_at = smoothed, step, step

    def state_dict(self) -> dict[str, Any]:
        """Everything but the limits, as plain values."""
        return {name: value for name, value in vars(self).items() if name != "limits"} | {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result."""
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)


def _streak(since: int | None, step: int, holds: bool) -> int | None:
    """First step of the unbroken stretch in which the condition held."""
    if not holds:
        return None
    return step if since is None else since
