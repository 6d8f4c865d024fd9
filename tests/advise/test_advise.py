"""Advice end to end on tiny models: choice under budgets, checkpoints, the command, forks, and what it refuses."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import nn

from altgrad.advise import Budget, PlainLoop, advise, advise_loop, advise_trace, advise_weights, take_trace, verify
from altgrad.advise.checkpoint import spectra_of
from altgrad.advise.choose import Option, bits_of, choose
from altgrad.advise.loop import quantized
from altgrad.advise.sensitivity import (
    Sensitivity,
    attribute,
    damage_of,
    everywhere,
    exact_gradient,
    one_operand,
    recipe_from,
)
from altgrad.advise.stall import Snapshot, exact_stall, freeze_step, moment_ratchet, predicted_stall, stall_over
from altgrad.cli.advise_pages import float32_loop
from altgrad.errors import AltGradError, CheckpointError, ConfigError
from altgrad.loop.loop import flat_gradient
from altgrad.nn import Recipe, quantize_model, restore_model, uniform
from altgrad.nn.layer.classes import is_quantized
from altgrad.report.pages.advice import render_advice
from altgrad.training.config.loading import load_config
from tests.training.tiny import TINY, differing


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(64, 32, generator=draw)
    return x, (x[:, :4].argmax(1))


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def loop(steps: int = 40) -> PlainLoop:
    return PlainLoop(net(), batches, loss, schedule=[3e-3 * (1 - t / steps) for t in range(steps)])


@pytest.fixture(scope="module")
def traced() -> SimpleNamespace:
    one = loop()
    trace = take_trace(one, 12, measured=4, blocks=(32,))
    return SimpleNamespace(loop=one, trace=trace, attribution=attribute(one, trace))


def test_a_trace_sees_every_operand_and_leaves_the_model_as_training_alone_would():
    alone, watched = loop(), loop()
    losses = [alone.advance() for _ in range(12)]
    trace = take_trace(watched, 12, measured=4)
    assert trace.losses == losses
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), watched.model.parameters(), strict=True))
    assert [role for _, role in trace.cells] == ["input", "weight", "grad_output"] * 3
    assert trace.steps == [1, 4, 7, 10]
    assert {s.step for s in trace.snapshots} == {4, 10}
    assert trace.coordinates["0"].shape == (12, 512)


def test_advice_is_a_recipe_that_the_model_takes_and_its_own_error_is_measured(traced):
    state = traced.loop.capture()
    advice = advise_trace(traced.trace, loop=traced.loop, attribution=traced.attribution)
    assert not differing(traced.loop.capture(), state)  # the loop is where it was
    assert advice.choice.bits <= 8.5
    assert advice.errors["sqnr_db"] < 1.5
    assert 0.3 < advice.errors["completeness"] < 3
    assert max(advice.errors[f"stall_{s}"] for s in ("nearest", "stochastic", "master")) < 0.05
    assert abs(advice.gradient_snr_db - advice.measured_snr_db) < 6
    model = net()
    quantize_model(model, Recipe.from_yaml(advice.recipe.to_yaml()))
    loss(model, *batches(1)).backward()


def test_small_gradients_that_become_zero_count_for_more_than_their_noise():
    """A softmax of many classes: nearly all of dy is below the step of a format with one exponent, and errs in one direction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1000))
    one = PlainLoop(model, lambda step: (batches(step)[0], batches(step)[1] * 0 + step % 7), loss)
    trace = take_trace(one, 20, measured=4)
    state = one.capture()
    found = attribute(one, trace, ("E1M6", "E3M4", "E4M3", "E2M1")).cells["2", "grad_output"]
    noise = trace.predict("2", "grad_output", "E1M6").noise
    by_noise = Sensitivity({fmt: seen for fmt, seen in found.measured.items() if fmt != "E1M6"}).damage("E1M6", noise)
    assert found.damage("E1M6", noise) > 10 * by_noise
    whole = everywhere(one, trace, ("E1M6", "E3M4", "E6M1"), 4)
    assert whole["E3M4"] < whole["E6M1"]
    assert whole["E3M4"] < whole["E1M6"] / 10
    assert not differing(one.capture(), state)


