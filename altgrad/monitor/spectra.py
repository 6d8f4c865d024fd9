"""Spectra of a training model's operands, weights and updates: one pass over each tensor on the steps that are due.

    watch = SpectrumWatch(model, optimizer, layers={"head": model.head.weight}, every=5)
    ...train...
    watch.close()
    watch.operands["head", "input"][-1].predict("E4M3")

The model is in full precision, and nothing that it computes is changed. Each step that is due leaves one spectrum a
tensor, since scales follow each step's own amax; micro-batches are added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad.errors import OptionError
from altgrad.formats.spectrum import Block, Spectrum
from altgrad.monitor.sources import plain_name, watch_operands, watch_steps


class SpectrumWatch:
    """Collects spectra until `close`.

    Args:
        model, optimizer: what is trained; without an optimizer, operands alone.
        layers: name -> weight, of the layers whose weights and updates are wanted; None: of none.
        every: steps from one that is due to the next; the first is due.
        blocks: block sizes along the last axis, for block formats.
        seen: called with (layer, weight before the step, weight after it) on steps that are due.

    `steps` numbers the steps that were due from 1; `operands[layer, role]`, `weights[layer]` and `updates[layer]` hold
    one spectrum for each of them.

    Raises:
        OptionError: `every` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        layers: dict[str, nn.Parameter] | None = None,
        every: int = 1,
        blocks: Sequence[Block] = (),
        seen: Callable[[str, Tensor, Tensor], None] | None = None,
    ) -> None:
        if every < 1:
            raise OptionError(f"every {every} is below 1; it counts steps from one that is measured to the next")
        self.step, self.every, self.blocks = 1, every, tuple(blocks)
        self.steps: list[int] = []
        self.operands: dict[tuple[str, str], list[Spectrum]] = {}
        self.weights: dict[str, list[Spectrum]] = {}
        self.updates: dict[str, list[Spectrum]] = {}
        self._layers, self._seen = dict(layers or {}), seen
        self._before: dict[str, Tensor] = {}
        self._at: dict[tuple[str, str], int] = {}
        self._hooks = watch_operands(model, self._take)
        self._hooks += [] if optimizer is None else watch_steps(self, optimizer)

    @property
    def due(self) -> bool:
        """Whether this step is measured."""
        return (self.step - 1) % self.every == 0

    def _take(self, layer: str, role: str, x: Tensor) -> None:
        if not self.due or not x.numel():
            return
        key = plain_name(layer), role
        again = self._at.get(key) == self.step
        if again and role == "weight":  # the same in each micro-batch
            return
        found = spectrum_of(x, self.blocks)
        kept = self.operands.setdefault(key, [])
        if again:
            kept[-1] = kept[-1] + found
        else:
            kept.append(found)
        self._at[key] = self.step

    @torch.no_grad()
    def before_update(self, *, closure: bool = False) -> None:
        """An optimizer is about to step."""
        if self.due:
            self._before = {name: weight.detach().clone() for name, weight in self._layers.items()}

    @torch.no_grad()
    def after_update(self) -> None:
        """It has stepped."""
        if self.due:
            self.steps.append(self.step)
            for name, before in self._before.items():
                after = self._layers[name].detach()
                self.weights.setdefault(name, []).append(spectrum_of(before))
                self.updates.setdefault(name, []).append(spectrum_of(after - before))
                if self._seen is not None:
                    self._seen(name, before, after)
            self._before = {}
        self.step += 1

    def close(self) -> None:
        """Let go of the model and the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def spectrum_of(x: Tensor, blocks: Sequence[Block] = ()) -> Spectrum:
    """The spectrum of a tensor; on a GPU its histogram is counted there, and blocks are counted on the host."""
    x = x.detach().float()
    if x.device.type == "cpu" or blocks:
        return Spectrum.of(x.cpu().contiguous().numpy(), blocks=tuple(blocks))
    bits = x.contiguous().view(torch.int32).flatten()
    raw = torch.bincount(((bits >> 19) & 0x1FFF).long(), minlength=8192)
    finite = torch.where(torch.isfinite(x), x, 0.0)
    used = 0
    for k in range(24):  # torch has no reduction by bitwise or
        used |= int(((finite.contiguous().view(torch.int32) >> k) & 1).any()) << k
    return Spectrum.from_histogram(
        raw.cpu().numpy(),
        zeros=(int((bits == 0).sum()), int((bits == -(1 << 31)).sum())),
        amax=float(finite.abs().max()),
        sum_sq=float(finite.double().square().sum()),
        used_bits=used,
    )
