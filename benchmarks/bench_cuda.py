"""On an NVIDIA GPU: bits against the CPU, bandwidth of the Triton kernels, and training steps against the BF16 step.

    python -m benchmarks.bench_cuda [--size 28] [--rounds 20] [--steps 8 32] [--json FILE]

First what must hold: casts and layers have the CPU's bits, or float32's error where sums have another order; a layer's
forward and backward wait for nothing; a captured graph repeats them. Then bandwidths: every ratio is the median over rounds
that time the variant and `out.copy_(x)` alternately between CUDA events; the budget is 0.9 of the copy, the tensor (1 GiB
by default) is larger than any cache. Then steps of GPT 124M at the batches given, under bf16 autocast, against the compiled
unquantized step, in rounds; the budget is 1.2. The exit code is 1 where something does not hold. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from altgrad.nn import Recipe, attach_optimizer, quantize_model, uniform
from altgrad.quantization import amax_scale, decode, encode, get_format, quantize, quantize_with_stats
from altgrad.training.model import GPT, GPTConfig
from benchmarks._timing import keep_record

BUDGET = 0.9
MOST_ERROR = 1e-5  # of y, dx and dw, relative: float32's, whatever the order of sums


def rows(x: torch.Tensor) -> list[tuple[str, Callable[[], object], float, float | None]]:
    """(name, call, bytes moved over a float32 copy's, budget)."""
    out, half = torch.empty_like(x), x.bfloat16()
    half_out = torch.empty_like(half)
    scale = amax_scale(x, get_format("E4M3"))
    codes, key = encode(x, "E4M3", overflow="saturate"), torch.tensor([1, 2], device=x.device)

    def to(name: str, axis: int = -1, **options) -> Callable[[], object]:
        return lambda: quantize(x, name, axis=axis, out=out, **options)

    return [
        ("E4M3", to("E4M3"), 1.0, BUDGET),
        ("E4M3, a scale", lambda: quantize(x, "E4M3", scale, out=out), 1.0, BUDGET),
        ("E3M4, round up", to("E3M4", rounding="up"), 1.0, BUDGET),
        ("E4M3, stochastic", to("E4M3", rounding="stochastic", key=key), 1.0, BUDGET),
        ("E4M3, bf16 tensor", lambda: quantize(half, "E4M3", out=half_out), 0.5, BUDGET),
        ("E4M3, statistics", lambda: quantize_with_stats(x, "E4M3"), 1.0, None),
        ("E4M3, encode", lambda: encode(x, "E4M3", overflow="saturate"), 5 / 8, BUDGET),
        ("E4M3, decode", lambda: decode(codes, "E4M3", out=out), 5 / 8, BUDGET),
        ("MXFP8, last axis", to("MXFP8"), 1.0, BUDGET),
        ("MXFP8, other axis", to("MXFP8", 0), 1.0, BUDGET),
        ("MXFP4, last axis", to("MXFP4"), 1.0, BUDGET),
        ("MXFP4, stochastic", to("MXFP4", rounding="stochastic", key=key), 1.0, BUDGET),
        ("NVFP4, tensor scale given", lambda: quantize(x, "NVFP4", scale, out=out), 1.0, BUDGET),
        ("NVFP4 (two passes)", to("NVFP4"), 1.0, None),
        ("E4M3, tiles of 128 x 128", to("E4M3/128x128:FP32"), 1.0, BUDGET),
        ("MXFP8, encode", lambda: encode(x, "MXFP8", overflow="saturate"), 5 / 8, BUDGET),
    ]


Y_DX_DW = ("y", "dx", "dw")
RECIPES = [
    uniform("E4M3"),
    uniform("E4M3", rounding="stochastic"),
    uniform("E4M3", scaling={"policy": "amax", "power_of_two": True}),
    uniform("E7M0"),
    uniform("MXFP8"),
    uniform("BF16"),
]


def layer_results(recipe: Recipe, device: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """y, dx and dw of a linear layer, on the CPU. The gradient of y is given, so that all three differ by sums alone."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 128)
    model = nn.Sequential(layer)
    quantize_model(model, recipe)
    model.to(device)
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(x)
    y.backward(torch.randn(512, 128, generator=torch.Generator().manual_seed(2)).to(device, y.dtype))
    assert x.grad is not None
    assert layer.weight.grad is not None
    return [t.detach().float().cpu() for t in (y, x.grad, layer.weight.grad)]


def checks(device: str) -> list[tuple[str, bool, str]]:
    """(what must hold, whether it does, the figure)."""
    found = []
    x = torch.randn(257, 515, generator=torch.Generator().manual_seed(0))
    x[0, :5] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    for name in ("E4M3", "E5M2", "INT8", "E7M0", "MXFP8", "NVFP4"):
        for rounding in ("nearest_even", "stochastic"):
            options: dict[str, Any] = {"rounding": rounding, "key": (1, 2) if rounding == "stochastic" else None}
            block: dict[str, Any] = {"pad": True} if name[:2] in ("MX", "NV") else {"overflow": "saturate"}
            a, b = (quantize(x.to(d), name, **options, **block).cpu() for d in (device, "cpu"))
            unequal = int(((a != b) & ~(a.isnan() & b.isnan())).sum())
            found.append((f"{name} {rounding}: the CPU's bits", unequal == 0, f"{unequal} differ"))
    for recipe in RECIPES:
        pairs = zip(layer_results(recipe, device), layer_results(recipe, "cpu"), strict=True)
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        figure = ", ".join(f"{what} {error:.1e}" for what, error in zip(Y_DX_DW, errors, strict=True))
        found.append((f"linear, {recipe}: float32's error", max(errors) < MOST_ERROR, figure))
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer_on_device(uniform("E4M3"))()
            found.append(("a layer waits for nothing", True, ""))
        except RuntimeError as error:
            found.append(("a layer waits for nothing", False, str(error)[:80]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        unequal = replayed(uniform("E4M3"))
        found.append(("a captured graph repeats a forward", unequal == 0, f"{unequal} differ"))
    return found


def layer_on_device(recipe: Recipe) -> Callable[[], object]:
    """A warm layer's forward and backward, without copies of results."""
    layer = nn.Sequential(nn.Linear(256, 256))
    quantize_model(layer, recipe)
    layer.to("cuda")
    x = torch.randn(512, 256, device="cuda", requires_grad=True)

    def run() -> None:
        layer(x).sum().backward()

    run()
    torch.cuda.synchronize()
    return run


def replayed(recipe: Recipe) -> int:
    """Elements in which the replay of a captured forward differs from the forward itself."""
    layer = nn.Sequential(nn.Linear(256, 256))
    quantize_model(layer, recipe)
    layer.to("cuda")
    x, side, graph = torch.randn(512, 256, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(3):
                layer(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        return int((y != layer(x)).sum())


class Training:
    """A model's training step under bf16 autocast.

    compiled: by torch.compile, as a whole.
    """

    def __init__(self, config: GPTConfig, batch: int, device: str, recipe: Recipe | None, *, compiled: bool) -> None:
        model = GPT(config).to(device)
        if recipe is not None:
            quantize_model(model, recipe)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if recipe is not None:
            attach_optimizer(model, self.optimizer)
        self.model = torch.compile(model) if compiled else model
        self.x = torch.randint(config.vocab_size, (batch, config.block_size), device=device)

    def __call__(self) -> None:
        with torch.autocast(self.x.device.type, dtype=torch.bfloat16):
            _, loss = self.model(self.x, self.x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


GPT_124M = GPTConfig(vocab_size=50304, n_layer=12, n_head=12, n_embd=768, block_size=1024, style="gpt2")
STEP_BUDGET = 1.2


def steps(
    config: GPTConfig, batch: int, device: str, rounds: int, seconds: Callable[[Callable[[], object]], float]
) -> list[tuple[str, float, float]]:
    """(variant, median seconds of a step, median ratio to the compiled bf16 step)."""
    variants = {
        "bf16, compiled": Training(config, batch, device, None, compiled=True),
        "E4M3": Training(config, batch, device, uniform("E4M3"), compiled=False),
        "E4M3, compiled": Training(config, batch, device, uniform("E4M3"), compiled=True),
        "E4M3, delayed": Training(config, batch, device, uniform("E4M3", scaling="delayed"), compiled=False),
        "MXFP8": Training(config, batch, device, uniform("MXFP8"), compiled=False),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in variants.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in variants.items():
            times[name].append(seconds(step))
    base = times["bf16, compiled"]
    return [
        (name, statistics.median(own), statistics.median(a / b for a, b in zip(own, base, strict=True)))
        for name, own in times.items()
    ]


def device_seconds(call: Callable[[], object]) -> float:
    """Seconds between CUDA events around one call."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def bandwidths(side: int, rounds: int) -> list[dict]:
    """Measure and print every row for a tensor of side x side; the records."""
    x = torch.randn(side, side, device="cuda")
    target = torch.empty_like(x)
    table = Table(title=f"{side} x {side} float32 on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for column in ("what", "of copy bandwidth", "GB/s", "budget"):
        table.add_column(column, justify="left" if column == "what" else "right")
    records = []
    for name, call, bytes_ratio, budget in rows(x):
        for _ in range(3):
            call()
        ratios, seconds = [], []
        for _ in range(rounds):
            copied = device_seconds(lambda: target.copy_(x))
            seconds.append(device_seconds(call))
            ratios.append(copied / seconds[-1] * bytes_ratio)
        ratio, taken = statistics.median(ratios), statistics.median(seconds)
        verdict = "" if budget is None else f"{budget} {'holds' if ratio >= budget else 'MISSED'}"
        bandwidth = 8 * x.numel() * bytes_ratio / taken / 1e9
        table.add_row(name, f"{ratio:.2f}", f"{bandwidth:.0f}", verdict)
        records.append({"row": name, "ratio": ratio, "gb_per_s": bandwidth, "budget": budget})
    Console(width=110).print(table)
    return records


def main() -> int:
    """Check, measure and print; without a GPU, say so. 1 where a check does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=28, help="log2 of the element count, even")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None, help="also keep the records in this file")
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[8, 32], help="batches of the 124M steps; none skips them"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing measured")
        return 0
    records: list[dict] = []
    broken = 0
    for name, holds, figure in checks("cuda"):
        print(f"{'holds' if holds else 'BROKEN':6}  {name}  {figure}", flush=True)
        records.append({"check": name, "holds": holds, "figure": figure})
        broken += not holds
    records += bandwidths(2 ** (options.size // 2), options.rounds)
    for batch in options.steps:
        table = Table(title=f"GPT 124M, batch {batch} x {GPT_124M.block_size}, bf16 autocast")
        for column in ("step", "ms", "of compiled BF16", "budget"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for name, taken, ratio in steps(GPT_124M, batch, "cuda", options.rounds, device_seconds):
            verdict = (
                f"{STEP_BUDGET} {'holds' if ratio <= STEP_BUDGET else 'MISSED'}" if name.startswith("E4M3") else ""
            )
            table.add_row(name, f"{1e3 * taken:.1f}", f"{ratio:.2f}", verdict)
            records.append({"step": name, "batch": batch, "seconds": taken, "ratio": ratio})
        Console(width=110).print(table)
    if options.json:
        keep_record(options.json, "cuda", records)
    if broken:
        print(f"{broken} checks do not hold")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
