"""What a quantized linear layer asks of a GPU: device operations, bytes they move and host waits. Needs no GPU.

    python -m benchmarks.cuda_traffic

Forward and backward run on fake CUDA tensors: shapes, dtypes and devices are real, values are not. Counted are the
operators that torch would launch (views and allocations are none), the launches of Triton kernels, which are intercepted,
and whatever makes the host wait: a number read from the device, or a copy between host and device. Bytes are those of every
tensor that goes into an operation or comes out of it, caches ignored. Apart from them the operations by which the clock
closes a layer's step: histories of amaxes, random keys. Autograd has no fake CUDA device where torch is built
for the CPU, so the layer's autograd function is called by hand.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from altgrad.nn import GemmRecipe, LayerRecipe, OperandSpec, Recipe, quantize_model, uniform
from altgrad.nn.layer import gemms
from altgrad.nn.layer.contractions import Matrices
from altgrad.nn.recipe.scaling_choice import CurrentScaling
from altgrad.nn.session import STATE
from altgrad.quantization import checks
from altgrad.quantization.kernels.cuda import launch

TOKENS, FEATURES = 8192, 768
MOST_OPERATIONS, MOST_BYTES = 20, 0.3e9
_FREE = (
    "empty",
    "detach",
    "view",
    "alias",
    "reshape",
    "expand",
    "select",
    "slice",
    "transpose",
    "permute",
    "squeeze",
    "unsqueeze",
    "unbind",
    "t.",
)


@dataclass
class Traffic:
    """What was counted: `names` in the order of the operations, `clock` those at the end of a step, bytes moved, and bytes
    `kept` between forward and backward."""

    names: list[str] = field(default_factory=list)
    clock: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    bytes: int = 0
    kept: int = 0

    def add(self, name: str, tensors: list[Tensor]) -> None:
        """One operation on a device."""
        self.names.append(name)
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)


class _Counter(TorchDispatchMode):
    """Counts operators on CUDA tensors; a number read from one is a wait and comes out as 1."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_gpu = any(t.device.type == "cuda" for t in tensors)
        if name.startswith(("_local_scalar_dense", "equal")):
            self.traffic.waits += [name] if on_gpu else []
            return 1 if name.startswith("_") else True
        found = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        on_gpu = on_gpu or any(t.device.type == "cuda" for t in made)
        if not on_gpu or name.startswith(("prim", "new_empty", "_unsafe_view", *_FREE)):
            return found
        if len({t.device.type for t in (*tensors, *made) if t.ndim or t.device.type == "cuda"}) > 1:
            self.traffic.waits.append(name)
        self.traffic.add(name, [*tensors, *made])
        return found


@contextmanager
def taken_for_plain():
    """Within the block tensors that a dispatch mode watches pass for plain ones, which are not traced."""
    traced = checks.traced
    modules = [m for name, m in sys.modules.items() if name.startswith("altgrad.") and vars(m).get("traced") is traced]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "traced", return_value=False))
        yield


