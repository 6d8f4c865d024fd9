"""A flight recorder for a person's own training loop: bounded captures, and an autopsy by replay of that loop.

    recorder = Recorder(model, optimizer, step_fn)
    for step in range(1, 501):
        loss = recorder.step()
    verdict = recorder.autopsy()

`step_fn(step)` takes one whole training step (`altgrad.loop.StepLoop`): the same state and step must give the same bits, which
the autopsy checks before it says anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from altgrad.autopsy.changes import NotApplicable
from altgrad.autopsy.findings import write_findings
from altgrad.autopsy.fork import LOW, Oracle
from altgrad.autopsy.forks import Forks, Told
from altgrad.autopsy.investigate import investigate
from altgrad.autopsy.oracle import LoopOracle, Tell, first_other, first_unrepeated
from altgrad.autopsy.search import Settings
from altgrad.autopsy.verdict import Verdict
from altgrad.autopsy.workers import Built, Executor, check_jobs, side_by_side
from altgrad.errors import ConfigError, OptionError
from altgrad.loop.loop import Loop, Stateful, StepLoop, aside, finite_or_nan, takes_data
from altgrad.loop.states import CaptureRing
from altgrad.nn import Recipe, change_format
from altgrad.nn.session import sessions_of

CERTIFIED = 3
"""Steps that a loop must take twice alike before an autopsy of it says anything."""
COUNT = "recorded"
"""Beside a loop's own state: the steps that its recorder has counted."""


class Recorder:
    """Keeps a bounded ring of states of a training loop and replays it.

    Args:
        loop: an `altgrad.loop.Loop`, whose model `quantize_model` has quantized; or that model, with
        optimizer, step_fn, also, taken: what `altgrad.loop.StepLoop` takes.
        every: steps between captures. limit_bytes: of all captures together.

    Raises:
        ConfigError: the model is quantized by several calls, or by none (RecipeError); the loop runs on several ranks; a model
            without optimizer and step function, or a loop with them.
    """

    def __init__(
        self,
        loop: Loop | nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        step_fn: Callable[..., Any] | None = None,
        *,
        also: Sequence[Stateful] = (),
        taken: int = 0,
        every: int = 10,
        limit_bytes: int = 512 * 2**20,
    ) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"this loop runs on {dist.get_world_size()} ranks, whose forks would have to start and stop together; record "
                "and autopsy it in one process"
            )
        if isinstance(loop, nn.Module):
            if optimizer is None or step_fn is None:
                raise ConfigError("a recorder of a model needs its optimizer and a step_fn, which takes step 1, 2, ...")
            loop = StepLoop(loop, optimizer, step_fn, also=also, taken=taken)
        elif optimizer is not None or step_fn is not None or also:
            raise ConfigError("a recorder of a loop takes optimizer, step_fn and also from it; leave them out")
        else:
            taken = getattr(loop, "taken", taken)
        sessions = sessions_of(loop.model)
        if len(sessions) != 1 or sessions[0].recipe is None:
            raise ConfigError(
                f"the model was quantized by {len(sessions)} calls of quantize_model; an autopsy takes one"
            )
        self.loop, self.model, self.optimizer = loop, loop.model, loop.optimizer
        self.recipe: Recipe = sessions[0].recipe
        self._takes_data = loop.takes_data if isinstance(loop, StepLoop) else takes_data(loop.advance)
        self.taken = taken
        self.losses: dict[int, float] = {}
        self.ring = CaptureRing(every, limit_bytes)
        self.ring.keep(taken, self.capture())

    def step(self) -> float:
        """Take the next step, keep its loss and, when due, its state."""
        loss = self.advance()
        self.losses[self.taken] = loss
        if self.ring.due(self.taken):
            self.ring.keep(self.taken, self.capture())
        return loss

    # -- the loop protocol --------------------------------------------------------------------------------------------

    def capture(self) -> dict[str, Any]:
        """The loop's complete state, and how far it is."""
        return {**self.loop.capture(), COUNT: self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a captured state."""
        self.loop.restore({key: value for key, value in state.items() if key != COUNT})
        self.taken = state[COUNT]

    def put(self, recipe: Recipe) -> None:
        """Another recipe from here on."""
        change_format(self.model, recipe)

    def advance(self, *, data: int = 0) -> float:
        """Take one step; its loss, NaN if it is not finite.

        Raises:
            NotApplicable: other batches, and the loop has none.
        """
        if data and not self._takes_data:
            raise NotApplicable("the step function has no argument `data` that names other batches")
        self.taken += 1
        given = {"data": data} if data else {}
        return finite_or_nan(self.loop.advance(**given))

    def gradient(self, ahead: int = 0) -> tuple[float, Tensor]:
        """Loss and gradients of the next step, or of the step `ahead` of it, which is not taken."""
        return self.loop.gradient(ahead)

    def aside(self) -> AbstractContextManager[None]:
        """Within the block the loop may go anywhere; afterwards it is back where it was."""
        return aside(self)

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
        if len(self.losses) < 10:
            raise ConfigError(f"the loop has taken {len(self.losses)} steps; an autopsy needs at least 10")
        start = self.ring.steps[0]
        if self._reach() - start < 10:
            raise ConfigError(
                f"the first state kept is that after step {start} of {self.taken}, and an autopsy starts from one before the "
                f"damage; raise limit_bytes (one state has {self.ring.bytes // len(self.ring.steps):,} bytes)"
            )
        self._certify(start)
        with self.aside():
            self.restore(self.ring[start])
            oracle = LoopOracle(self, self._reach() - start, tell=tell)
        self._as_recorded(start, oracle.history(LOW))
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
        if start:
            verdict = replace(verdict, sentence=f"{verdict.sentence} Steps count from the state after step {start} on.")
        if folder is not None:
            write_findings(folder, verdict, oracle, {"run_id": type(self.model).__name__}, None)
        return verdict

    def _certify(self, start: int) -> None:
        """Refuse a loop that does not take the same steps twice, from its first state or from a later one."""
        if (differs := first_unrepeated(self, self.ring[start], CERTIFIED)) is not None:
            raise ConfigError(
                f"the loop does not repeat itself: {differs} differs when the same steps are taken twice from step {start}; "
                "make what step_fn draws a function of the step, or pass what it changes as also="
            )
        later = [step for step in self.ring.steps if step + 2 <= self._reach()][-1]
        with self.aside():
            self.restore(self.ring[later])
            self._as_recorded(later, [self.advance() for _ in range(min(CERTIFIED, self._reach() - later))])

    def _as_recorded(self, start: int, replayed: Sequence[float]) -> None:
        """Refuse losses of the steps after `start` that are not the recorded ones to the bit."""
        recorded = [self.losses[step] for step in range(start + 1, start + 1 + len(replayed))]
        if (other := first_other(recorded, replayed)) is not None:
            raise ConfigError(
                f"replayed from the state after step {start}, step {start + 1 + other} has loss {replayed[other]!r}, recorded "
                f"{recorded[other]!r}: a step changes what no capture holds (gradients kept from step to step, the position of "
                "a data loader, an average of weights); take whole steps, and pass what else they change as also="
            )

    def _reach(self) -> int:
        return max(self.losses)
