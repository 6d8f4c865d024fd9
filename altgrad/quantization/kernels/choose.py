"""Which implementation runs: named explicitly, or chosen by device; none falls back silently.

Every kernel is a package whose modules `scalar` and `blocks` have `run(plan, x, scale, key, out) -> Quantized` and
`decode(plan, codes, scale, upper, out) -> Tensor`; `altgrad.quantization.plan` says what a plan is. Tensors on a CPU go to `cpu`,
on a CUDA device to `cuda`, on any other device to `eager`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from altgrad.errors import KernelError, OptionError
from altgrad.formats.block import BlockFormat
from altgrad.formats.scalar import FloatFormat
from altgrad.jit.grid_table import float32_arithmetic_suffices

KERNELS = ("reference", "eager", "cpu", "cuda")
BLOCK_KERNELS = ("eager", "cpu", "cuda")
_BY_DEVICE = {"cpu": "cpu", "cuda": "cuda"}
_loaded: dict[str, ModuleType] = {}


def check_kernel(kernel: str | None) -> None:
    """Refuse what is no name of a kernel.

    Raises:
        OptionError: with the names.
    """
    if kernel is not None and (not isinstance(kernel, str) or kernel not in KERNELS):
        raise OptionError(f"kernel {kernel!r} is not one of {', '.join(KERNELS)}")


def kernel_name(fmt: FloatFormat | BlockFormat, dtype: torch.dtype, device: torch.device, kernel: str | None) -> str:
    """The kernel that runs: the one asked for, else by device.

    The compiled kernels of block formats cover float32, bf16 and fp16 tensors in formats whose grids stay clear of
    float32's subnormals, which are all named ones; where they do not, the device's kernel is `eager`. Without values (a
    meta tensor) every kernel is as good.

    Raises:
        OptionError: no such kernel.
        KernelError: the tensor is not on the device that the kernel works on, or the kernel does not cover the case.
    """
    names = BLOCK_KERNELS if isinstance(fmt, BlockFormat) else KERNELS
    if kernel is not None and kernel not in names:
        raise OptionError(f"kernel {kernel!r} is not one of {', '.join(names)}")
    covered = not isinstance(fmt, BlockFormat) or _covers_blocks(fmt, dtype)
    if kernel is None:
        return _BY_DEVICE.get(device.type, "eager") if covered else "eager"
    if kernel != "eager" and not covered:
        raise KernelError(f'kernel {kernel!r} does not cover {dtype} in {fmt}; use kernel="eager" or a float32 tensor')
    if device.type == "meta":  # shapes alone, of whatever device
        return "eager"
    if kernel in ("cpu", "cuda") and kernel != device.type and not (kernel == "cuda" and interpreted()):
        raise KernelError(f"kernel {kernel!r} works on {kernel} tensors, x is on {device}; move x, or leave kernel out")
    return kernel


def _covers_blocks(fmt: BlockFormat, dtype: torch.dtype) -> bool:
    grids = [fmt.element] if fmt.power_of_two or fmt.has_float_scale else [fmt.element, fmt.scale_format]
    return dtype != torch.float64 and all(map(float32_arithmetic_suffices, grids))


def interpreted() -> bool:
    """Whether Triton's interpreter runs CUDA kernels on CPU tensors."""
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"


def load(kernel: str, part: str = "scalar") -> ModuleType:
    """The module of a kernel for `scalar` or `blocks` formats, imported on first use."""
    name = f"{kernel}.{part}"
    if name not in _loaded:
        _loaded[name] = import_module(f"altgrad.quantization.kernels.{name}")
    return _loaded[name]
