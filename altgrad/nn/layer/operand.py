"""One operand of one GEMM at one layer: its spec, its scale with its history, its random key; quantize, save, restore.

Delayed scales are rolled once for each optimizer step. Within a step every use only raises `pending`, the largest amax
seen: a maximum is idempotent, so a forward that activation checkpointing recomputes leaves no second trace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from altgrad.errors import CodeError
from altgrad.formats.rounding import Overflow, Rounding
from altgrad.jit.grid_table import special_codes
from altgrad.nn.layer.uses import shift_of
from altgrad.nn.recipe.scaling_choice import CurrentScaling, DelayedScaling, StaticScaling, StorageScaling, is_block
from altgrad.nn.recipe.spec import OperandSpec
from altgrad.nn.session import Numbered, Session, as_key_tensor
from altgrad.quantization import NoScaling, Quantized, QuantizedTensor, Want, amax
from altgrad.quantization.block_stats import measure_blocks
from altgrad.quantization.checks import traced
from altgrad.quantization.codec import divided, scale_values
from altgrad.quantization.kernels.choose import load
from altgrad.quantization.memory import is_unusual
from altgrad.quantization.products.multiply import Codes, fits_exponents
from altgrad.quantization.scaling import DelayedState, host_scale
from altgrad.quantization.tensor_cores import roll, serve, tensor_scale
from altgrad.randomness import as_int64, stream_base

if TYPE_CHECKING:
    from altgrad.nn.storage import GridStorage

_VALUES_CODES = Want.VALUES | Want.CODES
_PAYLOADS = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
UNSEEN = -1.0  # a pending amax of a step in which the operand was not used, or a place in a history for one

Saved = tuple[Tensor, ...]  # what one operand keeps for the backward: codes, or values where codes would not be smaller


class Operand(Numbered):
    """How a layer quantizes one of its tensors, for the GEMMs that share the entry.

    Args:
        spec: the recipe's entry.
        session: the model's clock, seed and observer.
        layer, role, gemm: where it is used; `gemm` is the first GEMM that uses it.
        axis: axis (or axes) of the tensor that keep scales of their own, in the tensor's own layout; None: one scale.
        block_axis: axis that the blocks of a block format run along: the one that the GEMM reduces.
    """

    def __init__(
        self, spec: OperandSpec, session: Session, layer: str, role: str, gemm: str, axis=None, block_axis: int = -1
    ) -> None:
        self.spec, self.session = spec, session
        self.layer, self.role, self.gemm = layer, role, gemm
        self.fmt: Any = spec.resolved  # a FloatFormat, a BlockFormat, or None
        self.block, self.axis = is_block(self.fmt), axis
        self.block_axis = -1 if self.block and self.fmt.is_tile else block_axis  # tiles lie on the last two axes
        self.reduced: tuple[int, ...] = ()  # the axis that each GEMM which shares the operand reduces, 0 or 1
        self.saves_codes = self.fmt is not None and (self.block or self.fmt.bits <= 8)
        self.compact = False  # whether a GPU, too, keeps it as codes: the recipe's `save_codes`
        self.cores: Any = None  # the `gemm.Route` on which a GPU's tensor cores multiply it in some product
        self.storage: GridStorage | None = None  # whose scale a stored weight has
        self.window: Tensor | None = None
        self.pending: Tensor | None = None
        self.average: Tensor | None = None  # of the weight, where an average of it decides how it is rounded
        self.averaged = (0, -1)  # how often it was moved, and in which step last
        self._scale: Tensor | None = None  # of a full history on a GPU, kept as long as that
        self._collects = False  # whether the next use of x raises `pending` while it is rounded
        self.key: Tensor | None = None
        self.per_rank = role != "weight"  # whether each process draws bits of its own
        self.as_values = 0  # uses in which a NaN or inf without a code made the operand travel as values
        self.delayed = isinstance(spec.scaling, DelayedScaling)
        self.shares_amax = self.delayed and role != "weight" and axis is None
        self.everywhere = True  # False where it depends on the data which processes use the layer
        self.follows_storage = isinstance(spec.scaling, StorageScaling)
        # A stored weight was rounded when it was written; reading it must not round it another way.
        rounding = Rounding.NEAREST_EVEN if self.follows_storage else spec.rounding
        self.stochastic, self._base = rounding is Rounding.STOCHASTIC, as_int64(stream_base(layer, role, gemm))
        cast, along = spec.cast, self.block_axis if self.block else -1
        self.cast = None if cast is None else replace(cast, rounding=rounding, axis=along)
        if self.stochastic or self.delayed:
            session.operands.append(self)
        self.register()
        self.renew_key()

    @property
    def kept_axes(self) -> tuple[int, ...]:
        """The axes that keep scales of their own."""
        return _axes(self.axis)

    # -- steps ----------------------------------------------------------------------------------------------------

    def renew_key(self) -> None:
        """Set the random key of the session's present step; in place, so that compiled code sees it."""
        if self.stochastic and not self.session.capturing():
            fresh = as_key_tensor(self.session.key(self._base, per_rank=self.per_rank))
            self.key = fresh if self.key is None else self.key.copy_(fresh)

    def roll(self) -> None:
        """Close a step: the step's largest amax enters the history, which leaves it alone where nothing was seen.

        On a GPU the history, its scale and `pending` stay where they are, so that a CUDA graph goes on reading them.
        """
        policy, pending = self.spec.scaling, self.pending
        if not isinstance(policy, DelayedScaling) or pending is None:
            return
        if not serve(pending) and pending.device.type == "cpu" and pending.numel() == 1 and float(pending) < 0:
            self.pending = None
            return
        if not self._stays(policy):
            self.keep_window(policy.update(pending, DelayedState(self.window), self.fmt)[1].window)
            self.pending = None
            return
        if self.window is None or len(self.window) < policy.history:
            self.keep_window(_with_room(self.window, policy.history, pending))
            assert self.window is not None
        if self._scale is None:
            self._scale = torch.empty_like(pending)
        roll(self.window, pending, self._scale, self.fmt.max, policy.margin, policy.power_of_two)

    def keep_window(self, window: Tensor) -> None:
        """Go on with another history of that length; on a GPU in the tensor that CUDA graphs go on reading."""
        if self.window is not None and serve(window) and self.window.shape == window.shape:
            self.window.copy_(window)
        else:
            before = 0 if self.window is None else len(self.window)
            why = f"the scale history of {self.layer!r} ({self.role}) grows, from {before} entries to {len(window)}"
            self.session.refuse_capture(why, "take steps until it is full")
            self.window = window

    def _stays(self, policy: DelayedScaling) -> bool:
        """Whether the history is one of float32 amaxes on a GPU, and serves before it is full."""
        pending, window = self.pending, self.window
        if pending is None or not serve(pending) or pending.ndim or pending.dtype != torch.float32:
            return False
        if window is None:
            return policy.warm_up == 1
        return window.ndim == 1 and window.device == pending.device and len(window) >= policy.warm_up

    def memory(self) -> dict[str, Tensor]:
        """What the next scale depends on, apart from the spec; never written in place afterwards."""
        found = [("window", self.window), ("pending", self.pending), ("average", self.average)]
        kept = {name: t.clone() if serve(t) else t for name, t in found if t is not None}
        return kept if self.average is None else {**kept, "averaged": torch.tensor(self.averaged)}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from what `memory` gave; into the tensors that are there, where they are kept."""
        window, pending, average = (memory.get(name) for name in ("window", "pending", "average"))
        self.averaged = tuple(memory["averaged"].tolist()) if "averaged" in memory else (0, -1)
        if window is not None and self.window is not None and serve(self.window) and window.ndim == 1:
            window = _with_room(window, max(len(window), len(self.window)), self.window)
        self.window, self.pending, self.average = (
            old.copy_(new) if old is not None and new is not None and serve(old) and old.shape == new.shape else new
            for old, new in ((self.window, window), (self.pending, pending), (self.average, average))
        )
        if self._scale is not None:
            self._scale = None if self.window is None else self._scale.copy_(self.delayed_scale(self.window, False))

    def move_average(self, weight: Tensor) -> Tensor | None:
        """The average of the weight after the steps so far, once it decides; None before that, or where none is kept.

        The first call of a step sees what the last one left of the weight, and moves the average.
        """
        policy = self.spec.average
        if policy is None:
            return None
        if self.average is None or self.average.shape != weight.shape or self.averaged[0] < policy.start:
            why = f"{self.layer!r} has averaged its weight over {self.averaged[0]} of its first {policy.start} steps"
            self.session.refuse_capture(why, "take those before the capture")
        now = self.session.step
        if self.average is None or self.average.shape != weight.shape:
            self.average, self.averaged = weight.detach().clone(), (0, now)
        elif now > self.averaged[1]:
            moved = policy.moved(self.average.to(weight.device), weight.detach())
            stays = serve(moved) and self.average.device == moved.device  # where CUDA graphs go on reading it
            self.average = self.average.copy_(moved) if stays else moved
            self.averaged = (self.averaged[0] + 1, now)
        return self.average if self.averaged[0] >= policy.start else None

    # -- scale ----------------------------------------------------------------------------------------------------

    def scale_of(self, x: Tensor, record: bool) -> Tensor | float:
        """The scale for this use of x, a constant of the backward; `record` lets a delayed scale remember the amax."""
        policy = self.spec.scaling
        if isinstance(policy, CurrentScaling):
            if self._on_host(x):
                return host_scale(float(amax(x)), self.fmt.max, policy.power_of_two)
            return policy.update(self._amax(x), (), self.fmt)[0]
        if isinstance(policy, StaticScaling):
            return policy.scale
        if isinstance(policy, StorageScaling):
            assert self.storage is not None
            return self.storage.scale_of(x)
        if not isinstance(policy, DelayedScaling):
            return 1.0
        if torch.compiler.is_compiling():
            return torch.ops.altgrad.delayed_scale(self._amax(x), self.number, record)
        return self.delayed_scale(
            self.window.select(0, 0) if self.window is not None and not record else self._amax(x), record
        )

    def delayed_scale(self, seen: Tensor, record: bool) -> Tensor:
        """The scale of a use with this amax, which the step remembers if `record`; else of the history, if there is one."""
        policy = self.spec.scaling
        assert isinstance(policy, DelayedScaling)
        if record:
            if self.window is None and self.shares_amax and self.everywhere:
                seen = self.session.largest_of_group(seen)
            self.pending = seen if self.pending is None else torch.maximum(self.pending, seen)
        elif self.window is not None:
            seen = self.window.select(0, 0)
        return policy.update(seen, DelayedState(self.window), self.fmt)[0]

    def scale_before(self, x: Tensor, record: bool) -> Tensor | float | None:
        """`scale_of`, or None where the scale is best found together with the codes: nothing remembers it then."""
        if self._waits_for_no_amax(x):
            self._collects = record
            if self._scale is None:
                assert self.window is not None
                self._scale = self.delayed_scale(self.window, False)
            return self._scale
        if self.block and self.fmt.tensor_scale and self._found_at_once(x):
            return tensor_scale(x, self.fmt)
        own = isinstance(self.spec.scaling, CurrentScaling) and (self._on_host(x) or self._found_on_tensor_cores(x))
        return None if own else self.scale_of(x, record)

    def shares_tensor_scale(self, other: Operand, scale: object) -> bool:
        """Whether `scale`, found from a tensor for another operand, is this one's scale of that tensor, above its blocks'."""
        return isinstance(scale, Tensor) and self.block and self.fmt.tensor_scale and self.fmt == other.fmt

    @property
    def channel(self) -> int | None:
        """The one axis of a matrix that keeps scales of its own; None where there is one scale, or more axes keep some."""
        return self.kept_axes[0] % 2 if len(self.kept_axes) == 1 else None

    def _found_at_once(self, x: Tensor) -> bool:
        """Whether the kernels of tensor cores may look for an amax of x."""
        return (
            serve(x)
            and x.dtype != torch.float64
            and not torch.compiler.is_compiling()  # which joins the search for the amax to what computes x
            and (self.session.reduce_amax is None or self.role == "weight")
        )

    def _found_on_tensor_cores(self, x: Tensor) -> bool:
        """Whether the scale of x is found by `tensor_cores.quantized`."""
        one = self.axis is None or (self.channel is not None and x.ndim == 2)
        return one and not self.block and self._found_at_once(x)

    def _waits_for_no_amax(self, x: Tensor) -> bool:
        """Whether the scale is that of the history alone, and the amax of x is found while x is rounded."""
        policy = self.spec.scaling
        if torch.compiler.is_compiling() or not isinstance(policy, DelayedScaling) or self.axis is not None:
            return False
        if self.window is None or not self._found_on_tensor_cores(x):
            return False
        return len(self.window) == policy.history or policy.warm_up == 1

    def collected(self, x: Tensor) -> Tensor | None:
        """The number that rounding x shall raise to its amax, in place; None where that is known, or not recorded."""
        if not self._collects:
            return None
        self._collects = False
        if self.pending is None or self.pending.device != x.device:
            self.pending = x.new_full((), UNSEEN, dtype=torch.float32)
        return self.pending

    def _on_host(self, x: Tensor) -> bool:
        """Whether the one scale of x may be a Python number: it costs less than a tensor, where none has to be waited for."""
        return (
            self.axis is None
            and x.device.type == "cpu"
            and x.dtype != torch.float64
            and (self.session.reduce_amax is None or self.role == "weight")
            and not traced(x)
            and not serve(x)
        )

    def _amax(self, x: Tensor) -> Tensor:
        largest = amax(x, self.axis)
        reduce = self.session.reduce_amax
        if reduce is None or self.role == "weight" or 0 in _axes(self.axis):
            return largest  # weights are replicated; scales of single tokens belong to the rank that has them
        return reduce(largest)

    # -- values ---------------------------------------------------------------------------------------------------

    def key_of(self, use: int | Tensor, x: Tensor) -> Tensor | None:
        """The key that a use of the layer (`Uses.take`) draws its random bits with, to round x or what is where x is.

        None where nothing is drawn.
        """
        if self.key is None:
            return None
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if serve(x) and (compiled or not traced(x)):
            shift = shift_of(use) if isinstance(use, int) else use
            return self.session.key_beside(x, self._base, self.per_rank, shift)
        if not isinstance(use, int):
            return self.key + use
        key = self.key.clone()
        if use:
            key[1:].add_(shift_of(use))
        return key

    def quantize(self, x: Tensor, scale: Tensor | float, key: Any, observed: bool = False) -> Tensor:
        """Values on the grid, of x's shape, in the carrier (float32, or float64 for float64); NaN and inf in place."""
        if self.cast is None:
            return carrier(x)
        values = self._run(x, scale, key, observed, Want.VALUES).values
        assert values is not None
        if self.block and not self.fmt.element.has_nan and waits(x) and bool(x.isnan().any()):
            return self._in_place(x, scale, key)
        return values

    def quantize_and_save(
        self, x: Tensor, scale: Tensor | float, key: Any, observed: bool = False
    ) -> tuple[Tensor, Saved]:
        """Values on the grid, and what the backward needs to have them again.

        A NaN or inf for which the format has no code keeps its place: the values themselves are saved then. Where that
        cannot be decided without waiting (on a GPU, in compiled code) all that was saved becomes NaN instead.
        """
        if not self.saves_codes:
            values = self.quantize(x, scale, key, observed)
            return values, (x if self.cast is None else values,)
        found = self._run(x, scale, key, observed, _VALUES_CODES)
        assert found.values is not None
        if self._has_every_code:
            return found.values, _parts(found)
        if not waits(x):
            return found.values, self._poisoned(found, traced(x))
        if not found.problems and not self._has_nan_block(found):
            return found.values, _parts(found)
        self.as_values += 1
        values = self._in_place(x, scale, key)
        return values, (values,)

    @property
    def _has_every_code(self) -> bool:
        """Whether the format has a code for each NaN and inf that the overflow policy lets pass."""
        element = self.fmt.element if self.block else self.fmt
        return element.has_nan and (element.has_inf or self.spec.overflow is Overflow.SATURATE)

    def _has_nan_block(self, found: Quantized) -> bool:
        if not self.block or self.fmt.element.has_nan:
            return False
        assert found.scales is not None
        return bool((found.scales.isnan() if self.fmt.has_float_scale else found.scales == self._nan_scale).any())

    @property
    def _nan_scale(self) -> int:
        return special_codes(self.fmt.scale_format)[1]

    def _in_place(self, x: Tensor, scale: Tensor | float, key: Any) -> Tensor:
        """Values of the elements that have a code; a NaN or inf stands where it stood."""
        assert self.cast is not None
        x = carrier(x)
        special = x.isnan() if self.spec.overflow is Overflow.SATURATE else ~x.isfinite()
        return torch.where(special, x, self.cast(torch.where(special, 0, x), scale, key=key).values)

    def _poisoned(self, found: Quantized, is_traced: bool) -> Saved:
        """What is saved, with a NaN to be added to it (block formats: with NaN scales) if a NaN or inf had no code."""
        assert found.values is not None
        lost = ~found.values.isfinite().all() if is_traced else torch.as_tensor(found.problems) > 0
        if not self.block:
            return *_parts(found), torch.where(lost, torch.nan, 0.0)
        assert found.scales is not None
        nan = torch.nan if self.fmt.has_float_scale else self._nan_scale
        scales = torch.where(lost, torch.full_like(found.scales, nan), found.scales)
        return _parts(found._replace(scales=scales))

    def save(self, x: Tensor, scale: Tensor | float, key: Any, observed: bool = False) -> Saved:
        """What the backward needs to have the quantized values, without the values."""
        if self.saves_codes and waits(x):
            with suppress(CodeError):  # a NaN or inf without a code
                found = self._found(x, scale, key, observed, Want.CODES)
                if not self._has_nan_block(found):
                    if observed:
                        self.publish(found.stats, scale)
                    return _parts(found)
        return self.quantize_and_save(x, scale, key, observed)[1]

    def _found(self, x: Tensor, scale: Tensor | float, key: Any, observed: bool, want: Want) -> Quantized:
        assert self.cast is not None
        if (pending := self.collected(x)) is not None:
            pending.copy_(torch.maximum(pending, amax(x)))
        if observed:
            want |= Want.STATS | (Want.VALUES | Want.CODES if self.block else Want.STATS)
        found = self.cast(carrier(x), scale, key=key, want=want)
        if observed and self.block and found.stats is not None and not traced(x):
            assert found.values is not None
            assert found.scales is not None
            scales = scale_values(found.scales, self.fmt, found.tensor_scale)
            blocks = measure_blocks(x, found.values, scales, self.fmt, self.block_axis)
            found = found._replace(stats=replace(found.stats, blocks=blocks))
        return found

    def _run(self, x: Tensor, scale: Tensor | float, key: Any, observed: bool, want: Want) -> Quantized:
        found = self._found(x, scale, key, observed, want)
        if observed:
            self.publish(found.stats, scale)
        return found

    def encoded_by_amax(self, x: Tensor) -> tuple[Saved, float] | None:
        """What `save` keeps of x and its scale, in one call; None where that is not one, or something has no code."""
        if self.stochastic or x.dtype == torch.float64 or is_unusual(x):
            return None
        assert isinstance(self.spec.scaling, CurrentScaling)
        assert self.cast is not None
        x = carrier(x)
        plan = self.cast.plan(x.dtype, x.device, Want.CODES)
        found = load("cpu").encode_by_amax(plan, x, self.spec.scaling.power_of_two, host_scale)
        return None if found is None or found[2] or not math.isfinite(found[1]) else ((found[0],), found[1])

    def coded(self, saved: Saved, scale: Tensor | float) -> tuple[Codes, Tensor | None]:
        """The saved codes as an operand of a product, and what multiplies each row or column of it afterwards."""
        codes, *rest = saved
        if self.block:
            assert self.cast is not None
            layout, upper = self.cast.layout(codes.shape), float(rest[1]) if len(rest) > 1 else 1.0
            return Codes(codes, self.fmt, upper, rest[0], (layout.tile_rows, layout.tile_columns)), None
        if not isinstance(scale, float | int) and scale.numel() > 1:
            return Codes(codes, self.fmt), scale
        return Codes(codes, self.fmt, float(scale)), None

    def needs_float32(self, saved: Saved) -> bool:
        """Whether no unit multiplies what was saved: it has parts without a code, is no payload, or has extreme scales."""
        if not self.saves_codes:
            return not (is_payload(saved) or isinstance(self.spec.scaling, NoScaling))
        if saved[0].is_floating_point():
            return not is_payload(saved)
        unit = self.block and self.fmt.power_of_two and self.fmt.element.bits <= 8 and waits(saved[0])
        return unit and not serve(saved[0]) and not fits_exponents(self.coded(saved, 1.0)[0])

    def restore(self, saved: Saved, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        """The values that were saved, in the carrier dtype given; `scale` may be another one than that of the codes."""
        if saved[0].is_floating_point():  # a payload, with its factor unless that is 1, or the values
            values = saved[0].to(dtype)
            return values * saved[1] if len(saved) > 1 else values
        assert self.cast is not None
        if not self.block:
            codes, *poison = saved
            values = self.cast.decode(codes, scale, dtype=dtype)
            return values + poison[0] if poison else values
        codes, scales, *upper = saved
        packed = QuantizedTensor(codes, scales, self.fmt, self.block_axis, codes.shape, *upper)
        return self.cast.decode(packed, dtype=dtype)

    def saturated(self, x: Tensor, scale: Tensor | float) -> Tensor | None:
        """Where the straight-through gradient passes, |x / scale| <= max, if the spec masks; bool of x's shape."""
        return divided(carrier(x), scale).abs() <= self.fmt.max if self.spec.mask_saturated else None

    # -- observation ----------------------------------------------------------------------------------------------

    def publish(self, stats, scale) -> None:
        assert self.session.observer is not None
        self.session.observer.observe(
            layer=self.layer, role=self.role, gemm=self.gemm, stats=stats, scale=scale, fmt=self.fmt
        )


def is_payload(saved: Saved) -> bool:
    """Whether an operand was kept as tensor cores take it, with its factor unless that is 1: payload * 2^p or float8."""
    return bool(saved) and saved[0].dtype in _PAYLOADS


def _with_room(window: Tensor | None, history: int, beside: Tensor) -> Tensor:
    """A history of amaxes, newest first, with room for so many where `beside` is; what was not seen is below any amax."""
    room = torch.full((history,), UNSEEN, dtype=torch.float32, device=beside.device)
    if window is not None:
        room[: len(window)].copy_(window)
    return room


def waits(x: Tensor) -> bool:
    """Whether the host may look into x: it is on the CPU and nothing is traced."""
    return x.device.type == "cpu" and not traced(x)


def _parts(found: Quantized) -> Saved:
    return tuple(part for part in (found.codes, found.scales, found.tensor_scale) if part is not None)


def _axes(axis) -> tuple[int, ...]:
    """The axes that keep scales of their own, as a tuple."""
    return () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)


def carrier(x: Tensor) -> Tensor:
    """x in the dtype that operands are computed in: float32, or float64 for float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
