"""Layers at once: all that a forward, or a backward, quantizes and multiplies, in one compiled call.

Where every product of a layer is one of codes, and every operand finds its scale from itself (or
has that of its stored weight), the forward is one program (`quantization.products.program`) and the backward is another.
They give the bits of the general way (`gemms`), to which a call returns where a program does not serve: scales that
remember, random bits, observers, masks, values without a code, tensors that are not plain float32 matrices.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from altgrad.nn.layer import gemm as rule
from altgrad.nn.layer.contractions import Matrices
from altgrad.nn.layer.operand import Operand
from altgrad.nn.layer.state import LayerState
from altgrad.nn.recipe.scaling_choice import CurrentScaling
from altgrad.nn.session import recomputing
from altgrad.nn.weight_cache import cache_for
from altgrad.quantization.checks import at_hand
from altgrad.quantization.products.units import Unit

if TYPE_CHECKING:
    from altgrad.quantization.products.program import Coded, Program

PLANS_KEPT = 64  # of one layer; shapes that change must not grow it without end
_forked = False  # whether this is a forked process, in which a plan's threads are not


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Plan(NamedTuple):
    """A layer's programs for inputs of one shape.

    x, w: where the forward leaves what the backward multiplies. weights: what encodes the weight alone, for forwards and
    backwards that have its codes in the place of the weight (`cached_weights`). like: tensors without memory of the shapes of x, w, the
    result and what is kept; to be like one costs half of a shape.

    With `weights` and without, what is kept has one layout: activation checkpointing may recompute within `cached_weights`
    what ran without, or the other way round.
    """

    forward: Program
    backward: Program | None
    x: Coded | None
    w: Coded | None
    like: Like
    follows_storage: bool
    weights: Program | None = None

    def run(self, state: LayerState, x: Tensor, w: Tensor, bias: Tensor | None) -> Made | None:
        """The forward; None where the general way must be taken."""
        y, kept = torch.empty_like(self.like.y), torch.empty_like(self.like.kept)
        codes, second, given, last = None, w.data_ptr(), (1.0, 1.0), None
        if self.weights is not None and (cache := cache_for(state.w, w)) is not None:
            found = cache.get(state.w, ("program", self.w is None), w, lambda: self._encoded(state, w))
            if found is None:
                return None
            codes, (_, of_w, _, last) = found
            second, given = codes.data_ptr(), (1.0, of_w)
        elif self.follows_storage:
            given = (1.0, _stored_scale(state, w))
        places = (x.data_ptr(), second, kept.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr())
        scales = self.forward(*places, given)
        if scales is None:
            return None
        if codes is not None and self.w is not None and recomputing():  # for a backward without the cache
            size = len(codes) - self.w.codes_at
            kept[len(kept) - size :].copy_(codes[-size:])
        return Made(y, kept, Once(self, scales if last is None else (*scales[:3], last), codes))

    def _encoded(self, state: LayerState, w: Tensor) -> tuple[Tensor, tuple[float, ...]] | None:
        """(the weight's codes, in the places that the programs know; scales); None where something has no code."""
        assert self.weights is not None
        codes = torch.empty(self.weights.kept, dtype=torch.uint8, device="cpu")
        given = (1.0, _stored_scale(state, w) if self.follows_storage else 1.0)
        scales = self.weights(0, w.data_ptr(), codes.data_ptr(), 0, 0, given)
        return None if scales is None else (codes, scales)


def _stored_scale(state: LayerState, w: Tensor) -> float:
    assert state.storage is not None
    return float(state.storage.scale_of(w))


class Like(NamedTuple):
    """Tensors without memory."""

    x: Tensor
    w: Tensor
    y: Tensor
    kept: Tensor


def _without_memory(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    found = torch.empty(shape, dtype=dtype, device="cpu")
    found.untyped_storage().resize_(0)
    return found


class Once(NamedTuple):
    """A forward that ran at once: by which plan, the scales that it found, and the weight's codes where they are cached."""

    plan: Plan
    scales: tuple[float, ...]
    codes: Tensor | None = None

    def backward(self, dy: Tensor, kept: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
        """The gradients (dx, dw) that were wanted; None where the general way must be taken."""
        plan, like = self.plan, self.plan.like
        if plan.backward is None or dy.dtype is not torch.float32 or not at_hand(dy) or not dy.is_contiguous():
            return None
        if dy.shape != like.y.shape or not at_hand(kept) or kept.shape != like.kept.shape:
            return None
        dx = None if plan.w is None else torch.empty_like(like.x)
        dw = None if plan.x is None else torch.empty_like(like.w)
        out, other = 0 if dx is None else dx.data_ptr(), 0 if dw is None else dw.data_ptr()
        second = 0 if self.codes is None else self.codes.data_ptr()
        done = plan.backward(
            dy.data_ptr(), second, kept.data_ptr(), out, other, (self.scale(plan.x), self.scale(plan.w))
        )
        return None if done is None else (dx, dw)

    def scale(self, one: Coded | None) -> float:
        """The scale of what was kept of x or of w."""
        return 1.0 if one is None else self.scales[one.scale]

    def unstashed(self, kept: Tensor, place: Tensor | None) -> dict:
        """What the general way keeps for its backward."""
        plan = self.plan
        of_w = kept if self.codes is None else self.codes
        x, w = (() if one is None else one.saved(part) for one, part in ((plan.x, kept), (plan.w, of_w)))
        scales = {"sx": self.scale(plan.x), "sw": self.scale(plan.w)}
        return {"x": x, "w": w, **scales, "mask_x": None, "mask_w": None, "place": place}


class Made(NamedTuple):
    """What a forward that ran at once hands to autograd: its result, and what it keeps for the backward."""

    y: Tensor
    kept: Tensor
    once: Once


def plan_for(
    state: LayerState, products, x: Tensor, w: Tensor, bias: Tensor | None, needs: tuple[bool, bool]
) -> Plan | None:
    """The layer's plan for such tensors, or None; all axes of x but the last one count rows.

    needs: whether x and w need gradients.
    """
    plans = state.plans
    if plans.possible is None:
        plans.possible = _allows_programs(state)
    if not plans.possible or state.session.reduce_amax is not None or type(products) is not Matrices:
        return None
    if x.dtype is not torch.float32 or w.dtype is not torch.float32 or x.ndim < 2 or w.ndim != 2:
        return None
    for tensor in (x, w) if bias is None else (x, w, bias):
        if not at_hand(tensor) or not tensor.is_contiguous() or tensor.device.type != "cpu":
            return None
    if bias is not None and bias.dtype is not torch.float32:
        return None
    key = (products, x.shape, w.shape, needs, bias is None, torch.get_num_threads(), _forked, rule.PROCESSOR)
    cached = cache_for(state.w, w) is not None
    try:
        return plans[key, cached]
    except KeyError:
        if len(plans) >= PLANS_KEPT:
            plans.clear()
        found = plans[key, cached] = _plan(state, products, x, w, bias, needs, cached)
        return found


def _allows_programs(state: LayerState) -> bool:
    """Whether the layer's operands allow programs, whatever the shapes."""
    return not state.recipe.is_emulated and all(map(_finds_its_scale, state.operands.values()))


def _finds_its_scale(operand: Operand) -> bool:
    if operand.stochastic or not operand.saves_codes or operand.spec.mask_saturated:
        return False
    if operand.block:
        return operand.fmt.power_of_two and not operand.fmt.tensor_scale
    if operand.follows_storage:
        return operand.storage is not None and not operand.storage.per_channel
    return isinstance(operand.spec.scaling, CurrentScaling) and operand.axis is None


def _plan(
    state: LayerState,
    products: Matrices,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool],
    cached: bool,
) -> Plan | None:
    from altgrad.quantization.products.program import FIRST, KEPT, NOTHING, OTHER, OUT, ROOM, SECOND, Program

    need_x, need_w = needs
    x_shape = torch.Size((math.prod(x.shape[:-1]), x.shape[-1]))
    outputs = products.sizes("forward", x_shape, w.shape)[1]
    dy_shape = torch.Size((x_shape[0], outputs))

    def unit(gemm: str, a: torch.Size, b: torch.Size) -> Unit | None:
        return state.route(gemm, products.sizes(gemm, a, b), x.device, torch.float32).unit

    unit_forward = unit("forward", x_shape, w.shape)
    unit_x = unit("input_grad", dy_shape, w.shape) if need_x else Unit.BF16
    unit_w = unit("weight_grad", dy_shape, x_shape) if need_w else Unit.BF16
    if unit_forward is None or unit_x is None or unit_w is None or x_shape[0] == 0:
        return None

    def encoded(program: Program, operand: Operand, shape: torch.Size, address: int, where: int, scale: int) -> Coded:
        power_of_two = getattr(operand.spec.scaling, "power_of_two", False)
        given = operand.follows_storage
        return program.encode(operand.cast, power_of_two, shape, address, where, scale, given=given)  # type: ignore[arg-type]

    forward = Program()
    shares_x, shares_w = state.x_back is state.x, state.w_back is state.w
    of_x = encoded(forward, state.x, x_shape, FIRST, KEPT if need_w and shares_x else ROOM, 0)
    back_x = None if not need_w else of_x if shares_x else encoded(forward, state.x_back, x_shape, FIRST, KEPT, 2)
    weights = Program() if cached else forward
    of_w = encoded(weights, state.w, w.shape, SECOND, KEPT if cached or (need_x and shares_w) else ROOM, 1)
    back_w = None if not need_x else of_w if shares_w else encoded(weights, state.w_back, w.shape, SECOND, KEPT, 3)
    if cached:  # the codes are in the weight's place
        of_w = of_w._replace(where=SECOND)
        if back_w is not None:
            back_w = back_w._replace(where=SECOND)
            forward.leave_room(weights.kept - back_w.codes_at)
    if not shares_w and state.w_back.follows_storage:
        return None  # its scale would have to be given, too
    forward.multiply(*products.ordered("forward", of_x, of_w), unit_forward, OUT, NOTHING if bias is None else OTHER)
    backward = None
    if need_x or need_w:
        backward = Program()
        dy = encoded(backward, state.dy if need_x else state.dy_back, dy_shape, FIRST, ROOM, 2)
        shares_dy = not (need_x and need_w) or state.dy_back is state.dy
        dy_back = dy if shares_dy else encoded(backward, state.dy_back, dy_shape, FIRST, ROOM, 3)
        if back_w is not None:
            backward.multiply(*products.ordered("input_grad", dy, back_w._replace(scale=1)), unit_x, OUT)
        if back_x is not None:
            backward.multiply(*products.ordered("weight_grad", dy_back, back_x._replace(scale=0)), unit_w, OTHER)
    programs = [program for program in (weights if cached else None, forward, backward) if program is not None]
    if not all(program.fits for program in programs):
        return None
    for program in programs:
        program.close()
    like = Like(
        _without_memory(x.shape),
        _without_memory(w.shape),
        _without_memory((*x.shape[:-1], outputs)),
        _without_memory((max(forward.kept, 1),), torch.uint8),
    )
    return Plan(forward, backward, back_x, back_w, like, state.w.follows_storage, weights if cached else None)
