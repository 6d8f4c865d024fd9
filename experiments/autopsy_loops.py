"""The cases of `experiments.autopsies` that no config describes: training loops of their own, behind a `Recorder`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.autopsy import Recorder, Settings, Told
from altgrad.formats.catalog import block_format
from altgrad.nn import Recipe, attach_optimizer, change_format, quantize_model, uniform
from altgrad.nn.recipe.layer_recipe import layer_recipe
from altgrad.nn.recipe.recipe import Override
from altgrad.nn.recipe.spec import OperandSpec
from altgrad.records.files import write_json
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


@dataclass(frozen=True)
class Proxy:
    """One size of the proxy: residual MLP layers, samples a step, steps, and the learning rate of Adam."""

    width: int = 128
    depth: int = 4
    batch: int = 512
    steps: int = 5000
    lr: float = 6e-4

    def __str__(self) -> str:
        return f"{self.depth} x {self.width}, {self.batch} samples, {self.steps} steps at {self.lr:g}"


NOISE, SEEDS, EVERY = 5e-3, (0, 1), 250
"""Deviation of the targets' noise; seeds of the switches; steps between two looks at the norm weights."""
SURVEY = (
    Proxy(width=64, batch=128),
    Proxy(width=64, batch=128, lr=2e-3),
    Proxy(width=64, batch=128, lr=6e-3),
    Proxy(batch=128, lr=2e-3),
    Proxy(width=64, batch=128, lr=2e-3, steps=20_000),
    Proxy(batch=128, steps=800, lr=6e-3),
)
"""Looked at for damage by MX, seed 0, what two cores carry: the paper's rate and rates up to where float32 itself becomes
unsteady, twice the width, four times the steps, and a short one."""
WORSE = 1.25
"""Fixed before the survey ran. MX is damaged at a row if its loss over the last 100 steps is not finite, or lies above
float32's by this factor; the first damaged row is then run with every switch and seed, and a switch undoes the damage if it
closes half of the gap in every seed."""
OTHERWISE = SURVEY[1]
"""Where the switches are told apart if no row is damaged; chosen when that was seen."""


class HalfNorm(nn.LayerNorm):
    """A LayerNorm whose mean, deviation and normalised input are rounded to bfloat16, as vector units do."""

    def forward(self, input: Tensor) -> Tensor:
        half = input.bfloat16()
        centred = half - half.mean(-1, keepdim=True)
        normal = centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normal.float() * self.weight + self.bias


class Residual(nn.Module):
    """x + out(gelu(up(norm(x)))) for each layer; the teacher has no norms."""

    def __init__(self, proxy: Proxy, generator: torch.Generator, norm: type[nn.Module]) -> None:
        super().__init__()
        width = proxy.width
        self.norms = nn.ModuleList(norm(width) for _ in range(proxy.depth))
        self.ups = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(proxy.depth))
        self.outs = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(proxy.depth))
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
FLOAT32, ALL_MX = "float32", "all in MX"
SWITCHES: dict[str, tuple[Recipe | None, type[nn.Module]]] = {
    FLOAT32: (None, nn.LayerNorm),
    ALL_MX: (mx_recipe(), nn.LayerNorm),
    "norm weights in BF16": (mx_recipe(norm_weight="BF16"), nn.LayerNorm),
    "norm weights under a ceil scale": (mx_recipe(norm_weight=UNCLAMPED), nn.LayerNorm),
    "inputs after a norm under a ceil scale": (mx_recipe(after_norm=UNCLAMPED), nn.LayerNorm),
    "norm internals in BF16, norm weights in BF16": (mx_recipe(norm_weight="BF16"), HalfNorm),
}
"""What is switched, one thing at a time. A floor scale clamps what exceeds 1.75 times its block's power of two; a ceil
scale clamps nothing."""


