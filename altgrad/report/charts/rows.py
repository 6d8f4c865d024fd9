"""Charts of one row per item on a common axis: estimates with intervals, and when each run's collapse began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from altgrad.report.charts.axes import Axis, axis_over
from altgrad.report.charts.svg import el, framing, text_width
from altgrad.report.text import kept_apart
from altgrad.report.theme import Style

ROW = 34


@dataclass(frozen=True)
class IntervalRow:
    """`low` and `high` may be None: the interval is not known (one seed) and only the dot is drawn. `text` stands at the
    right; `points` are the single observations behind the estimate."""

    name: str
    estimate: float | None
    low: float | None
    high: float | None
    style: Style
    text: str = ""
    points: Sequence[float] = ()


def interval_chart(
    rows: Sequence[IntervalRow],
    *,
    title: str,
    description: str,
    x_label: str,
    reference: float | None = 0.0,
    reference_band: tuple[float, float] | None = None,
    reference_label: str = "",
) -> Markup:
    """The chart; `reference` draws a vertical line (the baseline), `reference_band` its noise floor."""
    everything = [v for r in rows for v in (r.estimate, r.low, r.high, *r.points) if v is not None]
    everything += [v for v in (reference, *(reference_band or ())) if v is not None]
    axis = axis_over([np.array(everything)], label=x_label, margin=0.06)
    parts: list[Markup] = []
    if reference_band:
        left, right = (100 * float(axis.at(v)) for v in reference_band)
        parts.append(el("rect", class_="noise", x=f"{left:.3f}%", width=f"{right - left:.3f}%", y="0", height="100%"))
    parts += _ticks(axis)
    if reference is not None:
        x = f"{100 * float(axis.at(reference)):.3f}%"
        parts.append(el("line", class_="reference", x1=x, x2=x, y1="-4", y2="100%"))
        parts.append(el("text", reference_label, class_="tick reference-label", x=x, y="-9", text_anchor="middle"))
    names = kept_apart([row.name for row in rows])
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        parts.append(_row(row, name, (i + 0.5) * ROW, axis))
    parts.append(el("text", x_label, class_="axis-label", x="100%", y="100%", dy="35", text_anchor="end"))
    height = ROW * len(rows)
    return el(
        "svg",
        el("title", title),
        el("desc", description),
        *parts,
        class_="chart intervals",
        role="img",
        aria_label=f"{title}. {description}",
        style=framing(24, height, left=18 + text_width(names), right=18 + text_width((r.text for r in rows), 11.5)),
    )


def _ticks(axis: Axis) -> list[Markup]:
    """Grid lines with their values; of long ones a phone shows every second, and those at the ends stay on the page."""
    parts = []
    ticks = axis.ticks(6)
    wide = max((len(label) for _, label in ticks), default=0) > 4
    for i, (position, label) in enumerate(ticks):
        x = f"{100 * position:.3f}%"
        anchor = "start" if position < 0.04 else "end" if position > 0.96 else "middle"
        parts.append(el("line", class_="grid", x1=x, x2=x, y1="0", y2="100%"))
        named = "tick sparse" if wide and i % 2 else "tick"
        parts.append(el("text", label, class_=named, x=x, y="100%", dy="17", text_anchor=anchor if wide else "middle"))
    return parts


def _name(full: str, name: str, y: float) -> Markup:
    """A row's name at its left, in full where it is pointed at."""
    in_full = el("title", full) if name != full else None
    return el("text", in_full, name, class_="row-name", x="0", y=y, dx="-12", dy="4", text_anchor="end")


def _row(row: IntervalRow, name: str, y: float, axis) -> Markup:
    parts = [_name(row.name, name, y)]

    def at(value: float) -> str:
        return f"{100 * float(axis.at(value)):.3f}%"

    for point in row.points:
        if np.isfinite(point):
            parts.append(el("circle", class_="point", cx=at(point), cy=y, r="2.5"))
    if row.low is not None and row.high is not None and np.isfinite(row.low) and np.isfinite(row.high):
        parts.append(el("line", class_="interval", x1=at(row.low), x2=at(row.high), y1=y, y2=y))
        for end in (row.low, row.high):
            parts.append(el("line", class_="interval cap", x1=at(end), x2=at(end), y1=y - 5, y2=y + 5))
    if row.estimate is not None and np.isfinite(row.estimate):
        parts.append(el("circle", class_="estimate", cx=at(row.estimate), cy=y, r="5"))
    parts.append(el("text", row.text, class_="row-text", x="100%", y=y, dx="12", dy="4"))
    return el("g", *parts, class_=f"interval-row {row.style.css}", data_group=row.name)


@dataclass(frozen=True)
class TimelineRow:
    """`collapses` are (step, what to say of it); `shifts` the steps at which the format was changed."""

    name: str
    style: Style
    collapses: Sequence[tuple[int, str]]
    shifts: Sequence[int] = ()
    text: str = ""


def timeline_chart(rows: Sequence[TimelineRow], *, last_step: int, title: str, description: str) -> Markup:
    """The chart over steps 0..`last_step`."""
    axis = Axis(0, max(1, last_step))
    parts: list[Markup] = []
    parts += _ticks(axis)
    parts.append(el("text", "step", class_="axis-label", x="100%", y="100%", dy="35", text_anchor="end"))
    names = kept_apart([row.name for row in rows])
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        parts.append(_runs_row(row, name, (i + 0.5) * ROW, axis))
    return el(
        "svg",
        el("title", title),
        el("desc", description),
        *parts,
        class_="chart intervals timeline",
        role="img",
        aria_label=f"{title}. {description}",
        style=framing(
            6,
            ROW * len(rows),
            left=18 + text_width(names),
            right=18 + text_width((r.text for r in rows), 11.5),
        ),
    )


def _runs_row(row: TimelineRow, name: str, y: float, axis: Axis) -> Markup:
    parts = [
        el("line", class_="life", x1="0", x2="100%", y1=y, y2=y),
        _name(row.name, name, y),
        el("text", row.text, class_="row-text", x="100%", y=y, dx="12", dy="4"),
    ]
    for step in row.shifts:
        at = f"{100 * float(axis.at(step)):.3f}%"
        parts.append(el("circle", el("title", f"shift at step {step}"), class_="shift", cx=at, cy=y, r="5"))
    for step, words in row.collapses:
        at = f"{100 * float(axis.at(step)):.3f}%"
        cross = el("path", el("title", words), d="M-5 -5L5 5M5 -5L-5 5")
        parts.append(el("svg", cross, x=at, y=y, overflow="visible", class_="cross"))
    return el("g", *parts, class_=f"timeline-row {row.style.css}")