@contextmanager
def counted():
    """Counts what happens to fake CUDA tensors within the block; they pass for plain ones there."""
    traffic = Traffic()

    def run(kernel, *args, grid=None, **options):
        traffic.add(kernel.fn.__name__, [t for t in (*args, *options.values()) if isinstance(t, Tensor)])

    from altgrad.quantization.kernels.cuda import (
        block_codes,
        blocks,
        clock,
        codes,
        operands,
        products,
        scalar,
    )

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(taken_for_plain())
        for module in (scalar, blocks, block_codes, codes, operands, products, clock):
            enter(mock.patch.object(module, "on_device", side_effect=lambda x: nullcontext()))
        enter(mock.patch.object(JITFunction, "run", run))
        enter(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
        enter(
            mock.patch.object(Tensor, "__invert__", lambda x: x.bitwise_not())
        )  # the operator looks for a real device
        stack.callback(launch.device_table.cache_clear)
        launch.device_table.cache_clear()
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(torch.no_grad())
        enter(_Counter(traffic))
        yield traffic


class _Context:
    """What a backward is given by its forward."""

    needs_input_grad = (False, True, True, True, False, False, False, False)
    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Missing gradients stay None."""


def by_channel(fmt: str) -> Recipe:
    """Every operand with a scale for each row or column, whichever the GEMM does not add up."""
    row, column = (OperandSpec(fmt, scaling=CurrentScaling(axis=axis)) for axis in (0, 1))
    forward = GemmRecipe(input=row, weight=row)
    input_grad, weight_grad = GemmRecipe(grad_output=row, weight=column), GemmRecipe(grad_output=column, input=column)
    return Recipe(LayerRecipe(forward, input_grad, weight_grad))


def of_linear(
    fmt: str | Recipe,
    dtype: torch.dtype = torch.float32,
    tokens: int = TOKENS,
    inputs: int = FEATURES,
    outputs: int = FEATURES,
    **recipe: Any,
) -> tuple[Traffic, Any]:
    """(traffic of a linear layer's forward and backward, its state), after a first step.

    dtype: of x and y; parameters are float32.
    """
    model = nn.Sequential(nn.Linear(inputs, outputs))
    quantize_model(model, fmt if isinstance(fmt, Recipe) else uniform(fmt, **recipe))
    state = model[0].__dict__[STATE]
    with counted() as traffic:
        x = torch.empty(tokens, inputs, dtype=dtype, device="cuda")
        w, bias = torch.empty(outputs, inputs, device="cuda"), torch.empty(outputs, device="cuda")
        dy = torch.empty(tokens, outputs, dtype=dtype, device="cuda")
        for _ in range(3):  # the third finds every scale and buffer where it will stay
            traffic.names, traffic.waits, traffic.bytes = [], [], 0
            call = gemms.Call(state, Matrices(), True, False, dtype, 0)
            context = _Context()
            sx, sx_back = state.scale_pair(state.x, state.x_back, x, True)
            sw, sw_back = state.scale_pair(state.w, state.w_back, w, True)
            gemms._Products.forward(context, call, x, w, bias, sx, sx_back, sw, sw_back)
            gemms._Products.backward(context, dy)
            traffic.kept = sum(t.numel() * t.element_size() for t in context.saved_tensors)
            step = [traffic.names[:], traffic.bytes]
            state.session.advance(w)
            traffic.clock = traffic.names[len(step[0]) :]
    traffic.names, traffic.bytes = step
    return traffic, state


ROWS: list[tuple[str, str | Recipe, dict[str, Any]]] = [
    ("E4M3, amax", "E4M3", {}),
    ("E4M3, amax rounded to powers of two", "E4M3", {"scaling": {"policy": "amax", "power_of_two": True}}),
    ("E4M3, delayed amax", "E4M3", {"scaling": {"policy": "delayed", "history": 1}}),
    ("E4M3, codes kept", "E4M3", {"save_codes": True}),
    ("E4M3, no scaling", "E4M3", {"scaling": "none"}),
    ("E4M3, stochastic", "E4M3", {"rounding": "stochastic"}),
    ("E4M3, amax of each row or column", by_channel("E4M3"), {}),
    ("E2M1, amax", "E2M1", {}),
    ("MXFP8", "MXFP8", {}),
    ("MXFP8, codes kept", "MXFP8", {"save_codes": True}),
    ("NVFP4", "NVFP4", {}),
    ("NVFP4, codes kept", "NVFP4", {"save_codes": True}),
    ("BF16", "BF16", {}),
    ("FP16, amax", "FP16", {}),
    ("E4M3, sums of the FP8 unit", uniform("E4M3").with_(accumulator="fp8_unit"), {}),
]


def main() -> None:
    """Trace, count and print."""
    table = Table(title=f"A linear layer's forward and backward: {TOKENS} tokens, {FEATURES} to {FEATURES} features")
    for column in ("recipe", "tensors", "operations", "GB", "at the step's end", "host waits", "MB kept"):
        table.add_column(column, justify="left" if column in ("recipe", "tensors") else "right")
    for name, fmt, recipe in ROWS:
        for dtype in (torch.bfloat16, torch.float32):
            found, _ = of_linear(fmt, dtype, **recipe)
            counts = (len(found.names), f"{found.bytes / 1e9:.2f}", len(found.clock), len(found.waits))
            counts += (f"{found.kept / 1e6:.1f}",)
            table.add_row(name, str(dtype)[6:], *map(str, counts))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
