"""Bandwidth of the quantization functions as ratios to torch's own copies, and speed against other emulators.

    python -m benchmarks.bench_quantize [--sizes 16 20 24 26] [--rounds 15] [--others] [--threads N] [--json FILE]

Every ratio is the median over rounds that time the variant and its copy alternately in one process (`_timing`). A ratio
of 1 means: as many bytes per second as the copy. Encoding reads 4 bytes and writes 1 per element, decoding the reverse;
both are held against copies of float32 by bytes moved. The budgets are stated for 2^24 elements.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from altgrad.quantization import amax_scale, decode, encode, get_format, ops, quantize
from benchmarks._timing import interleaved, keep_record

BUDGET_SIZE = 24
COPY, CLONE = "out.copy_(x)", "x.clone()"


class Row(NamedTuple):
    """One measured row: its call, the copy it is held against, bytes moved per element, and the budget."""

    name: str
    call: Callable[[], object]
    against: str
    bytes_per_element: int
    budget: float | None


def rows(x: torch.Tensor) -> list[Row]:
    """The rows of the design's table that concern quantize, and their relatives."""
    out = torch.empty_like(x)
    half, half_out = x.bfloat16(), torch.empty_like(x, dtype=torch.bfloat16)
    codes = encode(x, "E4M3")
    channels = x.view(64, -1)
    scales = amax_scale(channels, get_format("E4M3"), axis=0)
    key = (1, 2)

    def amax_and_quantize():
        return quantize(x, "E4M3", amax_scale(x, get_format("E4M3")), clamp=True, out=out)

    return [
        Row("quantize, out=", lambda: quantize(x, "E4M3", out=out), COPY, 8, 0.9),
        Row("quantize, out=, scale 0.3", lambda: quantize(x, "E4M3", 0.3, out=out), COPY, 8, 0.9),
        Row("quantize, new tensor", lambda: quantize(x, "E4M3"), CLONE, 8, 0.9),
        Row("quantize in place", lambda: quantize(out, "E4M3", out=out), COPY, 8, None),
        Row("quantize, per channel", lambda: quantize(channels, "E4M3", scales, out=out.view(64, -1)), COPY, 8, None),
        Row("quantize E3M4, round up", lambda: quantize(x, "E3M4", rounding="up", out=out), COPY, 8, None),
        Row("quantize bf16", lambda: quantize(half, "E4M3", out=half_out), COPY, 4, None),
        Row("amax scale + quantize", amax_and_quantize, COPY, 8, 0.5),
        Row("stochastic", lambda: quantize(x, "E4M3", rounding="stochastic", key=key, out=out), COPY, 8, 0.5),
        Row("encode", lambda: encode(x, "E4M3"), COPY, 5, 0.9),
        Row("decode, out=", lambda: decode(codes, "E4M3", 0.3, out=out), COPY, 5, 0.9),
        Row("quantize and encode, out=", lambda: ops.quantize_and_encode(x, "E4M3", out=out), COPY, 9, None),
        Row("quantize with statistics, out=", lambda: ops.quantize_with_stats(x, "E4M3", out=out), COPY, 8, None),
    ]


def others(x: torch.Tensor) -> list[Row]:
    """The same rounding by other packages, where they are installed."""
    found = [Row("altgrad eager (plain torch)", lambda: quantize(x, "E4M3", kernel="eager"), COPY, 8, None)]
    array = x.numpy()
    found.append(Row("torch cast", lambda: x.to(torch.float8_e4m3fn).float(), COPY, 8, None))
    if find_spec("ml_dtypes"):
        import ml_dtypes

        narrow = ml_dtypes.float8_e4m3fn
        found.append(Row("ml_dtypes cast", lambda: array.astype(narrow).astype(np.float32), COPY, 8, None))
    if find_spec("gfloat"):
        import gfloat
        import gfloat.formats as formats

        fmt = formats.format_info_ocp_e4m3
        found.append(Row("gfloat round_ndarray", lambda: gfloat.round_ndarray(fmt, array, sat=True), COPY, 8, None))
    if find_spec("qtorch"):
        try:
            from qtorch.quant import float_quantize
        except Exception as error:  # qtorch compiles C++ when it is imported
            Console().print(f"qtorch is installed but does not load: {type(error).__name__}")
        else:
            found.append(Row("qtorch float_quantize", lambda: float_quantize(x, 4, 3, "nearest"), COPY, 8, None))
    return found


