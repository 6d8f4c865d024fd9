"""Numbers as records spell them: JSON has no NaN and no infinity, so those are the texts "nan", "inf" and "-inf"."""

from __future__ import annotations

import math
from typing import Any

_NON_FINITE = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "+inf": math.inf,
    "infinity": math.inf,
    "-infinity": -math.inf,
}


def jsonable(content: Any) -> Any:
    """`content` with non-finite floats as text; keys become text, tuples lists."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, dict):
        return {str(key): jsonable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [jsonable(value) for value in content]
    return content


def as_number(value: Any) -> float | None:
    """JSON value -> float; "nan", "inf", "-inf" are floats; anything else that is no number of float64 is None."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return None
    return _NON_FINITE.get(value.lower()) if isinstance(value, str) else None


def as_whole(value: Any) -> int | None:
    """JSON value -> int where it is a finite number; fractions are cut off."""
    number = as_number(value)
    return int(number) if number is not None and math.isfinite(number) else None
