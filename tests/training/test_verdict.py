"""Verdicts: the exact onset and detection steps, on made losses and on real runs, and what is not a collapse."""

import json
import math
import random
from pathlib import Path

import pytest

from altgrad.analysis import read_run
from altgrad.analysis.outcome import Outcome
from altgrad.monitor.judge import Judge, StepFacts, Verdict
from altgrad.monitor.limits import VerdictLimits
from altgrad.records.documents import RESULT, load_result
from altgrad.training.config.identity import is_twin
from altgrad.training.format_runner import FormatExperimentRunner
from tests.training.tiny import metrics, tiny_config, tiny_corpus

LIMITS = VerdictLimits()


def judge(steps, *, can_shift=False, limits=LIMITS, state_at=None) -> Verdict | None:
    """The first verdict on (loss, stall_rate) pairs or keyword dicts of StepFacts, from step 1 on."""
    watching = Judge(limits)
    for step, facts in enumerate(steps, start=1):
        if step == state_at:
            state, watching = watching.state_dict(), Judge(limits)
            watching.load_state_dict(state)
        given = {"loss": 5.0, "finite": True, "grad_norm": 1.0, "stall_rate": None, **facts}
        evaluated = given.pop("evaluated", None)
        verdict = watching.see(StepFacts(step=step, **given), can_shift=can_shift)
        if evaluated is not None:
            watching.see_evaluation(step, evaluated)
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
    assert judge([{**STUCK, "stall_rate": 0.94}] * 199) is None
    assert judge([{**STUCK, "grad_norm": 0.0}] * 199) is None
    assert judge([{**STUCK, "stall_rate": None}] * 199) is None
    assert judge([{"loss": 5 - 0.01 * i, "stall_rate": 0.99} for i in range(200)]) is None


def test_one_step_that_moves_weights_starts_the_stretch_anew():
    verdict = judge([*[STUCK] * 49, {**STUCK, "stall_rate": 0.5}, *[STUCK] * 60])
    assert verdict is not None
    assert (verdict.onset_step, verdict.detected_step) == (51, 100)


def test_a_freeze_is_dated_by_its_stall_and_detected_where_progress_ended():
    steps = [{"loss": 5 - 0.01 * min(i, 100), "stall_rate": 0.99 if i >= 60 else 0.5} for i in range(300)]
    verdict = judge(steps)
    assert verdict is not None
    assert (verdict.kind, verdict.onset_step, verdict.judged_on) == ("freeze", 61, "training loss")
    assert 101 <= verdict.detected_step - LIMITS.freeze_window <= 101 + LIMITS.freeze_smoothing


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
    limits = VerdictLimits(freeze_window=10, freeze_smoothing=5, freeze_stall_rate=0.5)
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


# -- freeze or stall: what moves, what is gained, and when -------------------------------------------------------------


def watched(steps, *, evaluations=(), twin=None, chance=None, warmup=0, limits=LIMITS):
    """(verdict, judge) after the steps; `evaluations` maps a step to the loss evaluated after it."""
    watching = Judge(limits, chance, twin)
    evaluations = dict(evaluations)
    for step in sorted(evaluations):
        if step < 1:
            watching.see_evaluation(step, evaluations[step])
    for step, facts in enumerate(steps, start=1):
        given = {"loss": 5.0, "finite": True, "grad_norm": 1.0, "stall_rate": None, **facts}
        verdict = watching.see(StepFacts(step=step, warmup=step <= warmup, **given))
        if step in evaluations:
            watching.see_evaluation(step, evaluations[step])
        if verdict:
            return verdict, watching
    return None, watching


def stalling(n, since, flips=0.0, loss=4.0):
    """Learns until the stall begins at step `since`; a fraction of codes still changes then."""
    learning = [{"loss": 5 - (5 - loss) * i / since, "stall_rate": 0.7, "flip_rate": 0.2} for i in range(since - 1)]
    return learning + [{"loss": loss, "stall_rate": 0.99, "flip_rate": flips}] * (n - since + 1)


def flat(n, every=25, until=0, start=5.0, end=4.0):
    """Evaluations that fall to `end` at step `until` and stay there."""
    return {s: start - (start - end) * min(1.0, s / max(until, 1)) for s in range(0, n + 1, every)}


def test_nothing_moves_and_the_evaluation_loss_stands_still_is_a_freeze():
    verdict, watching = watched(stalling(200, 60), evaluations=flat(200, until=50))
    assert (verdict.kind, verdict.onset_step, verdict.judged_on) == ("freeze", 60, "evaluation loss")
    assert verdict.detected_step == 109  # the window's end; steps 75 and 100 were evaluated in it
    assert watching.remarks == []


