"""Which use of a layer within a step a forward is: each use draws bits of its own, a recomputation repeats them.

A use is a forward in training that a gradient can follow. Its index is taken when the forward runs, and the backward
draws with it. What activation checkpointing recomputes takes the indices that the original forward noted at its
checkpoint, layer by layer in their order: `torch.utils.checkpoint` of both kinds, nested in any way, stopped early, and
for every backward anew. The checkpoint that a forward belongs to is read from the stack of Python calls, where both
passes of both kinds stand, in order, also when compiled code runs between them. Where compiled code recomputes parts of
its own forward, the autograd node of that code is the checkpoint.

A forward inside a backward that no checkpoint of torch's started (checkpointing of other libraries) repeats the
layer's latest use.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from types import CodeType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint

from altgrad.nn.session import Session, recomputing
from altgrad.randomness import as_int64

_STRIDE = 0x9E3779B97F4A7C15  # between the streams of two uses; streams are hashed before anything is drawn
_NOTES = "_altgrad_uses"  # attribute of a checkpoint's own object: its Notes

_FORWARD = inspect.unwrap(torch_checkpoint.checkpoint).__code__
_UNPACK = next(
    (
        code
        for code in torch_checkpoint._checkpoint_hook.__init__.__code__.co_consts
        if isinstance(code, CodeType) and code.co_name == "unpack_hook"
    ),
    None,
)
_REENTRANT_FORWARD = torch_checkpoint.CheckpointFunction.forward.__code__
_REENTRANT_BACKWARD = torch_checkpoint.CheckpointFunction.backward.__code__
_COMPILED = "_aot_autograd/runtime_wrappers.py"  # where forward and backward of compiled code's autograd node stand


class Uses:
    """Counts a layer's uses within a step; the clock sets it back to 0.

    Attributes:
        count: int64 [3], a tensor because compiled code reads it as an input: uses in this step; the mark that tells
            layers apart where compiled code hands on a copy; runs of `_offset_of_use`, never set back.
    """

    def __init__(self, session: Session) -> None:
        self.count = torch.zeros(3, dtype=torch.int64)
        self._register()
        session.operands.append(self)

    def _register(self) -> None:
        mark = next(_marks)
        self.count[1] = mark
        _LIVE[mark] = self

    def __setstate__(self, state: dict) -> None:
        self.count = state["count"].clone()
        self._register()

    shares_amax = False
    pending = None

    def renew_key(self) -> None:
        """Start a step."""
        self.count[:1].zero_()

    def roll(self) -> None:
        """Close a step: nothing is kept."""

    def take(self, training: bool) -> int | Tensor:
        """What this forward draws with: the index of its use, in compiled code the offset of its streams.

        Evaluation (not `training`, or without gradients) is no use: it draws as the step's first use does, always.
        """
        if not training:
            return 0
        if torch.compiler.is_compiling():
            return _offset_of_use(self.count, torch.is_grad_enabled())
        with torch._C._DisableFuncTorch():
            return _next(self.count, torch.is_grad_enabled())[0]


def offset(use: int) -> Tensor:
    """What is added to a key (seed, stream) for a use: int64 [2]."""
    return torch.tensor([0, shift_of(use)], dtype=torch.int64)


def shift_of(use: int) -> int:
    """What is added to a stream for a use: an int64 word."""
    return as_int64(use * _STRIDE)


_marks = itertools.count(1)
_LIVE: WeakValueDictionary[int, Uses] = WeakValueDictionary()  # by mark


class Notes:
    """The uses within one checkpoint, by layer in their order, and how far each recomputation of it has come."""

    def __init__(self) -> None:
        self.uses: dict[int, list[int]] = {}
        self.taken: dict[tuple[Any, int], int] = {}

    def add(self, mark: int, _run: int, use: int) -> None:
        """Note a layer's use."""
        self.uses.setdefault(mark, []).append(use)

    def again(self, recomputation: Any, mark: int, _run: int) -> int | None:
        """The next use of a layer in a recomputation; None: the forward had no more."""
        position = self.taken.get((recomputation, mark), 0)
        self.taken[recomputation, mark] = position + 1
        known = self.uses.get(mark, ())
        return known[position] if position < len(known) else None


