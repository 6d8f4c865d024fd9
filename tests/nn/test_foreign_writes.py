"""Whoever writes a weight on a grid, or owns it: the forward is Q(w) of the weight that is there."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parameters_to_vector, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from altgrad.nn import StorageSpec, attach_optimizer, layer_recipe, quantize_model, storage, uniform, written
from altgrad.nn.session import STATE
from altgrad.quantization import get_format, quantize
from altgrad.quantization.parameter_grid import declared_grid

INPUTS, OUTPUTS = 24, 16
FORMATS = ("E4M3", "E0M7", "E2M5", "E5M2", "E2M1")


def values(seed: int = 3) -> torch.Tensor:
    """Weights far from those that a layer starts with, each channel of another size."""
    sizes = torch.logspace(-2, 2, OUTPUTS).unsqueeze(1)
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed)) * sizes


def spec_of(name: str, rounding: str = "nearest_even", per_channel: bool = False, **options) -> StorageSpec:
    return StorageSpec(name, rounding, per_channel=per_channel, **options)


def stored(spec: StorageSpec, seed: int = 0) -> nn.Linear:
    """A layer whose weight alone is quantized."""
    torch.manual_seed(seed)
    layer = nn.Linear(INPUTS, OUTPUTS, bias=False)
    quantize_model(layer, layer_recipe(spec.format, activation=None, grad=None, storage=spec))
    return layer


def forward_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that the layer's forward multiplies, exactly."""
    with torch.no_grad():
        return layer(torch.eye(INPUTS)).t()


def policy_scale(w: torch.Tensor, spec: StorageSpec) -> torch.Tensor:
    """The smallest power of two >= amax / max, by numpy in float64."""
    largest = np.abs(w.detach().double().numpy()).max(axis=1 if spec.per_channel else None, keepdims=spec.per_channel)
    scale = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 1.0) / get_format(spec.format).max))
    return torch.tensor(scale, dtype=torch.float32)


def on_fresh_grid(w: torch.Tensor, spec: StorageSpec) -> torch.Tensor:
    return quantize(w.detach(), spec.format, policy_scale(w, spec))


# -- writers: each writes other values than storage's into a layer that was used, and hands the layer back -------------


def load(layer):
    layer.load_state_dict({"weight": values()})
    return layer


def load_assigned(layer):
    layer.load_state_dict({"weight": values()}, assign=True)
    return layer


def in_place(change):
    def write(layer):
        with torch.no_grad():
            change(layer.weight)
        return layer

    return write


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.copy_(values())
    return layer


def data(layer):
    layer.weight.data = values()
    return layer


def data_in_place(layer):
    layer.weight.data.normal_()
    return layer


def data_added(layer):
    layer.weight.data += values()  # as peft merges
    return layer


def data_twice(layer):
    layer.weight.data = layer.weight.data * 3
    layer.weight.data = layer.weight.data * 3
    return layer


def new_parameter(layer):
    layer.weight = nn.Parameter(values())
    return layer


def new_parameter_while_the_old_one_lives(layer):
    layer.held = [layer.weight]
    layer.weight = nn.Parameter(values())
    return layer


def averaged(layer):
    model = AveragedModel(layer)
    for seed in (3, 4, 5):
        other = nn.Linear(INPUTS, OUTPUTS, bias=False)
        other.load_state_dict({"weight": values(seed)})
        model.update_parameters(other)
    return model.module


def ema(layer):
    with torch.no_grad():
        layer.weight.lerp_(values(), 0.9)
    return layer


def vector(layer):
    vector_to_parameters(parameters_to_vector(layer.parameters()) * 3.7 + 0.1, layer.parameters())
    return layer


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.3)
    with torch.no_grad():
        layer.weight_orig.copy_(values())
    forward_weight(layer)  # computes the weight
    return layer


def pruned_for_good(layer):
    prune.remove(pruned(layer), "weight")
    return layer


def doubled(layer):
    with torch.no_grad():
        layer.double()
        layer.weight.copy_(values())
    return layer.float()


def copied(layer):
    return load(copy.deepcopy(layer))


def copied_after(layer):
    return copy.deepcopy(load(layer))


def pickled_after(layer):
    return pickle.loads(pickle.dumps(load(layer)))


def emptied(layer):
    layer.to_empty(device="meta").to_empty(device="cpu")
    return load(layer)