def test_codes_that_still_change_make_it_a_stall_whatever_the_loss():
    verdict, watching = watched(stalling(200, 60, flips=0.01), evaluations=flat(200, until=50))
    assert verdict is None
    (remark,) = watching.remarks
    assert (remark["kind"], remark["onset_step"], remark["detected_step"]) == ("stalled", 60, 109)
    assert (remark["metric"], remark["value"], remark["threshold"]) == ("stall_rate", 0.99, 0.95)


def test_an_evaluation_loss_that_still_falls_makes_it_a_stall_although_no_code_changes():
    verdict, watching = watched(stalling(190, 60), evaluations=flat(200, until=200))  # biases and norms still learn
    assert verdict is None
    assert [(r["kind"], r["onset_step"]) for r in watching.remarks] == [("stalled", 60)]


def test_a_stall_that_becomes_a_freeze_is_told_once():
    steps = [*stalling(150, 60, flips=0.01), *[{"loss": 4.0, "stall_rate": 1.0, "flip_rate": 0.0}] * 100]
    verdict, watching = watched(steps, evaluations=flat(250, until=50))
    assert (verdict.kind, verdict.onset_step, verdict.detected_step) == ("freeze", 60, 200)
    assert "since step 151 at most 0.20% of the stored codes" in verdict.reason
    assert watching.remarks == []


@pytest.mark.parametrize(("end", "kind"), [(4.0, "freeze"), (3.9, "stalled")])
def test_a_run_that_ends_soon_after_its_weights_stand_still_froze_if_no_evaluation_since_then_fell(end, kind):
    """95% stalled from step 118, still from 153, ended at 200, within the freeze's window."""
    steps = [*stalling(152, 118, flips=0.01), *[{"loss": 4.0, "stall_rate": 1.0, "flip_rate": 0.0}] * 48]
    verdict, watching = watched(steps, evaluations={**flat(200, until=150), 200: end})
    assert verdict is None
    watching.conclude(200)
    (remark,) = watching.remarks
    assert (remark["kind"], remark["onset_step"]) == (kind, 118)
    if kind == "freeze":
        assert remark["judged_on"] == "evaluation loss"
        assert "since step 153 at most 0.20% of the stored codes" in remark["reason"]


def test_five_formats_on_shared_batches_have_dates_of_their_own():
    """The losses stop falling at the same step, as shared batches and a shared decay make them; the stalls differ."""
    onsets = [
        watched(stalling(400, since, loss=4.0), evaluations=flat(400, until=150))[0].onset_step
        for since in (11, 60, 118, 122, 140)
    ]
    assert onsets == [11, 60, 118, 122, 140]


@pytest.mark.parametrize(("twin_end", "frozen"), [(3.0, True), (4.0, False)])
def test_what_the_fp32_twin_does_not_gain_no_format_lost(twin_end, frozen):
    """With a decay that ends at step 60 the twin stands still as well: nothing shows that the format froze."""
    twin = flat(190, until=190, end=twin_end) if frozen else flat(190, until=50, end=twin_end)
    verdict, watching = watched(stalling(190, 60), evaluations=flat(190, until=50), twin=twin)
    assert (verdict is not None) is frozen
    if frozen:
        assert verdict.judged_on == "evaluation loss against the FP32 twin"
        assert "while that of the FP32 twin did" in verdict.reason
    else:
        assert [r["kind"] for r in watching.remarks] == ["stalled"]


def test_the_training_loss_is_judged_where_evaluations_are_too_rare():
    verdict, _ = watched(stalling(400, 60), evaluations={0: 5.0})
    assert (verdict.kind, verdict.judged_on) == ("freeze", "training loss")
    assert verdict.detected_step == 60 + 3 * LIMITS.freeze_window - 1
    verdict, _ = watched(stalling(400, 60))
    assert verdict.detected_step < 60 + 2 * LIMITS.freeze_window


# -- a run that never learned ------------------------------------------------------------------------------------------


def noisy(n, level, seed=0, spread=0.03):
    noise = random.Random(seed)
    return [{"loss": level(i) * (1 + noise.gauss(0, spread))} for i in range(n)]


@pytest.mark.parametrize("seed", range(10))
def test_a_loss_that_never_leaves_its_start_is_no_learning(seed):
    verdict, _ = watched(noisy(400, lambda i: 5.69, seed), warmup=20)
    assert verdict is not None
    assert (verdict.kind, verdict.onset_step, verdict.detected_step) == ("no_learning", 1, 220)
    assert verdict.value >= verdict.threshold
    assert "has not left its start" in verdict.reason


@pytest.mark.parametrize("seed", range(10))
def test_slow_learning_is_learning(seed):
    verdict, watching = watched(noisy(500, lambda i: 5 - 0.002 * i, seed), warmup=20)
    assert verdict is None
    watching.conclude(500)
    assert watching.remarks == []


