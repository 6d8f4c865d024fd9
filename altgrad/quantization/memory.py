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
    """Whether x has no address, or its bytes are not its values.

    That is: empty, meta, sparse, nested, lazily negated, or of a storage that was freed or has become too small.
    """
    try:
        if x.data_ptr() == 0 or x.is_neg() or x.is_nested:
            return True
        if x.is_contiguous() and not x.storage_offset():
            return x.untyped_storage().nbytes() < x.nbytes
        return _bytes_reached(x) > x.untyped_storage().nbytes()
    except (AttributeError, RuntimeError):  # no tensor, or one without memory
        return True


def readable(x: Tensor, name: str = "x", error: type[AltGradError] = DtypeError) -> Tensor:
    """The tensor with its values in memory: lazy negation and efficient zeros are carried out. In a graph, x.

    Raises:
        error: no tensor, not dense, outside of the transform or mode that made it, or its memory is freed.
    """
    if torch.compiler.is_compiling():
        return x
    check_dense(x, name, error)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        _check_alive(x, name, error)
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
    check_storage(x, name, error)
    return x


def _check_alive(x: Tensor, name: str, error: type[AltGradError]) -> None:
    """Refuse the wrapper of a torch.func transform that has ended; a dead one of `grad` is no wrapper to torch."""
    transforms = torch._C._functorch.get_interpreter_stack() or []
    batched = torch._C._functorch.is_batchedtensor(x)
    at = [t for t in transforms if t.level() == torch._C._functorch.maybe_get_level(x)]
    if not transforms or (batched and not any(t.key() == torch._C._functorch.TransformType.Vmap for t in at)):
        raise error(f"{name} outlived the torch.func transform (vmap, grad) that made it; return it from there")


def check_storage(x: Tensor, name: str = "x", error: type[AltGradError] = DtypeError) -> None:
    """Refuse a tensor whose elements lie beyond the end of its storage, which was freed or shrunk under it.

    Tensors that keep their values elsewhere (meta, fake, wrappers of transforms or with a dispatch of their own) have
    nothing to check.

    Raises:
        error: with the bytes that the elements take and those that the storage has.
    """
    if torch.compiler.is_compiling() or x.is_meta or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x) or x._is_zerotensor():
        return
    reached, held = _bytes_reached(x), x.untyped_storage().nbytes()
    if reached > held:
        raise error(
            f"{name} of shape {list(x.shape)} reaches {reached} bytes into its storage, which has {held}: it was freed "
            "or shrunk by resize_; pass a tensor that owns memory for all its elements"
        )


def _bytes_reached(x: Tensor) -> int:
    """Bytes from the start of its storage to the end of its last element; 0 for an empty tensor."""
    return (x.storage_offset() + _reach(x)) * x.element_size() if x.numel() else 0


def detached(x: Tensor) -> Tensor:
    """x outside of autograd's graph; in inference mode x itself, where wrapper tensors made elsewhere cannot be detached."""
    recorded = torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    return x.detach() if recorded or torch._C._functorch.peek_interpreter_stack() is not None else x


def check_beside(given: Tensor, x: Tensor, name: str, error: type[AltGradError]) -> None:
    """Refuse a tensor beside x that is not dense, lacks memory, or is fake where x has values and no mode is active.

    Raises:
        error: with what is wrong and what to pass.
    """
    check_dense(given, name, error)
    if torch.compiler.is_compiling():
        return
    check_storage(given, name, error)
    if torch._C._functorch.is_functorch_wrapped_tensor(given):
        _check_alive(given, name, error)
    if given.is_meta and not x.is_meta:
        raise error(f"{name} is a meta tensor without values, x is on {x.device}; pass values")
    if hasattr(given, "fake_mode") and _active_fake_mode() is None and not hasattr(_unwrapped(x), "fake_mode"):
        raise error(f"{name} is a fake tensor on {given.device} without values, x is on {x.device}; pass values")


def _unwrapped(x: Tensor) -> Tensor:
    """The tensor under the wrappers of torch.func and of functionalization."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return torch._from_functional_tensor(x) if torch._is_functional_tensor(x) else x


def _active_fake_mode() -> object:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def check_dense(x: Tensor, name: str = "x", error: type[AltGradError] = DtypeError) -> None:
    """Refuse what is no dense tensor.

    Raises:
        error: no tensor at all, sparse, mkldnn or nested.
    """
    if not isinstance(x, Tensor):
        raise error(f"{name} is a {type(x).__name__}, not a tensor; make one by torch.as_tensor")
    if torch.compiler.is_compiling():  # Dynamo lets a backward ask for no layout
        dense = not (x.is_sparse or x.is_mkldnn or x.is_nested)
    else:
        dense = x.layout is torch.strided and not x.is_nested
    if not dense:
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
    if torch.compiler.is_compiling():
        return
    check_storage(out, "out")
    if not _elements_apart(out):
        raise DtypeError("elements of out share memory (an expanded or overlapping view); write to a clone")
    if type(out) not in PLAIN_TYPES and not (is_traced and type(out) is type(x)):
        raise DtypeError(f"out is a {type(out).__name__} and x a {type(x).__name__}; pass a plain tensor as out")
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(out) or torch._is_functional_tensor(out)
    if out._is_zerotensor() or (wrapped and not (is_traced and _unwrapped(x) is not x)):
        raise DtypeError(
            "out has no memory of its own to write to (a wrapped or zero tensor); make it by torch.empty_like"
        )
    if is_traced:
        return
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise DtypeError("out was made in inference mode; write to it there, or pass a clone")


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
    return start, start + _reach(x) * x.element_size()


def _reach(x: Tensor) -> int:
    """Elements from the first to the last in memory, both counted, of a tensor that has any."""
    if x.is_contiguous():
        return x.numel()
    return sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True)) + 1


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
