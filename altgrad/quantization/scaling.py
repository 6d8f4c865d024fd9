"""Scales: how the multiplier of a tensor or of each channel is found from its amax.

A scale is the multiplier that dequantizes: quantize(x) = scale * round(x / scale). Policies are frozen facts with pure
functions; what they remember is a value that goes in and comes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from altgrad.errors import DtypeError, FormatError, OptionError, ScaleError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import as_option
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.subnormals import unflushed
from altgrad.quantization import powers
from altgrad.quantization.checks import FLOAT_DTYPES, as_float32, traced
from altgrad.quantization.codec import divided
from altgrad.quantization.kernels.choose import load
from altgrad.quantization.memory import detached, is_unusual, readable

_TINY = 2.0**-126  # the smallest normal float32


@unflushed
def amax(x: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Largest magnitude among the finite elements, in float32 (float64 for float64).

    Args:
        x: any floating tensor.
        axis: axis (or axes) that keep an amax of their own, such as 0 for the output channels of a weight [out, in];
            None takes one amax over everything.

    Returns:
        0-d tensor, or x's shape with every other axis of size 1. No finite element, or none at all, gives 0.

    Raises:
        DtypeError: x is no dense floating tensor. OptionError: an axis that x does not have.
    """
    plain = not traced(x)
    if not plain or is_unusual(x):
        x = readable(x)
    if x.dtype not in FLOAT_DTYPES:
        raise DtypeError(f"amax of a tensor of dtype {x.dtype}; cast it to float32, float64, bfloat16 or float16 first")
    work = detached(x)
    if axis is None and plain and x.device.type == "cpu":
        return load("cpu").amax(work)
    if axis is None and plain and x.device.type == "cuda" and x.dtype != torch.float64:
        return load("cuda", "operands").largest(work)
    if isinstance(axis, int) and plain and x.ndim == 2 and x.device.type == "cuda" and x.dtype != torch.float64:
        return load("cuda", "operands").largest_of_channels(work, _kept_axes(axis, 2).pop())
    magnitude = torch.where(torch.isfinite(work), work.abs(), 0)
    magnitude = magnitude.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if axis is None:
        return magnitude.amax() if x.numel() else magnitude.new_zeros(())
    keep = _kept_axes(axis, x.ndim)
    reduced = [d for d in range(x.ndim) if d not in keep]
    if not reduced:
        return magnitude
    if x.numel() == 0:
        return magnitude.new_zeros([n if d in keep else 1 for d, n in enumerate(x.shape)])
    return magnitude.amax(dim=reduced, keepdim=True)


def _kept_axes(axis: int | tuple[int, ...], ndim: int) -> set[int]:
    """The axes as non-negative numbers.

    Raises:
        OptionError: no integers, out of range, or one of them twice.
    """
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    if any(type(a) is not int or not -ndim <= a < ndim for a in axes):
        raise OptionError(f"axis {axis!r} is not within -{ndim}..{ndim - 1}, the axes of a tensor of {ndim} dimensions")
    kept = {a % ndim for a in axes}
    if len(kept) < len(axes):
        raise OptionError(f"axis {axis!r} names one axis of {ndim} dimensions twice")
    return kept


def _largest_value(fmt: FloatFormat | str) -> float:
    """The format's max.

    Raises:
        FormatError: no scalar format.
    """
    found = get_format(fmt)
    if not isinstance(found, FloatFormat):
        raise FormatError(
            f"{found} finds its scales from its blocks; name a scalar format, such as its element {found.element}"
        )
    return found.max


_largest_value._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, without the compiler


@unflushed
def scale_from_amax(amax: Tensor, fmt: FloatFormat | str, *, power_of_two: bool = False) -> Tensor:
    """amax / fmt.max, rounded up to a power of two on demand; amax 0 scales as if amax were 1.

    A quotient below float32's smallest normal number is raised to it, so that dividing by the scale stays exact enough.

    Raises:
        ScaleError: amax is no floating tensor. FormatError: fmt is no scalar format, nor the name of one.
    """
    amax = readable(amax, "amax", ScaleError)
    if not amax.is_floating_point():
        raise ScaleError(f"amax has dtype {amax.dtype}; pass the floating tensor that altgrad.quantization.amax gives")
    scale = divided(torch.where(amax > 0, amax, 1.0), _largest_value(fmt))
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return round_up_to_power_of_two(scale) if power_of_two else scale


def host_scale(largest: float, top: float, power_of_two: bool) -> float:
    """`scale_from_amax` of one float32 amax in Python: the same number, without a tensor for each step of it."""
    # A float64 quotient of two float32 numbers rounds to the float32 quotient.
    scale = max(as_float32((largest if largest > 0 else 1.0) / top), _TINY)
    if not power_of_two or scale == math.inf:
        return scale
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(1.0, min(exponent - (mantissa == 0.5), 127))


def round_up_to_power_of_two(scale: Tensor) -> Tensor:
    """Smallest power of two >= scale, exactly (by frexp), at most 2^127; scale is positive and finite."""
    mantissa, exponent = torch.frexp(scale)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(max=127)
    return powers.power_of_two(exponent).to(scale.dtype)


def amax_scale(
    x: Tensor, fmt: FloatFormat | str, *, axis: int | tuple[int, ...] | None = None, power_of_two: bool = False
) -> Tensor:
    """Current amax scale of x: `scale_from_amax(amax(x, axis), fmt)`; fmt is a scalar format or its name."""
    _largest_value(fmt)
    return scale_from_amax(amax(x, axis), fmt, power_of_two=power_of_two)


