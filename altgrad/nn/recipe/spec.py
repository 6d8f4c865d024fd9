"""Specs: which number format an operand of a GEMM has, which two operands a GEMM multiplies, how a weight is stored.

A linear layer y = x w^T multiplies three times in a training step, and each product has two operands of its own:

    forward       y  = x w^T       input, weight          reduced over the input features
    input_grad    dx = dy w        grad_output, weight    reduced over the output features
    weight_grad   dw = dy^T x      grad_output, input     reduced over the tokens

Equal entries share one quantization; entries that differ are each quantized from the original tensor. A recipe is a
frozen value: it compares, hashes, prints in short form, and its contradictions are refused when it is built.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from typing import Any, TypeVar

from altgrad.errors import AltGradError, OptionError, RecipeError
from altgrad.formats.accumulator import Accumulator
from altgrad.formats.rounding import Overflow, Rounding, as_option
from altgrad.formats.scalar import LISTED_BITS
from altgrad.nn.recipe.scaling_choice import (
    BlockScaling,
    CurrentScaling,
    Scaling,
    as_scaling,
    default_scaling,
    is_block,
    scaling_label,
)
from altgrad.quantization import Cast, FloatFormat, get_format
from altgrad.quantization.hadamard import Hadamard
from altgrad.quantization.mxfp4 import EmaRounding
from altgrad.records.metrics import OPERANDS


def _format_or_none(value):
    """The format, or None where the value means "leave it in the carrier" (None, "FP32")."""
    if value is None:
        return None
    fmt = get_format(value)
    return None if fmt.name == "FP32" else fmt


@dataclass(frozen=True)
class OperandSpec:
    """How one operand of a GEMM is quantized; `OperandSpec()` leaves it as it is.

    Args:
        format: a format or its name; None or "FP32" leaves the operand unquantized.
        rounding, overflow, subnormals, random_bits: as for `altgrad.quantization.quantize`. Finite values saturate and
            +-inf stays, unless another overflow policy is named ("saturate" makes a finite number of an inf, too).
        scaling: policy, its name, or a mapping; None is the default for the format (current amax per tensor; scale 1
            for BF16 and TF32). A policy's axis refers to the operand as a matrix: input [tokens, in], weight
            [out, in], grad_output [tokens, out]; the named axis keeps scales of its own.
        mask_saturated: let no gradient through where |x / scale| > max (input and weight operands).
        whole_blocks: refuse a tensor whose axis is no multiple of a block format's block; otherwise the last block is
            short, which is the same as padding with zeros.
        hadamard: a block Hadamard transform along the reduced axis before the tensor is quantized; a `Hadamard`, or a
            mapping of its fields. The GEMM's other operand has the same.
        average: TetraJet's Q-EMA, for weights in the forward: an average of the master decides between the two neighbours on
            the grid; an `EmaRounding`, or a mapping of its fields.
        requantize: quantize what the forward's entry of the same tensor made of it, not the tensor itself (weight of
            input_grad, input of weight_grad).

    Raises:
        RecipeError: the fields contradict one another.
    """

    format: str | None = None
    rounding: Rounding = Rounding.NEAREST_EVEN
    overflow: Overflow = Overflow.SATURATE_FINITE
    scaling: Scaling | None = None
    subnormals: bool = True
    mask_saturated: bool = False
    random_bits: int = 24
    whole_blocks: bool = False
    hadamard: Hadamard | None = None
    requantize: bool = False
    average: EmaRounding | None = None

    def __post_init__(self) -> None:
        fmt = _format_or_none(self.format)
        put = object.__setattr__
        put(self, "hadamard", _as_value(Hadamard, self.hadamard, "hadamard", "{size: 16, signs: fixed}"))
        put(self, "average", _as_value(EmaRounding, self.average, "average", "{decay: 0.9983, start: 10}"))
        put(self, "format", None if fmt is None else fmt.name)
        put(self, "rounding", as_option(Rounding, self.rounding))
        put(self, "overflow", as_option(Overflow, self.overflow))
        if fmt is not None:
            put(self, "scaling", as_scaling(self.scaling, fmt))
            self._check(fmt)
        elif (
            self.scaling is not None
            or self.mask_saturated
            or self.rounding is not Rounding.NEAREST_EVEN
            or self.hadamard is not None
            or self.average is not None
            or self.requantize
        ):
            raise RecipeError("an operand without a format has nothing to round, scale or mask: name a format")
        else:  # one way to be unquantized
            put(self, "overflow", OperandSpec.overflow)
            put(self, "subnormals", True)
            put(self, "random_bits", OperandSpec.random_bits)

    def _check(self, fmt) -> None:
        for name in ("subnormals", "mask_saturated", "requantize"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} {getattr(self, name)!r} is neither true nor false")
        if (
            isinstance(self.random_bits, bool)
            or not isinstance(self.random_bits, int)
            or not 1 <= self.random_bits <= 32
        ):
            raise RecipeError(f"random_bits {self.random_bits!r} is outside 1..32")
        if self.average is not None and not (
            is_block(fmt)
            and fmt.power_of_two
            and self.scaling == BlockScaling()
            and self.hadamard is None
            and self.rounding is not Rounding.STOCHASTIC
        ):
            raise RecipeError(
                f"{fmt.name} with {_call_text('ema', self.average)}: an average decides between the neighbours of weights in "
                "blocks under E8M0 scales of their own, rounded to nearest and not mixed, as in MXFP4:ceil(ema(decay=0.9983))"
            )
        if is_block(fmt):
            if self.mask_saturated and not (isinstance(self.scaling, BlockScaling) and self.scaling.deviation):
                raise RecipeError(
                    f"{fmt.name}: block scales follow each block's amax, so no element is masked; drop mask_saturated"
                )
            return
        if self.whole_blocks:
            raise RecipeError(f"{fmt.name} has no blocks; drop whole_blocks")
        if not fmt.has_zero:
            raise RecipeError(
                f"{fmt.name} is a scale format without zero; put an element format such as E4M3 on tensors"
            )
        lacks = {Overflow.INF: not fmt.has_inf, Overflow.NAN: not fmt.has_nan}.get(self.overflow, False)
        if lacks:
            raise RecipeError(
                f"{fmt.name} has no code for {self.overflow.value}, and layers save codes for the backward; "
                f'use overflow="saturate_finite" instead of "{self.overflow.value}"'
            )
        if not self.subnormals:
            try:
                fmt.without_subnormals()
            except AltGradError as error:
                raise RecipeError(str(error)) from None
        if self.mask_saturated and isinstance(self.scaling, CurrentScaling):
            raise RecipeError(
                "mask_saturated under current amax masks nothing, as no element exceeds its own amax; "
                "use delayed, static or no scaling, or drop the mask"
            )

    @cached_property
    def cast(self) -> Cast | None:
        """How the operand is rounded, blocks along the last axis; None where it has no format."""
        if self.format is None:
            return None
        clamp = isinstance(self.scaling, CurrentScaling)
        short = is_block(get_format(self.format)) and not self.whole_blocks
        return Cast(self.format, self.rounding, self.overflow, self.subnormals, clamp, self.random_bits, pad=short)

    @property
    def resolved(self) -> Any:
        """The format itself (without subnormals where they are switched off), or None."""
        cast = self.cast
        return None if cast is None else cast.format if cast.is_block else cast.grid

    def __str__(self) -> str:
        if self.format is None:
            return "FP32"
        notes = [
            (self.rounding is not Rounding.NEAREST_EVEN, self.rounding.value),
            (self.scaling != default_scaling(get_format(self.format)), scaling_label(self.scaling)),  # type: ignore[arg-type]
            (self.overflow is not OperandSpec.overflow, self.overflow.value),
            (not self.subnormals, "no subnormals"),
            (self.mask_saturated, "masked"),
            (self.random_bits != OperandSpec.random_bits, f"bits={self.random_bits}"),
            (self.whole_blocks, "whole blocks"),
            (self.hadamard is not None, _call_text("hadamard", self.hadamard)),
            (self.average is not None, _call_text("ema", self.average)),
            (self.requantize, "requantized"),
        ]
        shown = ",".join(text for there, text in notes if there)
        return f"{self.format}({shown})" if shown else self.format


def fields_of(value: Hadamard | EmaRounding) -> dict[str, Any]:
    """A transform or an averaged weight as a mapping that `OperandSpec` takes."""
    given = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: one.value if isinstance(one, Enum) else one for name, one in given.items()}


def _call_text(name: str, value: Hadamard | EmaRounding | None) -> str:
    """Such as hadamard(size=16,signs='fixed',bfloat16=True)."""
    return "" if value is None else f"{name}({','.join(f'{k}={v!r}' for k, v in fields_of(value).items())})"


_Value = TypeVar("_Value")


def _as_value(kind: type[_Value], value: Any, name: str, example: str) -> _Value | None:
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise RecipeError(f"{name} is {value!r}; write a mapping such as {example}, or leave it out")
    try:
        return kind(**value)
    except (TypeError, OptionError) as error:
        raise RecipeError(f"{name} {value!r}: {error}") from None


def grid_of(fmt) -> FloatFormat:
    """The scalar format of a format's elements."""
    return fmt.element if is_block(fmt) else fmt


