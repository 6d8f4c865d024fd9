"""Figures: a chart with its heading, legend, switches, caption and the data that its hover read-out shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from altgrad.report.charts.axes import Axis
from altgrad.report.charts.glyphs import bit_strip, line_sample
from altgrad.report.charts.lines import Mark, Series, line_chart
from altgrad.report.charts.svg import el, script_json


def line_figure(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    caption: str = "",
    x_label: str = "step",
    y_label: str = "",
    marks: Sequence[Mark] = (),
    height: int = 380,
    y_top: float | None = None,
    y_axis: Axis | None = None,
    y_line: float | None = None,
    y_scales: Sequence[str] = ("linear", "log"),
    x_span: tuple[float, float] | None = None,
    beside: Sequence[str] = (),
    legend: bool = True,
    group_notes: dict[str, str] | None = None,
    formats: dict[str, str] | None = None,
) -> Markup:
    """A line chart with everything around it. The first of `y_scales` is shown; a switch offers the others.

    `y_line` is a value that is drawn across. Roles ("train", "validation") found in the series get a switch of their
    own. `formats` maps a group to the format whose bits the legend draws; `group_notes` adds words to a legend entry.
    """
    charts = [
        el(
            "div",
            line_chart(
                series,
                title=title,
                description=description,
                x_label=x_label,
                y_label=y_label,
                log_y=scale == "log",
                marks=marks,
                height=height,
                y_top=y_top,
                y_axis=y_axis,
                y_line=y_line,
                x_span=x_span,
                beside=beside,
            ),
            class_="scale",
            data_scale=scale,
            hidden=i > 0,
        )
        for i, scale in enumerate(y_scales)
    ]
    roles = list(dict.fromkeys(s.role for s in series if s.role))
    switches = []
    if len(roles) > 1:
        switches.append(_switch("show", ["both", *roles], "role"))
    if len(y_scales) > 1:
        switches.append(_switch("axis", list(y_scales), "scale"))
    head = el("div", el("h3", title), el("div", *switches, class_="switches"), class_="figure-head")
    readout = el("div", class_="readout", hidden=True)
    heading = el("div", el("span", y_label, class_="y-label"), class_="y-head") if y_label else None
    return el(
        "figure",
        head,
        _legend(series, group_notes or {}, formats or {}) if legend else None,
        heading,
        el(
            "div",
            *charts,
            readout,
            class_="stage",
            tabindex="0",
            role="group",
            aria_label=f"{title}: read-out by arrow keys",
        ),
        el("figcaption", caption) if caption else None,
        el("script", _data(series, x_label), type="application/json", class_="figure-data"),
        class_="figure line-figure",
    )


def figure(title: str, chart: Markup, caption: str = "", *, extra: Markup | None = None) -> Markup:
    """Any chart with a heading and a caption."""
    head = el("div", el("h3", title), extra, class_="figure-head")
    return el("figure", head, chart, el("figcaption", caption) if caption else None, class_="figure")


def _switch(label: str, options: Sequence[str], kind: str) -> Markup:
    buttons = [
        el("button", option, type="button", data_switch=kind, data_value=option, aria_pressed="false" if i else "true")
        for i, option in enumerate(options)
    ]
    return el(
        "span", el("span", label, class_="switch-label"), *buttons, class_="switch", role="group", aria_label=label
    )


def _legend(series: Sequence[Series], notes: dict[str, str], formats: dict[str, str]) -> Markup:
    first: dict[str, Series] = {}
    for s in series:
        if s.group not in first or first[s.group].faint:
            first[s.group] = s
    items = []
    for group, s in first.items():
        note = el("small", notes[group]) if group in notes else None
        items.append(
            el(
                "button",
                line_sample(s.style),
                el("span", group, class_="legend-name"),
                bit_strip(formats.get(group, group)),
                note,
                type="button",
                class_=f"legend-item {s.style.css}",
                data_group=group,
                aria_pressed="true",
                title=f"Click to hide or show {group}; shift-click to show it alone",
            )
        )
    return el("div", *items, class_="legend", role="group", aria_label="Series")


def _data(series: Sequence[Series], x_label: str) -> Markup:
    rows = [
        {
            "g": s.group,
            "r": s.role,
            "c": s.style.css,
            "x": _compact(s.x),
            "y": s.y,
            **({"lo": s.low, "hi": s.high} if s.show_band and s.low is not None else {}),
        }
        for s in series
    ]
    return script_json({"x": x_label, "series": rows})


def _compact(x: np.ndarray) -> list:
    return [int(v) if float(v).is_integer() else float(v) for v in x]
