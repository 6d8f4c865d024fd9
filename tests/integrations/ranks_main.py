"""What each of two processes does, started by torchrun in `test_ranks.py`: a person's own loop, without `altgrad run`."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from altgrad.errors import AltGradError
from altgrad.monitor import Monitor
from altgrad.nn import (
    Override,
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
from altgrad.nn.spread import spread_like, whole

STEPS = 3


def built():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def batch(step, rank=None):
    """Rows of a step, of all ranks or of one; rank 1's are ten times as large."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 16, generator=generator) * torch.tensor([1.0, 10.0]).repeat_interleave(4)[:, None]
    return x if rank is None else x.chunk(2)[rank]


def train(model, optimizer, rank, module=None):
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (module or model)(batch(step, rank)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def windows(model):
    return {
        f"{layer}.{name}": memory["window"].tolist()
        for layer, operands in quant_state(model)["operands"].items()
        for name, memory in operands.items()
    }


class Scales(list):
    """An observer that keeps the scale of each use."""

    def observe(self, *, layer, role, gemm, stats, scale, fmt):
        self.append((f"{layer}.{role}", float(scale)))


def first_scales(rank, how):
    """The scales of the first step under delayed scaling, where there is no history yet."""
    model, seen = built(), Scales()
    quantize_model(model, uniform("E4M3", scaling="delayed"))
    wrapped = {"ddp": DistributedDataParallel, "fsdp2": spread, "alone": lambda m: m}[how](model)
    set_observer(model, seen)
    wrapped(batch(0, None if how == "alone" else rank)).square().mean().backward()
    return list(seen)


def ddp(rank, recipe):
    model = built()
    quantize_model(model, recipe)
    wrapped = DistributedDataParallel(model)
    losses = train(model, torch.optim.SGD(model.parameters(), lr=0.01), rank, wrapped)
    return {
        "losses": losses,
        "weight": model[0].weight.detach().clone(),
        "state": quant_state(model),
        "windows": windows(model),
    }


def spread(model):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return model


def fsdp2(rank, recipe, order):
    model = built()
    if order == "before":
        quantize_model(model, recipe)
        spread(model)
    else:
        spread(model)
        quantize_model(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = train(model, optimizer, rank)
    state = get_state_dict(model, optimizer)
    clock = quant_state(model)["clocks"]
    set_state_dict(model, optimizer, model_state_dict=state[0], optim_state_dict=state[1])
    return {
        "losses": losses,
        "weight": model[0].weight.full_tensor(),
        "windows": windows(model),
        "clocks": (clock, quant_state(model)["clocks"]),
    }


HOWS = ("ddp", "before", "after")


def refused(call):
    try:
        call()
    except AltGradError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


GRIDS = {
    "nearest": uniform("E3M4", storage="grid"),
    "channels": uniform("E4M3", storage=StorageSpec("E4M3", per_channel=True, refresh_every=2)),
    "no powers of two": uniform("E4M3", storage=StorageSpec("E4M3", power_of_two=False)),
    "stochastic": uniform("E3M4", storage="grid", storage_rounding="stochastic"),
}


def named_as_before():
    """What overrides by type meet in a model that was spread before, and whether anything warns of views."""
    model = nn.Sequential(spread(built()))
    recipe = uniform("E4M3", overrides=(Override(layer_recipe("E5M2"), type="Linear"),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manifest = quantize_model(model, recipe)
        model(batch(0).unflatten(0, (2, 4))).sum().backward()
    return {name: (one.type, one.shown) for name, one in manifest.swapped.items()}


def on_grid(rank, recipe, how):
    """A monitored run of weights on a grid, with a write by somebody else in its middle, and what is left of it."""
    model, records = built(), []
    if how == "before":
        quantize_model(model, recipe)
    wrapped = DistributedDataParallel(model) if how == "ddp" else None
    if how != "ddp":
        spread(model)
    if how != "before":
        quantize_model(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = attach_optimizer(model, optimizer)
    monitor = Monitor(model, optimizer, schedule={"rank": 2}, sink=records.extend)
    losses = train(model, optimizer, rank, wrapped)
    with torch.no_grad():
        model[2].weight.mul_(7.3)  # by somebody else
    losses += train(model, optimizer, rank, wrapped)
    monitor.close()
    state, kept = quant_state(model), {name: whole(t) for name, t in model.state_dict().items()}
    fresh = built()
    quantize_model(fresh, recipe)
    fresh.load_state_dict(kept)
    load_quant_state(fresh, state)
    if how != "ddp":
        spread(fresh)
    same = torch.equal(fresh(batch(0, rank)), model(batch(0, rank)))
    records = [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in records]
    return {
        "losses": losses,
        "weights": kept,
        "counts": handle.last_step_stats(),
        "scales": {name: one["scale"] for name, one in state["storage"].items()},
        "records": records,
        "a fresh one goes on": same,
        "restored": all(torch.equal(whole(t), kept[n]) for n, t in restore_model(model).state_dict().items()),
    }


def made_on_meta(recipe):
    """As large models are made: without values, spread, then filled."""
    with torch.device("meta"):
        model = built()
    quantize_model(model, recipe)
    spread(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in built().named_parameters():
            own = model.get_parameter(name)
            own.copy_(spread_like(own, p.detach()))
    return train(model, torch.optim.SGD(model.parameters(), lr=0.01), dist.get_rank())


def tensor_parallel():
    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    late = built()
    quantize_model(late, "E4M3")
    parallelize_module(late, mesh, plan)
    beside = nn.Sequential(built(), nn.Linear(8, 8))
    parallelize_module(beside[0], mesh, plan)
    manifest = quantize_model(beside, "E4M3", exclude=["0"])
    beside(batch(0)).sum().backward()
    return {
        "before": refused(lambda: quantize_model(parallelize_module(built(), mesh, plan), "E4M3")),
        "after": refused(lambda: late(batch(0))),
        "beside": list(manifest.swapped),
    }


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    nearest, delayed = uniform("E4M3"), uniform("E4M3", scaling="delayed")
    found = {
        "ddp delayed": ddp(rank, delayed),
        "ddp grid": ddp(rank, uniform("E3M4", storage="grid", storage_rounding="stochastic")),
        "fsdp2 delayed": fsdp2(rank, delayed, "before"),
        "fsdp2 before": fsdp2(rank, nearest, "before"),
        "fsdp2 after": fsdp2(rank, nearest, "after"),
        "tensor parallel": tensor_parallel(),
        **{f"first scales {how}": first_scales(rank, how) for how in ("ddp", "fsdp2", "alone")},
        "named": named_as_before(),
        "made on meta": made_on_meta(GRIDS["nearest"]),
        **{f"{name} {how}": on_grid(rank, recipe, how) for name, recipe in GRIDS.items() for how in HOWS},
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
