"""Triton's interpreter made to round as GPUs do, whatever its version."""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def compute_as_gpus_do() -> None:
    """What Triton's interpreter before 3.9 does otherwise: it rounds an fma twice, and lets NaN win in minnum and maxnum."""
    InterpreterBuilder.create_fma = fused_once  # type: ignore[method-assign]
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)  # type: ignore[method-assign]
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)  # type: ignore[method-assign]


def fused_once(self, x, y, z):
    """float32 x * y + z rounded once: summed to odd in float64."""
    a, b, c = (v.data.astype(np.float64) for v in (x, y, z))
    product = a * b
    total = product + c
    back = total - product
    left = (product - (total - back)) + (c - back)
    even = total.view(np.int64) & 1 == 0
    odd = np.nextafter(total, np.copysign(np.inf, left))
    total = np.where(np.isfinite(left) & (left != 0) & even, odd, total)
    return TensorHandle(total.astype(np.float32), z.dtype.scalar)
