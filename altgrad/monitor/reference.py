"""Gradients against those of an FP32 backward pass at the same weights: what quantization adds as noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from altgrad.nn.spread import whole


class MicroBatches:
    """What each micro-batch adds to the gradients of a backward pass: hooks on parameters until `close`."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._before: dict[nn.Parameter, Tensor] = {}
        self._squares: dict[nn.Parameter, list[Tensor]] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._added) for p in parameters if p.is_leaf]

    @torch.no_grad()
    def _added(self, p: nn.Parameter) -> None:
        if p.grad is None or p.grad.is_sparse:
            return
        before = self._before.get(p)
        added = whole(p.grad if before is None else p.grad - before).double()
        self._squares.setdefault(p, []).append(added.square().sum())
        self._before[p] = p.grad.clone()

    def close(self) -> None:
        """Let go of the parameters and of copies of gradients."""
        while self._hooks:
            self._hooks.pop().remove()
        self._before = {}

    def noise_scale(self, p: nn.Parameter, total: Tensor) -> Tensor:
        """float64, 0-d: variance of a micro-batch's gradient, summed over elements, over the squared norm of the mean gradient.

        So many micro-batches' mean has as much noise as signal (McCandlish et al. 2018, arXiv:1812.06162, "simple").
        NaN with fewer than two, or where the mean cannot be told from noise.

        Args:
            total: the sum over micro-batches.
        """
        squares = self._squares.get(p, [])
        n = len(squares)
        if n < 2:
            return torch.full((), torch.nan, dtype=torch.float64, device=total.device)
        one, all_ = torch.stack(squares).mean(), whole(total).double().square().sum()
        mean = (all_ - n * one) / (n * n - n)
        return torch.where(mean > 0, (one - mean) / mean, torch.nan)


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
    """float64 [3]: signal-to-noise ratio 10 log10(|r|^2 / |g - r|^2) in dB, the cosine of g and r, and |r| / |g - r|.

    The ratios are inf where both are equal; NaN for all where r is all zero, for the cosine where either is; NaN where
    not finite.
    """
    g, r = (t.detach().to_dense().double().flatten() for t in (gradient, reference))
    signal, noise = (r * r).sum(), ((g - r) ** 2).sum()
    ratio = torch.where(signal > 0, signal / noise, torch.nan)
    return torch.stack([10 * torch.log10(ratio), (g * r).sum() / (g.norm() * r.norm()), ratio.sqrt()])


def against_reference(
    model: nn.Module, parameters: Mapping[int, nn.Parameter], chosen: Collection[int], backward: Callable[[], object]
) -> tuple[dict[int, dict[str, float]], float]:
    """(key -> its metrics, of the chosen parameters that have a gradient; the seconds all took). Waits for the device.

    Args:
        parameters: key -> parameter, all that `backward` adds to.
    """
    started = time.perf_counter()
    parts = MicroBatches(parameters.values())
    try:
        references = dict(zip(parameters, reference_gradients(model, parameters.values(), backward), strict=True))
    finally:
        parts.close()
    rows: dict[int, Tensor] = {}
    for key, p in parameters.items():
        reference = references[key]
        if key in chosen and p.grad is not None and reference is not None:
            compared = compare(whole(p.grad), whole(reference))
            rows[key] = torch.cat([compared, parts.noise_scale(p, reference).to(compared).reshape(1)])
    values = torch.stack(list(rows.values())).tolist() if rows else []  # the one wait, so that the time is true
    seconds = time.perf_counter() - started
    names = ("reference_snr_db", "reference_cosine", "noise_ratio", "batch_noise_scale")
    found = {
        key: {**dict(zip(names, row, strict=True)), "reference_seconds": seconds}
        for key, row in zip(rows, values, strict=True)
    }
    return found, seconds
