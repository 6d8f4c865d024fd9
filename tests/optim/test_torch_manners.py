"""What people do with torch optimizers, done with every one of ours: names, copies, pickles, dtypes, states, late groups."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from altgrad.errors import DtypeError, OptionError
from altgrad.nn import quantize_model, uniform
from altgrad.optim import OPTIMIZERS, GridOptimizer, find_optimizer, make_optimizer
from tests.optim.test_battery import gradients, options_of, run, start

own = pytest.mark.parametrize("name", [n for n, row in OPTIMIZERS.items() if issubclass(row.cls, GridOptimizer)])


@own
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_and_pickles_go_on_alike(name, duplicate):
    w, grads = start(name), gradients(200, 6)
    optimizer = make_optimizer(name, [w], **options_of(name))
    run(optimizer, [w], grads[:3])
    twin = duplicate(optimizer)
    (other,) = twin.param_groups[0]["params"]
    run(optimizer, [w], grads[3:])
    run(twin, [other], grads[3:])
    assert torch.equal(w, other)


@own
@pytest.mark.parametrize("moment_format", [None, ("E4M3", "BF16")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_moves_to_parameters_of_another_dtype(name, dtype, moment_format):
    w, grads = start(name), gradients(200, 4)
    options = options_of(name, moment_format=moment_format)
    optimizer = make_optimizer(name, [w], **options)
    run(optimizer, [w], grads[:2])
    other = Parameter(w.detach().to(dtype))
    second = make_optimizer(name, [other], **options)
    second.load_state_dict(optimizer.state_dict())
    kept = {torch.uint8, torch.bfloat16, torch.float64 if dtype == torch.float64 else torch.float32}
    assert {v.dtype for v in second.state[other].values() if v.shape == other.shape} <= kept
    run(second, [other], grads[2:])
    run(optimizer, [w], grads[2:])
    assert torch.isfinite(other).all()
    apart = (other.detach().double() - w.detach().double()).abs() / w.detach().double().abs().clamp(min=2.0**-9)
    assert (
        float(apart.median()) < 0.51
    )  # the same run, in other arithmetic: at most a step of the grid (E7M0: a factor 2)


@own
def test_a_state_of_torchs_adamw_is_taken_as_far_as_it_goes(name):
    w, grads = start(name), gradients(200, 5)
    first = torch.optim.AdamW([w], lr=options_of(name)["lr"], weight_decay=0.0, fused=True)
    run(first, [w], grads[:3])
    w.data = start(name).data
    optimizer = make_optimizer(
        name,
        [w],
        **options_of(name, weight_decay=0.0) if "weight_decay" in OPTIMIZERS[name].options else options_of(name),
    )
    optimizer.load_state_dict(first.state_dict())
    group = optimizer.param_groups[0]
    assert (group["format"], group["rounding"], group["fused"]) == (options_of(name)["format"], "stochastic", None)
    before = w.detach().clone()
    run(optimizer, [w], grads[3:])
    assert torch.isfinite(w).all()
    assert not torch.equal(w, before)
    assert int(optimizer.state[w]["step"]) == 5


def test_adamw_goes_on_bit_for_bit_from_torchs_state():
    w, twin, grads = Parameter(torch.linspace(-1, 1, 50)), Parameter(torch.linspace(-1, 1, 50)), gradients(50, 6)
    theirs = torch.optim.AdamW([twin], lr=0.01)
    run(theirs, [twin], grads[:3])
    w.data = twin.data.clone()
    ours = make_optimizer("sr_adamw", [w], lr=0.01, rounding=None, fused=False)
    ours.load_state_dict(theirs.state_dict())
    run(ours, [w], grads[3:])
    run(theirs, [twin], grads[3:])
    assert torch.equal(w, twin)


@own
def test_groups_that_come_later_and_learning_rates_that_are_tensors(name):
    w, late, grads = start(name), start(name, seed=4), gradients(400, 4)
    lr = options_of(name)["lr"]
    optimizer = make_optimizer(name, [w], **options_of(name, lr=torch.tensor(lr, dtype=torch.float64)))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    run(optimizer, [w], grads[:1, :200])
    scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lr / 2)
    optimizer.add_param_group({"params": [late], "lr": lr})
    before = late.detach().clone()
    run(optimizer, [w, late], grads[1:])
    assert not torch.equal(late, before)
    assert [int(optimizer.state[p]["step"]) for p in (w, late)] == [4, 3]
    with pytest.raises(OptionError, match="lr inf"):
        optimizer.add_param_group({"params": [start(name)], "lr": float("inf")})
    assert len(optimizer.param_groups) == 2


@own
def test_what_cannot_be_stepped_is_refused(name):
    embedding = nn.Embedding(5, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(DtypeError, match="sparse"):
        make_optimizer(name, embedding.parameters(), **options_of(name)).step()
    w = Parameter(torch.ones(3, dtype=torch.complex64))
    w.grad = torch.ones_like(w)
    with pytest.raises(DtypeError, match="complex64"):
        make_optimizer(name, [w], **options_of(name)).step()


@own
def test_steps_without_gradients_leave_no_trace(name):
    w = start(name)
    before = w.detach().clone()
    optimizer = make_optimizer(name, [w], **options_of(name))
    optimizer.step()
    assert not optimizer.state
    assert torch.equal(w, before)
    assert optimizer.last_step_stats()["attempted"] == 0


@pytest.mark.parametrize("name", ["manifold_adamw", "grid_optim", "eco"])
def test_a_compiled_step_is_the_step(name):
    w, twin, grads = start(name), start(name), gradients(200, 3)
    optimizer, plain = (make_optimizer(name, [p], **options_of(name)) for p in (w, twin))
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for row in grads:
        w.grad = row.clone()
        step()
    run(plain, [twin], grads)
    assert torch.equal(w, twin)


def test_a_compiled_step_beside_a_quantized_model_of_another_optimizer():
    """The look for models that wait for their optimizer is no part of what is compiled."""
    waiting = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    quantize_model(waiting, uniform("E4M3", scaling="delayed"))
    w = start("eco")
    optimizer = make_optimizer("eco", [w], **options_of("eco"))
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    before = w.detach().clone()
    w.grad = gradients(200, 1)[0].clone()
    step()
    assert not torch.equal(w, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_make_their_class_and_cite_a_source(name):
    row = OPTIMIZERS[name]
    optimizer = make_optimizer(name.upper(), [Parameter(torch.ones(2))], lr=0.1)
    assert type(optimizer) is row.cls
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert row.source
    assert {"lr"} <= row.options
    assert not row.options & {"self", "params", "options"}


def test_unknown_names_and_options_are_told():
    with pytest.raises(OptionError, match="manifold_adamw"):
        find_optimizer("manifold_adam")
    with pytest.raises(OptionError, match="does not take betas"):
        make_optimizer("grid_optim", [Parameter(torch.ones(2))], betas=(0.9, 0.95))


def test_adamw_by_name_has_the_bits_of_torchs_default_on_cpus():
    found = []
    for make in (torch.optim.AdamW, lambda params, **options: make_optimizer("adamw", params, **options)):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(s, generator=generator).requires_grad_() for s in ((33, 7), (5,), (), (128, 3))]
        optimizer = make(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(30):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 7 - 4)
            optimizer.step()
        found.append([p.detach() for p in params])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert make_optimizer("adamw", params, fused=True).defaults["fused"]
