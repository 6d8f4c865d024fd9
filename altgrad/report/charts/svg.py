"""Builds SVG and HTML elements as escaped markup, and path data from arrays.

Charts are responsive without scripts: a chart is an `<svg>` whose padding holds the axis labels and whose content box is
the plot. Text and grid lines sit in it at percentages; curves sit in a nested viewport with `viewBox="0 0 1000 1000"`
that is stretched to fill it (`preserveAspectRatio="none"`), their strokes kept at screen width by `vector-effect`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from markupsafe import Markup, escape

UNIT = 1000
"""Side of the stretched viewBox that curves are drawn in."""


def el(tag: str, *children: Any, **attributes: Any) -> Markup:
    """`<tag attr="...">children</tag>`. Strings are escaped; None attributes are left out; `class_`, `data_x` -> class,
    data-x."""
    parts = [f"<{tag}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-") if key not in _CAMEL else _CAMEL[key]
        parts.append(f' {name}=""' if value is True else f' {name}="{escape(_plain(value))}"')
    inner = "".join(str(escape(child)) for child in children if child is not None)
    return Markup("".join(parts) + (f">{inner}</{tag}>" if inner or tag not in _VOID else "/>"))


_CAMEL = {"viewBox": "viewBox", "preserveAspectRatio": "preserveAspectRatio"}
_VOID = {"line", "path", "rect", "circle", "use", "br", "hr", "input"}


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


_NAME = re.compile(r"[A-Za-z]\w*(?:[._/]\w[\w-]*)+")
_JOINT = re.compile(r"([._/])(?=\w)")


_LONG = 14


def breakable(text: str) -> Markup:
    """`text`, escaped; a dotted or underscored name of more than 14 characters may be broken at its joints, and only there."""

    def joined(name: re.Match[str]) -> str:
        return _JOINT.sub(r"\1<wbr>", name[0]) if len(name[0]) > _LONG else name[0]

    return Markup(_NAME.sub(joined, str(escape(text))))


def stretched(*children: Any, **attributes: Any) -> Markup:
    """The nested viewport for curves: 0..1000 in both directions, y downwards, filling its parent."""
    return el(
        "svg",
        *children,
        viewBox=f"0 0 {UNIT} {UNIT}",
        preserveAspectRatio="none",
        width="100%",
        height="100%",
        **attributes,
    )


def framing(top: int, plot_height: int, bottom: int = 42, **room: float) -> str:
    """Inline style of a chart's `<svg>`: the height of its plot and the room above and below it, in px.

    `room` ("left", "right") is the room at the sides on a wide page; narrow pages have less, by the style sheet.
    """
    sides = "".join(f"--wide-{side}:{px:.0f}px;" for side, px in room.items())
    return f"{sides}--top:{top}px;--bottom:{bottom}px;height:{top + plot_height + bottom}px"


def text_width(texts: Iterable[str], font_px: float = 12.5) -> float:
    """About how wide the longest of `texts` is in a bold sans serif, in px."""
    return max((0.64 * font_px * len(text) for text in texts), default=0.0)


def path_data(x: np.ndarray, y: np.ndarray) -> str:
    """Path through the points (fractions 0..1, y upwards); non-finite points are gaps; a lone point is a dot."""
    good = np.isfinite(x) & np.isfinite(y)
    if not good.any():
        return ""
    px, py = _pixels(x, False), _pixels(y, True)
    starts = good & ~np.concatenate([[False], good[:-1]])
    ends = good & ~np.concatenate([good[1:], [False]])
    parts = []
    for i in np.flatnonzero(good):
        parts.append(f"{'M' if starts[i] else 'L'}{px[i]} {py[i]}")
        if starts[i] and ends[i]:
            parts.append("h0")
    return "".join(parts)


def dots_data(x: np.ndarray, y: np.ndarray) -> str:
    """Path of zero-length strokes, which round line caps draw as dots of the stroke's width."""
    good = np.isfinite(x) & np.isfinite(y)
    return "".join(f"M{px} {py}h0" for px, py in zip(_pixels(x[good], False), _pixels(y[good], True), strict=True))


def band_data(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """Closed areas between `low` and `high`, one per stretch without gaps."""
    good = np.isfinite(x) & np.isfinite(low) & np.isfinite(high)
    px, top, bottom = _pixels(x, False), _pixels(high, True), _pixels(low, True)
    parts = []
    for stretch in _stretches(good):
        there = "L".join(f"{px[i]} {top[i]}" for i in stretch)
        back = "L".join(f"{px[i]} {bottom[i]}" for i in reversed(stretch))
        parts.append(f"M{there}L{back}Z")
    return "".join(parts)


def _stretches(good: np.ndarray) -> list[list[int]]:
    out: list[list[int]] = []
    for i in np.flatnonzero(good):
        if out and out[-1][-1] == i - 1:
            out[-1].append(int(i))
        else:
            out.append([int(i)])
    return out


def _pixels(fraction: np.ndarray, flip: bool) -> list[str]:
    """Fractions -> viewBox coordinates with one decimal; far-off values are held near, as renderers overflow."""
    with np.errstate(invalid="ignore"):
        scaled = np.clip((1 - fraction if flip else fraction) * UNIT, -5 * UNIT, 6 * UNIT)
    return [f"{v:.1f}".removesuffix(".0") if np.isfinite(v) else "" for v in scaled]


def script_json(value: Any) -> Markup:
    """JSON that is safe inside a script element; non-finite numbers become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