REDUCED = {  # axis that each GEMM adds up, of the operand as a matrix: input [n, k], weight [o, k], grad_output [n, o]
    ("forward", "input"): 1,
    ("forward", "weight"): 1,
    ("input_grad", "grad_output"): 1,
    ("input_grad", "weight"): 0,
    ("weight_grad", "grad_output"): 0,
    ("weight_grad", "input"): 0,
}
GEMMS = {  # each GEMM's operands, left and right
    "forward": ("input", "weight"),
    "input_grad": ("grad_output", "weight"),
    "weight_grad": ("grad_output", "input"),
}


@dataclass(frozen=True)
class GemmRecipe:
    """The two operands of one GEMM: of input, weight and grad_output, the two that this GEMM multiplies.

    accumulator: how its products are added up: an `Accumulator`, a preset's name such as "hopper_fp8", or its text; None
    is float32's own sum.
    """

    input: OperandSpec | None = None
    weight: OperandSpec | None = None
    grad_output: OperandSpec | None = None
    accumulator: Accumulator | None = None

    def __post_init__(self) -> None:
        if self.accumulator is None:
            return
        try:
            object.__setattr__(self, "accumulator", Accumulator.parse(self.accumulator))
        except AltGradError as error:
            raise RecipeError(str(error)) from None

    def named(self) -> list[tuple[str, OperandSpec]]:
        """(role, spec) of the two operands."""
        given = [(role, getattr(self, role)) for role in OPERANDS]
        return [(role, spec) for role, spec in given if spec is not None]


