"""Reading run folders: complete, unfinished, torn, and strange ones."""

import json
import math

import numpy as np
import pytest

from altgrad.errors import ReportError
from altgrad.records.run import Curve, as_number, find_runs, read_run
from tests.run_folders import make_run


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
