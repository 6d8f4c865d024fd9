"""Modules that multiply parameters of their own by function calls: experts kept as 3-D parameters, routers, layers of one's own.

While such a module's forward runs, a torch function mode sees its calls. A product (`PRODUCTS`) of a quantized parameter,
or of what was made of it alone (a row, a view, a cast, a sum of parameters), runs on quantized operands as a linear layer
does; every other call runs as it is. Where the recipe asks for attention, the products of two activations do, too: of the
module's own calls, not those of modules inside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from altgrad.nn.layer.attention import AttentionStates, attention_forward, product_forward
from altgrad.nn.layer.batched import as_batched, batched_forward, grouped_forward
from altgrad.nn.layer.computed import computed, computed_names, settled
from altgrad.nn.layer.linear import linear_forward
from altgrad.nn.layer.state import LayerState
from altgrad.nn.session import Session

ATTENTION = "attention"  # the key of a module's attention among its places, and what an override's `type` calls it

# Calls whose result is the tensor given, seen otherwise, whatever else they are given.
_SAME = frozenset(
    [
        "__getitem__",
        "select",
        "narrow",
        "index_select",
        "unbind",
        "chunk",
        "split",
        "split_with_sizes",
        "t",
        "transpose",
        "permute",
        "swapaxes",
        "movedim",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "contiguous",
        "clone",
        "to",
        "type",
        "type_as",
        "float",
        "bfloat16",
        "half",
        "double",
        "view_as",
        "reshape_as",
        "take_along_dim",
        "gather",
    ]
)
_VIEWS = {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data")}


def own_matrices(module: nn.Module) -> dict[str, Tensor]:
    """A module's own floating parameters of two or more axes that are no biases, by name: also those in its parameter
    lists, those that it computes from others, and that of an attention's output projection (which nn.MultiheadAttention
    reads without calling it)."""
    found: dict[str, Tensor] = {name: computed(module, name) for name in computed_names(module)}
    for name, child in module.named_children():
        if isinstance(child, nn.ParameterList | nn.ParameterDict):
            found |= {f"{name}.{key}": p for key, p in child.named_parameters()}
    if isinstance(module, nn.MultiheadAttention):
        found["out_proj.weight"] = module.out_proj.weight
    found = {**dict(module.named_parameters(recurse=False)), **found}
    return {k: p for k, p in found.items() if p.ndim >= 2 and p.is_floating_point() and "bias" not in k}


class RawState:
    """What a module carries whose own parameters multiply: a layer's state for each of them, and for its attention.

    Args:
        session: of the `quantize_model` call.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.states: dict[str, LayerState] = {}
        self.attention: AttentionStates | None = None

    def distinct(self) -> list:
        """The operands of all products."""
        states = [*self.states.values(), *(self.attention or ())]
        return [operand for state in states for operand in state.distinct()]


class _Depth(list):
    """For each raw module that runs, how many modules inside it are running."""


_DEPTH = _Depth()


def enter_child(*_: Any) -> None:
    """A forward pre-hook of the modules inside one whose attention is quantized."""
    if _DEPTH:
        _DEPTH[-1] += 1


def leave_child(*_: Any) -> None:
    """The forward hook that belongs to `enter_child`."""
    if _DEPTH:
        _DEPTH[-1] -= 1


