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


def random_bits(key: Tensor, count: int, bits: int) -> Tensor:
    """`bits` random bits (1..32) for element indices 0 .. count - 1, as an int64 tensor of shape [count].

    Args:
        key: int64 tensor of shape [2]: seed and stream, taken modulo 2^64.
    """
    seed, stream = (int(word) for word in key.tolist())
    index = torch.arange(count, dtype=torch.int64, device=key.device)
    out = torch.empty_like(index)
    for block in range((count >> 32) + 1):
        part = slice(block << 32, min(count, (block + 1) << 32))
        before, between = key_words(seed, stream, block)
        x = (index[part] & MASK32) ^ before
        x = (x * 0x7FEB352D) & MASK32
        x = x ^ (x >> 15) ^ between
        x = (x * 0x846CA68B) & MASK32
        x = x ^ (x >> 16)
        out[part] = x >> (32 - bits)
    return out
