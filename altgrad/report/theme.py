"""Colours and line styles: which format looks how, in every chart and table, on light and on dark paper.

The eight ways to split eight bits run from cool (bits in the mantissa) to warm (bits in the exponent), so a colour says
something about its format. The hues were searched for the largest distance in OKLab under normal vision, deuteranopia,
protanopia and tritanopia at once (tests hold that distance); dashes and end labels carry the same information without
colour. The signal colour marks collapse and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LIGHT_SERIES = ("#b079f0", "#354aae", "#00818e", "#48a489", "#344d02", "#a95e00", "#d9793f", "#7b3159")
DARK_SERIES = ("#9d63cb", "#7baffc", "#53d7fc", "#3e9780", "#dad68c", "#b5640f", "#e18142", "#f5a8af")
LIGHT = {"paper": "#ffffff", "ink": "#16202a", "signal": "#c8102e"}
DARK = {"paper": "#11171d", "ink": "#e8edf2", "signal": "#ff5a4d"}

LIGHT_HEAT = (
    "#eef3f5",
    "#d7e6ea",
    "#b9d6de",
    "#94c1cf",
    "#6ba9bd",
    "#4a94ad",
    "#277492",
    "#175a7a",
    "#0f4161",
    "#0a2a46",
)
DARK_HEAT = (
    "#1a232b",
    "#1d323e",
    "#204454",
    "#24586c",
    "#2c6f85",
    "#428ba1",
    "#5ba0b3",
    "#80bac8",
    "#aad4dc",
    "#d9eff0",
)
HEAT_LEVELS = len(LIGHT_HEAT)

BASELINE = -1
"""Slot of the unquantized baseline: drawn in ink, thicker than the rest."""

_SLOTS = {"E0M7": 0, "E1M6": 1, "E2M5": 2, "E3M4": 3, "E4M3": 4, "E5M2": 5, "E6M1": 6, "E7M0": 7, "FP32": BASELINE}
_DASHES = ("6 5", "", "2 3", "", "7 3", "", "2 3", "9 3 2 3")
_SAME_COLOUR_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Style:
    """How a series is drawn: its colour slot (0..7, or BASELINE) and its SVG dash pattern ("" is solid)."""

    slot: int
    dash: str = ""

    @property
    def css(self) -> str:
        """Class that sets `--c`, the series colour."""
        return "s-base" if self.slot == BASELINE else f"s{self.slot}"


def styles_for(formats: Sequence[str]) -> list[Style]:
    """A style for each series, given its format's name. Same format, same colour, then told apart by dashes, as are formats
    for which no colour is left; when all series (but the baseline) share one format, colours tell them apart instead."""
    quantized = [name for name in formats if name.upper() != "FP32"]
    if len(set(quantized)) == 1 and len(quantized) > 1:
        names = iter(range(len(quantized)))
        keys = [name if name.upper() == "FP32" else f"#{next(names)}" for name in formats]
    else:
        keys = list(formats)
    free = [slot for slot in (3, 5, 1, 7, 0, 4, 2, 6) if slot not in {_SLOTS.get(key.upper()) for key in keys}] or [3]
    slots: dict[str, int] = {}
    used: dict[int, int] = {}  # series of a slot so far, of which each takes the next dash
    out = []
    for key in keys:
        known = _SLOTS.get(key.upper())
        if key not in slots:
            extra = len([name for name in slots if name.upper() not in _SLOTS])
            slots[key] = known if known is not None else free[extra % len(free)]
        slot = slots[key]
        repeat = used.get(slot, 0)
        used[slot] = repeat + 1
        dash = "" if slot == BASELINE else _DASHES[slot] if known is not None else ""
        out.append(Style(slot, dash if repeat == 0 else _SAME_COLOUR_DASHES[repeat % 4]))
    return out


def palette_css() -> str:
    """The colours as CSS custom properties for both schemes."""

    def block(base: dict[str, str], series: Sequence[str], heat: Sequence[str]) -> str:
        values = {**base, **{f"s{i}": c for i, c in enumerate(series)}, **{f"h{i}": c for i, c in enumerate(heat)}}
        return "".join(f"--{name}:{value};" for name, value in values.items())

    classes = "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(len(LIGHT_SERIES))) + ".s-base{--c:var(--ink)}"
    light, dark = block(LIGHT, LIGHT_SERIES, LIGHT_HEAT), block(DARK, DARK_SERIES, DARK_HEAT)
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{classes}"
