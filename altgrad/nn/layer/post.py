"""Gradients of a backward that is differentiated again, on their way to the node of its forward."""

from __future__ import annotations

import torch
from torch import Tensor


class Post:
    """Gradients on their way from a differentiated backward to the node of its forward, within one run of autograd."""

    def __init__(self) -> None:
        self.run, self.grads = -1, [None, None]

    def leave(self, slot: int, grad: Tensor) -> None:
        """Leave a gradient of x (slot 0) or w (slot 1)."""
        run = torch._C._current_graph_task_id()
        if run != self.run:
            self.run, self.grads = run, [None, None]
        found = self.grads[slot]
        self.grads[slot] = grad if found is None else found + grad

    def collect(self) -> list[Tensor | None]:
        """The gradients of x and w that this run left."""
        found = self.grads if self.run == torch._C._current_graph_task_id() else [None, None]
        self.run, self.grads = -1, [None, None]
        return found


class StandIn(torch.autograd.Function):
    """Values in the place of x or w, whose gradient goes by post."""

    @staticmethod
    def forward(ctx, place, values, post: Post, slot: int):
        ctx.post, ctx.slot = post, slot
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        ctx.post.leave(ctx.slot, grad)
        return grad.new_zeros(()), None, None, None
