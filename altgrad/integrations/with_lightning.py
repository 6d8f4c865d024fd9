"""AltGrad in Lightning: one callback.

The state is part of Lightning's checkpoints, as every callback's is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Callback

from altgrad.integrations.recorded_run import RecordedRun, load_quantization, tokens_in


class LightningCallback(Callback):
    """`lightning.Trainer(..., callbacks=[LightningCallback("runs/mine")])`.

    The model is quantized before `fit`, or in the module's `configure_model`. With automatic optimization the loss of a
    step is that of the module's `training_step`; with manual optimization it is the `loss` that this returns, if it does.

    Args:
        run_dir, monitor, verdict, stop, overwrite: see `RecordedRun`. `stop` ends the training at a collapse.
        validation: name of the logged validation loss.
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        *,
        monitor: int | Mapping[str, Any] | None = 10,
        verdict: Mapping[str, Any] | None = None,
        stop: bool = False,
        overwrite: bool = False,
        validation: str = "val_loss",
    ) -> None:
        self.run = RecordedRun(run_dir, monitor, dict(verdict or {}), stop, overwrite)
        self.validation = validation
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return self.run.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        saved = (checkpoint.get("callbacks") or {}).get(self.state_key, {})
        load_quantization(pl_module, saved)

    def on_train_start(self, trainer, pl_module) -> None:
        steps = trainer.estimated_stepping_batches
        facts = {
            "framework": f"lightning {lightning.__version__}",
            "accumulation": trainer.accumulate_grad_batches,
        }
        self.run.attach(
            pl_module,
            trainer.optimizers,
            facts=facts,
            max_steps=int(steps) if math.isfinite(steps) else None,
            resumed=trainer.global_step > 0,
            writes=trainer.is_global_zero,
        )
        if trainer.global_step > 0:
            self.run.load_state(self._loaded or {})
        self._taken = trainer.global_step
        self._loaded = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.run.see_gradients()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None and self.run.run_dir is not None:
            divided = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.run.see_loss(loss * divided, tokens=tokens_in(batch))
        if trainer.global_step == self._taken:
            self.run.next_micro_batch()
            return
        self._taken = trainer.global_step
        if self.run.end_step():
            trainer.should_stop = True

    def on_validation_end(self, trainer, pl_module) -> None:
        loss = trainer.callback_metrics.get(self.validation)
        if loss is not None and not trainer.sanity_checking and self.run.model is not None:
            self.run.see_evaluation(float(loss))

    def on_train_end(self, trainer, pl_module) -> None:
        self.run.finish()
