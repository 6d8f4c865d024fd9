"""Line charts: many series over steps, bands, collapse marks, end labels; linear and logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from altgrad.report.charts.axes import Axis, axis_over
from altgrad.report.charts.svg import band_data, dots_data, el, framing, path_data, stretched, text_width
from altgrad.report.numbers import number
from altgrad.report.text import kept_apart
from altgrad.report.theme import BASELINE, Style


@dataclass(frozen=True)
class Thinned:
    """Bucket centres `x` and per bucket the mean, least and greatest of its finite values (NaN where it has none)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_bucket: int
    """Points in a full bucket; 1 means nothing was thinned."""


def thin(x: np.ndarray, y: np.ndarray, buckets: int) -> Thinned:
    """At most `buckets` buckets of equally many neighbouring points; `x` ascends. The first and last x are kept as the
    ends of the curve."""
    n = len(x)
    per_bucket = max(1, -(-n // max(1, buckets)))
    if per_bucket == 1:
        y = np.asarray(y, dtype=np.float64)
        clean = np.where(np.isfinite(y), y, np.nan)
        return Thinned(np.asarray(x, dtype=np.float64), clean, clean, clean, 1)
    edges = np.arange(0, n, per_bucket)
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite, edges).astype(np.float64)
    sums = np.add.reduceat(np.where(finite, y, 0.0), edges)
    low = np.minimum.reduceat(np.where(finite, y, np.inf), edges)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), edges)
    some = counts > 0
    mean = np.divide(sums, counts, out=np.full(len(edges), np.nan), where=some)
    centres = np.add.reduceat(np.asarray(x, dtype=np.float64), edges) / np.diff(np.append(edges, n))
    centres[0], centres[-1] = x[0], x[-1]
    return Thinned(centres, mean, np.where(some, low, np.nan), np.where(some, high, np.nan), per_bucket)


MARK_ROW, LABEL_ROW = 16, 15  # px per stacked line of text
MOST_BESIDE = 330  # px at the right for names of curves
PHONE_CHARACTER = 0.024  # width of a character of a mark's label, in widths of a phone's plot


@dataclass(frozen=True)
class Series:
    """One curve. `group` is what the legend toggles; `role` ("train", "validation") what the role switch toggles.

    `low`/`high` give a band around it (seen at all times if `show_band`, else while the series is pointed at).
    `dots` draws the points themselves too; `end_label` writes `group` at the last finite point.
    """

    group: str
    x: np.ndarray
    y: np.ndarray
    style: Style
    role: str = ""
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    show_band: bool = False
    dots: bool = False
    faint: bool = False
    end_label: bool = True


@dataclass(frozen=True)
class Mark:
    """An event at step `x` (and value `y`, if it has one), such as a collapse; drawn in the signal colour."""

    x: float
    label: str
    y: float | None = None
    group: str = ""
    calm: bool = False
    """Drawn in grey: an event that is no failure, such as an intervention."""


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x_label: str = "step",
    y_label: str = "",
    log_y: bool = False,
    marks: Sequence[Mark] = (),
    height: int = 380,
    y_top: float | None = None,
    y_axis: Axis | None = None,
    y_line: float | None = None,
    x_span: tuple[float, float] | None = None,
    beside: Sequence[str] = (),
) -> Markup:
    """The chart as one `<svg>`. Values above `y_top` (linear axes) leave the picture: a line above it says whose and how far.

    `x_span` and `beside` (names that need room at the right) align a chart with one above it.
    """
    xs = [np.array(x_span)] if x_span else [s.x for s in series] + [np.array([m.x for m in marks])]
    x_axis = axis_over(xs, label=x_label, margin=0.0)
    names = kept_apart([*beside, *(s.group for s in series if s.end_label)])
    if y_axis is None:
        shown = [s.y if y_top is None or log_y else np.where(s.y <= y_top, s.y, np.nan) for s in series]
        bands = [b for s in series if s.show_band for b in (s.low, s.high) if b is not None]
        bands = bands if y_top is None or log_y else [np.minimum(b, y_top) for b in bands]
        y_axis = axis_over([*shown, *bands], log=log_y, label=y_label)
    rows = _rows_of(marks, x_axis)
    marked = max(rows, default=-1) + 1
    leaving = _off_scale(series, x_axis, y_axis, marked)
    top = 14 + MARK_ROW * (marked + len(leaving))
    plot_height = height - top - 42
    return el(
        "svg",
        el("title", title),
        el("desc", description),
        el(
            "g",
            *_grid(x_axis, y_axis, y_line),
            stretched(*(_curve(s, x_axis, y_axis) for s in _back_to_front(series)), class_="curves"),
            *(_mark(m, row, x_axis, y_axis) for m, row in zip(marks, rows, strict=True)),
            *leaving,
            *_end_labels(series, x_axis, y_axis, plot_height),
            el("line", class_="cursor", y1="0", y2="100%", x1="0", x2="0"),
            el("rect", class_="hit", width="100%", height="100%"),
            class_="plot",
            data_x=f"{x_axis.lo:.8g},{x_axis.hi:.8g},{int(x_axis.log)}",
            data_y=f"{y_axis.lo:.8g},{y_axis.hi:.8g},{int(y_axis.log)}",
        ),
        class_="chart line-chart",
        role="img",
        aria_label=f"{title}. {description}",
        style=framing(top, plot_height, right=34 + min(MOST_BESIDE, text_width(names))),
        data_scale="log" if log_y else "linear",
    )


