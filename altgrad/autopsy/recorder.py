"""A flight recorder for a person's own training loop: bounded captures, and an autopsy by replay of that loop.

    recorder = Recorder(model, optimizer, step_fn)
    for step in range(1, 501):
        loss = recorder.step()
    verdict = recorder.autopsy()

`step_fn(step)` takes one whole training step: it fetches the batch of that step (1, 2, ...), runs forward and backward,
steps the optimizer and returns the loss. If it has an argument `data`, 0 means the run's batches and 1, 2, ... others. All
that it draws must come from torch's generators or from the step, so that the same state and step give the same bits; the
autopsy checks that before it says anything.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from altgrad.autopsy.changes import NotApplicable
from altgrad.autopsy.findings import write_findings
from altgrad.autopsy.fork import Oracle
from altgrad.autopsy.forks import Forks, Told
from altgrad.autopsy.investigate import investigate
from altgrad.autopsy.oracle import LoopOracle, Tell, first_unrepeated
from altgrad.autopsy.search import Settings
from altgrad.autopsy.verdict import Verdict
from altgrad.autopsy.workers import Built, Executor, check_jobs, side_by_side
from altgrad.errors import ConfigError, OptionError
from altgrad.nn import Recipe, change_format, load_quant_state, quant_state, set_seed
from altgrad.nn.session import sessions_of
from altgrad.training.step.state_tree import (
    CaptureRing,
    copy_tree,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)

CERTIFIED = 3
"""Steps that a loop must take twice alike before an autopsy of it says anything."""


class Stateful(Protocol):
    """A scheduler, a gradient scaler, a data loader: whatever else a step changes."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Recorder:
    """Keeps a bounded ring of states of a training loop and replays it.

    Args:
        model: quantized by `altgrad.nn.quantize_model`.
        optimizer: the one that `step_fn` steps.
        step_fn: takes step 1, 2, ... and returns its loss (a number or a tensor of one element).
        also: schedulers, scalers and the like that a step changes.
        every: steps between captures. limit_bytes: of all captures together.

    Raises:
        ConfigError: the model is quantized by several calls, or by none (RecipeError); the loop runs on several ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step_fn: Callable[..., Any],
        *,
        also: Sequence[Stateful] = (),
        every: int = 10,
        limit_bytes: int = 512 * 2**20,
    ) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"this loop runs on {dist.get_world_size()} ranks, whose forks would have to start and stop together; record "
                "and autopsy it in one process"
            )
        sessions = sessions_of(model)
        if len(sessions) != 1 or sessions[0].recipe is None:
            raise ConfigError(
                f"the model was quantized by {len(sessions)} calls of quantize_model; an autopsy takes one"
            )
        self.model, self.optimizer, self.step_fn, self.also = model, optimizer, step_fn, tuple(also)
        self.recipe: Recipe = sessions[0].recipe
        self._takes_data = "data" in inspect.signature(step_fn).parameters
        self.taken = 0
        self.losses: dict[int, float] = {}
        self.ring = CaptureRing(every, limit_bytes)
        self.ring.keep(0, self.capture())

    def step(self) -> float:
        """Take the next step, keep its loss and, when due, its state."""
        loss = self.advance()
        self.losses[self.taken] = loss
        if self.ring.due(self.taken):
            self.ring.keep(self.taken, self.capture())
        return loss

    # -- the loop protocol --------------------------------------------------------------------------------------------

    def capture(self) -> dict[str, Any]:
        """Parameters, optimizer, quantization, everything in `also`, and the generators of torch, numpy and Python."""
        return {
            "step": self.taken,
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.optimizer),
            "formats": copy_tree(quant_state(self.model)),
            "also": [copy_tree(one.state_dict()) for one in self.also],
            "generators": _generators(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a captured state."""
        load_quant_state(self.model, state["formats"])
        load_model_state(self.model, state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        for one, kept in zip(self.also, state["also"], strict=True):
            one.load_state_dict(copy_tree(kept))
        _set_generators(state["generators"])
        self.taken = state["step"]

    def put(self, recipe: Recipe) -> None:
        """Another recipe from here on."""
        change_format(self.model, recipe)

    def reseed(self, seed: int) -> None:
        """Other random bits of rounding from here on."""
        set_seed(self.model, seed)

    def advance(self, *, data: int = 0, lr_factor: float = 1.0) -> float:
        """Take one step; its loss, NaN if it is not finite.

        Raises:
            NotApplicable: other batches, and `step_fn` has no argument `data`.
        """
        if data and not self._takes_data:
            raise NotApplicable("step_fn has no argument `data` that names other batches")
        self.taken += 1
        with slowed(self.optimizer, lr_factor):
            given = self.step_fn(self.taken, data=data) if self._takes_data else self.step_fn(self.taken)
        loss = float(given.detach() if isinstance(given, Tensor) else given)
        return loss if math.isfinite(loss) else math.nan

    def gradient(self) -> Tensor:
        """The gradients that the next step leaves behind."""
        self.advance()
        return torch.cat([p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None])

    @contextmanager
    def aside(self):
        """Within the block the loop may go anywhere; afterwards it is back where it was."""
        own, gradients = self.capture(), [p.grad for p in self.model.parameters()]
        try:
            yield
        finally:
            self.restore(own)
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient

    # -- the autopsy --------------------------------------------------------------------------------------------------

    def autopsy(
        self,
        *,
        budget: int = 120,
        settings: Settings | None = None,
        out: str | Path | None = None,
        jobs: int = 1,
        build: Callable[[], Recorder] | None = None,
        executor: Executor | None = None,
        tell: Tell | None = None,
        told: Callable[[Told], None] | None = None,
    ) -> Verdict:
        """Why the steps taken so far went wrong.

        Args:
            budget: forks that may be run.
            out: folder for verdict.json, autopsy.html, autopsy.md, and forks.jsonl, from which an interrupted autopsy of
                the same loop goes on; None writes nothing.
            jobs: forks at a time; more than 1 run in processes of this machine, each with a loop of its own.
            build: makes the same recorder afresh, at its first step; a function at the top of a module, which `jobs` above
                1 and an executor need. A script that calls this does so below `if __name__ == "__main__":`.
            executor: runs the forks in place of those processes, where it sees `out` under the same path.
            tell, told: progress of the two trajectories, and of the forks.

        Raises:
            ConfigError: the loop does not repeat itself (with the first tensor that differs), its first state is no
                longer kept, or fewer than 10 steps were taken; a worker whose loop does not have its bits.
            OptionError: `jobs` or an executor without `build`, or a `build` that cannot be sent to another process.
            CheckpointError: a state for workers holds more than tensors and plain values.
        """
        if build is None and (jobs > 1 or executor is not None):
            raise OptionError(
                "forks side by side need a loop of their own each: give build=, a function at the top of a module that "
                "returns this recorder at its first step, or leave jobs= and executor= out"
            )
        check_jobs(jobs)
        if self.taken < 10:
            raise ConfigError(f"the loop has taken {self.taken} steps; an autopsy needs at least 10")
        start = self.ring.steps[0]
        if self._reach() - start < 10:
            raise ConfigError(
                f"the first state kept is that after step {start} of {self.taken}, and an autopsy starts from one before the "
                f"damage; raise limit_bytes (one state has {self.ring.bytes // len(self.ring.steps):,} bytes)"
            )
        if (differs := first_unrepeated(self, self.ring[start], CERTIFIED)) is not None:
            raise ConfigError(
                f"the loop does not repeat itself: {differs} differs when the same steps are taken twice from step {start}; "
                "make what step_fn draws a function of the step, or pass what it changes as also="
            )
        with self.aside():
            self.restore(self.ring[start])
            oracle = LoopOracle(self, self._reach() - start, tell=tell)
        folder = None if out is None else Path(out)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            asked: Oracle = oracle
            if build is not None:
                scratch = folder or Path(stack.enter_context(TemporaryDirectory(prefix="altgrad-autopsy-")))
                make = Built(build, torch.get_num_threads())
                asked = stack.enter_context(side_by_side(oracle, make, jobs, executor, scratch))
            forks = Forks(asked, budget=budget, log=None if folder is None else folder / "forks.jsonl", tell=told)
            verdict = investigate(forks, prior=oracle.prior, settings=settings)
        if folder is not None:
            write_findings(folder, verdict, oracle, {"run_id": type(self.model).__name__}, None)
        return verdict

    def _reach(self) -> int:
        return max(self.losses)


def _generators() -> dict[str, Any]:
    """States of the generators of torch, of each CUDA device in use, of numpy and of Python, as plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "python": random.getstate(),
    }


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


@contextmanager
def slowed(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Within the block every step of the optimizer is taken at `factor` times its learning rate, whoever sets that."""
    if factor == 1.0:
        yield
        return
    kept: list[Any] = []

    def before(stepped: torch.optim.Optimizer, *_: Any) -> None:
        kept[:] = [group["lr"] for group in stepped.param_groups]
        for group in stepped.param_groups:
            group["lr"] = group["lr"] * factor

    def after(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group, lr in zip(stepped.param_groups, kept, strict=True):
            group["lr"] = lr

    hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
