"""The quantized classes: a swapped module keeps its identity and gets a subclass of its own class.

Swapping `module.__class__` leaves parameters, buffers, hooks, names and state_dict keys untouched, keeps
`isinstance(module, nn.Linear)` true, and is undone by swapping back.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import cache
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from altgrad.errors import RecipeError
from altgrad.nn.layer.attention import attention_states
from altgrad.nn.layer.computed import over, replicate
from altgrad.nn.layer.contractions import CONV_REDUCED, LINEAR_REDUCED
from altgrad.nn.layer.conv import conv_forward, conv_transpose_forward
from altgrad.nn.layer.linear import linear_forward
from altgrad.nn.layer.raw import ATTENTION, RawState, called_children, enter_child, leave_child, run_raw
from altgrad.nn.layer.registry import RAW, LayerKind, kind_of
from altgrad.nn.layer.state import LayerState
from altgrad.nn.layer.weight_only import embedding_forward, with_quantized_weight
from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.nn.session import STATE, Session

LIVE: WeakSet[nn.Module] = WeakSet()  # quantized modules of this process, for optimizers that nobody attached


class Quantized:
    """Mixin of every quantized class: printing, copying, and access to the layer's state."""

    _base: type[nn.Module]

    @property
    def quantization(self) -> LayerState | RawState:
        """The layer's recipe and operands."""
        return self.__dict__[STATE]

    def __prepare_scriptable__(self):
        raise RecipeError(
            f"torch.jit.script cannot compile quantized layers ({type(self).__name__}); use torch.export.export or "
            "torch.compile, or restore_model(model) before"
        )

    def extra_repr(self) -> str:
        own = self._base.extra_repr(self)  # type: ignore[arg-type]
        routes = shown_routes(self)
        return f"{own}, " * bool(own) + shown_recipe(self) + f" [{routes}]" * bool(routes)

    def __reduce_ex__(self, protocol):
        if is_parametrized(self):  # type: ignore[arg-type]
            return super().__reduce_ex__(protocol)  # torch says that such modules cannot be pickled
        return _empty, (self._base, isinstance(self, QuantizedRaw)), self.__dict__

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        for name, state in layers_in(self).items():  # type: ignore[arg-type]
            state.storage_of(parameter_of(self, name))  # type: ignore[arg-type]
        LIVE.add(self)


def shown_recipe(module, parameter: str | None = None) -> str:
    """The recipe (of one place of the module, or of all) in the short form that `print(model)` shows."""
    if isinstance(module, QuantizedRaw):
        states = {name: layer_of(module, name) for name in (*layers_in(module), ATTENTION)}
        shown = {name: str(state.recipe) for name, state in states.items() if state is not None}
        return shown[parameter] if parameter in shown else "; ".join(f"{name}: {text}" for name, text in shown.items())
    recipe = module.quantization.recipe
    if isinstance(module, QuantizedNorm):
        return f"w:{recipe.norm_weight}"
    if isinstance(module, QuantizedEmbedding):
        return f"w:{recipe.forward.weight}" + (f" {recipe.storage}" if recipe.storage else "")
    return str(recipe)


def shown_routes(module, parameter: str | None = None) -> str:
    """Which unit multiplies the products of a layer (or of one place of a module) where they are large; "": it has none."""
    if isinstance(module, QuantizedRaw):
        names = [parameter] if parameter is not None else [*layers_in(module), ATTENTION]
        states = [layer_of(module, name) for name in names]
        return "; ".join(dict.fromkeys(state.routes(_device(module)) for state in states if state is not None))
    if isinstance(module, QuantizedConv | QuantizedConvTranspose):
        return "float32"  # torch's own loops
    state = module.__dict__[STATE] if isinstance(module, QuantizedLinear) else None
    return state.routes(_device(module)) if isinstance(state, LayerState) else ""


def _device(module: nn.Module) -> str:
    return next((p.device.type for p in module.parameters()), "cpu")


class QuantizedLinear(Quantized):
    """A linear layer whose three GEMMs run on quantized operands."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_forward(self.__dict__[STATE], input, self.weight, self.bias, self.training)  # type: ignore[attr-defined]


class QuantizedConv(Quantized):
    """A convolution whose three products run on quantized operands."""

    def forward(self, input: Tensor) -> Tensor:
        return conv_forward(self.__dict__[STATE], self, input)  # type: ignore[arg-type]


class QuantizedConvTranspose(Quantized):
    """A transposed convolution whose three products run on quantized operands."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return conv_transpose_forward(self.__dict__[STATE], self, input, output_size)


class QuantizedEmbedding(Quantized):
    """An embedding whose weight is quantized at use."""

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        state = self.__dict__[STATE]
        if isinstance(self, nn.EmbeddingBag):
            return with_quantized_weight(state, state.w, self, super().forward, input, *args, **kwargs)  # type: ignore[misc,arg-type]
        return embedding_forward(state, self, input)  # type: ignore[arg-type]


class QuantizedNorm(Quantized):
    """A normalisation whose weight is quantized at use."""

    def forward(self, *args, **kwargs):
        state = self.__dict__[STATE]
        return with_quantized_weight(state, state.norm, self, super().forward, *args, **kwargs)  # type: ignore[misc,arg-type]


class QuantizedRaw(Quantized):
    """A module whose own parameters multiply by function calls; its forward is made by `quantized_class`."""


