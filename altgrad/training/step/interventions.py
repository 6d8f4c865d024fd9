"""What acts on a run from outside its update rule: the clip on measured overflow and the emergency format shift.

Both decide by `altgrad.quantization.stability` and act here, at their points of the step's transaction. Before a shift
the run is put on a finite state: its own, or where weights or optimizer state are not finite any more, the last copy
that was.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from altgrad.errors import AltGradError, ConfigError
from altgrad.loop.states import (
    copy_tree,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    tensors_of,
)
from altgrad.quantization.stability import EmergencyMantissaShift, PartitionRelativeClipper
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.step.formats_of_run import FormatsOfRun, all_finite

if TYPE_CHECKING:
    from altgrad.nn.recipe.recipe import Recipe


class Interventions:
    """The clip, the shift and the finite state to return to, for one model, optimizer and set of formats."""

    def __init__(
        self, config: ExperimentConfig, model: nn.Module, optimizer: torch.optim.Optimizer, formats: FormatsOfRun
    ) -> None:
        self.model, self.optimizer, self.formats = model, optimizer, formats
        self.snapshot_interval = config.shift.snapshot_interval
        self.clipping = config.clipping if config.enable_partition_clipping else None
        self.shift: EmergencyMantissaShift | None = None
        self.last_finite: dict[str, Any] | None = None
        if config.enable_emergency_shift:
            self.shift = EmergencyMantissaShift(
                config.shift.nan_patience,
                config.shift.stall_threshold,
                stall_patience=config.shift.stall_patience,
                chain=config.shift.chain,
            )
            self._check_chain()
            self._keep_if_finite()

    def _check_chain(self) -> None:
        """Refuse now what a shift could not put the run into.

        Raises:
            ConfigError: a recipe down the chain contradicts the run's other settings.
        """
        at = self.formats.recipe
        while (target := self._checked_fallback(at)) is not None:
            at = target

    def _checked_fallback(self, recipe: Recipe | None) -> Recipe | None:
        try:
            target = self._fallback(recipe)
        except AltGradError as error:
            raise ConfigError(f"{self._links(recipe)}, which this run cannot take: {error}") from None
        if target is not None and not target.quantizes:
            raise ConfigError(f"{self._links(recipe)}, which is no quantization; end it with null")
        if target is not None:
            from altgrad.nn.model.change import check_change

            try:
                check_change(self.model, target)
            except AltGradError as error:
                raise ConfigError(f"{self._links(recipe)}, which this model cannot take: {error}") from None
        return target

    def _links(self, recipe: Recipe | None) -> str:
        """The links of the chain that a recipe would go along, in words."""
        assert self.shift is not None
        assert recipe is not None
        names = dict.fromkeys(spec.format for spec in recipe.operands() if spec.format)
        links = [f"{name} to {self.shift.next_format(name)}" for name in names if self.shift.next_format(name)]
        return f"shift.chain leads from {' and from '.join(links)}"

    def _fallback(self, recipe: Recipe | None) -> Recipe | None:
        """The recipe with every format that the chain knows one link further; None where it knows none of them."""
        if self.shift is None or recipe is None:
            return None
        from altgrad.nn.recipe.reformat import reformat

        target = reformat(recipe, self.shift.next_format)
        return None if target == recipe else target

    @property
    def can_shift(self) -> bool:
        """Whether another recipe is left to try."""
        return self._fallback(self.formats.recipe) is not None

    def clip(self, overflow_rate: Tensor | float | None) -> dict[str, Any] | None:
        """Clip the gradients if the measured overflow asks for it; the event if it did."""
        narrowest = self.formats.narrowest
        if self.clipping is None or overflow_rate is None or narrowest is None:
            return None
        clipper = PartitionRelativeClipper(narrowest, self.clipping.base_clip, self.clipping.overflow_threshold)
        if not clipper.clip_if_needed(self.model, overflow_rate):
            return None
        assert clipper.last_clip is not None
        return {"event": "clip", **asdict(clipper.last_clip)}

    def end_step(self, step: int, *, finite: bool, stall_rate: float | None, warmup: bool) -> dict[str, Any] | None:
        """Shift the formats if the step asks for it; the event if it did. Stall during warmup does not count."""
        if self.shift is None:
            return None
        rate = None if warmup else stall_rate
        reason = self.shift.reason_to_shift(not finite, rate)
        target = self._fallback(self.formats.recipe) if reason else None
        if reason is None or target is None:
            if finite and step % self.snapshot_interval == 0:
                self._keep_if_finite(step)
            return None
        record = self.shift.shifted(self.formats.label, target.label, reason, rate)
        rewound_to = self._return_to_finite()
        self.formats.change(target)
        self._keep_if_finite(step)
        return {"event": "shift", **asdict(record), "rewound_to": rewound_to}

    def state(self) -> dict[str, Any]:
        """Everything that later decisions depend on."""
        if self.shift is None:
            return {}
        return {"shift": self.shift.state_dict(), "last_finite": self.last_finite}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`'s result."""
        if self.shift is not None and state:
            self.shift.load_state_dict(state["shift"])
            self.last_finite = copy_tree(state["last_finite"])

    def _is_finite(self) -> bool:
        return all_finite([*self.model.state_dict().values(), *tensors_of(self.optimizer.state_dict()["state"])])

    def _keep_if_finite(self, step: int = 0) -> None:
        if self._is_finite():
            self.last_finite = {
                "step": step,
                "model": model_state(self.model),
                "optimizer": optimizer_state(self.optimizer),
                "formats": self.formats.state(),
            }

    def _return_to_finite(self) -> int | None:
        """The step gone back to, or None if the present state is finite."""
        if self._is_finite():
            return None
        assert self.last_finite is not None, "the state before the first step is finite and kept"
        load_model_state(self.model, self.last_finite["model"])
        load_optimizer_state(self.optimizer, self.last_finite["optimizer"])
        self.formats.load_state(self.last_finite["formats"])
        return self.last_finite["step"]
