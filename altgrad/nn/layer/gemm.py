"""Which unit multiplies the operands of a GEMM, by a committed rule, and the products of operands that are values.

Write scale = m * 2^p with 1 <= m < 2. An operand whose payload has at most 8 significant bits, handed over as
payload * 2^p, is a bf16 number as long as its values are zero or normal in bf16, so a unit that multiplies in bf16 and
accumulates in float32 gives the float32 result up to summation order. The product is then multiplied by the two m's,
which must therefore be constant along the dimension that the GEMM reduces. Raw payloads are never multiplied: those of
E7M0 reach 2^64. On a GPU operands of 9 to 11 significant bits are float16 numbers in the same way where both have a range
that fits. All else takes the float32 GEMM on dequantized operands.

On the CPU codes themselves are multiplied (`altgrad.quantization.products`): as bytes where payloads are small integers,
else as bf16, by matrix units (AMX) or where the processor has the instruction for vectors; as int16 and as float32 where it
has but vectors of 32 bytes. Where there are no codes, CPUs with matrix units take their library's product of the values in
bf16, which only needs a setting.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, suppress
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.quantization import FloatFormat
from altgrad.quantization.kernels.choose import interpreted
from altgrad.quantization.products.units import (
    LARGEST_DEPTH,
    MATRICES,
    NORMAL_EMIN,
    PLAINER,
    SIGNIFICANT_BITS,
    Unit,
    is_by_intel,
    on_this_cpu,
)
from altgrad.quantization.tensor_cores import accumulate_in_float32

CARRIER_EMAX = 127  # bf16 and float32 share their exponents


class Route(Enum):
    """Which unit multiplies what: values in one of two precisions, or codes."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    FP16 = "fp16"  # on a GPU alone
    BF16_CODES = "bf16 codes"
    INT8_CODES = "int8 codes"
    FLOAT32_CODES = "float32 codes"
    INT16_CODES = "int16 codes"
    AMX_INT8_CODES = "amx-int8 codes"
    AMX_BF16_CODES = "amx-bf16 codes"
    FP8 = "fp8"  # by a GPU's own unit, of whose sums a recipe asks

    def __init__(self, says: str) -> None:
        unit, _, what = says.partition(" ")
        self.unit = Unit(unit) if what else None  # of codes on a CPU; else None
        self.on_cores = says in ("bf16", "fp16", "fp8")  # of a GPU


class Needs(NamedTuple):
    """What a GEMM's operands allow: the narrowest route of values, the fastest unit for codes (None: none), as what a
    GPU's tensor cores multiply both (`tensor_cores.taken_as`; None: not), and whether its FP8 unit does
    (`LayerRecipe.by_unit`)."""

    values: Route
    unit: Unit | None = None
    cores: Route | None = None
    fp8: bool = False


def power_range(fmt: FloatFormat) -> tuple[int, int]:
    """Exponents p for which every nonzero value of payload * 2^p is normal in bf16; empty (low > high) for wide formats."""
    return NORMAL_EMIN - math.frexp(fmt.min_subnormal)[1] + 1, CARRIER_EMAX - fmt.emax


def narrowest_route(fmt: FloatFormat) -> Route:
    """The narrowest unit that holds the format's values once a power of two is pulled out."""
    low, high = power_range(fmt)
    if low > high or not fmt.has_zero:
        return Route.FLOAT32
    return Route.BF16 if fmt.significant_bits <= SIGNIFICANT_BITS else Route.FLOAT32


def needed_route(a: FloatFormat | None, b: FloatFormat | None) -> Route:
    """The narrowest unit whose products of the two formats' values are exact.

    Args:
        a, b: operands' formats whose scale is constant along the reduction; None for an operand that must stay float32.
    """
    needs = {Route.FLOAT32 if fmt is None else narrowest_route(fmt) for fmt in (a, b)}
    return Route.FLOAT32 if Route.FLOAT32 in needs else Route.BF16


