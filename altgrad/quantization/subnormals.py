"""Keeps subnormal numbers during a call, whatever the processor's flag says (`torch.set_flush_denormal`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_SMALLEST = 5e-324
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


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


def keeps_subnormals(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function, computed with subnormal numbers."""

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not are_flushed():
            return function(*args, **kwargs)
        with kept():
            return function(*args, **kwargs)

    return call
