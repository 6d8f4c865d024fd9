"""Operands made ready for a GEMM, the product of two of them, and what a backward keeps of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.formats.block import BlockFormat
from altgrad.nn.layer import tensor_cores
from altgrad.nn.layer.gemm import Route, mm, pull_apart
from altgrad.nn.layer.operand import Operand, Saved, is_payload, waits
from altgrad.nn.weight_cache import cache_for
from altgrad.quantization import tensor_cores as tensor_products
from altgrad.quantization.products.multiply import Codes, multiply
from altgrad.quantization.products.units import Unit
from altgrad.quantization.tensor_cores import finished, serve


class Ready(NamedTuple):
    """A matrix to multiply: values or codes.

    factor: what the product is multiplied by afterwards, a number or one for each of its rows or columns; None: nothing
    was pulled out. other: the same float8 values in the other layout, where both were made.
    """

    values: Tensor
    factor: Tensor | None = None
    codes: Codes | None = None
    other: Tensor | None = None

    def t(self) -> Ready:
        """The transposed matrix (last two axes)."""
        factor = self.factor if self.factor is None or self.factor.ndim < 2 else self.factor.transpose(-2, -1)
        if self.codes is not None:
            return Ready(self.values, factor, self.codes.t())
        other = None if self.other is None else self.other.t()
        return Ready(self.values.transpose(-2, -1), factor, None, other)

    def row_by_row(self) -> Tensor:
        """The values in the layout whose rows lie one after another, if there is one."""
        return self.values if self.other is None or self.values.is_contiguous() else self.other


class Cast(NamedTuple):
    """A quantized operand before its unit is chosen.

    values: in the carrier; None where only codes were made. saved: what the backward keeps (`()`: nothing). other: those codes
    in a second layout, or codes: what it keeps instead.
    """

    operand: Operand
    values: Tensor | None
    saved: Saved
    scale: Tensor | float
    dtype: torch.dtype
    other: Tensor | None = None
    codes: Saved = ()

    @property
    def kept(self) -> Saved:
        """What the backward keeps."""
        return self.codes or self.saved if self.other is None else (self.other, *self.saved[1:])

    @property
    def needs_float32(self) -> bool:
        """Whether only its values can be multiplied (`Operand.needs_float32`)."""
        return bool(self.saved) and self.operand.needs_float32(self.saved)

    def ready(self, route: Route) -> Ready:
        """The operand for a GEMM on `route`."""
        if self.values is None or route.unit is not None:
            ready = restored(self.operand, self.saved, self.scale, route, self.dtype)
            return ready if self.other is None else ready._replace(other=self.other)
        if route is Route.FLOAT32:
            return Ready(self.values)
        traced = not waits(self.values)
        saved = self.saved[:1] if traced else self.saved  # without what would make all of it NaN: the values are here
        pulled, factor = _pulled(self.operand, saved, self.scale, self.values.dtype)
        if traced and not (self.operand.fmt.has_nan and self.operand.fmt.has_inf):
            pulled = torch.where(torch.isfinite(self.values), pulled, self.values)  # what has no code goes along
        return Ready(pulled, factor)


def quantized(
    operand: Operand,
    x: Tensor,
    scale: Tensor | float | None,
    key: Tensor | None,
    route: Route,
    observed: bool,
    *,
    keep: bool,
    reduced: tuple[int, ...] | None = None,
) -> Cast:
    """x quantized for a GEMM that would like `route`, with codes where that or the backward (`keep`) needs them.

    scale: None if it is that of x itself (`Operand.scale_before`). reduced: the axes of x along which GEMMs will add up;
    None: that of the first that has the operand, with `keep` those of all.
    """
    if (cache := cache_for(operand, x)) is not None:
        what = ("cast", route, keep, reduced)
        return cache.get(
            operand, what, x, lambda: _made(operand, x, scale, key, route, observed, keep, reduced), observed=observed
        )
    return _made(operand, x, scale, key, route, observed, keep, reduced)


def _made(operand: Operand, x: Tensor, scale, key, route: Route, observed: bool, keep: bool, reduced) -> Cast:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if route.on_cores and serve(x):
        inner = reduced or operand.reduced[: 1 + keep]
        made = tensor_cores.quantized(operand, x, scale, key, observed, route, inner, keep)
        return Cast(operand, None, made.saved, made.scale, dtype, made.other, made.codes)
    if scale is None:
        found = operand.encoded_by_amax(x) if route.unit is not None and not observed else None
        if found is not None:
            return Cast(operand, None, *found, dtype)
        scale = operand.scale_of(x, False)
    if route.unit is not None:
        return Cast(operand, None, operand.save(x, scale, key, observed), scale, dtype)
    if route is Route.FLOAT32 and not keep and not operand.block:
        return Cast(operand, operand.quantize(x, scale, key, observed), (), scale, dtype)
    kept = tensor_cores.kept(operand, x, scale, key) if keep else None
    if kept is not None:
        return Cast(operand, operand.quantize(x, scale, key, observed), kept, scale, dtype)
    values, saved = operand.quantize_and_save(x, scale, key, observed)
    return Cast(operand, values, saved, scale, dtype)


def saved_apart(
    operand: Operand, x: Tensor, scale: Tensor | float | None, key: Tensor | None, route: Route, observed: bool
) -> tuple[Saved, Tensor | float]:
    """What a gradient on `route` keeps of x, which the forward does not multiply like that, and the scale."""
    if (cache := cache_for(operand, x)) is not None:
        return cache.get(
            operand, ("apart", route), x, lambda: _apart(operand, x, scale, key, route, observed), observed=observed
        )
    return _apart(operand, x, scale, key, route, observed)


def _apart(operand: Operand, x: Tensor, scale, key, route: Route, observed: bool) -> tuple[Saved, Tensor | float]:
    if route.on_cores and serve(x):
        inner = operand.reduced[:1]
        made = tensor_cores.quantized(operand, x, scale, key, observed, route, inner, True, multiplied=False)
        return made.codes or made.saved, made.scale
    scale = operand.scale_of(x, False) if scale is None else scale
    return operand.save(x, scale, key, observed), scale


def restored(operand: Operand, saved: Saved, scale: Tensor | float, route: Route, dtype: torch.dtype) -> Ready:
    """A saved operand, ready for a GEMM on `route`."""
    if route is Route.FLOAT32:
        return Ready(operand.restore(saved, scale, dtype))
    if is_payload(saved):
        return Ready(*saved)
    if route.unit is None:
        made = tensor_cores.decoded(operand, saved, scale) if route is Route.BF16 else None
        return Ready(*_pulled(operand, saved, scale, dtype)) if made is None else Ready(*made)
    codes, factor = operand.coded(saved, scale)
    return Ready(saved[0], factor, codes)


def _pulled(operand: Operand, saved: Saved, scale: Tensor | float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    power, factor = pull_apart(scale, operand.fmt)
    return operand.restore(saved, power.to(saved[0].device), dtype), factor.to(saved[0].device)


def product(a: Ready, b: Ready, route: Route, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """a @ b in the carrier, the pulled factors multiplied back, plus a bias for each column.

    dtype: of the result where it costs nothing to give it another one; else it stays in the carrier.
    """
    if route is Route.FP8:
        left, right = a.row_by_row(), b.t().row_by_row().t()
        return tensor_products.fp8_product(left, right, a.factor, b.factor, bias, dtype or torch.float32)
    if a.values.dtype in (torch.bfloat16, torch.float16):
        factors, wanted = (a.factor, b.factor), dtype or torch.float32
        plain = bias is None and factors == (None, None)
        if plain and wanted in (torch.float32, torch.bfloat16):
            return mm(a.values, b.values, route, wanted)
        found = tensor_products.product(a.values, b.values, *factors, bias, wanted)
        if found is not None:
            return found
        return finished(mm(a.values, b.values, route), *factors, bias, wanted, a.values.dtype == torch.float16)
    factors = [factor for factor in (a.factor, b.factor) if factor is not None]
    if route.unit is not None:
        assert a.codes is not None
        assert b.codes is not None
        if factors:
            out = _scaled_afterwards(a.codes, b.codes, route.unit, factors)
        else:
            fused = None if bias is None else bias.detach().to(torch.float32).contiguous()
            return multiply(a.codes, b.codes, route.unit, bias=fused)
    else:
        out = mm(a.values, b.values, route)
        for factor in factors:
            out = out.mul_(factor)
    if bias is None:
        return out
    return out + bias if torch._C._are_functorch_transforms_active() else out.add_(bias)


def _scaled_afterwards(a: Codes, b: Codes, unit: Unit, factors: list[Tensor]) -> Tensor:
    """The product where rows or columns have scales of their own.

    Sums are those of values below 2, so that no row's scale takes another row beyond float32, and all scales multiply
    them in float64, rounded once.
    """
    of_a, of_b = (0 if isinstance(codes.fmt, BlockFormat) else codes.fmt.emax for codes in (a, b))
    out = multiply(a._replace(scale=math.ldexp(1.0, -of_a)), b._replace(scale=math.ldexp(1.0, -of_b)), unit).double()
    out = out.mul_(a.scale * b.scale).mul_(math.ldexp(1.0, of_a + of_b))
    for factor in factors:
        out = out.mul_(factor)
    return out.to(torch.float32)


def stash(ctx, **items) -> None:
    """Keep tensors, tuples of tensors, numbers and None under their names for `unstash`; tensors as saved tensors."""
    tensors: list[Tensor] = []
    layout = []
    for name, item in items.items():
        group = item if isinstance(item, tuple) else (item,)
        if all(isinstance(part, Tensor) for part in group):
            layout.append((name, isinstance(item, tuple), len(tensors), len(group), None))
            tensors.extend(group)
        else:
            layout.append((name, False, 0, 0, item))
    ctx.save_for_backward(*tensors)
    ctx.layout = layout


def unstash(ctx, tensors: Saved) -> dict:
    """What `stash` kept, of which these are the saved tensors."""
    items = {}
    for name, is_tuple, start, count, plain in ctx.layout:
        if count == 0:
            items[name] = () if is_tuple else plain
        else:
            items[name] = tensors[start : start + count] if is_tuple else tensors[start]
    return items