class Changed(PlainLoop):
    """Its gradient in low precision is what `change` makes of the one in float32."""

    def gradient(self, ahead=0):
        value, _ = super().gradient(ahead)
        if any(is_quantized(m) for m in self.model.modules()):
            for i, (p, exact) in enumerate(zip(self.model.parameters(), self.exact, strict=True)):
                p.grad.copy_(self.change(exact) * (0.5 + i))
        else:
            self.exact = [p.grad.clone() for p in self.model.parameters()]
        return value, flat_gradient(self.model)


@pytest.mark.parametrize(
    ("change", "damage"), [(lambda g: g, 0.0), (lambda g: 0 * g, 1.0), (lambda g: g * math.nan, 1e6)]
)
def test_damage_is_what_a_gradient_turns(change, damage):
    """Longer or shorter, parameter by parameter, is what Adam undoes; a gradient that is lost or reversed is not."""
    one, recipe = Changed(net(), batches, loss), one_operand("0", "weight", "E2M1")
    one.change = change
    assert damage_of(one, recipe, exact_gradient(one)) == pytest.approx(damage, abs=1e-6)
    one.change = lambda g: -g
    assert damage_of(one, recipe, exact_gradient(one)) > 4


def test_damage_is_the_squared_error_across_the_gradient():
    one = Changed(net(), batches, loss)
    one.change = lambda g: g * (1 + 0.1 * (torch.arange(g.numel()).view_as(g) % 2))
    exact = exact_gradient(one)
    across = 0.0
    for i, true in enumerate(g.double().flatten() for g in one.exact):
        low = true * (1 + 0.1 * (torch.arange(true.numel()) % 2)) * (0.5 + i)
        across += float((low - (low @ true) / (true @ true) * true).square().sum())
    expected = across / float(exact @ exact)
    assert damage_of(one, one_operand("0", "weight", "E2M1"), exact) == pytest.approx(expected, rel=1e-4)


def test_a_loop_that_keeps_its_gradients_to_itself_is_refused():
    class Hidden(PlainLoop):
        def gradient(self, ahead=0):
            found = super().gradient(ahead)
            self.optimizer.zero_grad(set_to_none=True)
            return found

    one = Hidden(net(), batches, loss)
    with pytest.raises(ConfigError, match="its parameters' grad 0; gradient"):
        damage_of(one, one_operand("0", "weight", "E2M1"), exact_gradient(one))


def test_more_bits_never_predict_more_damage(traced):
    damages = [
        advise_trace(
            traced.trace, Budget(bits=bits, formats=("E2M1", "E3M2", "E4M3", "E3M4")), attribution=traced.attribution
        ).choice
        for bits in (4, 5, 6.5, 8, 12, 16)
    ]
    assert [one.damage for one in damages] == sorted((one.damage for one in damages), reverse=True)
    assert [one.bits <= bits + 1e-9 for one, bits in zip(damages, (4, 5, 6.5, 8, 12, 16), strict=True)] == [True] * 6


def test_at_most_so_many_layers_stay_high(traced):
    for k in (0, 1, 2):
        choice = advise_trace(traced.trace, Budget(bits=None, high_layers=k), attribution=traced.attribution).choice
        assert len({layer for (layer, _), fmt in choice.formats.items() if fmt == "BF16"}) == k


def test_hardware_names_its_formats_and_block_formats_are_predicted(traced):
    advice = advise_trace(
        traced.trace, Budget(bits=8.25, formats=("MXFP8", "E5M2", "MXFP4")), attribution=traced.attribution
    )
    assert {row.format for row in advice.rows} == {"MXFP8", "E5M2", "MXFP4", "BF16"}
    assert all(row.prediction is not None for row in advice.rows)
    assert set(Budget(hardware="hopper").formats) == {"E4M3", "E5M2"}
    refused = advise_trace(traced.trace, Budget(bits=None, formats=("NVFP4", "E4M3")), attribution=traced.attribution)
    assert "blocks of 16 were not traced" in {row.refused for row in refused.rows}


