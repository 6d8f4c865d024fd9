"""What layers made of weights that stay as they are for a while (`session.cached_weights`): each once for all its uses.

Micro-batches of one optimizer step use the same weights. What a layer makes of its weight (codes, an operand of a tensor
core, values) depends on the weight alone where rounding is not stochastic and the scale remembers nothing, so the first use
keeps it and the others take it. Whoever opens the block promises that no weight changes within; each use holds the weight's
memory and version counter to that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from altgrad.errors import RecipeError
from altgrad.nn.written import Written, written
from altgrad.quantization.tensor_cores import capturing


class Owner(Protocol):
    """The operand that a layer makes of its weight (`layer.operand.Operand`)."""

    session: Any
    layer: str
    role: str
    fmt: Any
    stochastic: bool
    delayed: bool
    as_values: int


class _Kept(NamedTuple):
    """What was made of a weight: from which write, in which memory, by whom, with which calls of the observer."""

    made: Any
    write: Written
    memory: object  # keeps its address from being given to other values
    weight: Tensor
    owner: object
    observed: list[dict[str, Any]] | None
    uncoded: int


class _Tap:
    """An observer that passes on what it hears and keeps it."""

    def __init__(self, observer: Any) -> None:
        self._observer, self.heard = observer, []

    def observe(self, **what: Any) -> None:
        """An operand was quantized."""
        self.heard.append(what)
        self._observer.observe(**what)

    def observe_update(self, **what: Any) -> None:
        """A grid weight was updated."""
        self._observer.observe_update(**what)


class WeightCache:
    """What layers made of their weights since `cached_weights` was entered."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}

    def get(
        self, owner: Owner, what: Hashable, weight: Tensor, make: Callable[[], Any], *, observed: bool = False
    ) -> Any:
        """What `make` made of a parameter at its first use.

        Args:
            owner: the operand whose entry of the recipe it follows. what: which of its results.
            observed: whether this use's statistics are published, as they were when it was made.

        Raises:
            RecipeError: the weight has changed since.
        """
        key = (id(owner), what, id(weight), capturing())  # a CUDA graph replays what it captured, and nothing else
        found, write = self._kept.get(key), written(weight)
        if write is None:
            return make()
        if found is not None and found.write != write:
            raise RecipeError(
                f"the weight of layer {owner.layer!r} was written within cached_weights, which promises that none is; end the "
                "block before the optimizer's step, or whatever else writes weights"
            )
        if found is None or (observed and found.observed is None):
            made, heard, uncoded = self._made(owner, make, observed)
            self._kept[key] = _Kept(made, write, weight.untyped_storage(), weight, owner, heard, uncoded)
            return made
        owner.as_values += found.uncoded
        for one in found.observed or () if observed else ():
            owner.session.observer.observe(**one)
        return found.made

    @staticmethod
    def _made(owner: Owner, make: Callable[[], Any], observed: bool) -> tuple[Any, list[dict[str, Any]] | None, int]:
        session, before = owner.session, owner.as_values
        if not observed:
            return make(), None, owner.as_values - before
        observer = session.observer
        session.observer = tap = _Tap(observer)
        try:
            return make(), tap.heard, owner.as_values - before
        finally:
            session.observer = observer


def cache_for(operand: Owner, weight: Tensor) -> WeightCache | None:
    """The cache that serves a use of a layer's parameter, if there is one; not for what else stands in a parameter's place,
    where rounding draws bits or the scale remembers, nor in code that is compiled or transformed."""
    if torch.compiler.is_compiling() or (cache := operand.session.weights) is None:
        return None
    if operand.role != "weight" or not isinstance(weight, nn.Parameter) or torch._C._are_functorch_transforms_active():
        return None
    return cache if operand.fmt is not None and not operand.stochastic and not operand.delayed else None