def two_level_scale(tensor_amax: Tensor, fmt: BlockFormat) -> Tensor:
    """Tensor scale of a two-level format: amax / (element max * scale max) as float32; amax 0 counts as 1.

    The result is at least float32's smallest normal number.
    """
    largest = torch.where(tensor_amax > 0, tensor_amax, 1.0)
    limits = torch.finfo(torch.float32)
    scale = divided(largest, fmt.element.max * fmt.scale_format.max)
    return scale.clamp(limits.tiny, limits.max).to(torch.float32)


class ScalingPolicy(Protocol):
    """What every policy offers; `clamps` says that finite quotients are clamped to +-max before rounding."""

    clamps: bool
    needs_amax: bool

    def init(self) -> tuple:
        """The state before the first update."""
        ...

    def update(self, amax: Tensor | None, state: tuple, fmt: FloatFormat) -> tuple[Tensor | float, tuple]:
        """(scale for this use, next state); pure."""
        ...


@dataclass(frozen=True)
class NoScaling:
    """Scale 1: the format as it is."""

    clamps = False
    needs_amax = False

    def init(self) -> tuple:
        """Nothing is remembered."""
        return ()

    def update(self, amax: Tensor | None, state: tuple, fmt: FloatFormat) -> tuple[float, tuple]:
        """Scale 1."""
        return 1.0, state


@dataclass(frozen=True)
class StaticScaling:
    """A fixed scale.

    Raises:
        ScaleError: scale is not positive and finite.
    """

    scale: float
    clamps = False
    needs_amax = False

    def __post_init__(self) -> None:
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ScaleError(
                f"static scale {self.scale} is not positive and finite; the scale multiplies codes back to values"
            )

    def init(self) -> tuple:
        """Nothing is remembered."""
        return ()

    def update(self, amax: Tensor | None, state: tuple, fmt: FloatFormat) -> tuple[float, tuple]:
        """The fixed scale."""
        return self.scale, state


class Arithmetic(str, Enum):
    """How a quotient by the scale is computed; the same number where the scale is a power of two."""

    DIVIDE = "divide"  # x / scale with scale = fl(amax / max)
    MULTIPLY = "multiply"  # x * s with s = fl(max / amax), and fl(1 / s) to dequantize: Transformer Engine, torchao


@dataclass(frozen=True)
class CurrentScaling:
    """Amax of the very tensor that is quantized; per tensor, or per index of `axis`.

    Args:
        power_of_two: round the scale up to a power of two.
        arithmetic: divide by the scale, or multiply by its inverse, which is found first.
        floor: what a smaller amax counts as, where the arithmetic multiplies.
    """

    axis: int | tuple[int, ...] | None = None
    power_of_two: bool = False
    arithmetic: Arithmetic = Arithmetic.DIVIDE
    floor: float = 0.0
    clamps = True
    needs_amax = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "arithmetic", as_option(Arithmetic, self.arithmetic))
        if not 0 <= self.floor < math.inf:
            raise OptionError(f"floor {self.floor} of an amax is not a finite number >= 0")
        if self.floor and self.arithmetic is not Arithmetic.MULTIPLY:
            raise OptionError('a floor of the amax belongs to arithmetic="multiply"; dividing counts amax 0 as 1')

    def init(self) -> tuple:
        """Nothing is remembered."""
        return ()

    def update(self, amax: Tensor | None, state: tuple, fmt: FloatFormat) -> tuple[Tensor, tuple]:
        """scale_from_amax of this tensor's amax."""
        assert amax is not None
        return scale_from_amax(amax, fmt, power_of_two=self.power_of_two), state


class DelayedState(NamedTuple):
    """The last amaxes, newest first: float32 of shape [history, *amax.shape], or None before the first update."""

    window: Tensor | None


@dataclass(frozen=True)
class DelayedScaling:
    """Scale from the largest amax of the last `history` uses before this one, times 2^margin.

    A use with fewer than `warm_up` amaxes before it takes its own amax; so does the first. Amaxes are of finite elements,
    so a step that is rolled back restores the state that it was given. Source: FP8 training as in NVIDIA Transformer
    Engine's delayed scaling.
    """

    history: int = 16
    margin: int = 0
    power_of_two: bool = False
    axis: int | tuple[int, ...] | None = None
    warm_up: int = 1
    clamps = False
    needs_amax = True

    def __post_init__(self) -> None:
        if self.history < 1:
            raise OptionError(f"delayed scaling over a history of {self.history}; use at least 1 past amax")
        if not 1 <= self.warm_up <= self.history:
            raise OptionError(f"warm_up {self.warm_up} is outside 1..{self.history}, the history")
        if not -64 <= self.margin <= 64:
            raise OptionError(f"margin {self.margin} is a power of two of headroom; use -64..64")

    def init(self) -> DelayedState:
        """No amax seen yet."""
        return DelayedState(None)

    def update(self, amax: Tensor | None, state: tuple, fmt: FloatFormat) -> tuple[Tensor, DelayedState]:
        """(scale from the window before this use, window with this amax in front)."""
        assert amax is not None
        window = DelayedState(*state).window
        largest = amax if window is None or len(window) < self.warm_up else window.amax(dim=0)
        scale = scale_from_amax(largest * 2.0**self.margin, fmt, power_of_two=self.power_of_two)
        seen = amax.unsqueeze(0)
        if window is None:
            return scale, DelayedState(seen)
        kept = window.narrow(0, 0, min(len(window), self.history - 1))
        return scale, DelayedState(torch.cat([seen, kept]))
