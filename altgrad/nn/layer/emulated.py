"""A layer's call in the arithmetic of a library or a unit: what a recipe asks for beyond a GEMM of quantized operands.

    transforms      a block Hadamard transform along the reduced axis of both operands of a GEMM
    inverse scales  x is multiplied by fl(max / amax); Transformer Engine's delayed scales, which start at 1
    requantization  a backward's operand made of what the forward's entry made of the tensor
    accumulators    products added up as a matrix unit does

Every operand is laid out with the reduced axis last and kept as values, as float32; operands that are one quantization
are shared, transposed. Straight-through: rounding passes gradients as they are, and scales are constants of the backward.
Where the forward mixed an operand and the backward requantizes what came of it, the gradient is mixed back. The backward
is not differentiable again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from altgrad.errors import RecipeError
from altgrad.formats.accumulator import Accumulator
from altgrad.formats.rounding import Overflow
from altgrad.nn.layer.contractions import Contraction, Matrices
from altgrad.nn.layer.gemm import Route, mm
from altgrad.nn.layer.operand import Operand, carrier
from altgrad.nn.layer.state import LayerState
from altgrad.nn.layer.uses import offset, shift_of
from altgrad.nn.recipe.scaling_choice import BlockScaling, CurrentScaling, is_block, multiplies
from altgrad.nn.recipe.spec import GEMMS, REDUCED, OperandSpec, grid_of
from altgrad.nn.session import as_key_tensor, recomputing
from altgrad.quantization import Cast, Want, amax
from altgrad.quantization.accumulation import Terms, accumulate_terms, group_terms, terms
from altgrad.quantization.block_stats import measure_blocks
from altgrad.quantization.codec import scale_values
from altgrad.quantization.hadamard import Signs
from altgrad.quantization.inverse_scaling import (
    RegionScaling,
    RegionState,
    inverse_scale,
    largest_of,
    multiply_blocks,
    outer_blocks,
)
from altgrad.quantization.mxfp4 import between_neighbours, power_blocks
from altgrad.quantization.stats import measure
from altgrad.quantization.tensor_cores import FP8, fp8_product, serve
from altgrad.randomness import stream_base

_LARGEST = torch.finfo(torch.float32).max


class Laid(NamedTuple):
    """A quantized operand [rows, reduced].

    values: as they enter a plain product. payload: on the format's grid. factor: what dequantizes the payload after the
    sum: 0-d or [rows, 1]. blocks: float32 scales [rows, blocks along the reduced axis] of a block format. inside: where an
    element is not clipped, if its gradient asks.
    """

    values: Tensor
    payload: Tensor | None = None
    factor: Tensor | None = None
    blocks: Tensor | None = None
    inside: Tensor | None = None

    def t(self, spec: OperandSpec) -> Laid:
        """The same quantization for a GEMM that reduces the other axis; of tensors and tiles only."""
        blocks = self.blocks
        if blocks is not None:
            down, across = spec.resolved.tile
            blocks = blocks[::down].t().repeat_interleave(across, 0)[: self.values.shape[1]]
        payload = None if self.payload is None else self.payload.t()
        return Laid(self.values.t(), payload, self.factor, blocks)

    def terms(self, spec: OperandSpec, accumulator: Accumulator) -> Terms:
        """What a unit multiplies."""
        fmt, grid = spec.resolved, grid_of(spec.resolved)
        assert self.payload is not None
        if self.blocks is None:
            return terms(self.payload, grid)
        across = fmt.tile[1]
        if accumulator.group > 1:
            return group_terms(
                self.payload, grid, self.blocks.repeat_interleave(across // accumulator.group, 1), accumulator.group
            )
        if accumulator.scaled_promotion:
            return terms(self.payload, grid, scales=self.blocks)
        spread = self.blocks.repeat_interleave(across, 1)[:, : self.payload.shape[1]]
        return terms(self.payload, grid, multipliers=spread)


def serves(state: LayerState, products: Contraction, x: Tensor, w: Tensor) -> bool:
    """Whether a call's arithmetic is emulated here: that of a recipe that `is_emulated`, unless a GPU's own unit has
    all of it."""
    recipe, plain = state.recipe, isinstance(products, Matrices) and x.ndim == 2 and w.ndim == 2
    unit = recipe.by_unit and plain and on_unit(x) and not torch._C._are_functorch_transforms_active()
    return recipe.is_emulated and not unit


def on_unit(x: Tensor) -> bool:
    """Whether a tensor is where `fp8_product` multiplies."""
    return x.device.type == "cuda" and x.dtype != torch.float64


def once(state: LayerState) -> str:
    """Why a second derivative is refused."""
    return f"layer {state.name!r}: {state.recipe} adds up as a unit does, and is differentiated once; drop create_graph"


def multiply(
    state: LayerState,
    products: Contraction,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    training: bool,
) -> Tensor:
    """The forward of a layer whose recipe `is_emulated`: x [rows, in], w [out, in] ([in, out] if transposed).

    Raises:
        RecipeError: no matrices, or compiled code or a transform of torch.func, which have no rules for this.
    """
    if not isinstance(products, Matrices) or x.ndim != 2 or w.ndim != 2:
        raise RecipeError(
            f"layer {state.name!r}: accumulators, transforms, inverse scales and requantization are for linear layers; "
            "give others a recipe without them, by an override"
        )
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise RecipeError(
            f"layer {state.name!r}: {state.recipe} emulates a unit's arithmetic, which neither torch.compile nor torch.func "
            "traces; run it in eager mode"
        )
    call = _Call(state, state.records(training), state.use(training), dtype, products.transposed)
    return _Layer.apply(call, x, w, bias)  # type: ignore[return-value]


class _Call(NamedTuple):
    state: LayerState
    record: bool
    use: int
    dtype: torch.dtype
    transposed: bool

    def laid(self, gemm: str, role: str, x: Tensor, forward: Laid | None = None) -> Laid:
        """The operand of a GEMM, made of x [rows, columns], or where the recipe says so of the forward's result."""
        operand = self.state.operands[gemm, role]
        spec = operand.spec
        if spec.requantize:
            assert forward is not None
            x = forward.values
        turned = REDUCED[gemm, role] == 0
        x = carrier(x.t() if turned else x).contiguous()
        if spec.format is None:
            return Laid(x)
        if spec.hadamard is not None:
            x = spec.hadamard(x, self.signs(gemm, x))
        key = operand.key_of(self.use, x)
        if operand.block:
            found = _blocks(spec, x, key, operand.move_average(x) if gemm == "forward" else None)
        else:
            found = self._scaled(operand, x, turned, key)
        if self.state.session.observer is not None and self._recorded(role):
            _publish(operand, x, found)
        return found

    def _recorded(self, role: str) -> bool:
        """Whether scale histories and observers hear of this quantization: not where a forward is recomputed."""
        return self.record and (role == "grad_output" or not recomputing())

    def signs(self, gemm: str, x: Tensor) -> Tensor | None:
        """The signs that both operands of a GEMM are mixed with, where x is."""
        one = getattr(self.state.recipe, gemm)
        hadamard = one.named()[0][1].hadamard
        if hadamard is None:
            return None
        key = None
        if hadamard.signs is Signs.RANDOM:
            session, base = self.state.session, stream_base(self.state.name, "hadamard", gemm)
            if serve(x):
                key = session.key_beside(x, base, False, shift_of(self.use))
            else:
                key = as_key_tensor(session.key(base, per_rank=False)) + offset(self.use)
        return hadamard.draw(key, x.device)

    def _scaled(self, operand: Operand, x: Tensor, turned: bool, key: Tensor | None) -> Laid:
        """An operand in a scalar format, x with the reduced axis last."""
        spec, fmt, policy = operand.spec, operand.fmt, operand.spec.scaling
        plain = cast_along_rows(spec)
        if multiplies(policy):
            if isinstance(policy, RegionScaling):
                if operand.role != "grad_output" and recomputing():
                    raise RecipeError(
                        f"layer {operand.layer!r}: scaling by regions moves on with each forward, and this one is recomputed "
                        "by activation checkpointing; use amax scaling, or no checkpointing"
                    )
                s = region_state(operand, policy).s
                if self.record:
                    operand.pending = largest_of(x)
            else:
                assert isinstance(policy, CurrentScaling)
                largest = largest_of(x, _turned(policy.axis, turned))
                s = inverse_scale(largest, fmt.max, power_of_two=policy.power_of_two, floor=policy.floor)
            scaled = (x * s).clamp(-_LARGEST, _LARGEST)
            payload = plain(torch.where(x.isfinite(), scaled, x), key=key).values
            assert payload is not None
            factor = 1 / s
            return Laid(payload * factor, payload, factor)
        if isinstance(policy, CurrentScaling):
            axis = _turned(policy.axis, turned)
            scale: Tensor = policy.update(amax(x, axis), (), fmt)[0]
        else:
            found = operand.scale_of(x.t() if turned else x, self.record)
            scale = torch.as_tensor(found, dtype=torch.float32)
            scale = scale.t() if turned and scale.ndim == 2 else scale
        made = plain(x, scale, key=key, want=Want.VALUES | Want.CODES)
        assert made.codes is not None
        assert made.values is not None
        payload = torch.where(x.isfinite(), plain.decode(made.codes), x)
        return Laid(torch.where(x.isfinite(), made.values, x), payload, scale)

    def product(self, gemm: str, a: Laid, b: Laid) -> Tensor:
        """The sums of a GEMM, [rows of a, rows of b], in float32."""
        one = getattr(self.state.recipe, gemm)
        if one.accumulator is None:
            return mm(a.values, b.values.t(), Route.FLOAT32)
        (_, left), (_, right) = ((role, self.state.operands[gemm, role].spec) for role in GEMMS[gemm])
        if one.accumulator.by_unit and a.values.is_cuda:
            assert a.payload is not None
            assert b.payload is not None
            codes = (laid.payload.to(FP8[spec.format]) for laid, spec in ((a, left), (b, right)))  # type: ignore[union-attr]
            sums = fp8_product(next(codes), next(codes).t(), None, None, None, torch.float32)
        else:
            sums = accumulate_terms(
                a.terms(left, one.accumulator), b.terms(right, one.accumulator), one.accumulator
            ).float()
        factors = [f for f in (a.factor, None if b.factor is None else b.factor.t()) if f is not None]
        for factor in factors:
            sums = sums * factor
        return sums

    def close(self, *places: tuple[str, str]) -> None:
        """The end of a region for the operands of Transformer Engine's delayed scaling."""
        for operand in {id(o): o for o in (self.state.operands[place] for place in places)}.values():
            policy = operand.spec.scaling
            if isinstance(policy, RegionScaling) and operand.pending is not None:
                after = policy.close(operand.pending, region_state(operand, policy), operand.fmt)
                operand.keep_window(torch.cat([after.s.reshape(1), after.window]))
                operand.pending = None


