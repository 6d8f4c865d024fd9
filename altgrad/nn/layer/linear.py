"""The quantized product y = x w^T + b and its two gradients, each GEMM on the operands that its recipe names.

    forward       y  = Q(x) Q(w)^T + b
    input_grad    dx = Q(dy) Q(w)
    weight_grad   dw = Q(dy)^T Q(x)

Rounding is passed straight through (dQ(x)/dx = 1, or 0 where the recipe masks saturated elements); scales are constants
of the backward; the bias and its gradient stay unquantized. Between forward and backward each operand is kept as 8-bit
codes where its format has at most 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.errors import DtypeError
from altgrad.nn.layer.gemm import Route
from altgrad.nn.layer.products import Ready, product, ready_and_saved, restored, stash, unstash
from altgrad.nn.layer.state import LayerState


def linear_forward(state: LayerState, x: Tensor, w: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """The layer's forward: x [..., in], w [out, in] (or [in, out] where the state says so), bias [out].

    Under autocast the output has autocast's dtype, as `torch.nn.functional.linear`'s has; operands are quantized from
    the tensors as they arrive. Otherwise x and w must have the same dtype, which is the output's.
    """
    if state.session.bypass:
        return torch.nn.functional.linear(x, w.t() if state.transposed else w, bias)
    record = state.records(training)
    rows = x.reshape(-1, x.shape[-1])
    sx, sx_back = state.scale_pair(state.x, state.x_back, rows, record)
    sw, sw_back = state.scale_pair(state.w, state.w_back, w, record)
    y = _Linear.apply(rows, w, bias, sx, sx_back, sw, sw_back, state, record, output_dtype(x, w))
    return y.view(*x.shape[:-1], y.shape[-1])


def output_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """The dtype that the unquantized product would have here.

    Raises:
        DtypeError: two dtypes without autocast.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)
    if x.dtype != w.dtype:
        raise DtypeError(f"input is {x.dtype} and weight {w.dtype}; cast one of them, or use torch.autocast")
    return x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, sx, sx_back, sw, sw_back, state: LayerState, record: bool, dtype: torch.dtype):
        need_x, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        observed = state.observed(record)
        columns = w.shape[1] if state.transposed else w.shape[0]
        route = state.route("forward", (x.shape[0], columns, x.shape[1]), x.device, _work_dtype(x))
        keep_x, keep_w = need_w and state.x_back is state.x, need_x and state.w_back is state.w
        qx, saved_x = ready_and_saved(state.x, x, sx, state.x.options(), route, observed, keep=keep_x)
        qw, saved_w = ready_and_saved(state.w, w, sw, state.w.options(), route, observed, keep=keep_w)
        y = _with_bias(qx, qw if state.transposed else qw.t(), route, bias).to(dtype)
        del qx, qw
        if need_w and not keep_x:
            saved_x = state.x_back.save(x, sx_back, state.x_back.options(), observed)
        if need_x and not keep_w:
            saved_w = state.w_back.save(w, sw_back, state.w_back.options(), observed)
        stash(
            ctx,
            x=saved_x,
            w=saved_w,
            sx=sx if keep_x else sx_back,
            sw=sw if keep_w else sw_back,
            mask_x=state.x.saturated(x, sx) if need_x else None,
            mask_w=state.w.saturated(w, sw) if need_w else None,
        )
        ctx.state, ctx.record = state, record
        ctx.dtypes = (x.dtype, w.dtype, None if bias is None else bias.dtype)
        ctx.dy_options = (state.dy.options(), state.dy_back.options())
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        state: LayerState = ctx.state
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        kept, work = unstash(ctx), _work_dtype(dy)
        observed = ctx.record and state.session.observer is not None
        dx = dw = None
        shared: tuple[Ready, Route] | None = None
        scale = None
        if need_x:
            inner, outer = kept["w"][0].shape if state.transposed else kept["w"][0].shape[::-1]
            route = state.route("input_grad", (dy.shape[0], inner, outer), dy.device, work)
            scale = state.dy.scale_of(dy, ctx.record)
            qdy, _ = ready_and_saved(state.dy, dy, scale, ctx.dy_options[0], route, observed, keep=False)
            qw = restored(state.w_back, kept["w"], kept["sw"], route, work)
            dx = _masked(product(qdy, qw.t() if state.transposed else qw, route), kept["mask_x"]).to(ctx.dtypes[0])
            shared = (qdy, route) if state.dy_back is state.dy else None
            del qw
        if need_w:
            route = state.route("weight_grad", (dy.shape[1], kept["x"][0].shape[1], dy.shape[0]), dy.device, work)
            if shared is not None and shared[1] is route:
                qdy = shared[0]
            else:
                if scale is None or state.dy_back is not state.dy:
                    scale = state.dy_back.scale_of(dy, ctx.record)
                again = observed and shared is None
                qdy, _ = ready_and_saved(state.dy_back, dy, scale, ctx.dy_options[1], route, again, keep=False)
            qx = restored(state.x_back, kept["x"], kept["sx"], route, work)
            dw = product(qx.t(), qdy, route) if state.transposed else product(qdy.t(), qx, route)
            dw = _masked(dw, kept["mask_w"]).to(ctx.dtypes[1])
        db = dy.sum(0, dtype=work).to(ctx.dtypes[2]) if need_bias else None
        return dx, dw, db, None, None, None, None, None, None, None


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _with_bias(a: Ready, b: Ready, route: Route, bias: Tensor | None) -> Tensor:
    out = product(a, b, route)
    return out if bias is None else out.add_(bias)


def _masked(grad: Tensor, mask: Tensor | None) -> Tensor:
    return grad if mask is None else grad.mul_(mask)
