"""AltGrad in Hugging Face's Trainer (and in trainers made of it, as trl's): one callback.

The state is part of `trainer_state.json` in each checkpoint, so it is found again wherever that is resumed from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, __version__
from transformers.trainer_callback import ExportableState

from altgrad.integrations.recorded_run import LOG, RecordedRun, tokens_in


class HuggingFaceCallback(TrainerCallback, ExportableState):
    """`Trainer(..., callbacks=[HuggingFaceCallback("runs/mine")])`, for a model that `quantize_model` has been at.

    The loss of a step is what the model returned as its `loss`; where it returns none, what Trainer logs. The gradient norm
    is that of the gradients that the optimizer gets (after Trainer's clip).

    Args:
        run_dir, monitor, verdict, stop, overwrite: see `RecordedRun`. `stop` ends the training at a collapse.
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        *,
        monitor: int | Mapping[str, Any] | None = 10,
        verdict: Mapping[str, Any] | None = None,
        stop: bool = False,
        overwrite: bool = False,
    ) -> None:
        self._options = {
            "run_dir": None if run_dir is None else str(run_dir),
            "monitor": monitor,
            "verdict": dict(verdict or {}),
            "stop": stop,
            "overwrite": overwrite,
        }
        self.run = RecordedRun(**self._options)  # type: ignore[arg-type]
        self._hook: Any = None
        self._ranks = 1

    def state(self) -> dict[str, Any]:
        """What Trainer saves with a checkpoint."""
        return {"args": self._options, "attributes": {"saved": self.run.state()}}

    def on_train_begin(self, args, state, control, model: Any = None, optimizer: Any = None, **kwargs):
        resumed = state.global_step > 0
        facts = {
            "framework": f"transformers {__version__}",
            "batch_size": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
        }
        self.run.attach(
            model,
            optimizer,
            facts=facts,
            max_steps=state.max_steps,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            resumed=resumed,
            writes=state.is_world_process_zero,
        )
        self._ranks = args.world_size if args.average_tokens_across_devices else 1
        self._hook = model.register_forward_hook(self._after_forward, with_kwargs=True)
        if resumed:
            saved = state.stateful_callbacks.get(type(self).__name__, {})
            saved = saved[0] if isinstance(saved, list) else saved
            self.run.load_state(saved.get("attributes", {}).get("saved", {}))

    @torch.compiler.disable
    def _after_forward(self, model, args, kwargs, output) -> None:
        if not model.training or not torch.is_grad_enabled() or self.run.run_dir is None:
            return
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is not None and torch._C._current_graph_task_id() == -1:  # no recomputation in a backward
            summed = kwargs.get("num_items_in_batch") is not None
            self.run.see_loss(loss * self._ranks if summed else loss, summed=summed, tokens=tokens_in(args, kwargs))

    def on_substep_end(self, args, state, control, **kwargs):
        self.run.next_micro_batch()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.run.see_gradients()

    def on_step_end(self, args, state, control, **kwargs):
        if self.run.end_step():
            control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and self.run.model is not None:
            self.run.report_loss(float(logs["loss"]))
            self.run.flush()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = (metrics or {}).get("eval_loss")
        if loss is not None and math.isfinite(loss) and self.run.model is not None:
            self.run.see_evaluation(float(loss))

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.run.model is not None:
            result = self.run.finish()
            if result is not None and result.status == "interrupted":
                LOG.info("the run was interrupted after step %d", result.steps)
