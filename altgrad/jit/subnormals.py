"""Subnormal numbers on the calling thread, whatever `torch.set_flush_denormal` says, for arithmetic outside of loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

_TINIEST = 5e-324  # equals zero on a thread that takes subnormal numbers as zero
_Function = TypeVar("_Function", bound=Callable[..., Any])


def flushed() -> bool:
    """Whether this thread takes subnormal numbers for zero."""
    return _TINIEST == 0.0


@contextmanager
def gradual_underflow() -> Iterator[None]:
    """Neither flush subnormal results nor take subnormal operands as zero on this thread; it is left as found.

    Where the thread flushes, torch works on it alone meanwhile, as threads that it started flush, too. Compiled loops run
    without flushing on all their threads by themselves (`jit.threads`).
    """
    if _TINIEST != 0.0:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)


def unflushed(function: _Function) -> _Function:
    """Decorator: the function runs under `gradual_underflow`, at next to no cost where the thread does not flush."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if _TINIEST != 0.0 or torch.compiler.is_compiling():  # a graph is made under one setting and runs under any
            return function(*arguments, **options)
        with gradual_underflow():
            return function(*arguments, **options)

    return cast(_Function, call)
