"""Every random stream: pure functions of names, seeds and steps, never a generator with hidden state.

A key is (seed, stream), two 64-bit words; `altgrad.randomness.counter` turns it and an element index into bits. So any
step can be replayed, resumed, or run on another device, and draws the same bits. Layers name their streams by
`stream_base` and move them through training by `stream_at`; optimizers have `step_key`; whatever feeds one of torch's
generators (batches, dropout, probes) takes its seed from `seed_of`.
"""

from __future__ import annotations

import hashlib

from altgrad.randomness.counter import MASK64, splitmix64

PURPOSES = ("weight", "exp_avg", "exp_avg_sq", "momentum")  # the order is part of the streams: append only


def stream_base(*words: str) -> int:
    """64-bit hash of names, the same on every machine and in every process."""
    return _digest(words)


def stream_at(base: int, step: int, micro_batch: int, rank: int) -> int:
    """The stream of a tensor at one step, micro-batch and rank: an int64."""
    mixed = base
    for word in (step, micro_batch, rank):
        mixed = splitmix64(mixed ^ splitmix64(word & MASK64))
    return mixed - 2**64 if mixed >= 2**63 else mixed


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
        purpose: which tensor is rounded, one of `PURPOSES`.
    """
    stream = splitmix64(PURPOSES.index(purpose) << 32 ^ (parameter & MASK64))
    return seed, splitmix64(stream ^ (step & MASK64))
