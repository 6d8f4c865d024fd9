"""Whose memory a call may read and write: the part of the gate that keeps kernels inside the tensors they were given.

Kernels take addresses, so a tensor must have memory, be dense, and mean what its bytes say. `is_unusual` is the one cheap
question that plain calls pay; `readable` answers for the rest, and `check_writable` for `out`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altgrad.errors import AltGradError, DtypeError

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_unusual(x: Tensor) -> bool:
    """Whether x has no address, or its bytes are not its values: empty, meta, sparse, nested, freed, lazily negated."""
    try:
        return x.data_ptr() == 0 or x.is_neg() or x.is_nested
    except (AttributeError, RuntimeError):  # no tensor, or one without memory
        return True


def readable(x: Tensor, name: str = "x", error: type[AltGradError] = DtypeError) -> Tensor:
    """The tensor with its values in memory: lazy negation and efficient zeros are carried out.

    Raises:
        error: no tensor, not dense, outside of the transform or mode that made it, or its memory is freed.
    """
    check_dense(x, name, error)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.peek_interpreter_stack() is None:
            raise error(f"{name} outlived the torch.func transform (vmap, grad) that made it; return it from there")
        return x
    if hasattr(x, "fake_mode") and _active_fake_mode() is None:
        raise error(
            f"{name} is a fake tensor on {x.device} outside of its FakeTensorMode; make the call inside the mode"
        )
    if torch._is_functional_tensor(x):
        raise error(f"{name} is a tensor of torch's functionalization; pass the tensor that it was made from")
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if x.is_neg():
        return x.resolve_neg()
    if type(x) in PLAIN_TYPES and x.numel() and not x.is_meta and x.data_ptr() == 0:
        raise error(
            f"{name} has {x.numel()} elements but no memory: its storage was freed; pass a tensor that owns memory"
        )
    return x


def _active_fake_mode() -> object:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def check_dense(x: Tensor, name: str = "x", error: type[AltGradError] = DtypeError) -> None:
    """Refuse what is no dense tensor.

    Raises:
        error: no tensor at all, sparse, mkldnn or nested.
    """
    if not isinstance(x, Tensor):
        raise error(f"{name} is a {type(x).__name__}, not a tensor; make one by torch.as_tensor")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)[6:]
        raise error(f"{name} is a {kind} tensor; kernels take dense ones: pass to_dense() or to_padded_tensor()")


def check_writable(out: Tensor, x: Tensor, dtype: torch.dtype, *, is_traced: bool) -> None:
    """Refuse an `out` that cannot take the values of x: their shape, `dtype`, device, layout; or that autograd guards.

    Raises:
        DtypeError: with what is wrong and what to pass instead.
    """
    check_dense(out, "out")
    if out.shape != x.shape or out.dtype != dtype:
        raise DtypeError(f"out is {out.dtype} {list(out.shape)}; it must be x's {dtype} {list(x.shape)}")
    if out.device != x.device:
        raise DtypeError(f"out is on {out.device}, x on {x.device}; make out on x's device")
    if out.requires_grad and torch.is_grad_enabled():
        raise DtypeError("out requires grad, and writing to it is not differentiable; write under torch.no_grad()")
    if is_traced:
        return
    if type(out) not in PLAIN_TYPES:
        raise DtypeError(f"out is a {type(out).__name__} and x a plain tensor; pass a plain tensor as out")
    if torch._C._functorch.is_functorch_wrapped_tensor(out) or torch._is_functional_tensor(out) or out._is_zerotensor():
        raise DtypeError(
            "out has no memory of its own to write to (a wrapped or zero tensor); make it by torch.empty_like"
        )
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise DtypeError("out was made in inference mode; write to it there, or pass a clone")
    if out.numel() and not out.is_meta and out.data_ptr() == 0:
        raise DtypeError("out has no memory: its storage was freed; pass a tensor that owns memory")
    if not _elements_apart(out):
        raise DtypeError("elements of out share memory (an expanded or overlapping view); write to a clone")


def _elements_apart(x: Tensor) -> bool:
    """Whether no two elements share memory, judged by nested strides (which every slice of a dense tensor has)."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _stretch(x: Tensor) -> tuple[int, int]:
    """First address and the one behind the last."""
    start = x.data_ptr()
    if not x.numel():
        return start, start
    reach = sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True)) + 1
    return start, start + reach * x.element_size()


def needs_a_detour(out: Tensor, *read: Any) -> bool:
    """Whether values must be made elsewhere and copied to `out`: it is negated, or shares memory with what is read.

    An `out` of the same memory, strides and element size as what is read may be written in place: every element is read
    before it is written.
    """
    if out.is_neg():
        return True
    first, behind = _stretch(out)
    for tensor in read:
        if not isinstance(tensor, Tensor) or tensor.device != out.device:
            continue
        start, end = _stretch(tensor)
        same = start == first and tensor.stride() == out.stride() and tensor.element_size() == out.element_size()
        if start < behind and first < end and not (same and _elements_apart(tensor)):
            return True
    return False


def written(out: Tensor) -> None:
    """Tell autograd that `out` was written to, as torch's own in-place functions do."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
