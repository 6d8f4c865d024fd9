"""The cases of `experiments.autopsies` that no config describes: training loops of their own, behind a `Recorder`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.autopsy import Recorder, Settings, Told
from altgrad.formats.catalog import block_format
from altgrad.nn import Recipe, attach_optimizer, quantize_model, uniform
from altgrad.nn.recipe.layer_recipe import layer_recipe
from altgrad.nn.recipe.recipe import Override
from altgrad.nn.recipe.spec import OperandSpec
from altgrad.records.files import write_text
from altgrad.training.config.loading import load_config
from altgrad.training.data import resolve_corpus
from altgrad.training.model import GPT, GPTConfig

Tell = Callable[[Told], None]
Step = Callable[..., Tensor]
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

WIDTH, DEPTH, BATCH, STEPS, LR, NOISE, SEEDS = 128, 4, 128, 800, 6e-3, 5e-3, (0, 1, 2)
"""Smaller and faster than the paper's: the width and the steps that two cores carry, and a rate at which MX shows."""


class HalfNorm(nn.LayerNorm):
    """A LayerNorm whose mean, deviation and normalised input are rounded to bfloat16, as vector units do."""

    def forward(self, input: Tensor) -> Tensor:
        half = input.bfloat16()
        centred = half - half.mean(-1, keepdim=True)
        normal = centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normal.float() * self.weight + self.bias


class Residual(nn.Module):
    """x + out(gelu(up(norm(x)))) for each layer; the teacher has no norms."""

    def __init__(self, generator: torch.Generator, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(DEPTH))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(DEPTH))
        self.outs = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        for layer in (*self.ups, *self.outs):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, out in zip(self.norms, self.ups, self.outs, strict=True):
            x = x + out(F.gelu(up(norm(x))))
        return x


def mx_recipe(norm_weight: str = "MXFP8", after_norm: str = "MXFP8") -> Recipe:
    """Every product's operands in MXFP8 (E4M3, floor scale): norm weights, and inputs that come from a norm, as given."""
    base = layer_recipe("MXFP8")
    norm = replace(base, norm_weight=OperandSpec(norm_weight))
    if after_norm == "MXFP8":
        return Recipe(base, (Override(norm, type="LayerNorm"),))
    spec = OperandSpec(after_norm)
    ups = replace(
        base,
        forward=replace(base.forward, input=spec),
        weight_grad=replace(base.weight_grad, input=spec),
    )
    return Recipe(base, (Override(norm, type="LayerNorm"), Override(ups, name="ups.*")))


UNCLAMPED = block_format("E4M3", 32, "E8M0", "ceil").name
SWITCHES: dict[str, tuple[Recipe | None, type[nn.Module]]] = {
    "float32": (None, nn.LayerNorm),
    "all in MX": (mx_recipe(), nn.LayerNorm),
    "norm weights in BF16": (mx_recipe(norm_weight="BF16"), nn.LayerNorm),
    "norm weights under a ceil scale": (mx_recipe(norm_weight=UNCLAMPED), nn.LayerNorm),
    "inputs after a norm under a ceil scale": (mx_recipe(after_norm=UNCLAMPED), nn.LayerNorm),
    "norm internals in BF16, norm weights in BF16": (mx_recipe(norm_weight="BF16"), HalfNorm),
}
"""What is switched, one thing at a time. A floor scale clamps what exceeds 1.75 times its block's power of two; a ceil
scale clamps nothing."""


def student(recipe: Recipe | None, norm: type[nn.Module], seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """(student, optimizer, step function) of one run."""
    model = Residual(torch.Generator().manual_seed(2 * seed + 1), norm)
    teacher = Residual(torch.Generator().manual_seed(2 * seed + 2), nn.Identity).requires_grad_(False)
    if recipe is not None:
        quantize_model(model, recipe)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    if recipe is not None:
        attach_optimizer(model, optimizer)

    def step_fn(step: int, data: int = 0) -> Tensor:
        drawn = torch.Generator().manual_seed(seed + 1_000_003 * (step + 100_000 * data))
        x = torch.randn(BATCH, WIDTH, generator=drawn)
        y = teacher(x) + NOISE * torch.randn(BATCH, WIDTH, generator=drawn)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, optimizer, step_fn


def switched(folder: Path) -> dict[str, list[float]]:
    """Mean squared error of the last 100 steps of each switch and seed; a finished run is read back."""
    found: dict[str, list[float]] = {}
    for name, (recipe, norm) in SWITCHES.items():
        for seed in SEEDS:
            done = folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}.txt"
            if not done.exists():
                step_fn = student(recipe, norm, seed)[2]
                losses = [float(step_fn(step)) for step in range(1, STEPS + 1)]
                write_text(done, repr(sum(losses[-100:]) / 100))
            found.setdefault(name, []).append(float(done.read_text()))
            print(f"  {name}, seed {seed}: {found[name][-1]:.5f}", flush=True)
    return found


def norm_weights(folder: Path, budget: int, tell: Tell) -> tuple[dict[str, Any], dict[str, Any]]:
    """The switches apart, and the autopsy of the run with everything in MX."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    switches = switched(folder)
    model, optimizer, step_fn = student(*SWITCHES["all in MX"], SEEDS[0])
    recorder = Recorder(model, optimizer, step_fn, every=50, limit_bytes=2**28)
    for _ in range(STEPS):
        recorder.step()
    return recorder.autopsy(budget=budget, settings=Settings(longest=200), out=folder, told=tell).as_dict(), {
        "switches": switches
    }


LOOPS: dict[str, Loop] = {"scrambled": scrambled, "norm_weights": norm_weights}
