"""Random bits without hidden state: a pure function of (key, element index), and the streams that name the keys.

A key is two 64-bit words, (seed, stream); the counter is the element's index in logical C order. Nothing is stored and no
global generator is touched, so any step can be replayed, resumed, or run on another device and thread count, and draws
the same bits. Layers name their streams by `stream_base` and move them through training by `stream_at`; optimizers have
`step_key`; whatever feeds one of torch's generators (batches, dropout, probes) takes its seed from `seed_of`.

The generator is a hash of the index with three multiplications modulo 2^32 and two injected key words, the second
between multiplications so that streams are not shifted copies of each other. Two multiplications were not enough: over
2^22 sequential indices of one stream the upper 16 bits are unevenly spread (chi-square p from 1e-300 to 0.3 over ten
seeds); with three they pass every test of `benchmarks/rng_statistics.py`, as Philox4x32-10 does, the reference here.
Within a stream of 2^32 indices each word occurs once, so very long streams are more even than chance.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
MULTIPLIERS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)  # of "triple32", found by search: C. Wellons, Hash Prospector, 2018


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
    import torch  # whose tensors the caller has; streams and arrays of words do without it

    seed, stream = (int(word) for word in key.tolist())
    index = torch.arange(first, first + count, dtype=torch.int64, device=key.device)
    parts = []
    for block in range(first >> 32, (first + max(count, 1) - 1 >> 32) + 1):
        part = index[max(0, (block << 32) - first) : max(0, (block + 1 << 32) - first)] & MASK32
        parts.append(_mixed(part, *key_words(seed, stream, block)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mixed(x: Tensor, before: int, between: int) -> Tensor:
    """Three multiplications modulo 2^32, a key word before the first and one before the second."""
    x = ((x ^ before) * MULTIPLIERS[0]) & MASK32
    x = x ^ (x >> 11) ^ between
    x = (x * MULTIPLIERS[1]) & MASK32
    x = x ^ (x >> 15)
    x = (x * MULTIPLIERS[2]) & MASK32
    return x ^ (x >> 14)


def hash_words(seed: int, stream: int, first: int, count: int) -> np.ndarray:
    """The words of elements first .. first + count - 1 as uint32, in NumPy (for one block of 2^32 indices)."""
    before, between = (np.uint32(word) for word in key_words(seed, stream, first >> 32))
    x = np.arange(first & MASK32, (first & MASK32) + count, dtype=np.uint64).astype(np.uint32)
    first_, second, third = (np.uint32(m) for m in MULTIPLIERS)
    x = (x ^ before) * first_
    x = (x ^ (x >> np.uint32(11)) ^ between) * second
    x = (x ^ (x >> np.uint32(15))) * third
    return x ^ (x >> np.uint32(14))


def philox_words(seed: int, stream: int, first: int, count: int) -> np.ndarray:
    """Word 0 of Philox4x32-10 (Salmon et al. 2011) at counter (index, stream) under key `seed`, as uint32.

    The reference that the cheap hash is measured against: far stronger, and several times slower on a CPU.
    """
    index = np.arange(first, first + count, dtype=np.uint64)
    low = np.uint64(MASK32)
    stream &= MASK64
    c0, c1 = index & low, index >> np.uint64(32)
    c2, c3 = np.full_like(index, stream & MASK32), np.full_like(index, stream >> 32)
    k0, k1 = seed & MASK32, (seed & MASK64) >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0.astype(np.uint32)


# the order is part of the streams: append only
PURPOSES = ("weight", "exp_avg", "exp_avg_sq", "momentum", "exp_avg_plus", "exp_avg_minus", "plus", "minus")


def stream_base(*words: str) -> int:
    """64-bit hash of names, the same on every machine and in every process."""
    return _digest(words)


def stream_at(base: int, step: int, micro_batch: int, rank: int) -> int:
    """The stream of a tensor at one step, micro-batch and rank: an int64."""
    mixed = base
    for word in (step, micro_batch, rank):
        mixed = splitmix64(mixed ^ splitmix64(word & MASK64))
    return as_int64(mixed)


def as_int64(word: int) -> int:
    """The int64 with the bits of a number modulo 2^64."""
    word &= MASK64
    return word - 2**64 if word >= 2**63 else word


def seed_of(*words: int | str) -> int:
    """A 63-bit seed that depends on every word, the same in every process."""
    return _digest(words) >> 1


def _digest(words: tuple[int | str, ...]) -> int:
    digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def step_key(seed: int, parameter: int, step: int, purpose: str) -> tuple[int, int]:
    """(seed, stream) for one tensor of one parameter at one step.

    Args:
        parameter: the parameter's number in the optimizer's state_dict (counted over all groups).
        step: 1 for the parameter's first step.
        purpose: which tensor is rounded or drawn, one of `PURPOSES`.
    """
    stream = splitmix64(PURPOSES.index(purpose) << 32 ^ (parameter & MASK64))
    return seed, splitmix64(stream ^ (step & MASK64))