def test_a_run_stuck_at_the_loss_of_a_uniform_guess_has_not_learned():
    steps = noisy(400, lambda i: 5.545 + 0.2 * math.exp(-i / 5), spread=0.002)
    verdict, _ = watched(steps, chance=math.log(256), warmup=20)
    assert verdict is not None
    assert (verdict.kind, verdict.detected_step) == ("no_learning", 220)
    assert "a uniform guess has 5.5452" in verdict.reason
    assert watched(steps, warmup=20)[0] is None  # without knowing chance, 5.75 to 5.55 is a gain


def test_a_model_that_begins_far_below_chance_has_learned_before():
    assert watched(noisy(400, lambda i: 2.5), chance=math.log(256))[0] is None


def test_an_evaluation_that_fell_is_learning():
    steps = noisy(400, lambda i: 5.0)
    assert watched(steps, evaluations={0: 5.0, 150: 4.0})[0] is None


def test_a_short_run_that_never_learned_is_remarked_at_its_end():
    verdict, watching = watched(noisy(100, lambda i: 5.0), warmup=20)
    assert verdict is None
    watching.conclude(100)
    assert [(r["kind"], r["detected_step"]) for r in watching.remarks] == [("no_learning", 100)]
    _, short = watched(noisy(60, lambda i: 5.0), warmup=20)
    short.conclude(60)
    assert short.remarks == []  # 40 steps say nothing yet


# -- far above the twin ------------------------------------------------------------------------------------------------


def test_a_loss_far_above_the_twins_is_remarked_with_the_step_from_which_it_was():
    twin = {0: 5.0, 50: 3.0, 100: 2.5, 150: 2.2, 200: 2.0}
    own = {0: 5.0, 50: 3.5, 100: 2.7, 150: 2.6, 200: 2.5}
    verdict, watching = watched(falling(200), evaluations=own, twin=twin)
    watching.conclude(200)
    (remark,) = watching.remarks
    assert verdict is None
    assert (remark["kind"], remark["onset_step"], remark["detected_step"]) == (
        "far_above",
        150,
        200,
    )  # at 100 it was near
    assert (remark["value"], remark["threshold"]) == (pytest.approx(0.5), pytest.approx(0.3))
    near = Judge(LIMITS, twin=twin)
    near.see_evaluation(200, 2.29)
    near.conclude(200)
    assert near.remarks == []


def test_a_twin_that_was_evaluated_elsewhere_says_nothing():
    watching = Judge(LIMITS, twin={0: 5.0, 70: 1.0})
    watching.see_evaluation(0, 5.0)
    watching.see_evaluation(100, 5.0)
    watching.conclude(100)
    assert watching.remarks == []


# -- state -------------------------------------------------------------------------------------------------------------


def test_the_state_holds_evaluations_and_remarks_but_not_what_the_run_was_given():
    _, watching = watched(stalling(150, 60, flips=0.01), evaluations=flat(150), chance=5.5, twin={0: 1.0})
    state = watching.state_dict()
    assert not {"limits", "chance", "twin"} & set(state)
    again = Judge(LIMITS, 5.5, {0: 1.0})
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again == watching
    facts = StepFacts(151, 4.0, True, 1.0, 1.0, flip_rate=0.0)
    assert again.see(facts) == watching.see(facts)


def test_an_older_state_is_read():
    old = {"first_loss": 5.0, "best_mean": 4.0, "stalled_since": 7, "best_at": 3, "improved_at": 3, "losses": [5.0]}
    watching = Judge(LIMITS)
    watching.load_state_dict(old)
    assert (watching.first_loss, watching.stalled_since, watching.still_since) == (5.0, 7, None)


GRID = {
    "weight_storage": "grid",
    "max_steps": 120,
    "verdict": {"stop": False, "freeze_window": 10},
    "evaluation": {"interval": 5, "batches": 2},
}


SHORT = {**GRID, "max_steps": 60}
"""Long before the small text is learned by heart: a loss near 0 doubles by chance, which is called a divergence."""


def optimizer(decay):
    """A learning rate that ends at 0, or stays."""
    return {"lr": 3e-3, "warmup_steps": 5, "decay": decay, "min_lr_ratio": 0.0}


def run(tmp_path, twin=None, **settings):
    config = tiny_config(**{"runs_dir": str(tmp_path / "runs"), **settings})
    return FormatExperimentRunner(config, data_dir=tiny_corpus(), twin=twin).run()


def unbroken_stall_since(result, until):
    """The first step of the stretch before `until` in which at least 95% of the updates were lost."""
    since = until
    for step in sorted(metrics(result.run_dir), key=lambda m: -m["step"]):
        if step["step"] <= until:
            if step["stall_rate"] < 0.95:
                break
            since = step["step"]
    return since


