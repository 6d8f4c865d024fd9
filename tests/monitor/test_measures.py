"""What is measured and when: schedules, ranks, and a metric made of one function and one row."""

import json
import math

import pytest
import torch

from altgrad.analysis.study import load_study
from altgrad.analysis.study_figures import layer_sections
from altgrad.analysis.study_tables import run_records
from altgrad.errors import ConfigError, OptionError
from altgrad.monitor import (
    GROUPS,
    Monitor,
    RankLimits,
    Schedule,
    When,
    add_metric,
    effective_rank,
    make_schedule,
    remove_metric,
    singular_values,
    stable_rank,
)
from altgrad.monitor.failure_report import gather
from altgrad.monitor.failure_rows import layer_rows, trends
from altgrad.records.metrics import NUMBER, Metric, markdown_table, metrics
from altgrad.report.pages.failure import render_failure
from tests.monitor.test_monitor import quantized, train
from tests.run_folders import make_run

KURTOSIS = Metric(
    "kurtosis",
    group="shape",
    roles=("weight",),
    unit=NUMBER,
    over_layers=max,
    needs_grid=False,
    says="fourth moment over the squared second",
    heads={"weight": "kurt."},
    drawn=True,
    tabled=True,
)


def kurtosis(step):
    w = step.before.double()
    return (w**4).mean() / (w**2).mean() ** 2


@pytest.fixture
def added():
    yield add_metric(KURTOSIS, kurtosis)
    remove_metric("kurtosis")


@pytest.fixture
def records(added):
    """Records of three monitored steps of a model with grid storage."""
    model, optimizer, handle = quantized("grid")
    found, before = [], model.up.weight.detach().clone()
    monitor = Monitor(model, optimizer, handle=handle, sink=found.extend)
    train(model, optimizer, 3)
    monitor.close()
    first = next(r for r in found if (r["step"], r["layer"], r["role"]) == (1, "up", "weight") and "l2" in r)
    w = before.double()
    assert first["kurtosis"] == pytest.approx(float((w**4).mean() / (w**2).mean() ** 2))
    assert "kurtosis" in monitor.summary() or "kurt." in monitor.summary().splitlines()[1]
    return found


def test_the_schedule_knows_its_group(added):
    assert make_schedule({"shape": 5}).groups["shape"].every == 5
    model, optimizer, handle = quantized("grid")
    found = []
    monitor = Monitor(model, optimizer, handle=handle, schedule={"default": 0, "shape": 2}, sink=found.extend)
    train(model, optimizer, 3)
    monitor.close()
    assert {(r["step"], *sorted(set(r) - {"kind", "layer", "role", "format", "step"})) for r in found} == {
        (1, "kurtosis"),
        (3, "kurtosis"),
    }


def test_the_summary_has_a_column(records):
    model, optimizer, handle = quantized("grid")
    monitor = Monitor(model, optimizer, handle=handle)
    train(model, optimizer, 1)
    assert "kurt." in monitor.summary().splitlines()[1].split()
    monitor.close()


def test_trends_and_the_failure_report_have_it(records):
    steps = [{"kind": "step", "step": n, "loss": 5.0, "finite": True} for n in (1, 2, 3)]
    over_time = {t.name: t for t in trends({s["step"]: s for s in steps}, records)}
    per_step = [max(r["kurtosis"] for r in records if r["step"] == n and "kurtosis" in r) for n in (1, 2, 3)]
    assert list(over_time["kurtosis (largest of layers)"].values) == per_step
    verdict = {"kind": "freeze", "onset_step": 1, "detected_step": 3}
    data = gather(
        metrics=[*steps, *records],
        environment=None,
        result={"verdict": verdict, "name": "n", "run_id": "n-s1-x"},
        config={},
        command=None,
        last_good=None,
        collapsed=None,
    )
    html, markdown = render_failure(data)
    header = next(line for line in markdown.splitlines() if line.startswith("| Layer | Role"))
    column = [cell.strip() for cell in header.split("|")].index("Kurtosis")
    row = next(line for line in markdown.splitlines() if line.startswith("| up | weight"))
    assert float(row.split("|")[column]) > 1
    assert "kurtosis (largest of layers)" in html


def test_a_study_draws_it_and_its_csv_has_a_column(records, tmp_path):
    lines = [json.dumps(r) + "\n" for r in records]
    for seed in range(2):
        run = make_run(tmp_path, "E3M4", seed=seed, steps=20)
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(lines)
    study = load_study(tmp_path)
    (section,) = layer_sections(study, [])
    drawn = "".join(str(part) for row in section["panels"] for part in row)
    assert "Kurtosis of weight" in drawn
    assert "Stall of update" in drawn
    assert "Fourth moment over the squared second, per layer over training" in drawn
    means = [r["layers_kurtosis_weight"] for r in run_records(study)]
    assert means[0] == means[1] > 1


def test_the_table_of_the_docs_would_have_it(added):
    assert "| `shape` | `kurtosis` | weight | - | fourth moment over the squared second |" in markdown_table()


