"""One value for one cast: a format with all that says how tensors are rounded to it, resolved once.

    cast = Cast("E4M3", rounding="stochastic", overflow="saturate")
    found = cast(x, scale, key=(seed, stream), want=Want.VALUES | Want.CODES)

A cast holds the plan for each dtype, device, kernel and choice of outputs that it met; a plan holds what depends on
shapes. A call is then: find the plan, pass the gate (`checks.check_call`, the one place where the arguments of a call are
judged, outside of tracing and inside), run the kernel. Tensors that are traced, subclassed or transformed go through the
operators of `altgrad.quantization.operators`, which take the cast's text and end in the same call. `ops` has the faces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from altgrad import errors
from altgrad.errors import (
    AltGradError,
    BlockError,
    CodeError,
    DtypeError,
    FormatError,
    OptionError,
    RandomKeyError,
    ScaleError,
)
from altgrad.formats.block import BlockFormat, block_format_from_spec
from altgrad.formats.catalog import get_format
from altgrad.formats.rounding import Overflow, Rounding, as_option
from altgrad.formats.scalar import FloatFormat, format_from_spec
from altgrad.jit.subnormals import flushed, gradual_underflow
from altgrad.quantization import cast_text
from altgrad.quantization.block_layout import BlockLayout, block_layout
from altgrad.quantization.checks import (
    as_key,
    as_scale,
    at_hand,
    check_block_dtype,
    check_call,
    check_dtype,
    check_encodable,
    check_problems,
    check_scale_shape,
    check_stored_scales,
    hides_from_tracers,
    traced,
)
from altgrad.quantization.codec import check_codes, check_integers, value_table
from altgrad.quantization.kernels.choose import check_kernel, kernel_name, load
from altgrad.quantization.memory import (
    check_beside,
    detached,
    needs_a_detour,
    readable,
    written,
)
from altgrad.quantization.plan import Plan, kept_in
from altgrad.quantization.pointwise import FUSED_DTYPES, Facts, facts_of, nearest, takes
from altgrad.quantization.quantized import Quantized, QuantizedTensor, Want
from altgrad.quantization.scaling import amax, two_level_scale
from altgrad.quantization.stats import QuantStats

VALUES, CODES = Want.VALUES, Want.CODES


@dataclass(frozen=True)
class Cast:
    """How tensors are rounded to a format; frozen, hashable, and `Cast.parse(str(cast)) == cast`.

    Args:
        format: a scalar or block format, or its name.
        rounding, overflow, subnormals, random_bits: as for `altgrad.quantization.quantize`.
        clamp: clamp finite quotients to +-max first (scalar formats; a block's scale follows its amax anyway).
        axis, pad: for block formats: the axis that blocks run along, and whether the last block may be short.

    Raises:
        FormatError, OptionError, RandomKeyError: a field is out of range, or the fields contradict one another.
    """

    format: Any
    rounding: Rounding = Rounding.NEAREST_EVEN
    overflow: Overflow = Overflow.NATIVE
    subnormals: bool = True
    clamp: bool = False
    random_bits: int = 24
    axis: int = -1
    pad: bool = False
    grid: FloatFormat = field(init=False, repr=False, compare=False)  # what elements are rounded to
    spec: str = field(init=False, repr=False, compare=False)
    _plans: dict = field(init=False, repr=False, compare=False, default_factory=dict)
    _layouts: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "format", get_format(self.format))
        put(self, "rounding", as_option(Rounding, self.rounding))
        put(self, "overflow", as_option(Overflow, self.overflow))
        for name in ("subnormals", "clamp", "pad"):
            put(self, name, bool(getattr(self, name)))
        if type(self.random_bits) is not int or not 1 <= self.random_bits <= 32:
            raise RandomKeyError(f"random_bits {self.random_bits} is outside 1..32")
        if type(self.axis) is not int:
            raise OptionError(
                f"axis {self.axis!r} is not an integer; blocks run along one axis, such as -1 for the last"
            )
        element = self.format.element if self.is_block else self.format
        put(self, "grid", element if self.subnormals else element.without_subnormals())
        put(self, "spec", cast_text.written(self))

    @property
    def is_block(self) -> bool:
        """Whether the scales come from blocks of the tensor."""
        return isinstance(self.format, BlockFormat)

    # -- text -----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __reduce__(self):
        return Cast.parse, (self.spec,)  # plans hold addresses of this process

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Cast:
        """The cast that `str` wrote, such as "E4M3(stochastic,saturate)".

        Raises:
            FormatError, OptionError: the format or one of the options in parentheses is unknown.
        """
        name, bracket, options = text.rpartition("(") if text.endswith(")") else (text, "", "")
        read = block_format_from_spec if ";" in name else format_from_spec if "|" in name else get_format
        return Cast(read(name), **dict(cast_text.option(word) for word in options[:-1].split(",") if bracket))

    # -- plans ----------------------------------------------------------------------------------------------------

    def check(self, dtype: torch.dtype, device: torch.device, want: Want, kernel: str | None) -> str:
        """Refuse what no tensor of that dtype and device can give; returns the kernel that runs.

        Raises:
            DtypeError, FormatError, CodeError: with value, limit and remedy.
            KernelError, OptionError: no such kernel, or it does not cover the case.
        """
        check_kernel(kernel)
        if self.is_block:
            check_block_dtype(dtype, self.format)
        else:
            check_dtype(dtype, self.grid if want else self.format)
            if want and not self.format.has_zero:
                raise FormatError(
                    f"{self.format} is a scale format without zero; put an element format such as E4M3 on a tensor"
                )
        if want & CODES and not want & VALUES:
            check_encodable(self.grid, self.overflow)
        if not want:
            value_table(self.grid)  # refuses formats of more values than can be listed
        return kernel_name(self.format, dtype, device, kernel)

    def plan(self, dtype: torch.dtype, device: torch.device, want: Want = VALUES, kernel: str | None = None) -> Plan:
        """The cast resolved; `want` 0 is for decoding to `dtype`.

        It raises what `check` raises.
        """
        found = self._plans.get((dtype, device, want, kernel)) if isinstance(kernel, str | None) else None
        if found is None:
            name = self.check(dtype, device, want, kernel)
            found = Plan(
                self.format,
                self.grid,
                self.rounding,
                self.overflow,
                self.clamp,
                self.random_bits,
                self.axis,
                self.pad,
                dtype,
                device,
                bool(want & VALUES),
                bool(want & CODES),
                bool(want & Want.STATS),
                load(name, "blocks" if self.is_block else "scalar"),
            )
            self._plans[dtype, device, want, kernel] = found
        return found

    # -- calls ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        x: Tensor,
        scale: Tensor | float = 1.0,
        *,
        key: tuple[int, int] | Tensor | None = None,
        out: Tensor | None = None,
        want: Want = VALUES,
        kernel: str | None = None,
    ) -> Quantized:
        """Values, codes and statistics of x in one pass; arguments, edge values and errors as for `quantize`."""
        if not at_hand(x):
            x = readable(x)
            if traced(x) or x.is_meta:
                return call_traced(self.spec, x, scale, key, out, want, kernel)
        return self.run(x, scale, key, out, want, kernel)

    def run(
        self,
        x: Tensor,
        scale: Tensor | float | None,
        key: tuple[int, int] | Tensor | None,
        out: Tensor | None,
        want: Want,
        kernel: str | None,
    ) -> Quantized:
        """The call on a plain tensor: what `__call__` comes to outside of tracing, and an operator inside."""
        if flushed():
            with gradual_underflow():
                return self.run(x, scale, key, out, want, kernel)
        try:
            plan = self._plans[x.dtype, x.device, want, kernel]
        except (KeyError, TypeError):
            plan = self.plan(x.dtype, x.device, want, kernel)
        scale, key = check_call(x, scale, key, out, plan.draws, plan.upper, x.dtype if plan.values else None)
        if out is not None:
            recounts = plan.stats and out.data_ptr() == x.data_ptr()  # the statistics may need x again
            if recounts or needs_a_detour(out, x, scale):
                found = self.run(x, 1.0 if scale is None else scale, key, None, want, kernel)
                return found._replace(values=out.copy_(found.values))
            written(out)
        if scale is None and plan.upper:
            scale = two_level_scale(amax(x), self.format)
        found = plan.run(plan, x, scale, key, out)
        if plan.stats and _last_step_may_overflow(plan, scale, found):
            again = self.plan(x.dtype, x.device, VALUES | Want.STATS, "eager")
            found = found._replace(stats=again.run(again, x, scale, key, None).stats)
        if plan.codes and not plan.values:
            check_problems(found.problems, self.format)
        return found

    def decode(
        self,
        codes: Tensor | QuantizedTensor,
        scale: Tensor | float = 1.0,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        kernel: str | None = None,
    ) -> Tensor:
        """scale * value(code), of the codes' shape and of `dtype`; as the face `altgrad.quantization.decode`."""
        upper: Any = None
        if isinstance(codes, QuantizedTensor):
            check_integers(codes.codes)
            if codes.codes.shape != codes.shape:
                raise BlockError(f"codes of shape {list(codes.codes.shape)} for a tensor of shape {list(codes.shape)}")
            codes, scale, upper = codes.codes, codes.scales, codes.tensor_scale
        elif self.is_block:
            raise _plain_codes(self.spec)
        if not isinstance(dtype, torch.dtype):
            raise DtypeError(f"dtype {dtype!r} is no torch.dtype; pass torch.float32, float64, bfloat16 or float16")
        if not at_hand(codes):
            plain: Any = readable(codes, "codes", CodeError)
            if traced(plain) or plain.is_meta:
                return decode_traced(self.spec, plain, scale, upper, dtype, out, kernel)
            codes = plain
        return self.run_decode(codes, scale, upper, dtype, out, kernel)

    def run_decode(
        self,
        codes: Tensor,
        scale: Any,
        upper: Tensor | None,
        dtype: torch.dtype,
        out: Tensor | None,
        kernel: str | None,
    ) -> Tensor:
        """Decoding on a plain tensor; for block formats `scale` has the stored scales, `upper` the tensor scale."""
        if flushed():
            with gradual_underflow():
                return self.run_decode(codes, scale, upper, dtype, out, kernel)
        try:
            plan = self._plans[dtype, codes.device, 0, kernel]
        except (KeyError, TypeError):
            plan = self.plan(dtype, codes.device, Want(0), kernel)
        check_codes(codes, plan.grid, in_range=not getattr(plan.kernel, "READS_ANY_CODE", False))
        if plan.upper is not None:
            upper = check_stored_scales(codes, scale, upper, self.format, plan.layout(codes.shape))
        if plan.upper is None or out is not None:
            scale, _ = check_call(codes, scale, None, out, False, plan.upper, dtype, decodes=True)
        if out is not None:
            if needs_a_detour(out, codes, scale):
                return out.copy_(plan.kernel.decode(plan, codes, scale, upper, None))
            written(out)
        return plan.kernel.decode(plan, codes, scale, upper, out)

    def layout(self, shape: torch.Size) -> BlockLayout:
        """Where the blocks lie in a tensor of that shape; what is remembered is no shape of symbols."""
        if any(type(size) is not int for size in shape):
            return block_layout(shape, self.format, self.axis, pad=self.pad)
        found = self._layouts.get(shape)
        return found or kept_in(self._layouts, shape, block_layout(shape, self.format, self.axis, pad=self.pad))

    def check_stored_scales(self, codes: torch.Size, scales: torch.Size) -> None:
        """Refuse stored scales that do not fit the codes of a block format.

        Raises:
            BlockError: their shapes do not belong to each other.
        """
        check_scale_shape(codes, scales, self.format, self.layout(codes))


def _last_step_may_overflow(plan: Plan, scale: Any, found: Quantized) -> bool:
    """Whether scale * payload can exceed the tensor's own dtype, where the compiled loops count payloads alone."""
    if not getattr(plan.kernel, "COUNTS_PAYLOADS", False):
        return False
    limit = torch.finfo(plan.dtype).max
    if plan.upper is not None:
        assert found.stats is not None
        return float(found.stats.amax) > limit / 4  # a block's scale follows its amax
    largest = float(scale.max()) if isinstance(scale, Tensor) and scale.numel() else scale
    return isinstance(largest, float) and largest * plan.grid.max > limit


# -- traced calls -----------------------------------------------------------------------------------------------------


def outputs_of(cast: Cast, want: Want) -> tuple[bool, bool, bool, bool, bool]:
    """Which of values, codes, stored scales, statistics and tensor scale an operator returns, in this order."""
    two_levels = cast.is_block and cast.format.tensor_scale
    return bool(want & VALUES), bool(want & CODES), cast.is_block, bool(want & Want.STATS), two_levels


class _Facts(NamedTuple):
    """What a traced call knows of its cast: constants in a graph."""

    refused: tuple[str, str] | None  # kind and words of an error
    want: int
    draws: bool
    upper: bool | None  # as `Plan.upper`
    outputs: tuple[bool, ...]  # as `outputs_of`
    pointwise: Facts | None  # of a cast that a compiler may fuse with what is around it


def _traced_facts(spec: str, want: Want, dtype: torch.dtype, device: torch.device, kernel: str | None) -> tuple:
    cast = Cast.parse(spec)
    upper = cast.format.tensor_scale if cast.is_block else None
    refused = _refusal(lambda: cast.check(dtype, device, want, kernel))
    fuses = want == VALUES and kernel is None and dtype in FUSED_DTYPES
    facts = facts_of(cast.format, cast.grid, cast.rounding, cast.overflow) if fuses and not refused else None
    return _Facts(refused, int(want), cast.rounding is Rounding.STOCHASTIC, upper, outputs_of(cast, want), facts)


def _refusal(judge: Callable[[], Any]) -> tuple[str, str] | None:
    """The error of a check as a constant: the compiler would make what is raised in here an error of its own."""
    try:
        judge()
    except AltGradError as error:
        return type(error).__name__, str(error)
    return None


def _raise(refused: tuple[str, str] | None) -> None:
    if refused is not None:
        raise getattr(errors, refused[0])(refused[1])


_traced_facts._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, without the compiler


def call_traced(
    spec: str,
    x: Tensor,
    scale: Tensor | float,
    key: tuple[int, int] | Tensor | None,
    out: Tensor | None,
    want: Want,
    kernel: str | None,
) -> Quantized:
    """The call as one operator; what cannot be known while tracing is checked when it runs."""
    if hides_from_tracers(x):
        with torch._C.DisableTorchFunctionSubclass():
            return call_traced(spec, x, scale, key, out, want, kernel)
    refused, number, draws, upper, there, pointwise = _traced_facts(spec, want, x.dtype, x.device, kernel)
    _raise(refused)
    if pointwise is not None and out is None and is_dynamo_compiling() and takes(x, scale):
        return Quantized(nearest(detached(x), scale, pointwise))
    given, key = check_call(x, scale, key, out, draws, upper, x.dtype if there[0] else None)
    given = None if given is None else as_scale(x, given, torch.float64)  # which no thread flushes
    parts = iter(torch.ops.altgrad.cast(detached(x), given, as_key(key), spec, number, kernel))
    values, codes, scales, vector, level = [next(parts) if here else None for here in there]
    if out is not None:
        values = out.copy_(values)
    return Quantized(values, codes, scales, None if vector is None else QuantStats(vector), level)


def decode_traced(
    spec: str,
    codes: Tensor,
    scale: Tensor | float,
    upper: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
    kernel: str | None,
) -> Tensor:
    """Decoding as one operator."""
    if hides_from_tracers(codes):
        with torch._C.DisableTorchFunctionSubclass():
            return decode_traced(spec, codes, scale, upper, dtype, out, kernel)
    check_integers(codes)
    refused, _, _, level, *_ = _traced_facts(spec, Want(0), dtype, codes.device, kernel)
    _raise(refused)
    if level is not None:
        for name, given in (("scales", scale), ("tensor_scale", upper)):
            if name == "scales" or given is not None:
                check_beside(given, codes, name, ScaleError)
    scale, _ = check_call(codes, scale, None, out, False, level, dtype, decodes=True)
    found = torch.ops.altgrad.decode(codes, as_scale(codes, scale, torch.float64), upper, spec, dtype, kernel)
    return found if out is None else out.copy_(found)


class TracedCast:
    """A cast inside a compiled graph, where only its text is a constant."""

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def __call__(self, x, scale=1.0, *, key=None, out=None, want=VALUES, kernel=None) -> Quantized:
        return call_traced(self.spec, x, scale, key, out, want, kernel)

    def decode(self, codes, scale=1.0, *, dtype=torch.float32, out=None, kernel=None) -> Tensor:
        if isinstance(codes, QuantizedTensor):
            return decode_traced(self.spec, codes.codes, codes.scales, codes.tensor_scale, dtype, out, kernel)
        if _is_block(self.spec):
            raise _plain_codes(self.spec)
        return decode_traced(self.spec, codes, scale, None, dtype, out, kernel)


def _plain_codes(spec: str) -> FormatError:
    return FormatError(f"format {spec} with plain codes; give a scalar format, or the QuantizedTensor that encode gave")


def _is_block(spec: str) -> bool:
    return Cast.parse(spec).is_block


def _traced_spec(*facts) -> tuple:
    """(text of the cast, None), or (nothing, `_refusal`)."""
    refused = _refusal(lambda: Cast(*facts))
    return "" if refused else Cast(*facts).spec, refused


_is_block._dynamo_marked_constant = _traced_spec._dynamo_marked_constant = True


# -- casts by their facts -------------------------------------------------------------------------------------------

_casts: dict[tuple, Cast] = {}


def cast_for(
    fmt: FloatFormat | BlockFormat | str,
    rounding: Rounding | str = Rounding.NEAREST_EVEN,
    overflow: Overflow | str = Overflow.NATIVE,
    subnormals: bool = True,
    clamp: bool = False,
    random_bits: int = 24,
    axis: int = -1,
    pad: bool = False,
) -> Cast | TracedCast:
    """The cast of these facts, made once."""
    if is_dynamo_compiling():
        spec, refused = _traced_spec(fmt, rounding, overflow, subnormals, clamp, random_bits, axis, pad)
        _raise(refused)
        return TracedCast(spec)
    key = (fmt if type(fmt) is str else id(fmt), rounding, overflow, subnormals, clamp, random_bits, axis, pad)
    try:
        found = _casts[key]
    except (KeyError, TypeError):
        found = Cast(fmt, rounding, overflow, subnormals, clamp, random_bits, axis, pad)  # type: ignore[arg-type]
        return _casts.setdefault(key, found)  # which keeps fmt alive, and so its id
    if type(random_bits) is not int or type(axis) is not int:  # 1.0 equals 1, and is no axis
        return Cast(fmt, rounding, overflow, subnormals, clamp, random_bits, axis, pad)  # type: ignore[arg-type]
    return found
