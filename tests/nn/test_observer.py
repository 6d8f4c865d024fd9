"""What layers publish, once for each distinct quantization; and nothing at all when nobody listens."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from altgrad.nn import full_precision, quantize_model, set_amax_reduction, set_observer, uniform
from altgrad.quantization import amax_scale, get_format, ops, quantize_with_stats
from altgrad.quantization.stats import SUM_ERROR


class Seen:
    def __init__(self):
        self.calls = []

    def observe(self, *, layer, role, gemm, stats, scale, fmt):
        self.calls.append((layer, role, gemm, stats, scale, fmt))

    def observe_update(self, **_):
        raise AssertionError("no grid here")

    def places(self):
        return [call[:3] for call in self.calls]


def model_and_observer(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    quantize_model(model, recipe)
    set_observer(model, seen := Seen())
    return model, seen


def test_statistics_are_those_of_the_quantization():
    model, seen = model_and_observer(uniform("E4M3", grad="E5M2"))
    x = torch.randn(32, 32)
    model(x).sum().backward()
    assert seen.places() == [
        ("0", "input", "forward"),
        ("0", "weight", "forward"),
        ("1", "input", "forward"),
        ("1", "weight", "forward"),
        ("1", "grad_output", "input_grad"),
        ("0", "grad_output", "input_grad"),  # one entry serves both gradients and has the name of the first
    ]
    _, _, _, stats, scale, fmt = seen.calls[0]
    expected = quantize_with_stats(x, "E4M3", amax_scale(x, get_format("E4M3")), clamp=True, overflow="saturate")[1]
    assert torch.equal(stats.vector[:5], expected.vector[:5])  # amax and the counts are exact
    torch.testing.assert_close(stats.vector[5:], expected.vector[5:], rtol=2 * SUM_ERROR, atol=0)
    assert float(scale) == float(amax_scale(x, get_format("E4M3")))
    assert fmt.name == "E4M3"


def test_observed_steps_have_the_bits_of_unobserved_ones():
    x, results = torch.randn(32, 32), []
    for observed in (True, False):
        for name in ("E4M3", "E3M4", "MXFP8", "BF16"):
            model, seen = model_and_observer(uniform(name))
            set_observer(model, seen if observed else None)
            y = model(x)
            y.square().sum().backward()
            assert bool(seen.calls) == observed
            results.append((y.detach(), model[0].weight.grad))
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_block_formats_publish_each_axis():
    model, seen = model_and_observer(uniform("MXFP8"))
    model(torch.randn(32, 32).requires_grad_()).sum().backward()
    first = [place[1:] for place in seen.places() if place[0] == "0"]
    assert first == [
        ("input", "forward"),
        ("weight", "forward"),
        ("input", "weight_grad"),
        ("weight", "input_grad"),
        ("grad_output", "input_grad"),
        ("grad_output", "weight_grad"),
    ]


def test_recomputation_evaluation_and_full_precision_publish_nothing():
    model, seen = model_and_observer(uniform("E4M3"))
    x = torch.randn(32, 32).requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert len(seen.calls) == len(set(seen.places())) == 6
    seen.calls.clear()
    model.eval()(x)
    model.train()
    with torch.no_grad():
        model(x)
    with full_precision(model):
        y = model(x)
        y.sum().backward()
    assert seen.calls == []
    plain = model[1].weight @ (model[0].weight @ x.t() + model[0].bias[:, None]) + model[1].bias[:, None]
    torch.testing.assert_close(y, plain.t())


def test_without_an_observer_no_statistic_is_computed(monkeypatch):
    model, _ = model_and_observer(uniform("E4M3"))
    set_observer(model, None)

    def fail(*_, **__):
        raise AssertionError("statistics were computed")

    for name in ("quantize_with_stats", "encode_with_stats", "quantize_and_encode_with_stats"):
        monkeypatch.setattr(ops, name, fail)
    model(torch.randn(32, 32)).sum().backward()


@pytest.mark.parametrize(
    ("scaling", "times"), [("amax", 3), ({"policy": "amax", "axis": 0}, 0), ({"policy": "amax", "axis": 1}, 3)]
)
def test_amax_reduction_meets_inputs_and_gradients_of_shared_scales_only(scaling, times):
    model, seen = model_and_observer(uniform("E4M3", scaling=scaling))
    calls = []
    set_amax_reduction(model, lambda amax: calls.append(amax) or amax * 2)
    x = torch.randn(32, 32)
    model(x).sum().backward()
    assert len(calls) == (4 if times else 0)
    scale = next(call[4] for call in seen.calls if call[:2] == ("0", "input"))
    expected = amax_scale(x, get_format("E4M3"), axis=scaling["axis"] if isinstance(scaling, dict) else None)
    assert torch.equal(torch.as_tensor(scale), expected * 2 if times else expected)
