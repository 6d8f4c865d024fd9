"""Small marks for number formats and series: the split of the bits, the values on the number line, a legend's line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from altgrad.report.charts.axes import Axis
from altgrad.report.charts.svg import el, framing, stretched
from altgrad.report.numbers import number, plural
from altgrad.report.theme import Style

_SPLIT = re.compile(r"^E(\d)M(\d)$", re.IGNORECASE)


def bit_strip(format_name: str) -> Markup:
    """Eight cells: sign, exponent (filled), mantissa (outlined); empty for names that do not spell a split of 8 bits."""
    match = _SPLIT.match(format_name)
    if not match or int(match[1]) + int(match[2]) != 7:
        return Markup("")
    exponent = int(match[1])
    cells = []
    for i in range(8):
        kind = "sign" if i == 0 else "exponent" if i <= exponent else "mantissa"
        gap = (i > 0) * 2 + (i > exponent) * 2
        inset = 0.5 if kind == "mantissa" else 0.0  # outlines are drawn half outside their rectangle
        x, size = i * 5 + gap + inset, 4 - 2 * inset
        cells.append(el("rect", class_=f"bit {kind}", x=x, y=inset, width=size, height=10 - 2 * inset))
    words = f"1 sign bit, {plural(exponent, 'exponent bit')}, {plural(7 - exponent, 'mantissa bit')}"
    return el(
        "svg",
        el("title", words),
        *cells,
        class_="bits",
        viewBox="0 0 44 10",
        width="44",
        height="10",
        role="img",
        aria_label=words,
    )


def line_sample(style: Style) -> Markup:
    """The line of a series as the legend shows it."""
    line = el("line", x1="1", x2="25", y1="5", y2="5", stroke_dasharray=style.dash or None)
    return el(
        "svg", line, class_=f"sample {style.css}", viewBox="0 0 26 10", width="26", height="10", aria_hidden="true"
    )


def rug(
    rows: Sequence[tuple[str, Style, Sequence[float]]], *, title: str = "The positive values of each format"
) -> Markup:
    """One row per format: a tick at every positive value, on a common logarithmic axis in powers of two."""
    positive = [np.array([v for v in values if np.isfinite(v) and v > 0]) for _, _, values in rows]
    lo = min((float(v.min()) for v in positive if len(v)), default=0.5)
    hi = max((float(v.max()) for v in positive if len(v)), default=2.0)
    axis = Axis(lo / 2, hi * 2, log=True)
    row_height, parts = 34, []
    low, high = int(np.ceil(np.log2(axis.lo))), int(np.floor(np.log2(axis.hi)))
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if (high - low) / n <= 9)
    exponents = [k for k in range(low, high + 1) if k % every == 0]
    for k in exponents:
        x = f"{100 * float(axis.at(2.0**k)):.3f}%"
        parts.append(el("line", class_="grid", x1=x, x2=x, y1="0", y2="100%"))
        label = el("tspan", "2", el("tspan", str(k).replace("-", "−"), dy="-5", class_="super"))
        parts.append(el("text", label, class_="tick", x=x, y="100%", dy="18", text_anchor="middle"))
    for i, ((name, style, _), values) in enumerate(zip(rows, positive, strict=True)):
        top = i * row_height
        at = axis.at(values) * 1000
        ticks = "".join(f"M{x:.1f} 250V850" for x in at)
        parts.append(
            el(
                "svg",
                stretched(el("path", d=ticks, class_="ticks"), class_="curves"),
                el("text", name, class_="rug-name", x="0", y="50%", dx="-10", dy="4", text_anchor="end"),
                y=top,
                height=row_height,
                width="100%",
                overflow="visible",
                class_=style.css,
            )
        )
    described = "; ".join(
        f"{name}: {len(values)} values from {number(float(values.min()), 3)} to {number(float(values.max()), 3)}"
        for (name, _, _), values in zip(rows, positive, strict=True)
        if len(values)
    )
    height = row_height * len(rows)
    return el(
        "svg",
        el("title", title),
        el("desc", described),
        *parts,
        class_="chart rug",
        role="img",
        aria_label=f"{title}. {described}",
        style=framing(4, height, 30),
    )


def sparkline(x: np.ndarray, y: np.ndarray, style: Style | None = None, *, label: str = "", width: int = 96) -> Markup:
    """A word-sized curve with a dot at its last finite value; the scale is its own."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    good = np.isfinite(y)
    if not good.any():
        return Markup("")
    height, pad = 24, 3
    y_low, y_high = float(y[good].min()), float(y[good].max())
    x_low, x_high = float(x.min()), float(x.max())
    px = pad + (width - 2 * pad) * (x - x_low) / ((x_high - x_low) or 1.0)
    py = height - pad - (height - 2 * pad) * (y - y_low) / ((y_high - y_low) or 1.0)
    points, pen_down = [], False
    for i in range(len(x)):
        if good[i]:
            points.append(f"{'L' if pen_down else 'M'}{px[i]:.1f} {py[i]:.1f}")
        pen_down = bool(good[i])
    last = int(np.flatnonzero(good)[-1])
    words = label or f"from {number(float(y[good][0]), 3)} to {number(float(y[last]), 3)}"
    return el(
        "svg",
        el("title", words),
        el("path", d="".join(points)),
        el("circle", cx=f"{px[last]:.1f}", cy=f"{py[last]:.1f}", r="2"),
        class_=f"spark {style.css if style else 's-base'}",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=words,
    )
