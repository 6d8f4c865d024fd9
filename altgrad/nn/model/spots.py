"""Where a recipe can put formats in a model: its layers, the parameters that modules multiply themselves, their attention.

A spot is a module and what of it is meant. Its name is the layer's; that of a raw parameter is the module's and its own,
without a last "weight" (`mlp.experts.down_proj`, `mlp.gate`); that of attention ends in `attention_products`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from altgrad.errors import RecipeError
from altgrad.nn.layer.classes import layer_of, parameter_of, place_name
from altgrad.nn.layer.computed import base_class, is_computed, sources
from altgrad.nn.layer.raw import ATTENTION, own_matrices
from altgrad.nn.layer.registry import RAW, LayerKind, kind_of
from altgrad.nn.layer.state import LayerState
from altgrad.nn.model.source import source_of
from altgrad.nn.recipe.cells import Place
from altgrad.nn.recipe.recipe import ATTENTION_NAME
from altgrad.nn.session import REACH, Reach

_ATTENDS = frozenset(
    ["scaled_dot_product_attention", "multi_head_attention_forward", "attention function", "matmul", "bmm", "einsum"]
)
PARAMETRIZATIONS = "parametrizations"  # where torch keeps what computes a module's tensors
_COMPUTES = "it computes a layer's weight, which is quantized once computed"
_FUSED = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Spot:
    """One of them.

    Args:
        parameter: its name in the module ("weight" of a layer), or `ATTENTION`.
        type_name: what overrides by type ask for: the module's class before it was quantized, or "attention".
    """

    name: str
    module: nn.Module
    parameter: str
    kind: LayerKind
    type_name: str

    @property
    def weight(self) -> Tensor | None:
        """The parameter itself; None for attention, which has none."""
        return None if self.parameter == ATTENTION else parameter_of(self.module, self.parameter)

    @property
    def is_computed(self) -> bool:
        """Whether the weight is computed from other parameters, so that there is none to store."""
        return self.parameter != ATTENTION and is_computed(self.module, self.parameter)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that the spot's weight is, or is computed from."""
        if self.is_computed:
            return [*sources(self.module, self.parameter)]
        return [] if self.weight is None else [self.weight]

    @property
    def state(self) -> LayerState | None:
        """The spot's state, if it is quantized now."""
        return layer_of(self.module, self.parameter)

    @property
    def reach(self) -> Reach | None:
        """What the call of `quantize_model` noted, if it could have quantized the spot."""
        return self.module.__dict__.get(REACH, {}).get(self.parameter)


def spots_of(name: str, module: nn.Module, multiplied: Collection[str | None] | None = None) -> Iterator[Spot]:
    """The spots of one module, whether they can be reached or not.

    Args:
        multiplied: names of raw parameters that a run was seen to multiply; the source tells of others.
    """
    kind = kind_of(type(module))
    base = base_class(module)
    if kind is not None:
        yield Spot(name, module, "weight", kind, base.__name__)
        return
    source = source_of(base)
    for parameter in own_matrices(module):
        known = source.multiplies(parameter) or not source.readable or parameter in module.__dict__.get(REACH, {})
        if known or (multiplied is not None and place_name(name, parameter) in multiplied):
            yield Spot(place_name(name, parameter), module, parameter, RAW, base.__name__)
    if _ATTENDS.intersection(source.calls):
        yield Spot(f"{name}.{ATTENTION_NAME}".lstrip("."), module, ATTENTION, RAW, "attention")


def all_spots(model: nn.Module) -> list[Spot]:
    """Every spot of a model, in the order of its modules."""
    return [spot for name, module in model.named_modules() for spot in spots_of(name, module)]


def out_of_reach(
    spot: Spot,
    included: Mapping[str, str] | None = None,
    excluded: Mapping[str, str] | None = None,
    traced: bool = False,
) -> str | None:
    """Why no recipe can quantize a spot; None if one can.

    Args:
        included, excluded: names to the pattern that names them. traced: whether an example was run.

    Raises:
        RecipeError: it is quantized already.
    """
    name, module, kind = spot.name, spot.module, spot.kind
    if excluded and name in excluded:
        return f"excluded by {excluded[name]!r}"
    if included and name not in included:
        return "not included"
    if PARAMETRIZATIONS in name.split("."):
        return _COMPUTES
    if spot.parameter != ATTENTION and spot.weight is None and not spot.is_computed:
        return "has no weight"
    if isinstance(spot.weight, UninitializedParameter):
        remedy = (
            "pass an example that reaches it, or exclude it"
            if traced
            else "run the model once on an input, or pass example="
        )
        raise RecipeError(f"layer {name!r} is a {type(module).__name__} whose shape is not known yet; {remedy}")
    if spot.state is not None:
        raise RecipeError(
            f"two recipes claim layer {name!r}: it is quantized as {spot.state.recipe} already; "
            "restore_model first, or leave it out by include or exclude"
        )
    if kind.kind == "embedding" and getattr(module, "max_norm", None) is not None:
        return "its max_norm rewrites the weight in the forward"
    return None


def unknown(name: str, module: nn.Module, traced: bool = False) -> str | None:
    """Why a module without spots that has parameters of its own stays as it is; None for a container.

    Args:
        traced: whether an example was run, and none of the module's parameters was seen to be multiplied.
    """
    if isinstance(module, ParametrizationList) or not any(True for _ in module.parameters(recurse=False)):
        return None
    if PARAMETRIZATIONS in name.split("."):
        return _COMPUTES
    if isinstance(module, _FUSED):
        return f"{type(module).__name__} multiplies in one fused call, which no recipe reaches into"
    if isinstance(module, nn.Bilinear):
        return "Bilinear multiplies three tensors, for which there is no recipe"
    if own_matrices(module) and traced:
        return "no product of its own parameters ran with the example"
    if own_matrices(module):
        return f"no product of its own parameters is found in the source of {type(module).__name__}; pass example= to trace it"
    return f"class {type(module).__name__} is not registered (register_layer)"


def places(model: nn.Module) -> list[Place]:
    """The layers in the reach of the model's `quantize_model` call; of a model without one, all that it would reach."""
    spots = all_spots(model)
    known = [(spot, spot.reach) for spot in spots if spot.reach is not None]
    if known:
        return [Place(reach.name, s.type_name, s.kind.kind, reach.positions) for s, reach in known]
    return [Place(s.name, s.type_name, s.kind.kind, None) for s in spots if out_of_reach(s) is None]
