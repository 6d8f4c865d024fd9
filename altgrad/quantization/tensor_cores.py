"""What tensor cores multiply and leave: amax and scale, payloads in bf16 or float16, products and their ends, sums of FP8 units.

The calls run kernels of `kernels.cuda` (operands, products, blocks) or torch's own; where torch traces they are one node each,
or pointwise operations where those have the same bits (`pointwise`). A float64 tensor has no
place here. `factor`, `scale` and `powers` are as in `kernels.cuda.operands.Payload` and `payload`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from altgrad.errors import KernelError
from altgrad.formats.block import BlockFormat
from altgrad.jit.grid_table import special_codes
from altgrad.quantization import pointwise
from altgrad.quantization.cast import Cast
from altgrad.quantization.checks import traced
from altgrad.quantization.kernels.choose import interpreted, load
from altgrad.quantization.memory import is_unusual, readable
from altgrad.quantization.plan import Plan
from altgrad.quantization.powers import factor_of
from altgrad.quantization.quantized import Want


def capturing() -> bool:
    """Whether a CUDA graph is being captured: what is launched now runs at its replays, without Python."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def serve(x: Tensor) -> bool:
    """Whether x is where these kernels work: on a GPU, or anywhere in Triton's interpreter."""
    return x.device.type == "cuda" or interpreted()


@cache
def accumulate_in_float32() -> bool:
    """Whether torch multiplies bf16 matrices on this GPU into a float32 result: older builds for AMD GPUs refuse to."""
    if not torch.version.hip:
        return True
    a = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
    try:
        torch.mm(a, a, out_dtype=torch.float32)
    except (RuntimeError, TypeError) as refused:
        if "out_dtype" not in str(refused):
            raise
        return False
    return True


def largest(x: Tensor, fmt_max: float | None = None, power_of_two: bool = False, axis: int | None = None) -> Tensor:
    """Largest finite magnitude of x, 0-d float32; with a format's max, the scale that follows from it.

    axis: of a matrix, 0 for its rows, each with its own, 1 for its columns; the result broadcasts to x.
    """
    if traced(x):
        return torch.ops.altgrad.largest(x, fmt_max, power_of_two, axis)
    kernels = load("cuda", "operands")
    if axis is not None:
        return kernels.largest_of_channels(_at_hand(x), axis, fmt_max, power_of_two)
    return kernels.largest(_at_hand(x), fmt_max, power_of_two)


def roll(window: Tensor, pending: Tensor, scale: Tensor, fmt_max: float, margin: int, power_of_two: bool) -> None:
    """Close a step of a delayed scale in place: as `kernels.cuda.operands.roll`."""
    load("cuda", "operands").roll(window, pending, scale, fmt_max, margin, power_of_two)


def _plan(cast: Cast, x: Tensor) -> Plan:
    """The plan of an operand of x: whatever format x's own dtype holds, its operand is of another one."""
    return cast.plan(torch.float32, x.device, Want.VALUES, "cuda")


def payload(
    x: Tensor,
    cast: Cast,
    scale: Tensor | float,
    powers: tuple[int, int],
    key: Tensor | None = None,
    amax: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor | None]:
    """(payload * 2^p in bf16 or float16, factor) of x under a cast to a scalar format; `amax` is raised in place."""
    if not traced(x):
        plan = _plan(cast, x)
        found = load("cuda", "operands").payload(plan, _at_hand(x), scale, powers, key=key, amax=amax, dtype=dtype)
        return found.values, found.factor
    facts = _pointwise_facts(cast.spec) if amax is None and torch.compiler.is_compiling() else None
    if facts is not None:  # the compiler fuses it with what makes x
        return pointwise.payload(x.detach(), scale, facts, powers, dtype)
    if isinstance(scale, Tensor):
        return torch.ops.altgrad.payload(x, scale, key, cast.spec, list(powers), amax, dtype)
    values = torch.ops.altgrad.payload_by_number(x, scale, key, cast.spec, list(powers), dtype)
    return values, factor_of(scale, powers, x.device)


