"""Accumulators: how a matrix unit adds up the products of a GEMM, as facts of the unit.

A unit takes k products in one step and the running sum c. Every product keeps the significand that its factors have
(1 <= |s| < 4, less for subnormal factors) at the exponent ea + eb; a zero has none. Let E be the largest exponent of the
step, c's included. Every term is cut toward zero to F fraction bits at E, the sum of the cut terms is exact, and is
rounded once to the running sum's own format. Steps follow one another along K.

A sum kept in few bits can be promoted: after every `promote_every` products it is added to a main sum of another format
(nearest even), and starts again at 0.

Sources: the units' numbers are those of two bit-level models that their authors checked against hardware, MMA-Sim (Xie et
al., arXiv 2511.10909, microsoft/MMA-Sim at c7851383) and MATLAB-tensor-core (Khattak and Mikaitis, arXiv 2512.07004);
promotion as in DeepSeek-V3 (arXiv 2412.19437, 3.3.2) and CUTLASS; chunks as in Wang et al. (arXiv 1812.08011). This module
does not import torch.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any

from altgrad.errors import FormatError, OptionError
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Rounding, as_option
from altgrad.formats.scalar import FloatFormat

MOST_PRODUCTS = 4096
CARRIER_BITS = 53  # significant bits of the float64 in which sums of cut terms are exact integers


class Promote(str, Enum):
    """How a partial sum p enters the main sum y; sa and sb are the scales of the operands' blocks."""

    ADD = "add"  # y + p
    FMA_SCALED = "fma_scaled"  # fma(fl(sa * sb), p, y): DeepGEMM
    SCALED_FMA = "scaled_fma"  # fma(fl(p * sa), sb, y): Transformer Engine's reference


_ROUNDINGS = (Rounding.TOWARD_ZERO, Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY)