def forward_weight(state: LayerState, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(a weight as float32, mixed if the forward mixes it; what the forward's entry makes of it), of one new shape.

    Nothing is recorded, and no random bits are taken.
    """
    operand = state.w
    if not state.recipe.is_emulated:
        values = operand.quantize(weight, operand.scale_of(weight, False), operand.key_of(0, weight))
        return carrier(weight).clone(), values
    call = _Call(state, False, 0, torch.float32, state.transposed)
    laid = carrier(weight.t() if state.transposed else weight)
    mixed = operand.spec.hadamard
    kept = laid.clone() if mixed is None else mixed(laid, call.signs("forward", laid))
    return kept, call.laid("forward", "weight", laid).values


class _Layer(torch.autograd.Function):
    """The fused call."""

    @staticmethod
    def forward(ctx, call: _Call, x, w, bias):  # type: ignore[override]
        state = call.state
        weight = w.t() if call.transposed else w
        qx, qw = call.laid("forward", "input", x), call.laid("forward", "weight", weight)
        y = call.product("forward", qx, qw)
        if bias is not None:
            y = y + bias
        need_x, need_w = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        back_x = _again(state, "input", "weight_grad", qx, x, call) if need_w else Laid(x.new_empty(0))
        back_w = _again(state, "weight", "input_grad", qw, weight, call) if need_x else Laid(w.new_empty(0))
        call.close(("forward", "input"), ("forward", "weight"))
        ctx.call, ctx.shapes = call, (x.shape, weight.shape)
        ctx.dtypes = x.dtype, w.dtype, None if bias is None else bias.dtype
        back = [field for laid in (back_x, back_w) for field in laid[:4]]  # all that a product takes
        ctx.layout = [field is not None for field in back]
        masks = [_mask(state, role, t, q) for role, t, q in (("input", x, qx), ("weight", weight, qw))]
        ctx.masks = [mask is not None for mask in masks]
        kept = [field for field in back if field is not None]
        ctx.save_for_backward(*kept, *(mask for mask in masks if mask is not None))
        return y.to(call.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        call: _Call = ctx.call
        saved = iter(ctx.saved_tensors)
        fields = [next(saved) if here else None for here in ctx.layout]
        back_x, back_w = Laid(*fields[:4]), Laid(*fields[4:])  # type: ignore[arg-type]
        masks = [next(saved) if here else None for here in ctx.masks]
        need_x, need_w, need_bias = ctx.needs_input_grad[1:4]
        state, dx, dw, db = call.state, None, None, None
        qdy = call.laid("input_grad", "grad_output", dy) if need_x else None
        if need_x:
            dx = call.product("input_grad", qdy, back_w)  # type: ignore[arg-type]
            dx = dx if masks[0] is None else torch.where(masks[0], dx, 0)
            dx = _unmixed(call, dx, "weight", "input_grad", ctx.shapes[0][1]).to(ctx.dtypes[0])
        if need_w:
            shared = qdy is not None and _shared(state, "grad_output", "input_grad", "weight_grad")
            left = qdy.t(state.dy.spec) if shared else call.laid("weight_grad", "grad_output", dy)  # type: ignore[union-attr]
            dw = call.product("weight_grad", left, back_x)
            dw = dw if masks[1] is None else torch.where(masks[1], dw, 0)
            dw = _unmixed(call, dw, "input", "weight_grad", ctx.shapes[1][1])
            dw = (dw.t() if call.transposed else dw).to(ctx.dtypes[1])
        call.close(("input_grad", "grad_output"), ("weight_grad", "grad_output"))
        if need_bias:
            db = dy.sum(0, dtype=torch.float32).to(ctx.dtypes[2])
        return None, dx, dw, db


def _again(state: LayerState, role: str, gemm: str, forward: Laid, original: Tensor, call: _Call) -> Laid:
    """The operand of a gradient, from the forward's quantization where they share one."""
    if _shared(state, role, "forward", gemm):
        return forward.t(state.operands["forward", role].spec)
    return call.laid(gemm, role, original, forward)


def _shared(state: LayerState, role: str, first: str, second: str) -> bool:
    """Whether two GEMMs that reduce different axes have one quantization of the operand: equal entries for all of a
    tensor, or for tiles of it."""
    one, other = state.operands[first, role].spec, state.operands[second, role].spec
    if one != other or one.hadamard is not None or one.requantize or one.format is None:
        return False
    fmt = one.resolved
    return fmt.is_tile and fmt.tile[0] == fmt.tile[1] if is_block(fmt) else getattr(one.scaling, "axis", None) is None


def _unmixed(call: _Call, grad: Tensor, role: str, gemm: str, length: int) -> Tensor:
    """The gradient of a tensor that the forward mixed, where it is one of the mixed tensor."""
    recipe = call.state.recipe
    hadamard = getattr(recipe.forward, role).hadamard
    if hadamard is None or not getattr(getattr(recipe, gemm), role).requantize:
        return grad
    return hadamard.back(grad, call.signs("forward", grad), length)


def _mask(state: LayerState, role: str, x: Tensor, laid: Laid) -> Tensor | None:
    """Where the straight-through gradient passes, if the forward's entry masks; of mixed elements where it mixed them."""
    operand = state.operands["forward", role]
    if not operand.spec.mask_saturated or laid.factor is None:
        return None
    if operand.block:
        return laid.inside
    return (carrier(x) / laid.factor).abs() <= operand.fmt.max


def _blocks(spec: OperandSpec, x: Tensor, key: Tensor | None, average: Tensor | None = None) -> Laid:
    """An operand in a block format, the blocks along the last axis of x; `average` decides between neighbours."""
    fmt, policy = spec.resolved, spec.scaling
    down, rows = fmt.tile[0], len(x)
    assert isinstance(policy, BlockScaling)
    if policy.own_scales:
        own = power_blocks(x, fmt, deviation=policy.deviation, gain=policy.gain, rounding=spec.rounding, key=key)
        return Laid(own.values, own.payload, x.new_tensor(own.factor), own.scales, own.inside)
    if policy.outer:
        made = outer_blocks(x, fmt, policy.outer, rounding=spec.rounding, key=key)
        return Laid(made.values, made.payload, None, made.scales)
    if multiplies(policy):
        made = multiply_blocks(x, fmt, rounding=spec.rounding, key=key)
        return Laid(made.values, made.payload, made.tensor_scale, made.scales.repeat_interleave(down, 0)[:rows])
    cast = cast_along_rows(spec)
    found = cast(x, key=key, want=Want.VALUES | Want.CODES)
    assert found.codes is not None
    assert found.scales is not None
    payload = torch.where(x.isfinite(), _elements(spec).decode(found.codes), x)
    blocks = scale_values(found.scales, fmt, None)
    if average is not None:
        spread = blocks.repeat_interleave(down, 0)[:rows].repeat_interleave(fmt.tile[1], 1)[:, : x.shape[1]]
        payload = between_neighbours(x / spread, average / spread, fmt.element)
        found = found._replace(values=payload * spread)
    factor = torch.ones(()) if found.tensor_scale is None else found.tensor_scale
    return Laid(found.values, payload, factor, blocks.repeat_interleave(down, 0)[:rows])  # type: ignore[arg-type]


@cache
def cast_along_rows(spec: OperandSpec) -> Cast:
    """The cast of an operand whose blocks run along the last axis."""
    cast = spec.cast
    assert cast is not None
    return replace(cast, clamp=False, overflow=Overflow.SATURATE_FINITE) if multiplies(spec.scaling) else cast


@cache
def _elements(spec: OperandSpec) -> Cast:
    return Cast(grid_of(spec.resolved))


def region_state(operand: Operand, policy: RegionScaling) -> RegionState:
    """What an operand remembers, s in front of the window (one tensor, as it is saved with the model's state)."""
    kept = operand.window
    return policy.init() if kept is None else RegionState(kept[1:], kept[0])


def _turned(axis, turned: bool) -> int | None:
    """A policy's axis in the layout with the reduced axis last."""
    if axis is None:
        return None
    (only,) = (axis,) if isinstance(axis, int) else axis
    return 1 - only % 2 if turned else only % 2


def _publish(operand: Operand, x: Tensor, laid: Laid) -> None:
    """Statistics of a quantization, as the fused kernels count them; elements beyond the largest value have overflowed."""
    assert laid.payload is not None
    grid = grid_of(operand.spec.resolved)
    beyond = 1 + grid.ulp(grid.max) / 2 / grid.max
    over = (laid.payload.abs() == grid.max) & (x.abs() > laid.values.abs() * beyond) & x.isfinite()
    stats = measure(x, laid.values, over)
    if operand.block:
        assert laid.blocks is not None
        scales = laid.blocks[:: operand.fmt.tile[0]] * (1.0 if laid.factor is None else laid.factor)
        stats = replace(stats, blocks=measure_blocks(x, laid.values, scales, operand.fmt))
    scale = 1.0 if operand.block or laid.factor is None else laid.factor
    operand.publish(stats, scale)