def called_children(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a module calls itself: its children, and those in its lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from called_children(child)
        else:
            yield child


def run_raw(state: RawState, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """A module's forward, with its products quantized; nothing that a compiler could trace."""
    _DEPTH.append(0)
    try:
        with settled(module), Products(module, state):
            return forward(*args, **kwargs)
    finally:
        _DEPTH.pop()


class Products(TorchFunctionMode):
    """The mode of one forward of one module.

    Args:
        state: None quantizes nothing.
    """

    def __init__(self, module: nn.Module, state: RawState | None) -> None:
        super().__init__()
        self.module, self.state = module, state
        self.made_of: dict[int, tuple[ref[Tensor], str]] = {}
        self.weights_of_values: dict[int, ref[Tensor]] = {}  # what a softmax made
        self.matrices = own_matrices(module)
        for name, p in [*self.matrices.items(), *module.named_parameters(recurse=False)]:
            self.made_of.setdefault(id(p), (ref(p), name))

    @property
    def training(self) -> bool:
        """Whether the module is."""
        return self.module.training

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = PRODUCTS.get(func) or (_BY_NAME.get(getattr(func, "__name__", "")) if _is_foreign(func) else None)
        if handler is not None:
            out = handler(self, *args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func is torch.Tensor.__iter__:  # one does not see what an iterator will give
            out = list(out)
            self.follow(func, args, kwargs, out)
            return iter(out)
        self.follow(func, args, kwargs, out)
        return out

    # -- what is a parameter --------------------------------------------------------------------------------------------

    def name_of(self, tensor: Any) -> str | None:
        """The own parameter that a tensor is or was made of; None for activations."""
        found = self.made_of.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def follow(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Note what a call made of own parameters."""
        leaves = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list | tuple) else (a,))]
        leaves = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        if not leaves:
            return
        name = getattr(func, "__name__", "")
        names = [self.name_of(t) for t in leaves]
        known = [n for n in names if n is not None]
        if known and (len(known) == len(names) or (names[0] is not None and (name in _SAME or func in _VIEWS))):
            matrices = [n for n in known if n in self.matrices]
            for made in out if isinstance(out, list | tuple) else (out,):
                if isinstance(made, Tensor) and made.is_floating_point():
                    self.made_of[id(made)] = ref(made), (matrices or known)[0]
        elif self.state is not None and self.state.attention is not None and isinstance(out, Tensor):
            first = self.weights_of_values.get(id(leaves[0]))
            if name == "softmax" or (
                name in (*_SAME, "dropout", "nan_to_num") and first is not None and first() is leaves[0]
            ):
                self.weights_of_values[id(out)] = ref(out)

    # -- products -------------------------------------------------------------------------------------------------------

    def state_of(self, tensor: Any) -> LayerState | None:
        """The state of the quantized parameter that a tensor is or was made of."""
        name = self.name_of(tensor)
        if name is None:
            return None
        return None if self.state is None else self.state.states.get(name)

    def attention(self) -> AttentionStates | None:
        """The states for products of two activations, if the module's own code is running."""
        return self.state.attention if self.state is not None and _DEPTH and _DEPTH[-1] == 0 else None

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None):
        state = self.state_of(weight)
        if state is not None and weight.ndim == 2:
            return linear_forward(state, input, weight, bias, self.training)
        return NotImplemented

    def matmul(self, a: Tensor, b: Tensor):
        state = self.state_of(b) if isinstance(b, Tensor) else None
        if state is not None and b.ndim == 2:
            return linear_forward(state, a, b.t(), None, self.training)
        if state is not None and b.ndim > 2 and a.ndim >= 2:
            return batched_forward(state, a, b.transpose(-2, -1), self.training)
        state = self.state_of(a) if isinstance(a, Tensor) else None
        if state is not None and a.ndim == 2:
            if b.ndim == 1:
                return linear_forward(state, b, a, None, self.training)
            return linear_forward(state, b.transpose(-2, -1), a, None, self.training).transpose(-2, -1)
        if state is not None and a.ndim > 2 and b.ndim >= 2:
            return batched_forward(state, b.transpose(-2, -1), a, self.training).transpose(-2, -1)
        return self._activations(a, b)

    def _activations(self, a: Tensor, b: Tensor):
        states = self.attention()
        if states is None or not isinstance(a, Tensor) or not isinstance(b, Tensor) or min(a.ndim, b.ndim) < 3:
            return NotImplemented
        softmax = self.weights_of_values.get(id(a))
        part = states.values if softmax is not None and softmax() is a else states.scores
        return product_forward(part, a, b, self.training)

    def rmatmul(self, a: Tensor, b: Tensor):
        return self.matmul(b, a)

    def addmm(self, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1):
        out = self.matmul(a, b) if beta == 1 and alpha == 1 else NotImplemented
        return out if out is NotImplemented else out + bias

    def einsum(self, equation: Any, *operands: Any):
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or len(operands) != 2:
            return NotImplemented
        plan = as_batched(equation, *(t.shape for t in operands))
        if plan is None:
            return NotImplemented

        def multiply(a: Tensor, b: Tensor):
            for arranged, operand in zip((a, b), operands, strict=True):
                name, softmax = self.name_of(operand), self.weights_of_values.get(id(operand))
                if name is not None:
                    self.made_of[id(arranged)] = ref(arranged), name
                elif softmax is not None and softmax() is operand:
                    self.weights_of_values[id(arranged)] = ref(arranged)
            return self.matmul(a, b)

        return plan(*operands, multiply)

    def grouped_mm(self, input: Tensor, mat2: Tensor, *, offs: Tensor | None = None, bias=None, out_dtype=None):
        state = self.state_of(mat2)
        if state is None or mat2.ndim != 3 or input.ndim != 2 or offs is None or bias is not None:
            return NotImplemented
        out = grouped_forward(state, input, mat2.transpose(-2, -1), offs, self.training)
        return out if out_dtype is None else out.to(out_dtype)

    def fallback(self, input: Tensor, weight: Tensor, offs: Tensor):
        return self.grouped_mm(input, weight, offs=offs)

    def scaled_dot_product_attention(self, *args: Any, **kwargs: Any):
        states = self.attention()
        return NotImplemented if states is None else attention_forward(states, *args, training=self.training, **kwargs)

    def multi_head_attention(self, *args: Any, **kwargs: Any):
        with self:  # its body, whose calls this mode sees in turn
            return body_of(F.multi_head_attention_forward)(*args, **kwargs)


@functools.cache
def body_of(function: Any) -> Callable:
    """A function of torch that asks modes first, as one that does not."""
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    return functools.wraps(function)(
        type(function)(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    )


def is_own_product(func: Any) -> bool:
    """Whether the mode knows a call as a product."""
    return func in PRODUCTS or (_is_foreign(func) and getattr(func, "__name__", "") in _BY_NAME)


def _is_foreign(func: Any) -> bool:
    """Whether a call is an operator that another library registered."""
    return isinstance(func, torch._ops.OpOverloadPacket | torch._ops.OpOverload)


PRODUCTS: dict[Any, Callable] = {
    F.linear: Products.linear,
    torch.matmul: Products.matmul,
    torch.Tensor.matmul: Products.matmul,
    torch.Tensor.__matmul__: Products.matmul,
    torch.Tensor.__rmatmul__: Products.rmatmul,
    torch.mm: Products.matmul,
    torch.Tensor.mm: Products.matmul,
    torch.bmm: Products.matmul,
    torch.Tensor.bmm: Products.matmul,
    torch.addmm: Products.addmm,
    torch.Tensor.addmm: Products.addmm,
    torch.baddbmm: Products.addmm,
    torch.Tensor.baddbmm: Products.addmm,
    torch.einsum: Products.einsum,
    torch._grouped_mm: Products.grouped_mm,
    F.scaled_dot_product_attention: Products.scaled_dot_product_attention,
    F.multi_head_attention_forward: Products.multi_head_attention,
}
if hasattr(F, "grouped_mm"):
    PRODUCTS[F.grouped_mm] = Products.grouped_mm
_BY_NAME = {"grouped_mm_fallback": Products.fallback}
