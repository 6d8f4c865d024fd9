"""Training step, peak memory and profile of quantized GPTs against the FP32 step of the same model, in one process.

    python -m benchmarks.bench_step [--recipes E4M3,E0M7,MXFP8] [--models 10M,0.8M,0.13M] [--rounds 11] [--json FILE]

Every ratio compares medians of rounds that alternate between the variants (FP32 first in one round, last in the next),
so that a drift of the machine's speed meets all of them. Peak memory is the largest sum of tensors that torch's
allocator held during one step, parameters, optimizer state and the layers' room for packed operands included. Budgets are
those of the design document for the class of CPU; misses are printed with their factor. `--without-units` measures what
CPUs take that multiply nothing faster than float32 and int16, with this CPU's vectors; `--like avx2` holds every library to
those of an older CPU (`benchmarks.cpu_classes`), the float32 baseline's included. `--recipes named` takes every recipe
that has a name (`altgrad recipes`); those that emulate a library's arithmetic or a unit's sums have no budget. `--convolutions` measures why
layers leave those to torch's own loops on values: the same product of codes, unfolded into a matrix.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from altgrad.nn import NAMED, Recipe, attach_optimizer, quantize_model, uniform
from altgrad.nn.layer import gemm
from altgrad.nn.layer.classes import is_quantized
from altgrad.nn.layer.gemm import Processor
from altgrad.nn.recipe.scaling_choice import is_block
from altgrad.quantization import Cast, encode, get_format, quantize
from altgrad.quantization.products.multiply import Codes, leave_room, multiply, room_kept
from altgrad.quantization.products.units import Unit, unit_of
from altgrad.training.model import GPT, GPTConfig
from benchmarks._timing import interleaved, keep_record
from benchmarks.cpu_classes import CLASSES, ROOT

MODELS = {
    "10M": (GPTConfig(vocab_size=256, n_layer=6, n_head=6, n_embd=384, block_size=256, style="gpt2"), 8),
    "0.8M": (GPTConfig(vocab_size=256, n_layer=4, n_head=4, n_embd=128, block_size=64, style="gpt2"), 12),
    "0.13M": (GPTConfig(vocab_size=256, n_layer=2, n_head=2, n_embd=64, block_size=64, style="gpt2"), 2),
}
TIME_BUDGETS = {  # with units: 8-bit formats, uniform grids, block formats; on CPUs without any: all
    "10M": (0.65, 0.46, 0.75, 1.05),
    "0.8M": (0.9, 0.7, 1.0, 1.2),
    "0.13M": (1.3, 1.3, 1.3, None),
}
MEMORY_BUDGETS = {"10M": 0.8}
MORE_ROUNDS = {"0.8M": 3, "0.13M": 9}  # times the rounds asked for: short steps feel a machine's other work more


def time_budget(model: str, recipe, processor: Processor) -> float | None:
    """The budget of a step in units of the FP32 step, by the unit that multiplies the recipe's forward."""
    if recipe.default.is_emulated:
        return None
    with_units, uniform_grids, blocks, without = TIME_BUDGETS[model]
    fmt = recipe.default.forward.input.resolved
    if not processor.bf16_codes and not processor.matrices:
        return without
    if is_block(fmt):
        return blocks
    return uniform_grids if unit_of(fmt) is Unit.INT8 and processor.int8_codes else with_units


def recipe_named(name: str):
    """E4M3, or E4M3/E5M2 for another gradient format; +grid and +stochastic, +delayed as suffixes; or a recipe's name."""
    if name.partition(" ")[0] in NAMED:
        return Recipe.from_dict(name)
    formats, *options = name.split("+")
    forward, _, grad = formats.partition("/")
    return uniform(
        forward,
        grad=grad or forward,
        rounding="stochastic" if "stochastic" in options else "nearest_even",
        storage="grid" if "grid" in options else "master",
        scaling="delayed" if "delayed" in options else "amax",
    )


