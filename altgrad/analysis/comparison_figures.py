"""The figures of the comparison report: loss curves, stall rates, and the values of the formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from altgrad.analysis.outcome import Outcome
from altgrad.records.run import Curve, as_number
from altgrad.report.charts.axes import Axis
from altgrad.report.charts.figures import figure, line_figure
from altgrad.report.charts.glyphs import rug
from altgrad.report.charts.lines import Mark, Series, thin
from altgrad.report.charts.svg import el
from altgrad.report.numbers import count, plural
from altgrad.report.theme import BASELINE, Style
from altgrad.report.verdicts import past_tense

CURVE_POINTS = 240
MOST_MARKS = 8


def loss_figure(outcomes: Sequence[Outcome], styles: Sequence[Style], same: Mapping[str, str]) -> Markup:
    """Training and validation loss of all runs. Training loss is thinned to bucket means; nothing is smoothed further."""
    series: list[Series] = []
    per_bucket = 1
    evaluated = any(len(o.metrics.validation) for o in outcomes)
    points = CURVE_POINTS if len(outcomes) <= 12 else 120
    for outcome, style in zip(outcomes, styles, strict=True):
        validation, train = outcome.metrics.validation, outcome.metrics.train
        if len(validation):
            kept = _at_most(validation, points)
            few = len(kept) <= 40
            series.append(Series(outcome.label, kept.steps, kept.values, style, "validation", dots=few))
        if len(train):
            t = thin(train.steps, train.values, points)
            per_bucket = max(per_bucket, t.per_bucket)
            band = (t.low, t.high) if t.per_bucket > 1 else (None, None)
            series.append(Series(outcome.label, t.x, t.mean, style, "train", *band, faint=evaluated))
    if not series:
        return el("p", "No losses have been recorded yet.")
    caption = []
    if evaluated:
        caption.append("Strong lines with dots: validation loss at each evaluation. Thin lines: training loss")
        caption[-1] += f", mean of every {plural(per_bucket, 'step')}." if per_bucket > 1 else " of every step."
    elif per_bucket > 1:
        caption.append(f"Training loss, mean of every {plural(per_bucket, 'step')}.")
    if per_bucket > 1:
        caption.append("Point at a name to see the range within each mean.")
    if any(o.collapsed for o in outcomes):
        caption.append("A red cross marks the step at which a collapse began.")
    return line_figure(
        series,
        title="Loss over training",
        description=_describe(outcomes),
        caption=" ".join(caption),
        y_label="cross-entropy, nats per token",
        marks=_marks(outcomes),
        height=420,
        y_top=_sensible_top(outcomes),
        group_notes={label: f"same as {other}" for label, other in same.items()},
        formats={o.label: o.run.format for o in outcomes},
    )


def gap_figure(outcomes: Sequence[Outcome], styles: Sequence[Style]) -> Markup | None:
    """Loss minus the baseline's loss on the same batches, where both were measured; None without a baseline."""
    series: list[Series] = []
    per_bucket = 1
    for outcome, style in zip(outcomes, styles, strict=True):
        baseline = outcome.baseline
        if baseline is None:
            continue
        validation = _gap(outcome.metrics.validation, baseline.metrics.validation)
        train = _gap(outcome.metrics.train, baseline.metrics.train)
        if len(validation):
            kept = _at_most(validation, CURVE_POINTS)
            series.append(Series(outcome.label, kept.steps, kept.values, style, "validation", dots=len(kept) <= 40))
        if len(train):
            t = thin(train.steps, train.values, 80)
            per_bucket = max(per_bucket, t.per_bucket)
            series.append(Series(outcome.label, t.x, t.mean, style, "train", faint=bool(len(validation))))
    if not series:
        return None
    finite = [s.y[np.isfinite(s.y)] for s in series]
    ordinary = [y for s, y in zip(series, finite, strict=True) if len(y) and not _collapsed(s.group, outcomes)]
    top = 1.25 * max((float(y.max()) for y in ordinary), default=0.0)
    peak = max((float(y.max()) for y in finite if len(y)), default=0.0)
    return line_figure(
        series,
        title="Distance from FP32",
        description="Loss of each run minus the loss of the FP32 run of the same seed at the same step.",
        caption="Zero is the FP32 run of the same seed, which sees the same batches; below zero is better than FP32. "
        + (f"Thin lines: training loss, mean of every {per_bucket} steps." if per_bucket > 1 else ""),
        y_label="nats above FP32",
        height=340,
        y_scales=("linear",),
        y_top=top if ordinary and peak > 1.5 * top > 0 else None,
        formats={o.label: o.run.format for o in outcomes},
    )


