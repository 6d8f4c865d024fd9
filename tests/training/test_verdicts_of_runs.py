"""Verdicts and remarks of real small runs: with and without decay, beside an FP32 twin, and without any learning."""

import json
from pathlib import Path

import pytest

from altgrad.analysis import read_run
from altgrad.analysis.outcome import Outcome
from altgrad.records.documents import RESULT, load_result
from altgrad.training.config.experiment import is_twin
from altgrad.training.format_runner import FormatExperimentRunner
from tests.training.tiny import metrics, tiny_config, tiny_corpus

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


@pytest.mark.parametrize("fmt", ["E1M6", "E5M2"])
def test_a_decay_to_zero_freezes_a_grid_and_the_date_is_that_of_its_stall(tmp_path, fmt):
    result = run(tmp_path, fp8_format=fmt, optimizer=optimizer("cosine"), **GRID)
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
    assert "ended far above its FP32 twin" in outcome.short_verdict
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
    assert Outcome(read_run(result.run_dir), "E3M4").short_verdict == "no collapse"


def test_a_twin_is_the_same_run_in_fp32():
    own = tiny_config(fp8_format="E5M2", weight_storage="grid", name="a")
    assert is_twin(tiny_config(fp8_format="FP32", name="b"), own)
    assert not is_twin(tiny_config(fp8_format="FP32", seed=8), own)
    assert not is_twin(tiny_config(fp8_format="FP32", optimizer={"lr": 0.5}), own)
    assert not is_twin(tiny_config(fp8_format="E3M4"), own)
    assert not is_twin(tiny_config(fp8_format="FP32"), tiny_config(fp8_format="FP32"))