@dataclass(frozen=True)
class Accumulator:
    """How the products of a GEMM are added up (the module docstring has the arithmetic).

    Args:
        products: k, how many products along K enter one step.
        fraction_bits: F, what the terms of a step keep below the largest exponent; None adds them exactly.
        output: format of the running sum, such as FP32, FP16, E8M13 or E6M9. What exceeds its largest value is infinite.
        rounding: of the running sum: toward_zero, nearest_even or nearest_away.
        promote_every: products after which the running sum goes to the main sum; None: never. A multiple of `products`.
        promote: how it enters the main sum: add, or with the scales of the operands' blocks (fma_scaled, scaled_fma).
        main: format of the main sum, rounded to nearest even.
        group: products summed exactly before anything else, under one pair of block scales whose exponents alone decide E
            (the FP4 units of Blackwell: 16).
        normalize_products: let a product in [2, 4) count with the exponent ea + eb + 1 (no unit known does).
        by_unit: on a GPU let its own FP8 unit add up, by `torch._scaled_mm` without fast accumulation, and refuse a GPU whose
            unit is another one; on a CPU the sums are these fields'. How the library splits K on a GPU is its own affair.

    Raises:
        OptionError: a number out of range, or fields that contradict one another; FormatError: no such format.
    """

    products: int = 1
    fraction_bits: int | None = None
    output: str = "FP32"
    rounding: Rounding = Rounding.TOWARD_ZERO
    promote_every: int | None = None
    promote: Promote = Promote.ADD
    main: str = "FP32"
    group: int = 1
    normalize_products: bool = False
    by_unit: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "rounding", as_option(Rounding, self.rounding))
        put(self, "promote", as_option(Promote, self.promote))
        for name in ("output", "main"):
            put(self, name, _sum_format(getattr(self, name), name)[0])
        if self.rounding not in _ROUNDINGS:
            names = ", ".join(mode.value for mode in _ROUNDINGS)
            raise OptionError(f"an accumulator's rounding is {self.rounding.value}; use one of {names}")
        for name in ("normalize_products", "by_unit"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} {getattr(self, name)!r} is neither true nor false")
        _within("products", self.products, 1, MOST_PRODUCTS)
        _within("group", self.group, 1, self.products)
        if self.fraction_bits is not None:
            _within("fraction_bits", self.fraction_bits, 1, 40)
        if self.products % self.group:
            raise OptionError(f"{self.products} products a step are no whole groups of {self.group}")
        if self.promote_every is not None:
            _within("promote_every", self.promote_every, 1, 1 << 20)
            if self.promote_every % self.products:
                raise OptionError(
                    f"promote_every {self.promote_every} is no multiple of the {self.products} products of a step; "
                    f"use {max(1, self.promote_every // self.products) * self.products}"
                )
        elif self.promote is not Promote.ADD or self.main != "FP32":
            raise OptionError("promote and main say how partial sums are added up; give promote_every, too")
        if self.group > 1 and (self.promote is not Promote.ADD or self.normalize_products or not self.fraction_bits):
            raise OptionError("groups need fraction_bits, and neither scaled promotion nor normalised products")
        if self.by_unit and replace(self, by_unit=False) != HOPPER_FP8_PROMOTED:
            raise OptionError("by_unit is for Hopper's FP8 unit with promoted sums; use fp8_unit, which says all of it")

    # -- derived facts --------------------------------------------------------------------------------------------

    @cached_property
    def output_format(self) -> FloatFormat:
        """The format of the running sum."""
        return _sum_format(self.output, "output")[1]

    @cached_property
    def main_format(self) -> FloatFormat:
        """The format of the main sum."""
        return _sum_format(self.main, "main")[1]

    @property
    def sum_bits(self) -> int:
        """Bits that the integer sum of a step's cut terms can have: each is below 2^(F + 2) (groups: 2^(F + 12))."""
        if self.fraction_bits is None:
            return CARRIER_BITS
        terms = self.products // self.group + 1
        return self.fraction_bits + (2 if self.group == 1 else 12) + math.ceil(math.log2(terms))

    @property
    def scaled_promotion(self) -> bool:
        """Whether block scales enter with the promotion."""
        return self.promote is not Promote.ADD

    def __str__(self) -> str:
        """The preset's name, or every field that differs from the defaults; `Accumulator.parse` reads it back."""
        for name, preset in ACCUMULATORS.items():
            if preset == self:
                return name
        if self == chunked(self.promote_every or 1, self.output):
            return f"chunked({self.promote_every},{self.output})"
        shown = ",".join(f"{key}={value}" for key, value in self.to_config().items())
        return f"accumulator({shown})"

    def to_config(self) -> dict:
        """The fields that differ from their defaults, as plain data."""
        given = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {k: v.value if isinstance(v, Enum) else v for k, (v, default) in given.items() if v != default}

    @classmethod
    def parse(cls, value: Any) -> Accumulator:
        """An accumulator from itself, a preset's name, `chunked(64,E6M9)`, `accumulator(products=32,...)` or a mapping.

        Raises:
            OptionError: none of these, or a field out of range; FormatError: no such format.
        """
        if isinstance(value, Accumulator):
            return value
        if isinstance(value, dict):
            return cls(**_known(value))
        text = str(value).strip() if isinstance(value, str) else ""
        if text.lower() in ACCUMULATORS:
            return ACCUMULATORS[text.lower()]
        found = re.fullmatch(r"(chunked|accumulator)\((.*)\)", text, re.IGNORECASE)
        parts = [part.strip() for part in found[2].split(",") if part.strip()] if found else []
        if found and found[1].lower() == "chunked" and len(parts) in (1, 2) and parts[0].isdecimal():
            return chunked(int(parts[0]), *parts[1:])
        if found and found[1].lower() == "accumulator":
            pairs = [part.partition("=") for part in parts]
            return cls(**_known({key.strip(): _literal(word.strip()) for key, _, word in pairs}))
        raise OptionError(
            f"accumulator {value!r} is not known; use {', '.join(ACCUMULATORS)}, chunked(64,E6M9), or "
            "accumulator(products=32,fraction_bits=13,output=E8M13)"
        )

    def facts(self) -> list[tuple[str, str]]:
        """(label, text) pairs that say all there is to know about the accumulator."""
        grouped = f", groups of {self.group} summed exactly first" if self.group > 1 else ""
        cut = (
            "exact" if self.fraction_bits is None else f"cut toward zero to {self.fraction_bits} bits below the largest"
        )
        rows = [
            ("products a step", f"{self.products}{grouped}"),
            ("terms of a step", cut),
            ("running sum", f"{self.output}, {self.rounding.value}"),
        ]
        if self.promote_every is not None:
            rows.append(("promoted", f"every {self.promote_every} products to {self.main} ({self.promote.value})"))
        if self.by_unit:
            rows.append(("on a GPU", "its own unit's sums, by torch._scaled_mm (compute capability 9.0)"))
        return rows


