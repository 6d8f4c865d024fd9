"""A parameter's grid has one owner: copies, saved states, ties, layers of zeros, and steps that are none."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from altgrad.errors import RecipeError
from altgrad.nn import (
    StorageSpec,
    attach_optimizer,
    layer_recipe,
    load_quant_state,
    quant_state,
    quantize_model,
    restore_model,
    set_observer,
    uniform,
)
from altgrad.optim import make_optimizer
from altgrad.quantization import get_format, quantize
from altgrad.quantization.parameter_grid import declared_grid

SPECS = {
    "powers of two": {},
    "per channel": {"per_channel": True},
    "headroom": {"headroom": 3, "refresh_every": 0},
    "headroom per channel": {"headroom": 2, "refresh_every": 0, "per_channel": True},
    "any scale": {"power_of_two": False},
    "any scale per channel": {"power_of_two": False, "per_channel": True},
    "fixed": {"scale": 0.0371},
}
FORMATS = ("E4M3", "E0M7", "E2M5", "E5M2", "E2M1", "E7M0", "INT8", "E5M10")


def made(spec: StorageSpec, seed: int = 0, rounding: str = "nearest_even"):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    quantize_model(model, layer_recipe(spec.format, activation=None, grad=None, rounding=rounding, storage=spec))
    return model


def train(model, optimizer, steps, start=0):
    losses = []
    for index in range(start, start + steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(index))
        loss = (model(x) - 3 * x[:, :8]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(spec: StorageSpec, steps: int = 6, **options):
    model = made(spec, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    attach_optimizer(model, optimizer)
    return model, optimizer, train(model, optimizer, steps)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("options", SPECS.values(), ids=SPECS.keys())
def test_a_plain_state_dict_round_trip_gives_the_same_outputs_bit_for_bit(options, name):
    spec = StorageSpec(name, **options)
    model, _, _ = trained(spec)
    fresh = made(spec, seed=1)
    x = torch.randn(64, 16)
    fresh(x)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.0)
    handle = attach_optimizer(fresh, optimizer)
    fresh(x).sum().backward()
    optimizer.step()
    assert handle.totals().regridded == handle.totals().attempted == 0
    assert torch.equal(fresh(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("scaling", ["amax", "delayed"])
def test_a_trained_model_evaluates_alike_after_loading_into_another(scaling):
    """The case that was found, with activations and gradients quantized, too: 53.25 in place of 177.7."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)))
        quantize_model(models[-1], uniform("E4M3", storage="grid", scaling=scaling))
    first, second = models
    train(first, torch.optim.AdamW(first.parameters(), lr=0.1), 10)
    second.load_state_dict(first.state_dict())
    load_quant_state(second, quant_state(first))
    x = torch.randn(32, 16)
    assert torch.equal(first.eval()(x), second.eval()(x))


def erring_scale(name: str, rounding: str) -> tuple[torch.Tensor, float]:
    """Values of a grid, and its scale, under which rounding the values again moves some of them."""
    values = torch.tensor(get_format(name).values().copy(), dtype=torch.float32)
    values = values[values.isfinite()]
    for tried in torch.linspace(1.0, 2.0, 1000).tolist():
        largest = quantize(values, name, tried).abs().max()
        scale = float(largest / get_format(name).max)
        stored = quantize(values, name, scale)
        again = quantize(stored, name, scale, rounding=rounding, overflow="saturate")
        if stored.abs().max() == largest and int((again != stored).sum()) > 8:
            return stored, scale
    raise AssertionError(f"no scale at which {rounding} moves values of {name}")


@pytest.mark.parametrize("name", ["E4M3", "E0M7", "E5M2"])
@pytest.mark.parametrize("rounding", ["toward_zero", "up", "odd"])
@pytest.mark.parametrize("fixed", [False, True], ids=["amax", "fixed"])
def test_untouched_weights_stay_where_the_scale_is_no_power_of_two(fixed, rounding, name):
    """fl(fl(s * p) / s) can lie beside p, and every rounding but the nearest then moves it."""
    values, scale = erring_scale(name, rounding)
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(values)
    spec = StorageSpec(name, rounding, **({"scale": scale} if fixed else {"power_of_two": False}))
    quantize_model(layer, layer_recipe(name, activation=None, grad=None, rounding=rounding, storage=spec))
    assert torch.equal(layer.weight.detach()[0], values)
    assert torch.equal(layer(torch.eye(len(values)))[:, 0], values)  # and reading it moves nothing
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    handle = attach_optimizer(layer, optimizer)
    for _ in range(3):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    assert torch.equal(layer.weight.detach()[0], values)
    assert handle.totals().flips == handle.totals().regridded == 0


