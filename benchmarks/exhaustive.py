"""Every float32 bit pattern through every 8-bit split E0M7 .. E7M0: the CPU kernel against a search in a table.

    python -m benchmarks.exhaustive                 # all 2^32 patterns of the eight formats, then the random generator
    python -m benchmarks.exhaustive --formats E4M3  # one format
    python -m benchmarks.exhaustive --log2 26       # a sample: every 64th block of 2^20 patterns

The table lists, for each boundary between two neighbouring results, the smallest float32 that rounds to the upper one;
a result is found by counting the boundaries at or below |x|. Boundaries come from the enumerated values in float64
(midpoints, ties to the even multiple of the spacing): nothing is shared with the kernel, which adds and subtracts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch

from altgrad.quantization import get_format, quantize
from benchmarks.rng_statistics import report

EIGHT_BITS = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
CHUNK = 2**20


@cache
def boundaries(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(ascending float32 boundaries, float32 results): |x| >= boundaries[i] rounds to results[i + 1] or beyond."""
    fmt = get_format(name)
    values = fmt.values()
    values = values[values >= 0]
    virtual = values[-1] + fmt.ulp(values[-1])  # where the grid would go on beyond max
    ladder = np.append(values, virtual)
    gaps = np.diff(ladder)
    middles = ladder[:-1] + gaps / 2
    to_upper = np.remainder(ladder[:-1] / gaps, 2) == 1  # a tie goes up if the lower neighbour is an odd multiple
    lowest = middles.astype(np.float32)
    above = np.nextafter(lowest, np.float32(np.inf))
    reached = np.where(to_upper, lowest.astype(np.float64) >= middles, lowest.astype(np.float64) > middles)
    overflow = np.inf if fmt.has_inf else fmt.max
    return np.where(reached, lowest, above), np.append(values, overflow).astype(np.float32)


def expected(patterns: np.ndarray, name: str) -> np.ndarray:
    """Bit patterns of the results of uint32 bit patterns, nearest-even, scale 1, native overflow."""
    edges, results = boundaries(name)
    magnitude = (patterns & np.uint32(0x7FFFFFFF)).view(np.float32)
    found = results[np.searchsorted(edges, magnitude, side="right")].view(np.uint32)
    found = np.where(np.isinf(magnitude), np.uint32(0x7F800000), found)
    return found | (patterns & np.uint32(0x80000000))


def mismatches(name: str, first: int, count: int) -> tuple[int, str]:
    """(number of patterns first .. first + count - 1 whose result is wrong, the first of them in words)."""
    torch.set_num_threads(1)
    patterns = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
    x = torch.from_numpy(patterns.view(np.float32))
    result = quantize(x, name).numpy()
    nan = np.isnan(patterns.view(np.float32))
    wrong = np.where(nan, ~np.isnan(result), result.view(np.uint32) != expected(patterns, name))
    if not wrong.any():
        return 0, ""
    i = int(np.argmax(wrong))
    return int(wrong.sum()), f"{name}: 0x{patterns[i]:08x} ({x[i].item()!r}) gave {result[i]!r}"


def ranges(log2: int) -> Iterator[tuple[int, int]]:
    """(first, count) of blocks that cover all patterns, or a regular sample of 2^log2 of them."""
    stride = 2 ** (32 - log2)
    for block in range(0, 2**32 // CHUNK, stride):
        yield block * CHUNK, CHUNK


def check(name: str, log2: int, pool: ProcessPoolExecutor) -> int:
    """Check one format and print its line; returns the number of mismatches."""
    began = time.perf_counter()
    total = bad = 0
    example = ""
    blocks = list(ranges(log2))
    columns = [[name] * len(blocks), [first for first, _ in blocks], [count for _, count in blocks]]
    for (_, count), (wrong, words) in zip(blocks, pool.map(mismatches, *columns, chunksize=8), strict=True):
        total, bad, example = total + count, bad + wrong, example or words
    print(f"{name}: {total} patterns, {bad} mismatches ({time.perf_counter() - began:.0f} s)", flush=True)
    if example:
        print(f"  first: {example}", flush=True)
    return bad


def main() -> int:
    """Run the check; the exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=EIGHT_BITS)
    parser.add_argument("--log2", type=int, default=32, help="how many patterns, as a power of two from 20 to 32")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--no-random", action="store_true", help="leave out the tests of the random generator")
    options = parser.parse_args()
    bad = 0
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for name in options.formats:
            bad += check(name, options.log2, pool)
    if not options.no_random:
        bad += report(log2_draws=min(options.log2, 30))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
