"""Runs read and compared: what is refused, baselines, differences, labels, headlines, and both documents."""

import json
import math
import re

import numpy as np
import pytest

from altgrad.analysis import comparison_table, read_run, write_report
from altgrad.analysis.comparability import circumstances, require_comparable
from altgrad.analysis.comparison import flatten, headline, split_facts, twins
from altgrad.analysis.outcome import label_runs
from altgrad.analysis.remedies import cause_of, damaged, remedy_of
from altgrad.errors import ReportError
from altgrad.records.run import Curve, as_number, find_runs
from altgrad.report.verdicts import ending, grade
from tests.run_folders import demo_runs, make_run


def outcomes_of(paths):
    return label_runs([read_run(path) for path in paths])


def test_the_table_has_a_row_per_run_with_its_distance_from_the_baseline(tmp_path):
    rows = comparison_table(demo_runs(tmp_path, steps=200))
    by_format = {row["format"]: row for row in rows}
    assert [row["format"] for row in rows] == ["FP32", "E5M2", "E3M4", "E1M6", "E0M7", "E7M0"]
    base, e3m4, e7m0 = by_format["FP32"], by_format["E3M4"], by_format["E7M0"]
    assert base["against_baseline"] is None
    assert e3m4["against_baseline"] == e3m4["final_val_loss"] - base["final_val_loss"]
    assert (e7m0["status"], e7m0["verdict"], e7m0["onset_step"], e7m0["steps"]) == (
        "collapsed",
        "froze, step 60",
        60,
        110,
    )
    assert by_format["E0M7"]["final_loss"] == by_format["E1M6"]["final_loss"]


def test_the_baseline_is_the_one_of_the_same_seed(tmp_path):
    runs = [make_run(tmp_path, fmt, seed=seed, steps=100) for fmt in ("FP32", "E5M2") for seed in (1, 2)]
    rows = comparison_table(runs)
    for base, row in zip(rows[:2], rows[2:], strict=True):
        assert row["seed"] == base["seed"]
        assert row["against_baseline"] == row["final_val_loss"] - base["final_val_loss"]


def test_without_validation_the_training_loss_is_compared(tmp_path):
    runs = [make_run(tmp_path, fmt, steps=40, eval_interval=10**6) for fmt in ("FP32", "E5M2")]
    for run in runs:  # the factory evaluates at the last step
        lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' not in line]
        (run / "metrics.jsonl").write_text("\n".join(lines))
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps({**result, "final_val_loss": None, "best_val_loss": None}))
    base, row = comparison_table(runs)
    assert row["final_val_loss"] is None
    assert row["against_baseline"] == row["final_loss"] - base["final_loss"]
    assert "nats of training loss" in headline(outcomes_of(runs))


def test_unfinished_runs_are_shown_for_what_they_are(tmp_path):
    runs = [make_run(tmp_path, "FP32", steps=100), make_run(tmp_path, "E3M4", steps=100, finished=False)]
    row = comparison_table(runs)[1]
    assert (row["status"], row["steps"], row["max_steps"]) == ("unfinished", 42, 100)
    outcome = outcomes_of(runs)[1]
    assert outcome.said == "No result recorded: the last step written is 42 of 100 (still running, or killed)."
    assert "E3M4 has no result yet" in headline(outcomes_of(runs))


def test_a_run_whose_process_died_says_why(tmp_path):
    run = make_run(tmp_path, "E3M4", steps=100, finished=False)
    (run / "crashes.json").write_text(json.dumps({"state": "failed", "crashes": [{"reason": "killed by signal 9"}]}))
    (outcome,) = outcomes_of([run])
    assert outcome.said.startswith("Its process died (killed by signal 9); last step written: 42 of 100.")
    assert outcome.short_verdict == "failed"


@pytest.mark.parametrize(
    ("kind", "words"), [("freeze", "froze"), ("divergence", "diverged"), ("nonfinite", "went non-finite")]
)
def test_each_kind_of_collapse_has_its_words_step_and_evidence(tmp_path, kind, words):
    (outcome,) = outcomes_of([make_run(tmp_path, "E5M2", steps=200, collapse=kind, onset=70)])
    assert outcome.said.startswith(f"{words[:1].upper()}{words[1:]} at step 70 of 200")
    evidence = dict(outcome.evidence())
    assert "threshold" in evidence["Evidence"]
    assert evidence["Reason"]
    assert headline([outcome]).startswith(f"E5M2 {words} at step 70 of 200")
    assert "NaN" not in headline([outcome])