def _gap(mine: Curve, theirs: Curve) -> Curve:
    steps, i, j = np.intersect1d(mine.steps, theirs.steps, assume_unique=True, return_indices=True)
    return Curve(steps, mine.values[i] - theirs.values[j])


def _collapsed(label: str, outcomes: Sequence[Outcome]) -> bool:
    return any(o.label == label and o.collapsed for o in outcomes)


def stall_figure(outcomes: Sequence[Outcome], styles: Sequence[Style]) -> Markup | None:
    """Stall rate over training; None when no run measured one."""
    series = []
    for outcome, style in zip(outcomes, styles, strict=True):
        stall = outcome.metrics.columns.get("stall_rate")
        if stall is not None and len(stall) and style.slot != BASELINE:
            t = thin(stall.steps, 100 * stall.values, CURVE_POINTS)
            band = (t.low, t.high) if t.per_bucket > 1 else (None, None)
            series.append(Series(outcome.label, t.x, t.mean, style, "", *band))
    if not series:
        return None
    return line_figure(
        series,
        title="Stall rate over training",
        description="Share of attempted, nonzero weight updates after which the stored code was unchanged.",
        caption="0%: every attempted update moved its weight to another code. 100%: none did, the weights stand still.",
        y_label="percent of attempted updates that changed no code",
        height=300,
        y_axis=Axis(-2, 102),
        y_scales=("linear",),
        marks=[mark for mark in _marks(outcomes) if not mark.calm],
        formats={o.label: o.run.format for o in outcomes},
    )


def rug_figure(outcomes: Sequence[Outcome], styles: Sequence[Style]) -> Markup | None:
    """The positive values of each format in the report; None when no run recorded them."""
    rows, seen = [], set()
    for outcome, style in zip(outcomes, styles, strict=True):
        facts = outcome.run.environment.get("format")
        values = facts.get("values") if isinstance(facts, dict) else None
        if isinstance(values, list) and outcome.run.format not in seen:
            seen.add(outcome.run.format)
            rows.append((outcome.run.format, style, [v for v in map(as_number, values) if v is not None]))
    if not rows:
        return None
    return figure(
        "Every positive value, before scaling",
        rug(rows),
        "One tick per value, on a logarithmic axis. Scaling moves a row sideways; it does not change its spacing. "
        "Where ticks are far apart, an update must be large to move a weight at all.",
    )


def _at_most(curve: Curve, points: int) -> Curve:
    if len(curve) <= points:
        return curve
    keep = np.unique(np.linspace(0, len(curve) - 1, points).round().astype(int))
    return Curve(curve.steps[keep], curve.values[keep])


def _marks(outcomes: Sequence[Outcome]) -> list[Mark]:
    marks = []
    for outcome in outcomes:
        if outcome.collapsed and outcome.onset is not None:
            verb = past_tense(outcome.kind)
            text = f"{outcome.label} {verb}, step {count(outcome.onset)}"
            marks.append(Mark(outcome.onset, text, outcome.loss_at(outcome.onset), outcome.label))
        for item in outcome.run.result.get("interventions") or []:
            if (
                isinstance(item, dict)
                and item.get("kind") == "shift"
                and (step := as_number(item.get("step"))) is not None
            ):
                marks.append(Mark(step, f"{outcome.label} shifted, step {count(step)}", None, outcome.label, calm=True))
    return sorted(marks, key=lambda mark: (mark.calm, mark.x))[:MOST_MARKS]


def _sensible_top(outcomes: Sequence[Outcome]) -> float | None:
    """Upper end of a linear loss axis when some loss grows far beyond where training starts; else None."""
    starts, peaks = [], []
    for outcome in outcomes:
        finite = outcome.metrics.train.values[np.isfinite(outcome.metrics.train.values)]
        if len(finite):
            starts.append(float(finite[:5].max()))
            peaks.append(float(finite.max()))
    return 1.12 * max(starts) if starts and max(peaks) > 1.4 * max(starts) else None


def _describe(outcomes: Sequence[Outcome]) -> str:
    return " ".join(f"{o.label}: {o.said}" for o in outcomes[:12])
