"""One call of a quantized layer: its three products, what they share, and what is kept between them.

    forward       y  = Q(x) Q(w)      (a contraction: a matrix product, a convolution)
    input_grad    dx = Q(dy) Q(w)
    weight_grad   dw = Q(dy) Q(x)

Each operand is quantized as its entry of the recipe says; equal entries share one quantization. Rounding is passed
straight through (dQ(x)/dx = 1, or 0 where the recipe masks saturated elements); scales are constants of the backward;
the bias and its gradient stay unquantized. Between forward and backward an operand is kept as 8-bit codes where its
format has at most 8 bits.

The backward is differentiable again. For that the forward returns, beside y, a single number that stands for x and w:
where the backward is part of a graph, its restored operands hang on that number, and their gradients go by `post.Post` to
the forward's node, which passes them on to x and w without having kept their values. Under `torch.func` the same formulas
run on pieces of which each has a rule for each transform; a tensor mapped over is quantized sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from altgrad.errors import BlockError, DtypeError, RecipeError
from altgrad.nn.layer import emulated
from altgrad.nn.layer.at_once import Made, Once, plan_for
from altgrad.nn.layer.contractions import Contraction
from altgrad.nn.layer.gemm import Route, autocasts
from altgrad.nn.layer.operand import Operand, Saved, carrier, waits
from altgrad.nn.layer.post import Post, StandIn
from altgrad.nn.layer.products import Cast, Ready, quantized, restored, saved_apart, stash, unstash
from altgrad.nn.layer.state import LayerState
from altgrad.nn.spread import TENSOR_PARALLEL, is_spread
from altgrad.quantization.checks import PLAIN_TYPES


class Call(NamedTuple):
    """What the products of one call of a layer have in common.

    state: the layer's operands. products: its formulas. record: whether scale histories and observers hear of the call.
    observed: whether the forward's statistics are published. dtype: of the output. use: of the layer within the step,
    which forward and backward draw their random bits with.
    """

    state: LayerState
    products: Contraction
    record: bool
    observed: bool
    dtype: torch.dtype
    use: int | Tensor
    once: Once | None = None  # the forward, where it ran in one call

    def route(self, gemm: str, a: Tensor, b: torch.Size) -> Route:
        """The unit that multiplies operand a by one of shape b."""
        sizes = self.products.sizes(gemm, a.shape, b)
        return Route.FLOAT32 if sizes is None else self.state.route(gemm, sizes, a.device, work_dtype(a), waits(a))

    def backward_route(
        self, gemm: str, dy: Tensor, other: torch.Size, operand: Operand, saved: Saved, again: bool
    ) -> Route:
        """The unit of a gradient; float32 where that is differentiated again, or for what was saved."""
        if again and self.state.recipe.by_unit:
            raise RecipeError(emulated.once(self.state))
        return Route.FLOAT32 if again or operand.needs_float32(saved) else self.route(gemm, dy, other)


def multiply(
    state: LayerState,
    products: Contraction,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    training: bool,
    *,
    rows: bool = False,
) -> Tensor:
    """The forward of a layer: the contraction of quantized x and w, plus the bias, with the gradients of the module's head.

    Under autocast the output has autocast's dtype, as the unquantized product's has; operands are quantized from the
    tensors as they arrive. Otherwise x and w must have the same dtype, which is the output's.

    rows: all axes of x but the last one count rows of a matrix, and y has them, too.

    Raises:
        DtypeError: two dtypes without autocast. RecipeError: the weight is spread over processes.
        BlockError: an axis is no multiple of the block, and the recipe wants whole blocks.
    """
    if type(w) not in PLAIN_TYPES and is_spread(w):
        raise RecipeError(f"layer {state.name!r}: {TENSOR_PARALLEL}")
    if state.recipe.is_emulated:
        matrix = as_matrix(x) if rows else x
        if emulated.serves(state, products, matrix, w):
            y = emulated.multiply(state, products, matrix, w, bias, output_dtype(x, w), training)
            return _with_axes(y, x if rows else None)
    record = state.records(training)
    call = Call(state, products, record, state.observed(record), output_dtype(x, w), state.use(training))
    if not state.whole_blocks:
        return _multiply(call, x, w, bias, rows)
    try:
        return _multiply(call, x, w, bias, rows)
    except BlockError as error:
        raise BlockError(f"layer {state.name!r}: {error}; or drop whole_blocks from the recipe") from None


def _multiply(call: Call, x: Tensor, w: Tensor, bias: Tensor | None, rows: bool) -> Tensor:
    given, state, record = x, call.state, call.record
    if transformed():
        return _with_axes(_in_pieces(call, as_matrix(x) if rows else x, w, bias), given if rows else None)
    made = _made_at_once(call, x, w, bias) if rows or x.ndim == 2 else None
    if made is not None:
        call = Call(*call[:-1], made.once)
        # what `apply` does without a transform, less its look for wrappers of transforms that have ended
        found = super(torch.autograd.Function, _Products).apply(call, x, w, bias, None, None, None, None, made)  # type: ignore[misc]
        return found if isinstance(found, Tensor) else found[0]
    if rows:
        x = as_matrix(x)
    sx, sx_back = state.scale_pair(state.x, state.x_back, x, record)
    sw, sw_back = state.scale_pair(state.w, state.w_back, w, record)
    found = _Products.apply(call, x, w, bias, sx, sx_back, sw, sw_back)
    return _with_axes(found if isinstance(found, Tensor) else found[0], given if rows else None)


def _made_at_once(call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> Made | None:
    if call.state.watched(call.record) or call.dtype is not torch.float32 or torch.compiler.is_compiling():
        return None
    grads = torch.is_grad_enabled()
    plan = plan_for(call.state, call.products, x, w, bias, (grads and x.requires_grad, grads and w.requires_grad))
    return None if plan is None else plan.run(call.state, x, w, bias)


def as_matrix(x: Tensor) -> Tensor:
    """x [..., k] as a matrix [rows, k]."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 fails where k is 0


