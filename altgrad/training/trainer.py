"""One training step as a transaction, on a state that can be captured, forked and replayed bit for bit.

    1. forward and backward under the recipe
    2. all-finite check of loss and gradients; a non-finite step applies nothing and rolls the scale histories back
    3. interventions on the gradients (the clip on measured overflow), then the ordinary clip
    4. optimizer step, then storage rounding (the hook of `altgrad.nn.attach_optimizer`)
    5. diagnostics see (before, gradient, attempted update, after)
    6. the emergency shift may change the format from the next step on
    7. the verdict is taken and the step's record returned

Everything random is a function of (seed, step), so the state is parameters, optimizer, scale histories, interventions,
judge and step count, and nothing else. The trainer writes no files: that is the format runner's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.errors import AltGradError, ConfigError
from altgrad.loop.states import load_model_state, load_optimizer_state, model_state, optimizer_state
from altgrad.monitor.judge import Judge, StepFacts
from altgrad.optim import reset_moments
from altgrad.randomness import seed_of
from altgrad.records.schema import StepRecord, Verdict
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.identity import setup_of
from altgrad.training.data import Corpus, resolve_corpus
from altgrad.training.factory import check_model, made_model
from altgrad.training.model import GPT, GPTConfig
from altgrad.training.step.distributed import Ranks
from altgrad.training.step.formats_of_run import FormatsOfRun, StorageRates, all_finite
from altgrad.training.step.interventions import Interventions
from altgrad.training.step.measuring import Measuring
from altgrad.training.step.replay import Schedule, replay
from altgrad.training.step.stepping import (
    build_optimizer,
    clip_to,
    deterministic,
    evaluating,
    gradient_norm,
    gradients,
    lr_at,
    on_host,
    seeded,
    usable_device,
    wide_norm,
)

if TYPE_CHECKING:
    from altgrad.nn import Recipe

LossFunction = Callable[[nn.Module, Tensor, Tensor], Tensor]


def next_token_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy in nats per token, of models that return logits, (logits, ...), or something with `logits`."""
    output = model(x)
    if isinstance(output, Mapping):
        output = output["logits"]
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten())


def build_model(config: ExperimentConfig, vocab_size: int) -> nn.Module:
    """The model that a config describes; its initial weights are a function of the config's seed.

    Raises:
        ConfigError: as `made_model`.
    """
    if config.model.factory is not None:
        return made_model(config, vocab_size)
    section = config.model.model_dump(exclude={"factory", "options"})
    section["vocab_size"] = section["vocab_size"] or vocab_size
    return GPT(GPTConfig(**section), seed=config.seed)


def check_setups(named: Iterable[tuple[str, ExperimentConfig]]) -> None:
    """Set up every run that differs from the others in more than numbers, on the CPU and without a step.

    Args:
        named: what to call each config in an error, and the config.

    Raises:
        AltGradError: what a run itself would raise before its first step (a pattern that names no layer, a format that a
            layer refuses, an unknown option of an optimizer); the first such, of that error's class.
    """
    tried: set[str] = set()
    for name, config in named:
        if (setup := setup_of(config)) in tried:
            continue
        tried.add(setup)
        try:
            Trainer(config.model_copy(update={"compile": False}), device="cpu")
        except AltGradError as error:
            raise type(error)(f"{name}: {error}") from None