def test_a_collapse_after_a_shift_names_the_format_in_force(tmp_path):
    detail = {"from_format": "E7M0", "to_format": "E5M2", "reason": "stall"}
    shift = [{"step": 30, "kind": "shift", "detail": detail}]
    runs = [
        make_run(tmp_path, "FP32", steps=200),
        make_run(tmp_path, "E7M0", steps=200, collapse="freeze", onset=70, interventions=shift),
    ]
    outcome = outcomes_of(runs)[1]
    assert outcome.said == "Froze at step 70 of 200, after the shift to E5M2; detected at step 120."
    assert "E7M0, shifted to E5M2, froze at step 70" in headline(outcomes_of(runs))
    assert ("Intervention", "shift at step 30: E7M0 to E5M2, because of stall") in outcome.evidence()


def test_headline_grades_every_run_and_names_every_collapse(tmp_path):
    said = headline(outcomes_of(demo_runs(tmp_path, steps=200)))
    graded = r"E3M4 ended on par with FP32 \(\+0\.0\d\d nats\); E5M2, E\dM\d and E\dM\d ended behind \(\+0\.0\d\d to \+0\.1\d\d\); "
    assert re.match(graded, said), said
    assert said.endswith("; E7M0 froze at step 60.")


@pytest.mark.parametrize(
    ("gap", "gained", "graded"),
    [(-1.0, 2.0, "on par"), (0.1, 2.0, "on par"), (0.11, 2.0, "behind"), (1.0, 2.0, "behind"), (1.01, 2.0, "barely learned"),
     (0.1, 0.0, None), (math.nan, 2.0, None)],
)  # fmt: skip
def test_a_grade_is_the_part_of_what_fp32_gained_that_a_run_lacks(gap, gained, graded):
    assert grade(gap, gained) == graded


def test_a_grade_takes_the_place_of_the_remark_on_the_distance():
    far = {"kind": "far_above", "onset_step": 25}
    stalled = {"kind": "stalled", "onset_step": 12}
    assert ending("completed", None, [stalled, far], "behind") == "behind; stalled, step 12"
    assert ending("completed", None, [far]) == "completed; far above FP32, step 25"
    froze = {"kind": "freeze", "onset_step": 11}
    assert ending("completed", None, [froze, stalled, far], "barely learned") == "barely learned; froze, step 11"


def test_a_loss_of_nan_is_the_worst_and_is_saved_too(tmp_path):
    runs = [
        make_run(tmp_path, "FP32", steps=100),
        make_run(tmp_path, "E5M2", steps=100, excess=2.5),
        make_run(tmp_path, "E7M0", steps=100, collapse="nonfinite", onset=40),
        make_run(tmp_path, "E7M0", steps=100, excess=0.1, name="saved", config={"storage_rounding": "stochastic"}),
    ]
    outcomes = outcomes_of(runs)
    assert damaged(outcomes)[0] is outcomes[2]
    assert remedy_of(outcomes[2], outcomes).saved is outcomes[3]


def test_a_run_of_one_more_setting_shows_what_saves_another(tmp_path):
    settings = {"storage_rounding": "stochastic"}
    runs = [
        make_run(tmp_path, "FP32", steps=100),
        make_run(tmp_path, "E7M0", steps=100, excess=2.5),
        make_run(tmp_path, "E7M0", steps=100, excess=0.1, name="saved", config=settings),
        make_run(tmp_path, "E5M2", steps=100, excess=0.8),
    ]
    _, damaged, saved, alone = outcomes = outcomes_of(runs)
    assert (damaged.label, saved.label) == ("E7M0", "E7M0 stochastic storage")
    remedy = remedy_of(damaged, outcomes)
    assert remedy.saved is saved
    assert remedy.command == f"altgrad run {runs[1].resolve()}/config.yaml storage_rounding=stochastic"
    assert remedy_of(saved, outcomes) is None  # nothing is wrong with it
    assert remedy_of(alone, outcomes) is None
    assert cause_of(damaged.run) is None
    (runs[1] / "autopsy").mkdir()
    (runs[1] / "autopsy" / "verdict.json").write_text(
        json.dumps({"sentence": "head.storage caused it.", "kind": "cause"})
    )
    assert cause_of(damaged.run).sentence == "head.storage caused it."
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text()
    assert "Why: head.storage caused it." in text
    assert "storage_rounding=stochastic" in text