class Student:
    """One run: the model, its optimizer, and a step on the batch of that step, which all switches of a seed share."""

    def __init__(self, proxy: Proxy, switch: str, seed: int) -> None:
        recipe, norm = SWITCHES[switch]
        self.proxy, self.seed, self.recipe = proxy, seed, recipe
        self.model = Residual(proxy, torch.Generator().manual_seed(2 * seed + 1), norm)
        teacher = Residual(proxy, torch.Generator().manual_seed(2 * seed + 2), nn.Identity)
        self.teacher = teacher.requires_grad_(False)
        if recipe is not None:
            quantize_model(self.model, recipe)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=proxy.lr)
        if recipe is not None:
            attach_optimizer(self.model, self.optimizer)

    def gradients(self, step: int, data: int = 0) -> Tensor:
        """The loss of a step's batch, with its gradients in place."""
        drawn = torch.Generator().manual_seed(self.seed + 1_000_003 * (step + 100_000 * data))
        x = torch.randn(self.proxy.batch, self.proxy.width, generator=drawn)
        y = self.teacher(x) + NOISE * torch.randn(self.proxy.batch, self.proxy.width, generator=drawn)
        loss = F.mse_loss(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def step(self, step: int, data: int = 0) -> Tensor:
        """Train on a step's batch; its loss."""
        loss = self.gradients(step, data)
        self.optimizer.step()
        return loss

    def clamped(self) -> float:
        """Share of the norms' blocks of 32 weights with one that a floor scale clamps: beyond 1.75 times its power of two."""
        blocks = torch.cat([norm.weight.detach().abs().view(-1, 32) for norm in self.model.norms])  # type: ignore[union-attr]
        most = blocks.amax(1)
        return float((most > 1.75 * torch.exp2(torch.floor(torch.log2(most)))).float().mean())

    def bent(self, step: int) -> dict[str, float]:
        """|g - g32| / |g32| of a batch's gradients with everything in MX, and with the norm weights alone in MX."""
        assert self.recipe is not None
        weights = [cell for cell in self.recipe.cells(self.model) if cell.role == "weight" and cell.gemm == "norm"]
        found = {}
        for name, recipe in (
            ("exact", self.recipe.only([], self.model)),
            ("everything", self.recipe),
            ("norm weights", self.recipe.only(weights, self.model)),
        ):
            change_format(self.model, recipe)
            self.gradients(step)
            found[name] = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        change_format(self.model, self.recipe)
        exact = found.pop("exact")
        return {name: float((gradient - exact).norm() / exact.norm()) for name, gradient in found.items()}


def trained(folder: Path, proxy: Proxy, switch: str, seed: int) -> dict[str, Any]:
    """What a run did; a finished one is read back. Means of 50 losses, and at every 250th step the look at the norms."""
    name = f"{proxy}, {switch}, seed {seed}"
    done = folder / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".json")
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    student = Student(proxy, switch, seed)
    losses, looks = [], []
    for step in range(1, proxy.steps + 1):
        losses.append(float(student.step(step)))
        if not math.isfinite(losses[-1]):
            break
        if step % EVERY == 0:
            bent = student.bent(step + 1) if switch == ALL_MX else {}
            looks.append({"step": step, "clamped": student.clamped(), **bent})
    whole = len(losses) == proxy.steps
    record = {
        "proxy": str(proxy),
        "switch": switch,
        "seed": seed,
        "end": sum(losses[-100:]) / 100 if whole else None,
        "best": min(sum(losses[i : i + 100]) / 100 for i in range(0, max(1, len(losses) - 99), 50)),
        "steps": len(losses),
        "losses": [sum(losses[i : i + 50]) / 50 for i in range(0, len(losses) - 49, 50)],
        "looks": looks,
    }
    write_json(done, record)
    print(f"  {name}: {record['end']}", flush=True)
    return record


def damaged(run: dict[str, Any], twin: dict[str, Any]) -> bool:
    """Whether MX did damage there, by the rule of `WORSE`."""
    if twin["end"] is None:
        return False
    return run["end"] is None or run["end"] > WORSE * twin["end"]


def norm_weights(folder: Path, budget: int, tell: Tell) -> tuple[dict[str, Any], dict[str, Any]]:
    """The survey, the switches apart where it first shows damage, and the autopsy of the run with everything in MX there."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    survey = [[trained(folder, proxy, switch, 0) for switch in (FLOAT32, ALL_MX)] for proxy in SURVEY]
    chosen = next((p for p, (twin, run) in zip(SURVEY, survey, strict=True) if damaged(run, twin)), OTHERWISE)
    switches = [trained(folder, chosen, switch, seed) for switch in SWITCHES for seed in SEEDS]
    student = Student(chosen, ALL_MX, SEEDS[0])
    recorder = Recorder(student.model, student.optimizer, student.step, every=50, limit_bytes=2**28)
    for _ in range(chosen.steps):
        recorder.step()
    verdict = recorder.autopsy(budget=budget, settings=Settings(longest=200), out=folder, told=tell).as_dict()
    more = {"survey": [one for pair in survey for one in pair], "chosen": str(chosen), "switches": switches}
    return verdict, more


LOOPS: dict[str, Loop] = {"scrambled": scrambled, "norm_weights": norm_weights}
