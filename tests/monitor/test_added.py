"""One function and one row make a metric: it is in the schedule, the records, the summary, the trends, the failure report,
the heat maps and the CSV of a study."""

import json
import math

import pytest
import torch

from altgrad.analysis.study import load_study
from altgrad.analysis.study_figures import layer_sections
from altgrad.analysis.study_tables import run_records
from altgrad.errors import ConfigError, OptionError
from altgrad.monitor import Monitor, add_metric, make_schedule, remove_metric
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
