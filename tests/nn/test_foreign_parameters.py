"""Models whose quantized weights are not what the optimizer trains, or are no parameters at all."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from altgrad.nn import quantize_model, uniform
from altgrad.nn.session import STATE


@pytest.mark.parametrize("copied", [False, True])
def test_the_clock_follows_an_optimizer_that_trains_only_biases_or_adapters(copied):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    quantize_model(model, uniform("E2M5", rounding="stochastic"))
    model = copy.deepcopy(model) if copied else model
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    trained = [model[0].bias, model[2].bias]
    if not copied:
        model.add_module("adapter", nn.Linear(8, 8))
        trained = list(model.adapter.parameters())
    optimizer = torch.optim.SGD(trained, lr=0.1)
    session, x = model[0].__dict__[STATE].session, torch.randn(4, 8)
    before = model[0](x)
    model(x).sum().backward()
    optimizer.step()
    assert session.step == 1
    with torch.no_grad():
        assert not torch.equal(model[0](x), before)


def test_an_optimizer_of_another_model_leaves_the_clock():
    model, other = nn.Linear(8, 8), nn.Linear(8, 8)
    quantize_model(model, uniform("E2M5", rounding="stochastic"))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert model.__dict__[STATE].session.step == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "parametrize",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "pruning"],
)
def test_a_computed_weight_is_skipped_with_the_reason_and_the_rest_is_quantized(parametrize):
    model = nn.Sequential(parametrize(nn.Linear(8, 8)), nn.Linear(8, 4))
    manifest = quantize_model(model, uniform("E4M3"))
    assert list(manifest.swapped) == ["1"]
    assert "computed from other parameters" in manifest.skipped["0"]
    model(torch.randn(2, 8)).sum().backward()
