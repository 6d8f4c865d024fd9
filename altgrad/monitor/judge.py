"""When a run counts as collapsed: four kinds, each with its exact steps, evidence and threshold; and remarks, which end nothing.

nonfinite    loss or gradients were NaN or inf in `nonfinite_patience` consecutive steps, and no format is left to shift to
divergence   for `divergence_window` consecutive steps the loss was above where it started, or far above its best
freeze       for `freeze_window` consecutive steps nearly all attempted weight updates were lost to rounding, almost no
             stored code changed, and the loss made no progress; a run that ends while its weights have stood still for
             less is asked at its end, which is then a remark
no_learning  `no_learning_window` steps after warmup the loss has not left its start (or the loss of a uniform guess, where
             that is lower) by more than its noise; a run that ends before is asked at its end, which is then a remark

stalled      a remark: nearly all attempted updates were lost for `freeze_window` steps, but the run moved or improved
far_above    a remark at the end: the evaluation loss stayed far above that of the FP32 twin

Dates are those of the stall, which is the format's own: when a loss stops falling says as much of the schedule and of the
batches. Progress is judged on the evaluation loss (against that of the paired FP32 twin, where there is one: what the twin
does not gain, no format lost), and on the smoothed training loss where nothing is evaluated; the verdict says which.

A run that merely ends worse than another has not collapsed. The judge's state is plain data, so it is checkpointed and
replayed with the rest of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from altgrad.monitor.limits import VerdictLimits
from altgrad.records.schema import Verdict, VerdictKind

TRAINING, EVALUATION, TWIN = "training loss", "evaluation loss", "evaluation loss against the FP32 twin"


@dataclass(frozen=True)
class StepFacts:
    """What the judge sees of a step. `stall_rate` and `flip_rate` are None where no weight is stored on a grid."""

    step: int
    loss: float
    finite: bool
    grad_norm: float
    stall_rate: float | None
    warmup: bool = False
    flip_rate: float | None = None


@dataclass
class Judge:
    """Watches a run's steps and evaluations; `see` returns the verdict at the step that completes one.

    Args:
        limits: the config's numbers.
        chance: the loss of a uniform guess, from which falling is no learning; None where it is not known.
        twin: step -> evaluation loss of the same run in FP32; None without one.
    """

    limits: VerdictLimits
    chance: float | None = None
    twin: Mapping[int, float] | None = None
    first_loss: float | None = None
    best_mean: float = math.inf
    nonfinite_since: int | None = None
    above_start_since: int | None = None
    above_best_since: int | None = None
    stalled_since: int | None = None
    still_since: int | None = None  # stalled, and almost no code changed
    best_smoothed: float | None = None  # of the loss smoothed over `freeze_smoothing` steps
    best_at: int = 0  # the step of that best
    start: list[float] = field(default_factory=list)  # the first losses
    learned: bool = False
    warmup_steps: int = 0
    froze: bool = False
    losses: list[float] = field(default_factory=list)  # the last ones, finite only, as many as smoothing needs
    evaluations: list[list[Any]] = field(default_factory=list)  # [step, loss], finite, ascending
    remarks: list[dict[str, Any]] = field(default_factory=list)

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
        kept = max(self.limits.divergence_smoothing, self.limits.freeze_smoothing, self.limits.no_learning_window)
        self.losses = [*self.losses, facts.loss][-kept:]
        return self._see_divergence(facts) or self._see_freeze(facts) or self._see_no_learning(facts)

    def see_evaluation(self, step: int, loss: float) -> None:
        """Take the evaluation after `step` steps into account, if finite; of two of one step the later counts."""
        if math.isfinite(loss):
            self.evaluations = [*([s, v] for s, v in self.evaluations if s < step), [step, loss]]

    def conclude(self, step: int) -> None:
        """At the end of a run that did not collapse: remark on one that never learned, or is far above its twin.

        A run too short for `no_learning_window` is asked after a quarter of it, one that ends within `freeze_window` steps
        of its weights standing still after half of that, if two evaluations saw them stand.
        """
        after = step - self.warmup_steps
        if not self.learned and self.start and after >= self.limits.no_learning_window / 4:
            found = self._no_learning(step)
            if found is not None:
                self._remark(found)
        self._conclude_freeze(step)
        gaps = self._gaps()
        if not gaps or self.twin is None or gaps[-1][0] != step:
            return
        limit = self.limits.twin_gap * self._progress_of_twin()
        above = [s for s, gap in gaps if not gap > limit]
        since = next((s for s, _ in gaps if not above or s > above[-1]), None)
        if since is None or limit <= 0:
            return
        gap = gaps[-1][1]
        reason = (
            f"the evaluation loss ended {gap:.3f} above that of the FP32 twin, more than {self.limits.twin_gap:.0%} of what "
            f"the twin gained ({self._progress_of_twin():.3f})"
        )
        self._remark(Verdict("far_above", since, step, "loss_above_twin", gap, limit, reason, TWIN))

    def _conclude_freeze(self, step: int) -> None:
        """A stall whose weights stand still at the end, and whose evaluations since then show no learning, is a freeze."""
        stalled = next((r for r in self.remarks if r["kind"] == "stalled"), None)
        since = self.still_since
        if stalled is None or since is None or step - since + 1 < self.limits.freeze_window / 2:
            return
        seen = [loss for at, loss in self.evaluations if at >= since - 1]
        if len(seen) < 2 or min(seen[1:]) < seen[0] * (1 - self.limits.freeze_improvement):
            return
        reason = (
            f"{stalled['reason'].split(';')[0]}; since step {since} at most {self.limits.freeze_flip_rate:.2%} of the stored "
            f"codes changed in a step, and the evaluation loss, {seen[0]:.4f} then, did not come "
            f"{self.limits.freeze_improvement:.2%} below that until the run's end"
        )
        self.remarks = [r for r in self.remarks if r is not stalled]
        self._remark(
            replace(Verdict(**stalled), kind="freeze", detected_step=step, reason=reason, judged_on=EVALUATION)
        )

    def forget(self) -> None:
        """Start every stretch anew: the format changed, what led here no longer counts."""
        self.nonfinite_since = self.above_start_since = self.above_best_since = None
        self.stalled_since = self.still_since = None

    def _see_nonfinite(self, facts: StepFacts, can_shift: bool) -> Verdict | None:
        self.nonfinite_since = facts.step if self.nonfinite_since is None else self.nonfinite_since
        self.above_start_since = self.above_best_since = self.stalled_since = self.still_since = None
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
                return Verdict("divergence", since, facts.step, "loss", facts.loss, limit, reason, TRAINING)
        return None

    def _see_freeze(self, facts: StepFacts) -> Verdict | None:
        limits = self.limits
        self._note_best(facts.step)
        stalled = (
            facts.stall_rate is not None
            and facts.stall_rate >= limits.freeze_stall_rate
            and facts.grad_norm > 0
            and not facts.warmup
        )
        still = stalled and (facts.flip_rate is None or facts.flip_rate <= limits.freeze_flip_rate)
        self.stalled_since = _streak(self.stalled_since, facts.step, stalled)
        self.still_since = _streak(self.still_since, facts.step, still)
        if self.stalled_since is None or facts.step - self.stalled_since + 1 < limits.freeze_window:
            return None
        assert facts.stall_rate is not None
        if self.still_since is not None and facts.step - self.still_since + 1 >= limits.freeze_window:
            progressed, judged_on, words = self._progress(self.still_since, facts.step)
            if progressed is False:
                reason = (
                    f"since step {self.stalled_since} at least {limits.freeze_stall_rate:.0%} of the attempted weight "
                    f"updates were lost to rounding with nonzero gradients, since step {self.still_since} at most "
                    f"{limits.freeze_flip_rate:.2%} of the stored codes changed in a step, and {words}"
                )
                self.froze = True
                self.remarks = [r for r in self.remarks if r["kind"] != "stalled"]  # it came to more
                return self._stall_verdict("freeze", facts, reason, judged_on)
        if not self.froze and not any(r["kind"] == "stalled" for r in self.remarks):
            moved = (
                "" if facts.flip_rate is None else f"; {facts.flip_rate:.2%} of the stored codes changed in the last"
            )
            reason = (
                f"since step {self.stalled_since} at least {limits.freeze_stall_rate:.0%} of the attempted weight updates "
                f"were lost to rounding in every step{moved}"
            )
            self._remark(self._stall_verdict("stalled", facts, reason, None))
        return None

    def _stall_verdict(self, kind: VerdictKind, facts: StepFacts, reason: str, judged_on: str | None) -> Verdict:
        assert facts.stall_rate is not None
        assert self.stalled_since is not None
        limit = self.limits.freeze_stall_rate
        return Verdict(kind, self.stalled_since, facts.step, "stall_rate", facts.stall_rate, limit, reason, judged_on)

    def _progress(self, since: int, step: int) -> tuple[bool | None, str, str]:
        """(whether the loss set a new best in the last window, which loss, in words); None while that cannot be said.

        The evaluation loss can be judged once two evaluations saw the stretch that began at step `since`.
        """
        least, window = self.limits.freeze_improvement, self.limits.freeze_window
        if sum(s >= since - 1 for s, _ in self.evaluations) >= 2:
            best_at, best = _last_best(self.evaluations, least)
            words = f"the evaluation loss did not come {least:.2%} below its best, {best:.4f} at step {best_at}"
            twin = [[s, loss] for s, loss in sorted((self.twin or {}).items()) if s <= step]
            if not twin:
                return step - best_at < window, EVALUATION, words
            gains = step - _last_best(twin, least)[0] < window
            progressed = True if step - best_at < window else False if gains else None
            return progressed, TWIN, f"{words}, while that of the FP32 twin did"
        if self.evaluations and step - since + 1 < 3 * window:
            return None, EVALUATION, ""  # wait for the next evaluations
        if self.best_smoothed is None:
            return None, TRAINING, ""
        words = (
            f"the training loss (mean of {self.limits.freeze_smoothing} steps) did not come {least:.2%} below its best, "
            f"{self.best_smoothed:.4f}"
        )
        return step - self.best_at < window, TRAINING, words

    def _see_no_learning(self, facts: StepFacts) -> Verdict | None:
        limits = self.limits
        if facts.warmup:
            self.warmup_steps = facts.step
        if len(self.start) < _START:
            self.start.append(facts.loss)
            # A model that begins far below chance has learned before.
            self.learned = self.chance is not None and sum(self.start) / len(self.start) < 0.9 * self.chance
        if self.learned or facts.step - self.warmup_steps < limits.no_learning_window:
            return None
        found = self._no_learning(facts.step)
        self.learned = found is None
        return found

    def _no_learning(self, step: int) -> Verdict | None:
        """The later half of the losses against the start, and against the earlier half; three standard errors count."""
        half = max(1, len(self.losses) // 2)
        earlier, later = self.losses[:half], self.losses[-half:]
        mean = sum(later) / half
        error = 3 * math.sqrt(sum((loss - mean) ** 2 for loss in later) / half)
        start = sum(self.start) / len(self.start)
        limits = [
            start - error * math.sqrt(1 / half + 1 / len(self.start)),
            sum(earlier) / half - error * math.sqrt(2 / half),
        ]
        chance = math.inf if self.chance is None else self.chance - error / math.sqrt(half)
        limit = min(max(limits), chance)
        evaluated = [loss for _, loss in self.evaluations]
        fell = len(evaluated) > 1 and evaluated[-1] < min(evaluated[0] - error / math.sqrt(half), chance)
        if mean < limit or fell:
            return None
        guess = "" if self.chance is None else f" (a uniform guess has {self.chance:.4f})"
        reason = (
            f"the training loss, {mean:.4f} in the mean of the last {half} steps, has not left its start, {start:.4f}, by "
            f"more than its noise{guess}"
        )
        judged_on = EVALUATION if len(evaluated) > 1 else TRAINING
        return Verdict("no_learning", 1, step, "mean_loss", mean, limit, reason, judged_on)

    def _note_best(self, step: int) -> None:
        """Compare the smoothed loss with its best; the first one has nothing to improve on."""
        recent = self.losses[-self.limits.freeze_smoothing :]
        if len(recent) < self.limits.freeze_smoothing:
            return
        smoothed = sum(recent) / len(recent)
        if self.best_smoothed is None or smoothed < self.best_smoothed * (1 - self.limits.freeze_improvement):
            self.best_smoothed, self.best_at = smoothed, step

    def _gaps(self) -> list[tuple[int, float]]:
        """(step, evaluation loss minus the twin's) where both were evaluated."""
        twin = self.twin or {}
        return [(step, loss - twin[step]) for step, loss in self.evaluations if step in twin]

    def _progress_of_twin(self) -> float:
        """What the twin's evaluation loss fell by, from its first to its best."""
        losses = [self.twin[step] for step in sorted(self.twin)] if self.twin else [0.0]
        return losses[0] - min(losses)

    def _remark(self, verdict: Verdict) -> None:
        self.remarks.append(verdict.as_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything but the limits and what the run was given, as plain values."""
        state = {name: value for name, value in vars(self).items() if name not in _GIVEN}
        return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result; what an older one lacks keeps its present value."""
        known = {f.name for f in fields(self)} - _GIVEN
        for name in known & set(state):
            value = state[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)


_GIVEN = frozenset({"limits", "chance", "twin"})
_START = 5
"""Steps whose mean loss is where a run starts: few, since it may learn at once."""


def _last_best(evaluations: list[list[Any]], least: float) -> tuple[int, float]:
    """(step, loss) of the last evaluation that came below all before it by that fraction; the first has no loss to beat."""
    best_at, best = evaluations[0]
    for step, loss in evaluations[1:]:
        if loss < best * (1 - least):
            best_at, best = step, loss
    return best_at, best


def _streak(since: int | None, step: int, holds: bool) -> int | None:
    """First step of the unbroken stretch in which the condition held."""
    if not holds:
        return None
    return step if since is None else since
