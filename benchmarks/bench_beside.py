"""The training step of one GPT by several libraries that emulate 8-bit formats, against its FP32 step, in one process.

    pip install qtorch torchao        (QPyTorch compiles its C++ when it is imported: it needs a compiler and ninja)
    python -m benchmarks.bench_beside [--models 10M,0.8M,0.13M] [--rounds 7] [--json FILE]

The other libraries are no dependency; what cannot be imported is named with its reason. Each quantizes the input, the weight
and the output's gradient of every linear layer and multiplies what came out:

    AltGrad     E4M3 and MXFP8 by `quantize_model(model, uniform(...))`
    QPyTorch    FloatingPoint(exp=4, man=3), nearest, by `quantizer` around `linear`, as its documentation does; unscaled
    torchao     float8 training emulated (`convert_to_float8_training`, `Float8LinearConfig(emulate=True)`): scaled E4M3
                operands and E5M2 gradients, multiplied in float32

Microsoft's microxcaling has no package in the Python index (`pip install microxcaling` finds none), so it has no row.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from altgrad.nn.layer import gemm
from altgrad.quantization.products.multiply import leave_room
from altgrad.training.model import GPT
from benchmarks._timing import keep_record
from benchmarks.bench_step import MODELS, MORE_ROUNDS, Variant, peak_bytes, recipe_named


def with_qpytorch(model: nn.Module) -> nn.Module:
    """The model with QPyTorch's quantizers around every linear layer."""
    from qtorch import FloatingPoint
    from qtorch.quant import quantizer

    number = FloatingPoint(exp=4, man=3)
    operand = quantizer(forward_number=number, forward_rounding="nearest")
    gradient = quantizer(backward_number=number, backward_rounding="nearest")

    class Linear(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return gradient(F.linear(operand(input), operand(self.weight), self.bias))

    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


def with_torchao(model: nn.Module) -> nn.Module:
    """The model with torchao's float8 training, emulated."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))


OTHERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "QPyTorch E4M3": with_qpytorch,
    "torchao float8, emulated": with_torchao,
}


def bench(name: str, rounds: int) -> dict:
    """All libraries on one model: medians of interleaved rounds, ratios, peaks, losses; and who could not be run."""
    config, batch = MODELS[name]
    rounds *= MORE_ROUNDS.get(name, 1)
    leave_room()
    model = GPT(config)
    variants = [Variant("FP32", model, batch, config)]
    variants += [Variant(f"AltGrad {r}", model, batch, config, recipe_named(r)) for r in ("E4M3", "MXFP8")]
    absent = {}
    for title, change in OTHERS.items():
        try:
            variant = Variant(title, change(copy.deepcopy(model)), batch, config)
            variant.step()
        except Exception as error:  # whatever a library that is not ours fails with
            absent[title] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        variants.append(variant)
    for variant in variants:
        variant.step()
        variant.step()
    for index in range(rounds):
        for variant in variants if index % 2 == 0 else reversed(variants):
            variant.timed()
    base = statistics.median(variants[0].times)
    print(f"\nGPT {name}, batch {batch} x {config.block_size}, {rounds} rounds")
    print(f"  {'library':28} {'step ms':>9} {'x FP32':>7} {'peak MB':>8}")
    rows = []
    for variant in variants:
        variant.optimizer.zero_grad(set_to_none=True)
        peak = (peak_bytes(variant.step, "cpu") + variant.standing_bytes()) / 2**20
        median = statistics.median(variant.times)
        rows.append({"library": variant.name, "step_ms": median * 1e3, "time_ratio": median / base, "peak_mb": peak})
        print(f"  {variant.name:28} {median * 1e3:9.1f} {median / base:7.3f} {peak:8.1f}")
    for title, reason in absent.items():
        print(f"  {title:28} not run: {reason}")
    return {"model": name, "rows": rows, "not_run": absent}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="10M,0.8M,0.13M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="also keep the record in this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, multiplies {gemm.PROCESSOR}")
    results = [bench(name, args.rounds) for name in args.models.split(",")]
    if args.json is not None:
        keep_record(args.json, "beside", results)


if __name__ == "__main__":
    main()