def _grid(x_axis: Axis, y_axis: Axis, y_line: float | None) -> list[Markup]:
    parts = []
    for position, label in y_axis.ticks(5):
        y = f"{100 * (1 - position):.3f}%"
        parts.append(el("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        parts.append(el("text", label, class_="tick", x="0", y=y, dx="-8", dy="4", text_anchor="end"))
    across = 0.0 if y_line is None and not y_axis.log else y_line
    if across is not None and y_axis.lo < across < y_axis.hi:
        at = f"{100 * (1 - float(y_axis.at(across))):.3f}%"
        parts.append(el("line", class_="reference", x1="0", x2="100%", y1=at, y2=at))
    for i, (position, label) in enumerate(x_axis.ticks(8)):
        x = f"{100 * position:.3f}%"
        parts.append(el("line", class_="tick-mark", x1=x, x2=x, y1="100%", y2="100%"))
        odd = " sparse" if i % 2 else ""
        parts.append(el("text", label, class_=f"tick{odd}", x=x, y="100%", dy="17", text_anchor="middle"))
    parts.append(el("line", class_="axis", x1="0", x2="100%", y1="100%", y2="100%"))
    parts.append(el("text", x_axis.label, class_="axis-label", x="100%", y="100%", dy="35", text_anchor="end"))
    return parts


def _back_to_front(series: Sequence[Series]) -> list[Series]:
    """Faint ones first; then the rest, dashed over solid so that coinciding curves both show."""
    return sorted(series, key=lambda s: (not s.faint, s.style.slot == BASELINE, bool(s.style.dash)))


def _curve(series: Series, x_axis: Axis, y_axis: Axis) -> Markup:
    x, y = x_axis.at(series.x), y_axis.at(series.y)
    parts = []
    if series.low is not None and series.high is not None:
        low, high = np.maximum(y_axis.at(series.low), -0.5), np.minimum(y_axis.at(series.high), 1.5)
        parts.append(el("path", class_="band" if series.show_band else "band on-focus", d=band_data(x, low, high)))
    parts.append(el("path", class_="line", d=path_data(x, y), stroke_dasharray=series.style.dash or None))
    if series.dots:
        parts.append(el("path", class_="dots", d=dots_data(x, y)))
    names = ["series", series.style.css, *(["faint"] if series.faint else [])]
    return el("g", *parts, class_=" ".join(names), data_group=series.group, data_role=series.role or None)


def _rows_of(marks: Sequence[Mark], x_axis: Axis) -> list[int]:
    """Line (0 nearest the plot) for each mark's label such that no two labels of a line overlap, even on a phone."""
    taken: list[list[tuple[float, float]]] = []
    rows = []
    for mark in marks:
        at = float(x_axis.at(mark.x))
        width = PHONE_CHARACTER * (len(mark.label) + 2)
        start = {"start": at, "middle": at - width / 2, "end": at - width}[_anchor(at, mark.label)]
        stop = start + width
        free = (i for i, line in enumerate(taken) if all(stop <= a or start >= b for a, b in line))
        row = next(free, len(taken))
        if row == len(taken):
            taken.append([])
        taken[row].append((start, stop))
        rows.append(row)
    return rows


def _anchor(at: float, text: str) -> str:
    """Which end of a text stands at a place: the one that keeps it on the page of a phone, else its middle."""
    width = PHONE_CHARACTER * (len(text) + 2)
    fits = {"start": at + width <= 1.05, "end": at - width >= -0.1}
    nearer, other = ("end", "start") if at > 0.5 else ("start", "end")
    return nearer if fits[nearer] else other if fits[other] else "middle"


_BESIDE = {"start": "6", "middle": "0", "end": "-6"}
"""px between a place and the text beside it."""


def _mark(mark: Mark, row: int, x_axis: Axis, y_axis: Axis) -> Markup:
    at = float(x_axis.at(mark.x))
    x = f"{100 * at:.3f}%"
    anchor = _anchor(at, mark.label)
    parts = [
        el("line", class_="mark-line", x1=x, x2=x, y1=-6 - MARK_ROW * row, y2="100%"),
        el(
            "text",
            mark.label,
            x=x,
            y=-8 - MARK_ROW * row,
            dx=_BESIDE[anchor],
            dy="3",
            text_anchor=anchor,
        ),
    ]
    if mark.y is not None and np.isfinite(height := float(y_axis.at(mark.y))) and 0 <= height <= 1:
        cross = el("path", d="M-5 -5L5 5M5 -5L-5 5")
        parts.append(el("svg", cross, x=x, y=f"{100 * (1 - height):.3f}%", overflow="visible", class_="cross"))
    return el("g", *parts, class_="mark calm" if mark.calm else "mark", data_group=mark.group or None)


def _off_scale(series: Sequence[Series], x_axis: Axis, y_axis: Axis, marked: int) -> list[Markup]:
    """One line of text above the plot and its `marked` lines of marks for each group that leaves it."""
    parts: list[Markup] = []
    told = set()
    for s in series:
        finite = np.where(np.isfinite(s.y), s.y, -np.inf)
        above = np.flatnonzero(finite > y_axis.hi)
        if len(above) and s.group not in told:
            told.add(s.group)
            at = float(x_axis.at(s.x[above[0]]))
            said = f"▲ {s.group} leaves the chart, up to {number(float(finite.max()), 3)}"
            anchor = _anchor(at, said)
            text = el(
                "text",
                said,
                class_=f"off-scale {s.style.css}",
                x=f"{100 * at:.2f}%",
                y=-8 - MARK_ROW * (marked + len(parts)),
                dx={"start": "-6", "middle": "0", "end": "6"}[anchor],
                dy="3",
                text_anchor=anchor,
                data_group=s.group,
            )
            parts.append(text)
    return parts


def _end_labels(series: Sequence[Series], x_axis: Axis, y_axis: Axis, plot_height: int) -> list[Markup]:
    """Names at the ends of the curves. Those that end at the right stand in the margin, spread so that none covers
    another, each with a line to its curve; a curve that ends early carries its name where it ends."""
    parts: list[Markup] = []
    margin: list[tuple[float, Series]] = []
    early: list[tuple[float, float]] = []
    named = set()
    for s in series:
        finite = np.flatnonzero(np.isfinite(s.y))
        if not s.end_label or not len(finite) or s.group in named:
            continue
        named.add(s.group)
        end = float(x_axis.at(s.x[finite[-1]]))
        height = float(1 - y_axis.at(s.y[finite[-1]]))
        if end > 0.93:
            margin.append((min(max(height, 0.0), 1.0) * plot_height, s))
        elif 0 <= height <= 1:
            y = height * plot_height
            while any(abs(end - other) < 0.25 and abs(y - taken) < LABEL_ROW for other, taken in early):
                y -= LABEL_ROW
            early.append((end, y))
            text = el("text", s.group, x=f"{100 * end:.2f}%", y=f"{y:.1f}", dx="9", dy="4")
            parts.append(el("g", text, class_=f"end-label early {s.style.css}", data_group=s.group))
    margin.sort(key=lambda pair: pair[0])
    if len(margin) * LABEL_ROW > plot_height:
        return parts
    names = kept_apart([s.group for _, s in margin])
    spread = spread_apart([height for height, _ in margin], LABEL_ROW, 4, plot_height - 4)
    for (height, s), name, y in zip(margin, names, spread, strict=True):
        lead = el("svg", el("path", d=f"M4 {height:.1f}L18 {y:.1f}h6"), x="100%", overflow="visible")
        in_full = el("title", s.group) if name != s.group else None
        text = el("text", in_full, name, x="100%", y=f"{y:.1f}", dx="28", dy="4")
        parts.append(el("g", lead, text, class_=f"end-label {s.style.css}", data_group=s.group))
    return parts


def spread_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in `wanted`'s (ascending) order, at least `gap` apart and in [low, high], moved as little as simple
    pooling does: neighbours that touch move as one block around their mean."""
    blocks: list[list[float]] = []  # [sum of (wanted - offset), count]
    for position in wanted:
        blocks.append([position, 1])
        while len(blocks) > 1 and _start(blocks[-2]) + blocks[-2][1] * gap > _start(blocks[-1]):
            total, n = blocks.pop()
            blocks[-1][0] += total - n * blocks[-1][1] * gap
            blocks[-1][1] += n
    out: list[float] = []
    for block in blocks:
        start = _start(block)
        out += [start + i * gap for i in range(int(block[1]))]
    if out and out[-1] > high:
        shifted = high
        for i in reversed(range(len(out))):
            out[i] = min(out[i], shifted)
            shifted = out[i] - gap
    floor = low
    for i, position in enumerate(out):
        out[i] = max(position, floor)
        floor = out[i] + gap
    return out


def _start(block: list[float]) -> float:
    return block[0] / block[1]
