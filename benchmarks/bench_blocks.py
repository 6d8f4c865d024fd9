"""Bandwidth of the block formats on the CPU as ratios to torch's own copy, and speed against torchao's conversions.

    python -m benchmarks.bench_blocks [--size 24] [--rounds 15] [--threads N] [--no-others] [--json FILE]

The tensor is square: 2^24 elements are 4096 x 4096. Every ratio is the median over rounds that time the variant and
`out.copy_(x)` alternately in one process; encoding reads 4 bytes and writes 1 per element and is held to bytes moved,
decoding to the copy of what it writes.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from altgrad.quantization import decode, encode, quantize, quantize_with_stats
from benchmarks._timing import interleaved, keep_record


class Row(NamedTuple):
    """One measured row: its call, bytes moved per element, and the budget."""

    name: str
    call: Callable[[], object]
    bytes_per_element: int
    budget: float | None


def rows(x: torch.Tensor) -> list[Row]:
    """Block formats by layout, scale and output."""
    out = torch.empty_like(x)
    half, half_out = x.bfloat16(), torch.empty_like(x, dtype=torch.bfloat16)
    key = (1, 2)
    encoded, across, narrow = encode(x, "MXFP8"), encode(x, "MXFP8", axis=0), encode(x, "MXFP4")
    two_level, tiles = encode(x, "NVFP4"), encode(x, "E4M3/128x128:FP32")

    def to(name: str, axis: int = -1, **options) -> Callable[[], object]:
        return lambda: quantize(x, name, axis=axis, out=out, **options)

    return [
        Row("MXFP8, last axis", to("MXFP8"), 8, 0.5),
        Row("MXFP8, other axis", to("MXFP8", 0), 8, 0.3),
        Row("MXFP4, last axis", to("MXFP4"), 8, 0.5),
        Row("MXFP6, last axis", to("MXFP6"), 8, 0.5),
        Row("MXINT8, last axis", to("MXINT8"), 8, None),
        Row("NVFP4, last axis", to("NVFP4"), 8, None),
        Row("NVFP4, other axis", to("NVFP4", 0), 8, None),
        Row("E4M3, tiles of 128 x 128, float32 scale", to("E4M3/128x128:FP32"), 8, None),
        Row("E4M3/64, last axis", to("E4M3/64"), 8, None),
        Row("MXFP8, bf16 tensor", lambda: quantize(half, "MXFP8", out=half_out), 4, None),
        Row("MXFP8, stochastic", to("MXFP8", rounding="stochastic", key=key), 8, None),
        Row("MXFP8, other axis, stochastic", to("MXFP8", 0, rounding="stochastic", key=key), 8, None),
        Row("MXFP8, encode", lambda: encode(x, "MXFP8"), 5, None),
        Row("MXFP8, decode", lambda: decode(encoded, out=out), 8, 0.5),
        Row("MXFP8, other axis, decode", lambda: decode(across, out=out), 8, None),
        Row("MXFP4, decode", lambda: decode(narrow, out=out), 8, None),
        Row("NVFP4, decode", lambda: decode(two_level, out=out), 8, None),
        Row("E4M3, tiles of 128 x 128, float32 scale, decode", lambda: decode(tiles, out=out), 8, None),
        Row("MXFP8, decode to bf16", lambda: decode(encoded, dtype=torch.bfloat16, out=half_out), 4, None),
        Row("MXFP8, decode, plain torch (kernel eager)", lambda: decode(encoded, out=out, kernel="eager"), 8, None),
        Row("MXFP8, with statistics", lambda: quantize_with_stats(x, "MXFP8"), 8, None),
        Row("MXFP8, plain torch (kernel eager)", to("MXFP8", kernel="eager"), 8, None),
    ]


def others(x: torch.Tensor) -> list[Row]:
    """torchao's conversions to codes and scales, where it is installed."""
    if not find_spec("torchao"):
        return []
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    return [
        Row("torchao to_mx, E4M3 (codes)", lambda: to_mx(x, torch.float8_e4m3fn, 32), 5, None),
        Row("torchao to_mx, E2M1 (codes)", lambda: to_mx(x, torch.float4_e2m1fn_x2, 32), 5, None),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=24, help="log2 of the element count, even")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend per row beyond the rounds")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-others", action="store_true", help="leave out torchao")
    parser.add_argument("--json", type=Path, default=None, help="also keep the records in this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    side = 2 ** (options.size // 2)
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    target = torch.empty_like(x)
    table = Table(
        title=f"Block formats, {side} x {side} float32, {torch.get_num_threads()} threads, {platform.machine()}"
    )
    for column in ("what", "of copy bandwidth", "ms", "budget"):
        table.add_column(column, justify="left" if column == "what" else "right")
    records = []
    for row in rows(x) + ([] if options.no_others else others(x)):
        calls = {"copy": lambda: target.copy_(x), "row": row.call}
        slow = row.budget is None and "torch" in row.name
        timing = interleaved(
            calls, baseline="copy", rounds=3 if slow else options.rounds, budget_s=0 if slow else options.seconds
        )
        ratio = timing.ratios["row"] * row.bytes_per_element / 8
        verdict = "" if row.budget is None else f"{row.budget} {'holds' if ratio >= row.budget else 'MISSED'}"
        table.add_row(row.name, f"{ratio:.2f}", f"{timing.seconds['row'] * 1e3:.1f}", verdict)
        records.append({"row": row.name, "ratio": ratio, "ms": timing.seconds["row"] * 1e3, "budget": row.budget})
    Console(width=120).print(table)
    if options.json:
        keep_record(options.json, "blocks", records)


if __name__ == "__main__":
    main()
