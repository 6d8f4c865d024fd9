"""The monitor on our layers and on others': what it records, that it changes nothing, and when it waits for the device."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from altgrad import nn as qnn
from altgrad.errors import ConfigError, OptionError
from altgrad.monitor import Monitor, RankLimits
from altgrad.monitor.reference import against_reference, compare
from altgrad.quantization import (
    amax_scale,
    compute_stiffness_field,
    get_format,
    gradient_stiffness_correlation,
    grid_alignment_statistics,
    quantize_with_stats,
    ulp_statistics,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.up = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 11)

    def forward(self, tokens):
        return self.head(torch.relu(self.norm(self.up(self.embedding(tokens)))))


def built(seed=0):
    torch.manual_seed(seed)
    return Net()


def batch(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randint(0, 9, (4, 6), generator=g)
    return x, (x + 1) % 11


def loss_of(model, step):
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model, optimizer, steps, first=1):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def quantized(storage="grid", fmt="E3M4", lr=3e-3, **recipe):
    model = built()
    qnn.quantize_model(model, qnn.uniform(fmt, storage=storage, **recipe))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return model, optimizer, qnn.attach_optimizer(model, optimizer)


def find(records, layer, role, step=None):
    (found,) = [r for r in records if (r["layer"], r["role"]) == (layer, role) and step in (None, r["step"])]
    return found


@pytest.mark.parametrize("storage", ["grid", "master"])
def test_the_monitor_changes_nothing_that_is_computed(storage):
    model, optimizer, handle = quantized(storage)
    twin, twin_optimizer, _ = quantized(storage)
    monitor = Monitor(model, optimizer, handle=handle)
    assert train(model, optimizer, 4) == train(twin, twin_optimizer, 4)
    monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_records_hold_what_the_public_functions_say():
    model, optimizer, handle = quantized("grid", scaling="amax")
    records = []
    monitor = Monitor(model, optimizer, handle=handle, sink=records.extend)
    train(model, optimizer, 1)
    before = model.up.weight.detach().clone()
    scale = model.up.__dict__["_altgrad"].storage.scale.clone()
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    gradient = model.up.weight.grad.clone()
    optimizer.step()
    after = model.up.weight.detach().clone()
    monitor.close()
    weight, grad = find(records, "up", "gradient", 2), find(records, "up", "update", 2)
    state = [r for r in records if (r["layer"], r["role"], r["step"]) == ("up", "weight", 2)]
    stored = next(r for r in state if "stiffness_mean" in r)

    stiffness = compute_stiffness_field(before, "E3M4")
    assert stored["stiffness_mean"] == pytest.approx(float(stiffness.nanmean()), rel=1e-6)
    aligned = grid_alignment_statistics(before, "E3M4", scale)
    assert stored["on_grid_frac"] == float(aligned["on_grid_frac"]) == 1.0
    pairs = gradient_stiffness_correlation(before, gradient, "E3M4")
    for name in ("grad_stiff_correlation", "grad_stiff_ratio_mean", "grad_below_stiffness_frac"):
        assert weight[name] == pytest.approx(float(pairs[name]), rel=1e-6, abs=1e-6), name
    assert weight["l2"] == pytest.approx(float(gradient.norm()), rel=1e-6)
    assert weight["linf"] == float(gradient.abs().max())
    moved = ulp_statistics(before, after, "E3M4", scale)
    assert grad["steps_mean"] == pytest.approx(float(moved["ulp_mean"]))
    assert grad["steps_max"] == float(moved["ulp_max"])
    assert grad["flip_rate"] == pytest.approx(1 - float(moved["ulp_zero_frac"]))
    carrier = ulp_statistics(before, after)
    assert grad["ulp_zero_frac"] == pytest.approx(float(carrier["ulp_zero_frac"]))


def test_stall_is_the_storage_handles_own_count():
    model, optimizer, handle = quantized("grid", lr=2e-4)
    records = []
    monitor = Monitor(model, optimizer, handle=handle, sink=records.extend)
    train(model, optimizer, 3)
    monitor.close()
    counts = handle.last_step_stats()
    for layer in ("up", "head"):
        record = find(records, layer, "update", 3)
        own = counts[f"{layer}.weight"]
        assert (record["attempted"], record["flips"]) == (own.attempted, own.flips)
        assert record["stall"] == pytest.approx(own.stall_rate)
        assert 0.1 < record["stall"] < 1
        assert record["predicted_stall"] == pytest.approx(record["stall"], abs=0.25)
    assert "predicted_stall" not in find(records, "up", "update", 1)  # before any update was seen


def test_a_master_copy_never_stalls_but_codes_may_stay():
    model, optimizer, handle = quantized("master", lr=1e-4)
    records = []
    monitor = Monitor(model, optimizer, handle=handle, sink=records.extend)
    train(model, optimizer, 2)
    monitor.close()
    record = find(records, "up", "update", 2)
    assert "stall" not in record
    assert 0.3 < record["code_unchanged"] <= 1
    assert record["ulp_zero_frac"] < 0.1  # the carrier moved


def test_operands_are_the_quantizations_own_statistics():
    model, optimizer, handle = quantized("master", scaling="none", fmt="E1M6")
    seen = {}
    model.head.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0].detach()))
    with torch.no_grad():
        model.norm.weight.mul_(4.0)
    records = []
    monitor = Monitor(model, optimizer, handle=handle, sink=records.extend)
    train(model, optimizer, 1)
    monitor.close()
    _, stats = quantize_with_stats(seen["x"], "E1M6", overflow="saturate")
    record = find(records, "head", "input")
    assert record["overflow"] == pytest.approx(float(stats.overflow_rate))
    assert record["overflow"] > 0
    assert record["underflow"] == pytest.approx(float(stats.underflow_rate))
    assert record["sqnr_db"] == pytest.approx(float(stats.sqnr_db), rel=1e-6)
    assert record["amax"] == float(stats.amax)
    assert {r["role"] for r in records if r["layer"] == "head"} == {
        "input",
        "weight",
        "grad_output",
        "gradient",
        "update",
    }


@pytest.mark.parametrize(("scaling", "overflows"), [("amax", False), ("none", True)])
def test_overflow_rate_of_the_step_is_the_largest_over_layers_and_roles(scaling, overflows):
    model, optimizer, handle = quantized("master", scaling=scaling, fmt="E1M6")
    with torch.no_grad():
        model.embedding.weight.mul_(4.0)
    monitor = Monitor(model, optimizer, handle=handle)
    monitor.begin_step(1)
    assert monitor.overflow_rate() is None
    loss_of(model, 1).backward()
    rate = monitor.overflow_rate()
    optimizer.step()
    monitor.end_step()
    monitor.flush()
    largest = max(r.get("overflow", 0.0) for r in monitor.latest.values())
    assert float(rate) == pytest.approx(largest)
    assert (largest > 0) is overflows
    monitor.close()


def test_micro_batches_of_a_step_are_one_record():
    model, optimizer, handle = quantized("master", scaling="none", fmt="E1M6")
    records = []
    monitor = Monitor(model, optimizer, handle=handle, sink=records.extend)
    monitor.begin_step(1)
    (loss_of(model, 1) + loss_of(model, 2)).backward()
    optimizer.step()
    monitor.end_step()
    monitor.close()
    assert find(records, "up", "input")["amax"] > 0


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_any_model_and_optimizer(make):
    model = built()
    optimizer = make(model.parameters(), lr=1e-2)
    twin = built()
    twin_optimizer = make(twin.parameters(), lr=1e-2)
    records = []
    monitor = Monitor(model, optimizer, format="E4M3", sink=records.extend)
    assert train(model, optimizer, 3) == train(twin, twin_optimizer, 3)
    monitor.close()
    x = twin.embedding(batch(3)[0])
    assert x.requires_grad
    record = find(records, "up", "input", 3)
    assert record["format"] == "E4M3"
    assert 25 < record["sqnr_db"] < 40
    assert find(records, "head", "grad_output", 3)["amax"] > 0
    assert find(records, "up", "update", 3)["attempted"] > 0
    assert "code_unchanged" in find(records, "up", "update", 3)
    assert "code_unchanged" not in find(records, "norm", "update", 3)


def test_shadow_statistics_are_those_of_the_format_at_amax_scale():
    model = built()
    seen = {}
    model.up.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0].detach()))
    records = []
    monitor = Monitor(model, format="E2M1", sink=records.extend)
    monitor.begin_step(1)
    loss_of(model, 1).backward()
    monitor.end_step()
    monitor.close()
    x = seen["x"]
    _, stats = quantize_with_stats(x, "E2M1", amax_scale(x, get_format("E2M1")), clamp=True)
    assert find(records, "up", "input")["sqnr_db"] == pytest.approx(float(stats.sqnr_db))


def test_dead_units_are_counted_and_unseen_tokens_are_not():
    model = built()
    with torch.no_grad():
        model.norm.weight[:8], model.norm.bias[:8] = 0.0, -1.0  # relu switches 8 of 32 units off
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    records = []
    monitor = Monitor(model, optimizer, sink=records.extend)
    train(model, optimizer, 1)
    monitor.close()
    assert find(records, "head", "gradient")["dead_inputs"] == 8 / 32
    assert find(records, "up", "gradient")["dead_outputs"] == 0
    assert "dead_outputs" not in find(records, "embedding", "gradient")
    assert find(records, "embedding", "gradient")["zero_frac"] >= 2 / 11  # tokens 9 and 10 do not occur


def test_skipped_steps_measure_their_gradients_and_all_nan_is_called_that():
    model, optimizer, handle = quantized("grid")
    records = []
    monitor = Monitor(model, optimizer, handle=handle, sink=records.extend)
    monitor.begin_step(1)
    (loss_of(model, 1) * math.nan).backward()
    monitor.end_step()  # no optimizer step
    monitor.close()
    record = find(records, "up", "gradient")
    assert record["nonfinite_frac"] == 1.0
    assert "l2" not in record
    assert "linf" not in record
    assert find(records, "up", "update")["attempted"] == 0
    assert "stall" not in find(records, "up", "update")


def test_schedule_by_group_window_and_layer():
    model, optimizer, handle = quantized("grid")
    records = []
    plan = {"default": 0, "stall": {"every": 2, "layers": "head$"}, "operands": {"window": [3, 3], "layers": "^up$"}}
    monitor = Monitor(model, optimizer, handle=handle, schedule=plan, sink=records.extend)
    train(model, optimizer, 4)
    monitor.close()
    found = {(r["step"], r["layer"], r["role"]) for r in records}
    roles = {(3, "up", role) for role in ("input", "weight", "grad_output")}
    assert found == {(1, "head", "update"), (3, "head", "update")} | roles
    stall = find(records, "head", "update", 1)
    assert set(stall) == {
        "kind",
        "step",
        "layer",
        "role",
        "format",
        "attempted",
        "attempted_frac",
        "flips",
        "flip_rate",
        "stall",
        "half_steps",
    }
    with pytest.raises(ConfigError, match="unknown group"):
        Monitor(model, optimizer, schedule={"stalls": 1})


def test_paused_records_nothing():
    model, optimizer, handle = quantized("grid")
    records = []
    monitor = Monitor(model, optimizer, handle=handle, sink=records.extend)
    monitor.begin_step(1)
    with monitor.paused():
        loss_of(model, 1).backward()
    assert monitor.overflow_rate() is None
    monitor.close()
    assert records == []


def test_evaluation_mode_records_no_operands():
    model, optimizer, handle = quantized("grid")
    monitor = Monitor(model, optimizer, handle=handle)
    model.eval()
    loss_of(model, 1)
    assert monitor.overflow_rate() is None
    monitor.close()


def test_rank_and_its_collapse():
    model, optimizer, handle = quantized("master")
    records = []
    schedule = {"default": 0, "rank": 1}
    monitor = Monitor(model, optimizer, handle=handle, schedule=schedule, sink=records.extend, rank_limits=RankLimits())
    train(model, optimizer, 1)
    with torch.no_grad():
        model.head.weight.copy_(torch.outer(torch.ones(11), torch.ones(32)))
    train(model, optimizer, 1)
    monitor.close()
    assert find(records, "head", "weight", 1)["effective_rank"] > 8
    last = find(records, "head", "weight", 2)
    assert last["effective_rank"] < 4
    assert last["rank_collapsed"] is True
    assert last["rank_seconds"] > 0
    assert "rank_collapsed" not in find(records, "up", "weight", 2)
    assert any("rank of head collapsed" in w for w in monitor.warnings)
    assert "rank of head collapsed" in monitor.summary()


def test_reference_gradients_are_those_of_the_unquantized_model():
    model, optimizer, handle = quantized("master", fmt="E2M1")
    plain = copy.deepcopy(model)
    qnn.restore_model(plain)
    loss_of(plain, 1).backward()
    records = []
    monitor = Monitor(model, optimizer, handle=handle, schedule={"default": 0, "reference": 1}, sink=records.extend)
    monitor.begin_step(1)
    loss_of(model, 1).backward()
    own = model.up.weight.grad.clone()
    assert monitor.reference_due
    seconds = monitor.measure_reference(lambda: loss_of(model, 1).backward())
    assert torch.equal(model.up.weight.grad, own)
    optimizer.step()
    monitor.end_step()
    monitor.close()
    record = find(records, "up", "gradient")
    g, r = own.double(), plain.up.weight.grad.double()
    assert record["reference_cosine"] == pytest.approx(float((g * r).sum() / g.norm() / r.norm()), abs=1e-6)
    assert record["reference_snr_db"] == pytest.approx(float(20 * torch.log10(r.norm() / (g - r).norm())), abs=1e-3)
    assert record["reference_seconds"] == seconds > 0
    assert 0 < record["reference_snr_db"] < 30
    assert record["noise_ratio"] == pytest.approx(float(r.norm() / (g - r).norm()), rel=1e-9)
    assert "batch_noise_scale" not in record  # one micro-batch says nothing of batches
    assert "g/noise" in monitor.summary()


def test_the_noise_of_batches_is_that_of_drawn_gradients():
    """A linear loss <a, w> in 8 micro-batches with a = 1 + 3 n in 4,000 elements: variance over squared mean is 9."""
    weight = torch.nn.Parameter(torch.zeros(4000))
    model = torch.nn.ParameterList([weight])
    generator = torch.Generator().manual_seed(2)

    def backward():
        for _ in range(8):
            ((1 + 3 * torch.randn(4000, generator=generator)) @ weight / 8).backward()

    weight.grad = torch.ones(4000)
    found, _ = against_reference(model, {7: weight}, {7}, backward)
    assert found[7]["batch_noise_scale"] == pytest.approx(9, rel=0.05)
    assert torch.equal(weight.grad, torch.ones(4000))
    assert not weight._post_accumulate_grad_hooks
    weight.grad = None
    assert against_reference(model, {7: weight}, {7}, backward)[0] == {}


def test_a_gradient_of_zeros_has_no_ratios_and_equal_ones_no_noise():
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert compare(ones, zeros).isnan().all()
    assert compare(zeros, ones).tolist()[0] == 0.0
    assert compare(ones, ones).tolist() == [float("inf"), pytest.approx(1.0), float("inf")]


def test_reference_is_measured_only_when_due():
    model, optimizer, handle = quantized("master")
    monitor = Monitor(model, optimizer, handle=handle)
    assert not monitor.reference_due
    assert monitor.measure_reference(lambda: pytest.fail("ran")) is None
    monitor.close()


def test_records_go_to_the_sink_once_per_interval_and_are_plain_json():
    model, optimizer, handle = quantized("grid")
    calls = []
    monitor = Monitor(model, optimizer, handle=handle, sink=calls.append, flush_every=3)
    train(model, optimizer, 7)
    assert [sorted({r["step"] for r in records}) for records in calls] == [[1, 2, 3], [4, 5, 6]]
    monitor.close()
    assert {r["step"] for r in calls[2]} == {7}
    for record in calls[0]:
        assert record["kind"] == "monitor"
        json.dumps(record)
    with pytest.raises(OptionError, match="flush_every 0"):
        Monitor(model, optimizer, flush_every=0)


def test_nothing_waits_for_the_device_between_flushes(monkeypatch):
    model, optimizer, handle = quantized("grid")
    monitor = Monitor(model, optimizer, handle=handle, schedule={"rank": 0}, flush_every=100)
    train(model, optimizer, 1)
    waits = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _o=original, _n=name, **k: (waits.append(_n), _o(self, *a, **k))[1]
        )
    monitor.before_update()
    monitor.end_step()
    assert monitor._pending
    assert waits == []
    monkeypatch.undo()
    monitor.close()


def test_close_lets_go_of_model_and_optimizer():
    model, optimizer, handle = quantized("grid")
    monitor = Monitor(model, optimizer, handle=handle)
    train(model, optimizer, 1)
    monitor.close()
    before = dict(monitor.latest)
    train(model, optimizer, 2)
    monitor.flush()
    assert monitor.latest == before
    assert not any(m.__dict__["_altgrad"].session.observer for m in model.modules() if "_altgrad" in m.__dict__)


def test_summary_is_a_table_a_person_can_read():
    model, optimizer, handle = quantized("grid")
    monitor = Monitor(model, optimizer, handle=handle)
    assert "nothing measured" in monitor.summary()
    train(model, optimizer, 3)
    text = monitor.summary()
    monitor.close()
    lines = text.splitlines()
    assert lines[0] == "monitor, last measurements up to step 3"
    assert lines[1].split()[0] == "layer"
    assert {"up", "head", "norm"} <= {line.split()[0] for line in lines[2:]}
    assert "stall" in lines[1]
    assert "dB" in text
    assert "…" not in text  # nothing is cut off
    short = monitor.summary(rows=1)
    assert "layers with less overflow, underflow and stall not shown" in short


def test_half_precision_parameters_and_shared_weights():
    model = built().bfloat16()
    model.head.weight = nn.Parameter(torch.randn(11, 32, dtype=torch.bfloat16))
    model.tied = nn.Linear(32, 11, dtype=torch.bfloat16)
    model.tied.weight = model.head.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    records = []
    monitor = Monitor(model, optimizer, format="E4M3", sink=records.extend)
    train(model, optimizer, 1)
    monitor.close()
    assert find(records, "head", "update")["attempted"] > 0
    assert not any(r["layer"] == "tied" and r["role"] == "update" for r in records)