def payload_and_codes(
    x: Tensor,
    cast: Cast,
    scale: Tensor | float,
    powers: tuple[int, int],
    key: Tensor | None = None,
    amax: Tensor | None = None,
    *,
    values: bool = True,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]:
    """(payload * 2^p in bf16, factor, codes as a backward keeps them) of x, in one pass; without values the codes alone.

    Kept are the codes and, where the format has no NaN, a number to be added to all that they stand for: NaN where an
    element of x has no code, else 0. An inf without a code becomes NaN.
    """
    if not traced(x):
        dtype = torch.bfloat16 if values else None
        kernels, options = load("cuda", "operands"), {"key": key, "amax": amax, "dtype": dtype, "codes": True}
        found = kernels.payload(_plan(cast, x), _at_hand(x), scale, powers, **options)
        return found.values, found.factor, (found.codes,) if found.poison is None else (found.codes, found.poison)
    made, factor, codes, poison = torch.ops.altgrad.payload_and_codes(
        x, pointwise.as_tensor(scale, x), key, cast.spec, list(powers), amax
    )
    return made, factor, (codes, poison) if poison.numel() else (codes,)


def decoded(
    saved: tuple[Tensor, ...], cast: Cast, scale: Tensor | float, powers: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """(payload * 2^p in bf16, factor) of what `payload_and_codes` gave to keep, in one pass."""
    codes, *poison = saved
    if not traced(codes):
        return load("cuda", "codes").decoded(_plan(cast, codes), codes, scale, powers, *poison)
    return torch.ops.altgrad.decoded_payload(
        codes, poison[0] if poison else None, pointwise.as_tensor(scale, codes), cast.spec, list(powers)
    )


def tensor_scale(x: Tensor, fmt: BlockFormat) -> Tensor:
    """The scale of the whole of x under a format that has one above its blocks' scales, 0-d float32."""
    return largest(x, fmt.element.max * fmt.scale_format.max)


def _pointwise_facts(spec: str) -> pointwise.Facts | None:
    cast = Cast.parse(spec)
    return pointwise.facts_of(cast.format, cast.grid, cast.rounding, cast.overflow)


_pointwise_facts._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, without the compiler


def block_payload(
    x: Tensor, cast: Cast, powers: tuple[int, int], key: Tensor | None = None, upper: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(element * block's scale * 2^p in bf16, factor) of x under a cast to a block format without float scales of blocks.

    powers: of a format with a scale of the whole tensor; without one p is 0 and there is no factor. upper: that scale,
    where it is known.
    """
    fmt = cast.format
    if traced(x):
        if fmt.tensor_scale:
            return torch.ops.altgrad.two_level_payload(x, key, cast.spec, list(powers))
        return torch.ops.altgrad.block_payload(x, key, cast.spec), None
    plan = _plan(cast, x)
    source = _at_hand(x).contiguous()
    if fmt.tensor_scale and upper is None:
        upper = tensor_scale(source, fmt)
    return load("cuda", "blocks").payload(plan, source, upper, key, powers)


def block_codes(x: Tensor, cast: Cast, key: Tensor | None = None, upper: Tensor | None = None) -> tuple[Tensor, ...]:
    """(codes, stored scales[, tensor's scale]) of x under such a cast, in one pass; what has no code becomes NaN.

    upper: as for `block_payload`.
    """
    plan = cast.plan(torch.float32, x.device, Want.CODES, "cuda")
    source = _at_hand(x).contiguous()
    if cast.format.tensor_scale and upper is None:
        upper = tensor_scale(source, cast.format)
    codes, scales = load("cuda", "blocks").encoded(plan, source, upper, key)
    return (codes, scales) if upper is None else (codes, scales, upper)


def decoded_blocks(saved: tuple[Tensor, ...], cast: Cast, powers: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """What `block_payload` gives, of what `block_codes` gave to keep, in one pass."""
    codes, scales, *upper = saved
    plan = cast.plan(torch.float32, codes.device, Want.CODES, "cuda")
    return load("cuda", "block_codes").decoded(plan, codes, scales, upper[0] if upper else None, powers)


def product(
    a: Tensor, b: Tensor, of_a: Tensor | None, of_b: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """((a @ b) * of_a) * of_b + bias of bf16 or float16 matrices, in `dtype`, in one pass; None where a library's
    product is better.

    That is so for stacks of matrices, for results too small for a GPU, and in compiled code, where the compiler fuses
    what follows a product. Factors are as in `finished`.
    """
    if a.ndim > 2 or b.ndim > 2 or traced(a) or not serve(a):
        return None
    kernels = load("cuda", "products")
    if not kernels.fills_a_gpu(a.shape[0], b.shape[1]):
        return None
    return kernels.product(a, b, of_a, of_b, bias, dtype)


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two positive factors of the same product whose exponents differ by one at most; as `kernels.cuda.bits.balanced`."""
    exponents = [f.view(torch.int32) >> 23 for f in (a, b)]
    moved = ((exponents[1] - exponents[0]) >> 1).clamp(-126, 126)
    up, down = (((127 + power) << 23).view(torch.float32) for power in (moved, -moved))
    return a * up, b * down


def finished(
    sums: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None, dtype: torch.dtype, any_factor: bool = False
) -> Tensor:
    """(sums * a) * b + bias, rounded after each step, in `dtype`; may be written over the sums.

    Args:
        a, b: one factor each, or of one matrix one for each row (a) or column (b); or what broadcasts to a stack of them.
        any_factor: factors are whole scales: one may be small where the other one is large, so that they are balanced.
    """
    stacked = sums.ndim > 2 and any(factor is not None and factor.numel() > 1 for factor in (a, b))
    if not stacked and not traced(sums) and serve(sums):
        return load("cuda", "operands").finished(sums, a, b, bias, dtype)
    if any_factor and a is not None and b is not None:
        a, b = balanced(a, b)
    for factor in (a, b):  # the compiler fuses these with what follows
        sums = sums if factor is None else sums * factor
    return (sums if bias is None else sums + bias).to(dtype)


FP8 = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
FP8_UNIT = (9, 0)  # compute capability of the FP8 unit whose sums `formats.accumulator` has as "fp8_unit": Hopper's
_FP8_ALIGNED = 16  # what the library wants sizes to be multiples of


def codes(
    x: Tensor,
    cast: Cast,
    scale: Tensor | float,
    key: Tensor | None = None,
    amax: Tensor | None = None,
    inner: tuple[int, ...] = (-1,),
) -> list[Tensor]:
    """x rounded as the cast says, as an FP8 unit takes it: float8 of x's shape, without the scale; `amax` as in `payload`.

    inner: the axes whose elements are to be neighbours in memory, each of one result (0: columns of a matrix lie one after
    another). Where the compiler fuses this with what makes x there is one result, in x's layout: the compiler would not keep
    another until the backward.

    A NaN stays one; an inf becomes one where the format has no inf.
    """
    dtype = FP8[cast.grid.name]
    if not traced(x):
        plan = _plan(cast, x)
        found = load("cuda", "codes").codes(plan, _at_hand(x), scale, inner=inner, key=key, amax=amax)
        return [one.view(dtype) for one in found]
    facts = _pointwise_facts(cast.spec) if amax is None and torch.compiler.is_compiling() else None
    if facts is not None and not cast.grid.has_inf:  # a GPU's conversion saturates an inf, and keeps a NaN
        return [pointwise.codes(x.detach(), scale, facts, dtype)]
    made = torch.ops.altgrad.codes(x, pointwise.as_tensor(scale, x), key, cast.spec, amax, inner)
    return [one.t().view(dtype) if axis == 0 else one.view(dtype) for axis, one in zip(inner, made)]


def fp8_product(
    a: Tensor, b: Tensor, of_a: Tensor | None, of_b: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """((a @ b) * of_a) * of_b + bias of float8 matrices [rows, K] and [K, columns] by a GPU's FP8 unit, in `dtype`.

    Args:
        of_a, of_b: as in `finished`. One factor each multiplies where the unit adds up; its library rounds that as it likes.

    Raises:
        KernelError: the GPU has no FP8 unit, or one with other sums than Hopper's.
    """
    _check_unit(a.device.index)
    (rows, depth), columns = a.shape, b.shape[1]
    if not rows * depth * columns:
        sums = torch.zeros(rows, columns, dtype=torch.float32, device=a.device)
        return finished(sums, None, None, bias, dtype)
    a = _padded(a, 0, -depth % _FP8_ALIGNED)
    b = _padded(b.t(), -columns % _FP8_ALIGNED, -depth % _FP8_ALIGNED).t()
    factors = of_a, of_b
    scales = [
        torch.ones((), dtype=torch.float32, device=a.device) if f is None or f.numel() > 1 else f.reshape(())
        for f in factors
    ]
    after = [None if f is None or f.numel() == 1 else f for f in factors]
    plain = bias is None and after == [None, None]
    sums = torch._scaled_mm(
        a, b, scales[0], scales[1], out_dtype=dtype if plain else torch.float32, use_fast_accum=False
    )
    if sums.shape[1] != columns:
        sums = sums.narrow(1, 0, columns).clone(memory_format=torch.contiguous_format)
    return sums if plain else finished(sums, after[0], after[1], bias, dtype)


def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


_capability._dynamo_marked_constant = True


def _check_unit(index: int | None) -> None:
    capability = _capability(index)
    if capability != FP8_UNIT:
        raise KernelError(
            f"accumulator fp8_unit on a GPU of compute capability {'.'.join(map(str, capability))}; the unit that it names "
            'is that of 9.0 (Hopper); use accumulator "hopper_fp8_promoted", which emulates it anywhere'
        )


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x, contiguous, with so many more rows and columns of zeros."""
    if not rows and not columns:
        return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
    return torch.nn.functional.pad(x.view(torch.uint8), (0, columns, 0, rows)).view(x.dtype)


def _at_hand(x: Tensor) -> Tensor:
    """x with values in memory."""
    x = readable(x) if is_unusual(x) else x
    return x.detach()


@torch.library.custom_op(
    "altgrad::largest", mutates_args=(), schema="(Tensor x, float? fmt_max, bool power_of_two, int? axis) -> Tensor"
)
def _largest(x: Tensor, fmt_max: float | None, power_of_two: bool, axis: int | None) -> Tensor:
    return largest(x, fmt_max, power_of_two, axis)


@_largest.register_fake
def _(x, fmt_max, power_of_two, axis):
    shape = () if axis is None else [n if d == axis else 1 for d, n in enumerate(x.shape)]
    return x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "altgrad::payload",
    mutates_args=("amax",),
    schema="(Tensor x, Tensor scale, Tensor? key, str spec, int[] powers, Tensor(a!)? amax, ScalarType dtype)"
    " -> (Tensor, Tensor)",
)
def _payload(x, scale, key, spec, powers, amax, dtype):
    plan = _plan(Cast.parse(spec), x)
    found = load("cuda", "operands").payload(plan, x, scale, tuple(powers), key=key, amax=amax, dtype=dtype)
    return found.values, found.factor


@_payload.register_fake
def _(x, scale, key, spec, powers, amax, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(scale.shape, dtype=torch.float32)


@torch.library.custom_op(
    "altgrad::payload_and_codes",
    mutates_args=("amax",),
    schema="(Tensor x, Tensor scale, Tensor? key, str spec, int[] powers, Tensor(a!)? amax) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _payload_and_codes(x, scale, key, spec, powers, amax):
    """As `payload_and_codes`, with no element where nothing is added."""
    values, factor, saved = payload_and_codes(x, Cast.parse(spec), scale, tuple(powers), key, amax)
    codes, poison = saved if len(saved) > 1 else (*saved, scale.new_empty(0))
    return values, factor, codes, poison


@_payload_and_codes.register_fake
def _(x, scale, key, spec, powers, amax):
    poison = x.new_empty((0,) if special_codes(Cast.parse(spec).grid)[1] >= 0 else (), dtype=torch.float32)
    made = (x.new_empty(x.shape, dtype=dtype) for dtype in (torch.bfloat16, torch.uint8))
    values, codes = made
    return values, x.new_empty(scale.shape, dtype=torch.float32), codes, poison


@torch.library.custom_op(
    "altgrad::decoded_payload",
    mutates_args=(),
    schema="(Tensor codes, Tensor? poison, Tensor scale, str spec, int[] powers) -> (Tensor, Tensor)",
)
def _decoded_payload(codes, poison, scale, spec, powers):
    return decoded((codes,) if poison is None else (codes, poison), Cast.parse(spec), scale, tuple(powers))


@_decoded_payload.register_fake
def _(codes, poison, scale, spec, powers):
    return codes.new_empty(codes.shape, dtype=torch.bfloat16), codes.new_empty(scale.shape, dtype=torch.float32)


@torch.library.custom_op(
    "altgrad::payload_by_number",
    mutates_args=(),
    schema="(Tensor x, float scale, Tensor? key, str spec, int[] powers, ScalarType dtype) -> Tensor",
)
def _payload_by_number(x, scale, key, spec, powers, dtype):
    plan = _plan(Cast.parse(spec), x)
    return load("cuda", "operands").payload(plan, x, scale, tuple(powers), key=key, dtype=dtype).values


@_payload_by_number.register_fake
def _(x, scale, key, spec, powers, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op(
    "altgrad::block_payload", mutates_args=(), schema="(Tensor x, Tensor? key, str spec) -> Tensor"
)
def _block_payload(x, key, spec):
    return block_payload(x, Cast.parse(spec), (0, 0), key)[0]


@_block_payload.register_fake
def _(x, key, spec):
    return x.new_empty(x.shape, dtype=torch.bfloat16)


@torch.library.custom_op(
    "altgrad::two_level_payload",
    mutates_args=(),
    schema="(Tensor x, Tensor? key, str spec, int[] powers) -> (Tensor, Tensor)",
)
def _two_level_payload(x, key, spec, powers):
    return block_payload(x, Cast.parse(spec), tuple(powers), key)


@_two_level_payload.register_fake
def _(x, key, spec, powers):
    return x.new_empty(x.shape, dtype=torch.bfloat16), x.new_empty((), dtype=torch.float32)


@torch.library.custom_op(
    "altgrad::codes",
    mutates_args=("amax",),
    schema="(Tensor x, Tensor scale, Tensor? key, str spec, Tensor(a!)? amax, int[] inner) -> (Tensor, Tensor)",
)
def _codes(x, scale, key, spec, amax, inner):
    """As `codes`, contiguous: where axis 0 is innermost the transpose. The second is empty where there is but one."""
    plan = _plan(Cast.parse(spec), x)
    made = load("cuda", "codes").codes(plan, x, scale, inner=tuple(inner), key=key, amax=amax)
    first, *second = [one.t() if axis == 0 else one for axis, one in zip(inner, made, strict=True)]
    return first, second[0] if second else first.new_empty(0)


@_codes.register_fake
def _(x, scale, key, spec, amax, inner):
    shapes = [x.shape[::-1] if axis == 0 else x.shape for axis in inner]
    first, second = [x.new_empty(shape, dtype=torch.uint8) for shape in [*shapes, (0,)][:2]]
    return first, second
