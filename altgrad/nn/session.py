"""What the quantized layers of one model share: the clock (step, micro-batch), the seed, and who observes.

Random streams are functions of (tensor, role, step, micro-batch, use within it, and for activations the rank); nothing is
drawn from a generator with hidden state, so any step can be replayed by setting the clock. Setting it starts the count of
uses anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from altgrad.errors import RecipeError
from altgrad.nn.spread import is_spread
from altgrad.nn.weight_cache import WeightCache
from altgrad.quantization.kernels.choose import load
from altgrad.quantization.observer import Observer
from altgrad.quantization.tensor_cores import capturing, serve
from altgrad.randomness import as_int64, stream_at

if TYPE_CHECKING:
    from altgrad.nn.recipe.recipe import Recipe

_NUMBERS = count()
_BY_NUMBER: WeakValueDictionary[int, Any] = WeakValueDictionary()
STATE = "_altgrad"  # attribute of a quantized module that holds its LayerState
REACH = "_altgrad_reach"  # of every module that a recipe may quantize, whether it does now or not: parameter -> Reach


def _rank() -> int:
    return (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )


class Stepped(Protocol):
    """What has random keys, a scale history or a count of uses, and so lives by the clock.

    shares_amax: whether the history is of one amax, `pending`, that differs from process to process.
    """

    shares_amax: bool
    pending: Tensor | None

    def renew_key(self) -> None:
        """Set the random key of the session's present step."""

    def roll(self) -> None:
        """Close a step: what the step saw enters the history."""


class Numbered:
    """What compiled code finds by its number when it runs; a copy has one of its own."""

    def register(self) -> None:
        """Take a number."""
        self.number = next(_NUMBERS)
        _BY_NUMBER[self.number] = self

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.register()