@dataclass(frozen=True)
class StorageSpec:
    """The grid that a stored weight lies on after every optimizer step (`storage="grid"`).

    Args:
        format: scalar format of the grid.
        rounding: nearest-even, stochastic, or any other mode, of the write after `optimizer.step()`.
        per_channel: one scale for each output channel instead of one for the tensor.
        power_of_two: round scales up to powers of two. Otherwise fl(scale * payload) / scale can leave the grid.
        headroom: binades between the weights' amax and the format's max when the scale is set, for weights that grow.
        refresh_every: how many steps apart a scale may shrink again; it grows at once when an attempted value exceeds
            the format's max. Fresh scales come from the amax of the attempted values, and a changed scale is a regrid,
            counted apart. 0 fixes the first scale. None is 100 where scales are powers of two (they change only as the
            amax crosses one), else 0.
        scale: a fixed scale instead of one found from the weights' amax.
    """

    format: str
    rounding: Rounding = Rounding.NEAREST_EVEN
    per_channel: bool = False
    power_of_two: bool = True
    headroom: int = 0
    refresh_every: int | None = None
    scale: float | None = None
    subnormals: bool = True
    random_bits: int = 24

    def __post_init__(self) -> None:
        fmt = _format_or_none(self.format)
        if fmt is None or is_block(fmt):
            raise RecipeError(f"grid storage in {self.format}: the grid is a scalar format other than FP32; use master")
        if fmt.magnitude_bits > LISTED_BITS:
            raise RecipeError(
                f"grid storage in {fmt.name}: codes of {fmt.magnitude_bits} bits beside the sign cannot be listed; use a format of at most "
                f"{LISTED_BITS}, such as TF32, or master"
            )
        object.__setattr__(self, "format", fmt.name)
        object.__setattr__(self, "rounding", as_option(Rounding, self.rounding))
        OperandSpec(fmt.name, subnormals=self.subnormals, random_bits=self.random_bits)
        if self.refresh_every is None:
            object.__setattr__(self, "refresh_every", self._usual_refresh)
        assert self.refresh_every is not None
        if self.scale is not None and (self.refresh_every or self.per_channel):
            raise RecipeError(f"storage scale fixed at {self.scale} cannot be refreshed or per channel; drop one")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise RecipeError(f"storage scale {self.scale} is not positive and finite")
        if self.refresh_every < 0 or not 0 <= self.headroom <= 64:
            raise RecipeError(
                f"refresh_every {self.refresh_every} and headroom {self.headroom} must be >= 0 (headroom <= 64 binades)"
            )

    @cached_property
    def cast(self) -> Cast:
        """How the attempted weight is rounded back to the grid; a NaN or inf stays."""
        overflow = Overflow.SATURATE_FINITE
        return Cast(self.format, self.rounding, overflow, self.subnormals, random_bits=self.random_bits)

    @property
    def resolved(self):
        """The grid's format (without subnormals where they are switched off)."""
        return self.cast.grid

    @property
    def _usual_refresh(self) -> int:
        """`refresh_every` where nothing is said."""
        return 100 if self.power_of_two and self.scale is None and get_format(self.format).emax < 127 else 0

    def __str__(self) -> str:
        notes = [
            (True, self.format),
            (True, self.rounding.value),
            (self.per_channel, "per channel"),
            (not self.power_of_two, "any scale"),
            (self.headroom != 0, f"headroom={self.headroom}"),
            (self.refresh_every != self._usual_refresh, f"every={self.refresh_every}"),
            (self.scale is not None, f"scale={self.scale}"),
            (not self.subnormals, "no subnormals"),
            (self.random_bits != StorageSpec.random_bits, f"bits={self.random_bits}"),
        ]
        return f"grid({','.join(text for there, text in notes if there)})"