def _with_axes(y: Tensor, x: Tensor | None) -> Tensor:
    """A matrix with the leading axes of x for its rows.

    No view in autograd's eyes, as nn.Linear's is none: what writes to it in place keeps hooks (FSDP2's).
    """
    if x is None or x.ndim == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])


def output_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """The dtype that the unquantized product would have here.

    Raises:
        DtypeError: two dtypes without autocast.
    """
    kind = x.device.type
    if autocasts(kind):
        return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)
    if x.dtype != w.dtype:
        raise DtypeError(f"input is {x.dtype} and weight {w.dtype}; cast one of them, or use torch.autocast")
    return x.dtype


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of x accumulate in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _select(grad: Tensor, kept: Tensor | None) -> Tensor:
    return grad if kept is None else torch.where(kept, grad, 0)


class _Products(torch.autograd.Function):
    """The fused call: y, and the place of x and w where both gradients are wanted."""

    @staticmethod
    def forward(ctx, call: Call, x, w, bias, sx, sx_back, sw, sw_back, made: Made | None = None):
        state = call.state
        need_x, need_w = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        ctx.call, ctx.shapes = call, (x.shape, w.shape)  # a forward made at once takes matrices with more axes
        ctx.dtypes = (x.dtype, w.dtype, None if bias is None else bias.dtype)
        ctx.dy_keys = state.keys_of_gradients(call.use, x)
        ctx.set_materialize_grads(False)
        if made is not None:
            place = torch.empty((), dtype=torch.float32, device="cpu") if need_x and need_w else None
            ctx.save_for_backward(made.kept, place)
            if place is None:
                return made.y
            ctx.post = Post()
            return made.y, place
        route = call.route("forward", x, w.shape)
        keep_x, keep_w = need_w and state.x_back is state.x, need_x and state.w_back is state.w
        qx = quantized(state.x, x, sx, state.x.key_of(call.use, x), route, call.observed, keep=keep_x)
        qw = quantized(state.w, w, sw, state.w.key_of(call.use, w), route, call.observed, keep=keep_w)
        route = Route.FLOAT32 if qx.needs_float32 or qw.needs_float32 else route
        y = call.products.multiply("forward", qx.ready(route), qw.ready(route), route, None, bias, call.dtype)
        y = y.to(call.dtype)
        saved_x, saved_w, sx, sw = qx.kept, qw.kept, qx.scale, qw.scale
        del qx, qw
        if need_w and not keep_x:
            route = call.route("weight_grad", y, x.shape)
            saved_x, sx_back = saved_apart(
                state.x_back, x, sx_back, state.x_back.key_of(call.use, x), route, call.observed
            )
        if need_x and not keep_w:
            route = call.route("input_grad", y, w.shape)
            saved_w, sw_back = saved_apart(
                state.w_back, w, sw_back, state.w_back.key_of(call.use, w), route, call.observed
            )
        place = y.new_empty(()) if need_x and need_w and not torch.compiler.is_compiling() else None
        stash(
            ctx,
            x=saved_x if need_w else (),
            w=saved_w if need_x else (),
            sx=sx if keep_x else sx_back,
            sw=sw if keep_w else sw_back,
            mask_x=state.x.saturated(x, sx) if need_x else None,
            mask_w=state.w.saturated(w, sw) if need_w else None,
            place=place,
        )
        if place is None:
            return y
        ctx.post = Post()
        return y, place

    @staticmethod
    def backward(ctx, dy, of_place=None):  # type: ignore[override]
        call: Call = ctx.call
        of_x, of_w = (None, None) if of_place is None else ctx.post.collect()
        of_x = None if of_x is None else of_x.reshape(ctx.shapes[0])
        if dy is None:  # only the backward's own gradient comes this way
            return None, *(None if g is None else g.to(d) for g, d in zip((of_x, of_w), ctx.dtypes)), *(None,) * 6
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # the backward is part of a graph
        saved = ctx.saved_tensors  # asked for once: a checkpoint hands over what it recomputed only then
        found = None if call.once is None or again else call.once.backward(dy, saved[0])
        if found is None:
            dy = dy if call.once is None else as_matrix(dy)
            found = _gradients(ctx, saved, dy, again, of_x, of_w)
        elif of_place is not None:
            found = tuple(
                grad if grad is None or of is None else grad + of for grad, of in zip(found, (of_x, of_w), strict=True)
            )
        db = None
        if ctx.needs_input_grad[3]:
            axes = call.products.bias_axes(dy.ndim) if call.once is None else range(dy.ndim - 1)
            db = _bias_gradient(dy, axes, ctx.dtypes[2])
        return None, *found, db, *(None,) * 5