# -- copies -----------------------------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("options", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_a_copy_keeps_the_grid_and_trains_as_the_first_does(duplicate, options):
    model, optimizer, _ = trained(StorageSpec("E3M4", "stochastic", **options))
    twin, twin_optimizer = duplicate((model, optimizer))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        if one.ndim == 2:
            assert torch.equal(torch.as_tensor(declared_grid(one).scale), torch.as_tensor(declared_grid(other).scale))
    attach_optimizer(twin, twin_optimizer)
    assert train(twin, twin_optimizer, 4, start=6) == train(model, optimizer, 4, start=6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m._apply(torch.clone), nn.Module.share_memory])
def test_values_that_move_without_changing_keep_their_grid(move):
    model, optimizer, _ = trained(StorageSpec("E3M4", headroom=2))
    scales = [declared_grid(model[i].weight).scale.clone() for i in (0, 2)]
    handle = attach_optimizer(model, optimizer)
    dtype = move(model)[0].weight.dtype
    model(torch.randn(4, 16, dtype=dtype))
    assert [float(declared_grid(model[i].weight).scale) for i in (0, 2)] == [float(s) for s in scales]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert handle is not None
    assert [float(declared_grid(model[i].weight).scale) for i in (0, 2)] == [float(s) for s in scales]


def test_a_copy_of_a_tied_model_is_tied_in_one_storage():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    quantize_model(model, uniform("E4M3", storage="grid"))
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight
    assert twin[0].quantization.storage is twin[1].quantization.storage
    assert twin[0].quantization.storage is not model[0].quantization.storage


# -- ties -------------------------------------------------------------------------------------------------------------


def test_a_weight_tied_after_the_swap_has_one_storage():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    quantize_model(model, uniform("E4M3", storage="grid"))
    with torch.no_grad():
        model[0].weight.mul_(1000.0)
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = attach_optimizer(model, optimizer)
    x = torch.randn(4, 8)
    assert torch.equal(model[0](x), model[1](x))
    model(x).sum().backward()
    optimizer.step()
    assert list(handle.last_step_stats()) == ["0.weight"]
    assert model[0].quantization.storage is model[1].quantization.storage
    assert torch.equal(model[0](x), model[1](x))
    model[1].weight = nn.Parameter(torch.randn(8, 8))  # untied again
    model(x)
    assert not torch.equal(declared_grid(model[0].weight).scale, declared_grid(model[1].weight).scale)


def test_ties_that_disagree_are_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_model(model[0], uniform("E4M3", storage="grid"))
    quantize_model(model[1], uniform("E3M4", storage="grid"))
    model[1].weight = model[0].weight
    with pytest.raises(RecipeError, match="share one weight but store it differently"):
        model(torch.randn(2, 8))


# -- zeros ------------------------------------------------------------------------------------------------------------

ZERO_OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=1e-4, max_iter=2),
    "eco": lambda p: make_optimizer("eco", p, lr=1e-4),
    "kahan_adamw": lambda p: make_optimizer("kahan_adamw", p, lr=1e-4),
    "kahan_adamw-unfused": lambda p: make_optimizer("kahan_adamw", p, lr=1e-4, fused=False),
    "sr_adamw": lambda p: make_optimizer("sr_adamw", p, lr=1e-4),
    "manifold_adamw": lambda p: make_optimizer("manifold_adamw", p, lr=1e-2),
}


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"power_of_two": False}, {"refresh_every": 0}], ids=str)
@pytest.mark.parametrize("name", ["E0M7", "E2M5", "E4M3", "E7M0"])
def test_a_layer_of_zeros_moves_at_the_first_step(name, options, rounding):
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.weight)
    spec = StorageSpec(name, rounding, **options)
    quantize_model(layer, layer_recipe(name, activation=None, grad=None, storage=spec))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-5)
    handle = attach_optimizer(layer, optimizer)
    target = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    layer.weight.grad = target.clone()
    optimizer.step()
    move, aim = layer.weight.detach(), -1e-5 * target
    assert handle.totals().flips > 24
    gap = 2.0**-1 if name == "E7M0" else 2.0**-3
    large = aim.abs() > 0.5 * aim.abs().amax(dim=1, keepdim=True)
    assert bool(((move - aim).abs()[large] <= 2 * gap * aim.abs()[large]).all())
    assert (handle.totals().overflow, handle.totals().regridded) == (0, 0)


