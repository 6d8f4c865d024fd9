"""Verdicts: the exact onset and detection steps, and what is not a collapse."""

import math
import random

import pytest

from altgrad.training.config.experiment import VerdictSection
from altgrad.training.step.judge import Judge, StepFacts, Verdict

LIMITS = VerdictSection()


def judge(steps, *, can_shift=False, limits=LIMITS, state_at=None) -> Verdict | None:
    """The first verdict on (loss, stall_rate) pairs or keyword dicts of StepFacts, from step 1 on."""
    watching = Judge(limits)
    for step, facts in enumerate(steps, start=1):
        if step == state_at:
            state, watching = watching.state_dict(), Judge(limits)
            watching.load_state_dict(state)
        given = {"loss": 5.0, "finite": True, "grad_norm": 1.0, "stall_rate": None, **facts}
        verdict = watching.see(StepFacts(step=step, **given), can_shift=can_shift)
        if verdict:
            return verdict
    return None


def falling(n, start=5.0, slope=0.01):
    return [{"loss": start - slope * i} for i in range(n)]


BAD = {"loss": math.nan, "finite": False, "grad_norm": math.nan}


def test_a_healthy_run_has_no_verdict():
    assert judge(falling(300)) is None


def test_a_run_that_merely_ends_worse_has_not_collapsed():
    assert judge(falling(100) + [{"loss": 4.5}] * 300) is None


def test_nonfinite_needs_patience():
    assert judge([*falling(10), BAD, BAD, *falling(10), BAD, BAD, *falling(10)]) is None
    verdict = judge([*falling(10), BAD, BAD, BAD])
    assert verdict is not None
    assert (verdict.kind, verdict.onset_step, verdict.detected_step) == ("nonfinite", 11, 13)
    assert (verdict.value, verdict.threshold) == (3, LIMITS.nonfinite_patience)


def test_nonfinite_waits_while_another_format_can_be_tried():
    assert judge([*falling(10), *[BAD] * 50], can_shift=True) is None


def test_finite_loss_with_nonfinite_gradients_counts():
    verdict = judge([{"loss": 5.0, "finite": False, "grad_norm": math.inf}] * 3)
    assert verdict is not None
    assert verdict.onset_step == 1


def test_divergence_above_the_start():
    verdict = judge([*falling(20), *[{"loss": 5.3}] * 60])
    assert verdict is not None
    assert (verdict.kind, verdict.onset_step, verdict.detected_step) == ("divergence", 21, 70)
    assert verdict.threshold == pytest.approx(5.25)
    assert judge([*falling(20), *[{"loss": 5.3}] * 49, *falling(20)]) is None
    assert judge([*falling(20), *[{"loss": 5.2}] * 60]) is None  # within the margin


def test_divergence_far_above_the_best():
    verdict = judge([*falling(200, slope=0.02), *[{"loss": 2.6}] * 60])  # best mean of 10: 1.11
    assert verdict is not None
    assert (verdict.kind, verdict.onset_step, verdict.detected_step) == ("divergence", 201, 250)
    assert verdict.threshold == pytest.approx(2 * 1.11)


STUCK = {"loss": 4.8, "stall_rate": 0.97}


def test_freeze_needs_stall_and_no_progress_and_gradients():
    verdict = judge([{**STUCK, "warmup": step < 20} for step in range(80)])
    assert verdict is not None
    assert (verdict.kind, verdict.onset_step, verdict.detected_step) == ("freeze", 21, 75)
    assert (verdict.metric, verdict.value, verdict.threshold) == ("stall_rate", 0.97, 0.95)
    assert judge([STUCK] * 80).onset_step == 1
    assert judge([{**STUCK, "stall_rate": 0.94}] * 200) is None
    assert judge([{**STUCK, "grad_norm": 0.0}] * 200) is None
    assert judge([{**STUCK, "stall_rate": None}] * 200) is None
    assert judge([{"loss": 5 - 0.01 * i, "stall_rate": 0.99} for i in range(200)]) is None


def test_one_step_that_moves_weights_starts_the_stretch_anew():
    verdict = judge([*[STUCK] * 49, {**STUCK, "stall_rate": 0.5}, *[STUCK] * 60])
    assert verdict is not None
    assert (verdict.onset_step, verdict.detected_step) == (51, 100)


def test_a_freeze_begins_where_progress_ends():
    steps = [{"loss": 5 - 0.01 * min(i, 100), "stall_rate": 0.99} for i in range(300)]
    verdict = judge(steps)
    assert verdict is not None
    assert verdict.kind == "freeze"
    assert 101 <= verdict.onset_step <= 101 + LIMITS.freeze_smoothing
    assert verdict.detected_step == verdict.onset_step + LIMITS.freeze_window - 1


def test_a_run_frozen_from_the_start_has_its_onset_there():
    verdict = judge([STUCK] * 100)
    assert verdict is not None
    assert (verdict.onset_step, verdict.detected_step) == (1, LIMITS.freeze_smoothing + LIMITS.freeze_window)


@pytest.mark.parametrize("seed", range(10))
def test_slow_learning_in_noisy_batches_is_not_called_a_freeze(seed):
    noise = random.Random(seed)
    slow = [{"loss": (5 - 0.002 * i) * (1 + noise.gauss(0, 0.03)), "stall_rate": 0.99} for i in range(500)]
    assert judge(slow) is None
    frozen = [{"loss": 5 * (1 + noise.gauss(0, 0.03)), "stall_rate": 0.99} for _ in range(500)]
    verdict = judge(frozen)
    assert verdict is not None
    assert verdict.detected_step <= 200


def test_thresholds_come_from_the_config():
    limits = VerdictSection(freeze_window=10, freeze_smoothing=5, freeze_stall_rate=0.5)
    verdict = judge([{"stall_rate": 0.6}] * 20, limits=limits)
    assert verdict is not None
    assert (verdict.detected_step, verdict.threshold) == (15, 0.5)


@pytest.mark.parametrize("state_at", [1, 15, 40, 69, 92])
def test_the_state_carries_every_stretch(state_at):
    steps = [*falling(20), *[STUCK] * 100]
    assert judge(steps, state_at=state_at) == judge(steps)
    steps = [*falling(20), *[{"loss": 5.3}] * 60]
    assert judge(steps, state_at=state_at) == judge(steps)


def test_a_shift_starts_every_stretch_anew():
    watching = Judge(LIMITS)
    for step in range(1, 40):
        assert watching.see(StepFacts(step, 4.8, True, 1.0, 0.99)) is None
    watching.forget()
    verdicts = [watching.see(StepFacts(step, 4.8, True, 1.0, 0.99)) for step in range(40, 91)]
    assert [v.onset_step for v in verdicts if v] == [40, 40]
