"""What a model does in one run: which products, where, of how many multiply-adds; and layers fed straight by a normalisation.

With an example input the model runs once, unchanged, without gradients, in the mode that it is in (training or evaluation;
buffers and torch's generators are put back). Products are found by dispatch: each operator that multiplies is seen, whoever
calls it, and is named by the function call that it came from. Without an example only the source of the classes' forward
methods is read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from altgrad.nn.layer.classes import place_name
from altgrad.nn.layer.computed import base_class, settled
from altgrad.nn.layer.raw import Products, body_of, is_own_product
from altgrad.nn.layer.registry import kind_of
from altgrad.nn.model.manifest import UnseenProduct
from altgrad.nn.model.source import source_of
from altgrad.nn.recipe.recipe import ATTENTION_NAME


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer or RMS normalisation, by its kind or by its class's name."""
    kind = kind_of(type(module))
    name = type(module).__name__.lower()
    return (kind is not None and kind.kind == "norm") or name.endswith(("layernorm", "rmsnorm"))


class Product(NamedTuple):
    """Products that ran: the module whose code made them, by which call, and the spot that they are of, if any."""

    module: str
    call: str
    spot: str | None


@dataclass
class Traced:
    """What one run showed.

    Args:
        products: to the number of their multiply-adds; None where that is not known.
        positions: by module name. called: names of the modules called. mode: "training" or "evaluation".
    """

    products: dict[Product, int | None]
    positions: dict[str, frozenset[str]]
    called: set[str]
    mode: str = ""


class _Running:
    """A module whose forward runs."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.is_layer = name, kind_of(type(module)) is not None
        self.settled = ExitStack() if self.is_layer else settled(module)
        self.own = None if self.is_layer else Products(module, None)


class _Calls(TorchFunctionMode):
    """Knows the call that runs now: its name, and the spot whose product it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stack: list[_Running] = [_Running("", model)]
        self.entered: set[str] = set()
        self.calls: list[tuple[str, str | None]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return body_of(func)(*args, **kwargs)
        running = self.stack[-1]
        self.calls.append((_name(func), self._spot(running, func, args, kwargs)))
        try:
            out = func(*args, **kwargs)
        finally:
            self.calls.pop()
        if running.own is not None:
            running.own.follow(func, args, kwargs, out)
        return out

    def _spot(self, running: _Running, func: Any, args: tuple, kwargs: dict) -> str | None:
        if running.own is None:
            return running.name
        if not is_own_product(func):
            return None
        names = [running.own.name_of(t) for t in tree_leaves((args, kwargs))]
        known = next((name for name in names if name in running.own.matrices), None)
        return place_name(running.name, known or ATTENTION_NAME)


def _name(func: Any) -> str:
    return getattr(func, "__name__", "").strip("_") or str(func)


class _Operators(TorchDispatchMode):
    """Sees every operator, and keeps those that multiply."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls, self.found = calls, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _multiplies(func):
            running = self.calls.stack[-1]
            call, spot = self.calls.calls[-1] if self.calls.calls else (_name(func), None)
            product = Product(running.name, call, running.name if running.is_layer else spot)
            before, macs = self.found.get(product, 0), _multiply_adds(func, args, kwargs, out)
            self.found[product] = None if before is None or macs is None else before + macs
        return out


_MORE = frozenset(
    [
        "dot",
        "vdot",
        "mv",
        "addmv",
        "addr",
        "_grouped_mm",
        "mkldnn_rnn_layer",
        "_cudnn_rnn",
        "miopen_rnn",
        "_trilinear",
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
        "_thnn_fused_lstm_cell",
        "_thnn_fused_gru_cell",
        "lstm",
        "gru",
        "_int_mm",
        "mkldnn_linear",
    ]
)
_OURS = ("aten", "prims", "prim", "profiler", "altgrad", "inductor", "higher_order")


def _multiplies(func: Any) -> bool:
    """Whether an operator multiplies matrices, or may: what another library registered and takes two tensors."""
    packet, name = func.overloadpacket, func.overloadpacket.__name__
    if packet in flop_registry or name in _MORE or "scaled_dot_product" in name:
        return True
    floats = [a for a in func._schema.arguments if isinstance(a.type, torch._C.TensorType)]
    return func.namespace not in _OURS and len(floats) > 1


def _multiply_adds(func: Any, args: tuple, kwargs: dict, out: Any) -> int | None:
    """How many; None where no formula is known."""
    packet, name = func.overloadpacket, func.overloadpacket.__name__
    if "scaled_dot_product" in name:
        return sdpa_flop_count(*(t.shape for t in args[:3])) // 2
    if name in ("_grouped_mm", "grouped_mm_fallback"):
        return args[0].numel() * args[1].shape[-1]
    if name in ("dot", "vdot", "mv", "addmv"):
        return max(t.numel() for t in args if isinstance(t, Tensor))
    if packet not in flop_registry:
        return None
    try:
        return int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
    except (TypeError, IndexError, AttributeError, AssertionError, ValueError):  # a formula of torch's for other shapes
        return None


def trace(model: nn.Module, example) -> Traced:
    """What a run of the model shows.

    Args:
        example: a tensor, a tuple of arguments, a mapping of keyword arguments, or a callable that takes the model.

    A layer is "after_norm" if the tensor it gets is the very output of a normalisation, or a view of it.
    """
    calls, positions, norm_outputs = _Calls(model), {}, []
    operators = _Operators(calls)
    names = {module: name for name, module in model.named_modules()}

    def enter(module, args):
        calls.entered.add(names[module])
        calls.stack.append(_Running(names[module], module))
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if first is not None and any(_same_memory(first, out) for out in norm_outputs):
            positions[names[module]] = frozenset({"after_norm"})

    def leave(module, args, output):
        calls.stack.pop().settled.close()
        if is_norm(module):
            norm_outputs.extend(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    hooks = [
        h for m in names for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave, always_call=True))
    ]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if model.training else {}
    try:
        with torch.random.fork_rng(), torch.no_grad(), operators, calls:
            _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    return Traced(operators.found, positions, calls.entered, "training" if model.training else "evaluation")


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


def unseen(seen: Traced, swapped: set[str]) -> tuple[UnseenProduct, ...]:
    """The products of a run that are of no spot, and those of attention that is not among the swapped ones."""
    found = {
        UnseenProduct(p.module, p.call, "traced")
        for p in seen.products
        if p.spot is None or (p.spot.endswith(ATTENTION_NAME) and p.spot not in swapped)
    }
    return tuple(dict.fromkeys(u for p in seen.products if (u := UnseenProduct(p.module, p.call, "traced")) in found))


def read_source(model: nn.Module, swapped: set[str]) -> tuple[UnseenProduct, ...]:
    """Product calls written in the forward methods of the model's classes, without those of layers and swapped parameters."""
    found = []
    for name, module in model.named_modules():
        if kind_of(type(module)) is None:
            own = any(place_name(name, p) in swapped for p in Products(module, None).matrices)
            attends = f"{name}.{ATTENTION_NAME}".lstrip(".") in swapped
            calls = source_of(base_class(module)).calls
            found += [UnseenProduct(name, call, "source") for call in sorted(calls) if not (own or attends)]
    return tuple(found)