class Processor(NamedTuple):
    """What a CPU multiplies faster than float32."""

    int8_codes: bool = False  # AVX-512 VNNI
    bf16_codes: bool = False  # AVX-512 BF16
    matrices: bool = False  # AMX, of int8 and bf16 codes; of values in bf16 by the library
    vectors: bool = False  # AVX2 and FMA, which multiply codes where the above are lacking
    by_intel: bool = False  # whose library multiplies large float32 matrices faster than codes decoded to float32

    def __str__(self) -> str:
        names = {
            "int8_codes": "int8 codes (VNNI)",
            "bf16_codes": "bf16 codes (AVX-512 BF16)",
            "matrices": "both by matrices (AMX)",
        }
        found = [says for name, says in names.items() if getattr(self, name)]
        return ", ".join(found) or ("int16 and float32 codes (AVX2)" if self.vectors else "float32 alone")

    def multiplies(self, unit: Unit) -> Unit | None:
        """What multiplies the codes that a unit holds: matrix units, itself or a plainer one; None: nothing, so that values
        are multiplied.
        """
        if self.matrices:
            return MATRICES[unit]
        if self.int8_codes if unit is Unit.INT8 else self.bf16_codes:
            return unit
        return PLAINER[unit] if self.vectors else None

    def without_units(self) -> Processor:
        """A CPU of this kind that has vectors alone."""
        return Processor(vectors=self.vectors, by_intel=self.by_intel)


def this_processor() -> Processor:
    """The CPU at hand."""
    vectors = on_this_cpu(Unit.INT16) and on_this_cpu(Unit.FLOAT32)
    matrices = on_this_cpu(Unit.AMX_INT8) and on_this_cpu(Unit.AMX_BF16)
    intel = is_by_intel()
    # without matrix units Intel's vectors multiply bf16 at less than the rate of float32
    bf16 = on_this_cpu(Unit.BF16) and (matrices or not intel)
    return Processor(on_this_cpu(Unit.INT8), bf16, matrices, vectors, intel)


_CPU_MATMUL = torch.backends.mkldnn.matmul
PROCESSOR = this_processor()
# Below these the conversion to bf16 and back outweighs the matrix units, or a call that of another product.
CPU_BF16_MIN_PRODUCTS, CPU_CODES_MIN_PRODUCTS = 2**21, 2**17
CPU_BF16_MIN_SIDE = 16
LIBRARY_MIN_PRODUCTS = 2**27  # from which on Intel's library is worth a float32 copy of the operands
_OF_CODES = {route.unit: route for route in Route if route.unit is not None}


def choose_route(
    needed: Needs,
    shape: tuple[int, int, int],
    device_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    codes: bool = True,
    processor: Processor | None = None,
) -> Route:
    """The route of one GEMM: a committed rule of formats, shape, device and CPU capability, never timed.

    Args:
        needed: what the two operands allow.
        shape: (rows, columns, reduced).
        dtype: of the carrier; float64 products stay in float64.
        codes: whether operands can be had as codes: not in compiled code, nor where the backward is differentiated.
        processor: what the CPU has; None: `PROCESSOR`, this one.

    The thread count does not enter: units are one for each core, and the ratio of two routes' speeds is the same on each.
    """
    if dtype != torch.float32:
        return Route.FLOAT32
    if device_type == "cuda" or interpreted():
        if needed.fp8:
            return Route.FP8
        return needed.cores if needed.cores is not None and accumulate_in_float32() else Route.FLOAT32
    if device_type != "cpu":
        return Route.FLOAT32
    processor = processor or PROCESSOR
    products = shape[0] * shape[1] * shape[2]
    if codes and needed.unit is not None and products >= CPU_CODES_MIN_PRODUCTS:
        wanted = Unit.BF16 if shape[2] > LARGEST_DEPTH else needed.unit  # which holds integers, too
        unit = processor.multiplies(wanted)
        large = processor.by_intel and products >= LIBRARY_MIN_PRODUCTS
        if unit is not None and not (unit is Unit.FLOAT32 and large):
            return _OF_CODES[unit]
    large = products >= CPU_BF16_MIN_PRODUCTS and min(shape) >= CPU_BF16_MIN_SIDE
    return Route.BF16 if needed.values is Route.BF16 and processor.matrices and large else Route.FLOAT32


