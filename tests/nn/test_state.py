"""quant_state, load_quant_state and change_format: complete, bit-exact, and usable as a step's rollback point."""

import copy
import json

import pytest
import torch
from torch import nn

from altgrad.errors import OptionError, RecipeError
from altgrad.nn import (
    Recipe,
    StorageSpec,
    attach_optimizer,
    change_format,
    layer_recipe,
    load_quant_state,
    quant_state,
    quantize_model,
    set_step,
    uniform,
)
from altgrad.nn import storage as grids
from altgrad.nn.layer import operand
from altgrad.nn.session import STATE
from altgrad.optim import SRAdamW
from altgrad.quantization import quantize
from altgrad.quantization.parameter_grid import declared_grid

RECIPES = {
    "delayed": uniform("E4M3", scaling={"policy": "delayed", "history": 3}),
    "grid": uniform("E3M4", storage="grid", rounding="stochastic"),
    "both": uniform("E3M4", storage="grid", rounding="stochastic", scaling="delayed"),
    "amax": uniform("E4M3"),
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def make(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    quantize_model(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    attach_optimizer(model, optimizer)
    return model, optimizer


def backward(model, optimizer, seed):
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 3)
    loss = (model(x) - x.flip(1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    return loss.item()


def train(model, optimizer, steps, start=0):
    losses = []
    for index in range(start, start + steps):
        losses.append(backward(model, optimizer, index))
        optimizer.step()
    return losses


def clone(state):
    if isinstance(state, dict):
        return {key: clone(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


@each_recipe
def test_a_resumed_run_is_bit_identical(recipe):
    model, optimizer = make(recipe)
    train(model, optimizer, 4)
    saved = clone(dict(model.state_dict())), copy.deepcopy(optimizer.state_dict()), clone(quant_state(model))
    other, other_optimizer = make(recipe)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    load_quant_state(other, saved[2])
    other_losses = train(other, other_optimizer, 4, start=4)
    assert train(model, optimizer, 4, start=4) == other_losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@each_recipe
def test_a_rolled_back_step_leaves_no_trace(recipe):
    model, optimizer = make(recipe)
    twin, twin_optimizer = make(recipe)
    for one, its in ((model, optimizer), (twin, twin_optimizer)):
        train(one, its, 3)
    before = quant_state(model)
    with torch.no_grad():
        kept = model[0].bias.clone()
        model[0].bias[0] = 1e30
    backward(model, optimizer, 77)  # pollutes the amaxes of the step, and is not applied
    with torch.no_grad():
        model[0].bias.copy_(kept)
    load_quant_state(model, before)
    assert train(model, optimizer, 3, start=3) == train(twin, twin_optimizer, 3, start=3)


def test_state_is_tensors_and_json():
    model, optimizer = make(RECIPES["both"])
    train(model, optimizer, 2)
    state = quant_state(model)

    def plain(value):
        if isinstance(value, torch.Tensor):
            return {"tensor": value.tolist()}
        return {key: plain(v) for key, v in value.items()} if isinstance(value, dict) else value

    assert json.loads(json.dumps(plain(state))) == plain(state)
    assert state["clocks"][0]["step"] == 2
    assert set(state["storage"]) == {"0.weight", "2.weight"}
    assert state["operands"]["0"]["input.forward"]["window"].shape == (2,)


def test_evaluation_consumes_nothing_of_trainings():
    results = []
    for evaluate in (True, False):
        model, optimizer = make(RECIPES["both"])
        losses = []
        for index in range(4):
            losses += train(model, optimizer, 1, start=index)
            if evaluate:
                before = clone(quant_state(model))
                model.eval()(torch.randn(64, 16) * 100)
                model.train()
                with torch.no_grad():
                    model(torch.randn(64, 16) * 100)
                after = quant_state(model)
                assert str(after) == str(before)
        results.append(losses)
    assert results[0] == results[1]


def test_delayed_scale_is_that_of_the_steps_before():
    layer = nn.Linear(4, 4)
    quantize_model(layer, uniform("E4M3", scaling={"policy": "delayed", "history": 2}, weight=None))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach_optimizer(layer, optimizer)
    x = torch.eye(4)
    seen = []
    for factor in (1.0, 8.0, 2.0, 2.0, 2.0):
        layer(x * factor).sum().backward()
        optimizer.step()
        memory = quant_state(layer)["operands"][""]["input.forward"]
        assert "pending" not in memory
        seen.append(memory["window"].tolist())
    assert seen == [[1.0], [8.0, 1.0], [2.0, 8.0], [2.0, 2.0], [2.0, 2.0]]
    y = layer(x * 1024.0)  # saturates at the history's amax, 2
    torch.testing.assert_close(y, 2.0 * layer.weight.t() + layer.bias)


@pytest.mark.parametrize("new", ["E5M2", "E4M3"])
def test_emergency_shift_regrids_weights_from_the_next_step_on(new):
    model, optimizer = make(RECIPES["both"])
    train(model, optimizer, 3)
    weight = model[0].weight.detach().clone()
    assert change_format(model, new) == 2
    recipe = model[0].quantization.recipe
    assert {spec.format for _, _, spec in recipe.entries()} == {new}
    assert recipe.storage.format == new
    assert recipe.storage.rounding.value == "stochastic"
    storage = model[0].quantization.storage
    assert torch.equal(model[0].weight, quantize(weight, new, storage.scale, clamp=True, overflow="saturate"))
    assert declared_grid(model[0].weight).format.name == new
    unshifted = make(RECIPES["both"])
    train(*unshifted, 3)
    shifted, stayed = train(model, optimizer, 6, start=3), train(*unshifted, 6, start=3)
    assert shifted != stayed
    assert sum(shifted) < 1.2 * sum(stayed)


def test_shift_of_one_format_only_and_back_by_state():
    model, optimizer = make(uniform("E3M4", grad="E5M2", scaling="delayed"))
    train(model, optimizer, 2)
    before = quant_state(model)
    assert change_format(model, "E4M3", old="E3M4") == 0
    assert str(model[0].quantization.recipe) == "x:E4M3(delayed) w:E4M3(delayed) dy:E5M2(delayed)"
    load_quant_state(model, before)
    assert str(model[0].quantization.recipe) == "x:E3M4(delayed) w:E3M4(delayed) dy:E5M2(delayed)"
    assert str(quant_state(model)) == str(before)


def test_shift_that_does_not_fit_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 16))
    quantize_model(model, uniform("E4M3"))
    with pytest.raises(RecipeError, match="in_features 30 is not a multiple"):
        change_format(model, uniform("MXFP4", whole_blocks=True))
    assert str(model[0].quantization.recipe) == "x:E4M3 w:E4M3 dy:E4M3"
    with pytest.raises(RecipeError, match="has no quantized layer"):
        change_format(nn.Linear(2, 2), "E4M3")


def test_states_of_other_models_are_refused():
    other = nn.Sequential(nn.Linear(16, 16))
    quantize_model(other, RECIPES["delayed"])
    trained, optimizer = make(RECIPES["delayed"])
    train(trained, optimizer, 1)
    with pytest.raises(RecipeError, match="no quantized layer of this model"):
        load_quant_state(other, quant_state(trained))
    grid, _ = make(RECIPES["grid"])
    state = quant_state(grid)
    state["storage"] = {}
    with pytest.raises(RecipeError, match="no storage scale"):
        load_quant_state(grid, state)


def test_fixed_scale_is_kept_and_clock_set():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    quantize_model(model, layer_recipe("E4M3", storage=StorageSpec("E4M3", scale=0.5)))
    set_step(model, 7, 2)
    assert quant_state(model)["clocks"] == [{"seed": 0, "step": 7, "micro_batch": 2}]
    assert float(quant_state(model)["storage"]["0.weight"]["scale"]) == 0.5


@pytest.fixture
def capture(monkeypatch):
    """Call it, and a CUDA graph is being captured."""

    def begin():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        # builds for GPUs would ask a driver for the stream
        monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)

    return begin


def test_a_captured_step_that_replays_would_do_wrong_is_refused(capture):
    model, optimizer = make(RECIPES["grid"])
    own = SRAdamW(nn.Linear(2, 2).parameters(), lr=0.1)
    backward(model, optimizer, 0)
    with torch.no_grad():
        model[0].weight.mul_(2)
    capture()
    with pytest.raises(RecipeError, match=r"capture this step: the values of '0.weight' are not those of a step; take"):
        optimizer.step()
    with pytest.raises(
        RecipeError, match="replays would set the clock to the same step; set it outside of the capture"
    ):
        set_step(model, 3)
    with pytest.raises(OptionError, match="SRAdamW counts its steps on the host"):
        own.step()
    model[0].__dict__[STATE].session.observer = object()
    with pytest.raises(RecipeError, match=r"an observer reads each step's statistics; set_observer\(model, None\)"):
        model(torch.ones(2, 16))


def test_a_history_that_is_made_anew_cannot_be_captured(capture):
    model, optimizer = make(uniform("E4M3", scaling={"policy": "delayed", "history": 3}))
    backward(model, optimizer, 0)
    capture()
    with pytest.raises(RecipeError, match="the scale history of '0'"):
        optimizer.step()


def in_capture(capture, recipe, *, steps: int = 0):
    """(a model after so many steps, its optimizer), and a capture begins."""
    model, optimizer = make(recipe)
    train(model, optimizer, steps)
    capture()
    return model, optimizer


def test_keys_that_no_gpu_has_yet_cannot_be_captured(capture):
    model, _ = in_capture(capture, uniform("E4M3", rounding="stochastic"))
    session = model[0].__dict__[STATE].session
    with pytest.raises(
        RecipeError, match="the random keys are not on the GPU yet; take a step of the same kind before"
    ):
        session.key_beside(torch.ones(2), 1, False)


def test_amaxes_that_processes_exchange_cannot_be_captured(capture):
    model, _ = in_capture(capture, uniform("E4M3", scaling="delayed"))
    session = model[0].__dict__[STATE].session
    session.group = object()
    with pytest.raises(RecipeError, match="exchange their amaxes; step outside of it"):
        session.advance()


def test_a_history_that_no_step_has_begun_cannot_be_captured(capture, monkeypatch):
    monkeypatch.setattr(operand, "serve", lambda x: True)
    model, _ = in_capture(capture, uniform("E4M3", scaling="delayed"))
    one = model[0].__dict__[STATE].x
    one.pending = torch.ones(())
    with pytest.raises(
        RecipeError, match=r"the scale history of '0' \(input\) grows, from 0 entries to 16; take steps until"
    ):
        one.roll()


def test_scales_of_regions_that_none_has_closed_cannot_be_captured(capture):
    model, _ = in_capture(capture, uniform("E4M3", scaling="regions"))
    with pytest.raises(
        RecipeError, match=r"the scale history of '0' \(input\) grows, from 0 entries to 1025; take steps until"
    ):
        model(torch.ones(2, 16))


def test_an_average_that_does_not_decide_yet_cannot_be_captured(capture):
    model, _ = in_capture(capture, Recipe.from_dict("x:MXFP4 w:MXFP4(ema(decay=0.9,start=10))|MXFP4 dy:MXFP4"), steps=2)
    with pytest.raises(
        RecipeError, match=r"'0' has averaged its weight over 1 of its first 10 steps; take those before"
    ):
        model(torch.ones(2, 16))


def test_an_update_that_an_observer_reads_cannot_be_captured(capture, monkeypatch):
    model, _ = in_capture(capture, RECIPES["grid"], steps=1)
    storage, weight = model[0].__dict__[STATE].storage, model[0].weight
    with pytest.raises(RecipeError, match=r"an observer reads each step's update; set_observer\(model, None\) before"):
        storage.round_back(weight, observer=object())
    monkeypatch.setattr(grids, "serve", lambda x: True)
    monkeypatch.setattr(storage, "_key", lambda weight: (1, 2))
    with pytest.raises(RecipeError, match=r"'0\.weight' has not been stepped yet; take a step of the same kind before"):
        storage.round_back(weight)
