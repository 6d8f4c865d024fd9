"""A NaN or inf in x, w or dy makes results non-finite exactly where the unquantized layer's would be."""

import copy

import pytest
import torch
from torch import nn

from altgrad.nn import functional, quantize_model, uncoded_uses, uniform
from altgrad.nn.layer import state as layer_state
from altgrad.nn.layer.gemm import Route

FORMATS = [
    "E4M3",
    "E5M2",
    "E3M4",
    "E0M7",
    "E7M0",
    "BF16",
    "E4M3FNUZ",
    "MXFP8",
    "MXFP4",
    "MXINT8",
    "NVFP4",
    "E2M1/16x16:E8M0",
]
SCALINGS = {
    "amax": {},
    "axis": {"scaling": {"policy": "amax", "axis": 0}},
    "delayed": {"scaling": "delayed"},
    "static": {"scaling": {"policy": "static", "scale": 2.0**-6}},
    "none": {"scaling": "none"},
    "stochastic": {"rounding": "stochastic"},
}
PLACES = ("x", "w", "dy")


def linear():
    return nn.Linear(32, 64), torch.randn(32, 32), (5, 7)


def conv():
    return nn.Conv2d(32, 32, 3, padding=1, groups=2), torch.randn(32, 32, 4, 4), (5, 7, 1, 2)


def finite(layer, x, dy):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    return [t.isfinite() for t in (y, leaf.grad, layer.weight.grad, layer.bias.grad)]


def check(make, recipe):
    torch.manual_seed(0)
    layer, x, element = make()
    plain, dy = copy.deepcopy(layer), torch.randn_like(layer(x)) * 0.1
    quantize_model(layer, recipe)
    for place in PLACES:
        for value in (torch.inf, -torch.inf, torch.nan):
            tensors = {"x": x.clone(), "w": plain.weight.detach().clone(), "dy": dy.clone()}
            spot = element if place != "w" else tuple(min(i, n - 1) for i, n in zip(element, plain.weight.shape))
            tensors[place][spot] = value
            found = []
            for one in (layer, plain):
                with torch.no_grad():
                    before = one.weight.clone()
                    one.weight.copy_(tensors["w"])
                found.append(finite(one, tensors["x"], tensors["dy"]))
                with torch.no_grad():
                    one.weight.copy_(before)
            for name, a, b in zip(("y", "dx", "dw", "db"), *found):
                assert torch.equal(a, b), (place, value, name, int((a != b).sum()))
    return layer


@pytest.mark.parametrize("make", [linear, conv])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, make):
    if make is conv and "x16" in name:
        return  # tiles lie on matrices
    check(make, uniform(name))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E3M4"])
def test_every_scaling(name, scaling):
    check(linear, uniform(name, **SCALINGS[scaling]))


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E3M4"])
def test_a_stored_weight(name):
    check(linear, uniform(name, storage="grid"))


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E3M4"])
def test_the_bf16_route(name, monkeypatch):
    monkeypatch.setattr(layer_state, "choose_route", lambda needed, *_, **__: needed)
    layer = check(linear, uniform(name))
    assert layer.quantization.route("forward", (32, 64, 32), torch.device("cpu"), torch.float32) is Route.BF16


def test_uses_without_a_code_are_counted():
    layer = nn.Linear(8, 4)
    quantize_model(layer, uniform("E4M3", grad="E5M2"))
    x = torch.randn(4, 8)
    layer(x).sum().backward()
    assert uncoded_uses(layer) == {}
    x[0, 0] = torch.nan  # E4M3 has a code for it
    layer(x).sum().backward()
    assert uncoded_uses(layer) == {}
    x[0, 0] = torch.inf
    layer(x).sum().backward()
    assert uncoded_uses(layer) == {" input forward": 1}


def test_a_finite_overflow_saturates_and_an_inf_does_not():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    quantize_model(layer, uniform("E5M2", scaling="none"))
    assert layer(torch.tensor([[1e6, 0.0]])).item() == 57344
    assert layer(torch.tensor([[torch.inf, 0.0]])).item() == torch.inf
    told = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        told.weight.fill_(1.0)
    quantize_model(told, uniform("E5M2", scaling="none", overflow="saturate"))
    assert told(torch.tensor([[torch.inf, 0.0]])).item() == 57344


def test_matmul_and_embedding():
    a, b = torch.randn(4, 32), torch.randn(32, 8)
    a[1, 3] = torch.inf
    for recipe in ("E3M4", "MXFP4"):
        assert torch.equal(functional.matmul(a, b, recipe=recipe).isfinite(), (a @ b).isfinite())
    table = nn.Embedding(6, 32)
    with torch.no_grad():
        table.weight[2, 5], table.weight[3, 7] = torch.nan, torch.inf
    expected = table(torch.arange(6)).isfinite()
    quantize_model(table, uniform("MXFP4"))
    assert torch.equal(table(torch.arange(6)).isfinite(), expected)


def test_a_loss_scaler_backs_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    quantize_model(model, uniform("E4M3", grad="E5M2"))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = model[0].weight.detach().clone()
    loss = (model(torch.randn(4, 8)) * 1e6).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**120
    assert torch.equal(model[0].weight, before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E3M4", "MXFP8", "NVFP4"])
def test_compiled_layers_hide_nothing(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x, element = linear()
    plain = copy.deepcopy(layer)
    quantize_model(layer, uniform(name))
    compiled, dy = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(32, 64)
    x[element] = torch.inf
    y = compiled(x)
    y.backward(dy)
    expected = finite(plain, x, dy)
    assert torch.equal(y.isfinite(), expected[0])
    assert not layer.weight.grad.isfinite()[~expected[2]].any()