class Session(Numbered):
    """Clock, seed, observer and the operands with state of one `quantize_model` call."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._step = 0
        self._replayed = False  # a CUDA graph moves the clock, so that the GPU alone knows the step
        self._clocks: dict[torch.device, Tensor] = {}  # int64 [step, micro-batch] on each GPU that draws random bits
        self.micro_batch = 0
        self.rank: int | None = None  # None asks torch.distributed
        self.bypass = False
        self.observer: Observer | None = None
        self.weights: WeightCache | None = None  # what layers made of weights that stay as they are (`cached_weights`)
        self.blocks = 0  # of `cached_weights` that are open
        self.reduce_amax: Callable[[Tensor], Tensor] | None = None
        self.group: Any = None  # the processes that train the model together, as DDP or FSDP2 have shown
        self.in_step = False  # whether all of them use the same layers in the same order, so that a use can ask all
        self.recipe: Recipe | None = None
        self.lead_optimizer: Callable[[], object] | None = (
            None  # weak reference to the optimizer that advances the clock
        )
        self.model: Callable[[], nn.Module | None] | None = None  # weak reference to the model that was quantized
        self.operands: list[Stepped] = []  # those with random keys or scale histories, and counts of uses
        self.register()

    def __getstate__(self) -> dict:
        # A copy of the model is neither observed nor part of the process group.
        return {
            **self.__dict__,
            "_step": self.step,
            "_replayed": False,
            "_clocks": {},
            "observer": None,
            "weights": None,
            "blocks": 0,
            "bypass": False,
            "reduce_amax": None,
            "group": None,
            "lead_optimizer": None,
            "model": None,
        }

    capturing = staticmethod(capturing)

    @property
    def step(self) -> int:
        """Optimizer steps so far; once a graph has captured one, it is the GPU that counts (this waits for it)."""
        if self._replayed and not self.capturing():
            self._step = max((int(clock[0]) for clock in self._clocks.values()), default=self._step)
        return self._step

    def key(self, base: int, per_rank: bool) -> tuple[int, int]:
        """(seed, stream) of a tensor now."""
        return self.seed, stream_at(base, self.step, self.micro_batch, self._rank_of(per_rank))

    def key_beside(self, x: Tensor, base: int, per_rank: bool, shift: int | Tensor = 0) -> Tensor:
        """`key` as an int64 tensor on the GPU that x is on, found there by its own clock; compiled code asks when it runs.

        shift: what is added to the stream, an int64 word; in compiled code also as `uses.offset` has it.
        """
        if torch.compiler.is_compiling():
            offset = shift if isinstance(shift, Tensor) else torch.tensor([0, shift], dtype=torch.int64)
            return torch.ops.altgrad.key_beside(offset, self.number, base, per_rank, x.device)
        return self._key_on(x.device, base, per_rank, int(shift))

    def _key_on(self, device: torch.device, base: int, per_rank: bool, shift: int) -> Tensor:
        clock, rank = self._clock_on(device), self._rank_of(per_rank)
        return load("cuda", "clock").key_at(clock, as_int64(self.seed), as_int64(base), rank, shift)

    def _rank_of(self, per_rank: bool) -> int:
        return (_rank() if self.rank is None else self.rank) if per_rank else 0

    def _clock_on(self, device: torch.device) -> Tensor:
        clock = self._clocks.get(device)
        if clock is None:
            self.refuse_capture("the random keys are not on the GPU yet")
            step = self.step
            clock = self._clocks[device] = torch.empty(2, dtype=torch.int64, device=device)
            self._set(clock, step)
        return clock

    def _set(self, clock: Tensor, step: int) -> None:
        for place, number in zip(clock, (step, self.micro_batch), strict=True):
            place.fill_(number)  # a copy of host memory would wait

    def refuse_capture(self, why: str, remedy: str = "take a step of the same kind before the capture") -> None:
        """Refuse what a CUDA graph that is being captured would do wrong at its replays.

        Raises:
            RecipeError: there is one.
        """
        if self.capturing():
            raise RecipeError(f"a CUDA graph cannot capture this step: {why}; {remedy}")

    def set_clock(self, step: int, micro_batch: int) -> None:
        """Move to a step and micro-batch, renew the random keys and start the count of uses anew."""
        self.refuse_capture("replays would set the clock to the same step", "set it outside of the capture")
        self.micro_batch = micro_batch
        for clock in self._clocks.values():
            self._set(clock, step)
        self._renew(step, self._replayed)

    def _renew(self, step: int, replayed: bool) -> None:
        self._step, self._replayed = step, False  # known until the next replay
        for operand in self.operands:
            operand.renew_key()
        self._replayed = replayed

    def largest_of_group(self, amax: Tensor) -> Tensor:
        """The amax over the processes that train the model together, where they are known to ask at the same uses."""
        if self.group is None or not self.in_step or self.reduce_amax is not None:
            return amax
        found = amax.clone()
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, self.group)
        return found

    def advance(self, beside: Tensor | None = None) -> None:
        """Close a step: roll the scale histories once, then move to the next step's first micro-batch.

        Where several processes train the model, the amaxes of the step are those of all of them. Where a CUDA graph
        captures this, the clock on the GPU is the only one that goes on.

        Args:
            beside: a parameter of the model; a GPU that it is on gets a clock.
        """
        if beside is not None and serve(beside):
            self._clock_on(beside.device)
        captured = self.capturing()
        if self.group is not None and self.reduce_amax is None:
            self.refuse_capture("processes that train the model together exchange their amaxes", "step outside of it")
            _share_pending([o for o in self.operands if o.shares_amax], self.group)
        for operand in self.operands:
            operand.roll()
        step = self.step
        for clock in self._clocks.values():
            load("cuda", "clock").tick(clock)
        self.micro_batch = 0
        self._renew(step + (not captured), self._replayed or captured)


def _share_pending(operands: list[Stepped], group) -> None:
    """Give each operand the largest pending amax of the group's processes, some of which may not have used it."""
    if not operands:
        return
    seen = [o.pending for o in operands if o.pending is not None]
    device = seen[0].device if seen else torch.device("cpu")
    if not seen and torch.distributed.get_backend(group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    unused = torch.full((), -1.0, device=device, dtype=torch.float64)
    found = torch.stack([unused if o.pending is None else o.pending.double() for o in operands])
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
    for operand, largest, used in zip(operands, found.unbind(), (found >= 0).tolist(), strict=True):
        if operand.pending is not None and operand.pending.is_cuda:
            operand.pending.copy_(largest)
            continue
        dtype = torch.float32 if operand.pending is None else operand.pending.dtype
        operand.pending = largest.to(dtype) if used else None


@dataclass(frozen=True)
class Reach:
    """A layer that `quantize_model` was asked to quantize if its recipe says so.

    Args:
        session: of that call. name: qualified name in the model that was given to it.
        positions: where it stands, as far as the call watched the model run; None: it did not.
    """

    session: Session
    name: str
    positions: frozenset[str] | None


def check_module(model: object) -> None:
    """Refuse what is no model.

    Raises:
        RecipeError: it is no module of torch.
    """
    if not isinstance(model, nn.Module):
        raise RecipeError(f"the model is a {type(model).__name__}, no torch.nn.Module; pass the module itself")


def sessions_of(model: nn.Module) -> list[Session]:
    """The sessions of a model that was quantized (also inside DDP or torch.compile wrappers).

    Raises:
        RecipeError: no layer of it was, or it is no module.
    """
    check_module(model)
    found: dict[int, Session] = {}
    for module in model.modules():
        state = module.__dict__.get(STATE)
        for one in [state] if state is not None else module.__dict__.get(REACH, {}).values():
            found[id(one.session)] = one.session
    if not found:
        raise RecipeError(f"{type(model).__name__} has no quantized layer; call quantize_model(model, recipe) first")
    return list(found.values())


def set_step(model: nn.Module, step: int, micro_batch: int = 0) -> None:
    """Set the step and micro-batch that the random streams of stochastic rounding are functions of.

    The optimizer hook (`attach_optimizer`) advances the step by itself, and each use of a layer within a step draws its
    own bits, in the order of the forwards. A loop that calls this before each micro-batch makes the bits of a
    micro-batch independent of how many went before it. Call it before the forward, not between a forward and its
    backward: it starts the count of uses anew.
    """
    for session in sessions_of(model):
        session.set_clock(int(step), int(micro_batch))


def set_seed(model: nn.Module, seed: int) -> None:
    """Set the seed of every random stream of the model's quantized layers."""
    for session in sessions_of(model):
        session.seed = int(seed)
        session.set_clock(session.step, session.micro_batch)


def set_observer(model: nn.Module, observer: Observer | None) -> None:
    """Send the statistics of every quantization in training mode to `observer`; None stops it.

    Without an observer no statistic is computed. With one, the kernels' one-pass statistics variants run. Under
    `torch.compile` set the observer before compiling.
    """
    for session in sessions_of(model):
        session.observer = observer


def set_rank(model: nn.Module, rank: int | None) -> None:
    """Set the rank that enters the random streams of activations and gradients; None asks torch.distributed."""
    for session in sessions_of(model):
        session.rank = rank
        session.set_clock(session.step, session.micro_batch)


def set_amax_reduction(model: nn.Module, reduce: Callable[[Tensor], Tensor] | None) -> None:
    """Pass every amax of an input or grad_output through `reduce`, such as an all-reduce by maximum over ranks.

    Without one each rank scales what it has. Delayed scales are those of all ranks under DDP and FSDP2: histories take the
    largest amax of the ranks at the end of each step, and a first use, before there is a history, reduces its amax at once.

    It is called in the same order on every rank that runs the same model. Weights are replicated and not reduced.
    """
    for session in sessions_of(model):
        session.reduce_amax = reduce


def uncoded_uses(model: nn.Module) -> dict[str, int]:
    """How often an operand held a NaN or inf that its format has no code for: {"layer role gemm": uses}, none left out.

    Such an operand travels as values, and its product takes the float32 route. Counted on the CPU in eager mode, since
    the model was quantized.
    """
    found: dict[str, int] = {}
    for module in model.modules():
        state = module.__dict__.get(STATE)
        for operand in () if state is None else state.distinct():
            if operand.as_values:
                found[f"{operand.layer} {operand.role} {operand.gemm}"] = operand.as_values
    return found


@contextmanager
def full_precision(model: nn.Module):
    """Within the block, forward and backward run without quantization at the present weights.

    For references such as the FP32 gradient. Weights on a grid stay where they are; nothing is recorded.
    """
    sessions = sessions_of(model)
    before = [session.bypass for session in sessions]
    for session in sessions:
        session.bypass = True
    try:
        yield model
    finally:
        for session, bypass in zip(sessions, before, strict=True):
            session.bypass = bypass


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Within the block no weight changes: each is quantized at its first use and never again, with the same results.

        optimizer.zero_grad()
        with cached_weights(model):
            for x, y in micro_batches:
                loss(model(x), y).backward()
        optimizer.step()

    Forwards, backwards, recomputed forwards (activation checkpointing) and evaluations may be within. Observers hear of each
    use as without it. Quantized as ever are weights under stochastic rounding or scales that remember (delayed),
    embeddings, norms, layers with an emulated accumulator, weights that are computed (parametrizations), and compiled code.
    What is kept takes the memory of codes, bf16 or float32 values, whatever a layer multiplies, until the block ends. Blocks
    may be nested or overlap; what is kept is dropped when the last of them ends.

    Args:
        model: one with quantized layers.

    Raises:
        RecipeError: at the use of a weight that was written within the block, by its version counter and its memory
            (`weight.data.add_()` counts no version and goes unseen); the model has no quantized layer, or its parameters
            are spread over processes, which gather them anew for each forward.
    """
    sessions = sessions_of(model)
    if any(is_spread(p) for p in model.parameters()):
        raise RecipeError(
            "cached_weights: parameters are spread over processes, which gather them anew for each forward"
        )
    cache = WeightCache()
    for session in sessions:
        session.weights = session.weights or cache
        session.blocks += 1
    try:
        yield
    finally:
        for session in sessions:  # the last to leave, which of two threads' blocks need not be the first that came
            session.blocks -= 1
            session.weights = session.weights if session.blocks else None


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing recomputes it."""
    return torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint itself asks


def as_key_tensor(key: tuple[int, int]) -> Tensor:
    """A key as the int64 tensor that kernels take."""
    return torch.tensor([as_int64(word) for word in key], dtype=torch.int64)


@torch.library.custom_op(
    "altgrad::key_beside",
    mutates_args=(),
    tags=torch.Tag.cudagraph_unsafe,  # it reads the host's count of uses, which a replay would not
    schema="(Tensor offset, int session, int base, bool per_rank, Device device) -> Tensor",
)
def _key_beside(offset, session, base, per_rank, device):
    return _BY_NUMBER[session]._key_on(device, base, per_rank, int(offset[1]))


@_key_beside.register_fake
def _(offset, session, base, per_rank, device):
    return offset.new_empty((2,), device=device)


@torch.library.custom_op("altgrad::delayed_scale", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _delayed_scale(seen: Tensor, operand: int, record: bool) -> Tensor:
    return _BY_NUMBER[operand].delayed_scale(seen.clone(), record)


@_delayed_scale.register_fake
def _(seen, operand, record):
    return seen.new_empty(seen.shape, dtype=torch.float32)
