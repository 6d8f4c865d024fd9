"""Triton's interpreter made to round as GPUs do, whatever its version, and to prepare a launch once."""

import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


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


def prepare_each_launch_once() -> None:
    """The interpreter replaces all of Triton's language anew at every call of a function by a kernel: a third of its time.

    Here it does so at the first call that a launch makes with that language in sight, and looks a dtype up once.
    """
    replace, launch, dtype_of = interpreter._patch_lang, GridExecutor.__call__, interpreter._get_np_dtype
    replaced: set[str] = set()  # in this launch
    in_sight: dict[object, set[str]] = {}  # function -> the languages that it names
    dtypes: dict[str, np.dtype] = {}

    def replaced_once(fn):
        if fn not in in_sight:
            named = fn.__globals__.values()
            in_sight[fn] = {m.__name__ for m in named if inspect.ismodule(m) and m in (tl, tl.core)}
        if in_sight[fn] <= replaced:
            return None
        replaced.update(in_sight[fn])
        return replace(fn)

    def launched(executor, *args, **kwargs):
        replaced.clear()
        return launch(executor, *args, **kwargs)

    def looked_up(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype_of(dtype)
        return dtypes[name]

    interpreter._patch_lang, GridExecutor.__call__, interpreter._get_np_dtype = replaced_once, launched, looked_up
