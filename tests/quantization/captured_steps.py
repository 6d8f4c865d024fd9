"""Steps recorded as a CUDA graph records them, and run again on new data, against steps that Python leads.

Runs in Triton's interpreter, as part of `interpreter_checks`.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from altgrad.nn import Recipe, StorageSpec, quant_state, quantize_model, storage, uniform
from altgrad.nn.layer import gemms, operand, products
from altgrad.nn.session import Session
from altgrad.quantization import checks, scaling
from altgrad.quantization.hadamard import Hadamard, Signs
from altgrad.quantization.kernels import choose
from altgrad.quantization.kernels.choose import load
from benchmarks.cuda_traffic import taken_for_plain
from tests.quantization.oracles import same


class Capture(TorchDispatchMode):
    """What ran on tensors, to run again on the same memory without Python in between, as a CUDA graph does.

    Refused is what a graph cannot have: a number read by the host, or a tensor made of the host's numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith(("aten::_local_scalar_dense", "aten::lift_fresh", "aten::equal", "aten::nonzero")):
            raise AssertionError(f"{name}: the host takes part")
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        memory = {t.untyped_storage().data_ptr() for t in given}
        views = not func._schema.is_mutable and any(t.untyped_storage().data_ptr() in memory for t in made)
        if not views and not name.startswith(("aten::empty", "aten::new_empty")):
            self.ran.append((func, args, kwargs or {}, [] if func._schema.is_mutable else made))
        return out

    @contextmanager
    def recording(self):
        launch = GridExecutor.__call__

        def launched(executor, *args, **kwargs):
            self.ran.append((partial(launch, executor), args, kwargs, []))
            with _disable_current_modes():
                return launch(executor, *args, **kwargs)

        captures = staticmethod(lambda: True)
        with (
            mock.patch.object(GridExecutor, "__call__", launched),
            mock.patch.object(Session, "capturing", captures),
            taken_for_plain(),
            self,
        ):
            yield

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, made in self.ran:
                again = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, torch.Tensor)]
                for old, new in zip(made, again, strict=False):
                    old.copy_(new)


# signs that are drawn, and an average of the weight that decides from the second step on
MIXED = Recipe.from_dict("x:MXFP4 w:MXFP4(ema(decay=0.9,start=1))|MXFP4 dy:MXFP4(stochastic)").with_(
    hadamard=Hadamard(16, Signs.RANDOM)
)
GRAPHS = [
    ("E4M3", {"scaling": {"policy": "delayed", "history": 5}, "rounding": "stochastic"}),
    ("NVFP4", {"rounding": "stochastic"}),
    ("E4M3", {"scaling": {"policy": "amax", "axis": 0}}),
    ("E3M4", {"storage": StorageSpec("E3M4", "stochastic", refresh_every=2)}),
    ("E4M3", {"scaling": "regions"}),
    ("E4M3", {"scaling": {"policy": "delayed", "history": 2, "axis": 0}}),
    (MIXED, {}),
    ("E4M3", {"storage": StorageSpec("E4M3", per_channel=True, power_of_two=False, refresh_every=1)}),
]


def training(fmt: str | Recipe, recipe: dict):
    """(model, its input, one step of SGD with momentum on what the input holds)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16))
    quantize_model(model, fmt if isinstance(fmt, Recipe) else uniform(fmt, **recipe))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, target = torch.zeros(8, 32), torch.randn(8, 16)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()

    return model, x, step


def kept_by(model) -> list[torch.Tensor]:
    """What a model is after a step; how often an average was moved decides nothing once it has begun."""
    state = quant_state(model)
    own = [*model.parameters(), torch.tensor(state["clocks"][0]["step"])]
    own += [
        t
        for layer in state["operands"].values()
        for memory in layer.values()
        for name, t in memory.items()
        if name != "averaged"
    ]
    return [*own, *(torch.as_tensor(n) for storage in state["storage"].values() for n in storage.values())]


def check_graphs() -> list[str]:
    """A step that was recorded once and runs again on new data, against steps that Python leads; then one outside of it."""
    bad = []
    with ExitStack() as on_gpu:  # what goes by the device, and by what is not read from one
        on_gpu.enter_context(mock.patch.dict(choose._BY_DEVICE, cpu="cuda"))
        amaxes = SimpleNamespace(amax=load("cuda", "operands").largest)
        on_gpu.enter_context(mock.patch.object(scaling, "load", return_value=amaxes))
        on_gpu.enter_context(mock.patch.object(checks, "_scale_tensor", lambda x, scale, wide: scale.float()))
        on_gpu.enter_context(mock.patch.object(checks, "check_key", lambda x, key: key))
        on_gpu.enter_context(mock.patch.object(storage, "checksum", return_value=None))
        for module in (operand, products, gemms):
            on_gpu.enter_context(mock.patch.object(module, "waits", return_value=False))
        for fmt, recipe in GRAPHS:
            (captured, x, step), (led, other_x, other_step) = training(fmt, recipe), training(fmt, recipe)
            graph, seen = Capture(), []
            for number in range(6):
                data = torch.randn(8, 32) * (1 + number % 3) ** 2
                for place in (x, other_x):
                    place.copy_(data)
                other_step()
                if number == 2:
                    with graph.recording():
                        step()
                elif 2 < number < 5:
                    graph.replay()
                else:
                    step()
                seen.append([same(a, b) for a, b in zip(kept_by(captured), kept_by(led), strict=True)])
            if not all(map(all, seen)):
                bad.append(f"graph {fmt} {recipe}: {seen}")
    return bad
