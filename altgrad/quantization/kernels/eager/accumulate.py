"""Accumulators in plain torch, on any device: every term of a step at once, in float64. Slow; for what is not a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.formats.accumulator import Accumulator, Promote
from altgrad.formats.rounding import Rounding
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization.powers import leading_power

_ELEMENTS = 1 << 24  # terms held at once


def _rounded(d: Tensor, fmt: FloatFormat, mode: Rounding) -> Tensor:
    """d rounded to a sum's format; beyond its largest value infinite, inf and NaN as they are."""
    size = d.abs()
    ulp = leading_power(d).clamp(min=fmt.min_normal) * 2.0**-fmt.mantissa_bits
    steps = size / ulp
    whole = steps.trunc()
    rest = steps - whole
    if mode is Rounding.NEAREST_EVEN:
        up = (rest > 0.5) | ((rest == 0.5) & (whole % 2 == 1))
    else:
        up = (rest >= 0.5) & (mode is Rounding.NEAREST_AWAY)
    value = (whole + up) * ulp
    value = torch.where(value <= fmt.max, value, torch.inf)
    return torch.where(size < torch.inf, value, size).copysign(d)


def _two_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(fl(x + y), the error), exactly; the error of a sum that is not finite is 0."""
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)
    return total, torch.where(total.isfinite(), error, 0)


def _to_odd(total: Tensor, error: Tensor) -> Tensor:
    """A rounded sum and its error as the float64 that rounds once more as the exact sum would."""
    bits = total.view(torch.int64)
    moved = torch.where((error > 0) != (total > 0), bits - 1, bits + 1)
    return torch.where((error != 0) & (bits & 1 == 0), moved, bits).view(torch.float64)


def _exact_step(products: Tensor, running: Tensor, accumulator: Accumulator) -> Tensor:
    low = torch.zeros_like(running)
    for term in products.unbind(-1):
        running, error = _two_sum(running, term)
        low = low + error
    return _rounded(_to_odd(*_two_sum(running, low)), accumulator.output_format, accumulator.rounding)


def _cut_step(products: Tensor, powers: Tensor, running: Tensor, accumulator: Accumulator) -> Tensor:
    fmt = accumulator.output_format
    own = torch.where((running != 0) & running.isfinite(), leading_power(running).clamp(min=fmt.min_normal), 0)
    top = torch.maximum(powers.amax(-1), own)
    scale = 2.0 ** (accumulator.fraction_bits or 0) / torch.where(top > 0, top, 1)
    total = (running * scale).trunc() + (products * scale.unsqueeze(-1)).trunc().sum(-1)
    return _rounded(total / scale, fmt, accumulator.rounding)


def _promoted(main: Tensor, partial: Tensor, sa: Tensor | None, sb: Tensor | None, accumulator: Accumulator) -> Tensor:
    if accumulator.scaled_promotion:
        assert sa is not None
        assert sb is not None
        if accumulator.promote is Promote.FMA_SCALED:
            partial = partial * (sa.float() * sb.float()).double()
        else:
            partial = (partial.float() * sa.float()).double() * sb
    return _rounded(_to_odd(*_two_sum(main, partial)), accumulator.main_format, Rounding.NEAREST_EVEN)


def _rows(a, b, accumulator: Accumulator) -> Tensor:
    left, right = a.values.double().unsqueeze(1), b.values.double().unsqueeze(0)
    ea, eb = a.powers.double().unsqueeze(1), b.powers.double().unsqueeze(0)
    scaled = a.scales is not None
    sa, sb = (a.scales.double().unsqueeze(1), b.scales.double().unsqueeze(0)) if scaled else (None, None)
    count, group, every = left.shape[-1], accumulator.group, accumulator.promote_every
    running = torch.zeros((len(a.values), len(b.values)), dtype=torch.float64, device=left.device)
    main = running
    for begin in range(0, count, accumulator.products):
        end = min(begin + accumulator.products, count)
        products = left[..., begin:end] * right[..., begin:end]
        at = slice(begin // group, end // group)
        powers = ea[..., at] * eb[..., at]
        if group > 1:
            products = products.unflatten(-1, (-1, group)).sum(-1) * sa[..., at] * sb[..., at]  # type: ignore[index]
            powers = torch.where(products != 0, powers, 0)
        elif accumulator.normalize_products:
            powers = leading_power(products)
        if accumulator.fraction_bits is None:
            running = _exact_step(products, running, accumulator)
        else:
            running = _cut_step(products, powers, running, accumulator)
        if every and (end % every == 0 or end == count):
            block = (end - 1) // every
            scales = (sa[..., block], sb[..., block]) if accumulator.scaled_promotion else (None, None)  # type: ignore[index]
            main, running = _promoted(main, running, *scales, accumulator), torch.zeros_like(running)
    return main if every else running


def run(a, b, accumulator: Accumulator, wide: bool) -> Tensor:
    """As `kernels.cpu.accumulate.run`, bit for bit."""
    step = max(1, _ELEMENTS // (len(b.values) * accumulator.products))
    pieces = range(0, len(a.values), step)
    parts = [a._replace(**{k: v[i : i + step] for k, v in _tensors(a)}) for i in pieces]
    return torch.cat([_rows(part, b, accumulator) for part in parts])


def _tensors(operand) -> list[tuple[str, Tensor]]:
    return [
        (name, getattr(operand, name)) for name in ("values", "powers", "scales") if getattr(operand, name) is not None
    ]
