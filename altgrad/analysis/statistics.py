"""Statistics over seeds: intervals, paired differences, effect sizes, correction for many comparisons, the noise floor.

Seeds are few (often five), and that decides the methods. The bootstrap resamples what it has: with five seeds its 95%
interval holds the true mean in only about 80% of studies. So with fewer than `BOOTSTRAP_FROM` values the interval that
decisions rest on is Student's t (exact for normal differences at any n), the bootstrap interval is given beside it, and
every interval says which it is. One value has no interval.

All functions take finite values; what to do with collapsed runs is decided before (see `ranking`). scipy is imported on
first use.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from altgrad.errors import ReportError

CONFIDENCE = 0.95
BOOTSTRAP_FROM = 20
"""From this many values on, the BCa bootstrap is the interval that decisions rest on (its coverage is measured in tests)."""
RESAMPLES = 9_999


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval. `low`, `high` are None when there is only one value.

    `method` is "Student's t", "BCa bootstrap", "constant" (all values equal) or "one value".
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    method: str
    sd: float | None = None
    bootstrap: tuple[float, float] | None = None
    """Bootstrap interval (BCa, or percentile where BCa is undefined), whatever `method` is; None for n < 2."""
    seeds: tuple[Hashable, ...] = ()

    def excludes(self, value: float) -> bool:
        """Whether the interval is known and `value` lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high

    def overlaps(self, other: Estimate) -> bool:
        """Whether the intervals overlap; an unknown interval overlaps everything."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Comparison:
    """A paired difference a - b over the seeds both have."""

    difference: Estimate
    effect: float | None
    """Hedges' g of the paired differences (mean / sd, corrected for small n); None without a spread."""
    p: float | None
    """Two-sided p of the paired t-test; None for n < 2."""


def estimate(
    values: Sequence[float] | np.ndarray,
    seeds: Sequence[Hashable] = (),
    *,
    confidence: float = CONFIDENCE,
    rng: int = 0,
) -> Estimate:
    """Mean and interval of `values` (one per seed). `rng` seeds the bootstrap, so that a report is reproducible."""
    x = _finite(values)
    n, mean = len(x), float(np.mean(x))
    if n == 1:
        return Estimate(mean, None, None, 1, "one value", seeds=tuple(seeds))
    sd = float(np.std(x, ddof=1))
    if sd <= 1e-12 * max(abs(mean), 1e-300) or np.ptp(x) == 0:
        return Estimate(mean, mean, mean, n, "constant", 0.0, (mean, mean), tuple(seeds))
    boot = bootstrap_interval(x, confidence=confidence, rng=rng)
    if n >= BOOTSTRAP_FROM:
        return Estimate(mean, *boot[:2], n, "BCa bootstrap", sd, boot[:2], tuple(seeds))
    half = _t_quantile(confidence, n - 1) * sd / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n, "Student's t", sd, boot[:2], tuple(seeds))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, rng: int = 0
) -> tuple[float, float, str]:
    """(low, high, method) of the mean by scipy's bootstrap: BCa, or percentile where BCa is undefined.

    BCa's acceleration needs at least three values; with two, all it could say is their range.
    """
    x = _finite(values)
    if len(x) < 2:
        raise ReportError(f"a bootstrap interval needs at least 2 values, got {len(x)}; run more seeds")
    if np.ptp(x) == 0:
        return float(x[0]), float(x[0]), "constant"
    method = "BCa" if len(x) >= 3 else "percentile"
    return *_bootstrap(tuple(x.tolist()), confidence, resamples, method, rng), method


@lru_cache(maxsize=4096)
def _bootstrap(
    values: tuple[float, ...], confidence: float, resamples: int, method: str, rng: int
) -> tuple[float, float]:
    """A report asks for the same interval in several places; the bootstrap is its slowest part."""
    from scipy import stats

    result = stats.bootstrap(
        (np.array(values),),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method=method,
        rng=np.random.default_rng(rng),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired(
    a: Mapping[Any, float], b: Mapping[Any, float], *, confidence: float = CONFIDENCE, rng: int = 0
) -> Comparison | None:
    """a - b over the seeds that both have, in seed order; None when they share no seed.

    Runs of one seed see the same batches and start from the same weights, so the difference within a seed is free of
    what the seed does to both.
    """
    seeds = sorted(set(a) & set(b), key=lambda seed: (str(type(seed)), seed))
    if not seeds:
        return None
    differences = np.array([a[seed] - b[seed] for seed in seeds], dtype=np.float64)
    found = estimate(differences, seeds, confidence=confidence, rng=rng)
    return Comparison(found, hedges_g(differences), paired_p(differences))


def hedges_g(differences: Sequence[float] | np.ndarray) -> float | None:
    """mean / sd of paired differences, times J(n - 1), the exact correction for small n (Hedges 1981).

    None for fewer than three values, where the correction is zero, and where the values do not vary.
    """
    x = _finite(differences)
    df = len(x) - 1
    if df < 2 or np.ptp(x) == 0:
        return None
    correction = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)
    return correction * float(np.mean(x)) / float(np.std(x, ddof=1))


def paired_p(differences: Sequence[float] | np.ndarray) -> float | None:
    """Two-sided p of the one-sample t-test on the differences. Equal differences: 1 if they are zero, else 0."""
    from scipy import special

    x = _finite(differences)
    n = len(x)
    if n < 2:
        return None
    if np.ptp(x) == 0:
        return 1.0 if x[0] == 0 else 0.0
    t = float(np.mean(x)) / (float(np.std(x, ddof=1)) / math.sqrt(n))
    return float(2 * special.stdtr(n - 1, -abs(t)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: family-wise error at most alpha when compared with alpha."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


@dataclass(frozen=True)
class NoiseFloor:
    """How much the baseline's loss varies from seed to seed. `low`, `high`: 95% interval of the standard deviation."""

    sd: float
    low: float
    high: float
    n: int
    seeds: tuple[Hashable, ...]

    def smallest_resolvable(self, n: int, confidence: float = CONFIDENCE) -> float:
        """Half-width of the interval of a difference of two means of `n` unpaired seeds each, at this noise."""
        return _t_quantile(confidence, max(1, 2 * n - 2)) * self.sd * math.sqrt(2 / n)


def noise_floor(values: Mapping[Any, float], confidence: float = CONFIDENCE) -> NoiseFloor | None:
    """From the baseline's final losses by seed; None with fewer than two seeds. The interval is the chi-square one."""
    from scipy import special

    finite = {seed: value for seed, value in values.items() if math.isfinite(value)}
    n = len(finite)
    if n < 2:
        return None
    sd = float(np.std(list(finite.values()), ddof=1))
    tail = (1 - confidence) / 2
    low, high = (sd * math.sqrt((n - 1) / float(special.chdtri(n - 1, q))) for q in (tail, 1 - tail))
    return NoiseFloor(sd, low, high, n, tuple(finite))


def _t_quantile(confidence: float, df: int) -> float:
    from scipy import special

    return float(special.stdtrit(df, 0.5 + confidence / 2))


def _finite(values: Sequence[float] | np.ndarray | Any) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        raise ReportError("no values to average; give at least one finite value")
    if not np.isfinite(x).all():
        raise ReportError(
            f"{int((~np.isfinite(x)).sum())} of {len(x)} values are not finite; leave collapsed runs out, and say so"
        )
    return x
