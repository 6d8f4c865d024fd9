"""Statistical tests of the counter generator: is stochastic rounding unbiased and uncorrelated?

Each test looks at the words that rounding draws, for keys and indices as a training run makes them (small sequential
seeds, streams that are hashes or small numbers, indices from 0), and returns a p-value under the hypothesis of ideal
randomness. A generator that fails gives p-values that vanish as draws grow; an ideal one gives uniform p-values. The
Philox reference is put through the same tests, so a wrong test would show.

    python -m benchmarks.rng_statistics --log2-draws 30
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from altgrad.randomness import hash_words, philox_words

Draw = Callable[[int, int, int, int], np.ndarray]  # (seed, stream, first, count) -> uint32 words
LAGS = (1, 2, 3, 4, 7, 8, 16, 64, 384, 768, 1024, 1536, 4096, 65536)
_BLOCK = 2**20


def chi_square(counts: np.ndarray) -> float:
    """p-value of equal expected counts; two-sided, so that too even is suspicious as well."""
    upper = stats.chi2.sf(((counts - counts.mean()) ** 2 / counts.mean()).sum(), counts.size - 1)
    return float(2 * min(upper, 1 - upper))


def normal(total: float, variance: float) -> float:
    """Two-sided p-value of a sum of mean 0."""
    return float(2 * stats.norm.sf(abs(total) / np.sqrt(variance)))


def _centred(words: np.ndarray) -> np.ndarray:
    """Words as floats of mean 0 and variance 1 (uniform)."""
    return ((words >> 8).astype(np.float64) + 0.5) / 2**24 * np.sqrt(12) - np.sqrt(3)


def uniform(draw: Draw, draws: int) -> float:
    """Upper 16 bits along one stream, counted in 65536 cells."""
    counts = np.zeros(65536)
    for first in range(0, draws, _BLOCK):
        counts += np.bincount(draw(7, 1, first, min(_BLOCK, draws - first)) >> 16, minlength=65536)
    return chi_square(counts)


def uniform_over_streams(draw: Draw, draws: int) -> float:
    """Upper 12 bits of the first 2^20 elements of streams of their own, the worst of up to 16 of them."""
    streams = max(1, min(16, draws // _BLOCK))
    return min(1.0, streams * min(chi_square(np.bincount(draw(s, s, 0, _BLOCK) >> 20)) for s in range(streams)))


def pairs(draw: Draw, draws: int) -> float:
    """Upper 6 bits of neighbours, counted in 64 x 64 cells."""
    counts = np.zeros(4096)
    for first in range(0, draws, _BLOCK):
        w = draw(11, 5, first, min(_BLOCK, draws - first)) >> 26
        counts += np.bincount(w[::2] * 64 + w[1::2], minlength=4096)
    return chi_square(counts)


def bit_balance(draw: Draw, draws: int) -> float:
    """Each of the 32 bits is set half of the time; the smallest of 32 p-values, corrected for their number."""
    ones = np.zeros(32)
    for first in range(0, draws, _BLOCK):
        words = draw(3, 2**63 + 9, first, min(_BLOCK, draws - first))
        ones += [np.count_nonzero(words & np.uint32(1 << b)) for b in range(32)]
    return min(1.0, 32 * min(normal(x - draws / 2, draws / 4) for x in ones))


def serial(draw: Draw, draws: int) -> float:
    """Correlation of elements at the distances of LAGS along streams."""
    sums, terms = np.zeros(len(LAGS)), np.zeros(len(LAGS))
    for block in range(max(1, draws // _BLOCK)):
        u = _centred(draw(5, block, 0, _BLOCK))
        for i, lag in enumerate(LAGS):
            sums[i] += u[:-lag] @ u[lag:]
            terms[i] += _BLOCK - lag
    return min(1.0, len(LAGS) * min(normal(s, n) for s, n in zip(sums, terms, strict=True)))


def _across(draw: Draw, keys: Iterator[tuple[tuple[int, int], tuple[int, int]]], count: int) -> float:
    """Correlation of two keys' words at shifts of 0, 1, 2 and 1024 elements, over many pairs of keys."""
    shifts = (0, 1, 2, 1024)
    sums, terms = np.zeros(len(shifts)), np.zeros(len(shifts))
    for one, other in keys:
        a, b = _centred(draw(*one, 0, count)), _centred(draw(*other, 0, count))
        for i, shift in enumerate(shifts):
            sums[i] += a[: count - shift] @ b[shift:]
            terms[i] += count - shift
    return min(1.0, len(shifts) * min(normal(s, n) for s, n in zip(sums, terms, strict=True)))


