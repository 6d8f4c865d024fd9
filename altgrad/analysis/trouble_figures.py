"""Figures of what goes wrong within runs: learning rate, updates against the grid, and layers in the order of their trouble."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from altgrad.analysis.layers import BUCKETS, LayerHistory, layer_history
from altgrad.analysis.outcome import Outcome
from altgrad.analysis.remedies import damaged
from altgrad.records.metrics import find_metric, metrics
from altgrad.records.run import Curve, as_number
from altgrad.report.charts.axes import axis_over
from altgrad.report.charts.figures import figure, line_figure
from altgrad.report.charts.heat import Ramp, heat_strips, ramp_legend
from altgrad.report.charts.lines import Series, thin
from altgrad.report.numbers import count, in_unit, plural
from altgrad.report.text import SYMBOLS, told_apart
from altgrad.report.theme import BASELINE, Style

TROUBLE = 0.5
"""A layer is in trouble when it loses this share of its numbers in a role."""
MOST_MAPS, MOST_ROWS = 4, 24


def rate_figure(outcomes: Sequence[Outcome], styles: Sequence[Style]) -> Markup | None:
    """The learning rate, one line for all runs that share it."""
    series: list[Series] = []
    seen: set[bytes] = set()
    for outcome, style in zip(outcomes, styles, strict=True):
        rate = outcome.metrics.columns.get("lr")
        if rate is None or len(rate) < 2:
            continue
        t = thin(rate.steps, rate.values, 120)
        key = t.mean.round(12).tobytes()
        if key not in seen:
            seen.add(key)
            series.append(Series(outcome.label, t.x, t.mean, style, ""))
    if not series:
        return None
    peak = max(float(np.nanmax(s.y)) for s in series)
    unit = 10.0 ** math.floor(math.log10(peak)) if peak > 0 else 1.0
    series = [replace(s, y=s.y / unit) for s in series]
    shared = len(series) == 1 and len(outcomes) > 1
    if shared:
        series = [Series("all runs", series[0].x, series[0].y, Style(BASELINE), "", end_label=False)]
    return line_figure(
        series,
        title="Learning rate",
        description="The learning rate of each step.",
        caption="The same in all runs." if shared else "",
        y_label=f"learning rate, in units of {unit:g}",
        height=170,
        y_scales=("linear",),
        legend=not shared,
        **_aligned(outcomes),
    )


def update_figure(outcomes: Sequence[Outcome], styles: Sequence[Style]) -> Markup | None:
    """The size of updates against what a grid resolves; None where the monitor measured none."""
    series = []
    for outcome, style in zip(outcomes, styles, strict=True):
        curve = half_steps(outcome)
        if len(curve) > 1:
            series.append(Series(outcome.label, curve.steps, curve.values, style, ""))
    if not series:
        return None
    return line_figure(
        series,
        title="Update over half a grid step",
        description="Median over layers of the median update over half the grid's spacing at the median weight.",
        caption="Median over layers of the median attempted update, in halves of the grid's spacing at the median weight. "
        "Below 1, rounding to nearest loses most updates; stochastic rounding keeps their mean at any size.",
        y_label="update over half a grid step, as a ratio",
        height=260,
        y_scales=("log",),
        y_axis=axis_over([*(s.y for s in series), np.array([0.8, 1.25])], log=True),
        y_line=1.0,
        formats={o.label: o.run.format for o in outcomes},
        **_aligned(outcomes),
    )


def _aligned(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What puts a chart's steps under those of the losses."""
    last = max((o.metrics.last_step or 0 for o in outcomes), default=0)
    first = 0 if any(len(o.metrics.validation) and o.metrics.validation.steps[0] == 0 for o in outcomes) else 1
    return {"x_span": (first, max(last, first + 1)), "beside": [o.label for o in outcomes]}