def test_a_decay_to_zero_freezes_a_grid_and_the_date_is_that_of_its_stall(tmp_path):
    """E5M2, whose two mantissa bits stall early: a finer grid freezes or not with the last bits of its sums."""
    result = run(tmp_path, fp8_format="E5M2", optimizer=optimizer("cosine"), **GRID)
    assert result.verdict is not None
    assert (result.verdict["kind"], result.verdict["judged_on"]) == ("freeze", "evaluation loss")
    onset, detected = result.verdict["onset_step"], result.verdict["detected_step"]
    assert onset == unbroken_stall_since(result, detected)
    assert onset < detected <= 120
    assert result.remarks == []


@pytest.mark.parametrize("fmt", ["E1M6", "E5M2"])
def test_at_a_constant_rate_the_same_grid_does_not_freeze(tmp_path, fmt):
    """E5M2's few mantissa bits lose most updates, but the weights move and the evaluation loss falls: a stall at most."""
    result = run(tmp_path, fp8_format=fmt, optimizer=optimizer("constant"), **SHORT)
    assert (result.status, result.verdict) == ("completed", None)
    assert {remark["kind"] for remark in result.remarks} <= {"stalled"}
    for remark in result.remarks:
        assert remark["onset_step"] == unbroken_stall_since(result, remark["detected_step"])
    assert "failure_report" not in result.details


def test_a_run_far_above_its_twin_completes_and_gets_a_report(tmp_path):
    settings = {**SHORT, "optimizer": optimizer("constant"), "checkpoint_interval": 20}
    twin = run(tmp_path, fp8_format="FP32", **settings)
    assert twin.remarks == []
    result = run(tmp_path, fp8_format="E5M2", twin=twin.run_dir, **settings)
    assert (result.status, result.verdict) == ("completed", None)
    (remark,) = [r for r in result.remarks if r["kind"] == "far_above"]
    gained = metrics(twin.run_dir, "eval")[0]["val_loss"] - twin.best_val_loss
    assert remark["value"] == pytest.approx(result.final_val_loss - twin.final_val_loss)
    assert remark["threshold"] == pytest.approx(0.1 * gained)
    assert remark["detected_step"] == 60
    html = Path(result.details["failure_report"]).read_text()
    assert "E5M2 ended far above its FP32 twin" in html
    assert "evaluation loss against the FP32 twin" in html
    assert (result.run_dir / "checkpoints" / "ended-00000060").is_dir()
    again = load_result(result.run_dir)
    assert again is not None
    assert again.remarks == result.remarks
    outcome = Outcome(read_run(result.run_dir), "E5M2")
    assert not outcome.collapsed
    assert "ended far above its FP32 twin" in outcome.said
    assert "far above FP32" in outcome.short_verdict
    assert any(term == "Remark" and "FP32 twin" in text for term, text in outcome.evidence())


UNSCALED = {"fp8_format": "E1M6", "scaling": "none", "weight_storage": "master", "optimizer": optimizer("constant")}


@pytest.mark.parametrize(("window", "status"), [(40, "collapsed"), (200, "completed")])
def test_a_run_that_never_learns_fails_or_is_remarked_at_its_end(tmp_path, window, status):
    """Unscaled E1M6: every output gradient of the head rounds to zero, so nothing behind it learns."""
    result = run(tmp_path, max_steps=70, verdict={"no_learning_window": window}, **UNSCALED)
    assert result.status == status
    told = result.verdict if status == "collapsed" else result.remarks[0]
    assert told["kind"] == "no_learning"
    assert result.steps == (45 if status == "collapsed" else 70)
    assert Path(result.details["failure_report"]).exists()
    assert "never learned" in Path(result.details["failure_report"]).with_suffix(".md").read_text()


def test_an_older_result_without_remarks_is_read(tmp_path):
    result = run(tmp_path, fp8_format="E3M4", max_steps=2)
    path = result.run_dir / RESULT
    content = json.loads(path.read_text())
    for later in ("remarks", "checksum"):
        content.pop(later, None)
    path.write_text(json.dumps(content))
    old = load_result(result.run_dir)
    assert old is not None
    assert old.remarks == []
    assert read_run(result.run_dir).remarks == []
    assert Outcome(read_run(result.run_dir), "E3M4").short_verdict == "completed"


def test_a_twin_is_the_same_run_in_fp32():
    own = tiny_config(fp8_format="E5M2", weight_storage="grid", name="a")
    assert is_twin(tiny_config(fp8_format="FP32", name="b"), own)
    assert not is_twin(tiny_config(fp8_format="FP32", seed=8), own)
    assert not is_twin(tiny_config(fp8_format="FP32", optimizer={"lr": 0.5}), own)
    assert not is_twin(tiny_config(fp8_format="E3M4"), own)
    assert not is_twin(tiny_config(fp8_format="FP32"), tiny_config(fp8_format="FP32"))
