"""The failure report of each kind of collapse, from real small runs, and the gathering of its data."""

import json
import math
import re
import shlex

import pytest
import torch

from altgrad.monitor.failure_report import (
    gather,
    interventions,
    loss_around,
)
from altgrad.monitor.failure_rows import gradient_facts, layer_columns, layer_rows, trends
from altgrad.records.run import Run
from altgrad.report.pages.failure import headline
from altgrad.training.config.loading import load_config
from altgrad.training.format_runner import FormatExperimentRunner
from altgrad.training.step.measuring import diagnose_collapse
from altgrad.training.trainer import Trainer, build_model
from tests.training.tiny import corpus_overrides

TINY = [
    *("model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "data.batch_size=4"),
    *("evaluation.batches=1", "optimizer.warmup_steps=0", "checkpoint_interval=10"),
]


def config(tmp_path, *overrides, name="e7m0_uniform"):
    where = [f"runs_dir={tmp_path}/runs", f"checkpoint_dir={tmp_path}/checkpoints"]
    return load_config(f"experiments/configs/{name}.yaml", [*TINY, *where, *corpus_overrides(tmp_path), *overrides])


KINDS = {
    "freeze": ["max_steps=200", "optimizer.lr=1e-6", "verdict.freeze_window=50"],
    "nonfinite": ["max_steps=40", "scaling=none", "weight_storage=master", "optimizer.lr=1e30"],
    "divergence": [
        "max_steps=80",
        "weight_storage=master",
        "fp8_format=FP32",
        "optimizer.lr=1e-2",
        "optimizer.options={maximize: true}",  # the loss climbs because it is told to
        "verdict.divergence_window=10",
    ],
}


@pytest.fixture(scope="module", params=KINDS)
def collapsed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    runner = FormatExperimentRunner(config(folder, *KINDS[request.param]), command="altgrad run this.yaml")
    return request.param, runner.run(), folder


def test_every_collapse_leaves_a_report_in_html_and_markdown(collapsed):
    kind, result, folder = collapsed
    assert result.status == "collapsed"
    assert result.verdict["kind"] == kind
    detected = result.verdict["detected_step"]
    stem = folder / "checkpoints" / "failure_reports" / f"step-{detected:06d}-{kind}"
    html, markdown = stem.with_suffix(".html").read_text(), stem.with_suffix(".md").read_text()
    assert result.details["failure_report"] == str(stem.with_suffix(".html"))
    for text in (html, markdown):
        assert kind in text
        assert str(result.verdict["onset_step"]) in text
        assert str(detected) in text
        assert "altgrad run this.yaml" in text
        assert "head" in text  # the table per layer
        assert ("altgrad autopsy" in text) == (kind != "divergence")  # that one is a float32 run
    assert not re.search(r"""(src|href)=["']?https?:""", html)  # opens offline


def test_the_last_good_and_the_collapsed_state_are_kept(collapsed):
    _kind, result, folder = collapsed
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert f"collapsed-{result.verdict['detected_step']:08d}" in names
    good = [n for n in names if n.startswith("last-good-")]
    assert len(good) == 1
    assert int(good[0][-8:]) < result.verdict["onset_step"]
    markdown = next((folder / "checkpoints" / "failure_reports").glob("*.md")).read_text()
    assert good[0] in markdown


def test_the_table_is_measured(collapsed):
    kind, _result, folder = collapsed
    markdown = next((folder / "checkpoints" / "failure_reports").glob("*.md")).read_text()
    assert "Elements" in markdown
    if kind == "freeze":
        assert "100" in markdown.split("Layers that no longer move")[1]
    if kind == "divergence":
        assert "not measured" in markdown  # FP32 has no codes: no zero-update layers


def test_diagnosis_leaves_the_trainer_bit_for_bit_as_it_was(tmp_path):
    trainer = Trainer(config(tmp_path, "fp8_format=E3M4", "rounding=stochastic"))
    for step in range(1, 4):
        trainer.train_step(*trainer.batch(step))
    kept = [p.detach().clone() for p in trainer.model.parameters()]
    records = diagnose_collapse(trainer)
    assert {r["step"] for r in records} == {4}
    assert {r["role"] for r in records} == {"input", "weight", "grad_output", "gradient", "update"}
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer.model.parameters(), strict=True))
    loss = trainer.train_step(*trainer.batch(4)).loss
    fresh = Trainer(config(tmp_path, "fp8_format=E3M4", "rounding=stochastic"))
    losses = [fresh.train_step(*fresh.batch(step)).loss for step in range(1, 5)]
    assert loss == losses[-1]


