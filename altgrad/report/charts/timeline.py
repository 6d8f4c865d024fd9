"""Failure timelines: one row per setting, a cross where each run's collapse began, a ring where a format was shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from altgrad.report.charts.axes import Axis
from altgrad.report.charts.svg import el, framing, text_width
from altgrad.report.theme import Style

ROW = 34


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
    for position, label in axis.ticks(6):
        x = f"{100 * position:.3f}%"
        parts.append(el("line", class_="grid", x1=x, x2=x, y1="0", y2="100%"))
        parts.append(el("text", label, class_="tick", x=x, y="100%", dy="17", text_anchor="middle"))
    parts.append(el("text", "step", class_="axis-label", x="100%", y="100%", dy="35", text_anchor="end"))
    for i, row in enumerate(rows):
        parts.append(_row(row, (i + 0.5) * ROW, axis))
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
            left=18 + text_width(r.name for r in rows),
            right=18 + text_width((r.text for r in rows), 11.5),
        ),
    )


def _row(row: TimelineRow, y: float, axis: Axis) -> Markup:
    parts = [
        el("line", class_="life", x1="0", x2="100%", y1=y, y2=y),
        el("text", row.name, class_="row-name", x="0", y=y, dx="-12", dy="4", text_anchor="end"),
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
