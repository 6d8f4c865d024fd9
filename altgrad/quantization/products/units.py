"""Which unit of a processor multiplies codes exactly: what a format's payloads become there, and which CPU has it.

    INT8    payloads that are small integers (E0M7, E1M6, INT8, E2M1 x 2, E2M3 x 8), summed in int32: exact, in any order
    BF16    payload * 2^p (times its block's scale) with at most 8 significant bits, normal in bf16, summed in float32

On CPUs with matrix units (AMX), the same 16 rows and columns at a time:

    AMX_INT8, AMX_BF16

On CPUs without those instructions, what every vector unit has:

    INT16   the small integers, pair by pair, summed in int32: as exact, at twice the rate of float32
    FLOAT32 what BF16 multiplies, as float32: nothing is multiplied faster, but codes are decoded where a product packs them

The power 2^p of a format is a constant: it lifts the format's largest binade to 2^47, where products of two operands and
their sums stay below 2^127, and those of all formats of at most 8 bits but E7M0 stay above 2^-126 (the unit takes smaller
numbers as zero). The operands' scales multiply the sums, in float64, rounded once.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from contextlib import suppress
from enum import Enum
from functools import cache

import numpy as np
import torch

from altgrad.formats.block import BlockFormat
from altgrad.formats.scalar import FloatFormat, Specials
from altgrad.jit.subnormals import gradual_underflow
from altgrad.quantization.codec import value_table


class Unit(Enum):
    """What multiplies: operands of how many to a 32-bit word, summed in which type."""

    INT8 = "int8"
    BF16 = "bf16"
    INT16 = "int16"
    FLOAT32 = "float32"
    AMX_INT8 = "amx-int8"
    AMX_BF16 = "amx-bf16"

    @property
    def sums_integers(self) -> bool:
        """Whether sums are int32 and exact; else float32."""
        return self in (Unit.INT8, Unit.INT16, Unit.AMX_INT8)

    @property
    def by_matrices(self) -> bool:
        """Whether the unit multiplies matrices of 16 rows; else vectors."""
        return self in (Unit.AMX_INT8, Unit.AMX_BF16)


# operands in a word, multiplied and added at once
GROUP = {
    Unit.INT8: 4,
    Unit.BF16: 2,
    Unit.INT16: 2,
    Unit.FLOAT32: 1,
    Unit.AMX_INT8: 4,
    Unit.AMX_BF16: 2,
}
PLAINER = {Unit.INT8: Unit.INT16, Unit.BF16: Unit.FLOAT32}  # what multiplies the same codes on a CPU without the unit
MATRICES = {Unit.INT8: Unit.AMX_INT8, Unit.BF16: Unit.AMX_BF16}  # and on one with matrix units
SIGNIFICANT_BITS = 8  # of a bf16
LARGEST_INTEGER = 127
LARGEST_DEPTH = (2**31 - 1) // 128**2  # terms whose sum fits int32
TOP_BINADE, NORMAL_EMIN = 47, -126
LARGEST_BLOCK_BINADE = 59  # of element * scale: times 2^48, 2^18 terms stay finite
E8M0_BIAS = 127
OFFSET = 0x80808080  # 128 in each byte of a word: what turns signed bytes into unsigned ones by xor


def unit_of(fmt: FloatFormat | BlockFormat) -> Unit | None:
    """The fastest unit that multiplies a format's codes of one byte exactly; None where no unit does."""
    if isinstance(fmt, BlockFormat):
        return Unit.BF16 if _folds(fmt) else None
    if fmt.bits > 8 or not fmt.has_zero:
        return None
    integers = fmt.has_subnormals and fmt.specials is Specials.NONE and fmt.max / fmt.min_subnormal <= LARGEST_INTEGER
    if integers:
        return Unit.INT8
    return Unit.BF16 if fmt.significant_bits <= SIGNIFICANT_BITS and _is_normal(fmt) else None


def _is_normal(fmt: FloatFormat) -> bool:
    return math.frexp(fmt.min_subnormal)[1] - 1 + power(fmt, Unit.BF16) >= NORMAL_EMIN


def _folds(fmt: BlockFormat) -> bool:
    """Whether element * scale is a bf16 number: the scale is a power of two, or both together are short."""
    if fmt.element.bits > 8 or fmt.has_float_scale:
        return False
    if any(side % GROUP[Unit.BF16] for side in (fmt.tile if fmt.is_tile else (fmt.block_elements,))):
        return False  # two operands of a word would have scales of their own
    scale_bits = 0 if fmt.power_of_two else fmt.scale_format.significant_bits
    return fmt.element.significant_bits + scale_bits <= SIGNIFICANT_BITS