def test_the_choice_is_the_best_of_all_where_every_one_can_be_tried():
    draw = np.random.default_rng(0)
    for _ in range(20):
        cells = [(f"layer{i}", "weight") for i in range(5)]
        values = dict.fromkeys(cells, 10)
        options = {
            c: [Option(f, bits_of(f), float(draw.uniform(1, 9) * 2.0 ** -bits_of(f))) for f in ("E2M1", "E3M2", "E4M3")]
            for c in cells
        }
        budget = Budget(bits=6, formats=("E2M1", "E3M2", "E4M3"))
        found = choose(options, values, budget)
        best = math.inf
        for index in np.ndindex(*[3] * 5):
            picked = [options[cell][i] for cell, i in zip(cells, index, strict=True)]
            if sum(one.bits for one in picked) <= 30:
                best = min(best, sum(one.damage for one in picked))
        assert best - 1e-12 <= found.damage <= best * 1.35  # exact but for the last upgrade that did not fit


def test_ties_are_shown_as_ties():
    cell = ("head", "weight")
    offered = [Option("E4M3", 8, 1.0), Option("E3M4", 8, 1.05), Option("E5M2", 8, 4.0), Option("BF16", 16, 0.9)]
    choice = choose({cell: offered}, {cell: 1}, Budget(bits=8))
    assert (choice.formats[cell], choice.ties[cell]) == ("E4M3", ["E3M4"])


def test_one_operand_alone_is_low_in_both_of_its_products(traced):
    cells = one_operand("2", "weight", "E4M3").cells(traced.loop.model)
    assert sorted(map(str, cells)) == ["2.forward.weight", "2.input_grad.weight"]


def test_a_choice_becomes_the_shortest_recipe_with_the_same_cells(traced):
    formats = {cell: "E3M4" if cell[0] != "4" else "E4M3" for cell in traced.trace.cells}
    recipe = recipe_from(formats, traced.trace)
    assert recipe.text == "E3M4; name='4': E4M3"
    quantize_model(model := net(), recipe)
    restore_model(model)


def test_grid_storage_rounds_stochastically_where_nearest_would_stall(traced):
    advice = advise_trace(
        traced.trace, Budget(storage="grid", formats=("E5M2",), bits=8), attribution=traced.attribution
    )
    assert advice.recipe.default.storage.rounding.value == "stochastic"
    assert advice.recipe.default.storage.format == "E5M2"


def test_stall_of_kept_weights_is_exact_and_spectra_come_near(traced):
    one = traced.trace.snapshots[-1]
    for fmt in ("E3M4", "E4M3", "E1M6"):
        for storage in ("nearest", "stochastic", "master"):
            near = predicted_stall(traced.trace, one.layer, fmt, storage)
            assert near == pytest.approx(exact_stall(one, fmt, storage), abs=0.12)
    still = Snapshot(1, "0", one.before, torch.zeros_like(one.before))
    assert math.isnan(exact_stall(still, "E4M3", "nearest"))
    assert exact_stall(Snapshot(1, "0", one.before, one.before * 1e-9), "E4M3", "nearest") == 1.0


def test_stall_follows_the_schedule_to_its_end(traced):
    curve = stall_over(traced.trace, ["0", "2", "4"], "E4M3", "nearest")
    assert len(curve) == 40
    assert curve[-1] > 0.99  # the rate ends at a fortieth of its start
    assert curve[-1] > curve[10]
    at = freeze_step(curve)
    assert at is not None
    assert 20 < at <= 40
    assert freeze_step(np.array([0.5, 0.97, 0.5, 0.96, 0.99])) == 4
    assert freeze_step(np.array([0.99, 0.2])) is None
    with pytest.raises(ConfigError, match="outside 1"):
        predicted_stall(traced.trace, "0", "E4M3", "nearest", 41)


def test_a_coarse_second_moment_runs_away_and_a_fine_one_does_not():
    gradients = np.random.default_rng(0).normal(size=(30, 200)).astype(np.float32)
    gradients *= np.linspace(3, 0.3, 30, dtype=np.float32)[:, None]
    coarse, fine = (moment_ratchet(gradients, fmt, 0.95, 120) for fmt in ("E5M2", "BF16"))
    assert coarse[-1] > 1.5
    assert fine[-1] == pytest.approx(1.0, abs=0.05)
    assert moment_ratchet(gradients, "E5M2", 0.95, 120, rounding="stochastic")[-1] < coarse[-1]