def _within(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"an accumulator's {name} is {value!r}; it is an integer in {low}..{high}")


def _known(mapping: dict) -> dict:
    known = [f.name for f in fields(Accumulator)]
    for key in mapping:
        if key not in known:
            raise OptionError(f"an accumulator has no field {key!r}; it has {', '.join(known)}")
    return mapping


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _sum_format(name: Any, role: str) -> tuple[str, FloatFormat]:
    """(the name as shown, the format) of a sum; E8M13 is a float32 of 13 fraction bits."""
    text = name.name if isinstance(name, FloatFormat) else str(name).strip().upper()
    text = text.removesuffix("_IEEE")
    text = {"E5M10": "FP16", "E8M23": "FP32", "E8M7": "BF16", "E8M10": "TF32"}.get(text, text)
    fmt = get_format(f"{text}_ieee" if re.fullmatch(r"E8M\d+", text) else text)
    if not isinstance(fmt, FloatFormat) or fmt.bias is None or fmt.mantissa_bits < 1 or not fmt.signed:
        raise FormatError(
            f"an accumulator's {role} {name!r} is no floating-point format; use FP32, FP16, E8M13 or E6M9"
        )
    return text, fmt


def chunked(chunk: int, output: str = "E6M9") -> Accumulator:
    """Sums in a narrow format, product after product, rounded to nearest each time, in chunks of their own.

    Source: Wang et al., Training Deep Neural Networks with 8-bit Floating Point Numbers, arXiv 1812.08011 (1-6-9, 64).
    """
    return Accumulator(1, None, output, Rounding.NEAREST_EVEN, promote_every=chunk, main=output)


_HOPPER_FP8 = Accumulator(32, 13, "E8M13")
HOPPER_FP8_PROMOTED = replace(_HOPPER_FP8, promote_every=128)
ACCUMULATORS: dict[str, Accumulator] = {
    "hopper_fp8": _HOPPER_FP8,
    "hopper_fp8_promoted": HOPPER_FP8_PROMOTED,
    "fp8_unit": replace(HOPPER_FP8_PROMOTED, by_unit=True),
    "hopper_fp8_blocks": replace(_HOPPER_FP8, promote_every=128, promote=Promote.SCALED_FMA),
    "deepgemm": replace(_HOPPER_FP8, promote_every=128, promote=Promote.FMA_SCALED),
    "ada_fp8": Accumulator(16, 13, "E8M13"),
    "blackwell_fp8": Accumulator(32, 25),
    "blackwell_fp4": Accumulator(64, 35, group=16),
    "hopper_half": Accumulator(16, 25),
    "hopper_half_fp16": Accumulator(16, 25, "FP16", Rounding.NEAREST_EVEN),
    "ampere_half": Accumulator(8, 24),
    "ampere_half_fp16": Accumulator(8, 24, "FP16", Rounding.NEAREST_EVEN),
    "ampere_tf32": Accumulator(4, 24),
    "volta_half": Accumulator(4, 23),
    "volta_half_fp16": Accumulator(4, 23, "FP16", Rounding.NEAREST_EVEN),
    "exact": Accumulator(MOST_PRODUCTS, None, "FP32", Rounding.NEAREST_EVEN),
}
"""Accumulators by name: NVIDIA's units for FP8, FP4, and FP16 or BF16 ("half") operands; `_fp16` accumulates in FP16;
`fp8_unit` is Hopper's itself on a GPU and its emulation elsewhere; and a sum that is exact and rounded once every 4096
products."""
