"""Which write a tensor holds: what tells whether its values are still those that somebody saw there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Written(NamedTuple):
    """Which write a tensor holds: its memory, where in it, and the version counter."""

    memory: int
    offset: int
    version: int


def written(tensor: Tensor) -> Written | None:
    """Which write the tensor holds; None where that is not known (tensors of inference mode count no versions)."""
    if tensor.is_inference():
        return None
    return Written(tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor._version)


def checksum(tensor: Tensor) -> int:
    """Sum of a tensor's bits, which the write of any one value changes: one pass at the speed of memory."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype == torch.float32 and (flat.numel() % 2 or flat.storage_offset() % 2):
        return int(flat.view(torch.int32).sum(dtype=torch.int64))  # slower
    return int(flat.view(torch.int64).sum())  # wraps around


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one place in memory in one layout."""
    layouts = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in (a, b)]
    return layouts[0] == layouts[1]
