"""The hook on optimizer steps: rounds grid weights back, rolls scale histories, advances the random streams.

`attach_optimizer` attaches it and hands back the counts of each step. A model whose recipe needs steps (grid storage,
delayed scaling, stochastic rounding) is never left without: an optimizer that steps one of its parameters (its
adapters' or biases, too) and was not attached is attached by itself before that step. A step with learning rate 0 and
without a gradient, as `torch.distributed.checkpoint` makes one to have an optimizer fill its state, is no step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from altgrad.errors import OptionError, RecipeError
from altgrad.nn.layer.classes import LIVE, attention_in, is_quantized, layers_in, module_name, parameter_of, place_name
from altgrad.nn.session import STATE, Session, sessions_of
from altgrad.nn.spread import group_of, mesh_of
from altgrad.nn.storage import GridStorage
from altgrad.nn.update_counts import COUNTS, UpdateCounts


class _Entry(NamedTuple):
    """A grid weight: its layer's name, its module and name there, and its storage."""

    name: str
    module: ref
    parameter: str
    storage: GridStorage

    @property
    def weight(self) -> nn.Parameter:
        owner = self.module()
        assert owner is not None
        weight = parameter_of(owner, self.parameter)
        assert weight is not None
        return weight


_HANDLES: WeakKeyDictionary[Optimizer, list[OptimizerHandle]] = WeakKeyDictionary()


class OptimizerHandle:
    """What `attach_optimizer` hands back: the counts of the last step, and `detach()`.

    The counts stay on the device until they are asked for.
    """

    def __init__(self, optimizer: Optimizer, layers: list[tuple[str, nn.Module]]) -> None:
        self._optimizer = ref(optimizer)
        self._layers = [(name, ref(module)) for name, module in layers]
        self._entries: list[_Entry] | None = None
        self._idle = False  # between the hooks of a step that is none
        self.counts: Tensor | None = None  # int64 [grid parameters, 5], columns as in `COUNTS`
        sessions = {id(m.__dict__[STATE].session): m.__dict__[STATE].session for _, m in layers}
        self._leads = [s for s in sessions.values() if _claim(s, optimizer)]
        self.sessions = list(sessions.values())  # of the layers that this handle serves
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        _HANDLES.setdefault(optimizer, []).append(self)

    def covers(self, session: Session) -> bool:
        """Whether this handle serves the layers of that session."""
        return any(session is own for own in self.sessions)

    def follow(self, layers: list[tuple[str, nn.Module]]) -> None:
        """Serve these layers from the next step on."""
        self._layers = [(name, ref(module)) for name, module in layers]

    def detach(self) -> None:
        """Remove the hooks; stored weights stay where they are."""
        for hook in self._hooks:
            hook.remove()
        optimizer = self._optimizer()
        if optimizer is not None and self in _HANDLES.get(optimizer, []):
            _HANDLES[optimizer].remove(self)
        for session in self._leads:
            session.lead_optimizer = None

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _grid_entries(self, optimizer: Optimizer) -> list[_Entry]:
        """The grid weights that this optimizer steps, each parameter once."""
        entries, stepped = [], None
        for name, module_ref in self._layers:
            module = module_ref()
            for parameter, state in layers_in(module).items() if module is not None else ():
                if state.storage is None:
                    continue
                if stepped is None:  # those left
                    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
                weight = parameter_of(module, parameter)
                storage = state.storage_of(weight) if id(weight) in stepped else None
                if storage is not None:
                    stepped.remove(id(weight))
                    entries.append(_Entry(place_name(name, parameter), module_ref, parameter, storage))
        return entries

    def _before(self, optimizer: Optimizer, args, kwargs):
        closure = closure_of(args, kwargs)
        self._idle = closure is None and _is_no_step(optimizer)
        if self._idle:
            return None
        mesh = mesh_of(p for group in optimizer.param_groups for p in group["params"])
        if mesh is not None:
            for session in self._leads:
                session.group = group_of(mesh)
        self._entries = self._grid_entries(optimizer)
        asked = [entry.storage.asked(entry.weight) for entry in self._entries]
        for entry, known in zip(self._entries, _answers(asked), strict=True):
            entry.storage.before_step(entry.weight, known)
        if closure is None or not self._entries:
            return None
        closure = _within_step(closure, [entry.storage for entry in self._entries])
        return (args[0], closure, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}

    def _after(self, optimizer: Optimizer, args, kwargs) -> None:
        if self._idle:
            return
        rows = []
        own_counts = getattr(optimizer, "grid_step_counts", None)  # of an optimizer that rounds to the grid itself
        for entry in self._entries or ():
            weight, storage = entry.weight, entry.storage
            counted = None if own_counts is None else own_counts(weight)
            rows.append(storage.round_back(weight, storage.session.observer, entry.name, counted))
        self.counts = torch.stack(rows) if rows else None
        beside = next((p for group in optimizer.param_groups for p in group["params"]), None)
        for session in self._leads:
            session.advance(beside)

    # -- what happened --------------------------------------------------------------------------------------------

    def last_step_stats(self) -> dict[str, UpdateCounts]:
        """Counts of the last step by parameter name (waits for the device); empty without grid weights or steps."""
        if self.counts is None:
            return {}
        stats = {}
        for row, entry in zip(self.counts.tolist(), self._entries or (), strict=True):
            stats[entry.storage.name] = UpdateCounts(entry.weight.numel(), *row)
        return stats

    def totals(self) -> UpdateCounts | None:
        """Counts of the last step over all grid weights (waits for the device); None without grid weights."""
        stats = self.last_step_stats()
        if not stats:
            return None
        fields = ("elements", *COUNTS)
        return UpdateCounts(*(sum(getattr(one, name) for one in stats.values()) for name in fields))

    def stall_rate(self) -> Tensor | None:
        """stalled / attempted of the last step as a 0-d tensor, without waiting; NaN where nothing was attempted."""
        if self.counts is None:
            return None
        total = self.counts.sum(0).double()
        return total[2] / total[0]


