"""What a run's result needs to remember of its steps while they are taken; part of every checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from altgrad.records.schema import StepRecord


@dataclass
class Tally:
    """What a result needs to remember of the steps; plain data, part of every checkpoint."""

    final_loss: float = math.nan
    best_loss: float = math.inf
    best_step: int = 0
    final_val_loss: float = math.nan
    best_val_loss: float = math.inf
    stall_sum: float = 0.0
    stall_steps: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    stepping_s: float = 0.0
    elapsed_s: float = 0.0
    verdict: dict[str, Any] | None = None
    interventions: list[dict[str, Any]] = field(default_factory=list)
    resumed_after: list[int] = field(default_factory=list)

    def add_step(self, record: StepRecord, tokens: int, seconds: float, warmup: bool) -> None:
        """Take a step into account."""
        self.final_loss = record.loss
        if record.loss < self.best_loss:
            self.best_loss, self.best_step = record.loss, record.step
        if record.stall_rate is not None and not warmup:
            self.stall_sum, self.stall_steps = self.stall_sum + record.stall_rate, self.stall_steps + 1
        self.skipped_steps += not record.finite
        self.tokens, self.stepping_s = self.tokens + tokens, self.stepping_s + seconds
        for event in record.events:
            if event["event"] in ("clip", "shift"):
                detail = {key: value for key, value in event.items() if key != "event"}
                self.interventions.append({"step": record.step, "kind": event["event"], "detail": detail})
        if record.verdict is not None and self.verdict is None:
            self.verdict = record.verdict.as_dict()

    def add_evaluation(self, loss: float) -> None:
        """Take a validation loss into account."""
        self.final_val_loss = loss
        if loss < self.best_val_loss:
            self.best_val_loss = loss

    @property
    def stall_rate(self) -> float | None:
        return self.stall_sum / self.stall_steps if self.stall_steps else None

    def result(self, ended: bool) -> dict[str, Any]:
        """What an `ExperimentResult` takes from here, by its names; ended: no further step is to come."""
        return {
            "status": "interrupted" if not ended else "collapsed" if self.verdict else "completed",
            "verdict": self.verdict,
            "final_loss": self.final_loss,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "final_val_loss": self.final_val_loss,
            "best_val_loss": self.best_val_loss,
            "stall_rate": self.stall_rate,
            "wall_s": self.elapsed_s,
            "tokens_per_s": self.tokens / self.stepping_s if self.stepping_s else 0.0,
            "interventions": self.interventions,
        }

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)
