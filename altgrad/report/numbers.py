"""Numbers as people read them: losses, rates, durations, counts. A value that was not measured prints as a dash."""

from __future__ import annotations

import math
from enum import StrEnum

MISSING = "–"


class Unit(StrEnum):
    """What a number counts, which decides how it prints; its value is the word for it."""

    FRACTION = "fraction"
    DECIBEL = "dB"
    NUMBER = ""
    COUNT = "count"
    SECONDS = "s"
    FLAG = "flag"


def in_unit(value: float | None, unit: Unit) -> str:
    """`value` with its unit: a fraction as a percentage, decibels and seconds named, anything else as it is."""
    if value is None or unit in (Unit.NUMBER, Unit.FLAG):
        return number(value)
    if unit is Unit.FRACTION:
        return percent(value)
    if not math.isfinite(value):
        return number(value)
    return {Unit.DECIBEL: lambda v: f"{number(v, 3)} dB", Unit.COUNT: count, Unit.SECONDS: duration}[unit](value)


def number(value: float | None, digits: int = 4) -> str:
    """`value` to `digits` significant digits, plain where that is short, else as a power of ten."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:.{places}f}"
        return _minus(text.rstrip("0").rstrip(".") if "." in text else text)
    mantissa, exponent = f"{value:.{max(0, digits - 2)}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return _minus(f"{mantissa}e{int(exponent)}")


def loss(value: float | None) -> str:
    """A loss in nats: three decimals while it is of ordinary size."""
    if value is None or not math.isfinite(value) or abs(value) >= 1000:
        return number(value, 3)
    return _minus(f"{value:.3f}")


def difference(value: float | None) -> str:
    """A signed difference of losses; exactly zero says "same"."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value == 0:
        return "same"
    text = loss(abs(value))
    return ("+" if value > 0 else "−") + (text if text != "0.000" else number(abs(value), 2))


def percent(value: float | None) -> str:
    """A rate in 0..1 as a percentage; a small nonzero rate is never shown as zero, nor a rate below 1 as 100%."""
    if value is None or math.isnan(value):
        return MISSING if value is None else "NaN"
    scaled = 100 * value
    if scaled < 0:
        text = percent(-value)
        return {"<0.01%": ">−0.01%", ">99.9%": "<−99.9%"}.get(text, f"−{text}")
    if scaled == 0:
        return "0%"
    if scaled < 0.01:
        return "<0.01%"
    if scaled < 1:
        return f"{scaled:.2f}%"
    if 99.95 <= scaled < 100:
        return ">99.9%"
    return f"{scaled:.1f}%" if scaled < 100 else f"{scaled:.0f}%"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(value: float | None) -> str:
    """An integer with thin spaces between thousands."""
    return MISSING if value is None else f"{int(value):,}".replace(",", "\u202f")


def plural(n: float, singular: str, many: str | None = None) -> str:
    """ "1 layer", "2 layers", "8.5 bits"."""
    return f"{count(n) if n == n // 1 else number(n)} {singular if n == 1 else many or singular + 's'}"


def listing(items: list[str], conjunction: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {conjunction} {items[-1]}"


def _minus(text: str) -> str:
    return text.replace("-", "−", 1) if text.startswith("-") else text
