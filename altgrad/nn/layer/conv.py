"""The quantized convolution and its two gradients, each on the operands that its recipe names, in float32.

The operands are quantized values in float32 and the products are those of torch's own convolution, in the precision
that torch is set to; no bf16 route is taken here. Blocks of a block format run along the channels (forward and
input_grad) and along the batch (weight_grad).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altgrad.nn.layer.gemm import Route
from altgrad.nn.layer.linear import output_dtype
from altgrad.nn.layer.products import Ready, ready_and_saved, restored, stash, unstash
from altgrad.nn.layer.state import LayerState

CONV_REDUCED = {  # input [n, c, ...], weight [o, c, ...], grad_output [n, o, ...]
    ("forward", "input"): 1,
    ("forward", "weight"): 1,
    ("input_grad", "grad_output"): 1,
    ("input_grad", "weight"): 0,
    ("weight_grad", "grad_output"): 0,
    ("weight_grad", "input"): 0,
}


def conv_forward(state: LayerState, module: nn.Module, x: Tensor) -> Tensor:
    """The forward of a torch Conv1d, Conv2d or Conv3d: x [n, c, ...] or [c, ...], any padding mode."""
    w, bias, spatial = module.weight, module.bias, len(module.kernel_size)  # type: ignore[arg-type]
    if state.session.bypass:
        return module._conv_forward(x, w, bias)  # type: ignore[operator]
    unbatched = x.ndim == spatial + 1
    x = x.unsqueeze(0) if unbatched else x
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        around = (0,) * (2 * spatial) if padding == "valid" else module._reversed_padding_repeated_twice
        x, padding = F.pad(x, around, mode=mode), (0,) * spatial  # type: ignore[arg-type]
    geometry = (list(module.stride), list(padding), list(module.dilation), module.groups)  # type: ignore[arg-type]
    record = state.records(module.training)
    sx, sx_back = state.scale_pair(state.x, state.x_back, x, record)
    sw, sw_back = state.scale_pair(state.w, state.w_back, w, record)  # type: ignore[arg-type]
    dtype = output_dtype(x, w)  # type: ignore[arg-type]
    y = _Conv.apply(x, w, bias, sx, sx_back, sw, sw_back, state, record, dtype, geometry)
    return y.squeeze(0) if unbatched else y


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, sx, sx_back, sw, sw_back, state: LayerState, record: bool, dtype, geometry):
        need_x, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        observed = state.observed(record)
        keep_x, keep_w = need_w and state.x_back is state.x, need_x and state.w_back is state.w
        options = state.x.options(), state.w.options()
        qx, saved_x = ready_and_saved(state.x, x, sx, options[0], Route.FLOAT32, observed, keep=keep_x)
        qw, saved_w = ready_and_saved(state.w, w, sw, options[1], Route.FLOAT32, observed, keep=keep_w)
        stride, padding, dilation, groups = geometry
        carried = None if bias is None else bias.to(qx.values.dtype)
        y = torch.convolution(
            qx.values, qw.values, carried, stride, padding, dilation, False, [0] * len(stride), groups
        ).to(dtype)
        if need_w and not keep_x:
            saved_x = state.x_back.save(x, sx_back, state.x_back.options(), observed)
        if need_x and not keep_w:
            saved_w = state.w_back.save(w, sw_back, state.w_back.options(), observed)
        mask_x = state.x.saturated(x, sx) if need_x else None
        mask_w = state.w.saturated(w, sw) if need_w else None
        stash(
            ctx,
            x=saved_x,
            w=saved_w,
            sx=sx if keep_x else sx_back,
            sw=sw if keep_w else sw_back,
            mask_x=mask_x,
            mask_w=mask_w,
        )
        ctx.state, ctx.record, ctx.geometry = state, record, geometry
        ctx.dtypes = (x.dtype, w.dtype, None if bias is None else bias.dtype)
        ctx.shapes = x.shape, w.shape
        ctx.dy_options = (state.dy.options(), state.dy_back.options())
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        state: LayerState = ctx.state
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        kept = unstash(ctx)
        work = torch.float64 if dy.dtype == torch.float64 else torch.float32
        observed = ctx.record and state.session.observer is not None
        dx = dw = qdy = None
        if need_x:
            scale = state.dy.scale_of(dy, ctx.record)
            qdy, _ = ready_and_saved(state.dy, dy, scale, ctx.dy_options[0], Route.FLOAT32, observed, keep=False)
            qw = restored(state.w_back, kept["w"], kept["sw"], Route.FLOAT32, work)
            dx = _gradient(ctx, qdy, qw.values.new_empty(1).expand(ctx.shapes[0]), qw.values, of_input=True)
            dx = (dx if kept["mask_x"] is None else dx * kept["mask_x"]).to(ctx.dtypes[0])
        if need_w:
            if qdy is None or state.dy_back is not state.dy:
                scale = state.dy_back.scale_of(dy, ctx.record)
                options = ctx.dy_options[1]
                qdy, _ = ready_and_saved(state.dy_back, dy, scale, options, Route.FLOAT32, observed, keep=False)
            qx = restored(state.x_back, kept["x"], kept["sx"], Route.FLOAT32, work)
            dw = _gradient(ctx, qdy, qx.values, qx.values.new_empty(1).expand(ctx.shapes[1]), of_input=False)
            dw = (dw if kept["mask_w"] is None else dw * kept["mask_w"]).to(ctx.dtypes[1])
        sums = [0, *range(2, dy.ndim)]
        db = dy.sum(sums, dtype=work).to(ctx.dtypes[2]) if need_bias else None
        return dx, dw, db, *(None,) * 8


def _gradient(ctx, dy: Ready, x: Tensor, w: Tensor, *, of_input: bool) -> Tensor:
    """Gradient of the convolution by its input or by its weight; of the other operand only the shape is read."""
    stride, padding, dilation, groups = ctx.geometry
    zeros = [0] * len(stride)
    grads = torch.ops.aten.convolution_backward(
        dy.values, x, w, None, stride, padding, dilation, False, zeros, groups, [of_input, not of_input, False]
    )
    return grads[0] if of_input else grads[1]
