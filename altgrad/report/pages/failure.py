"""Draws the failure report of one collapsed run, as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from altgrad.report.charts.figures import line_figure
from altgrad.report.charts.glyphs import bit_strip, sparkline
from altgrad.report.charts.lines import Mark, Series, thin
from altgrad.report.numbers import Unit, count, in_unit, loss, number, percent, plural
from altgrad.report.pages.failure_data import (
    FailureData,
    GradientFacts,
    Intervention,
    LayerColumn,
    LayerRow,
    LossAround,
    RunFacts,
    Trend,
    VerdictFacts,
)
from altgrad.report.pages.page import render_markdown, render_page
from altgrad.report.tables import Column, Table, TableCell
from altgrad.report.text import role_words
from altgrad.report.theme import styles_for
from altgrad.report.verdicts import evidence_words, past_tense

__all__ = [
    "FailureData",
    "GradientFacts",
    "Intervention",
    "LayerColumn",
    "LayerRow",
    "LossAround",
    "RunFacts",
    "Trend",
    "VerdictFacts",
    "render_failure",
]

NOT_MEASURED = "not measured"
ALARMING = 0.5
"""A share of numbers lost from here on is set in the signal colour."""

_BARS = "▁▂▃▄▅▆▇█"


def render_failure(data: FailureData) -> tuple[str, str]:
    """(html, markdown): one self-contained page that opens offline, and the same content as Markdown."""
    moved, still = _parted(data.trends or ())
    columns, alike = _telling(data.layers or (), data.layer_columns)
    content = {
        "title": f"AltGrad: {headline(data)}",
        "kind": "failure report",
        "headline": headline(data),
        "facts": _facts(data),
        "lede": [_sentence(data.verdict.reason)] if data.verdict.reason else [],
        "remarks": list(data.notes),
        "verdict": _verdict(data.verdict),
        "losses": _losses(data.loss),
        "gradient": _gradient(data.gradient),
        "zero_update": _zero_update(data),
        "zero_update_layers": list(data.zero_update_layers or ()),
        "layers": _layer_table(data.layers, columns) if data.layers else None,
        "layers_alike": _alike(data.layers or (), alike),
        "layers_step": data.layers_step,
        "trends": _trend_table(moved) if moved else None,
        "trends_known": bool(data.trends),
        "still": _still(still),
        "interventions": _intervention_table(data.interventions) if data.interventions else None,
        "interventions_known": data.interventions is not None,
        "checkpoints": _checkpoints(data),
        "continue_with": data.continue_with,
        "reproduce": data.reproduce,
        "explain": data.explain,
        "explained_at": data.explained_at,
        "configuration": _facts_table(data.config, "Setting") if data.config else None,
        "environment": _facts_table(data.environment, "Fact") if data.environment else None,
        "not_measured": NOT_MEASURED,
        "footer": "Written by AltGrad when the run ended; nothing is printed that was not measured.",
    }
    html = render_page(
        "failure.html.j2",
        **content,
        loss_figure=_loss_figure(data),
        bits=bit_strip(data.run.format or ""),
        style=styles_for([data.run.format or "FP32"])[0].css,
    )
    return html, render_markdown("failure.md.j2", **content)


def headline(data: FailureData) -> str:
    """What happened, when, in one sentence."""
    run, verdict = data.run, data.verdict
    who = run.format or run.name
    of = f" of {count(run.max_steps)}" if run.max_steps else ""
    preposition = ", since" if verdict.kind == "far_above" else " at"  # which is told of its end
    when = f"{preposition} step {count(verdict.onset_step)}{of}" if verdict.onset_step is not None else ""
    shifts = [i for i in data.interventions or () if i.to_format and i.step <= (verdict.onset_step or 0)]
    if shifts:
        who = f"{who}, shifted to {shifts[-1].to_format} at step {count(shifts[-1].step)},"
    return f"{who} {past_tense(verdict.kind)}{when}."


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _facts(data: FailureData) -> list[str]:
    run = data.run
    named = [("seed", run.seed), ("storage", run.storage), ("rounding", run.rounding)]
    return [run.run_id, *(f"{name} {str(value).replace('_', ' ')}" for name, value in named if value is not None)]


def _verdict(verdict: VerdictFacts) -> list[tuple[str, str]]:
    pairs = [
        ("Kind", verdict.kind),
        ("Onset", f"step {count(verdict.onset_step)}" if verdict.onset_step is not None else NOT_MEASURED),
        ("Detected", f"step {count(verdict.detected_step)}" if verdict.detected_step is not None else NOT_MEASURED),
    ]
    if verdict.metric:
        pairs.append(("Evidence", evidence_words(verdict.metric, verdict.value, verdict.threshold)))
    if verdict.judged_on:
        pairs.append(("Judged on", verdict.judged_on))
    return pairs + list(verdict.evidence)


def _losses(around: LossAround | None) -> list[tuple[str, str]]:
    names = [("before", "Before the onset"), ("at", "At the onset"), ("after", "After it"), ("best", "Best")]
    pairs = []
    for field, name in names:
        point = getattr(around, field) if around else None
        if point is not None:
            pairs.append((name, f"{loss(point[1])} (step {count(point[0])})"))
        elif field != "best":
            pairs.append((name, NOT_MEASURED))
    return pairs


def _gradient(facts: GradientFacts | None) -> list[tuple[str, str]]:
    if facts is None:
        return [("Gradient", NOT_MEASURED)]
    at = [("Step", count(facts.step))] if facts.step is not None else []
    if facts.all_nonfinite:
        return [*at, ("Gradient", "every element is NaN or infinite; sparsity is undefined")]
    threshold = f" (|g| < {number(facts.near_zero_threshold, 2)})" if facts.near_zero_threshold is not None else ""
    rates = [
        ("Exact zeros", facts.zero_frac),
        (f"Zeros and near-zeros{threshold}", facts.near_zero_frac),
        ("NaN or infinite", facts.nonfinite_frac),
    ]
    pairs = [(name, percent(rate) if rate is not None else NOT_MEASURED) for name, rate in rates]
    return [*at, *pairs, *([("Elements", count(facts.elements))] if facts.elements is not None else [])]


def _zero_update(data: FailureData) -> str:
    layers = data.zero_update_layers
    if layers is None:
        return f"Layers whose every attempted update changed nothing: {NOT_MEASURED}."
    of = f" of {plural(data.layers_measured, 'measured layer')}" if data.layers_measured is not None else ""
    if not layers:
        return f"In no layer{of} was every attempted update lost."
    return f"In {count(len(layers))}{of} no attempted update changed a single code:"


def _layer_table(rows: Sequence[LayerRow], metrics: Sequence[LayerColumn]) -> Table:
    columns = [Column("Layer"), Column("Role")]
    columns += [Column(m.heading + (", dB" if m.unit is Unit.DECIBEL else ""), True) for m in metrics]
    body = []
    for row in rows:
        cells = [_metric_cell(metric, row.values.get(metric.name)) for metric in metrics]
        body.append([TableCell(row.layer, sort=row.layer), role_words(row.role), *cells])
    return Table(columns, body)


def _telling(rows: Sequence[LayerRow], columns: Sequence[LayerColumn]) -> tuple[list[LayerColumn], list[LayerColumn]]:
    """Columns that differ between rows, what lost most first, and those of one value throughout."""
    seen = {c.name: [v for row in rows if (v := row.values.get(c.name)) is not None] for c in columns}
    alike = [
        c for c in columns if len(seen[c.name]) > 1 and len(set(seen[c.name])) == 1 and not (c.lost and seen[c.name][0])
    ]
    telling = [c for c in columns if c not in alike]
    telling.sort(key=lambda c: -max(seen[c.name], default=0.0) if c.lost else 1.0)
    return telling, alike


def _alike(rows: Sequence[LayerRow], columns: Sequence[LayerColumn]) -> str:
    """What columns of one value would have said: "Overflow 0%."; "" for none."""
    first = {c.name: next(v for row in rows if (v := row.values.get(c.name)) is not None) for c in columns}
    said = [f"{c.heading} {in_unit(first[c.name], c.unit)}" for c in columns]
    return f"The same wherever it was measured: {', '.join(said)}." if said else ""


def _metric_cell(metric: LayerColumn, value: float | None) -> TableCell:
    text = number(value) if metric.unit is Unit.DECIBEL else in_unit(value, metric.unit)
    alarming = metric.lost and value is not None and value >= ALARMING
    return TableCell(text, sort=_key(value), tone="bad" if alarming else "")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _key(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def _parted(trends: Sequence[Trend]) -> tuple[list[Trend], list[Trend]]:
    """Trends that moved, and those of one value throughout; empty ones are left out."""
    parted: tuple[list[Trend], list[Trend]] = [], []
    for trend in trends:
        if len(trend.values):
            parted[len(set(map(float, trend.values))) == 1].append(trend)
    return parted


def _still(trends: Sequence[Trend]) -> str:
    """What stood still, with its value: "overflow of weight 0 (12 layers)"; "" for nothing."""
    found: dict[tuple[str, str, str], int] = {}
    for trend in trends:
        key = trend.title or _words(trend.name), trend.role or "", _value(trend, trend.values[0])
        found[key] = found.get(key, 0) + 1
    said = [
        f"{name}{f' of {role_words(role)}' if role else ''} {value}" + (f" ({plural(n, 'row')})" if n > 1 else "")
        for (name, role, value), n in found.items()
    ]
    return f"Of one value in all these steps: {', '.join(said)}." if said else ""


def _title(trend: Trend) -> str:
    return trend.title or _words(trend.name).capitalize()


def _value(trend: Trend, value: float) -> str:
    return number(float(value), 3) if trend.unit is Unit.NUMBER else in_unit(float(value), trend.unit)


def _trend_table(trends: Sequence[Trend]) -> Table:
    columns = [
        Column("Diagnostic"),
        Column("Layer"),
        Column("Role"),
        Column("First", True),
        Column("Trend"),
        Column("Last", True),
        Column("Lowest to highest"),
        Column("Steps"),
    ]
    rows = []
    for trend in trends:
        values = np.asarray(trend.values, dtype=np.float64)
        steps = np.asarray(trend.steps, dtype=np.float64)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (np.nan, np.nan)
        rows.append(
            [
                _title(trend),
                trend.layer or "whole model",
                role_words(trend.role or "–"),
                TableCell(_value(trend, values[0]), sort=_key(float(values[0]))),
                TableCell(bars(values), sparkline(steps, values)),
                TableCell(_value(trend, values[-1]), sort=_key(float(values[-1]))),
                TableCell(f"{_value(trend, low)} to {_value(trend, high)}", tone="nowrap"),
                f"{count(steps[0])} to {count(steps[-1])}",
            ]
        )
    return Table(columns, rows, filterable=len(rows) > 15)


def bars(values: np.ndarray, width: int = 16) -> str:
    """A sparkline of block characters, for Markdown; "·" where the value is not finite."""
    if len(values) > width:
        values = thin(np.arange(len(values)), values, width).mean
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "·" * len(values)
    low, span = float(finite.min()), float(np.ptp(finite)) or 1.0
    return "".join(_BARS[int((v - low) / span * 7.999)] if np.isfinite(v) else "·" for v in values)


def _intervention_table(interventions: Sequence[Intervention]) -> Table:
    columns = [Column("Step", True), Column("Intervention"), Column("Detail"), Column("What it changed")]
    rows = [
        [TableCell(count(item.step), sort=item.step), item.kind, item.detail, item.effect or NOT_MEASURED]
        for item in interventions
    ]
    return Table(columns, rows, row_headers=False, sortable=len(rows) > 5)


def _checkpoints(data: FailureData) -> list[tuple[str, str]]:
    pairs = []
    for name, kept in (("Last good state", data.checkpoint_good), ("State at the end", data.checkpoint_collapsed)):
        if kept is None:
            pairs.append((name, "none was kept"))
        else:
            step = f" (step {count(kept[1])})" if kept[1] is not None else ""
            pairs.append((name, f"{kept[0]}{step}"))
    return pairs


def _facts_table(facts: Mapping[str, Any], title: str) -> Table:
    rows = [[key, str(value)] for key, value in _flatten(facts).items()]
    return Table([Column(title), Column("Value")], rows, sortable=False)


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        elif not (isinstance(value, list | tuple) and len(value) > 16):
            flat[f"{prefix}{key}"] = value
    return flat


def _loss_figure(data: FailureData) -> Markup | None:
    if data.loss_steps is None or data.loss_values is None or not len(data.loss_steps):
        return None
    style = replace(styles_for([data.run.format or "FP32"])[0], dash="")
    steps = np.asarray(data.loss_steps, dtype=np.float64)
    values = np.asarray(data.loss_values, dtype=np.float64)
    t = thin(steps, values, 300)
    name = data.run.format or data.run.name
    finite = values[np.isfinite(values)]
    marks = []
    if data.verdict.onset_step is not None:
        before = np.flatnonzero(np.isfinite(values) & (steps <= data.verdict.onset_step))
        at = float(values[before[-1]]) if len(before) else None
        marks.append(Mark(data.verdict.onset_step, f"onset, step {count(data.verdict.onset_step)}", at, name))
    marks += [Mark(i.step, f"{i.kind}, step {count(i.step)}", calm=True) for i in list(data.interventions or ())[:4]]
    tall = len(finite) > 0 and float(finite.max()) > 1.6 * float(finite[:5].max())
    band = (t.low, t.high) if t.per_bucket > 1 else (None, None)
    return line_figure(
        [Series(name, t.x, t.mean, style, "", *band)],
        title="Training loss",
        description=headline(data),
        caption=f"Mean of every {plural(t.per_bucket, 'step')}." if t.per_bucket > 1 else "",
        y_label="cross-entropy, nats per token",
        marks=marks,
        height=340,
        y_scales=("log", "linear") if tall else ("linear", "log"),
    )
