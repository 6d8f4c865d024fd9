"""Within `cached_weights` a weight is quantized once for all its uses, to the same bits, and must not change."""

import gc
import weakref
from contextlib import nullcontext, suppress
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from altgrad.errors import RecipeError
from altgrad.nn import attach_optimizer, cached_weights, quantize_model, set_observer, uniform
from altgrad.nn import session as session_of
from altgrad.nn.layer import at_once, products
from altgrad.nn.session import STATE

RECIPES = {
    "E4M3": uniform("E4M3"),
    "powers of two": uniform("E4M3", scaling={"policy": "amax", "power_of_two": True}),
    "channels": uniform("E4M3", scaling={"policy": "amax", "axis": 0}),
    "unscaled": uniform("E5M2", scaling="none"),
    "three formats": uniform("E4M3", weight="E3M4", grad="E5M2"),
    "MXFP8": uniform("MXFP8"),  # blocks of the weight's other axis for the gradient
    "NVFP4": uniform("NVFP4"),
    "FP16": uniform("FP16"),
    "masked": uniform("E4M3", mask_saturated=True, scaling={"policy": "static", "scale": 1e-3}),
    "grid": uniform("E4M3", storage="grid"),
    "grid, stochastic": uniform("E4M3", storage="grid", rounding="stochastic"),
    "stochastic": uniform("E4M3", rounding="stochastic"),  # a use draws bits of its own
    "delayed": uniform("E4M3", scaling={"policy": "delayed", "history": 2}),  # a use is remembered
}


