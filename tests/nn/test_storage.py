"""Weights on the grid: rounding after any optimizer's step, the counts, regrids, ties, and what diagnostics see."""

import pytest
import torch
from torch import nn

from altgrad.nn import StorageSpec, attach_optimizer, layer_recipe, quant_state, quantize_model, set_observer, uniform
from altgrad.nn.session import STATE
from altgrad.optim import make_optimizer
from altgrad.quantization import FORMAT_REGISTRY, code_index, encode, get_format, quantize

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
FORMATS = [f for f in FORMAT_REGISTRY.values() if f.bits <= 8 and f.has_zero]


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def storage_of(module):
    return module.__dict__[STATE].storage


def step(model, optimizer, seed=0):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))

    def loss():
        optimizer.zero_grad()
        value = (model(x) - x[:, :4].sign()).square().mean()
        value.backward()
        return value

    return float(optimizer.step(loss).detach())


def on_grid(module) -> bool:
    storage, weight = storage_of(module), module.weight.detach()
    return torch.equal(quantize(weight, storage.fmt, storage.scale, overflow="saturate"), weight)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_weights_are_on_the_grid_after_every_step_of_any_optimizer(make, rounding):
    model = net()
    quantize_model(model, uniform("E3M4", storage="grid", storage_rounding=rounding))
    assert on_grid(model[0])
    optimizer = make(model.parameters())
    handle = attach_optimizer(model, optimizer)
    losses = []
    for index in range(6):
        before = {i: model[i].weight.detach().clone() for i in (0, 2)}
        losses.append(step(model, optimizer, index))
        for i in (0, 2):
            assert on_grid(model[i])
            storage, counts = storage_of(model[i]), handle.last_step_stats()[f"{i}.weight"]
            assert counts.elements == model[i].weight.numel()
            assert counts.stalled + counts.flips == counts.attempted
            if counts.regridded:
                continue
            indices = [
                code_index(encode(w, storage.fmt, storage.scale, overflow="saturate"), storage.fmt)
                for w in (before[i], model[i].weight.detach())
            ]
            assert counts.flips == int((indices[0] != indices[1]).sum())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_first_rounding_and_an_empty_step_keep_every_bit(fmt):
    model = net()
    quantize_model(model, layer_recipe(fmt.name, storage="grid"))
    storage = storage_of(model[0])
    assert float(torch.frexp(storage.scale)[0]) == 0.5  # a power of two
    kept = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach_optimizer(model, optimizer)
    step(model, optimizer)
    assert torch.equal(model[0].weight, kept)
    assert handle.totals().attempted == handle.totals().flips == 0
    assert handle.totals().stall_rate is None


def test_counts_of_a_hand_made_update():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0, -2.0, 3.96875]]))
    quantize_model(model, layer_recipe("E1M6", storage=StorageSpec("E1M6", scale=1.0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_optimizer(model, optimizer)
    ulp = 2.0**-5
    model[0].weight.grad = -torch.tensor([[0.0, 0.25 * ulp, 2 * ulp, 4 * ulp]])
    optimizer.step()
    counts = handle.last_step_stats()["0.weight"]
    assert (counts.attempted, counts.flips, counts.stalled, counts.overflow) == (3, 1, 2, 1)
    assert model[0].weight.tolist() == [[1.0, 1.0, -2.0 + 2 * ulp, 3.96875]]
    assert counts.stall_rate == pytest.approx(2 / 3)
    assert float(handle.stall_rate()) == pytest.approx(2 / 3)


def test_minus_zero_and_plus_zero_are_one_code():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0**-9]]))
    quantize_model(model, layer_recipe("E4M3", storage=StorageSpec("E4M3", scale=1.0)))
    with torch.no_grad():
        model[0].weight[0, 1] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_optimizer(model, optimizer)
    model[0].weight.grad = torch.tensor([[0.0, 2.0**-12]])  # 0 - 2^-12 rounds to -0
    optimizer.step()
    counts = handle.last_step_stats()["0.weight"]
    assert (counts.attempted, counts.flips, counts.stalled) == (1, 0, 1)