def measure(x: torch.Tensor, wanted: list[Row], rounds: int, budget_s: float) -> list[dict]:
    """One record per row, each timed against its own copy."""
    target = torch.empty_like(x)
    copies = {COPY: lambda: target.copy_(x), CLONE: lambda: x.clone()}
    records = []
    for row in wanted:
        timing = interleaved(
            {"copy": copies[row.against], "row": row.call}, baseline="copy", rounds=rounds, budget_s=budget_s
        )
        records.append(
            {
                "row": row.name,
                "log2_elements": int(x.numel()).bit_length() - 1,
                "against": row.against,
                "us": timing.seconds["row"] * 1e6,
                "copy_us": timing.seconds["copy"] * 1e6,
                "ratio": timing.ratios["row"] * row.bytes_per_element / 8,
                "budget": row.budget,
            }
        )
    return records


def alternation(rounds: int) -> dict:
    """Time of a matrix product and a quantization in turn, over the sum of each by itself: what thread pools cost."""
    a, b = torch.randn(1024, 384), torch.randn(384, 1024)
    x = torch.randn(98304)
    out = torch.empty_like(x)

    def product():
        for _ in range(10):
            torch.mm(a, b)

    def rounding():
        for _ in range(10):
            quantize(x, "E4M3", out=out)

    def in_turn():
        for _ in range(10):
            torch.mm(a, b)
            quantize(x, "E4M3", out=out)

    timing = interleaved({"gemm": product, "quantize": rounding, "both": in_turn}, baseline="both", rounds=rounds)
    seconds = timing.seconds
    return {
        "gemm_us": seconds["gemm"] * 1e5,
        "quantize_us": seconds["quantize"] * 1e5,
        "over_sum": seconds["both"] / (seconds["gemm"] + seconds["quantize"]),
    }


def show(records: list[dict], title: str) -> None:
    """Print a table, one line per row and a column per size."""
    sizes = sorted({r["log2_elements"] for r in records})
    table = Table(title=title)
    table.add_column("E4M3 unless said")
    table.add_column("against")
    for size in sizes:
        table.add_column(f"2^{size}", justify="right")
    table.add_column("budget at 2^24", justify="right")
    for name in dict.fromkeys(r["row"] for r in records):
        mine = {r["log2_elements"]: r for r in records if r["row"] == name}
        first = next(iter(mine.values()))
        budget, verdict = first["budget"], ""
        if budget is not None and BUDGET_SIZE in mine:
            verdict = f"{budget} {'holds' if mine[BUDGET_SIZE]['ratio'] >= budget else 'MISSED'}"
        cells = [f"{mine[s]['ratio']:.2f} ({mine[s]['us']:.0f} us)" if s in mine else "" for s in sizes]
        table.add_row(name, first["against"], *cells, verdict)
    Console(width=150).print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 20, 24, 26], help="log2 of the element counts")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend per row beyond the rounds")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-others", action="store_true", help="leave out the comparison with other packages")
    parser.add_argument("--json", type=Path, default=None, help="also keep the records in this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    records, compared = [], []
    for size in options.sizes:
        x = torch.randn(2**size, generator=torch.Generator().manual_seed(0))
        records += measure(x, rows(x), options.rounds, options.seconds)
        if not options.no_others and size <= BUDGET_SIZE:
            compared += measure(x, others(x), 3, 0.0)
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    show(records, f"Bandwidth relative to a copy of the same bytes ({where})")
    if compared:
        show(compared, "Other implementations of the same rounding, on the same scale")
    turns = alternation(options.rounds)
    print(
        f"GEMM 1024x384x1024 {turns['gemm_us']:.0f} us, quantize 98304 elements {turns['quantize_us']:.0f} us; "
        f"in turn {turns['over_sum']:.2f} of their sum"
    )
    if options.json:
        record = {"where": where, "rows": records, "others": compared, "alternation": turns}
        keep_record(options.json, "quantize", record)


if __name__ == "__main__":
    main()