def neighbouring_seeds(draw: Draw, draws: int) -> float:
    """Seeds s and s + 1 under the same stream."""
    count = 2**14
    return _across(draw, (((s, 77), (s + 1, 77)) for s in range(max(2, draws // count))), count)


def neighbouring_streams(draw: Draw, draws: int) -> float:
    """Streams t and t + 1 under the same seed (steps that are numbered, not hashed)."""
    count = 2**14
    return _across(draw, (((1, t), (1, t + 1)) for t in range(max(2, draws // count))), count)


def one_bit_apart(draw: Draw, draws: int) -> float:
    """Streams that differ in one bit."""
    count = 2**14
    return _across(draw, (((1, t), (1, t ^ (1 << t % 64))) for t in range(max(2, draws // count))), count)


def element_over_streams(draw: Draw, draws: int) -> float:
    """One element over many streams is uniform: what makes rounding unbiased for every single weight."""
    streams, elements = max(2048, draws // 64), 64
    counts = np.zeros((elements, 16))
    for stream in range(streams):
        counts[np.arange(elements), draw(9, stream, 0, elements) >> 28] += 1
    worst = min(chi_square(row) for row in counts)
    return min(1.0, elements * worst)


def rounding_bias(draw: Draw, draws: int) -> float:
    """Mean of rounded-up decisions at fractions k/17 over elements and streams, against the fractions."""
    count, ps = 2**14, []
    fractions = np.arange(1, 17) / 17
    limits = 2**24 - np.floor(fractions * 2**24)
    ups = np.zeros(16)
    rounds = max(2, draws // count)
    for stream in range(rounds):
        words = draw(13, stream, 0, count) >> 8
        ups += [np.count_nonzero(words >= limit) for limit in limits]
    p = 1 - limits / 2**24
    total = rounds * count
    ps = [normal(u - total * q, total * q * (1 - q)) for u, q in zip(ups, p, strict=True)]
    return min(1.0, 16 * min(ps))


TESTS = (
    uniform,
    uniform_over_streams,
    pairs,
    bit_balance,
    serial,
    neighbouring_seeds,
    neighbouring_streams,
    one_bit_apart,
    element_over_streams,
    rounding_bias,
)
GENERATORS: dict[str, Draw] = {"hash": hash_words, "philox": philox_words}
LIMIT = 1e-6  # a p-value below it is a failure: 18 tests fail by chance once in 50,000 runs


def report(log2_draws: int, generators: tuple[str, ...] = ("hash",)) -> int:
    """Print a line per generator and test; returns the number of failures."""
    failures = 0
    for name in generators:
        for test in TESTS:
            draws = 2 ** min(log2_draws, 24 if test is element_over_streams else 40)
            p = test(GENERATORS[name], draws)
            failures += p < LIMIT
            print(
                f"{name} {test.__name__}: 2^{int(np.log2(draws))} draws, p = {p:.3g}{'  FAILS' if p < LIMIT else ''}",
                flush=True,
            )
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log2-draws", type=int, default=26)
    parser.add_argument("--generators", nargs="+", default=["hash", "philox"], choices=list(GENERATORS))
    options = parser.parse_args()
    sys.exit(report(options.log2_draws, tuple(options.generators)) > 0)
