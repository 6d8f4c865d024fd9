"""What runs leave, as frozen values: a step, an evaluation, a verdict, a result, with the meaning and unit of each field.

JSON has no NaN and no infinity, so records spell those as the texts "nan", "inf" and "-inf".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from altgrad.report.notebook import notebook_table

_NON_FINITE = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "+inf": math.inf,
    "infinity": math.inf,
    "-infinity": -math.inf,
}


def jsonable(content: Any) -> Any:
    """`content` with non-finite floats as text; keys become text, tuples lists."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, dict):
        return {str(key): jsonable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [jsonable(value) for value in content]
    return content


def as_number(value: Any) -> float | None:
    """JSON value -> float; "nan", "inf", "-inf" are floats; anything else that is no number of float64 is None."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return None
    return _NON_FINITE.get(value.lower()) if isinstance(value, str) else None


def as_whole(value: Any) -> int | None:
    """JSON value -> int where it is a finite number; fractions are cut off."""
    number = as_number(value)
    return int(number) if number is not None and math.isfinite(number) else None


FINISHED = ("completed", "collapsed")
"""Statuses of a run that came to its end: a collapse is a result."""


VerdictKind = Literal["nonfinite", "divergence", "freeze", "no_learning", "stalled", "far_above"]
"""The first four are collapses; "stalled", "far_above" and, at the end of a short run, "freeze" and "no_learning" are remarks."""


@dataclass(frozen=True)
class Verdict:
    """A collapse, or a remark, and its evidence.

    Args:
        onset_step: first step of the unbroken stretch that led to the verdict.
        detected_step: the step whose record completed it.
        metric, value, threshold: what was measured at detection, and the limit it crossed.
        judged_on: the loss on which progress was judged; None where progress did not matter.
    """

    kind: VerdictKind
    onset_step: int
    detected_step: int
    metric: str
    value: float
    threshold: float
    reason: str
    judged_on: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepRecord:
    """What one training step was.

    Args:
        step: 1, 2, ...; skipped steps count.
        loss: mean training loss of the batch in nats per token; NaN or inf as it came out.
        lr: learning rate of the schedule.
        grad_norm: L2 norm of all gradients before any clip.
        finite: whether loss and gradients were; nothing of a step that was not is applied.
        stall_rate: attempted weight updates that changed no code / all attempted; None without a grid.
        flip_rate: weights whose code changed / all weights on a grid; None without a grid.
        overflow_rate: largest fraction of finite elements beyond the format's max, over layers and roles; None where it
            was not measured.
        events: what was done about the step (clip, shift, skip_nonfinite, regrid), with details under their own keys.
        verdict: the collapse that this step completed.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    finite: bool
    stall_rate: float | None = None
    flip_rate: float | None = None
    overflow_rate: float | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    verdict: Verdict | None = None

    def row(self, tokens_per_s: float, elapsed_s: float) -> dict[str, Any]:
        """Its line in metrics.jsonl. `tokens_per_s`: of this step; `elapsed_s`: seconds since the run began, pauses left out."""
        facts = {name: value for name, value in vars(self).items() if name not in ("events", "verdict")}
        return {"kind": "step", **facts, "tokens_per_s": tokens_per_s, "elapsed_s": elapsed_s}

    def event_rows(self) -> list[dict[str, Any]]:
        """A line in metrics.jsonl for each of its events."""
        return [event_row(self.step, event["event"], event) for event in self.events]


@dataclass(frozen=True)
class Evaluation:
    """The validation loss after a step, in nats per token."""

    step: int
    val_loss: float

    @property
    def perplexity(self) -> float:
        """e to the power of the loss; inf where that is beyond float64."""
        try:
            return math.exp(self.val_loss)
        except OverflowError:
            return math.inf

    def row(self) -> dict[str, Any]:
        """Its line in metrics.jsonl."""
        return {"kind": "eval", **asdict(self), "perplexity": self.perplexity}


def event_row(step: int, event: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """A line in metrics.jsonl that says what happened at a step: "clip", "shift", "skip_nonfinite", "regrid", "verdict"."""
    return {"kind": "event", "step": step, "event": event, **{k: v for k, v in details.items() if k != "event"}}


@dataclass(frozen=True)
class ExperimentResult:
    """What a run came to.

    Args:
        status: completed, collapsed (see `verdict`) or interrupted (the same command continues).
        remarks: what is no collapse but should be known, as verdicts: a stall, a loss far above the FP32 twin's.
        final_loss, best_loss: training loss in nats per token of the last step and of the best one.
        stall_rate: mean over the steps after warmup of stalled / attempted weight updates; None without a grid.
        wall_s: seconds, pauses between interruption and resumption left out.
        tokens_per_s: training tokens over the time spent in steps.
        config_hash: SHA-256 (hex) of the run's identity; its first 8 digits end the folder's name.
        details: skipped steps, bytes of optimizer state, where checkpoints and the failure report are, and the like.
        run_dir: the run's folder.
        already_finished: it was looked up, not made.
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
    details: dict[str, Any] = field(default_factory=dict)
    remarks: list[dict[str, Any]] = field(default_factory=list)
    run_dir: Path = Path()
    already_finished: bool = False

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; an interrupted one did not."""
        return self.status in FINISHED

    def __repr__(self) -> str:
        ended = (self.verdict or {}).get("kind") or self.status
        return (
            f"ExperimentResult({self.run_id}: {ended} at step {self.steps}, validation loss {self.final_val_loss:.4f})"
        )

    def _repr_html_(self) -> str:
        shown = (
            "format",
            "storage",
            "seed",
            "status",
            "steps",
            "final_val_loss",
            "best_val_loss",
            "stall_rate",
            "run_dir",
        )
        said = [(str(v.get("kind")), v.get("reason", "")) for v in (self.verdict, *self.remarks) if v]
        return notebook_table(self.run_id, [*((name, getattr(self, name)) for name in shown), *said])

    def as_dict(self) -> dict[str, Any]:
        """result.json's content."""
        content = asdict(self)
        del content["run_dir"], content["already_finished"]
        return jsonable(content)
