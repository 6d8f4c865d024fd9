"""A clock on the device and the random keys of its present time, so that a CUDA graph draws new bits at each replay.

tick      one small program: the next step's first micro-batch
key_at    one small program: the key (seed, stream) of a stream now, as `randomness.stream_at` names it
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.quantization.kernels.cuda.bits import mixed64
from altgrad.quantization.kernels.cuda.launch import on_device


@triton.jit
def _tick(clock):
    """(step, micro-batch) becomes (step + 1, 0)."""
    step = tl.load(clock)
    tl.store(clock, step + 1)
    tl.store(clock + 1, step * 0)


def tick(clock: Tensor) -> None:
    """Move an int64 clock [step, micro-batch] on, in place."""
    with on_device(clock):
        _tick[(1,)](clock)


@triton.jit
def _word(number):
    """A 64-bit word of an int64 number."""
    return tl.cast(number, tl.int64).to(tl.uint64, bitcast=True)


@triton.jit(do_not_specialize=("seed", "base", "rank", "shift"))
def _key_at(key, clock, seed, base, rank, shift):
    mixed = mixed64(_word(base) ^ mixed64(_word(tl.load(clock))))
    mixed = mixed64(mixed ^ mixed64(_word(tl.load(clock + 1))))
    mixed = mixed64(mixed ^ mixed64(_word(rank)))
    tl.store(key, tl.cast(seed, tl.int64))
    tl.store(key + 1, (mixed + _word(shift)).to(tl.int64, bitcast=True))


def key_at(clock: Tensor, seed: int, base: int, rank: int, shift: int) -> Tensor:
    """(seed, stream) as an int64 tensor beside the clock; seed, base and shift are int64 words.

    shift: what is added to the stream, modulo 2^64.
    """
    key = torch.empty(2, dtype=torch.int64, device=clock.device)
    with on_device(clock):
        _key_at[(1,)](key, clock, seed, base, rank, shift)
    return key