def test_runs_that_collapsed_at_one_step_are_named_together(tmp_path):
    runs = [make_run(tmp_path, fmt, steps=200) for fmt in ("FP32", "E5M2")]
    runs += [make_run(tmp_path, fmt, steps=200, collapse="freeze", onset=90) for fmt in ("E1M6", "E0M7")]
    assert headline(outcomes_of(runs)).endswith("; E1M6 and E0M7 froze at step 90.")


def test_headline_when_every_format_collapsed(tmp_path):
    runs = [make_run(tmp_path, "FP32", steps=200)]
    runs += [
        make_run(tmp_path, fmt, steps=200, collapse="freeze", onset=90 + 10 * i)
        for i, fmt in enumerate(("E5M2", "E3M4"))
    ]
    said = headline(outcomes_of(runs))
    assert re.fullmatch(
        r"All 2 quantized runs froze; E3M4 came closest to FP32, \+\d\.\d{3}, and froze at step 100\.", said
    )


def test_headline_without_a_baseline_names_the_lowest(tmp_path):
    said = headline(outcomes_of([make_run(tmp_path, fmt, steps=100) for fmt in ("E3M4", "E1M6")]))
    assert said.startswith("E3M4 ended lowest, at validation loss")


def test_a_run_that_is_merely_worse_is_not_called_a_collapse(tmp_path):
    outcomes = outcomes_of([make_run(tmp_path, "FP32", steps=80), make_run(tmp_path, "E7M0", steps=80)])
    assert outcomes[1].said == "Completed 80 steps, barely learned."
    assert headline(outcomes).startswith("E7M0 barely learned (+")


def test_labels_say_what_differs_and_no_more(tmp_path):
    def labels(*options):
        runs = [make_run(tmp_path / str(id(options)), steps=5, **o) for o in options]
        return [o.label for o in outcomes_of(runs)]

    assert labels({"fmt": "E3M4"}, {"fmt": "E5M2"}) == ["E3M4", "E5M2"]
    assert labels({"fmt": "E3M4", "storage": "grid"}, {"fmt": "E3M4", "storage": "master"}, {"fmt": "E5M2"}) == [
        "E3M4 grid",
        "E3M4 master",
        "E5M2",
    ]
    assert labels({"fmt": "E3M4", "seed": 1}, {"fmt": "E3M4", "seed": 2}) == ["E3M4 seed 1", "E3M4 seed 2"]
    lr = [
        {"fmt": "E3M4", "name": n, "config": {"optimizer": {"name": "adamw", "lr": v}}}
        for n, v in (("a", 1e-3), ("b", 3e-4))
    ]
    assert labels(*lr) == ["E3M4 lr 0.001", "E3M4 lr 0.0003"]


def test_identical_losses_are_noticed_and_nearly_identical_ones_are_not(tmp_path):
    outcomes = outcomes_of(demo_runs(tmp_path, steps=60))
    assert twins(outcomes) == {"E0M7": "E1M6"}


