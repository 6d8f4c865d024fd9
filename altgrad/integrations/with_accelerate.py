"""AltGrad in a loop of accelerate: one call after `accelerator.prepare`.

What it returns is registered for accelerate's checkpoints (`save_state`, `load_state`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, __version__
from torch import nn
from torch.optim import Optimizer

from altgrad.integrations.recorded_run import RecordedRun


class AcceleratedRun(RecordedRun):
    """A `RecordedRun` that accelerate checkpoints; `track` makes it."""

    _complete = False  # whether the gradients of a step are there and no optimizer has taken it yet

    def follow(self, accelerator: Accelerator) -> None:
        """Hear of each backward and each step, and of the end (`accelerator.end_training`)."""
        backward, end_training = accelerator.backward, accelerator.end_training
        self._skipped = lambda: accelerator.optimizer_step_was_skipped

        @functools.wraps(backward)
        def watched(loss, **kwargs):
            self._close_skipped()
            backward(loss, **kwargs)
            if self.model is not None:
                self.see_loss(loss)
                self._complete = accelerator.sync_gradients
                if not accelerator.sync_gradients:
                    self.next_micro_batch()

        @functools.wraps(end_training)
        def ended(*args, **kwargs):
            self.finish()
            return end_training(*args, **kwargs)

        accelerator.backward, accelerator.end_training = watched, ended

    def _after_step(self, optimizer: Optimizer) -> None:
        super()._after_step(optimizer)
        if optimizer is self.optimizers[-1]:
            self._complete = False
            self.end_step()

    def _close_skipped(self) -> None:
        """End a step whose gradients were complete and which fp16's scaler did not let the optimizer take."""
        if self._complete and self._skipped():
            self._complete = False
            self._norm = torch.tensor(math.inf)  # that is why; the gradients may be gone by now
            self.end_step()

    def finish(self, *, completed: bool | None = None):
        """See `RecordedRun`."""
        self._close_skipped()
        return super().finish(completed=completed)

    def state_dict(self) -> dict[str, Any]:
        """For accelerate."""
        self._close_skipped()
        return self.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For accelerate, which has loaded the parameters before."""
        self.load_state(state)


def track(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | list[Optimizer],
    run_dir: str | Path | None = None,
    *,
    monitor: int | Mapping[str, Any] | None = 10,
    verdict: Mapping[str, Any] | None = None,
    stop: bool = False,
    overwrite: bool = False,
    max_steps: int | None = None,
    resumed: bool = False,
) -> AcceleratedRun:
    """Save, restore and record a run of accelerate.

    Losses are those given to `accelerator.backward`. A loop that wants to end at a collapse asks `.collapsed`; one that ends
    calls `accelerator.end_training()` or `.finish()`.

    Args:
        model, optimizer: as `accelerator.prepare` returned them.
        run_dir, monitor, verdict, stop, overwrite: see `RecordedRun`.
        resumed: whether `accelerator.load_state` follows: the records in run_dir are then continued.
    """
    run = AcceleratedRun(run_dir, monitor, dict(verdict or {}), stop, overwrite)
    facts = {"framework": f"accelerate {__version__}", "accumulation": accelerator.gradient_accumulation_steps}
    run.attach(
        accelerator.unwrap_model(model),
        optimizer,
        facts=facts,
        max_steps=max_steps,
        resumed=resumed,
        writes=accelerator.is_main_process,
    )
    run.follow(accelerator)
    accelerator.register_for_checkpointing(run)
    return run
