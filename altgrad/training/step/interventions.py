"""What acts on a run from outside its update rule: the clip on measured overflow and the emergency format shift.

Both decide by `altgrad.quantization.stability` and act here, at their points of the step's transaction. Before a shift
the run is put on a finite state: its own, or where weights or optimizer state are not finite any more, the last copy
that was.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.errors import AltGradError, ConfigError
from altgrad.quantization.stability import EmergencyMantissaShift, PartitionRelativeClipper
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.step.formats_of_run import FormatsOfRun, all_finite, recipe_of
from altgrad.training.step.state_tree import (
    copy_tree,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    tensors_of,
)


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
        if (self.clipping or config.enable_emergency_shift) and config.recipe is not None:
            raise ConfigError(
                "enable_partition_clipping and enable_emergency_shift follow one format; set fp8_format, not a recipe"
            )
        if config.enable_emergency_shift:
            self.shift = EmergencyMantissaShift(
                config.shift.nan_patience,
                config.shift.stall_threshold,
                stall_patience=config.shift.stall_patience,
                chain=config.shift.chain,
            )
            self._check_chain(config)
            self._keep_if_finite()

    def _check_chain(self, config: ExperimentConfig) -> None:
        """Refuse now what a shift could not put the run into.

        Raises:
            ConfigError: a format down the chain makes no recipe with the run's other settings.
        """
        assert self.shift is not None
        fmt = self.formats.format
        while (target := self.shift.next_format(fmt)) is not None:
            try:
                recipe = recipe_of(config, target)
            except AltGradError as error:
                raise ConfigError(
                    f"shift.chain leads from {fmt} to {target}, which this run cannot take: {error}"
                ) from None
            if recipe is None:
                raise ConfigError(
                    f"shift.chain leads from {fmt} to {target}, which is no quantization; end it with null"
                )
            fmt = target

    @property
    def can_shift(self) -> bool:
        """Whether another format is left to try."""
        return self.shift is not None and self.shift.next_format(self.formats.format) is not None

    def clip(self, overflow_rate: Tensor | float | None) -> dict[str, Any] | None:
        """Clip the gradients if the measured overflow asks for it; the event if it did."""
        if self.clipping is None or overflow_rate is None:
            return None
        clipper = PartitionRelativeClipper(
            self.formats.format, self.clipping.base_clip, self.clipping.overflow_threshold
        )
        if not clipper.clip_if_needed(self.model, overflow_rate):
            return None
        assert clipper.last_clip is not None
        return {"event": "clip", **asdict(clipper.last_clip)}

    def end_step(self, step: int, *, finite: bool, stall_rate: float | None, warmup: bool) -> dict[str, Any] | None:
        """Shift the format if the step asks for it; the event if it did. Stall during warmup does not count."""
        if self.shift is None:
            return None
        target = self.shift.check_and_shift(self.formats.format, not finite, None if warmup else stall_rate)
        if target is None:
            if finite and step % self.snapshot_interval == 0:
                self._keep_if_finite(step)
            return None
        assert self.shift.last_shift is not None
        rewound_to = self._return_to_finite()
        self.formats.change(target)
        self._keep_if_finite(step)
        return {"event": "shift", **asdict(self.shift.last_shift), "rewound_to": rewound_to}

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
