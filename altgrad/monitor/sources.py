"""Where the monitor takes hold of other people's objects: operands, optimizer steps, the names of wrapped models.

Quantized layers publish their operands; hooks measure those of other layers. A hook quantizes each operand aside, at its
current amax scale, and keeps only the statistics: the model computes what it computed before. Without a format nothing is
quantized: what is left is amax and how much is finite.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from altgrad.diagnostics.update import carrier_format
from altgrad.errors import FormatError
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization import FP32, QuantStats, amax_scale, quantize_with_stats
from altgrad.quantization.observer import Observer
from altgrad.quantization.stats import FIELDS

Publish = Callable[[str, str, QuantStats, Tensor | float, FloatFormat], None]


class Sources:
    """Has a model publish its operands to an observer until `close`.

    Args:
        format: grid for the layers of a model that is not quantized; None and FP32: the dtype's own.

    Raises:
        FormatError: a format without a grid of its own for a model that is not quantized.
    """

    def __init__(self, model: nn.Module, format: Any, observer: Observer) -> None:
        from altgrad.nn.layer.classes import is_quantized
        from altgrad.nn.session import sessions_of

        self.quantized = any(is_quantized(module) for module in model.modules())
        self.format: FloatFormat | None = None  # of the hooks
        self._observer = observer
        self._observed: list[tuple[Any, Any]] = []  # sessions of quantized layers, with their observers before this one
        self._hooks: list[RemovableHandle] = []
        if self.quantized:
            for session in sessions_of(model):
                self._observed.append((session, session.observer))
                session.observer = observer
            return
        if format is not None and not (isinstance(format, FloatFormat) and format.has_zero):
            raise FormatError(
                f"{format} has no grid of its own to measure weights on; name an element format such as "
                f"E4M3, or quantize the model with it and leave format out"
            )
        self.format = None if format is FP32 else format
        self._hooks = watch_layers(
            model,
            self.format,
            lambda layer, role, stats, scale, fmt: observer.observe(
                layer=layer, role=role, gemm="forward", stats=stats, scale=scale, fmt=fmt
            ),
        )

    def close(self) -> None:
        """Remove the hooks; give quantized layers back the observer that they had."""
        for hook in self._hooks:
            hook.remove()
        for session, before in self._observed:
            if session.observer is self._observer:
                session.observer = before
        self._hooks, self._observed = [], []


def watch_operands(model: nn.Module, take: Callable[[str, str, Tensor], None]) -> list[RemovableHandle]:
    """Hook every linear layer and convolution; `take(layer, role, tensor)` gets weight, input and grad_output of each of
    its uses in training mode, detached.

    These are torch's, Hugging Face's and registered ones (`altgrad.nn.register_layer`), and their subclasses.
    """
    return [
        module.register_forward_hook(_forward_hook(name, take))
        for name, module in model.named_modules()
        if isinstance(module, _KINDS) or _is_product(module)
    ]


def watch_layers(model: nn.Module, given: FloatFormat | None, publish: Publish) -> list[RemovableHandle]:
    """Hook the layers of `watch_operands`; `publish(layer, role, stats, scale, format)` for each operand.

    Without a format inputs and gradients are measured as they are: their amax and how much is finite.
    """

    def take(name: str, role: str, x: Tensor) -> None:
        if role == "weight" and given is None:  # its amax alone is among the weight's norms
            return
        fmt = given or carrier_format(x.dtype)
        scale = amax_scale(x, fmt) if fmt.emax < 127 else torch.ones((), device=x.device)
        stats = quantize_with_stats(x, fmt, scale, overflow="saturate", clamp=True)[1]
        if given is None:
            stats, scale = QuantStats(torch.where(_of_the_values(x.device), stats.vector, torch.nan)), torch.nan
        publish(name, role, stats, scale, fmt)

    return watch_operands(model, take)


@cache
def _of_the_values(device: torch.device) -> Tensor:
    """Mask of the fields of `QuantStats` that no quantization takes part in."""
    return torch.tensor([name in ("amax", "count", "nonfinite") for name in FIELDS], device=device)


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_product(module: nn.Module) -> bool:
    from altgrad.nn.layer.registry import kind_of

    kind = kind_of(type(module))
    return kind is not None and kind.kind in ("linear", "conv", "conv_transpose")


def _forward_hook(name: str, take: Callable[[str, str, Tensor], None]):
    def send(role: str, tensor: Tensor) -> None:
        with torch.no_grad():
            take(name, role, tensor.detach())

    def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            send("weight", weight)
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
            send("input", inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda grad: send("grad_output", grad))

    return hook


class StepWatcher(Protocol):
    """Who is told of an optimizer's steps."""

    def before_update(self, *, closure: bool) -> None:
        """An optimizer is about to step; `closure` says that it will evaluate one."""

    def after_update(self) -> None:
        """The optimizer has stepped, grid storage included."""


def watch_steps(watcher: StepWatcher, optimizer: Optimizer) -> list[Any]:
    """Call the watcher before and after every step of the optimizer; the handles of the hooks.

    The hook behind the step is one for all optimizers, since these run after an optimizer's own: grid storage has then
    rounded, whoever was attached first. Neither hook keeps the watcher alive; the last goes with it.
    """
    me, watched = weakref.ref(watcher), weakref.ref(optimizer)

    from altgrad.nn.model.optimizer_hook import closure_of

    def before(_: Optimizer, args: tuple, kwargs: dict) -> None:
        if (alive := me()) is not None:
            alive.before_update(closure=closure_of(args, kwargs) is not None)

    def after(stepped: Optimizer, *_: Any) -> None:
        if stepped is watched() and (alive := me()) is not None:
            alive.after_update()

    handles = [optimizer.register_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    weakref.finalize(watcher, handles[1].remove)
    return handles


def plain_name(name: str) -> str:
    """A layer's name without what DistributedDataParallel and torch.compile put into it; the model itself is "model"."""
    return name.replace("_orig_mod.", "").removeprefix("module.") or "model"


def layer_name(parameter: str) -> str:
    """The layer that a parameter's statistics are filed under: its module's name for a weight, else its own."""
    return plain_name("" if parameter == "weight" else parameter.removesuffix(".weight"))
