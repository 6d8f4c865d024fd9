"""Heat maps: values in cells as a table of colours, and rows over time as stretched strips.

Colours are ten levels of one ramp that grows in contrast to the paper, light and dark; the number itself is printed in the
cell where there is room, and read out on hover where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from altgrad.report.charts.svg import UNIT, breakable, el, framing, stretched, text_width
from altgrad.report.numbers import number
from altgrad.report.theme import HEAT_LEVELS


@dataclass(frozen=True)
class Ramp:
    """Maps [lo, hi] onto the levels; values outside take the end levels, NaN takes none."""

    lo: float
    hi: float

    def level(self, values: np.ndarray | float) -> np.ndarray:
        """Level 0..9 as int, -1 for NaN."""
        values = np.asarray(values, dtype=np.float64)
        span = (self.hi - self.lo) or 1.0
        with np.errstate(invalid="ignore"):
            level = np.clip(np.floor((values - self.lo) / span * HEAT_LEVELS), 0, HEAT_LEVELS - 1)
        return np.where(np.isnan(values), -1, level).astype(int)


@dataclass(frozen=True)
class Cell:
    """One cell of a heat table: what it is shaded by, and what it says; without a value it is not shaded."""

    value: float | None
    text: str
    note: str = ""
    failed: bool = False
    chosen: bool = False
    """Framed."""


def heat_table(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Cell]],
    *,
    caption: str,
    corner: str = "",
    among: Sequence[float] = (),
) -> Markup:
    """An HTML table whose cells are shaded by the order of their values (one outlier would swallow a ramp of values); the
    number stays readable in each. Tables that share `among`, the values of all of them, share their shades."""
    values = [*among, *(c.value for line in cells for c in line if c.value is not None and np.isfinite(c.value))]
    ascending = np.unique(values)
    head = el("tr", el("th", corner, scope="col"), *(el("th", breakable(c), scope="col") for c in columns))
    body = []
    for name, line in zip(rows, cells, strict=True):
        tds = []
        for cell in line:
            level = _rank_level(cell.value, ascending)
            kind = "failed" if cell.failed else f"h{level}" if level >= 0 else "none"
            note = el("small", cell.note) if cell.note else None
            tds.append(el("td", el("span", cell.text), note, class_=f"cell {kind}{' chosen' if cell.chosen else ''}"))
        body.append(el("tr", el("th", breakable(name), scope="row"), *tds))
    table = el("table", el("thead", head), el("tbody", *body), class_="heat-table", aria_label=caption or corner)
    scroll = el("div", table, class_="table-scroll", tabindex="0", role="region", aria_label=caption or corner)
    return el(
        "div", el("p", caption, class_="note") if caption else None, scroll, class_="heat" if len(rows) < 20 else None
    )


def _rank_level(value: float | None, ascending: np.ndarray) -> int:
    """Level of a value by its place among the table's distinct values; -1 for none."""
    if value is None or not np.isfinite(value):
        return -1
    place = int(np.searchsorted(ascending, value))
    return round(place / max(1, len(ascending) - 1) * (HEAT_LEVELS - 2))


def heat_strips(
    names: Sequence[str],
    values: np.ndarray,
    *,
    ramp: Ramp,
    title: str,
    description: str,
    x_ends: tuple[str, str],
    row_height: int = 13,
    words: Callable[[float], str] = number,
    in_full: Sequence[str] = (),
) -> Markup:
    """Rows over time: `values` is [rows, buckets]; NaN leaves the paper showing. Equal neighbours share one rectangle.
    `words` prints a value; pointing at a cell shows the range of its level, at a name the one `in_full`."""
    rows, buckets = values.shape
    levels = ramp.level(values)
    width, height = UNIT / max(buckets, 1), UNIT / max(rows, 1)
    paths = []
    for level in range(HEAT_LEVELS):
        parts = []
        for r in range(rows):
            for start, stop in _runs(levels[r] == level):
                parts.append(
                    f"M{start * width:.1f} {r * height:.1f}H{stop * width:.1f}v{height:.2f}H{start * width:.1f}Z"
                )
        if parts:
            low, high = (ramp.lo + (level + i) * (ramp.hi - ramp.lo) / HEAT_LEVELS for i in (0, 1))
            said = el("title", f"{words(low)} to {words(high)}")
            paths.append(el("path", said, class_=f"h{level}", d="".join(parts)))
    full = [el("title", a) if a != b else None for a, b in zip(in_full or names, names, strict=True)]
    labels = [
        el(
            "text",
            title,
            name,
            class_="row-name",
            x="0",
            y=(i + 0.5) * row_height,
            dx="-8",
            dy="3.5",
            text_anchor="end",
        )
        for i, (name, title) in enumerate(zip(names, full, strict=True))
    ]
    ends = [
        el("text", x_ends[0], class_="tick", x="0", y="100%", dy="15"),
        el("text", x_ends[1], class_="tick", x="100%", y="100%", dy="15", text_anchor="end"),
    ]
    total = rows * row_height
    plot = el(
        "g",
        stretched(*paths, class_="cells"),
        *labels,
        *ends,
        el("rect", class_="hit", width="100%", height="100%"),
        class_="plot",
    )
    return el(
        "svg",
        el("title", title),
        el("desc", description),
        plot,
        class_="chart strips",
        role="img",
        aria_label=f"{title}. {description}",
        style=framing(2, total, 22, left=12 + text_width(names, 10.5)),
    )


def ramp_legend(low: str, high: str) -> Markup:
    """The ramp with its end values."""
    cells = [el("rect", class_=f"h{i}", x=i * 8, y=0, width=8, height=10) for i in range(HEAT_LEVELS)]
    bar = el("svg", *cells, width=8 * HEAT_LEVELS, height=10, viewBox=f"0 0 {8 * HEAT_LEVELS} 10", aria_hidden="true")
    return el("span", el("span", low), bar, el("span", high), class_="ramp")


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