def _raw_forward(base: type[nn.Module]):
    reason = "a function mode quantizes the products of this module's own parameters"
    remedy = "use fullgraph=False, or register_layer for its class"
    run = torch.compiler.disable(run_raw, reason=f"{reason}; {remedy}")  # here, since it imports the compiler

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        return run(self.__dict__[STATE], self, functools.partial(base.forward, self), args, kwargs)

    return forward


_REDUCED = {
    "conv": CONV_REDUCED,
    "conv_transpose": CONV_REDUCED,
    "embedding": {**LINEAR_REDUCED, ("forward", "weight"): -1},
}
_MIXINS = {
    "linear": QuantizedLinear,
    "conv": QuantizedConv,
    "conv_transpose": QuantizedConvTranspose,
    "embedding": QuantizedEmbedding,
    "norm": QuantizedNorm,
}


@cache
def quantized_class(base: type[nn.Module], raw: bool = False) -> type[nn.Module]:
    """The quantized subclass of a supported class, or (raw) of any whose own parameters multiply."""
    kind, about = kind_of(base), {"_base": base, "__module__": base.__module__}  # torch.fx judges leaves by it
    if not hasattr(base, "__deepcopy__"):
        about["__deepcopy__"] = replicate
    if raw:
        return type(f"Quantized{base.__name__}", (QuantizedRaw, base), {**about, "forward": _raw_forward(base)})
    if kind is None:
        raise RecipeError(f"{base.__name__} is not registered in this process; call register_layer for it first")
    return type(f"Quantized{base.__name__}", (_MIXINS[kind.kind], base), about)


def _empty(base: type[nn.Module], raw: bool = False) -> nn.Module:
    """An uninitialised quantized module, for copy and pickle to fill."""
    cls = quantized_class(base, raw)
    return nn.Module.__new__(cls)


def is_quantized(module: nn.Module) -> bool:
    """Whether `quantize_model` swapped this module."""
    return STATE in module.__dict__


def layers_in(module: nn.Module) -> Mapping[str, LayerState]:
    """The states of a module's stored parameters that multiply, by the parameter's name in it; empty if it is unquantized."""
    state = module.__dict__.get(STATE)
    if state is None:
        return {}
    return state.states if isinstance(state, RawState) else {"weight": state}


def attention_in(module: nn.Module) -> tuple[LayerState, ...]:
    """The states of a module's attention products; empty where they are unquantized."""
    state = module.__dict__.get(STATE)
    return tuple(state.attention or ()) if isinstance(state, RawState) else ()


def layer_of(module: nn.Module, parameter: str) -> LayerState | None:
    """The state of one place of a module: of a parameter, or of its attention (scores)."""
    state = module.__dict__.get(STATE)
    if parameter == ATTENTION:
        return state.attention.scores if isinstance(state, RawState) and state.attention else None
    return layers_in(module).get(parameter)


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by its name in a module; None where there is none."""
    *path, last = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    return module._parameters.get(last)


def place_name(module: str, parameter: str) -> str:
    """What a raw parameter is called as a layer."""
    parts = [part for part in (module, *parameter.split(".")) if part]
    return ".".join(parts[:-1] if parts[-1] == "weight" else parts)


def module_name(module: nn.Module) -> str:
    """A quantized module's own name in its model."""
    state = module.__dict__[STATE]
    if not isinstance(state, RawState):
        return state.name
    for parameter, one in state.states.items():
        return one.name.removesuffix(place_name("", parameter)).rstrip(".")
    return "" if state.attention is None else state.attention.scores.name.rpartition(".")[0].rpartition(".")[0]


def swap(module: nn.Module, parameter: str, recipe: LayerRecipe, session: Session, name: str, kind: LayerKind) -> None:
    """Quantize one place of a module: make the module its quantized self, if it is not.

    Args:
        parameter: of the module, or `ATTENTION`. name: of the place.
    """
    if kind is RAW:
        if not is_quantized(module):
            _become(module, RawState(session))
        raw = module.__dict__[STATE]
        if parameter == ATTENTION:
            raw.attention = attention_states(recipe, session, name)
            for child in called_children(module):
                child.register_forward_pre_hook(enter_child)
                child.register_forward_hook(leave_child, always_call=True)
        else:
            weight = parameter_of(module, parameter)
            is_expert = weight is not None and weight.ndim > 2
            raw.states[parameter] = LayerState(recipe, session, name, everywhere=not is_expert)
        return
    reduced = _REDUCED.get(kind.kind, LINEAR_REDUCED)
    state = LayerState(recipe, session, name, transposed=kind.transposed, reduced=reduced)
    _become(module, state)


def _become(module: nn.Module, state: LayerState | RawState) -> None:
    base = type_before_parametrizations(module)
    module.__class__ = over(module, quantized_class(base, isinstance(state, RawState)))
    module.__dict__[STATE] = state
    LIVE.add(module)


def swap_back(module: nn.Module, parameter: str | None = None) -> None:
    """Undo `swap` of one place, or of all."""
    state = module.__dict__[STATE]
    if isinstance(state, RawState):
        if parameter in (None, ATTENTION) and state.attention is not None:
            state.attention = None
            for child in called_children(module):
                for hooks, own in ((child._forward_pre_hooks, enter_child), (child._forward_hooks, leave_child)):
                    for key in [key for key, hook in hooks.items() if hook is own]:
                        del hooks[key]
        state.states = {} if parameter is None else {k: v for k, v in state.states.items() if k != parameter}
        if state.states or state.attention is not None:
            return
    module.__class__ = over(module, module._base)  # type: ignore[arg-type]
    del module.__dict__[STATE]
    LIVE.discard(module)
