"""A format in words and pictures: its facts, where its values lie, and which formats are one grid under scaling."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from altgrad.formats.scalar import FloatFormat, Specials

_SPECIALS = {
    Specials.NONE: "none: every code is a number",
    Specials.NAN_ONLY: "NaN at the all-ones code, no inf",
    Specials.IEEE: "inf and NaN as IEEE 754",
    Specials.FNUZ: "one NaN at the code of -0, no -0, no inf",
    Specials.P3109: "one NaN at the code of -0, no -0, inf at the largest codes",
}
_BARS = " ▁▂▃▄▅▆▇█"


def number(value: float, digits: int = 10) -> str:
    """A value in `digits` significant digits: powers of two outside 1/4 .. 2^17 as 2^k, far values as m x 2^k (m cut)."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = math.frexp(abs(value))
    sign = "-" if value < 0 else ""
    if mantissa == 0.5 and not -2 <= exponent - 1 <= 17:
        return f"{sign}2^{exponent - 1}"
    if -14 <= exponent <= 20:
        return f"{value:.{digits}g}"
    cut = math.floor(2 * mantissa * 10**3) / 10**3  # rounding up would read as the next power of two
    return f"{sign}{cut:g} x 2^{exponent - 1}"


def facts(fmt: FloatFormat) -> list[tuple[str, str]]:
    """(label, text) pairs that say all there is to know about a scalar format."""
    signed = "1 sign, " if fmt.signed else "unsigned, "
    rows = [
        ("bits", f"{fmt.bits} ({signed}{fmt.exponent_bits} exponent, {fmt.mantissa_bits} mantissa)"),
        ("bias", "none: a uniform grid" if fmt.bias is None else str(fmt.bias)),
        ("specials", _SPECIALS[fmt.specials]),
        ("max", number(fmt.max)),
        ("min normal", number(fmt.min_normal)),
        ("min subnormal", number(fmt.min_subnormal)),
        (
            "spacing at 1",
            number(fmt.ulp(1.0)) if fmt.max >= 1 and fmt.has_zero else "1 is beyond max" if fmt.max < 1 else "-",
        ),
        ("spacing at max", number(fmt.ulp(fmt.max))),
        ("dynamic range", f"{20 * math.log10(fmt.max / fmt.min_subnormal):.1f} dB, {binades(fmt)} binades"),
    ]
    if fmt.magnitude_bits <= 18:
        rows.append(("finite values", f"{fmt.number_of_values}"))
    rows.append(("negative zero", "yes" if fmt.has_negative_zero else "no"))
    if fmt.aliases:
        rows.append(("also named", ", ".join(fmt.aliases)))
    rows.append(("source", fmt.source))
    if fmt.note:
        rows.append(("note", fmt.note))
    return rows


def binades(fmt: FloatFormat) -> int:
    """Number of powers of two between the smallest and the largest positive value, both counted."""
    return math.frexp(fmt.max)[1] - math.frexp(fmt.min_subnormal)[1] + 1


def density_chart(fmt: FloatFormat, width: int = 64) -> list[str]:
    """Where the positive values lie: a bar per binade (or per group of binades) whose height is the log of their count.

    Returns:
        Lines of text: the bars, and an axis labelled with powers of two.
    """
    magnitudes = fmt.magnitudes()
    exponents = np.frexp(magnitudes[magnitudes > 0])[1] - 1
    low, high = int(exponents.min()), int(exponents.max())
    per_column = -(-(high - low + 1) // width)
    columns = -(-(high - low + 1) // per_column)
    repeat = max(1, min(4, width // columns))
    counts = np.bincount((exponents - low) // per_column, minlength=columns)
    top = max(int(counts.max()), 1)
    heights = np.ceil(np.log2(1 + counts) / math.log2(1 + top) * (len(_BARS) - 1)).astype(int)
    bars = "".join(_BARS[h] * repeat for h in heights)
    left, right = f"2^{low}", f"2^{high}"
    axis = left + " " * max(1, len(bars) - len(left) - len(right)) + right
    unit = "binade" if per_column == 1 else f"{per_column} binades"
    return [bars, axis, f"values per {unit}: {int(counts.min())} to {top}"]


def equivalent_groups(formats: Iterable[FloatFormat]) -> list[list[FloatFormat]]:
    """Formats that are one grid under scaling: their magnitudes in units of the smallest one agree in every entry.

    Under amax scaling, which divides by `fmt.max`, the members of a group quantize every tensor to the same values.
    Only groups of two or more are returned.
    """
    groups: dict[bytes, list[FloatFormat]] = {}
    for fmt in formats:
        if not fmt.has_zero or fmt.magnitude_bits > 18:
            continue
        magnitudes = fmt.magnitudes()
        groups.setdefault((magnitudes / magnitudes[1]).tobytes(), []).append(fmt)
    return [members for members in groups.values() if len(members) > 1]
