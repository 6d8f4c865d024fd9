"""Which implementation runs: named explicitly, or chosen by device; none falls back silently.

Every kernel is a package whose module `scalar` has `process(x, fmt, scale, *, rounding, overflow, key, random_bits, clamp, out, values,
codes, stats) -> Outputs`. Tensors on a CPU go to `cpu`, on a CUDA device to `cuda`, on any other device to `eager`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import Tensor

from altgrad.errors import KernelError, OptionError

KERNELS = ("reference", "eager", "cpu", "cuda")
_BY_DEVICE = {"cpu": "cpu", "cuda": "cuda"}
_loaded: dict[str, ModuleType] = {}


def kernel_name(x: Tensor, kernel: str | None) -> str:
    """The kernel that runs on x: the one asked for, else by device.

    Raises:
        OptionError: `kernel` is not one of `KERNELS`.
        KernelError: x is not on the device that the kernel works on.
    """
    device = x.device.type
    if kernel is None:
        return _BY_DEVICE.get(device, "eager")
    if kernel not in KERNELS:
        raise OptionError(f"kernel {kernel!r} is not one of {', '.join(KERNELS)}")
    if kernel in ("cpu", "cuda") and kernel != device and not (kernel == "cuda" and _interpreted()):
        raise KernelError(f"kernel {kernel!r} works on {kernel} tensors, x is on {device}; move x, or leave kernel out")
    return kernel


def _interpreted() -> bool:
    """Whether Triton's interpreter runs CUDA kernels on CPU tensors."""
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"


def load(name: str) -> ModuleType:
    """The module of a kernel, imported on first use."""
    if name not in _loaded:
        _loaded[name] = import_module(f"altgrad.quantization.kernels.{name}.scalar")
    return _loaded[name]