WRITERS = {
    "load": load,
    "load assigned": load_assigned,
    "normal_": in_place(lambda w: nn.init.normal_(w, std=40.0)),
    "kaiming": in_place(lambda w: nn.init.kaiming_uniform_(w, a=0.01)),
    "fill_": in_place(lambda w: w.fill_(3.0)),
    "copy_": in_place(lambda w: w.copy_(values())),
    "mul_": in_place(lambda w: w.mul_(1000.0)),
    "an editor": in_place(lambda w: w[3].mul_(-77.0)),
    "inference mode": in_inference_mode,
    "data": data,
    "data twice": data_twice,
    "new parameter": new_parameter,
    "new parameter beside the old": new_parameter_while_the_old_one_lives,
    "averaged model": averaged,
    "data in place": data_in_place,
    "data added": data_added,
    "ema": ema,
    "vector_to_parameters": vector,
    "pruned": pruned,
    "pruned for good": pruned_for_good,
    "doubled": doubled,
    "copied": copied,
    "copied after": copied_after,
    "pickled after": pickled_after,
    "emptied": emptied,
}


STORAGES = [
    *((name, "nearest_even", False) for name in FORMATS),
    *((name, "stochastic", True) for name in FORMATS),
    ("E4M3", "nearest_even", True),
    ("E4M3", "stochastic", False),
]


@pytest.mark.parametrize(("name", "rounding", "per_channel"), STORAGES)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_any_write_gets_a_fresh_grid_before_the_weight_is_used(write, rounding, per_channel, name):
    spec = spec_of(name, rounding, per_channel)
    layer = stored(spec)
    forward_weight(layer)  # the storage has seen its own values
    layer = write(layer)
    written = layer.weight.detach().clone()
    expected = on_fresh_grid(written, spec)
    assert torch.equal(forward_weight(layer), expected)
    assert torch.equal(forward_weight(layer), expected)
    assert torch.equal(layer.weight, written)  # a forward writes nothing

    parameter = layer._parameters.get("weight")
    if parameter is None:
        return  # computed at each use: there is nothing to store
    grid = declared_grid(parameter)
    assert torch.equal(torch.as_tensor(grid.scale), policy_scale(written, spec))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = attach_optimizer(layer, optimizer)
    layer(torch.ones(2, INPUTS)).sum().backward()
    optimizer.step()
    counts = handle.last_step_stats()["weight"]
    assert torch.equal(parameter.detach(), expected)  # rounded to the grid, and lr 0 moved nothing
    assert counts.regridded == int((expected != written).sum())
    assert (counts.attempted, counts.flips, counts.overflow) == (0, 0, 0)


@pytest.mark.parametrize("write", [load, data, new_parameter, averaged], ids=lambda w: w.__name__)
def test_a_write_that_no_forward_saw_is_no_less_foreign_to_the_step(write):
    spec = spec_of("E4M3")
    layer = write(stored(spec))
    expected = on_fresh_grid(layer.weight, spec)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert torch.equal(layer.weight.detach(), expected)


@pytest.mark.parametrize("where", [0, 7, -1])
@pytest.mark.parametrize("write", [lambda w, i: w.view(-1)[i].fill_(50.0), lambda w, i: w[i].neg_().mul_(3)])
def test_a_write_of_few_values_through_data_is_seen_by_the_next_forward(write, where):
    """It leaves no trace in the version counter."""
    spec = spec_of("E4M3")
    layer = stored(spec)
    forward_weight(layer)
    write(layer.weight.data, where)
    written = layer.weight.detach().clone()
    assert torch.equal(forward_weight(layer), on_fresh_grid(written, spec))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert torch.equal(layer.weight.detach(), on_fresh_grid(written, spec))


