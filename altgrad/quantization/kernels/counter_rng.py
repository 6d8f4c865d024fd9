"""Counter-based random bits: a pure function of (key, element index), the same on every device and thread count.

The key is two 64-bit words, (seed, stream); the counter is the element's index in logical C order. Nothing is stored
and no global generator is touched, so any draw can be replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF


def splitmix64(x: int) -> int:
    """One output of the SplitMix64 mixer (Steele, Lea and Flood 2014) for a 64-bit input."""
    z = (x + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def key_words(seed: int, stream: int, block: int = 0) -> tuple[int, int]:
    """Two 32-bit key words for elements block * 2^32 .. (block + 1) * 2^32 - 1 of a stream."""
    mixed = splitmix64(splitmix64(splitmix64(seed & MASK64) ^ (stream & MASK64)) ^ block)
    return mixed & MASK32, mixed >> 32


def random_bits(key: Tensor, count: int, bits: int, *, first: int = 0) -> Tensor:
    """`bits` random bits (1..32) for element indices first .. first + count - 1, as an int64 tensor of shape [count].

    Args:
        key: int64 tensor of shape [2]: seed and stream, taken modulo 2^64.
    """
    return random_words(key, count, first=first) >> (32 - bits)


def random_words(key: Tensor, count: int, *, first: int = 0) -> Tensor:
    """The 32-bit words that `random_bits` takes its upper bits from, as an int64 tensor of shape [count]."""
    seed, stream = (int(word) for word in key.tolist())
    index = torch.arange(first, first + count, dtype=torch.int64, device=key.device)
    parts = []
    for block in range(first >> 32, (first + max(count, 1) - 1 >> 32) + 1):
        part = index[max(0, (block << 32) - first) : max(0, (block + 1 << 32) - first)] & MASK32
        parts.append(_mixed(part, *key_words(seed, stream, block)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mixed(x: Tensor, before: int, between: int) -> Tensor:
    """Two multiplications modulo 2^32, a key word before each."""
    x = ((x ^ before) * 0x7FEB352D) & MASK32
    x = x ^ (x >> 15) ^ between
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)
