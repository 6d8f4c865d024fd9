"""Swap a model's layers for quantized ones, in place and by name, and swap them back.

Everything is checked before anything is changed: a model is converted wholly or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from weakref import ref

from torch import nn

from altgrad.errors import RecipeError
from altgrad.nn.layer.classes import is_quantized, shown_recipe, swap, swap_back
from altgrad.nn.layer.registry import LayerKind, kind_of, overrides_forward
from altgrad.nn.layer.state import LayerState
from altgrad.nn.model.manifest import Manifest, Swapped, Traced, read_source, trace
from altgrad.nn.model.optimizer_hook import watch_optimizers
from altgrad.nn.model.recipe_checks import check_layer, check_ties
from altgrad.nn.recipe.recipe import Recipe, name_matches
from altgrad.nn.recipe.spec import LayerRecipe
from altgrad.nn.session import REACH, STATE, Reach, Session
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
        RecipeError: a pattern matches nothing (with the closest names), no layer is left, a layer is claimed twice, a
            format is too wide for the parameters' dtype, block sizes do not divide, or tied layers disagree on storage.
    """
    recipe = _as_recipe(recipe)
    modules = dict(model.named_modules())
    included, excluded = _matched(include, modules, "include"), _matched(exclude, modules, "exclude")
    if recipe.needs_positions and example is None:
        raise RecipeError("an override by position needs to see the model run; pass example=(inputs of the model,)")
    seen = Traced(read_source(model), {}, set(modules)) if example is None else trace(model, example)
    positions = seen.positions

    plan: dict[str, tuple[nn.Module, LayerRecipe, LayerKind]] = {}
    skipped: dict[str, str] = {}
    reach: list[tuple[str, nn.Module]] = []
    opaque = _opaque_owners(modules)
    for name, module in modules.items():
        kind = kind_of(type(module))
        class_name = getattr(module, "_base", type(module)).__name__
        chosen = recipe.for_layer(name, class_name, positions.get(name, frozenset())) if kind else None
        reason = _out_of_reach(name, module, kind, included, excluded, opaque)
        if reason is None:
            reach.append((name, module))
            reason = left_unquantized(kind, chosen)  # type: ignore[arg-type]
        if reason is None:
            assert chosen is not None
            assert kind is not None
            check_layer(name, module, kind, chosen)
            plan[name] = (module, chosen, kind)
        elif reason:
            skipped[name] = reason
    if not plan:
        raise RecipeError(_nothing_left(model, skipped))
    check_ties(model, {name: one for name, (_, one, _) in plan.items()})

    session = Session(seed)
    session.recipe, session.model = recipe, ref(model)
    for name, module in reach:
        module.__dict__[REACH] = Reach(session, name, None if example is None else positions.get(name, frozenset()))
    swapped = {}
    for name, (module, chosen, kind) in plan.items():
        base = type(module).__name__
        swap(module, chosen, session, name, kind)
        swapped[name] = Swapped(base, chosen, shown_recipe(module))
    close_fast_paths(model)
    store_on_grid(model, keep_original=True)
    if any(one.needs_steps for _, one, _ in plan.values()):
        watch_optimizers()
    uncalled = tuple(name for name in swapped if name not in seen.called)
    return Manifest(swapped, skipped, seen.unseen, uncalled, traced=example is not None)


def restore_model(model: nn.Module) -> nn.Module:
    """Undo `quantize_model`: every layer is again what it was, with its present parameters.

    Before the first optimizer step, weights that grid storage rounded get their original bits back; weights that were
    trained or written since are kept as they are. A model without quantized layers is returned as it is.
    """
    for module in model.modules():
        if _FAST_PATH in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop(_FAST_PATH)
        module.__dict__.pop(REACH, None)
        if not is_quantized(module):
            continue
        leave_grid(module)
        swap_back(module)
    return model


def leave_grid(module: nn.Module) -> None:
    """Make a quantized layer's stored weight a plain one, with its present values (before the first step: the original
    ones)."""
    weight = module._parameters.get("weight")
    storage = module.__dict__[STATE].storage_of(weight)
    if storage is not None:
        storage.release(weight)


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
        if not is_quantized(module):
            continue
        state, weight = module.__dict__[STATE], module._parameters.get("weight")
        if chosen is not None and id(state) not in chosen:
            continue
        if state.recipe.storage is None or weight is None or not _stores(module):
            continue
        if id(weight) not in stores:
            axis = 1 if state.transposed else 0
            path = f"{state.name}.weight" if state.name else "weight"
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
    return kind is not None and kind.kind != "norm"


def _as_recipe(recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe(recipe) if isinstance(recipe, LayerRecipe) else Recipe.from_dict(recipe)


def _matched(patterns: Sequence[str] | None, modules: dict[str, nn.Module], what: str) -> dict[str, str]:
    """Module name to the pattern that names it or a container of it."""
    found: dict[str, str] = {}
    patterns = [patterns] if isinstance(patterns, str) else patterns or []
    for pattern in patterns:
        hits = [name for name in modules if name_matches(pattern, name)]
        if not hits:
            close = get_close_matches(pattern, list(modules), n=3, cutoff=0.4)
            raise RecipeError(
                f"{what} pattern {pattern!r} matches no module; closest names: {', '.join(close) or 'none'}"
            )
        for name in modules:
            if any(name == hit or hit == "" or name.startswith(f"{hit}.") for hit in hits):
                found.setdefault(name, pattern)
    return found


def _opaque_owners(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Submodules whose owner reads their weights without calling them, with the reason."""
    opaque = {}
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            for child, _ in module.named_modules(prefix=name):
                opaque[child] = "nn.MultiheadAttention multiplies its weights by a function call"
    return opaque


def out_of_reach(model: nn.Module) -> list[tuple[str, nn.Module, str | None]]:
    """(name, module, why no recipe can quantize it; None if one can) of every module."""
    modules = dict(model.named_modules())
    opaque = _opaque_owners(modules)
    return [
        (name, module, _out_of_reach(name, module, kind_of(type(module)), {}, {}, opaque))
        for name, module in modules.items()
    ]


def _out_of_reach(name, module, kind, included, excluded, opaque) -> str | None:
    """Why no recipe can quantize a module; None if one can; "" for a container, which is not worth a line."""
    if kind is None:
        ancestor = overrides_forward(type(module))
        if ancestor is not None:
            return f"{type(module).__name__} has a forward of its own (not {ancestor.__name__}'s); see register_layer"
        owns = any(True for _ in module.parameters(recurse=False))
        return f"class {type(module).__name__} is not registered (register_layer)" if owns else ""
    if name in opaque:
        return opaque[name]
    if name in excluded:
        return f"excluded by {excluded[name]!r}"
    if included and name not in included:
        return "not included"
    if "weight" not in module._parameters:
        return (
            "its weight is computed from other parameters (a parametrization, weight_norm, pruning); remove that first"
        )
    if is_quantized(module):
        raise RecipeError(
            f"two recipes claim layer {name!r}: it is quantized as {module.__dict__[STATE].recipe} already; "
            "restore_model first, or leave it out by include or exclude"
        )
    if kind.kind == "norm" and getattr(module, "weight", None) is None:
        return "has no weight"
    if kind.kind == "embedding" and getattr(module, "max_norm", None) is not None:
        return "its max_norm rewrites the weight in the forward"
    return None


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


def _nothing_left(model: nn.Module, skipped: dict[str, str]) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
    return f"no layer of {type(model).__name__} is left to quantize ({shown or 'it has no layers'}); widen the recipe"