def test_forks_correct_a_recipe_that_breaks_and_leave_a_good_one(traced):
    one = traced.loop
    advice = advise_trace(traced.trace, Budget(bits=8, high_layers=0), loop=one, attribution=traced.attribution)
    state = one.capture()
    good = verify(one, traced.trace, advice, 4)
    assert set(good.verified["gaps"]) == {"advised", "other input", "other weight", "other grad_output"}
    assert not differing(one.capture(), state)
    advice.choice.formats.update({cell: "E5M2" for cell in advice.choice.formats if cell[1] == "weight"})
    advice.recipe = uniform("E5M2", activation="E1M6", grad="E1M6", scaling={"policy": "static", "scale": 1e-30})
    mended = verify(one, traced.trace, advice, 4)
    assert mended.verified["corrected_to"] is not None
    assert mended.recipe != advice.recipe


def test_weights_alone_say_what_they_do_not_know(tmp_path):
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    by_file, by_model = advise_weights(tmp_path / "model.safetensors"), advise(net())
    assert by_file.recipe == by_model.recipe
    assert by_file.choice.formats.keys() == {("0", "weight"), ("2", "weight"), ("4", "weight")}
    assert any("gradients" in line for line in by_file.unknown)
    assert by_file.left_high["0.bias"].startswith("a vector")
    quantize_model(net(), by_file.recipe)
    torch.save({"state_dict": net().state_dict()}, tmp_path / "model.pth")
    assert advise(tmp_path / "model.pth").recipe == by_file.recipe


def test_shards_and_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    weight = torch.randn(100, 48)
    save_file({"a.weight": weight}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b.weight": weight.bfloat16()}, tmp_path / "model-00002-of-00002.safetensors")
    index = {
        "weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = spectra_of(tmp_path, (32,))[0]
    monkeypatch.setattr("altgrad.advise.checkpoint.PIECE", 480)
    pieces = spectra_of(tmp_path, (32,))[0]
    for cell in (("a", "weight"), ("b", "weight")):
        np.testing.assert_array_equal(pieces.operands[cell][0].counts, whole.operands[cell][0].counts)
        assert pieces.predict(*cell, "MXFP8") == whole.predict(*cell, "MXFP8")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="misses 1 of 2 shards"):
        advise_weights(tmp_path)
    with pytest.raises(CheckpointError, match="one shard of several"):
        advise_weights(tmp_path / "model-00001-of-00002.safetensors")


def written(folder, name: str, tensors: dict) -> object:
    save_file(tensors, folder / name)
    return folder / name


class Danger:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda d: written(d, "m.safetensors", {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}),
            "quantized already",
        ),
        (lambda d: written(d, "m.safetensors", {"a.weight": torch.ones(8, 8, dtype=torch.uint8)}), "quantized already"),
        (lambda d: written(d, "m.safetensors", {"a.bias": torch.ones(8)}), "no weight matrix"),
        (lambda d: written(d, "m.safetensors", {"table": torch.ones(8, 8)}), "role is not known"),
        (lambda d: written(d, "m.safetensors", {"a.weight": torch.full((4, 4), math.nan)}), "NaN or infinite"),
        (lambda d: d / "nothing.safetensors", "is not there"),
        (lambda d: d, "no model.safetensors"),
        (
            lambda d: (d / "m.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}broken") and d / "m.safetensors",
            "cannot be read",
        ),
        (lambda d: (d / "m.onnx").write_bytes(b"x") and d / "m.onnx", "no known checkpoint"),
        (lambda d: (d / "m.pth").write_bytes(b"x") and d / "m.pth", "cannot be read as tensors alone"),
        (lambda d: torch.save(Danger(), d / "m.pth") or d / "m.pth", "never executed"),
        (lambda d: torch.save([1, 2], d / "m.pth") or d / "m.pth", "no state dict but list"),
        (
            lambda d: (d / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}') and d,
            "quant_method gptq",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}') and d,
            "outside the folder",
        ),
        (lambda d: (d / "model.safetensors.index.json").write_text("{") and d, "no JSON"),
        (lambda d: (d / "config.json").write_text("[" * 200_000) and d, "no JSON"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused_with_the_remedy(make, said, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=said):
        advise_weights(make(tmp_path))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Budget(hardware="tpu"), "not one of any8"),
        (lambda: Budget(hardware="hopper", formats=("E4M3",)), "drop one"),
        (lambda: Budget(bits=3), "fewer than the 8"),
        (lambda: Budget(storage="disk"), "master, grid"),
        (lambda: Budget(storage="grid", formats=("MXFP8",)), "cannot be stored"),
        (lambda: Budget(high_layers=-1), "below 0"),
        (lambda: Budget(formats=("E9M9",)), "exponent bits"),
        (lambda: advise(net(), [batches(1)]), "loss="),
        (lambda: advise(net(), [], loss=loss), "no batch"),
        (lambda: advise(nn.ReLU(), [batches(1)], loss=loss), "no linear layer"),
        (lambda: advise_loop(loop(), sensitivity=False, verify=4), "needs sensitivity"),
        (lambda: take_trace(loop(), 0), "at least one"),
        (lambda: verify(loop(), None, None, 1), "at least 2"),  # type: ignore[arg-type]
        (lambda: take_trace(PlainLoop(net(), batches, lambda m, x, y: m(x).sum() * math.inf), 2), "not finite"),
    ],
)
def test_what_cannot_be_asked_is_refused(call, said):
    with pytest.raises(AltGradError, match=said):
        call()


