"""The limits of verdicts: how bad, for how many steps, each kind of collapse must be (`altgrad.monitor.judge` judges)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_Positive = Annotated[int, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
_NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class VerdictLimits(BaseModel):
    """When a run counts as collapsed. A run that merely ends worse does not."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)

    stop: bool = True
    """End the run at the verdict; False records the first verdict and trains on."""
    nonfinite_patience: _Positive = 3
    """Consecutive steps with a NaN or inf in loss or gradients. One can be a bad batch, three in a row on unchanged
    weights are the format's doing."""
    divergence_window: _Positive = 50
    """Consecutive steps that a loss must stay bad."""
    divergence_margin: _NonNegative = 0.05
    """Bad: above the first loss by this fraction. 5% is beyond the batch noise of an untrained model."""
    divergence_ratio: Annotated[float, Field(gt=1.0)] = 2.0
    """Bad as well: above the best smoothed loss by this factor."""
    divergence_smoothing: _Positive = 10
    """The best loss is the lowest mean over so many consecutive steps: one lucky batch does not set it."""
    freeze_window: _Positive = 50
    """Consecutive steps, after warmup, over which a freeze must show."""
    freeze_stall_rate: _Fraction = 0.95
    """Of the attempted weight updates, the fraction lost to rounding in every step of the window."""
    freeze_flip_rate: _Fraction = 0.002
    """Of the stored weights, the fraction whose code changes in a step of a frozen run at most."""
    freeze_smoothing: _Positive = 25
    """Where nothing is evaluated: the loss is smoothed by the mean over so many steps (a batch's noise of 3%: 0.6%)."""
    freeze_improvement: _NonNegative = 0.001
    """An evaluation loss (or smoothed loss) lower by this fraction counts as learning."""
    no_learning_window: _Positive = 200
    """Steps after warmup within which a loss must have left its start by more than its noise."""
    twin_gap: _Fraction = 0.1
    """Far above: an evaluation loss above the FP32 twin's by more than this fraction of what the twin gained."""