@pytest.mark.parametrize("name", ["E0M7", "E2M5"])
@pytest.mark.parametrize("make", ZERO_OPTIMIZERS.values(), ids=ZERO_OPTIMIZERS.keys())
def test_every_optimizer_moves_a_layer_of_zeros_at_its_first_step(make, name):
    layer = nn.Linear(32, 4, bias=False)
    nn.init.zeros_(layer.weight)
    quantize_model(layer, uniform(name, storage="grid"))
    optimizer = make(layer.parameters())
    handle = attach_optimizer(layer, optimizer)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (layer(x) - x[:, :4]).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    assert not declared_grid(layer.weight).settled or handle.counts is None
    optimizer.step(closure)
    assert handle.totals().flips > 100
    assert declared_grid(layer.weight).settled
    for _ in range(3):
        optimizer.step(closure)
    assert losses[-1] < losses[0]


def test_zero_channels_alone_get_their_scale_from_the_first_update():
    layer = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        layer.weight[2].zero_()
    quantize_model(layer, layer_recipe("E0M7", storage=StorageSpec("E0M7", per_channel=True, refresh_every=0)))
    before = declared_grid(layer.weight).scale.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-5)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    after = declared_grid(layer.weight).scale
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert float(after[2]) == 2.0**-16  # the power of two above 1e-5 / (127 / 128)
    assert torch.allclose(layer.weight[2], torch.tensor(-1e-5), rtol=2.0**-7)


# -- saved states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("order", ["parameters first", "state first", "state first, then a forward"])
def test_a_resumed_run_is_bit_identical_in_either_order_of_loading(order, options):
    spec = StorageSpec("E3M4", "stochastic", **options)
    model, optimizer, _ = trained(spec)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), quant_state(model)])
    other = made(spec, seed=1)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.05)
    attach_optimizer(other, other_optimizer)
    if order == "parameters first":
        other.load_state_dict(saved[0])
    load_quant_state(other, saved[2])
    if order != "parameters first":
        if "forward" in order:
            other(torch.randn(4, 16))
        other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    assert train(other, other_optimizer, 4, start=6) == train(model, optimizer, 4, start=6)


def test_a_saved_state_has_the_scale_of_what_was_written_last():
    model, _, _ = trained(StorageSpec("E3M4"))
    with torch.no_grad():
        model[0].weight.mul_(2.0**20)
    before = float(quant_state(model)["storage"]["0.weight"]["scale"])
    with torch.no_grad():
        model[0].weight.mul_(2.0**-40)
    assert float(quant_state(model)["storage"]["0.weight"]["scale"]) == before * 2.0**-40


def test_restoring_keeps_what_was_written_since():
    model = made(StorageSpec("E4M3"))
    x = torch.randn(4, 16)
    w = torch.randn(24, 16)
    with torch.no_grad():
        model[0].weight.copy_(w)
    model(x)
    restore_model(model)
    assert torch.equal(model[0].weight, w)
    assert declared_grid(model[0].weight) is None


# -- steps that are none ----------------------------------------------------------------------------------------------


def test_the_optimizers_state_can_be_asked_for_without_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    quantize_model(model, uniform("E4M3", storage="grid", rounding="stochastic", scaling="delayed"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = quant_state(model)
    get_state_dict(model, optimizer)
    assert str(quant_state(model)) == str(state)
    model(torch.randn(2, 16))
    restore_model(model)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())


def test_a_first_step_of_a_warmup_from_zero_is_a_step():
    model = made(StorageSpec("E4M3", "stochastic"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, 2)
    assert quant_state(model)["clocks"][0]["step"] == 2


# -- the meta device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_model_made_on_meta_gets_its_grid_when_it_has_values(per_channel):
    spec = StorageSpec("E4M3", per_channel=per_channel)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    quantize_model(model, layer_recipe("E4M3", activation=None, grad=None, storage=spec))
    model.to_empty(device="cpu")
    for layer in model:
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    written = model[0].weight.detach().clone()
    top = get_format("E4M3").max
    largest = written.abs().amax(dim=1, keepdim=True) if per_channel else written.abs().max()
    expected = quantize(written, "E4M3", torch.exp2(torch.ceil(torch.log2(largest / top))))
    assert torch.equal(model[0](torch.eye(16)).t(), expected)
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=0.05), 20)
    assert losses[-1] < losses[0]


class Updates:
    def observe(self, **_):
        pass

    def observe_update(self, *, before, attempted, after, scale, fmt, **_):
        assert torch.equal(after, quantize(attempted, fmt, scale, overflow="saturate"))
        assert torch.equal(before, quantize(before, fmt, scale, overflow="saturate"))


def test_diagnostics_see_the_scale_that_the_first_update_set():
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.weight)
    quantize_model(layer, uniform("E0M7", storage="grid"))
    set_observer(layer, Updates())
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-5)
    layer(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert int((layer.weight != 0).sum()) == 32