def test_stochastic_storage_moves_on_average_where_nearest_stalls():
    drift = {}
    for rounding in ("nearest_even", "stochastic"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        quantize_model(model, layer_recipe("E3M4", storage=StorageSpec("E3M4", rounding, scale=1.0)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        handle = attach_optimizer(model, optimizer)
        for _ in range(20):
            model[0].weight.grad = torch.full_like(model[0].weight, -0.1 * 2.0**-4)
            optimizer.step()
        drift[rounding] = float(model[0].weight.detach().mean()) - 1.0
        assert handle.totals().attempted == 4096
    assert drift["nearest_even"] == 0.0
    expected = 20 * 0.1 * 2.0**-4
    assert drift["stochastic"] == pytest.approx(expected, rel=0.1)


def test_two_runs_draw_the_same_bits_and_steps_draw_different_ones():
    weights = []
    for _ in range(2):
        model = net()
        quantize_model(model, uniform("E4M3", storage="grid", rounding="stochastic"), seed=9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for index in range(3):
            step(model, optimizer, index)
        weights.append(model[0].weight.detach().clone())
    assert torch.equal(*weights)
    model = net()
    quantize_model(model, uniform("E4M3", storage="grid", rounding="stochastic"), seed=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for index in range(3):
        step(model, optimizer, index)
    assert not torch.equal(weights[0], model[0].weight)


def test_an_optimizer_that_nobody_attached_rounds_all_the_same():
    model = net()
    quantize_model(model, uniform("E3M4", storage="grid"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for index in range(3):
        step(model, optimizer, index)
        assert on_grid(model[0])
        assert on_grid(model[2])
    assert quant_state(model)["clocks"][0]["step"] == 3


def test_two_optimizers_advance_the_step_once():
    model = net()
    quantize_model(model, uniform("E3M4", storage="grid"))
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    for optimizer in optimizers:
        attach_optimizer(model, optimizer)
    model(torch.randn(8, 16)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert quant_state(model)["clocks"][0]["step"] == 1
    assert on_grid(model[0])
    assert on_grid(model[2])


def test_refreshed_scale_is_a_regrid_counted_apart():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.4375]]))
    quantize_model(model, layer_recipe("E2M1", storage=StorageSpec("E2M1", refresh_every=1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_optimizer(model, optimizer)
    first = float(storage_of(model[0]).scale)
    model[0].weight.grad = torch.tensor([[0.9, 0.0]])
    optimizer.step()
    counts = handle.last_step_stats()["0.weight"]
    assert float(storage_of(model[0]).scale) < first
    assert counts.regridded == 0  # both scales round the attempted 0.1 to 0.125
    assert counts.flips == 1
    assert on_grid(model[0])


def test_per_channel_scales_and_weights_loaded_from_elsewhere():
    model = net()
    quantize_model(model, layer_recipe("E4M3", storage=StorageSpec("E4M3", per_channel=True)))
    assert storage_of(model[0]).scale.shape == (32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_optimizer(model, optimizer)
    model.load_state_dict({k: v * 0.7 for k, v in net().state_dict().items()})
    step(model, optimizer)
    assert on_grid(model[0])
    assert handle.last_step_stats()["0.weight"].attempted > 0


def test_a_nan_weight_stays_nan():
    model = net()
    quantize_model(model, uniform("E3M4", storage="grid"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_optimizer(model, optimizer)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    model[0].weight.grad[1, 2] = torch.nan
    optimizer.step()
    assert torch.isnan(model[0].weight).sum() == 1
    assert torch.isnan(model[0].weight[1, 2])


class Updates:
    def __init__(self):
        self.seen = {}

    def observe(self, **_):
        pass

    def observe_update(self, *, layer, parameter, before, attempted, after, scale, fmt, rounding):
        assert torch.equal(parameter, attempted)  # not yet overwritten
        self.seen[layer] = [t.clone() for t in (before, attempted, after)] + [scale, fmt, rounding]


def test_diagnostics_get_before_attempted_and_after_in_the_same_pass():
    model = net()
    quantize_model(model, uniform("E3M4", storage="grid"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_optimizer(model, optimizer)
    set_observer(model, updates := Updates())
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    got_before, attempted, after, scale, fmt, _ = updates.seen["0"]
    assert torch.equal(got_before, before)
    torch.testing.assert_close(attempted, before - 0.1 * model[0].weight.grad)
    assert torch.equal(after, model[0].weight)
    assert fmt == get_format("E3M4")
    assert torch.equal(after, quantize(attempted, fmt, scale, overflow="saturate"))


def test_a_wider_grid_than_8_bits():
    model = net()
    quantize_model(model, uniform("E4M3", storage=StorageSpec("BF16")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    attach_optimizer(model, optimizer)
    step(model, optimizer)
    assert torch.equal(model[0].weight.bfloat16().float(), model[0].weight)


def test_scale_grows_at_once_and_shrinks_only_on_schedule():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.5]]))
    quantize_model(model, layer_recipe("E2M1", storage=StorageSpec("E2M1", refresh_every=3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_optimizer(model, optimizer)
    scales, overflows = [float(storage_of(model[0]).scale)], []
    for target in (5.0, 0.75, 0.75):
        model[0].weight.grad = torch.tensor([[float(model[0].weight[0, 0].detach()) - target, 0.0]])
        optimizer.step()
        scales.append(float(storage_of(model[0]).scale))
        overflows.append(handle.totals().overflow)
        assert on_grid(model[0])
    assert scales == [0.25, 1.0, 1.0, 0.125]
    assert overflows == [1, 0, 0]
    # Under the scale at the start of the step 0.75 stalled at 1.0; the finer grid then holds it.
    assert (handle.totals().stalled, handle.totals().regridded) == (1, 1)
    assert model[0].weight[0, 0].item() == 0.75


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", ["eco", "kahan_adamw", "sr_adamw"])
def test_scale_grows_under_an_optimizer_that_lands_by_itself(name, per_channel):
    """It hands over landed values, in which an aim beyond max is no longer to be seen; its count tells."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.5], [0.125, 0.25]]))
    spec = StorageSpec("E4M3", refresh_every=1000, per_channel=per_channel)
    quantize_model(model, layer_recipe("E4M3", storage=spec))
    optimizer = make_optimizer(name, model.parameters(), lr=0.2, weight_decay=0.0, rounding="nearest_even")
    handle = attach_optimizer(model, optimizer)
    first = storage_of(model[0]).scale.clone()
    regridded = 0
    for _ in range(8):
        model[0].weight.grad = torch.tensor([[-1.0, 0.0], [0.0, 0.0]])
        optimizer.step()
        regridded += handle.totals().regridded
        assert on_grid(model[0])
    assert model[0].weight[0, 0].item() > 2.0  # clipped at 1.75 without growth
    grown = storage_of(model[0]).scale / first
    assert grown.flatten().tolist() == ([2.0, 1.0] if per_channel else [2.0])
    assert handle.totals().overflow == 0
    assert regridded == 0  # twice the scale holds all values that there were