@pytest.mark.parametrize("what", ["data_fingerprint", "numerics_version"])
def test_runs_of_different_corpora_or_numerics_are_refused_or_marked(tmp_path, what):
    runs = [make_run(tmp_path, "FP32", steps=20), make_run(tmp_path, "E3M4", steps=20, **{what: "other"})]
    with pytest.raises(ReportError, match=r"differs: .* \(fp32_baseline.* and other .*force"):
        write_report(runs, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    page = write_report(runs, tmp_path / "r.html", force=True).read_text()
    assert "compared by force" in page
    assert "compared by force" in (tmp_path / "r.md").read_text()


def test_other_circumstances_are_pointed_out_and_not_refused(tmp_path):
    runs = [make_run(tmp_path, "FP32", steps=20), make_run(tmp_path, "E3M4", steps=20, environment={"device": "cuda"})]
    assert require_comparable([read_run(run) for run in runs]) == []
    (said,) = circumstances([read_run(run) for run in runs])
    assert said.startswith("The device differs: cpu (fp32_baseline")


def test_torn_lines_are_told_to_the_reader(tmp_path):
    run = make_run(tmp_path, steps=30)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "1 line of metrics.jsonl could not be read and was skipped" in page


def test_one_run_alone(tmp_path):
    run = make_run(tmp_path, "E7M0", steps=100, collapse="freeze", onset=30)
    page = write_report([run], run / "report.html").read_text()
    assert "E7M0 froze at step 30 of 100; detected at step 80" in page
    assert 'href="checkpoints/failure_reports/step000080-freeze.html"' in page
    assert "settings of this run" in page


def test_a_run_with_nothing_but_a_config(tmp_path):
    run = make_run(tmp_path, "E3M4", steps=10, finished=False)
    (run / "metrics.jsonl").unlink()
    assert "No losses have been recorded yet" in write_report([run], tmp_path / "r.html").read_text()


def test_all_losses_non_finite(tmp_path):
    run = make_run(tmp_path, "E5M2", steps=50, collapse="nonfinite", onset=1)
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "went non-finite" in page


def test_markdown_says_the_same_as_the_page(tmp_path):
    runs = demo_runs(tmp_path / "runs", steps=100)
    page = write_report(runs, tmp_path / "out" / "report.html")
    markdown = page.with_suffix(".md").read_text()
    for row in comparison_table(runs):
        line = next(line for line in markdown.splitlines() if line.startswith(f"| {row['label']} |"))
        assert f"{row['final_val_loss']:.3f}" in line
        assert row["verdict"] in line
    assert "| fp8_format | none | E5M2 | E3M4 | E1M6 | E0M7 | E7M0 |" in markdown
    assert "../runs/e7m0_uniform" in markdown


def test_a_run_given_twice_counts_once(tmp_path):
    run = make_run(tmp_path, "E3M4", steps=20)
    page = write_report([run, run, tmp_path / "." / run.name], tmp_path / "r.html").read_text()
    assert page.count('<article class="verdict') == 1


def test_bad_requests_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ReportError, match="at least one"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(ReportError, match="html"):
        write_report([make_run(tmp_path, steps=5)], tmp_path / "r.pdf")


def test_writing_leaves_nothing_half_done_beside_the_report(tmp_path):
    run = make_run(tmp_path, steps=20)
    out = tmp_path / "out"
    write_report([run], out / "r.html")
    write_report([run], out / "r.html")
    assert sorted(path.name for path in out.iterdir()) == ["r.html", "r.md"]


def test_flatten_and_split():
    assert flatten({"a": {"b": 1, "c": {}}, "d": None}) == {"a.b": 1, "a.c": {}, "d": None}
    differing, shared = split_facts([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": math.pi}])
    assert differing == {"b": [2, 3], "c": [None, math.pi]}
    assert shared == {"a": 1}


def test_a_finished_run_is_read_whole(tmp_path):
    run = read_run(make_run(tmp_path, "E3M4", seed=7, steps=100))
    assert (run.format, run.seed, run.status, run.storage, run.optimizer) == ("E3M4", 7, "completed", "grid", "adamw")
    metrics = run.metrics()
    assert list(metrics.train.steps) == list(range(1, 101))
    assert list(metrics.validation.steps) == [50, 100]
    assert metrics.train.values[-1] == run.number("final_loss")
    assert not metrics.torn
    assert not run.problems


def test_a_run_without_result_is_unfinished_and_still_says_what_it_is(tmp_path):
    run = read_run(make_run(tmp_path, "E5M2", seed=3, steps=100, finished=False))
    assert (run.status, run.format, run.seed, run.max_steps, run.name) == ("unfinished", "E5M2", 3, 100, "e5m2_uniform")
    assert run.metrics().last_step == 42
    assert run.problems == ["result.json is missing"]


def test_an_unquantized_run_is_the_baseline(tmp_path):
    assert read_run(make_run(tmp_path, "FP32", finished=False)).is_baseline
    assert not read_run(make_run(tmp_path, "E4M3")).is_baseline


def test_a_torn_last_line_is_reported_and_skipped(tmp_path):
    folder = make_run(tmp_path, steps=60)
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 40])
    metrics = read_run(folder).metrics()
    lines = whole.count(b"\n")
    assert metrics.torn == [lines]
    assert len(metrics.train) + len(metrics.validation) == lines - 1


def test_torn_in_the_middle_and_not_utf8(tmp_path):
    folder = make_run(tmp_path, steps=30)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[9] = lines[9][:20] + b'{"kind": "step", "st'
    lines[14] = b"\xff\xfe\x00garbage"
    lines[19] = b'["not", "an", "object"]'
    path.write_bytes(b"\n".join(lines))
    metrics = read_run(folder).metrics()
    assert metrics.torn == [10, 15, 20]
    assert set(range(1, 31)) - set(metrics.train.steps.tolist()) == {10, 15, 20}


def test_a_step_recorded_twice_counts_once_and_the_later_record_wins(tmp_path):
    folder = make_run(tmp_path, steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "step": 15, "loss": 99.0}) + "\n")
    train = read_run(folder).metrics().train
    assert len(train) == 20
    assert train.values[14] == 99.0
    assert np.all(np.diff(train.steps) == 1)


