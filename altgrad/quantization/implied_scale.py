"""The scale of a call that names none: scale="amax", and what is said where nothing was given and 1 does not fit.

`quantize(x, "E4M3")` divides by nothing: numbers far below 1 underflow in silence where `scale="amax"` would use the
whole range. So the first calls without a scale look at some of their elements, and one warning is given per process.
"""

from __future__ import annotations

import sys
import warnings

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from altgrad.errors import ScaleError, UnderflowWarning
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.checks import FLOAT_DTYPES, at_hand
from altgrad.quantization.scaling import amax_scale

AMAX = "amax"
LOOKS, SAMPLE = 64, 1024
"""Calls of a process that are looked at, and the most elements of each."""

_looks_left = LOOKS


def resolved_scale(
    x: Tensor, fmt: FloatFormat | BlockFormat | str, scale: Tensor | float | str | None, clamp: bool
) -> tuple[Tensor | float, bool]:
    """(multiplier, clamp) of a call's scale: None is 1; "amax" is `amax_scale(x, fmt)` with finite quotients clamped.

    A block format finds its scales by itself: both are 1 there.

    Raises:
        ScaleError: another text.
    """
    if scale is None:
        if not is_dynamo_compiling() and _looks_left:  # in this order: a traced count would be guarded, and retrace
            _look(x, fmt)
        return 1.0, clamp
    if type(scale) is not str:
        return scale, clamp
    if scale != AMAX:
        raise ScaleError(f'scale {scale!r} is no scale; give a positive number, a tensor, or "amax"')
    return (1.0, clamp) if _is_block(fmt) else (amax_scale(x, fmt), True)  # type: ignore[arg-type]


def _is_block(fmt: FloatFormat | BlockFormat | str) -> bool:
    return isinstance(get_format(fmt), BlockFormat)


_is_block._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, without the compiler


def _look(x: Tensor, fmt: FloatFormat | BlockFormat | str) -> None:
    """Warn where more than half of the sampled nonzero elements lie at or below half of the format's smallest step."""
    global _looks_left
    if not at_hand(x) or x.dtype not in FLOAT_DTYPES or x.device.type != "cpu" or _is_block(fmt):
        return
    if not x.is_contiguous() or not x.numel():
        return
    _looks_left -= 1
    seen = x.detach().view(-1)[:: -(-x.numel() // SAMPLE)].abs()
    found = get_format(fmt)
    half = found.min_subnormal / 2 if found.has_subnormals else found.min_normal / 2
    nonzero = seen > 0
    lost, of = int((nonzero & (seen <= half)).sum()), int(nonzero.sum())
    if 2 * lost > of:
        _looks_left = 0
        warnings.warn(
            f"{lost / of:.0%} of the nonzero elements underflow to 0 in {found} at scale 1, as no scale was given; "
            'give scale="amax" to use the whole range of the format, or scale=1.0 if this is meant',
            UnderflowWarning,
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The `stacklevel` for which `_look` warns of the first line outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("altgrad.quantization"):
        frame, level = frame.f_back, level + 1
    return level
