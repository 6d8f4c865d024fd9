"""Swap a model's layers for quantized ones, in place and by name, and swap them back.

Everything is checked before anything is changed: a model is converted wholly or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from weakref import ref

from torch import nn
from torch.nn.parameter import UninitializedParameter

from altgrad.errors import RecipeError
from altgrad.nn.layer.classes import is_quantized, layers_in, parameter_of, shown_recipe, shown_routes, swap, swap_back
from altgrad.nn.layer.raw import ATTENTION
from altgrad.nn.layer.registry import RAW, LayerKind, kind_of
from altgrad.nn.layer.state import LayerState
from altgrad.nn.model.manifest import Manifest, Share, Swapped
from altgrad.nn.model.optimizer_hook import watch_optimizers
from altgrad.nn.model.probe import Traced, read_source, trace, unseen
from altgrad.nn.model.recipe_checks import check_layer, check_ties
from altgrad.nn.model.spots import Spot, all_spots, out_of_reach, spots_of, unknown
from altgrad.nn.recipe.cells import Cell, changed_layer
from altgrad.nn.recipe.layer_recipe import LayerRecipe
from altgrad.nn.recipe.recipe import Recipe, name_matches
from altgrad.nn.session import REACH, Reach, Session, check_module
from altgrad.nn.spread import TENSOR_PARALLEL, stays_spread
from altgrad.nn.storage import GridStorage

_FAST_PATH = "_altgrad_fast_path"  # what an encoder layer's `activation_relu_or_gelu` was


def quantize_model(
    model: nn.Module,
    recipe: Recipe | LayerRecipe | str,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    example=None,
    seed: int = 0,
) -> Manifest:
    """Put the recipe's formats on the model's layers, in place.

    Parameters keep their identity, names and ties, and state_dict keys stay. Under grid storage the weights are rounded
    to their grid at once (on the meta device: when they have values). The training loop needs no change: an optimizer that
    steps the model's weights is attached by itself where the recipe needs it (`attach_optimizer` hands out the counts of
    each step).

    Args:
        model: any module tree.
        recipe: a recipe, one layer's recipe for all layers, or a format name (`uniform` of it).
        include, exclude: patterns of qualified module names (shell wildcards, or "re:" and a regular expression); a
            pattern that names a container means everything in it. `include=None` means all.
        example: input to run the model with once (see `manifest.trace`): needed by overrides by position, and makes the
            manifest's list of unseen products exact.
        seed: of stochastic rounding.

    Raises:
        RecipeError: the model is no module; a pattern, or an override's name that is no pattern, matches nothing (with the
            closest names); no layer is left, one is claimed twice, a format is too wide for the parameters' dtype, block sizes
            do not divide, or tied layers disagree on storage.
    """
    check_module(model)
    recipe = _as_recipe(recipe)
    modules = dict(model.named_modules())
    if recipe.needs_positions and example is None:
        raise RecipeError("an override by position needs to see the model run; pass example=(inputs of the model,)")
    seen = None if example is None else trace(model, example)
    multiplied = None if seen is None else {product.spot for product in seen.products}
    spots = {
        name: list(spots_of(name, module, multiplied))
        for name, module in modules.items()
        if not _is_opaque(name, modules)
    }
    names = dict.fromkeys([*modules, *(spot.name for own in spots.values() for spot in own)])
    included, excluded = _matched(include, names, "include pattern"), _matched(exclude, names, "exclude pattern")
    idle = [o for o in recipe.overrides if o.name and not any(name_matches(o.name, n) for n in names)]
    _matched([o.name for o in idle if o.name and o.names_one], names, "the override's name")

    plan: list[tuple[Spot, LayerRecipe]] = []
    skipped: dict[str, str] = {}
    reach: list[tuple[Spot, frozenset[str]]] = []
    for name, own in spots.items():
        positions = seen.positions.get(name, frozenset()) if seen is not None else frozenset()
        reason = unknown(name, modules[name], traced=seen is not None)
        if not any(spot.parameter != ATTENTION for spot in own) and reason is not None:
            skipped[name] = reason
        for spot in own:
            chosen = recipe.for_layer(spot.name, spot.type_name, positions)
            reason = out_of_reach(spot, included, excluded, traced=seen is not None)
            if reason is None:
                reach.append((spot, positions))
                reason = left_unquantized(spot.kind, chosen)
            if reason is None and spot.kind is RAW and multiplied is not None and spot.name not in multiplied:
                reason = "no product of it ran with the example"
            if reason is None:
                assert chosen is not None
                chosen = fitting(spot, chosen)
                check_layer(spot, chosen)
                if stays_spread(model, name, spot.weight):
                    raise RecipeError(f"layer {spot.name!r}: {TENSOR_PARALLEL}")
                plan.append((spot, chosen))
            elif spot.parameter != ATTENTION or chosen is not None:
                skipped[spot.name] = reason
    if not plan:
        raise RecipeError(_nothing_left(model, skipped))
    check_ties(model, {spot.name: one for spot, one in plan})

    session = Session(seed)
    session.recipe, session.model = recipe, ref(model)
    for spot, positions in reach:
        known = None if example is None else positions
        spot.module.__dict__.setdefault(REACH, {})[spot.parameter] = Reach(session, spot.name, known)
    swapped = {}
    for spot, chosen in plan:
        swap(spot.module, spot.parameter, chosen, session, spot.name, spot.kind)
        swapped[spot.name] = Swapped(spot.type_name, chosen, shown_recipe(spot.module, spot.parameter))
    close_fast_paths(model)
    store_on_grid(model, keep_original=True)
    if any(one.needs_steps for _, one in plan):
        watch_optimizers()
    return replace(_manifest(model, swapped, skipped, seen), idle=tuple(o.condition for o in idle))


def _manifest(model: nn.Module, swapped: dict[str, Swapped], skipped: dict[str, str], seen: Traced | None) -> Manifest:
    sized = [p for p in model.parameters() if not isinstance(p, UninitializedParameter)]  # excluded lazy layers
    parameters = {id(p): p.numel() for p in sized}
    covered = {id(p): p.numel() for s in all_spots(model) if s.name in swapped for p in s.trained}
    share = Share(sum(covered.values()), sum(parameters.values()))
    routes = {s.name: shown_routes(s.module, s.parameter) for s in all_spots(model) if s.name in swapped}
    routes = {name: route for name, route in routes.items() if route}
    if seen is None:
        return Manifest(swapped, skipped, read_source(model, set(swapped)), parameters=share, routes=routes)
    ran = {product.spot for product in seen.products} | seen.called
    unknown_size = any(macs is None for macs in seen.products.values())
    macs = [(product, count or 0) for product, count in seen.products.items()]
    return Manifest(
        swapped,
        skipped,
        unseen(seen, set(swapped)),
        tuple(name for name in swapped if name not in ran),
        traced=True,
        mode=seen.mode,
        parameters=share,
        multiply_adds=Share(sum(n for p, n in macs if p.spot in swapped), sum(n for _, n in macs)),
        uncounted=unknown_size,
        routes=routes,
    )


def restore_model(model: nn.Module) -> nn.Module:
    """Undo `quantize_model`: every layer is again what it was, with its present parameters.

    Before the first optimizer step, weights that grid storage rounded get their original bits back; weights that were
    trained or written since are kept as they are. A model without quantized layers is returned as it is.

    Raises:
        RecipeError: the model is no module.
    """
    check_module(model)
    for module in model.modules():
        if _FAST_PATH in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop(_FAST_PATH)
        module.__dict__.pop(REACH, None)
        if not is_quantized(module):
            continue
        leave_grid(module)
        swap_back(module)
    return model


def leave_grid(module: nn.Module, parameter: str | None = None) -> None:
    """Make a quantized layer's stored weight (of one parameter, or of all) a plain one, with its present values (before the
    first step: the original ones)."""
    for name, state in layers_in(module).items():
        weight = parameter_of(module, name)
        storage = state.storage_of(weight) if parameter in (None, name) else None
        if storage is not None:
            storage.release(weight)  # type: ignore[arg-type]


def store_on_grid(
    model: nn.Module, *, only: Sequence[LayerState] | None = None, snap: bool = True, keep_original: bool = False
) -> int:
    """Give the weights whose recipes say so a grid, and round them to it; returns the number of parameters.

    Args:
        only: the layers to do; None means all quantized layers.
        snap: False leaves values as they are, for weights that are about to be loaded.
        keep_original: keep the present values for `restore_model` until the first step.

    Tied layers share one storage.
    """
    stores: dict[int, GridStorage] = {}
    chosen = None if only is None else {id(state) for state in only}
    for module in model.modules():
        for name, state in layers_in(module).items():
            weight = parameter_of(module, name)
            if chosen is not None and id(state) not in chosen:
                continue
            if state.recipe.storage is None or weight is None or not _stores(module):
                continue
            if id(weight) not in stores:
                axis = 1 if state.transposed else 0
                path = f"{state.name}.weight" if name.endswith("weight") and state.name else state.name or "weight"
                stores[id(weight)] = GridStorage(state.recipe.storage, state.session, path, axis)
                stores[id(weight)].set_grid(weight, snap=snap, keep_original=keep_original)
            state.set_storage(stores[id(weight)])
    return len(stores)


def close_fast_paths(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoderLayer` from reading its layers' weights in evaluation: it then calls the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(is_quantized(m) for m in module.modules()):
            module.__dict__.setdefault(_FAST_PATH, module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0


def _stores(module: nn.Module) -> bool:
    kind = kind_of(module._base)  # type: ignore[arg-type]
    return kind is None or kind.kind != "norm"


def _as_recipe(recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe(recipe) if isinstance(recipe, LayerRecipe) else Recipe.from_dict(recipe)


def _matched(patterns: Sequence[str] | None, modules: Mapping[str, object], what: str) -> dict[str, str]:
    """Module name to the pattern that names it or a container of it."""
    found: dict[str, str] = {}
    patterns = [patterns] if isinstance(patterns, str) else patterns or []
    for pattern in patterns:
        hits = [name for name in modules if name_matches(pattern, name)]
        if not hits:
            close = get_close_matches(pattern, list(modules), n=3, cutoff=0.4)
            raise RecipeError(f"{what} {pattern!r} matches no module; closest names: {', '.join(close) or 'none'}")
        for name in modules:
            if any(name == hit or hit == "" or name.startswith(f"{hit}.") for hit in hits):
                found.setdefault(name, pattern)
    return found


def _is_opaque(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module's owner reads its weights without calling it: the output projection of nn.MultiheadAttention."""
    owner = name.rpartition(".")[0]
    return name != "" and isinstance(modules.get(owner), nn.MultiheadAttention)