class Block(nn.Module):
    """Linear layers of which two share a weight, and a convolution."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.again = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(128, 64)
        self.again.weight = self.down.weight
        self.conv = nn.Conv1d(64, 64, 3, padding=1)

    def forward(self, x):
        h = self.up(x).relu()
        return self.conv((self.down(h) + self.again(h)).t()[None])[0].t()


class Heard:
    """An observer that keeps numbers of what it hears."""

    def __init__(self):
        self.said = []

    def observe(self, *, layer, role, gemm, stats, scale, fmt):
        self.said.append(
            (layer, role, gemm, tuple(stats.vector.tolist()), float(torch.as_tensor(scale).sum()), str(fmt))
        )

    def observe_update(self, **what):
        self.said.append((what["layer"], "update"))


def trained(recipe, window, *, run=lambda model, x: model(x), observer=None):
    """Losses, gradients and weights of two steps of three micro-batches each."""
    torch.manual_seed(0)
    model = Block()
    quantize_model(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    attach_optimizer(model, optimizer)
    set_observer(model, observer)
    found = []
    for _ in range(2):
        with window(model):
            for _ in range(3):
                x = torch.randn(64, 64, requires_grad=True)
                loss = run(model, x).square().mean()
                loss.backward()
                found += [loss.detach(), x.grad]
            with torch.no_grad():
                found.append(model(torch.ones(64, 64)))
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *(p.detach() for p in model.parameters())]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def without(model):
    return nullcontext()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_results_and_what_observers_hear_are_those_without_it(recipe):
    assert same(trained(recipe, cached_weights), trained(recipe, without))
    heard = Heard(), Heard()
    one, other = trained(recipe, cached_weights, observer=heard[0]), trained(recipe, without, observer=heard[1])
    assert same(one, other)
    assert heard[0].said == heard[1].said


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["E4M3", "MXFP8", "stochastic"])
def test_recomputed_forwards_take_what_is_kept(name, reentrant):
    def run(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    assert same(trained(RECIPES[name], cached_weights, run=run), trained(RECIPES[name], without, run=run))


@pytest.mark.parametrize("split", ["forward within", "backward within"])
@pytest.mark.parametrize("name", ["E4M3", "three formats", "entries of their own", "MXFP8", "channels", "grid"])
def test_a_checkpoint_may_recompute_on_the_other_side_of_the_block(name, split):
    """What is recomputed keeps what the forward kept: torch compares their shapes, and the backward reads their bytes."""
    recipe = "x:E4M3|E5M2 w:E4M3|E3M4 dy:E4M3" if name == "entries of their own" else RECIPES[name]

    def gradients(windows, needs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        quantize_model(model, recipe)
        x = torch.randn(64, 64, requires_grad=needs)
        with windows[0](model):
            y = checkpoint(model, x, use_reentrant=False)
        with windows[1](model):
            y.square().sum().backward()
        return [p.grad for p in model.parameters()]

    sides = (cached_weights, without) if split == "forward within" else (without, cached_weights)
    for needs in (True, False):
        assert same(gradients(sides, needs), gradients((without, without), needs))


def counted(recipe, uses):
    """How often weights were quantized in so many forwards and backwards of two layers, and one without gradients."""
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    quantize_model(model, recipe)
    made = []

    def watch(owner, name, weight):
        plain = getattr(owner, name)

        def watched(operand, *given, **more):
            made.extend([name] if weight(operand) else [])
            return plain(operand, *given, **more)

        return mock.patch.object(owner, name, watched)

    with (
        watch(products, "_made", lambda operand: operand.role == "weight"),
        watch(products, "_apart", lambda operand: operand.role == "weight"),
        watch(at_once.Plan, "_encoded", lambda plan: True),
        cached_weights(model),
    ):
        for _ in range(uses):
            model(torch.randn(64, 64)).sum().backward()
        with torch.no_grad():
            model(torch.randn(64, 64))
    return len(made)


@pytest.mark.parametrize("name", ["E4M3", "MXFP8", "FP16", "grid"])
def test_a_weight_is_quantized_once_per_role(name):
    assert 2 <= counted(RECIPES[name], 2) == counted(RECIPES[name], 5) <= 8
    assert counted(RECIPES["stochastic"], 5) > counted(RECIPES["stochastic"], 2)


@pytest.mark.parametrize("layers", ["at once", "one by one"])
@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight[0].zero_(),
        lambda layer: setattr(layer.weight, "data", torch.zeros(64, 64)),
        lambda layer: layer.load_state_dict({"weight": torch.ones(64, 64), "bias": torch.ones(64)}),
    ],
)
def test_a_weight_that_is_written_within_is_refused(write, layers, monkeypatch):
    if layers == "one by one":
        monkeypatch.setattr(at_once, "plan_for", lambda *_: None)
        monkeypatch.setattr("altgrad.nn.layer.gemms.plan_for", lambda *_: None)
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model, uniform("E4M3"))
    x = torch.randn(64, 64)
    with cached_weights(model):
        model(x).sum().backward()
        with torch.no_grad():
            write(model[0])
        with pytest.raises(RecipeError, match="layer '0' was written within cached_weights"):
            model(x)
    expected = model(x)
    quantize_model(other := nn.Sequential(nn.Linear(64, 64)), uniform("E4M3"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(expected, other(x))


def test_a_step_of_an_optimizer_within_is_refused_and_a_new_parameter_is_not():
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model, uniform("E4M3"))
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.randn(64, 64)
    with cached_weights(model):
        model(x).sum().backward()
        optimizer.step()
        with pytest.raises(RecipeError, match="end the block before the optimizer's step"):
            model(x)
        model[0].weight = nn.Parameter(torch.eye(64))
        quantize_model(other := nn.Sequential(nn.Linear(64, 64)), uniform("E4M3"))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(x), other(x))


def test_what_was_kept_is_dropped_at_the_end_also_of_a_block_that_fails():
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model, uniform("E4M3"))
    session = model[0].__dict__[STATE].session

    def fail():
        raise KeyError

    with suppress(KeyError), cached_weights(model):
        outer = session.weights
        with cached_weights(model):
            model(torch.randn(64, 64))
            assert session.weights is outer
        assert session.weights is outer
        assert outer._kept
        gone = weakref.ref(outer)
        del outer
        fail()
    assert session.weights is None
    gc.collect()
    assert gone() is None


def test_blocks_that_overlap_leave_nothing_behind():
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model, uniform("E4M3"))
    first, second = cached_weights(model), cached_weights(model)
    first.__enter__(), second.__enter__()
    x = torch.randn(64, 64)
    model(x)
    first.__exit__(None, None, None), second.__exit__(None, None, None)
    assert model[0].__dict__[STATE].session.weights is None
    with torch.no_grad():
        model[0].weight.mul_(2)
    model(x)


def test_what_cannot_be_kept_is_said(monkeypatch):
    with pytest.raises(RecipeError, match="no quantized layer"), cached_weights(nn.Linear(4, 4)):
        pass
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model, uniform("E4M3"))
    monkeypatch.setattr(session_of, "is_spread", lambda p: True)
    with pytest.raises(RecipeError, match="spread over processes"), cached_weights(model):
        pass