def exponents_that_fit(fmt: BlockFormat) -> tuple[int, int]:
    """(lowest, highest) stored E8M0 scale by which all elements are normal or 0, and finite times any other payload."""
    smallest = math.frexp(fmt.element.min_subnormal)[1] - 1
    return NORMAL_EMIN - smallest + E8M0_BIAS, LARGEST_BLOCK_BINADE - fmt.element.emax + E8M0_BIAS


def common_unit(a: FloatFormat | BlockFormat, b: FloatFormat | BlockFormat) -> Unit | None:
    """The fastest unit that multiplies both formats: every integer format is a bf16 one, too."""
    units = {unit_of(a), unit_of(b)}
    if None in units:
        return None
    return Unit.INT8 if units == {Unit.INT8} else Unit.BF16


def power(fmt: FloatFormat | BlockFormat, unit: Unit) -> int:
    """The p of a format: what the unit multiplies is payload * 2^p."""
    if isinstance(fmt, BlockFormat):
        return 0  # elements go with their block's scale
    return -(math.frexp(fmt.min_subnormal)[1] - 1) if unit.sums_integers else TOP_BINADE - fmt.emax


@cache
def facts(fmt: FloatFormat | BlockFormat, unit: Unit) -> np.ndarray:
    """`jit.code_table.code_table` of a format's elements with 2^p multiplied in; kept for the life of the process."""
    from altgrad.jit.code_table import CODE_FIELDS, code_table  # which imports Numba

    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    table, shift = code_table(element).copy(), power(fmt, unit) << 23
    for name in ("normal_base", "raised_base", "step"):
        index = CODE_FIELDS.index(name)
        table[index] = int(table[index]) + shift
    table.setflags(write=False)
    return table


@cache
def payloads(fmt: FloatFormat | BlockFormat, unit: Unit, p: int | None = None) -> np.ndarray:
    """payload * 2^p of each of the 256 codes that a byte can name, as float32; NaN beyond the format's codes.

    p: None takes that of the format.
    """
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    with gradual_underflow():
        values = np.ldexp(value_table(element), power(fmt, unit) if p is None else p).astype(np.float32)
    values = np.pad(values, (0, 256 - len(values)), constant_values=np.nan)
    values.setflags(write=False)
    return values


_FEATURES = {  # torch's names and LLVM's
    Unit.INT8: {"avx512_vnni": "avx512vnni"},
    Unit.BF16: {"avx512_bf16": "avx512bf16"},
    Unit.INT16: {"avx2": "avx2"},
    Unit.FLOAT32: {"avx2": "avx2", "fma3": "fma"},
    Unit.AMX_INT8: {"amx_tile": "amx-tile", "amx_int8": "amx-int8"},
    Unit.AMX_BF16: {"amx_tile": "amx-tile", "amx_bf16": "amx-bf16"},
}
_WIDE = {"avx512_f": "avx512f", "avx512_bw": "avx512bw"}


def _has(features: dict[str, str]) -> bool:
    """Whether this CPU has them all, and Numba is not told to leave one alone."""
    told = os.environ.get("NUMBA_CPU_FEATURES") if os.environ.get("NUMBA_CPU_NAME") else None
    found = torch.cpu.get_capabilities()
    return all(found.get(ours) and (told is None or f"+{llvms}" in told.split(",")) for ours, llvms in features.items())


@cache
def on_this_cpu(unit: Unit) -> bool:
    """Whether this CPU has the unit's instruction: INT8 and BF16 in vectors of 64 bytes, INT16 and FLOAT32 of 32 at least,
    and lets this process use it."""
    return _has(_FEATURES[unit]) and (not unit.by_matrices or (has_wide_vectors() and _matrices_are_permitted()))


@cache
def _matrices_are_permitted() -> bool:
    """Whether Linux lets this process, its threads and its children keep matrices in registers, for which it must be asked.

    Refused where a thread's stack for signals has no room for them. Source: Documentation/arch/x86/xstate.rst.
    """
    arch_prctl, ask_for, matrices = 158, 0x1023, 18
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).syscall(arch_prctl, ask_for, matrices) == 0


@cache
def is_by_intel() -> bool:
    """Whether Intel made this CPU, as far as the system says."""
    if "GenuineIntel" in os.environ.get("PROCESSOR_IDENTIFIER", ""):  # Windows
        return True
    with suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as told:
        return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in told)
    return False


@cache
def has_wide_vectors() -> bool:
    """Whether this CPU has 32 registers of 64 bytes (AVX-512); else tiles are made for 16 of 32."""
    return _has(_WIDE)