def left_unquantized(kind: LayerKind, chosen: LayerRecipe | None) -> str | None:
    """Why a layer with that recipe stays unquantized; None if it does not."""
    if chosen is None:
        return "left unquantized by the recipe"
    if kind.kind == "norm":
        return "norm weights stay unquantized in this recipe" if chosen.norm_weight.format is None else None
    if kind.kind == "embedding":
        weight = chosen.forward.weight
        if (weight is None or weight.format is None) and chosen.storage is None:
            return "its weight stays unquantized in this recipe"
        return None
    return None if chosen.quantizes_products else "left unquantized by the recipe"


def fitting(spot: Spot, recipe: LayerRecipe) -> LayerRecipe:
    """The layer's recipe as the spot takes it: attention stores nothing.

    Raises:
        RecipeError: attention with a scale for each channel or token.
    """
    if spot.parameter != ATTENTION:
        return recipe
    recipe = changed_layer(recipe, {Cell(spot.name, "storage", "storage"): None}) or recipe
    if any(getattr(spec.scaling, "axis", None) is not None for _, _, spec in recipe.entries()):
        raise RecipeError(
            f"{spot.name!r}: attention takes one scale per tensor or a block format; drop the scaling's axis"
        )
    return recipe


def _nothing_left(model: nn.Module, skipped: dict[str, str]) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
    return f"no layer of {type(model).__name__} is left to quantize ({shown or 'it has no layers'}); widen the recipe"
