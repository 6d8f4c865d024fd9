"""The runs of the calibration: a small language model behind a flight recorder, whose fault begins at a step.

The model is a feed-forward one (Bengio et al. 2003): the last characters, embedded and concatenated, through four hidden
layers to a head. It has no residual connections, so that every layer matters within a hundred steps: in a GPT of the same
cost only the head's faults do any damage, since what it learns first runs past its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.autopsy import Recorder
from altgrad.autopsy.loop import jittered
from altgrad.nn import Recipe, attach_optimizer, change_format, quantize_model, set_seed, uniform
from altgrad.nn.recipe.cells import STORAGE, Cell
from altgrad.nn.recipe.spec import OperandSpec
from altgrad.optim import SRAdamW
from altgrad.training.config.loading import load_config
from altgrad.training.data import resolve_corpus
from benchmarks.autopsy_calibration.faults import BASE, KINDS, MOMENTS, OPERANDS, Case, Fault

STEPS, EVERY, BATCH, CONTEXT, EMBEDDING, WIDTH, DEPTH, LR = 96, 4, 128, 8, 8, 64, 4, 3e-3
"""128 contexts of 8 bytes of Python's library a step, 30 cells."""
DECOY = OperandSpec("E4M1")


@lru_cache(maxsize=1)
def _corpus() -> Any:
    config = load_config({"data": {"source": "stdlib", "batch_size": BATCH}})
    return resolve_corpus(None, config.data, None)


class CharacterModel(nn.Module):
    """Logits of the next byte from the last `CONTEXT` ones: [batch, CONTEXT] -> [batch, 256]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(256, EMBEDDING)
            widths = [CONTEXT * EMBEDDING] + [WIDTH] * DEPTH
            self.hidden = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))
            self.norms = nn.ModuleList(nn.RMSNorm(width) for width in widths)
            self.head = nn.Linear(WIDTH, 256, bias=False)
            nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).flatten(1)
        for norm, layer in zip(self.norms, self.hidden, strict=False):
            x = F.gelu(layer(norm(x)))
        return self.head(self.norms[-1](x))


class FaultyRun(Recorder):
    """A recorded loop some of whose cells have another spec until the fault begins.

    Args:
        recipe: the run's, with the fault.
        healthy: cell -> its spec (None: float32) during the first `onset` steps.
    """

    def __init__(self, *arguments: Any, recipe: Recipe, healthy: Mapping[Cell, Any], onset: int) -> None:
        self.asked, self.healthy, self.onset = recipe, dict(healthy), onset
        super().__init__(*arguments, every=EVERY)
        self.recipe = recipe
        self._turn()
        self.ring.keep(0, self.capture())

    def capture(self) -> dict[str, Any]:
        return {**super().capture(), "asked": self.asked}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.asked = state["asked"]

    def put(self, recipe: Recipe) -> None:
        self.asked = recipe
        self._turn()

    def advance(self, *, data: int = 0) -> float:
        if self.taken == self.onset:
            self._turn()
        return super().advance(data=data)

    def _turn(self) -> None:
        """Put the recipe asked for on the model, as it is at this step."""
        recipe = self.asked
        if self.taken < self.onset:
            there = recipe.cells(self.model)
            for cell in (cell for cell in self.healthy if cell in there):
                recipe = _with(recipe, cell, self.healthy[cell], self.model)
        change_format(self.model, recipe)


def build(case: Case, fault: Fault | None, cells: Sequence[str] | None = None) -> FaultyRun:
    """The loop of a case at its initial state.

    Args:
        fault: what is broken; None: nothing, only the decoys are there.
        cells: those of the fault's cells that are broken; None: all.
    """
    torch.set_num_threads(1)
    model = CharacterModel(case.seed)
    if case.null == "large initial weights":
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.dim() > 1):
                parameter.mul_(case.strength)
    recipe = uniform(BASE)
    quantize_model(model, recipe)
    for text in case.decoys:
        recipe = _with(recipe, Cell.parse(text), DECOY, model)
    change_format(model, recipe)
    specs = specs_of(case, fault) if fault is not None else {}
    specs = {text: spec for text, spec in specs.items() if cells is None or text in cells}
    before, healthy, moments = recipe.cells(model), {}, None
    for text, spec in specs.items():
        if text.startswith("optimizer."):
            moments = (None, spec)
        else:
            cell = Cell.parse(text)
            healthy[cell] = before.get(cell)
            recipe = _with(recipe, cell, spec, model)
    optimizer = _optimizer(model, case, moments)
    attach_optimizer(model, optimizer)
    corpus = _corpus()

    def step_fn(step: int, data: int = 0) -> Tensor:
        x, y = corpus.batch(case.seed + 100_003 * data, step, BATCH, CONTEXT)
        loss = F.cross_entropy(model(x), targets(case, y[:, -1], step, data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    onset = fault.onset if fault is not None else 0
    return FaultyRun(model, optimizer, step_fn, recipe=recipe, healthy=healthy, onset=onset)


def targets(case: Case, y: Tensor, step: int, data: int) -> Tensor:
    """The targets of a step: those of some nulls are wrong, on the run's own batches, from the middle on."""
    if case.null not in ("scrambled batches", "label noise") or data or step <= STEPS // 2:
        return y
    random = torch.Generator().manual_seed(case.seed + step)
    if case.null == "scrambled batches":
        return y[torch.randperm(y.numel(), generator=random)]
    noise = torch.randint(0, 256, y.shape, generator=random)
    return torch.where(torch.rand(y.shape, generator=random) < case.strength, noise, y)


