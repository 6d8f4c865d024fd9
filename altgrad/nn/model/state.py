"""The state of a model's quantization between steps, as plain data: what a run needs besides its parameters to go on.

Tensors in it are never written in place, so a snapshot costs a few dictionaries: it also serves as the rollback point
of a step that turns out not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from altgrad.errors import RecipeError
from altgrad.nn.layer.classes import attention_in, layers_in, parameter_of
from altgrad.nn.model.change import change_format
from altgrad.nn.recipe.recipe import Recipe
from altgrad.nn.session import sessions_of


def quant_state(model: nn.Module) -> dict:
    """Recipe, clock, scale histories and storage scales of a quantized model.

    Returns:
        {"recipes": [...], "clocks": [{"seed", "step", "micro_batch"}], "operands": {layer: {"role.gemm": {"window":
        tensor, "pending": tensor, "average": tensor, "averaged": tensor}}}, "storage": {parameter: {"scale": tensor,
        "steps": int}}}: tensors, and values that JSON holds. The grid codes are not in it, as they follow from the
        parameters and the scale.

    Raises:
        RecipeError: the model has no quantized layer.
    """
    sessions = sessions_of(model)
    state: dict = {
        "recipes": [s.recipe.to_dict() for s in sessions if s.recipe is not None],
        "clocks": [{"seed": s.seed, "step": s.step, "micro_batch": s.micro_batch} for s in sessions],
        "operands": {},
        "storage": {},
    }
    for name, layer, weight in _layers(model):
        for operand in layer.distinct():
            memory = operand.memory()
            if memory:
                state["operands"].setdefault(name, {})[f"{operand.role}.{operand.gemm}"] = memory
        storage = layer.storage_of(weight)
        if storage is not None:
            state["storage"][storage.name] = {"scale": storage.kept_scale(weight), "steps": storage.steps}
    return state


def load_quant_state(model: nn.Module, state: dict) -> None:
    """Set what `quant_state` returned; load the parameters first (or after: they are not touched).

    A recipe that has changed since (by `change_format`) is put on the model again, without rounding its weights anew.

    Stored weights keep the state's scales if their values, now or once they are loaded, lie on those grids.

    Raises:
        RecipeError: the state belongs to a model with other layers.
    """
    sessions = sessions_of(model)
    if len(state["clocks"]) != len(sessions):
        raise RecipeError(
            f"the state has {len(state['clocks'])} quantize_model calls, the model {len(sessions)}; quantize it alike"
        )
    if [s.recipe.to_dict() for s in sessions if s.recipe is not None] != state["recipes"]:
        if len(sessions) != 1:
            raise RecipeError("the state's recipes differ from the model's; quantize the model with the same recipes")
        change_format(model, Recipe.from_dict(state["recipes"][0]), regrid=False)
    layers = list(_layers(model))
    foreign = sorted(set(state["operands"]) - {name for name, _, _ in layers})
    if foreign:
        raise RecipeError(
            f"the state has scale histories for {foreign[0]!r}, which is no quantized layer of this model"
        )
    for name, layer, weight in layers:
        memories = state["operands"].get(name, {})
        for operand in layer.distinct():
            operand.recall(memories.get(f"{operand.role}.{operand.gemm}", {}))
        storage = layer.storage_of(weight)
        if storage is not None:
            kept = state["storage"].get(storage.name)
            if kept is None:
                raise RecipeError(f"the state has no storage scale for {storage.name!r}; it was not on a grid then")
            storage.state_grid(weight, _tensor(kept["scale"]), int(kept["steps"]))
    for session, clock in zip(sessions, state["clocks"], strict=True):
        session.seed = int(clock["seed"])
        session.set_clock(int(clock["step"]), int(clock["micro_batch"]))


def _layers(model: nn.Module):
    """(name, state, stored weight) of each quantized layer; attention has two states and no weight."""
    for module in model.modules():
        for name, state in layers_in(module).items():
            yield state.name, state, parameter_of(module, name)
        for state in attention_in(module):
            yield state.name, state, None


def _tensor(value) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
