"""Gradients against those of an FP32 backward pass at the same weights: what quantization adds as noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from altgrad.nn.spread import whole


def reference_gradients(
    model: nn.Module, parameters: Iterable[nn.Parameter], backward: Callable[[], object]
) -> list[Tensor | None]:
    """Gradients of `backward()`, run with quantization off; the parameters' own gradients are left as they were.

    Args:
        backward: runs forward and backward on this step's batch, adding to `.grad`; it must not step the optimizer.
    """
    from altgrad.nn import full_precision
    from altgrad.nn.layer.classes import is_quantized

    parameters = list(parameters)
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        if any(is_quantized(module) for module in model.modules()):
            with full_precision(model):
                backward()
        else:
            backward()
        return [p.grad for p in parameters]
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad


def compare(gradient: Tensor, reference: Tensor) -> Tensor:
    """float64 [2]: signal-to-noise ratio 10 log10(|r|^2 / |g - r|^2) in dB, and the cosine of g and r.

    The ratio is inf where both are equal; NaN for both where either is all zero or not finite.
    """
    g, r = (t.detach().to_dense().double().flatten() for t in (gradient, reference))
    signal, noise = (r * r).sum(), ((g - r) ** 2).sum()
    ratio = torch.where(signal > 0, 10 * torch.log10(signal / noise), torch.nan)
    return torch.stack([ratio, (g * r).sum() / (g.norm() * r.norm())])


def against_reference(
    model: nn.Module, parameters: Mapping[int, nn.Parameter], chosen: Collection[int], backward: Callable[[], object]
) -> tuple[dict[int, dict[str, float]], float]:
    """(key -> its metrics, of the chosen parameters that have a gradient; the seconds all took). Waits for the device.

    Args:
        parameters: key -> parameter, all that `backward` adds to.
    """
    started = time.perf_counter()
    references = dict(zip(parameters, reference_gradients(model, parameters.values(), backward), strict=True))
    rows: dict[int, Tensor] = {}
    for key, p in parameters.items():
        reference = references[key]
        if key in chosen and p.grad is not None and reference is not None:
            rows[key] = compare(whole(p.grad), whole(reference))
    values = torch.stack(list(rows.values())).tolist() if rows else []  # the one wait, so that the time is true
    seconds = time.perf_counter() - started
    found = {
        key: {"reference_snr_db": snr, "reference_cosine": cosine, "reference_seconds": seconds}
        for key, (snr, cosine) in zip(rows, values, strict=True)
    }
    return found, seconds