def pull_apart(scale: Tensor | float, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """(2^p, m) with m * 2^p = scale exactly: 1 <= m < 2, unless p is clamped to the format's `power_range`.

    With p clamped from below m is less than 1: the operand's values stay normal and the product is scaled back.
    """
    scale = torch.as_tensor(scale, dtype=torch.float32)
    low, high = power_range(fmt)
    exponent = (torch.frexp(scale)[1] - 1).clamp(low, min(high, CARRIER_EMAX))
    power = _power_of_two(exponent)
    return power, scale / power


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32, exactly, for -149 <= exponent <= 127."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    bits = ((torch.stack([half, exponent - half]) + 127) << 23).to(torch.int32).view(torch.float32)
    return bits[0] * bits[1]


def _set(owner, precision: str) -> None:
    """Give back a precision that was found; one that came from a setting further up goes on coming from there."""
    owner.fp32_precision = "none"
    if owner.fp32_precision != precision:
        owner.fp32_precision = precision


@contextmanager
def matmul_precision(device_type: str, precision: str):
    """Set the float32 matmul precision of the CPU's or GPU's library; leave it as found, also on exceptions.

    torch refuses to read its older flag (`allow_tf32`) while the newer setting contradicts it, so whoever used the older
    one keeps a readable flag: both are set, and both are given back.
    """
    backend = torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul
    found = backend.fp32_precision
    if found == precision or (precision == "ieee" and found == "none"):
        yield
        return
    older = _older_flags() if device_type == "cuda" else None
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    backend.fp32_precision = precision
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            _set(torch.backends.mkldnn.matmul, older[1])
        _set(backend, found)


def _older_flags() -> tuple[str, str] | None:
    """(float32 matmul precision, the CPU library's) where the older flags can be read; None where the newer rule alone."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision
    except RuntimeError:
        return None


@contextmanager
def conv_precision(device_type: str):
    """Let convolutions multiply in IEEE float32: cuDNN's default cuts float32 operands to 11 bits."""
    library = torch.backends.cudnn if device_type == "cuda" else torch.backends.mkldnn
    found = library.conv.fp32_precision
    if found in ("none", "ieee"):
        yield
        return
    older = None
    if device_type == "cuda":
        with suppress(RuntimeError):
            older = (library.allow_tf32, library.rnn.fp32_precision)
            library.allow_tf32 = False
            library.rnn.fp32_precision = "ieee"  # the older flag speaks for both
    library.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            library.allow_tf32 = older[0]
            _set(library.rnn, older[1])
        _set(library.conv, found)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; the meta device has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


@contextmanager
def without_autocast(device_type: str):
    """Switch autocast off: it would cast the operands off their grid and disagree between forward and backward."""
    if not autocasts(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def _summed_in_float32():
    """Keep the CUDA library from adding up parts of a bf16 result in bf16."""
    matmul = torch.backends.cuda.matmul
    found = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = found


def mm(a: Tensor, b: Tensor, route: Route = Route.FLOAT32, dtype: torch.dtype = torch.float32) -> Tensor:
    """a @ b accumulated in float32 (float64 for float64), for matrices [.., m, k] and [.., k, n].

    dtype: bfloat16, of bf16 operands, rounds the sums once; else they are left as they are.

    On `BF16` the operands must hold values that bf16 holds exactly (`pull_apart`), on `FP16` those of float16. The precision that
    torch is set to, and autocast, have no say, in eager as in compiled code.
    """
    if torch.compiler.is_compiling():
        found = _routed(a, b, route.value)
        return found.bfloat16() if dtype == torch.bfloat16 else found
    return _mm(a, b, route, dtype)


def _mm(a: Tensor, b: Tensor, route: Route, dtype: torch.dtype = torch.float32) -> Tensor:
    kind = a.device.type
    if autocasts(kind):
        with without_autocast(kind):
            return _mm(a, b, route, dtype)
    if route is Route.BF16 and kind == "cuda":
        return _on_tensor_cores(a.bfloat16(), b.bfloat16(), dtype)
    if dtype == torch.bfloat16:
        return _mm(a, b, route).bfloat16()
    if route is Route.FP16 and kind == "cuda":
        return _on_tensor_cores(a.half(), b.half(), torch.float32)
    if route is Route.FP16 or a.dtype == torch.bfloat16:  # operands of tensor cores, without any
        a, b, route = a.float(), b.float(), Route.FLOAT32
    if route is Route.FLOAT32 and kind == "cpu" and _CPU_MATMUL.fp32_precision in ("none", "ieee"):
        return torch.matmul(a, b)
    with matmul_precision(kind, "ieee" if route is Route.FLOAT32 else route.value):
        return torch.matmul(a, b)


def _on_tensor_cores(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of bf16 or float16 matrices, or of stacks of them whose batch axes broadcast, summed in float32.

    dtype: of the result; bf16 is for bf16 matrices.
    """
    if dtype == torch.bfloat16:
        with _summed_in_float32():
            return torch.matmul(a, b)
    if a.ndim == 2 and b.ndim == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (t.expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (a, b))
    return torch.bmm(a, b, out_dtype=torch.float32).view(*batch, a.shape[-2], b.shape[-1])


@torch.library.custom_op("altgrad::routed_mm", mutates_args=())
def _routed(a: Tensor, b: Tensor, route: str) -> Tensor:
    return _mm(a, b, Route(route))


@_routed.register_fake
def _(a: Tensor, b: Tensor, route: str) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty([*batch, a.shape[-2], b.shape[-1]], dtype=dtype)