def test_the_printed_command_makes_the_run_again(tmp_path):
    """Not a look-up of the finished run, nor its continuation: the same losses in a folder of its own."""
    short = ["max_steps=30", "optimizer.lr=1e-6", "verdict.freeze_window=5", "verdict.freeze_smoothing=2"]
    result = FormatExperimentRunner(config(tmp_path, *short)).run()
    assert result.status == "collapsed"
    markdown = next((tmp_path / "checkpoints" / "failure_reports").glob("*.md")).read_text()
    (line,) = [line for line in markdown.splitlines() if line.startswith("altgrad run ")]
    _, _, path, *overrides = shlex.split(line)
    again = FormatExperimentRunner(load_config(path, overrides))
    assert again.run_dir != result.run_dir
    assert not again.run_dir.exists()
    assert again.run().verdict == result.verdict
    losses = [[m["loss"] for m in Run(folder).records("step")] for folder in (result.run_dir, again.run_dir)]
    assert losses[0] == losses[1] != []


def test_a_model_of_ones_own_has_no_command(tmp_path):
    short = config(
        tmp_path, "max_steps=30", "optimizer.lr=1e-6", "verdict.freeze_window=5", "verdict.freeze_smoothing=2"
    )
    FormatExperimentRunner(short, build_model(short, 256)).run()
    markdown = next((tmp_path / "checkpoints" / "failure_reports").glob("*.md")).read_text()
    assert "altgrad run" not in markdown
    assert "given its model, data or loss in Python" in markdown


# -- gathering --------------------------------------------------------------------------------------------------------


def step(n, loss=1.0, **more):
    return {"kind": "step", "step": n, "loss": loss, "finite": True, "grad_norm": 1.0, **more}


def monitored(n, layer, role, **stats):
    return {"kind": "monitor", "step": n, "layer": layer, "role": role, **stats}


RESULT = {
    "name": "a", "run_id": "a-s1-0", "steps": 9,
    "verdict": {"kind": "nonfinite", "onset_step": 3, "detected_step": 5, "metric": "m", "value": 3, "threshold": 3, "reason": "r"},
}  # fmt: skip


def gathered(metrics, **more):
    return gather(
        metrics=metrics, environment=None, result=RESULT, config={"seed": 1, "model": {"n_layer": 2}},
        command="c", last_good=None, collapsed=None, **more,
    )  # fmt: skip


def test_what_was_not_measured_is_none():
    data = gathered([])
    for name in (
        "loss",
        "loss_values",
        "gradient",
        "zero_update_layers",
        "layers",
        "trends",
        "checkpoint_good",
        "environment",
    ):
        assert getattr(data, name) is None, name
    assert data.interventions == []
    assert data.config == {"seed": 1, "model.n_layer": 2}


def test_loss_before_at_after_and_best():
    steps = {n: step(n, loss) for n, loss in enumerate([4.0, 3.0, "nan", "nan"], start=1)}
    around = loss_around(steps, 3)
    assert around.before == (2, 3.0)
    assert around.best == (2, 3.0)
    assert around.at[0] == 3
    assert math.isnan(around.at[1])
    assert around.after[0] == 4


def test_gradient_sparsity_is_weighted_by_elements():
    facts = gradient_facts(
        [
            monitored(7, "a", "gradient", elements=30.0, zero_frac=0.5, near_zero_frac=0.1, nonfinite_frac=0.0),
            monitored(7, "b", "gradient", elements=10.0, zero_frac=0.1, near_zero_frac=0.5, nonfinite_frac=0.0),
            monitored(7, "b", "update", flips=1),
        ]
    )
    assert (facts.zero_frac, facts.elements, facts.step) == (0.4, 40, 7)
    assert facts.near_zero_frac == pytest.approx(0.6)


def test_all_nan_gradients_are_called_that():
    records = [monitored(7, "a", "gradient", elements=3.0, zero_frac=0.0, near_zero_frac=0.0, nonfinite_frac=1.0)]
    data = gathered([step(1)], records=records)
    assert data.gradient.all_nonfinite
    assert any("Every gradient element is NaN" in note for note in data.notes)


