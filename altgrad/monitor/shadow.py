"""Hooks on layers that are not quantized: what a format would do to their operands, and how large these are.

Each operand is quantized aside, at its current amax scale, and only the statistics are kept: the model computes what it
computed before. Without a format nothing is quantized: what is left is amax and how much is finite.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from altgrad.diagnostics.update import carrier_format
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization import QuantStats, amax_scale, quantize_with_stats
from altgrad.quantization.stats import FIELDS

Publish = Callable[[str, str, QuantStats, Tensor | float, FloatFormat], None]


def watch_layers(model: nn.Module, fmt: FloatFormat | None, publish: Publish) -> list[RemovableHandle]:
    """Hook every linear layer and convolution; `publish(layer, role, stats, scale, format)` in training mode.

    These are torch's, Hugging Face's and registered ones (`altgrad.nn.register_layer`), and their subclasses.
    """
    return [
        module.register_forward_hook(_forward_hook(name, fmt, publish))
        for name, module in model.named_modules()
        if isinstance(module, _KINDS) or _is_product(module)
    ]


@cache
def _of_the_values(device: torch.device) -> Tensor:
    """Mask of the fields of `QuantStats` that no quantization takes part in."""
    return torch.tensor([name in ("amax", "count", "nonfinite") for name in FIELDS], device=device)


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_product(module: nn.Module) -> bool:
    from altgrad.nn.layer.registry import kind_of

    kind = kind_of(type(module))
    return kind is not None and kind.kind in ("linear", "conv")


def _forward_hook(name: str, given: FloatFormat | None, publish: Publish):
    def send(role: str, tensor: Tensor) -> None:
        with torch.no_grad():
            x = tensor.detach()
            fmt = given or carrier_format(x.dtype)
            scale = amax_scale(x, fmt) if fmt.emax < 127 else torch.ones((), device=x.device)
            stats = quantize_with_stats(x, fmt, scale, overflow="saturate", clamp=True)[1]
            if given is None:
                stats, scale = QuantStats(torch.where(_of_the_values(x.device), stats.vector, torch.nan)), torch.nan
            publish(name, role, stats, scale, fmt)

    def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        weight = getattr(module, "weight", None)
        if given is not None and isinstance(weight, Tensor):  # its amax alone is among the weight's norms
            send("weight", weight)
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
            send("input", inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda grad: send("grad_output", grad))

    return hook