class Trainer:
    """A model, its optimizer and its formats, one step at a time.

    Args:
        config: the experiment.
        model: any module, changed in place; None builds the config's GPT.
        data_dir: a corpus, a path (a folder with train.bin and val.bin, or text), or None for `config.data`.
        device: where to train; None for `config.device`.
        loss: the loss of (model, x, y).

    Raises:
        ConfigError, DataError, RecipeError: what was asked for cannot be done.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: nn.Module | None = None,
        data_dir: Corpus | str | Path | None = None,
        device: str | torch.device | None = None,
        *,
        loss: LossFunction = next_token_loss,
    ) -> None:
        if not isinstance(config, ExperimentConfig):
            raise ConfigError(
                f"the config is a {type(config).__name__}, no ExperimentConfig; read a file by load_config(path)"
            )
        self.config = config
        self.ranks = Ranks.from_environment(config)
        self.device = usable_device(self.ranks.device(str(device or config.device)))
        self.corpus = resolve_corpus(data_dir, config.data, config.model.vocab_size)
        vocab_size = config.model.vocab_size or self.corpus.vocab_size
        if model is None:
            self.corpus.check(config.model.block_size, vocab_size)
        self.model: nn.Module = (build_model(config, vocab_size) if model is None else model).to(self.device).train()
        self.loss = loss
        if model is not None or config.model.factory is not None:
            x, y = self.batch(1)
            check_model(self.model, loss, x[:2], y[:2])
        self.formats = FormatsOfRun(self.model, config, self.batch(1)[0][:1])
        # Of this model it is known that no forward writes a weight; fsdp2 gathers weights anew for each.
        self._caches = model is None and config.model.factory is None and not self.ranks.shards
        self.ranks.prepare(self.model)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.formats.attach(self.optimizer)
        self.measuring = Measuring(config, self.model, self.optimizer, self.formats)
        self.interventions = Interventions(config, self.model, self.optimizer, self.formats)
        chance = math.log(vocab_size) if model is None and loss is next_token_loss else None
        self.judge = Judge(config.verdict, chance)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._forward = self.ranks.wrap(torch.compile(self.model) if config.compile else self.model)  # type: ignore[arg-type]
        self.formats.at(1)
        self.step = 0  # steps taken, skipped ones included

    def batch(self, step: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of step 1, 2, ...: a function of (seed, step); the seed is the config's unless given."""
        sizes = self.config.data.batch_size, self.config.model.block_size
        x, y = self.corpus.batch(self.config.seed if seed is None else seed, step, *sizes)
        return x.to(self.device), y.to(self.device)

    def train_step(self, x: Tensor, y: Tensor, *, schedule: Schedule | None = None) -> StepRecord:
        """Train on one batch, int64 of shape (batch, time), and return what happened. Ranks all get the whole batch.

        The batch is split into `data.grad_accumulation` micro-batches. Nothing of a non-finite step is applied.
        `schedule` gives the learning rate of a step in place of the config's.
        """
        step, settings = self.step + 1, self.config.optimizer
        if settings.reset_every and self.step and self.step % settings.reset_every == 0:
            reset_moments(self.optimizer, settings.reset_moments)
        before = self.formats.snapshot()
        self.measuring.begin_step(step)
        loss = self._forward_backward(step, x, y)
        if self.ranks.alone:
            self.measuring.reference(lambda: self._forward_backward(step, x, y))
        grads = gradients(self.parameters)
        norm = self.ranks.norm(gradient_norm(grads))
        loss_value, norm_value = on_host([loss, norm])
        huge = math.isfinite(loss_value) and not math.isfinite(norm_value) and not self.ranks.shards
        if huge and all_finite(grads):
            norm_value = wide_norm(grads)
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)

        overflow = self.measuring.overflow_rate()
        if overflow is not None:
            overflow = self.ranks.max(overflow)  # the clip must act on every rank or on none
        events: list[dict[str, Any]] = []
        lr = schedule(step) if schedule is not None else lr_at(step, self.config.max_steps, settings)
        rates = StorageRates()
        if finite:
            if clipped := self.interventions.clip(overflow):
                events.append(clipped)
                norm = self.ranks.norm(gradient_norm(grads))
            if settings.grad_clip and grads:
                clip_to(grads, norm if clipped or norm_value < 1e18 else norm_value, settings.grad_clip)
            self._update(lr)
            rates = self.formats.storage_rates()
            if rates.regridded:
                events.append({"event": "regrid", "values": rates.regridded})
        else:
            self.formats.roll_back(before)
            self.formats.at(step + 1)  # as the optimizer's hook does
            events.append({"event": "skip_nonfinite", "loss": loss_value, "grad_norm": norm_value})
        self.step = step
        self.measuring.end_step()

        warmup = step <= settings.warmup_steps
        can_shift = self.interventions.can_shift
        shifted = self.interventions.end_step(step, finite=finite, stall_rate=rates.stall_rate, warmup=warmup)
        if shifted:
            events.append(shifted)
            self.judge.forget()
        verdict: Verdict | None = None
        if not shifted:
            facts = StepFacts(step, loss_value, finite, norm_value, rates.stall_rate, warmup, rates.flip_rate)
            verdict = self.judge.see(facts, can_shift=can_shift)
        rate = None if overflow is None else float(overflow)
        return StepRecord(
            step, loss_value, lr, norm_value, finite, rates.stall_rate, rates.flip_rate, rate, events, verdict
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss in nats per token, under the recipe; nothing of training's state changes."""
        settings, total = self.config.evaluation, 0.0
        batches = self.corpus.validation_batches(
            settings.batches, self.config.data.batch_size, self.config.model.block_size
        )
        self.model.eval()
        try:
            alike = self.ranks.evaluating(self.model)
            with (
                alike,
                evaluating(self.optimizer),
                self.measuring.paused(),
                seeded(self.device, seed_of(self.config.seed, "evaluation")),
            ):
                for x, y in batches:
                    total += float(self.loss(self._forward, x.to(self.device), y.to(self.device)))
        finally:
            self.model.train()
        return total / settings.batches

    def capture(self) -> dict[str, Any]:
        """The complete state as nested dicts of tensors and plain values, sharing nothing with the trainer."""
        return {
            "step": self.step,
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.optimizer),
            "formats": self.formats.state(),
            "interventions": self.interventions.state(),
            "judge": self.judge.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `capture`'s result, taken from this trainer or one of the same config; it can be used again."""
        self.formats.load_state(state["formats"])  # first: a change of format requantizes weights
        load_model_state(self.model, state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.interventions.load_state(state["interventions"])
        self.judge.load_state_dict(state["judge"])
        self.step = state["step"]

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradients of the next step on a batch, without taking it; the loss."""
        return self._forward_backward(self.step + 1, x, y)

    def replay(
        self,
        state: dict[str, Any],
        steps: int,
        recipe: Recipe | None = None,
        rounding_seed: int | None = None,
        data_seed: int | None = None,
        schedule: Schedule | None = None,
    ) -> list[StepRecord]:
        """Fork a captured state, change what is given, take `steps` steps, and return their records.

        The trainer goes on as if nothing had been; with nothing changed the records are the run's own, bit for bit
        (`altgrad.training.step.replay` says what each argument changes).
        """
        changes = {"recipe": recipe, "rounding_seed": rounding_seed, "data_seed": data_seed, "schedule": schedule}
        return replay(self, state, steps, **changes)  # type: ignore[arg-type]

    def _forward_backward(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        """Accumulate gradients over the micro-batches; their mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.config.data.grad_accumulation
        total = torch.zeros((), device=self.device)
        with self.formats.same_weights() if parts > 1 and self._caches else nullcontext():
            for index, (part_x, part_y) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
                self.formats.at(step, index)
                part_x, part_y, last = self.ranks.rows(part_x), self.ranks.rows(part_y), index == parts - 1
                seed = seed_of(self.config.seed, step, index, *([] if self.ranks.alone else [self.ranks.rank]))
                with seeded(self.device, seed), deterministic(self.device), self.ranks.micro_batch(self._forward, last):
                    loss = self.loss(self._forward, part_x, part_y) / (parts * self.ranks.world_size)
                    loss.backward()
                total += loss.detach()
        return self.ranks.sum(total)

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with deterministic(self.device):
            self.optimizer.step()