def test_without_its_row_its_records_are_still_read(records):
    remove_metric("kurtosis")
    steps = {n: {"step": n, "loss": 5.0} for n in (1, 2, 3)}
    assert "kurtosis (mean of layers)" in {t.name for t in trends(steps, records)}
    assert all("kurtosis" not in row.values for row in layer_rows(records))


def test_it_costs_nothing_where_it_is_not_due_and_nan_is_left_out(added):
    calls = []
    add_metric(
        Metric("never", group="never", roles=("update",), says="-"),
        lambda step: calls.append(1) or torch.tensor(math.nan),
    )
    try:
        model, optimizer, handle = quantized("grid")
        found = []
        monitor = Monitor(model, optimizer, handle=handle, schedule={"never": 2}, sink=found.extend)
        train(model, optimizer, 2)
        monitor.close()
        grids = sum(1 for r in found if r["step"] == 1 and r["role"] == "update" and "stall" in r)
        assert len(calls) == grids > 0  # of step 1 alone, and only where there is a grid
        assert not any("never" in r for r in found)
    finally:
        remove_metric("never")


def test_what_no_function_can_see_is_refused():
    before = metrics()
    for row in (Metric("m", "shape", ("input",)), Metric("m", "operands", ("weight",)), Metric("m", "shape", ("run",))):
        with pytest.raises(OptionError, match="a function sees a parameter's step"):
            add_metric(row, kurtosis)
    with pytest.raises(OptionError, match="already"):
        add_metric(Metric("stall", "shape", ("weight",)), kurtosis)
    assert metrics() == before
    with pytest.raises(ConfigError, match="unknown group 'shape'"):
        make_schedule({"shape": 1})


def test_default_measures_everything_but_the_costly_groups():
    schedule = make_schedule()
    assert schedule.due(1) == set(GROUPS) - {"reference"}
    assert schedule.due(2) == set(GROUPS) - {"reference", "rank"}


def test_a_number_spaces_all_groups():
    schedule = make_schedule(10)
    assert [step for step in range(1, 40) if "stall" in schedule.due(step)] == [1, 11, 21, 31]


def test_groups_follow_default_unless_named():
    schedule = make_schedule({"default": 0, "stall": 1, "rank": {"every": 5, "window": [10, 30], "layers": "head"}})
    assert schedule.due(3) == {"stall"}
    assert [step for step in range(1, 60) if "rank" in schedule.due(step)] == [11, 16, 21, 26]
    assert schedule.groups["rank"].covers("lm_head")
    assert not schedule.groups["rank"].covers("blocks.0.mlp")
    assert schedule.groups["norms"] == When(every=0)


def test_an_open_window():
    assert [s for s in range(1, 9) if When(every=2, window=(4, None)).due(s)] == [5, 7]


def test_a_schedule_is_taken_as_it_is():
    schedule = Schedule({"stall": When()})
    assert make_schedule(schedule) is schedule


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"stal": 1}, "unknown group 'stal'"),
        ({"stall": "often"}, "'often' is not a number of steps"),
        ({"stall": {"evry": 1}}, "evry"),
        ({"stall": {"window": [5, 2]}}, r"\[5, 2\] is empty"),
        ({"stall": {"window": 5}}, "window 5"),
        ({"stall": {"layers": "("}}, "not a regular expression"),
        ({"stall": -1}, "-1 is not a number of steps"),
    ],
)
def test_wrong_schedules_are_refused(plan, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(plan)


def of_rank(r, n=24):
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g))
    p, _ = torch.linalg.qr(torch.randn(n, n, generator=g))
    return q[:, :r] @ p[:r]


@pytest.mark.parametrize("r", [1, 3, 24])
def test_equal_singular_values_have_their_number_as_rank(r):
    values = singular_values(of_rank(r))
    assert float(stable_rank(values)) == pytest.approx(r, rel=1e-4)
    assert float(effective_rank(values)) == pytest.approx(r, rel=1e-3)


def test_ranks_by_hand():
    values = torch.tensor([2.0, 1.0, 1.0])
    assert float(stable_rank(values)) == 1.5
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert float(effective_rank(values)) == pytest.approx(math.exp(entropy))


def test_convolutions_are_matrices_of_out_by_the_rest():
    assert singular_values(torch.randn(4, 3, 2, 2)).shape == (4,)


def test_a_weight_that_is_not_finite_has_no_rank():
    weight = torch.ones(3, 3)
    weight[1, 1] = math.nan
    assert torch.isnan(singular_values(weight)).all()
    assert math.isnan(stable_rank(singular_values(torch.zeros(2, 2))))


@pytest.mark.parametrize(
    ("layer", "strict"),
    [
        ("head", True),
        ("lm_head", True),
        ("blocks.3.attention.out", True),
        ("h.0.mlp.c_proj", True),
        ("blocks.0.mlp.up", False),
    ],
)
def test_heads_and_output_projections_are_held_to_more(layer, strict):
    limits = RankLimits()
    assert limits.collapsed(layer, 100.0, 60.0) is strict
    assert limits.collapsed(layer, 100.0, 49.0)
    assert not limits.collapsed(layer, 100.0, 71.0)
