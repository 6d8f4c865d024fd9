"""What is measured and when: schedules, ranks, and a metric made of one function and one row."""

import copy
import json
import math

import pytest
import torch
from torch import nn

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
from altgrad.nn import Oscillation, quantize_model
from altgrad.quantization import Cast, Want, get_format
from altgrad.quantization.block_stats import measure_blocks
from altgrad.quantization.codec import scale_values
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
    assert "Kurtosis (largest of layers)" in html


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
    assert schedule.due(1) == set(GROUPS) - {"reference", "oscillation"}
    assert schedule.due(2) == set(GROUPS) - {"reference", "oscillation", "rank"}


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


# -- blocks -------------------------------------------------------------------------------------------------------------


def counted(x: torch.Tensor, name: str, axis: int = -1) -> tuple[list[float], dict[int, float]]:
    """[blocks, saturated, flushed] and how many blocks have a scale of 2^k, of a tensor in a block format."""
    fmt = get_format(name)
    cast = Cast(name, axis=axis, pad=True)
    made = cast(x, want=Want.VALUES | Want.CODES)
    scales = scale_values(made.scales, fmt, made.tensor_scale)
    vector = measure_blocks(x, made.values, scales, fmt, axis).tolist()
    return vector[:3], {i - 127: n for i, n in enumerate(vector[3:]) if n}


def test_blocks_are_counted_by_hand():
    x = torch.zeros(6, 32)
    x[0, 0], x[1, 0], x[2, 0] = 7.0, 6.99, 3.0  # floor: scale 1, 7 rounds beyond 6, 6.99 does not; scale 1/2
    x[3, 5], x[4, 1] = torch.inf, torch.nan  # not counted, as the block of zeros is not
    assert counted(x, "MXFP4") == ([3.0, 1.0, 0.0], {0: 2.0, -1: 1.0})
    assert counted(x.T.contiguous(), "MXFP4", axis=0) == counted(x, "MXFP4")
    assert counted(x[:, :20], "MXFP4") == counted(x, "MXFP4"), "short blocks"
    assert counted(x, "MXFP4:ceil") == ([3.0, 0.0, 0.0], {1: 2.0, -1: 1.0})
    fine = torch.tensor([[464.0, 0.0], [464.1, 0.0]])  # E4M3's tie goes to 448, which is even
    assert counted(fine, "E4M3/2:E8M0:floor")[0] == [2.0, 1.0, 0.0]


def test_small_blocks_of_nvfp4_are_flushed():
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16], x[0, 32] = 2688.0, 1.0, 2.0**-12  # scales 448, 1/6 (E4M3: 0.171875), 2^-9
    found, scales = counted(x, "NVFP4")
    assert found == [3.0, 0.0, 1.0]
    assert scales == {8: 1.0, -3: 1.0, -9: 1.0}


def test_tiles_are_blocks_too():
    x = torch.zeros(32, 32)
    x[0, 0], x[20, 3] = 6.0, 12.0
    found, scales = counted(x, "E2M1/16x16:E8M0:ceil")
    assert found == [2.0, 0.0, 0.0]
    assert scales == {0: 1.0, 1: 1.0}
    assert counted(torch.zeros(0, 32), "MXFP4") == ([0.0, 0.0, 0.0], {})


@pytest.mark.parametrize("recipe", ["MXFP4", "NVFP4", "nvfp4_te", "quartet", "tetrajet_v2", "te_block"])
def test_the_monitor_tells_of_each_operands_blocks(recipe):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    quantize_model(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor, found = Monitor(model, optimizer, sink=(records := []).extend), {}
    for _ in range(2):
        for _ in range(2):  # micro-batches
            model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    monitor.close()
    for record in records:
        if "blocks_saturated" in record:
            found[record["step"], record["layer"], record["role"]] = record
    roles = ("input", "weight", "grad_output")
    assert {(step, layer, role) for step in (1, 2) for layer in "02" for role in roles} <= set(found)
    for record in found.values():
        assert 0 <= record["blocks_saturated"] <= 1
        assert 0 <= record["blocks_flushed"] <= 1
        assert record["block_scale_low"] <= record["block_scale_median"] <= record["block_scale_high"] < 20
    clipped = [r["blocks_saturated"] for r in found.values() if r["role"] == "weight"]
    assert any(clipped) == (recipe in ("MXFP4", "quartet")), "by floor and by the deviation alone"
    rows = layer_rows([r for r in records if r["step"] == 2])
    assert any("block_scale_median" in row.values for row in rows)


def test_the_ways_of_weights_are_counted_within_the_window_and_for_its_layers_only(monkeypatch):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    quantize_model(model, "x:MXFP4 w:MXFP4 dy:MXFP4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    seen: list = []
    updates = []
    counted = Oscillation.update
    monkeypatch.setattr(Oscillation, "update", lambda self: (updates.append(set(self.layers)), counted(self)))
    plan = {"default": 0, "oscillation": {"every": 1, "window": [3, 4], "layers": "0"}}
    monitor = Monitor(model, optimizer, schedule=plan, sink=seen.extend)
    own, expected = None, []
    for step in range(1, 7):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        if step in (3, 4):
            own = Oscillation(model, covers=lambda layer: layer == "0")
        optimizer.step()
        if step in (3, 4):
            counted(own)
            expected.append((step, "0", own.layers["0"].total))
    monitor.close()
    assert updates == [{"0"}, {"0"}]
    assert [(r["step"], r["layer"], r["oscillation"]) for r in seen] == expected


def test_the_ways_of_weights_are_counted_between_records_and_go_on_after_a_resume():
    """R of a layer over the steps since the last record, as `Oscillation` counts it; a FP32 model has none."""

    def made(records):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
        quantize_model(model, "x:MXFP4 w:MXFP4 dy:MXFP4")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        plan = {"default": 0, "oscillation": {"every": 4, "layers": "0"}}
        return model, optimizer, Monitor(model, optimizer, schedule=plan, sink=records.extend)

    def train(model, optimizer, steps):
        for step in steps:
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()

    whole: list = []
    model, optimizer, monitor = made(whole)
    train(model, optimizer, range(1, 2))
    counter = Oscillation(model)
    for step in range(2, 6):
        train(model, optimizer, [step])
        counter.update()
    train(model, optimizer, range(6, 8))
    state = monitor.state()
    saved = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(8, 10))
    monitor.close()
    assert [(r["step"], r["layer"], r["role"]) for r in whole] == [
        (1, "0", "weight"),
        (5, "0", "weight"),
        (9, "0", "weight"),
    ]
    ways = counter.layers["0"]
    assert whole[1]["oscillation"] == ways.total > 0
    assert whole[1]["oscillating"] == ways.share()
    assert whole[1]["code_flips"] == ways.flip_rate

    later: list = []
    model, optimizer, monitor = made(later)
    model.load_state_dict(saved)
    monitor.load_state(state)
    for step in (8, 9):
        monitor.begin_step(step)
        train(model, optimizer, [step])
        monitor.end_step()
    monitor.close()
    assert later[-1] == whole[-1]
    plain: list = []
    model = nn.Sequential(nn.Linear(4, 4))
    monitor = Monitor(model, schedule={"default": 0, "oscillation": 1}, sink=plain.extend)
    monitor.begin_step(1)
    monitor.end_step()
    monitor.close()
    assert plain == []
