"""What each of two processes does, started by torchrun in `test_ranks.py`: a person's own loop, without `altgrad run`."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from altgrad.errors import AltGradError
from altgrad.monitor import Monitor
from altgrad.nn import attach_optimizer, quant_state, quantize_model, uniform

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


def refused(call):
    try:
        call()
    except AltGradError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals():
    grid = uniform("E3M4", storage="grid")
    model = built()
    quantize_model(model, grid)
    before = copy.deepcopy(model.state_dict())
    spread(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        model(batch(0, dist.get_rank())).square().mean().backward()
        optimizer.step()

    return {
        "grid, then fully_shard, at its first step": refused(step),
        "nothing moved": all(torch.equal(before[name], t.full_tensor()) for name, t in model.state_dict().items()),
        "grid, then fully_shard, at attach": refused(lambda: attach_optimizer(model, optimizer)),
        "fully_shard, then grid": refused(lambda: quantize_model(spread(built()), grid)),
        "monitor": refused(lambda: Monitor(model, optimizer)),
    }


def monitored_operands(rank):
    model = built()
    quantize_model(model, uniform("E4M3"))
    spread(model)
    records = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer, parameters={}, schedule=1, sink=records.extend)
    train(model, optimizer, rank)
    monitor.close()
    return sorted({(r["layer"], r["role"]) for r in records})


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
        "refusals": refusals(),
        "operands": monitored_operands(rank),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
