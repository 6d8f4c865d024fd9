"""The number formats of one training run: what a config's keys mean as a recipe, bound to a model and its optimizer.

A run in FP32 has none of this: every method then does nothing, so the trainer's transaction reads the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.errors import ConfigError
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.step.state_tree import copy_tree


def recipe_of(config: ExperimentConfig, fmt: str | None = None):
    """The `altgrad.nn.Recipe` that a config asks for; None for FP32.

    Args:
        fmt: another format in place of `config.fp8_format` (an emergency shift).

    Raises:
        RecipeError: the combination contradicts itself.
    """
    name = fmt or config.fp8_format
    if config.recipe is None and name == "FP32":
        return None
    from altgrad.nn import Recipe, StorageSpec, uniform

    if config.recipe is not None and fmt is None:
        return Recipe.from_dict(config.recipe)
    storage: Any = config.weight_storage
    if storage == "grid":
        fixed = config.scaling == "none"  # unscaled means the stored weights, too
        storage = StorageSpec(
            name,
            rounding=config.storage_rounding or config.rounding,  # type: ignore[arg-type]
            scale=1.0 if fixed else None,
            refresh_every=0 if fixed else config.storage_refresh_interval,
        )
    gradient: dict[str, Any] = {"grad": config.gradient_format} if config.gradient_format else {}
    return uniform(
        name,
        rounding=config.rounding,
        scaling=config.scaling,
        overflow=config.overflow,
        storage=storage,
        **gradient,
    )


@dataclass(frozen=True)
class StorageFigures:
    """What storage rounding did to one step's updates, over all weights on a grid; None where there are none."""

    stall_rate: float | None = None
    flip_rate: float | None = None
    regridded: int = 0  # values that a refresh of the grid's scale moved


class FormatsOfRun:
    """A model's quantization, as the trainer needs it."""

    def __init__(self, model: nn.Module, config: ExperimentConfig, example: Tensor) -> None:
        """`example` is an input of the model: overrides by position are found by watching it run."""
        self.model, self.config = model, config
        self.format = config.fp8_format  # changes with an emergency shift
        self.manifest = None
        self.handle: Any = None
        self._elements = 0
        recipe = recipe_of(config)
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

    def state(self) -> dict[str, Any]:
        """Copies of scale histories and storage state, with the present format."""
        if not self.active:
            return {}
        from altgrad.nn import quant_state

        return {"format": self.format, "layers": copy_tree(quant_state(self.model))}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`'s result, with its format."""
        if not self.active:
            return
        from altgrad.nn import load_quant_state

        load_quant_state(self.model, state["layers"])  # puts the state's recipe back, too
        self.format = state["format"]

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

    def change(self, fmt: str) -> None:
        """Use another format from now on; weights on a grid move to its grid."""
        from altgrad.nn import change_format

        if self.config.recipe is not None:
            raise ConfigError("an emergency shift needs fp8_format, not a recipe; set fp8_format=...")
        recipe = recipe_of(self.config, fmt)
        if recipe is None:
            raise ConfigError(f"an emergency shift to {fmt} would leave the model unquantized; end the chain before it")
        change_format(self.model, recipe)
        self.format = fmt

    def storage_figures(self) -> StorageFigures:
        """What the last optimizer step did to the weights on a grid (one host copy)."""
        counts = self.handle.counts if self.handle is not None else None
        if counts is None:
            return StorageFigures()
        attempted, flips, stalled, _, regridded = counts.sum(0).tolist()
        return StorageFigures(stalled / attempted if attempted else None, flips / self._grid_elements(), regridded)

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
