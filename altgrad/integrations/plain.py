"""States as plain values, which every framework's checkpoint holds, be it JSON or a pickle that may not hold classes."""

from __future__ import annotations

from typing import Any

import torch

_TENSOR = "tensor"


def plain(node: Any) -> Any:
    """`node` with each tensor as a mapping of its dtype, shape and numbers; float32 and narrower numbers keep every bit."""
    if isinstance(node, torch.Tensor):
        values = node.detach().cpu()
        return {
            _TENSOR: str(values.dtype).partition(".")[2],
            "shape": list(values.shape),
            "values": values.flatten().tolist(),
        }
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return node


def tensors(node: Any) -> Any:
    """What `plain` was given, with its tensors on the CPU; tuples came back as lists."""
    if isinstance(node, dict):
        if _TENSOR in node:
            return torch.tensor(node["values"], dtype=getattr(torch, node[_TENSOR])).reshape(node["shape"])
        return {key: tensors(value) for key, value in node.items()}
    return [tensors(value) for value in node] if isinstance(node, list) else node