class CompiledNotes:
    """The uses within the forward of compiled code, by layer and run of `_offset_of_use`, which its backward may repeat.

    The backward repeats some of them, from a count that the forward kept between two uses, or from its input, which then
    holds the count after the last use: the first run of the backward is the first of the forward in that case.
    """

    def __init__(self) -> None:
        self.uses: dict[int, dict[int, int]] = {}
        self.ahead: dict[tuple[Any, int], int] = {}

    def add(self, mark: int, run: int, use: int) -> None:
        """Note a layer's use."""
        self.uses.setdefault(mark, {})[run] = use

    def again(self, recomputation: Any, mark: int, run: int) -> int | None:
        """The use that a run was in the forward."""
        known = self.uses.get(mark, {})
        if run in known or not known:
            return known.get(run)
        return known.get(run - self.ahead.setdefault((recomputation, mark), run - min(known)))


def _next(count: Tensor, grad: bool) -> tuple[int, bool]:
    """The use that a forward is, and whether the backward of compiled code repeats it; a new one moves the count.

    grad: whether gradients were enabled around the forward.
    """
    fresh, mark, run = count.tolist()
    within, recomputed, is_use = _checkpoints(grad)
    if not is_use:
        return 0, False
    use = None
    if recomputed is not None:
        use = recomputed[0].again(recomputed[1], mark, run)
    if use is None and recomputing():
        use = max(fresh - 1, 0)
    if use is None:
        use = fresh
        count[:1].add_(1)
    for notes in within:
        notes.add(mark, run, use)
    return use, recomputed is not None and isinstance(recomputed[0], CompiledNotes)


def _checkpoints(grad: bool) -> tuple[list[Notes | CompiledNotes], tuple[Notes | CompiledNotes, Any] | None, bool]:
    """Where the running forward stands.

    Returns:
        notes of the checkpoints whose original forward it is in; those of the checkpoint whose recomputation it is in,
        with what identifies the recomputation; whether it is a use: reentrant checkpoints switch gradients off.
    """
    within: list[Notes | CompiledNotes] = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _FORWARD:
            running = getattr(frame.f_locals.get("gen"), "gi_frame", None)
            if grad and running is not None:
                within.append(_notes(running.f_locals["new_frame"]))
        elif code is _REENTRANT_FORWARD:
            node = frame.f_locals["ctx"]
            if node.next_functions:  # none: no backward will come
                grad = True
                within.append(_notes(node))
        elif code is _REENTRANT_BACKWARD:
            return within, (_notes(frame.f_locals["ctx"]), torch._C._current_graph_task_id()), True
        elif code is _UNPACK:
            return within, (_notes(frame.f_locals["frame"]), frame.f_locals["gid"]), grad
        elif code.co_name in ("forward", "backward") and code.co_filename.endswith(_COMPILED):
            node = frame.f_locals.get("ctx")
            notes = None if node is None else _notes(node, CompiledNotes)
            if notes is not None and code.co_name == "backward":
                return within, (notes, torch._C._current_graph_task_id()), grad
            if notes is not None:
                within.append(notes)
        frame = frame.f_back
    return within, None, grad


def _notes(owner: Any, kind: type = Notes) -> Any:
    found = getattr(owner, _NOTES, None)
    if found is None:
        found = kind()
        setattr(owner, _NOTES, found)
    return found


@torch.library.custom_op("altgrad::offset_of_use", mutates_args=("count",), tags=torch.Tag.cudagraph_unsafe)
def _offset_of_use(count: Tensor, grad: bool) -> Tensor:
    use, in_backward = _next(count, grad)
    count[2:].add_(1)
    uses = _LIVE.get(int(count[1]))
    if uses is not None and not in_backward:
        uses.count = count.clone()  # the backward of this code may read the tensor it was given: no other may move it
    return offset(use)


@_offset_of_use.register_fake
def _(count, grad):
    return count.new_empty((2,))