def test_a_quantized_model_is_refused_and_a_convolution_is_advised():
    model = net()
    quantize_model(model, "E4M3")
    with pytest.raises(ConfigError, match="restore_model"):
        advise(model, [batches(1)], loss=loss)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    data = [(torch.randn(8, 1, 6, 6), torch.arange(8) % 4)]
    found = advise(conv, data, loss=loss, steps=4, budget=Budget(bits=8, formats=("E4M3", "MXFP4")))
    assert ("0", "input") in found.choice.formats
    assert "unfolded input" in " ".join(row.limit for row in found.rows)


def test_the_command_writes_a_page_and_a_config_that_runs(tmp_path, monkeypatch, capsys):
    from altgrad.cli import app

    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = {**TINY, "data": {"source": "text", "path": str(text), "batch_size": 4}, "fp8_format": "E5M2"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    app(
        ["advise", "tiny.yaml", "--steps", "6", "--verify", "2", "--high-layers", "1", "-o", "out"],
        standalone_mode=False,
    )
    said = capsys.readouterr().out
    assert "about" in said
    assert "altgrad run out/config.yaml" in said
    data = json.loads((tmp_path / "out" / "advice.json").read_text())
    assert render_advice(data) == (tmp_path / "out" / "advice.html").read_text()
    made = load_config(tmp_path / "out" / "config.yaml")
    assert made.formats == Recipe.from_yaml(tmp_path / "out" / "recipe.yaml").to_dict()
    app(["run", "out/config.yaml", "max_steps=2"], standalone_mode=False)
    app(["advise", "tiny.yaml", "--dry-run"], standalone_mode=False)
    assert "about" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is no config"):
        app(["advise", "model.safetensors", "seed=3"], standalone_mode=False)


def test_the_loop_of_a_config_is_in_float32_whatever_the_config_says():
    one = float32_loop(
        load_config({**TINY, "fp8_format": "E4M3", "weight_storage": "grid", "enable_emergency_shift": True})
    )
    assert one.trainer.formats.recipe is None
    state = one.capture()
    with quantized(one, uniform("E4M3")):
        one.advance()
    one.restore(state)
    assert not differing(one.capture(), state)


def test_weights_alone_tell_nothing_of_a_grid(tmp_path):
    save_file({"layer.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="storage grid rests on updates"):
        advise(tmp_path / "model.safetensors", budget=Budget(storage="grid"))
    with pytest.raises(ConfigError, match="verify=3 trains"):
        advise(tmp_path / "model.safetensors", verify=3)
    with pytest.raises(ConfigError, match="leave data out"):
        advise(tmp_path / "model.safetensors", [(torch.zeros(1, 8),)])


def test_questions_leave_a_loop_where_it_was_with_dropout_and_running_statistics():
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)
    )
    loop = PlainLoop(model, [(torch.randn(16, 8),)], lambda model, x: model(x).square().mean())
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first, second = loop.gradient(), loop.gradient()
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