def _answers(asked: list[Tensor | None]) -> list[tuple[bool, bool] | None]:
    """The questions (`GridStorage.asked`) answered by one copy to the host; None stays None."""
    given = [one for one in asked if one is not None]
    told = iter(torch.stack([one.to(given[0].device) for one in given]).tolist() if given else ())
    return [None if one is None else tuple(next(told)) for one in asked]


def closure_of(args: tuple, kwargs: dict) -> Any:
    """The closure among the arguments that a hook on a step gets, of which the first is the optimizer; None without one."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def _within_step(closure, storages: list[GridStorage]):
    """The closure, in which the weights that the optimizer is still moving are no foreign values."""

    def evaluate():
        with ExitStack() as stack:
            for storage in storages:
                stack.enter_context(storage.within_step())
            return closure()

    return evaluate


def _is_no_step(optimizer: Optimizer) -> bool:
    """Whether a step now moves nothing: every learning rate is 0 and no gradient has an element that is not."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    if any(
        rate is None or (isinstance(rate, Tensor) and rate.is_cuda and Session.capturing()) or rate != 0
        for rate in rates
    ):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not any(grad.is_sparse or bool(grad.any()) for grad in grads)


def _claim(session: Session, optimizer: Optimizer) -> bool:
    """Make the optimizer the one whose steps advance the session, if there is none yet."""
    lead = session.lead_optimizer() if session.lead_optimizer is not None else None
    if lead is not None and lead is not optimizer:
        return False
    session.lead_optimizer = ref(optimizer)
    return True


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, out of a wrapper that only passes calls on (accelerate's, Lightning's).

    A wrapper is what has an optimizer as its `optimizer` and cannot be hooked itself. One that can be hooked does
    something of its own in a step, and stays.
    """
    while not (isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks")):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            raise OptionError(
                f"{type(optimizer).__name__} is no torch.optim.Optimizer and wraps none; pass the optimizer"
            )
        optimizer = inner
    return optimizer


def attach_optimizer(model: nn.Module, optimizer: Optimizer) -> OptimizerHandle:
    """Let the optimizer's steps round grid weights back, roll delayed scales and advance the random streams.

    With several optimizers on one model the first that is attached advances the step. Attaching again replaces the
    handle. An optimizer that another library wrapped (accelerate) is unwrapped.

    Raises:
        RecipeError: the model has no quantized layer, or the optimizer holds none of its parameters.
        OptionError: it is no optimizer.
    """
    optimizer = bare_optimizer(optimizer)
    sessions = sessions_of(model)
    owned = {id(p) for p in model.parameters()}
    if not any(id(p) in owned for group in optimizer.param_groups for p in group["params"]):
        raise RecipeError(
            f"{type(optimizer).__name__} holds no parameter of {type(model).__name__}; pass its optimizer"
        )
    for handle in list(_HANDLES.get(optimizer, [])):
        if any(handle.covers(session) for session in sessions):
            handle.detach()
    layers = [(name, module) for name, module in model.named_modules() if is_quantized(module)]
    for _, module in layers:
        for parameter, state in layers_in(module).items():
            state.storage_of(parameter_of(module, parameter))
    return OptimizerHandle(optimizer, layers)


def follow_layers(model: nn.Module) -> None:
    """Have the handles that serve a model's sessions look at the layers that are quantized now."""
    sessions = sessions_of(model)
    layers = [(name, module) for name, module in model.named_modules() if is_quantized(module)]
    for handle in (handle for handles in _HANDLES.values() for handle in handles):
        if any(handle.covers(session) for session in sessions):
            own = [(name, module) for name, module in layers if handle.covers(module.__dict__[STATE].session)]
            handle.follow(own)


@torch._disable_dynamo  # as torch's own optimizers do: torch.compiler.disable would import the compiler with this module
def _attach_unattached(optimizer: Optimizer, args, kwargs) -> None:
    served = {id(session) for handle in _HANDLES.get(optimizer, []) for session in handle.sessions}
    waiting: dict[int, list[nn.Module]] = {}
    for module in list(LIVE):
        session = module.__dict__[STATE].session
        if id(session) not in served:
            states = [*layers_in(module).values(), *attention_in(module)]
            if any(s.recipe.needs_steps for s in states):
                waiting.setdefault(id(session), []).append(module)
    if not waiting:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for modules in waiting.values():
        if any(id(p) in stepped for p in _parameters(modules)):
            layers = sorted(((module_name(m), m) for m in modules), key=lambda pair: pair[0])
            OptimizerHandle(optimizer, layers)._before(optimizer, args, kwargs)


def _parameters(modules: list[nn.Module]) -> Iterator[nn.Parameter]:
    """All parameters of the model that the modules were quantized in, as adapters train it; else their own."""
    model = modules[0].__dict__[STATE].session.model
    root = None if model is None else model()
    for one in [root] if root is not None else modules:
        yield from one.parameters()


_watching = False


def watch_optimizers() -> None:
    """From now on attach unattached optimizers at their first step, as the module says."""
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_attach_unattached)
        _watching = True
