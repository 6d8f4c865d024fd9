"""On an NVIDIA GPU: bits against the CPU, bandwidth of the Triton kernels, and training steps against the BF16 step.

    python -m benchmarks.bench_cuda [--seconds 540] [--record benchmarks/results/cuda.json]
    python -m benchmarks.bench_cuda --dry        the same on this CPU, as small as can be: whether it runs, no figure

One command for a whole session on a GPU. First what must hold: casts and layers have the CPU's bits, or float32's error where
sums have another order; a layer's forward and backward wait for nothing; a captured graph repeats them. Then bandwidths: every
ratio is the median over rounds that time the variant and `out.copy_(x)` alternately between CUDA events; the budget is
0.9 of the copy, the tensor (1 GiB by default) is larger than any cache. Then steps of GPT 124M at the batches given, under bf16
autocast, against the compiled unquantized step, in rounds (budget 1.2), with their peak memory; where a step waits for the
device, and where its time goes. What fails is said and recorded, and the rest goes on; where the seconds end, what is left
is recorded as not measured. The record is written after each part. The exit code is 1 where something does not hold or failed.
Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
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

    compiler: the backend of torch.compile for the whole model; None: eager.
    """

    def __init__(self, config: GPTConfig, batch: int, device: str, recipe: Recipe | None, compiler: str | None) -> None:
        model = GPT(config).to(device)
        if recipe is not None:
            quantize_model(model, recipe)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if recipe is not None:
            attach_optimizer(model, self.optimizer)
        self.model = model if compiler is None else torch.compile(model, backend=compiler)
        self.x = torch.randint(config.vocab_size, (batch, config.block_size), device=device)

    def __call__(self) -> None:
        with torch.autocast(self.x.device.type, dtype=torch.bfloat16):
            _, loss = self.model(self.x, self.x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


GPT_124M = GPTConfig(vocab_size=50304, n_layer=12, n_head=12, n_embd=768, block_size=1024, style="gpt2")
STEP_BUDGET = 1.2
BASELINE = "bf16, compiled"
VARIANTS: dict[str, tuple[Recipe | None, bool]] = {  # recipe, and whether it is compiled; the budget is for E4M3's
    BASELINE: (None, True),
    "E4M3, compiled": (uniform("E4M3"), True),
    "E4M3": (uniform("E4M3"), False),
    "E4M3, delayed, compiled": (uniform("E4M3", scaling="delayed"), True),
    "MXFP8": (uniform("MXFP8"), False),
    "E4M3, delayed": (uniform("E4M3", scaling="delayed"), False),
    "E4M3, sums of the FP8 unit": (
        uniform("E4M3").with_(accumulator="fp8_unit", high=("embedding", "positions")),
        False,
    ),
}
LOOKED_INTO = ("E4M3, compiled", "E4M3")


class Session:
    """A session on a device: what it is, how much time is left, and the records so far.

    dry: on the CPU and tiny.
    """

    def __init__(self, seconds: float, record: Path | None, *, dry: bool) -> None:
        self.device = "cpu" if dry else "cuda"
        self.compiler = "aot_eager" if dry else "inductor"
        self.ends, self.path = time.monotonic() + seconds, record
        self.records: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.console = Console(width=110)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the session: what it raises is recorded, and what it recorded is written."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:  # a session on a GPU is dear: the next part may still tell something
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
            self.records.append({"failed": name, "error": f"{type(error).__name__}: {str(error)[:500]}"})
            print(f"FAILED  {self.failures[-1][:300]}", flush=True)
        print(f"        {name} took {time.monotonic() - began:.0f} s, {self.left:.0f} s are left", flush=True)
        if self.path is not None:
            keep_record(self.path, "cuda", self.records)

    def seconds_of(self, call: Callable[[], object]) -> float:
        """Seconds of one call, on a GPU between events."""
        if self.device == "cpu":
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def memory_of(self, call: Callable[[], object]) -> int:
        """Bytes that a call adds at its peak; 0 on a CPU."""
        if self.device == "cpu":
            call()
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def waits_of(self, call: Callable[[], object]) -> list[str]:
        """Where a call makes the host wait for the device, as torch warns of it."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                if self.device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        return [f"{one.filename}:{one.lineno}" for one in said if "synchroniz" in str(one.message)]

    def profile_of(self, call: Callable[[], object], rows: int = 25) -> list[dict[str, Any]]:
        """Where a call's time goes: the kernels that take most of it."""
        activity, field = (
            torch.profiler.ProfilerActivity,
            f"self_{'device' if self.device == 'cuda' else 'cpu'}_time_total",
        )
        kinds = [activity.CPU, activity.CUDA] if self.device == "cuda" else [activity.CPU]
        with torch.profiler.profile(activities=kinds) as profile:
            call()
            if self.device == "cuda":
                torch.cuda.synchronize()
        found = sorted(profile.key_averages(), key=lambda event: -getattr(event, field))[:rows]
        return [{"kernel": e.key, "calls": e.count, "microseconds": round(getattr(e, field), 1)} for e in found]


def check(session: Session) -> None:
    """Whether bits, errors, waits and graphs are what they must be."""
    for name, holds, figure in checks(session.device):
        print(f"{'holds' if holds else 'BROKEN':6}  {name}  {figure}", flush=True)
        session.records.append({"check": name, "holds": holds, "figure": figure})
        session.failures += [] if holds else [name]


def bandwidths(session: Session, side: int, rounds: int) -> None:
    """Measure and print every row for a tensor of side x side."""
    x = torch.randn(side, side, device=session.device)
    target = torch.empty_like(x)
    table = Table(title=f"{side} x {side} float32, torch {torch.__version__}")
    for column in ("what", "of copy bandwidth", "GB/s", "budget"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, call, bytes_ratio, budget in rows(x):
        for _ in range(3):
            call()
        ratios, seconds = [], []
        for _ in range(rounds):
            copied = session.seconds_of(lambda: target.copy_(x))
            seconds.append(session.seconds_of(call))
            ratios.append(copied / seconds[-1] * bytes_ratio)
        ratio, taken = statistics.median(ratios), statistics.median(seconds)
        verdict = "" if budget is None else f"{budget} {'holds' if ratio >= budget else 'MISSED'}"
        bandwidth = 8 * x.numel() * bytes_ratio / taken / 1e9
        table.add_row(name, f"{ratio:.2f}", f"{bandwidth:.0f}", verdict)
        session.records.append({"row": name, "ratio": ratio, "gb_per_s": bandwidth, "budget": budget})
    session.console.print(table)


def warmed(session: Session, config: GPTConfig, batch: int, names: Iterable[str]) -> dict[str, Training]:
    """The steps of variants, each run three times; one that fails, or for which no time is left, is recorded."""
    found = {}
    for name in names:
        recipe, compiled = VARIANTS[name]
        if session.left < 45:
            session.records.append({"step": name, "batch": batch, "not_measured": "no time was left"})
            continue
        with session.part(f"first steps of {name}, batch {batch}"):
            step = Training(config, batch, session.device, recipe, session.compiler if compiled else None)
            for _ in range(3):
                step()
            found[name] = step
    return found


def steps(session: Session, config: GPTConfig, batch: int, rounds: int) -> None:
    """Time the variants in rounds, and look into some of them."""
    made = warmed(session, config, batch, VARIANTS)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        if session.left < 20 and all(times.values()):
            break
        for name, step in made.items():
            times[name].append(session.seconds_of(step))
    table = Table(title=f"GPT {config.n_layer} x {config.n_embd}, batch {batch} x {config.block_size}, bf16 autocast")
    for column in ("step", "ms", "of compiled BF16", "budget", "GB at the peak"):
        table.add_column(column, justify="left" if column == "step" else "right")
    base = times.get(BASELINE)
    for name, own in times.items():
        ratio = None if base is None else statistics.median(a / b for a, b in zip(own, base, strict=True))
        taken, memory = statistics.median(own), session.memory_of(made[name])
        judged = ratio is not None and name.startswith("E4M3")
        verdict = f"{STEP_BUDGET} {'holds' if ratio <= STEP_BUDGET else 'MISSED'}" if judged else ""  # type: ignore[operator]
        shown = "" if ratio is None else f"{ratio:.2f}"
        table.add_row(name, f"{1e3 * taken:.1f}", shown, verdict, f"{memory / 1e9:.1f}")
        session.records.append(
            {"step": name, "batch": batch, "seconds": taken, "ratio": ratio, "bytes": memory, "rounds": len(own)}
        )
    session.console.print(table)
    for name in LOOKED_INTO:
        if name in made and session.left > 15:
            look_into(session, name, batch, made[name])


def look_into(session: Session, name: str, batch: int, step: Callable[[], object]) -> None:
    """Where a step waits, and where its time goes."""
    with session.part(f"look into {name}, batch {batch}"):
        waits, kernels = session.waits_of(step), session.profile_of(step)
        print(f"        {name}: {len(waits)} waits for the device {sorted(set(waits))[:5]}", flush=True)
        table = Table(title=f"{name}, batch {batch}: where a step's time goes")
        for column in ("kernel", "calls", "microseconds"):
            table.add_column(
                column, justify="left" if column == "kernel" else "right", overflow="ellipsis", no_wrap=True
            )
        for row in kernels:
            table.add_row(row["kernel"][:80], str(row["calls"]), str(row["microseconds"]))
        session.console.print(table)
        session.records.append({"inside": name, "batch": batch, "waits": waits, "kernels": kernels})


def run(session: Session, size: int, rounds: int, batches: Iterable[int], config: GPTConfig) -> int:
    """Check, measure, print and record; 1 where something does not hold or failed."""
    parts: list[tuple[str, Callable[[], None]]] = [("checks", partial(check, session))]
    parts.append(("bandwidths", partial(bandwidths, session, 2 ** (size // 2), rounds)))
    parts += [(f"steps, batch {batch}", partial(steps, session, config, batch, rounds)) for batch in batches]
    for name, measure in parts:
        with session.part(name):
            measure()
    if session.failures:
        print(f"{len(session.failures)} do not hold or failed:", *session.failures, sep="\n    ")
    return int(bool(session.failures))


def main(arguments: list[str] | None = None) -> int:
    """The session, by the command line; without a GPU, say so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=28, help="log2 of the element count, even")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[8, 32], help="batches of the 124M steps; none skips them"
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="after which nothing new is begun")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/cuda.json"))
    parser.add_argument("--dry", action="store_true", help="on this CPU, as small as can be, without a record")
    options = parser.parse_args(arguments)
    if options.dry:
        tiny = GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=32, block_size=32, style="gpt2")
        return run(Session(options.seconds, None, dry=True), 14, 2, [2], tiny)
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing measured; --dry shows whether this runs")
        return 0
    session = Session(options.seconds, options.record, dry=False)
    return run(session, options.size, options.rounds, options.steps, GPT_124M)


if __name__ == "__main__":
    sys.exit(main())