def half_steps(outcome: Outcome) -> Curve:
    """Median over layers of `half_steps` at each monitored step."""
    by_step: dict[int, list[float]] = {}
    for record in outcome.metrics.monitor:
        value = as_number(record.get("half_steps"))
        if value is not None and value > 0:
            by_step.setdefault(int(record["step"]), []).append(value)
    steps = sorted(by_step)
    return Curve(np.array(steps, dtype=float), np.array([float(np.median(by_step[s])) for s in steps]))


def trouble_figures(outcomes: Sequence[Outcome], same: Mapping[str, str]) -> list[Markup]:
    """Per damaged run: its layers over time, those first that first lost half of their numbers.

    Args:
        same: labels of runs that are another one to the last bit, which are left out.
    """
    shown = damaged([outcome for outcome in outcomes if outcome.label not in same])
    drawn = [_trouble_figure(o) for o in shown[:MOST_MAPS] if o.metrics.monitor and o.run.max_steps]
    return [one for one in drawn if one is not None]


def _trouble_figure(outcome: Outcome) -> Markup | None:
    steps = outcome.run.max_steps
    assert steps, "the caller draws no others"
    history = layer_history(outcome.metrics.monitor, steps)
    rows = order_of_trouble(history)
    if not rows:
        return None
    shown = rows[:MOST_ROWS]
    values = np.stack([history[key] for key in shown])
    layers = list(dict.fromkeys(layer for _, _, layer in shown))
    names, start = told_apart(layers)
    short = dict(zip(layers, names, strict=True))
    show = partial(in_unit, unit=find_metric("stall").unit)  # type: ignore[union-attr]
    width = steps / BUCKETS
    first = _first(values[0])
    assert first is not None, "rows are those with a beginning"
    began = f"; first {_name(*shown[0])}, by step {count(round((first + 1) * width))}"
    strips = heat_strips(
        [_name(metric, role, short[layer]) for metric, role, layer in shown],
        values,
        ramp=Ramp(0.0, 1.0),
        title=f"{outcome.label}: share of numbers lost",
        description=f"Share of numbers lost per layer and role over training{began}.",
        x_ends=("step 1", f"step {count(steps)}"),
        words=show,
        in_full=[_name(*key) for key in shown],
    )
    others = len(_measured(history)) - len(rows)
    more = [f"{plural(len(rows) - len(shown), 'more row')} not drawn"] if len(rows) > len(shown) else []
    more += [f"{plural(others, 'other')} never lost half"] if others else []
    more += [f'a leading "…" stands for "{start}"'] if start else []
    caption = f"Rows: a layer and what it lost, in the order in which they first lost half{began}." + (
        f" {'; '.join(more)}." if more else ""
    )
    return figure(outcome.label, strips, caption, extra=ramp_legend("none lost", "all lost"))


def order_of_trouble(history: LayerHistory) -> list[tuple[str, str, str]]:
    """Keys of what lost half of its numbers at some time, by when it first did; ties by how much is lost in all."""
    found = []
    for key in _measured(history):
        first = _first(history[key])
        if first is not None:
            found.append((first, -float(np.nansum(history[key])), key))
    return [key for _, _, key in sorted(found)]


def _measured(history: LayerHistory) -> list[tuple[str, str, str]]:
    lost = {row.name for row in metrics() if row.lost}
    return [key for key in history if key[0] in lost]


def _first(values: np.ndarray) -> int | None:
    above = np.flatnonzero(np.nan_to_num(values) >= TROUBLE)
    return int(above[0]) if len(above) else None


def _name(metric: str, role: str, layer: str) -> str:
    """ "blocks.0.mlp.up stall", "head dy underflow": short, as a phone has little room beside a map."""
    return " ".join([layer, *([SYMBOLS[role]] if role in SYMBOLS else []), metric])


def under_the_loss(outcomes: Sequence[Outcome], styles: Sequence[Style]) -> list[Markup]:
    """What stands under the loss: the learning rate, and updates against the grid."""
    return [one for one in (update_figure(outcomes, styles), rate_figure(outcomes, styles)) if one is not None]
