"""Checks, in Triton's interpreter, that operands of tensor cores that `cached_weights` keeps give the bits of fresh ones."""

from contextlib import nullcontext

import torch

from altgrad.nn import attach_optimizer, cached_weights, quantize_model, uniform
from benchmarks.cuda_traffic import by_channel
from tests.quantization.oracles import same

RECIPES = {
    "E4M3": uniform("E4M3"),
    "channels": by_channel("E4M3"),
    "powers of two": uniform("E4M3", scaling={"policy": "amax", "power_of_two": True}),
    "NVFP4": uniform("NVFP4"),
    "FP16": uniform("FP16"),
    "grid": uniform("E4M3", storage="grid"),
    "stochastic": uniform("E4M3", rounding="stochastic"),
}


def trained(recipe, caches: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16))
    quantize_model(model, recipe)
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
    attach_optimizer(model, optimizer)
    for _ in range(2):
        with cached_weights(model) if caches else nullcontext():
            for _ in range(2):
                x = torch.randn(8, 32, requires_grad=True)
                model(x).square().sum().backward()
                found.append(x.grad)
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *(p.detach() for p in model.parameters())]


def check_cached() -> list[str]:
    return [
        name for name, recipe in RECIPES.items() if not all(map(same, trained(recipe, True), trained(recipe, False)))
    ]
