"""The text of a cast, such as "E4M3(stochastic,saturate)": the format, and in parentheses what differs from the defaults."""

from __future__ import annotations

from typing import Any

from altgrad.errors import FormatError, OptionError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.formats.scalar import FloatFormat


def written(cast: Any) -> str:
    """The text of a cast, which `Cast.parse` reads."""
    words = [
        (cast.rounding is not Rounding.NEAREST_EVEN, cast.rounding.value),
        (cast.overflow is not Overflow.NATIVE, cast.overflow.value),
        (not cast.subnormals, "no_subnormals"),
        (cast.clamp, "clamp"),
        (cast.random_bits != 24, f"random_bits={cast.random_bits}"),
        (cast.axis != -1, f"axis={cast.axis}"),
        (cast.pad, "pad"),
    ]
    shown = ",".join(word for there, word in words if there)
    name = _format_text(cast.format)
    return f"{name}({shown})" if shown else name


def _format_text(fmt: FloatFormat | BlockFormat) -> str:
    """The format's name where the catalog has it under that name, else its facts."""
    try:
        known = get_format(fmt.name) == fmt
    except FormatError:
        known = False
    return fmt.name if known else fmt.spec


_WORDS: dict[str, tuple[str, Any]] = {
    **{mode.value: ("rounding", mode) for mode in Rounding},
    **{policy.value: ("overflow", policy) for policy in Overflow},
    "no_subnormals": ("subnormals", False),
    "clamp": ("clamp", True),
    "pad": ("pad", True),
}


def option(word: str) -> tuple[str, Any]:
    """(field, value) of a word in the parentheses.

    Raises:
        OptionError: it names no option.
    """
    word = word.strip()
    name, equals, number = word.partition("=")
    if equals and name in ("random_bits", "axis") and number.lstrip("-").isdecimal():
        return name, int(number)
    if word not in _WORDS:
        raise OptionError(f"{word!r} is no option of a cast; use random_bits=N, axis=N, {', '.join(_WORDS)}")
    return _WORDS[word]