@pytest.mark.parametrize("write", [None, "data", "zeros", "values"])
def test_a_gpu_is_asked_once_per_step_who_wrote_the_weights(write, monkeypatch):
    """The answers of all weights come together, and lead where each one's own would."""
    found = []
    for on_gpu in (True, False):
        monkeypatch.setattr(storage, "serve", lambda x, on_gpu=on_gpu: on_gpu)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        quantize_model(model, uniform("E4M3", storage="grid"))
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        handle = attach_optimizer(model, optimizer)
        weight = model[0].weight
        for step in range(4):
            if step == 2 and write is not None:
                wrote = {"data": weight.detach() * 2.7, "zeros": weight * 0, "values": torch.full_like(weight, 0.37)}
                weight.data.copy_(wrote[write])  # which no version counts
            model(torch.randn(5, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append([*(p.detach().clone() for p in model.parameters()), handle.counts.clone()])
    assert all(torch.equal(a, b) for one, other in zip(found[:4], found[4:]) for a, b in zip(one, other))
    assert write is None or found[2][-1][0, 4] > 0 or write == "zeros"


@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (1, 1), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_checksum_of_a_weight_follows_every_value(shape, dtype):
    whole = torch.randn(shape[0] + 1, shape[1], dtype=dtype)
    for weight in (whole[1:], whole[:-1], whole[1:].t()):  # an odd offset, too
        before = written.checksum(weight)
        assert written.checksum(weight.clone()) == before
        for i in range(weight.numel()):
            other = weight.clone().contiguous()
            other.view(-1)[i] = torch.nextafter(other.view(-1)[i], torch.tensor(9.0, dtype=dtype))
            assert written.checksum(other) != before


def test_a_checkpoint_of_a_plain_model_keeps_its_size():
    """The case that was found: std 0.206 in place of 1.0, with counts that told of no overflow and no regrid."""
    layer = nn.Linear(64, 64)
    quantize_model(layer, uniform("E4M3", storage="grid"))
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    layer.load_state_dict({"weight": w, "bias": torch.zeros(64)})
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-9)
    handle = attach_optimizer(layer, optimizer)
    layer(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    assert float((layer.weight.detach() - w).abs().max()) <= 2.0**-4 * float(w.abs().max())
    counts = handle.totals()
    assert counts.overflow == 0
    assert counts.regridded == int((layer.weight != w).sum()) > 0


def test_a_folded_batch_norm():
    spec = spec_of("E4M3")
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
    with torch.no_grad():
        norm.weight.copy_(torch.logspace(-3, 3, 8))
    quantize_model(conv, layer_recipe("E4M3", activation=None, grad=None, storage=spec))
    x = torch.randn(2, 4, 6, 6)
    conv(x)
    fused = fuse_conv_bn_eval(conv.eval(), norm.eval())
    scale = 2.0 ** np.ceil(np.log2(float(fused.weight.detach().abs().max()) / 448.0))
    expected = nn.functional.conv2d(x, quantize(fused.weight.detach(), "E4M3", float(scale)), fused.bias)
    torch.testing.assert_close(fused(x), expected)


def test_functional_calls_compute_with_the_tensors_that_they_are_given():
    spec = spec_of("E4M3")
    layer = stored(spec)
    own = forward_weight(layer)
    given = {"weight": values()}
    out = torch.func.functional_call(layer, given, torch.eye(INPUTS)).t()
    assert torch.equal(out, on_fresh_grid(given["weight"], spec))
    alias = {name: p.detach() for name, p in layer.named_parameters()}
    out = torch.func.functional_call(layer, alias, torch.eye(INPUTS))
    assert torch.equal(out.t(), own)
    assert torch.equal(forward_weight(layer), own)


def test_a_write_within_a_loss_evaluation_of_the_optimizer_is_its_own():
    layer = stored(spec_of("E3M4"))
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.5, max_iter=4)
    x, y = torch.randn(64, INPUTS), torch.randn(64, OUTPUTS)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert torch.equal(forward_weight(layer), layer.weight)
    assert losses[-1] < losses[0]


def test_a_step_that_raises_leaves_the_storage_watching():
    spec = spec_of("E4M3")
    layer = stored(spec)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def closure():
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        optimizer.step(closure)
    load(layer)
    assert torch.equal(forward_weight(layer), on_fresh_grid(values(), spec))


def test_a_saved_parameter_carries_no_grid_and_loads_as_plain_data():
    layer = stored(spec_of("E4M3"))
    file = io.BytesIO()
    torch.save(list(layer.parameters()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded[0], layer.weight)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
def test_the_scale_under_compile_is_that_of_the_present_weight():
    torch._dynamo.reset()
    spec = spec_of("E4M3")
    layer = stored(spec)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eye = torch.eye(INPUTS)
    with torch.no_grad():
        assert torch.equal(compiled(eye), layer(eye))
        for write in (in_place(lambda w: w.fill_(3.0)), load, data, new_parameter):
            write(layer)
            expected = on_fresh_grid(layer.weight, spec)
            assert torch.equal(compiled(eye).t(), expected), write
    loss = compiled(eye).square().sum()
    loss.backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    with torch.no_grad():
        assert torch.equal(compiled(eye).t(), layer.weight)


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
