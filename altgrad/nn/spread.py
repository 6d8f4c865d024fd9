"""Tensors that are spread over processes (torch's DTensor, the parameters of FSDP2): each process's part, and what all agree on.

Every function that says so is a collective call: all processes that hold a part must make it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from altgrad.quantization import amax

TENSOR_PARALLEL = (
    "its weight is a DTensor in the forward (tensor parallelism), whose parts would each have a scale of their own; leave the layer out of "
    "the recipe or of the parallel plan, or spread the model by FSDP2 (fully_shard) or DDP"
)


def is_spread(x: object) -> bool:
    """Whether a tensor is spread over processes."""
    return type(x) is not Tensor and hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    """This process's part of a spread tensor, sharing its memory; any other tensor as it is."""
    if not is_spread(x):
        return x
    with torch.no_grad():
        return x.to_local()  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """A spread tensor gathered on every process (a collective call); any other tensor as it is."""
    return x.full_tensor() if is_spread(x) else x  # type: ignore[attr-defined]


def spread_like(live: Tensor, saved: Tensor) -> Tensor:
    """`saved`, a whole tensor, spread as `live` is; as it is where `live` is not spread."""
    if not is_spread(live) or is_spread(saved):
        return saved
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(saved.to(live.device), live.device_mesh, live.placements)  # type: ignore[attr-defined]


def from_part(live: Tensor, part: Tensor) -> Tensor:
    """The tensor of which each process has a part of `live`'s shape there; the part itself where `live` is not spread."""
    if not is_spread(live):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = live.device_mesh, live.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=live.shape, stride=live.stride())


def offsets(x: Tensor) -> tuple[int, ...]:
    """Where in the whole tensor this process's part begins, on each axis."""
    if not is_spread(x):
        return (0,) * x.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)[1])  # type: ignore[attr-defined]


def part_of(scale: Tensor, x: Tensor) -> Tensor:
    """Of a scale that broadcasts to a spread tensor, what broadcasts to this process's part."""
    if not is_spread(x) or not scale.ndim:
        return scale
    for axis, (begin, size) in enumerate(zip(offsets(x), local(x).shape, strict=True)):
        if scale.shape[axis] > 1:
            scale = scale.narrow(axis, begin if size else 0, size)
    return scale


def largest(x: Tensor, axis: int | None = None) -> Tensor:
    """`altgrad.quantization.amax` of the whole tensor; collective for a spread one."""
    found = amax(local(x), axis)
    if not is_spread(x):
        return found
    if axis is not None:
        of_all = found.new_zeros([n if d == axis % x.ndim else 1 for d, n in enumerate(x.shape)])
        part_of(of_all, x).copy_(found)
        found = of_all
    return _reduced(found, x, dist.ReduceOp.MAX)


def all_agree(yes: bool, x: Tensor) -> bool:
    """Whether every process says yes; collective for a spread tensor."""
    if not is_spread(x):
        return yes
    return bool(_reduced(torch.tensor(int(yes), device=local(x).device), x, dist.ReduceOp.MIN))


def summed(counts: Tensor, x: Tensor) -> Tensor:
    """Counts over the parts of a tensor, of all of it; collective for a spread one."""
    return _reduced(counts, x, dist.ReduceOp.SUM) if is_spread(x) else counts


def _reduced(found: Tensor, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    found = found.contiguous()
    for dimension, placement in enumerate(placements):
        if not placement.is_replicate():
            dist.all_reduce(found, operation, group=mesh.get_group(dimension))
    return found


def shard_name(x: Tensor) -> str:
    """What tells this process's part of a tensor from the others; "" for a whole one. Replicas share it."""
    return f"shard at {offsets(x)}" if is_spread(x) else ""


def mesh_of(tensors: Iterable[Tensor]) -> Any:
    """The mesh of processes over which some of the tensors are spread; None where all are whole."""
    return next((t.device_mesh for t in tensors if is_spread(t)), None)  # type: ignore[attr-defined]


def group_of(mesh: Any) -> Any:
    """The group of a mesh's processes."""
    return mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD


def stays_spread(model: nn.Module, name: str, weight: Tensor | None) -> bool:
    """Whether a layer's forward will meet a weight that is spread (tensor parallelism): FSDP2 gathers its own before.

    Args:
        name: of the layer's module in the model.
    """
    if weight is None or not is_spread(weight):
        return False
    from torch.distributed.fsdp import FSDPModule

    parts = name.split(".") if name else []
    owners = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]
    shards = sum(not placement.is_replicate() for placement in weight.placements)  # type: ignore[attr-defined]
    return shards > 1 or not any(isinstance(owner, FSDPModule) for owner in owners)
