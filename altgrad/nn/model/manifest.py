"""What `quantize_model` did: layers swapped, layers skipped and why, and the products that it cannot see.

Those are found by a trace: with an example input the model runs once, unchanged, in evaluation mode without gradients,
under a torch function mode that sees every call. Without one, only the source of the classes' forward methods is read.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from altgrad.nn.layer.registry import kind_of
from altgrad.nn.recipe.spec import LayerRecipe


@dataclass(frozen=True)
class Swapped:
    """One swapped layer: its class before, its recipe, and the recipe as printed."""

    type: str
    recipe: LayerRecipe
    shown: str


@dataclass(frozen=True)
class UnseenProduct:
    """A matrix product that no quantized layer computes: in which module, by which call, and how it was found."""

    module: str
    call: str
    found_by: str  # "traced" (seen while the example ran) or "source" (read in the source of the module's class)

    def __str__(self) -> str:
        return f"{self.module or '(root)'}: {self.call} ({self.found_by})"


@dataclass(frozen=True)
class Manifest:
    """The outcome of `quantize_model`.

    swapped: by module name. skipped: module name to reason. unseen: matrix products that stay unquantized because they
    are function calls (attention, einsum, ...). With an example input they are traced and the list is exact for that
    input; without one they are read from the source of the classes' forward methods: calls made further down (in
    functions that forward calls) are not found, and branches not taken are. uncalled: swapped layers that the example
    did not call; a model that reads such a layer's weight directly gets the unquantized weight.
    """

    swapped: dict[str, Swapped] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unseen: tuple[UnseenProduct, ...] = ()
    uncalled: tuple[str, ...] = ()
    traced: bool = False

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}:"]
        lines += [f"  {name or '(root)'} ({one.type})  {one.shown}" for name, one in self.swapped.items()]
        lines.append(f"skipped {len(self.skipped)}:")
        lines += [f"  {name or '(root)'}: {reason}" for name, reason in self.skipped.items()]
        how = "traced with the example" if self.traced else "read from the classes' source; pass example= to trace"
        lines.append(f"matrix products not seen by any layer, {how}: {len(self.unseen)}")
        lines += [f"  {product}" for product in self.unseen]
        if self.uncalled:
            lines.append(f"swapped, but not called by the example: {', '.join(self.uncalled)}")
        return "\n".join(lines)


PRODUCT_CALLS = frozenset(
    [
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "linear",
        "bilinear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "addbmm",
        "einsum",
        "tensordot",
        "inner",
        "outer",
        "chain_matmul",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "mv",
        "dot",
        "kron",
    ]
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer or RMS normalisation, by its kind or by its class's name."""
    kind = kind_of(type(module))
    name = type(module).__name__.lower()
    return (kind is not None and kind.kind == "norm") or name.endswith(("layernorm", "rmsnorm"))


class _Calls(TorchFunctionMode):
    """Records the product calls that happen while no module of `owners` is running its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, bool]] = [("", False)]  # (module name, is a layer that could be swapped)
        self.found: dict[tuple[str, str], None] = {}
        self.entered: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        module, is_layer = self.stack[-1]
        if name in PRODUCT_CALLS and not is_layer:
            self.found[(module, name.strip("_"))] = None
        return func(*args, **(kwargs or {}))


class Traced(NamedTuple):
    """What one run showed: products outside the swappable layers, positions by module name, and the modules called."""

    unseen: tuple[UnseenProduct, ...]
    positions: dict[str, frozenset[str]]
    called: set[str]


def trace(model: nn.Module, example) -> Traced:
    """What a run of the model shows.

    Args:
        example: a tensor, a tuple of arguments, a mapping of keyword arguments, or a callable that takes the model.

    A layer is "after_norm" if the tensor it gets is the very output of a normalisation, or a view of it.
    """
    calls, positions, norm_outputs = _Calls(), {}, []
    names = {module: name for name, module in model.named_modules()}

    def enter(module, args):
        calls.entered.add(names[module])
        calls.stack.append((names[module], kind_of(type(module)) is not None))
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if first is not None and any(_same_memory(first, out) for out in norm_outputs):
            positions[names[module]] = frozenset({"after_norm"})

    def leave(module, args, output):
        calls.stack.pop()
        if is_norm(module):
            norm_outputs.extend(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    hooks = [h for m in names for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    training = {module: module.training for module in names}
    try:
        model.eval()
        with torch.no_grad(), calls:
            _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return Traced(tuple(UnseenProduct(*place, "traced") for place in calls.found), positions, calls.entered)


def _call(model: nn.Module, example) -> None:
    if isinstance(example, dict):
        model(**example)
    elif isinstance(example, (tuple, list)):
        model(*example)
    elif isinstance(example, Callable) and not isinstance(example, Tensor):
        example(model)
    else:
        model(example)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.numel() == b.numel() and a.numel() > 0 and a.data_ptr() == b.data_ptr())


def read_source(model: nn.Module) -> tuple[UnseenProduct, ...]:
    """Product calls written in the forward methods of the model's classes, layers that could be swapped left out."""
    found = []
    for name, module in model.named_modules():
        if kind_of(type(module)) is None:
            found += [UnseenProduct(name, call, "source") for call in _calls_in(type(module))]
    return tuple(found)


@cache
def _calls_in(cls: type) -> tuple[str, ...]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return ("forward whose source cannot be read",)
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in PRODUCT_CALLS:
                found[called] = None
            elif "attention_interface" in called:
                found["attention function"] = None
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            found["matmul"] = None
    return tuple(found)
