"""The quantized classes: a swapped module keeps its identity and gets a subclass of its own class.

Swapping `module.__class__` leaves parameters, buffers, hooks, names and state_dict keys untouched, keeps
`isinstance(module, nn.Linear)` true, and is undone by swapping back.
"""

from __future__ import annotations

from functools import cache
from weakref import WeakSet

from torch import Tensor, nn

from altgrad.errors import RecipeError
from altgrad.nn.layer.contractions import CONV_REDUCED, LINEAR_REDUCED
from altgrad.nn.layer.conv import conv_forward
from altgrad.nn.layer.linear import linear_forward
from altgrad.nn.layer.registry import LayerKind, kind_of
from altgrad.nn.layer.state import LayerState
from altgrad.nn.layer.weight_only import embedding_forward, with_quantized_weight
from altgrad.nn.recipe.spec import LayerRecipe
from altgrad.nn.session import STATE, Session

LIVE: WeakSet[nn.Module] = WeakSet()  # quantized modules of this process, for optimizers that nobody attached


class Quantized:
    """Mixin of every quantized class: printing, copying, and access to the layer's state."""

    _base: type[nn.Module]

    @property
    def quantization(self) -> LayerState:
        """The layer's recipe and operands."""
        return self.__dict__[STATE]

    def extra_repr(self) -> str:
        own = self._base.extra_repr(self)  # type: ignore[arg-type]
        return f"{own}, " * bool(own) + shown_recipe(self)

    def __reduce_ex__(self, protocol):
        return _empty, (self._base,), self.__dict__

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.quantization.storage_of(self._parameters.get("weight"))  # type: ignore[attr-defined]
        LIVE.add(self)


def shown_recipe(module) -> str:
    """The recipe in the short form that `print(model)` shows."""
    recipe = module.quantization.recipe
    if isinstance(module, QuantizedNorm):
        return f"w:{recipe.norm_weight}"
    if isinstance(module, QuantizedEmbedding):
        return f"w:{recipe.forward.weight}" + (f" {recipe.storage}" if recipe.storage else "")
    return str(recipe)


class QuantizedLinear(Quantized):
    """A linear layer whose three GEMMs run on quantized operands."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_forward(self.__dict__[STATE], input, self.weight, self.bias, self.training)  # type: ignore[attr-defined]


class QuantizedConv(Quantized):
    """A convolution whose three products run on quantized operands."""

    def forward(self, input: Tensor) -> Tensor:
        return conv_forward(self.__dict__[STATE], self, input)  # type: ignore[arg-type]


class QuantizedEmbedding(Quantized):
    """An embedding whose weight is quantized at use."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding_forward(self.__dict__[STATE], self, input)  # type: ignore[arg-type]


class QuantizedNorm(Quantized):
    """A normalisation whose weight is quantized at use."""

    def forward(self, *args, **kwargs):
        return with_quantized_weight(self.__dict__[STATE], self, super().forward, *args, **kwargs)  # type: ignore[misc,arg-type]


_REDUCED = {"conv": CONV_REDUCED, "embedding": {**LINEAR_REDUCED, ("forward", "weight"): -1}}
_MIXINS = {"linear": QuantizedLinear, "conv": QuantizedConv, "embedding": QuantizedEmbedding, "norm": QuantizedNorm}


@cache
def quantized_class(base: type[nn.Module]) -> type[nn.Module]:
    """The quantized subclass of a supported class."""
    kind = kind_of(base)
    if kind is None:
        raise RecipeError(f"{base.__name__} is not registered in this process; call register_layer for it first")
    return type(f"Quantized{base.__name__}", (_MIXINS[kind.kind], base), {"_base": base, "__module__": __name__})


def _empty(base: type[nn.Module]) -> nn.Module:
    """An uninitialised quantized module, for copy and pickle to fill."""
    cls = quantized_class(base)
    return nn.Module.__new__(cls)


def is_quantized(module: nn.Module) -> bool:
    """Whether `quantize_model` swapped this module."""
    return STATE in module.__dict__


def swap(module: nn.Module, recipe: LayerRecipe, session: Session, name: str, kind: LayerKind) -> LayerState:
    """Make a module its quantized self."""
    reduced = _REDUCED.get(kind.kind, LINEAR_REDUCED)
    state = LayerState(recipe, session, name, transposed=kind.transposed, reduced=reduced)
    module.__class__ = quantized_class(type(module))
    module.__dict__[STATE] = state
    LIVE.add(module)
    return state


def swap_back(module: nn.Module) -> None:
    """Undo `swap`."""
    module.__class__ = module._base  # type: ignore[assignment]
    del module.__dict__[STATE]
    LIVE.discard(module)