def _bias_gradient(dy: Tensor, axes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The sum of dy over the axes that a bias has not, in the bias's dtype."""
    wanted = work_dtype(dy)
    found = dy.sum(tuple(axes)) if dy.dtype == wanted else dy.sum(tuple(axes), dtype=wanted)
    return found if dtype == wanted else found.to(dtype)


def _gradients(ctx, saved: Saved, dy: Tensor, again: bool, of_x: Tensor | None, of_w: Tensor | None):
    """The gradients of x and w, of the dtypes of x and w; `of_x` and `of_w` are added to them."""
    call: Call = ctx.call
    kept = unstash(ctx, saved) if call.once is None else call.once.unstashed(*saved)
    found, taken = [], None
    for mine, added in enumerate((of_x, of_w)):
        grad = None
        if ctx.needs_input_grad[1 + mine]:
            grad, taken = _gradient(ctx, mine, dy, kept, again, added, taken)
        found.append(grad)
    return tuple(found)


class _Taken(NamedTuple):
    """dy as the product of one gradient took it."""

    cast: Cast
    route: Route
    ready: Ready


def _gradient(
    ctx, mine: int, dy: Tensor, kept: dict, again: bool, added: Tensor | None, before: _Taken | None
) -> tuple[Tensor, _Taken]:
    """The gradient of x (0) or w (1), and dy as it took it.

    before: dy as the other gradient took it, to be shared where both have the same entry of the recipe.
    """
    call, state = ctx.call, ctx.call.state
    gemm, other, operand, of_dy = (
        ("input_grad", "w", state.w_back, state.dy),
        ("weight_grad", "x", state.x_back, state.dy_back),
    )[mine]
    route = call.backward_route(gemm, dy, ctx.shapes[1 - mine], operand, kept[other], again)
    known = None if before is None else before.cast
    if known is not None and known.operand is not of_dy:
        before = None
    if before is None:
        observed = state.watched(call.record)
        shared = known is not None and of_dy.shares_tensor_scale(known.operand, known.scale)
        scale = known.scale if shared else of_dy.scale_before(dy, call.record)  # type: ignore[union-attr]
        wanted = of_dy.reduced if ctx.needs_input_grad[2 - mine] else of_dy.reduced[-mine:][:1]
        cast = quantized(of_dy, dy, scale, ctx.dy_keys[mine], route, observed, keep=False, reduced=wanted)
    elif not before.cast.saved and route is not Route.FLOAT32:  # the other product needed no codes
        cast = quantized(of_dy, dy, before.cast.scale, ctx.dy_keys[mine], route, False, keep=False)
    else:
        cast = before.cast
    route = Route.FLOAT32 if cast.needs_float32 else route
    ready = before.ready if before is not None and before.route is route else cast.ready(route)
    a, b = ready, restored(operand, kept[other], kept[f"s{other}"], route, work_dtype(dy))
    if again:
        a, place = Ready(straight(_Given(a.values), dy)), kept["place"]
        b = b if place is None else Ready(StandIn.apply(place, b.values, ctx.post, 1 - mine))  # type: ignore[arg-type]
    dtype, shape = ctx.dtypes[mine], ctx.shapes[mine]
    if call.once is None:
        grad = call.products.multiply(gemm, a, b, route, shape, None, dtype if added is None else None)
    else:
        grad = call.products.multiply(gemm, a, b, route).reshape(shape)
    mask = kept["mask_w" if mine else "mask_x"]
    return _select(grad if added is None else grad + added, mask).to(dtype), _Taken(cast, route, ready)


# -- pieces that every transform knows ----------------------------------------------------------------------------------


class Quantizer(NamedTuple):
    """One use of an operand, as a function of the tensor: (values in the carrier, where its gradient passes).

    scale: a scale found before; None finds it from the tensor.
    """

    operand: Operand
    key: Tensor | None
    record: bool
    observed: bool
    scale: Tensor | float | None = None

    @property
    def masks(self) -> bool:
        """Whether the gradient stops anywhere."""
        return self.operand.spec.mask_saturated

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.operand.scale_of(x, self.record) if self.scale is None else self.scale
        values = self.operand.quantize(x, scale, self.key, self.observed)
        kept = self.operand.saturated(x, scale) if self.masks else x.new_ones((), dtype=torch.bool)
        return values if values is not x else x.clone(), kept  # type: ignore[return-value]


class _Given(NamedTuple):
    """Values that were quantized before."""

    values: Tensor
    masks = False

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.values.detach(), x.new_ones((), dtype=torch.bool)


class _Straight(torch.autograd.Function):
    """The values that `quantize` makes of x, with the gradient of x."""

    @staticmethod
    def forward(quantize, x):  # type: ignore[override]
        return quantize(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        quantize, x = inputs
        ctx.masks, ctx.dtype = quantize.masks, x.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        if ctx.masks:
            ctx.save_for_backward(output[1])
            ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[override]
        if grad is None:
            return None, None
        return None, _select(grad.to(ctx.dtype), ctx.saved_tensors[0] if ctx.masks else None)

    @staticmethod
    def vmap(info, in_dims, quantize, x):
        if in_dims[1] is None:
            return _StraightForward.apply(quantize, x), (None, None)
        samples = [_StraightForward.apply(quantize, one) for one in x.unbind(in_dims[1])]
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0, 0)  # type: ignore[arg-type]


class _StraightForward(_Straight):
    """The same with a derivative in forward mode, which the compiler would not trace."""

    @staticmethod
    def jvp(ctx, _, tangent):
        if tangent is None:
            return None, None
        return _select(carrier(tangent), ctx.saved_tensors[0] if ctx.masks else None), None


def straight(quantize: Quantizer | _Given, x: Tensor) -> Tensor:
    """Values of x on the grid, in the carrier, with the straight-through gradient."""
    if torch.compiler.is_compiling():
        return _Straight.apply(quantize, x)[0]
    if torch._C._are_functorch_transforms_active():
        return _StraightForward.apply(quantize, x)[0]
    # as in `_multiply`
    return super(torch.autograd.Function, _StraightForward).apply(quantize, x)[0]  # type: ignore[misc]


class _Pieces(torch.autograd.Function):
    """The products of operands that are quantized already; `x_back` and `w_back` are those of the gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, qx, qw, bias, x_back, w_back):  # type: ignore[override]
        return call.products.multiply("forward", Ready(qx), Ready(qw), Route.FLOAT32, bias=bias).to(call.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, qx, qw, bias, x_back, w_back = inputs
        ctx.shapes, ctx.bias_dtype = (qx.shape, qw.shape), None if bias is None else bias.dtype
        ctx.save_for_backward(x_back, w_back)
        ctx.save_for_forward(qx, qw)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        call: Call = ctx.call
        state, (x_back, w_back) = call.state, ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad[1:4]
        observed = state.watched(call.record)
        dx = dw = db = qdy = None
        if need_x:
            qdy = _quantized(call, state.dy, dy, observed)
            dx = call.products.multiply("input_grad", Ready(qdy), Ready(w_back), Route.FLOAT32, ctx.shapes[0])
        if need_w:
            if qdy is None or state.dy_back is not state.dy:
                qdy = _quantized(call, state.dy_back, dy, observed)
            dw = call.products.multiply("weight_grad", Ready(qdy), Ready(x_back), Route.FLOAT32, ctx.shapes[1])
        if need_bias:
            db = _bias_gradient(dy, call.products.bias_axes(dy.ndim), ctx.bias_dtype)
        return None, dx, dw, db, None, None

    @staticmethod
    def jvp(ctx, _, of_x, of_w, of_bias, *__):
        call: Call = ctx.call
        qx, qw = ctx.saved_tensors
        parts = []
        if of_x is not None:
            parts.append(call.products.multiply("forward", Ready(of_x), Ready(qw), Route.FLOAT32))
        if of_w is not None:
            parts.append(call.products.multiply("forward", Ready(qx), Ready(of_w), Route.FLOAT32))
        total = sum(parts[1:], parts[0]) if parts else qx.new_zeros(())
        if of_bias is not None:
            axes = [1] * (total.ndim - 2) if len(call.products.bias_axes(total.ndim)) > 1 else []
            total = total + of_bias.reshape(-1, *axes)
        return total.to(call.dtype)


def _quantized(call: Call, operand: Operand, x: Tensor, observed: bool) -> Tensor:
    if operand.fmt is None:
        return carrier(x)
    return straight(Quantizer(operand, operand.key_of(call.use, x), call.record, observed), x)


def _in_pieces(call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The call made of pieces, for transforms."""
    state = call.state
    qx, qw = (_quantized(call, o, t, call.observed) for o, t in ((state.x, x), (state.w, w)))
    x_back = qx if state.x_back is state.x else _quantized(call, state.x_back, x, call.observed)
    w_back = qw if state.w_back is state.w else _quantized(call, state.w_back, w, call.observed)
    return _Pieces.apply(call, qx, qw, bias, x_back, w_back)  # type: ignore[return-value]
