"""Keeps subnormal numbers during a call, whatever the processor's flag says (`torch.set_flush_denormal`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SMALLEST = 5e-324


def are_flushed() -> bool:
    """Whether this thread's processor takes subnormal numbers for zero."""
    return _SMALLEST == 0.0


@contextmanager
def kept() -> Iterator[None]:
    """Compute with subnormal numbers on this thread, then let them be flushed again."""
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)
