"""How often a monitored training step makes the host wait for a GPU. Needs no GPU.

    python -m benchmarks.cuda_waits

A model of several layers trains on fake CUDA tensors (as in `benchmarks.cuda_traffic`): forward, backward, the optimizer's
step with all that hangs on it, and the monitor with every diagnostic on every step, but those that say their own seconds
(`rank`, `reference`). What waits is a number read from the device or a copy between host and device. Counted are the steps
from the second interval on, which find every scale, table and buffer in its place. The monitor copies what it collected once per
interval; weights that are stored on a grid are asked once per step, all together, whether somebody else has written them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from altgrad.diagnostics import fields
from altgrad.monitor import Monitor, interval
from altgrad.nn import Recipe, attach_optimizer, quantize_model, uniform
from altgrad.nn.layer import gemms
from altgrad.nn.layer.state import LayerState
from altgrad.quantization import checks, memory
from benchmarks.cuda_traffic import _Context, counted

FLUSH_EVERY = 3  # measured steps of an interval
EVERYTHING = {"default": 1, "rank": 0, "oscillation": 1}


def _item(x: Tensor, index: Any) -> Tensor:
    """x[index] by operators alone: Python's own way asks for a real device."""
    rest = list(index) if isinstance(index, tuple) else [index]
    for at, one in enumerate(rest):
        if one is Ellipsis:
            rest[at : at + 1] = [slice(None)] * (x.ndim - len(rest) + 1 + sum(one is None for one in rest))
    axis, lists = 0, []
    for one in rest:
        if isinstance(one, int):
            x = x.select(axis, one)
            continue
        if one is None:
            x = x.unsqueeze(axis)
        elif not isinstance(one, slice):
            lists += [None] * (axis - len(lists)) + [_as_index(one, x)]
        elif one != slice(None):
            x = torch.ops.aten.slice.Tensor(x, axis, one.start, one.stop, one.step or 1)
        axis += 1
    return torch.ops.aten.index.Tensor(x, lists) if lists else x


def _as_index(places: Any, x: Tensor) -> Tensor:
    return places if isinstance(places, Tensor) else torch.tensor(places, device=x.device)  # which waits


def _put(x: Tensor, index: Any, value: Any) -> None:
    """x[index] = value by operators alone."""
    rest = index if isinstance(index, tuple) else (index,)
    if any(isinstance(one, list | Tensor) for one in rest):
        assert len(rest) == 1, "one list of places, along the first axis"
        torch.ops.aten.index_put_(x, [_as_index(rest[0], x)], torch.as_tensor(value))
    elif isinstance(value, Tensor):
        _copy(_item(x, index), value)
    else:
        _item(x, index).fill_(value)


def _copy(x: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
    return torch.ops.aten.copy_.default(x, other)


def _number(x: Tensor) -> Any:
    return torch.ops.aten._local_scalar_dense(x)


def _list(x: Tensor) -> Any:
    x.cpu()  # which waits, once
    return np.ones(tuple(x.shape), bool if x.dtype == torch.bool else int).tolist()


_METHODS: dict[str, Callable] = {
    "__getitem__": _item,
    "__setitem__": _put,
    "__float__": lambda x: float(_number(x)),
    "__int__": lambda x: int(_number(x)),
    "__bool__": lambda x: bool(_number(x)),
    "item": _number,
    "copy_": _copy,
    "numpy": lambda x: np.ones(tuple(x.shape)),
}


@contextmanager
def by_operators():
    """Within the block tensors do by operators, which take fake CUDA tensors, what else asks for a real device."""
    unusual = memory.is_unusual
    modules = [m for name, m in sys.modules.items() if name.startswith("altgrad.")]
    kept = (fields._first_kept, fields._chances_by_chance, interval.places)
    with ExitStack() as stack:
        for name, method in _METHODS.items():
            stack.enter_context(mock.patch.object(Tensor, name, method))
        for module in modules:
            if vars(module).get("is_unusual") is unusual:
                stack.enter_context(mock.patch.object(module, "is_unusual", return_value=False))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", _list))
        stack.enter_context(mock.patch.object(checks, "_scale_in_memory", lambda x, scale: scale))
        for cache in kept:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        yield


class Waits(NamedTuple):
    """Of each step that counts: what made the host wait, by operator; operations on the device; records in the end."""

    steps: list[list[str]]
    operations: list[int]
    records: list[dict[str, Any]]


def of_training(recipe: Recipe, steps: int = FLUSH_EVERY) -> Waits:
    """What waits in each of so many monitored steps of a norm and three linear layers, trained by AdamW."""
    model = nn.Sequential(nn.Linear(96, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 128), nn.Linear(128, 64))
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    tape: list[_Context] = []

    def forward(*given):
        tape.append(_Context())
        return gemms._Products.forward(tape[-1], *given)

    found, records = Waits([], [], []), []
    with ExitStack() as stack:
        enter = stack.enter_context
        traffic = enter(counted())
        enter(by_operators())
        enter(mock.patch.object(gemms._Products, "apply", forward))
        enter(mock.patch.object(LayerState, "records", lambda self, training: training))  # gradients are asked for
        for layer in model:
            for name, parameter in layer.named_parameters():
                setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
        quantize_model(model, recipe)
        adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
        attach_optimizer(model, adamw)
        monitor = Monitor(model, adamw, schedule=EVERYTHING, sink=records.extend, flush_every=FLUSH_EVERY)
        for step in range(FLUSH_EVERY + steps):
            traffic.names, traffic.waits = [], []
            tape.clear()
            dy = torch.empty(model(torch.empty(32, 96, device="cuda")).shape, device="cuda")
            for context, layer in zip(reversed(tape), reversed(layers), strict=True):
                _, dy, dw, db, *_ = gemms._Products.backward(context, dy)
                layer.weight.grad, layer.bias.grad = dw, db
            for parameter in model[1].parameters():
                parameter.grad = torch.empty_like(parameter)
            adamw.step()
            adamw.zero_grad()
            if step >= FLUSH_EVERY:
                found.steps.append(traffic.waits)
                found.operations.append(len(traffic.names))
        monitor.close()
    found.records.extend(records)
    return found


ROWS = {
    "E4M3": uniform("E4M3"),
    "E4M3, norms too": uniform("E4M3", norm_weight="E4M3"),
    "E4M3, no scaling": uniform("E4M3", scaling="none"),
    "E4M3, stochastic": uniform("E4M3", rounding="stochastic"),
    "E4M3, delayed amax": uniform("E4M3", scaling={"policy": "delayed", "history": 1}),
    "FP16": uniform("FP16"),
    "MXFP8": uniform("MXFP8"),
    "NVFP4": uniform("NVFP4"),
    "blocks of float scales": uniform("E3M4/24:FP32"),
    "E4M3, weights on the grid": uniform("E4M3", storage="grid"),
    "E4M3, weights on the grid, stochastic": uniform("E4M3", storage="grid", rounding="stochastic"),
}


def main() -> None:
    """Train, count and print."""
    table = Table(title=f"A monitored step of three layers: waits of {FLUSH_EVERY} steps, which are an interval")
    for column in ("recipe", "waits of each step", "operations of a step"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for name, recipe in ROWS.items():
        found = of_training(recipe)
        table.add_row(name, ", ".join(str(len(waits)) for waits in found.steps), str(max(found.operations)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
