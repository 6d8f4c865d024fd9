"""Bandwidth of the Triton kernels on an NVIDIA GPU as ratios to a device copy of the same bytes.

    python -m benchmarks.bench_cuda [--size 28] [--rounds 20] [--json FILE]

Every ratio is the median over rounds that time the variant and `out.copy_(x)` alternately between CUDA events. The
budget is 0.9 of the copy. The tensor (1 GiB by default) is larger than any cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from altgrad.quantization import amax_scale, decode, encode, get_format, quantize, quantize_with_stats

BUDGET = 0.9


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


def device_seconds(call: Callable[[], object]) -> float:
    """Seconds between CUDA events around one call."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def main() -> None:
    """Measure and print; without a GPU, say so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=28, help="log2 of the element count, even")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None, help="also write the records to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing measured")
        return
    side = 2 ** (options.size // 2)
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
        for _ in range(options.rounds):
            copied = device_seconds(lambda: target.copy_(x))
            seconds.append(device_seconds(call))
            ratios.append(copied / seconds[-1] * bytes_ratio)
        ratio, taken = statistics.median(ratios), statistics.median(seconds)
        verdict = "" if budget is None else f"{budget} {'holds' if ratio >= budget else 'MISSED'}"
        bandwidth = 8 * x.numel() * bytes_ratio / taken / 1e9
        table.add_row(name, f"{ratio:.2f}", f"{bandwidth:.0f}", verdict)
        records.append({"row": name, "ratio": ratio, "gb_per_s": bandwidth, "budget": budget})
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