class Variant:
    """One model with its optimizer, its data and the times of its steps in seconds."""

    def __init__(self, name: str, model: torch.nn.Module, batch: int, config: GPTConfig, recipe=None, device="cpu"):
        self.name, self.times = name, []
        self.model = copy.deepcopy(model).to(device)
        if recipe is not None:
            quantize_model(self.model, recipe)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        if recipe is not None:
            attach_optimizer(self.model, self.optimizer)
        generator = torch.Generator().manual_seed(1)
        shape = (batch, config.block_size)
        self.x = torch.randint(config.vocab_size, shape, generator=generator).to(device)
        self.y = torch.randint(config.vocab_size, shape, generator=generator).to(device)

    def step(self) -> None:
        """One whole training step."""
        _, loss = self.model(self.x, self.y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def standing_bytes(self) -> int:
        """Bytes of parameters, buffers, optimizer state, codes of weights on a grid and this thread's room for packed
        operands: what lives between steps."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        stores = {id(m.quantization.storage): m.quantization.storage for m in self.model.modules() if is_quantized(m)}
        tensors += [store.codes for store in stores.values() if store is not None and store.codes is not None]
        room = room_kept() if any(is_quantized(module) for module in self.model.modules()) else 0
        return sum(t.numel() * t.element_size() for t in tensors) + room

    def timed(self) -> None:
        """One step, its wall time kept."""
        start = time.perf_counter()
        self.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - start)


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Largest sum of torch's allocations during a step, in bytes, above what lived before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    start = int(memory[0]["args"]["Total Allocated"]) - int(memory[0]["args"]["Bytes"])
    return max(int(e["args"]["Total Allocated"]) for e in memory) - start


def kept_bytes(variant: Variant) -> dict[str, int]:
    """Bytes that a forward keeps for its backward beside the parameters, by "dtype [sizes]", the largest first."""
    own = {p.untyped_storage().data_ptr() for p in variant.model.parameters()}
    seen: dict[int, tuple[str, int]] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (f"{str(t.dtype)[6:]} {list(t.shape)}", storage.nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        _, loss = variant.model(variant.x, variant.y)
    found: dict[str, int] = {}
    for name, size in seen.values():
        found[name] = found.get(name, 0) + size
    del loss
    return dict(sorted(found.items(), key=lambda item: -item[1]))


GROUPS = (
    ("altgrad: amax", ("altgrad: amax",)),
    ("altgrad: quantize and encode", ("altgrad: quantize",)),
    ("altgrad: decode", ("altgrad: decode",)),
    ("GEMM", ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul")),
    ("attention", ("aten::_scaled_dot_product", "aten::_flash")),
    ("optimizer", ("aten::_foreach", "aten::_fused", "Optimizer.step", "aten::lerp", "aten::addc", "aten::sqrt")),
)


@contextmanager
def labelled():
    """Give the numerics' calls names in the profile."""
    from altgrad.nn.layer import operand

    found = {"__call__": Cast.__call__, "decode": Cast.decode}

    def named(function, label):
        def call(*args, **kwargs):
            with record_function(label):
                return function(*args, **kwargs)

        return call

    for name, function in found.items():
        setattr(Cast, name, named(function, f"altgrad: {'decode' if name == 'decode' else 'quantize'}"))
    amax, operand.amax = operand.amax, named(operand.amax, "altgrad: amax")
    try:
        yield
    finally:
        operand.amax = amax
        for name, function in found.items():
            setattr(Cast, name, function)


def profile_table(step: Callable[[], None]) -> list[tuple[str, float]]:
    """(group, milliseconds of CPU) of one step, largest first; what belongs to no group is `other`."""
    with labelled(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    totals: dict[str, float] = {}
    inside = 0.0
    for event in recorded.key_averages():
        if event.key.startswith("altgrad: "):  # a label's total covers the torch calls inside it
            totals[event.key] = event.cpu_time_total / 1e3
            inside += (event.cpu_time_total - event.self_cpu_time_total) / 1e3
            continue
        group = next((g for g, keys in GROUPS if event.key.startswith(keys)), "other")
        totals[group] = totals.get(group, 0.0) + event.self_cpu_time_total / 1e3
    totals["other"] = totals.get("other", 0.0) - inside
    return sorted(totals.items(), key=lambda pair: -pair[1])


def bench(name: str, recipes: list[str], rounds: int, device: str) -> dict:
    """All variants of one model: medians, ratios, peaks and profiles."""
    config, batch = MODELS[name]
    rounds *= MORE_ROUNDS.get(name, 1)
    leave_room()
    model = GPT(config)
    variants = [Variant("FP32", model, batch, config, device=device)]
    variants += [Variant(r, model, batch, config, recipe_named(r), device) for r in recipes]
    for variant in variants:
        for _ in range(2):
            variant.step()
    for index in range(rounds):
        for variant in variants if index % 2 == 0 else reversed(variants):
            variant.timed()
    base = statistics.median(variants[0].times)
    base_peak = None
    rows = []
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\nGPT {name}: {parameters / 1e6:.2f}M parameters, batch {batch} x {config.block_size}, {rounds} rounds")
    print(f"  {'variant':24} {'step ms':>9} {'x FP32':>7} {'min..max':>13} {'peak MB':>8} {'x FP32':>7}")
    for variant in variants:
        median = statistics.median(variant.times)
        ratios = sorted(t / b for t, b in zip(variant.times, variants[0].times, strict=True))
        variant.optimizer.zero_grad(set_to_none=True)
        peak = peak_bytes(variant.step, device) + variant.standing_bytes()
        base_peak = base_peak or peak
        row = {
            "model": name,
            "variant": variant.name,
            "step_ms": median * 1e3,
            "time_ratio": median / base,
            "peak_mb": peak / 2**20,
            "memory_ratio": peak / base_peak,
        }
        rows.append(row)
        spread = f"{ratios[0]:.2f}..{ratios[-1]:.2f}"
        print(
            f"  {variant.name:24} {row['step_ms']:9.1f} {row['time_ratio']:7.3f} {spread:>13} {row['peak_mb']:8.1f} {row['memory_ratio']:7.3f}"
        )
    for variant, row in zip(variants[1:], rows[1:], strict=True):
        budgets = (time_budget(name, recipe_named(variant.name), gemm.PROCESSOR), MEMORY_BUDGETS.get(name))
        for what, key, budget in zip(("time", "memory"), ("time_ratio", "memory_ratio"), budgets, strict=True):
            if budget is not None:
                met = "met" if row[key] <= budget else f"MISSED by {row[key] / budget:.2f}x"
                print(f"  budget {what} <= {budget}: {variant.name} {row[key]:.3f}: {met}")
    for variant in variants[:2]:
        kept = kept_bytes(variant)
        largest = ", ".join(f"{size / 2**20:.1f} {name}" for name, size in list(kept.items())[:6])
        print(f"  {variant.name} keeps {sum(kept.values()) / 2**20:.1f} MB for the backward: {largest}")
    tables = {}
    for variant in variants[:2] if device == "cpu" else []:
        tables[variant.name] = profile_table(variant.step)
        total = sum(ms for _, ms in tables[variant.name])
        print(f"  where the time of {variant.name} goes ({total:.0f} ms under the profiler):")
        for group, ms in tables[variant.name]:
            print(f"    {group:32} {ms:8.1f} ms {100 * ms / total:5.1f}%")
    return {"model": name, "rows": rows, "profiles": tables}


CONVOLUTIONS = ((8, 64, 32, 64), (8, 128, 16, 128), (8, 16, 32, 16), (8, 3, 32, 64))
"""Images, channels, side, channels out: with kernels of 3 x 3."""


def convolutions(rounds: int) -> list[dict]:
    """Forward convolutions of E4M3 and E0M7: rounding and torch's loops, against encoding, unfolding and products of codes."""

    def codes_of(tensor: Tensor, fmt) -> Tensor:
        found = encode(tensor, fmt, 0.05, overflow="saturate")
        assert isinstance(found, Tensor)
        return found

    rows = []
    print(f"{'convolution':20} {'format':7} {'direct ms':>10} {'unfolded codes / direct':>24}")
    for images, channels, side, outputs in CONVOLUTIONS:
        x, w = torch.randn(images, channels, side, side), torch.randn(outputs, channels, 3, 3)
        for name in ("E4M3", "E0M7"):
            fmt = get_format(name)
            unit = unit_of(fmt)
            assert unit is not None
            coded = Codes(codes_of(w, fmt).reshape(outputs, -1), fmt, 0.05).t()

            def unfolded(x=x, fmt=fmt, coded=coded, unit=unit) -> Tensor:
                codes = F.pad(codes_of(x, fmt), (1, 1, 1, 1))
                matrix = codes.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, len(coded.codes))
                return multiply(Codes(matrix, fmt, 0.05), coded, unit)

            calls = {"direct": lambda x=x, w=w, fmt=fmt: F.conv2d(quantize(x, fmt, 0.05), w, padding=1)}
            found = interleaved(calls | {"unfolded": unfolded}, baseline="direct", rounds=rounds, budget_s=0)
            ratio = 1 / found.ratios["unfolded"]
            shape = f"{images} x {channels} x {side}^2 > {outputs}"
            print(f"{shape:20} {name:7} {found.seconds['direct'] * 1e3:10.2f} {ratio:24.2f}")
            rows.append({"shape": shape, "format": name, "direct_s": found.seconds["direct"], "ratio": ratio})
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--recipes", default="E4M3,E4M3/E5M2,E0M7,MXFP8", help="comma-separated; see recipe_named; or named"
    )
    parser.add_argument("--models", default="10M,0.8M,0.13M")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, default=None, help="also keep the records in this file")
    parser.add_argument("--without-units", action="store_true", help="multiply as a CPU that has its vectors alone")
    parser.add_argument("--convolutions", action="store_true", help="measure convolutions alone")
    parser.add_argument("--like", choices=[n for n in CLASSES if CLASSES[n].switches], help="a class of older CPUs")
    args = parser.parse_args()
    if args.like and "NUMBA_CPU_NAME" not in os.environ:  # libraries read the switches when they are loaded
        here = {**os.environ, **CLASSES[args.like].switches, "NUMBA_CACHE_DIR": str(ROOT / ".cpu_classes" / args.like)}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.bench_step", *sys.argv[1:]], here)
    if args.without_units:
        gemm.PROCESSOR = gemm.PROCESSOR.without_units()
    torch.set_num_threads(args.threads)
    if args.convolutions:
        found = convolutions(args.rounds)
        if args.json is not None:
            keep_record(args.json, "convolutions", found)
        return
    capability = f"{torch.backends.cpu.get_cpu_capability()}, multiplies {gemm.PROCESSOR}"
    print(f"torch {torch.__version__}, {args.threads} threads, {platform.machine()} {capability}")
    recipes = list(NAMED) if args.recipes == "named" else args.recipes.split(",")
    results = [bench(name, recipes, args.rounds, args.device) for name in args.models.split(",")]
    if args.json is not None:
        what = "step of named recipes" if args.recipes == "named" else "step"
        what += " without units" * args.without_units + f" like {args.like}" * bool(args.like)
        keep_record(args.json, what, results)


if __name__ == "__main__":
    main()
