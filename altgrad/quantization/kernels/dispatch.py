"""Which implementation runs: named explicitly, or chosen by device; none falls back silently."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from altgrad.errors import OptionError
from altgrad.quantization.kernels import eager

KERNELS = ("eager",)


def choose(x: Tensor, kernel: str | None) -> ModuleType:
    """The implementation module for x.

    Raises:
        OptionError: `kernel` is not one of `KERNELS`.
    """
    if kernel is not None and kernel not in KERNELS:
        raise OptionError(f"kernel {kernel!r} is not one of {', '.join(KERNELS)}")
    return eager
