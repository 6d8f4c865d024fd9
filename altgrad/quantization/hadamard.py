"""Block Hadamard transforms: neighbours along the reduced axis are mixed before a GEMM's operands are quantized.

Both operands of a GEMM are multiplied by the same orthogonal matrix, diag(signs) H / sqrt(n) for every n neighbours, which
leaves their product as it was and spreads an outlier over its block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from altgrad.errors import OptionError
from altgrad.formats.rounding import Rounding, as_option
from altgrad.quantization.cast import Cast

TRANSFORMER_ENGINE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


class Signs(str, Enum):
    """Which signs the numbers of a block get before they are mixed."""

    NONE = "none"
    FIXED = "fixed"  # Transformer Engine's sixteen, the same for every layer and step
    RANDOM = "random"  # drawn for each GEMM of each layer at each use


@dataclass(frozen=True)
class Hadamard:
    """A block Hadamard transform along the reduced axis.

    Args:
        size: n, a power of two.
        signs: none, fixed (16 of Transformer Engine's) or random.
        bfloat16: round the result to bf16, as a kernel does that writes it before it is quantized.

    Raises:
        OptionError: the fields contradict one another.
    """

    size: int = 16
    signs: Signs = Signs.NONE
    bfloat16: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "signs", as_option(Signs, self.signs))
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 2 <= self.size <= 1024:
            raise OptionError(f"a Hadamard transform of {self.size!r} neighbours; use a power of two in 2..1024")
        if self.size & (self.size - 1):
            raise OptionError(f"a Hadamard transform of {self.size} neighbours: no power of two; use 16, 32, 64 or 128")
        if self.signs is Signs.FIXED and self.size != len(TRANSFORMER_ENGINE_SIGNS):
            raise OptionError(f"the fixed signs are 16, the transform mixes {self.size}; use signs none or random")

    def draw(self, key: Tensor | None, device: torch.device) -> Tensor | None:
        """The signs of a block as float32 [size], or None; `key` (seed, stream) for random ones, by the first of its bits."""
        if self.signs is Signs.NONE:
            return None
        if self.signs is Signs.FIXED:
            return _fixed(device)
        assert key is not None
        half = torch.full(
            (self.size,), _DRAWN.grid.min_subnormal / 2, device=device
        )  # goes up where the first bit is 1
        drawn = _DRAWN(half, key=key).values
        assert drawn is not None
        return torch.where(drawn > 0, -1.0, 1.0)

    def __call__(self, x: Tensor, signs: Tensor | None = None) -> Tensor:
        """x [..., k] with every `size` neighbours mixed, in float32; the last block is filled up with zeros.

        The sums are those of butterflies in a fixed order.
        """
        blocks = pad(x.float(), (0, -x.shape[-1] % self.size)).unflatten(-1, (-1, self.size))
        if signs is not None:
            blocks = blocks * signs
        mixed = _butterflies(blocks) * (1 / math.sqrt(self.size))
        found = mixed.flatten(-2)
        return found.bfloat16().float() if self.bfloat16 else found

    def back(self, x: Tensor, signs: Tensor | None, length: int) -> Tensor:
        """The inverse of the transform, cut to `length` along the last axis (H is its own inverse)."""
        mixed = _butterflies(x.float().unflatten(-1, (-1, self.size))) * (1 / math.sqrt(self.size))
        return (mixed if signs is None else mixed * signs).flatten(-2)[..., :length]


_DRAWN = Cast("E4M3", Rounding.STOCHASTIC)


@cache
def _fixed(device: torch.device) -> Tensor:
    return torch.tensor(TRANSFORMER_ENGINE_SIGNS, dtype=torch.float32, device=device)


def _butterflies(x: Tensor) -> Tensor:
    """x H for Sylvester's H over the last axis, without the factor."""
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.unflatten(-1, (-1, 2, half))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([low + high, low - high], -2).flatten(-3)
        half *= 2
    return x
