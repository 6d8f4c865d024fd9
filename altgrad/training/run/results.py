"""A run's outcome: result.json as an object, and the running tally that becomes it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from altgrad.errors import ReportError
from altgrad.records.files import jsonable
from altgrad.training.trainer import StepRecord

RESULT = "result.json"


@dataclass(frozen=True)
class ExperimentResult:
    """What a run came to.

    Args:
        status: completed, collapsed (see `verdict`) or interrupted (the same command continues).
        final_loss, best_loss: training loss in nats per token of the last step and of the best one.
        stall_rate: mean over the steps after warmup of stalled / attempted weight updates; None without a grid.
        tokens_per_s: training tokens over the time spent in steps.
        run_dir: the run's folder.
    """

    name: str
    run_id: str
    seed: int
    format: str
    storage: str
    rounding: str
    status: str
    verdict: dict[str, Any] | None
    steps: int
    max_steps: int
    final_loss: float
    best_loss: float
    best_step: int
    final_val_loss: float
    best_val_loss: float
    stall_rate: float | None
    wall_s: float
    tokens_per_s: float
    interventions: list[dict[str, Any]]
    config_hash: str
    data_fingerprint: str
    numerics_version: str
    figures: dict[str, Any] = field(default_factory=dict)
    run_dir: Path = Path()
    already_finished: bool = False

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; an interrupted one did not."""
        return self.status in ("completed", "collapsed")

    def as_dict(self) -> dict[str, Any]:
        """result.json's content."""
        content = asdict(self)
        del content["run_dir"], content["already_finished"]
        return jsonable(content)

    @classmethod
    def load(cls, run_dir: Path) -> ExperimentResult | None:
        """The result in a run folder, or None if there is none yet.

        Raises:
            ReportError: result.json is not what a run writes.
        """
        path = run_dir / RESULT
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            known = {f.name for f in fields(cls)} - {"run_dir", "already_finished"}
            numbers = {key: _number(value) for key, value in content.items() if key in known}
            return cls(**numbers, run_dir=run_dir, already_finished=True)
        except (ValueError, TypeError, AttributeError) as error:
            raise ReportError(f"{path} is damaged ({error}); delete it and run the same command again") from None


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value


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

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)