def _optimizer(model: nn.Module, case: Case, moments: Any) -> torch.optim.Optimizer:
    rate = LR * case.strength if case.null == "high learning rate" else LR
    if case.fault is not None and case.fault.kind == "second moment":
        return SRAdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.1, moment_format=moments)
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def _with(recipe: Recipe, cell: Cell, spec: Any, model: nn.Module) -> Recipe:
    return recipe.with_cell(cell.layer, cell.gemm, cell.role, spec, model)


def specs_of(case: Case, fault: Fault) -> dict[str, Any]:
    """The spec of each broken cell; scales are told against the amaxes of the run without the fault around its onset."""
    kind = KINDS[fault.kind]
    found = {}
    for text in fault.cells:
        amaxes: dict[str, float] = dict.fromkeys(("own", "early", "other"), 0.0)
        if kind.places is not MOMENTS and (cell := Cell.parse(text)).gemm != STORAGE:
            other = next(role for gemm, role in OPERANDS if gemm == cell.gemm and role != cell.role)
            now, early = amaxes_of(case.seed, max(fault.onset, 12)), amaxes_of(case.seed, 1)
            layer, role = cell.layer, cell.role
            amaxes = {"own": now[layer, role], "other": now[layer, other], "early": early[layer, role]}
        found[text] = kind.spec(amaxes["own"], kind.rungs[fault.rung], amaxes)
    return found


@lru_cache(maxsize=256)
def amaxes_of(seed: int, step: int) -> dict[tuple[str, str], float]:
    """Largest absolute value of each linear layer's input, weight and output gradient at a step of the float32 run."""
    loop = build(Case("", seed), None)
    loop.put(uniform(BASE).only([], loop.model))
    for _ in range(step):
        loop.advance()
    return {key: float(value.abs().max()) for key, value in operands_of(loop).items()}


def operands_of(loop: Recorder) -> dict[tuple[str, str], Tensor]:
    """The tensors of the next step by (layer, role), that step taken in whatever recipe is on the model."""
    seen: dict[tuple[str, str], Tensor] = {}
    hooks = []
    for name, layer in loop.model.named_modules():
        if isinstance(layer, nn.Linear):

            def forward(_: Any, inputs: Any, output: Tensor, name: str = name, layer: nn.Module = layer) -> None:
                seen[name, "input"] = inputs[0].detach().clone()
                seen[name, "weight"] = layer.weight.detach().clone()
                output.register_hook(lambda g: seen.__setitem__((name, "grad_output"), g.clone()))

            hooks.append(layer.register_forward_hook(forward))
    try:
        with loop.aside():
            loop.advance()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def losses_of(loop: FaultyRun, draw: int) -> list[float]:
    """The losses of one training of a loop from its initial state; draw > 0 moves one weight in eight by an ULP."""
    state = loop.ring[0]
    with loop.aside():
        loop.restore(jittered(state, draw) if draw else state)
        if draw:
            set_seed(loop.model, draw)
        return [loop.advance() for _ in range(STEPS)]