def test_zero_update_layers_are_those_with_attempts_and_no_flip():
    records = [
        monitored(7, "frozen", "update", attempted=10.0, flips=0.0),
        monitored(7, "moving", "update", attempted=10.0, flips=1.0),
        monitored(7, "idle", "update", attempted=0.0, flips=0.0),
    ]
    data = gathered([step(1)], records=records)
    assert data.zero_update_layers == ["frozen"]
    assert data.layers_measured == 2


def test_layer_rows_put_the_stall_with_the_weight():
    rows = layer_rows(
        [
            monitored(7, "a", "grad_output", overflow=0.3, underflow=0.2),
            monitored(7, "a", "weight", overflow=0.0, underflow=0.1, sqnr_db=20.0),
            monitored(7, "a", "update", stall=0.9),
        ]
    )
    assert [(r.role, r.values) for r in rows] == [
        ("weight", {"overflow": 0.0, "underflow": 0.1, "sqnr_db": 20.0, "stall": 0.9}),
        ("grad_output", {"overflow": 0.3, "underflow": 0.2}),
    ]
    assert [(c.heading, c.lost) for c in layer_columns(rows)] == [
        ("Overflow", True),
        ("Underflow", True),
        ("Stall", True),
        ("SQNR", False),
    ]


def test_an_operand_of_nan_alone_has_a_row_and_a_sound_norm_weight_has_none():
    rows = layer_rows(
        [
            monitored(7, "a", "grad_output", nonfinite_frac=1.0),
            monitored(7, "norm", "weight", nonfinite_frac=0.0),
        ]
    )
    assert [(r.layer, r.values) for r in rows] == [("a", {"nonfinite_frac": 1.0})]


def test_trends_cover_the_last_steps_and_say_how_layers_were_joined():
    steps = {n: step(n, 1.0 / n) for n in range(1, 101)}
    records = [
        monitored(n, layer, "weight", overflow=v, l2=v) for n in (90, 100) for layer, v in (("a", 1.0), ("b", 3.0))
    ]
    found = {t.name: t for t in trends(steps, records)}
    assert list(found["loss"].steps) == list(range(51, 101))
    assert list(found["overflow (largest of layers)"].values) == [3.0, 3.0]
    assert list(found["l2 (mean of layers)"].values) == [2.0, 2.0]
    assert "stall_rate" not in found


def test_interventions_join_runs_and_tell_what_changed():
    steps = {n: step(n, 5.0 - 0.1 * n, stall_rate=0.9 if n <= 4 else 0.2) for n in range(1, 9)}
    events = [
        {"step": 1, "event": "clip", "grad_norm": 7.0, "clip_threshold": 0.5},
        {"step": 2, "event": "clip", "grad_norm": 9.0, "clip_threshold": 0.5},
        {"step": 3, "event": "skip_nonfinite"},
        {
            "step": 4,
            "event": "shift",
            "from_format": "E7M0",
            "to_format": "E5M2",
            "reason": "stall",
            "rewound_to": None,
        },
        {"step": 5, "event": "regrid"},
    ]
    clip, skip, shift = interventions(events, steps)
    assert (clip.step, clip.detail) == (1, "2 steps, 1 to 2")
    assert "9 at most, cut to 0.5" in clip.effect
    assert skip.kind == "step skipped"
    assert shift.detail == "E7M0 to E5M2, because of stall"
    assert "loss 4.6 before, 4.2 at step 8" in shift.effect
    assert "stall rate 0.9 before, 0.2" in shift.effect


def test_a_cut_off_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1)) + "\n" + '{"kind": "st')
    assert [r["step"] for r in Run(tmp_path).records()] == [1]
    assert Run(tmp_path / "none").records() == []


def test_the_headline_names_the_format_in_force_at_the_onset():
    shift = {"kind": "event", "event": "shift", "step": 2, "from_format": "E7M0", "to_format": "E5M2", "reason": "nan"}
    data = gathered([step(1), step(2), shift, step(3)])
    assert data.interventions[0].to_format == "E5M2"
    assert "shifted to E5M2 at step 2" in headline(data)
    assert "shifted" not in headline(gathered([step(1), {**shift, "step": 4}]))  # after the onset, at step 3
