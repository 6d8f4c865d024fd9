"""The number formats of one training run: its recipe, bound to a model and its optimizer.

A run in FP32 has none of this: every method then does nothing, so the trainer's transaction reads the same for both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.formats.catalog import get_format
from altgrad.loop.states import copy_tree
from altgrad.nn.recipe.facts import label_of
from altgrad.nn.recipe.recipe import Recipe
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.formats import recipe_of


@dataclass(frozen=True)
class StorageRates:
    """What storage rounding did to one step's updates, over all weights on a grid; None where there are none."""

    stall_rate: float | None = None
    flip_rate: float | None = None
    regridded: int = 0  # values that a refresh of the grid's scale moved


class FormatsOfRun:
    """A model's quantization, as the trainer needs it."""

    def __init__(self, model: nn.Module, config: ExperimentConfig, example: Tensor) -> None:
        """`example` is an input of the model: overrides by position are found by watching it run."""
        self.model = model
        self.recipe: Recipe | None = recipe_of(config)  # changes with an emergency shift
        self.manifest = None
        self.handle: Any = None
        self._elements = 0
        recipe = self.recipe
        if recipe is None:
            return
        from altgrad.nn import quantize_model

        self.manifest = quantize_model(
            model,
            recipe,
            include=config.include,
            exclude=config.exclude or None,
            seed=config.seed,
            example=(example,) if recipe.needs_positions else None,
        )

    @property
    def active(self) -> bool:
        return self.manifest is not None

    @property
    def label(self) -> str:
        """What the present formats are called."""
        return label_of(self.recipe)

    @property
    def narrowest(self) -> str | None:
        """The operand format that reaches least far: the first to overflow. None where nothing is quantized."""
        names = {spec.format for spec in self.recipe.operands()} if self.recipe else set()
        return min((name for name in names if name), key=lambda name: (get_format(name).max, name), default=None)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Put storage rounding behind the optimizer's step."""
        if self.active:
            from altgrad.nn import attach_optimizer

            self.handle = attach_optimizer(self.model, optimizer)

    def at(self, step: int, micro_batch: int = 0) -> None:
        """Set what the random streams are functions of."""
        if self.active:
            from altgrad.nn import set_step

            set_step(self.model, step, micro_batch)

    def same_weights(self) -> AbstractContextManager[None]:
        """A block within which no weight changes, so that each is quantized once."""
        if not self.active:
            return nullcontext()
        from altgrad.nn import cached_weights

        return cached_weights(self.model)

    def state(self) -> dict[str, Any]:
        """Copies of scale histories and storage state, with the present recipe."""
        if not self.active:
            return {}
        from altgrad.nn import quant_state

        return {"format": self.label, "layers": copy_tree(quant_state(self.model))}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`'s result, with its recipe."""
        if not self.active:
            return
        from altgrad.nn import load_quant_state

        load_quant_state(self.model, state["layers"])  # puts the state's recipe on the model, too
        self.recipe = Recipe.from_dict(state["layers"]["recipes"][0])

    def snapshot(self) -> Any:
        """The scale histories as a step finds them; costs a few dictionaries, as their tensors are never written to."""
        if not self.active:
            return None
        from altgrad.nn import quant_state

        return quant_state(self.model)

    def roll_back(self, snapshot: Any) -> None:
        """Undo what a skipped step did to the scale histories."""
        if snapshot is not None:
            from altgrad.nn import load_quant_state

            load_quant_state(self.model, snapshot)

    def change(self, recipe: Recipe) -> None:
        """Use another recipe from now on; weights on a grid move to its grid."""
        from altgrad.nn import change_format

        change_format(self.model, recipe)
        self.recipe = recipe

    def storage_rates(self) -> StorageRates:
        """What the last optimizer step did to the weights on a grid (one host copy)."""
        counts = self.handle.counts if self.handle is not None else None
        if counts is None:
            return StorageRates()
        attempted, flips, stalled, _, regridded = counts.sum(0).tolist()
        return StorageRates(stalled / attempted if attempted else None, flips / self._grid_elements(), regridded)

    def _grid_elements(self) -> int:
        """Elements of all weights on a grid."""
        if not self._elements:
            self._elements = sum(one.elements for one in self.handle.last_step_stats().values())
        return self._elements


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no element is NaN or inf: one reduction and one host copy for all tensors."""
    floats = [t for t in tensors if t.is_floating_point() and t.numel()]
    if not floats:
        return True
    largest = torch.stack([n.float() for n in torch._foreach_norm(floats, torch.inf)])  # NaN and inf survive a maximum
    return bool(torch.isfinite(largest).all())