def test_non_finite_values_are_read_from_their_strings(tmp_path):
    folder = make_run(tmp_path, "E5M2", steps=100, collapse="nonfinite", onset=40)
    run = read_run(folder)
    train = run.metrics().train
    assert np.isfinite(train.values[:39]).all()
    assert np.isnan(train.values[39:]).all()
    assert train.last_finite == train.values[38]
    assert math.isnan(run.number("final_loss"))
    assert run.verdict["onset_step"] == 40
    assert len(run.failure_reports) == 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (0.5, 0.5), ("inf", math.inf), ("-inf", -math.inf), (None, None), (True, None), ("x", None)],
)
def test_as_number(value, expected):
    assert as_number(value) == expected


def test_monitor_lines_are_thinned_by_step_and_kept_whole_per_step(tmp_path):
    run = read_run(make_run(tmp_path, "E3M4", steps=200, monitor_interval=5))
    assert not run.metrics().monitor
    everything = run.metrics(monitor_steps=None).monitor
    some = run.metrics(monitor_steps=8).monitor
    per_step = len(everything) // 40
    steps = sorted({record["step"] for record in some})
    assert len(steps) == 8
    assert steps[0] == 5
    assert steps[-1] == 200
    assert len(some) == 8 * per_step


def test_damaged_result_and_config_do_not_stop_the_reader(tmp_path):
    folder = make_run(tmp_path, steps=20)
    (folder / "result.json").write_text('{"name": "x", ')
    (folder / "config.yaml").write_text("a: [1, 2\n b: }")
    run = read_run(folder)
    assert run.status == "damaged"
    assert run.config == {}
    assert any("result.json is unreadable" in problem for problem in run.problems)
    assert run.seed == 42  # from the folder's name


def test_find_runs_goes_down_but_not_into_runs(tmp_path):
    first = make_run(tmp_path / "a" / "b", steps=10)
    second = make_run(tmp_path / "c", "E3M4", steps=10)
    make_run(first / "checkpoints", "E5M2", steps=10)
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == sorted([first, second])
    assert find_runs(first) == [first]


def test_what_is_no_run_folder_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ReportError, match="find_runs"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="not a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="not a folder"):
        find_runs(tmp_path / "nowhere")


def test_curve_of_nothing():
    empty = Curve.of(())
    assert len(empty) == 0
    assert empty.last_finite is None


def test_a_headline_grades_no_interrupted_run(tmp_path):
    """It said that runs which had been interrupted at step 1 "ended" 3 nats from FP32."""
    runs = [make_run(tmp_path, fmt, steps=50) for fmt in ("FP32", "E3M4", "E5M2")]
    result = json.loads((runs[2] / "result.json").read_text())
    (runs[2] / "result.json").write_text(json.dumps({**result, "status": "interrupted"}))
    said = headline(label_runs([read_run(folder) for folder in runs]))
    assert "E5M2 was interrupted" in said
    assert said.count("E5M2") == 1
    assert "E3M4 ended" in said
