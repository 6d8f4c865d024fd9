"""The cases of `experiments.autopsies` that no config describes: training loops of their own, behind a `Recorder`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.autopsy import Recorder, Told
from altgrad.nn import Recipe, attach_optimizer, quantize_model, uniform
from altgrad.nn.recipe.layer_recipe import layer_recipe
from altgrad.nn.recipe.recipe import Override
from altgrad.nn.recipe.spec import LayerRecipe, OperandSpec
from altgrad.training.data import resolve_corpus
from altgrad.training.config.loading import load_config
from altgrad.training.model import GPT, GPTConfig

Tell = Callable[[Told], None]
Loop = Callable[[Path, int, Tell], tuple[dict[str, Any], dict[str, Any]]]
"""(where its files go, budget, progress) -> (verdict, more for the record)."""


def scrambled(folder: Path, budget: int, tell: Tell) -> tuple[dict[str, Any], dict[str, Any]]:
    """A small GPT in E4M3 whose targets are shuffled within each batch from step 101 on."""
    torch.set_num_threads(1)
    config = load_config({"data": {"source": "stdlib", "batch_size": 8}})
    corpus = resolve_corpus(None, config.data, None)
    model = GPT(GPTConfig(256, n_layer=2, n_head=4, n_embd=64, block_size=32), seed=42)
    quantize_model(model, uniform("E4M3"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    attach_optimizer(model, optimizer)

    def step_fn(step: int, data: int = 0) -> Tensor:
        x, y = corpus.batch(42 + 1000 * data, step, 8, 32)
        if data == 0 and step > 100:
            order = torch.randperm(y.numel(), generator=torch.Generator().manual_seed(step))
            y = y.flatten()[order].view_as(y)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    recorder = Recorder(model, optimizer, step_fn)
    for _ in range(200):
        recorder.step()
    return recorder.autopsy(budget=budget, out=folder, told=tell).as_dict(), {}


# -- the student-teacher proxy of arXiv 2506.20752 ------------------------------------------------------------------------

WIDTH, DEPTH, BATCH, STEPS, LR, NOISE = 128, 4, 512, 3000, 6e-4, 5e-3


class Residual(nn.Module):
    """x + out(gelu(up(norm(x)))) for each layer; the teacher has no norms."""

    def __init__(self, generator: torch.Generator, *, normed: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) if normed else nn.Identity() for _ in range(DEPTH))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(DEPTH))
        self.outs = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        for layer in (*self.ups, *self.outs):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, out in zip(self.norms, self.ups, self.outs, strict=True):
            x = x + out(F.gelu(up(norm(x))))
        return x


def mx_recipe(*, norm_weight: str | None = "MXFP8", after_norm: bool = True) -> Recipe:
    """Every product's operands in MXFP8, and norm weights; inputs of the layers after a norm can be left in float32."""
    layers = layer_recipe("MXFP8")
    overrides = []
    if norm_weight is not None:
        norm = LayerRecipe(layers.forward, layers.input_grad, layers.weight_grad, norm_weight=OperandSpec(norm_weight))
        overrides.append(Override(norm, type="LayerNorm"))
    if not after_norm:
        plain = OperandSpec()
        freed = LayerRecipe(
            type(layers.forward)(input=plain, weight=layers.forward.weight),
            layers.input_grad,
            type(layers.weight_grad)(grad_output=layers.weight_grad.grad_output, input=plain),
        )
        overrides.append(Override(freed, name="ups.*"))
    return Recipe(layers, tuple(overrides))


def proxy(recipe: Recipe | None, seed: int = 0, lr: float = LR) -> Recorder | Callable[[int], Tensor]:
    """The student's loop behind a recorder, or, unquantized, its step function."""
    torch.set_num_threads(1)
    student = Residual(torch.Generator().manual_seed(2 * seed + 1), normed=True)
    teacher = Residual(torch.Generator().manual_seed(2 * seed + 2), normed=False).requires_grad_(False)
    if recipe is not None:
        quantize_model(student, recipe)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    if recipe is not None:
        attach_optimizer(student, optimizer)

    def step_fn(step: int, data: int = 0) -> Tensor:
        drawn = torch.Generator().manual_seed(seed + 1_000_003 * (step + 100_000 * data))
        x = torch.randn(BATCH, WIDTH, generator=drawn)
        y = teacher(x) + NOISE * torch.randn(BATCH, WIDTH, generator=drawn)
        loss = F.mse_loss(student(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step_fn if recipe is None else Recorder(student, optimizer, step_fn, every=100, limit_bytes=2**28)


LOOPS: dict[str, Loop] = {"scrambled": scrambled}
