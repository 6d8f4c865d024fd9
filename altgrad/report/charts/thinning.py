"""Thins long curves for drawing without hiding what they did: each bucket keeps its mean, its least and its greatest value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Thinned:
    """Bucket centres `x` and per bucket the mean, least and greatest of its finite values (NaN where it has none)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_bucket: int
    """Points in a full bucket; 1 means nothing was thinned."""


def thin(x: np.ndarray, y: np.ndarray, buckets: int) -> Thinned:
    """At most `buckets` buckets of equally many neighbouring points; `x` ascends. The first and last x are kept as the
    ends of the curve."""
    n = len(x)
    per_bucket = max(1, -(-n // max(1, buckets)))
    if per_bucket == 1:
        y = np.asarray(y, dtype=np.float64)
        clean = np.where(np.isfinite(y), y, np.nan)
        return Thinned(np.asarray(x, dtype=np.float64), clean, clean, clean, 1)
    edges = np.arange(0, n, per_bucket)
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite, edges).astype(np.float64)
    sums = np.add.reduceat(np.where(finite, y, 0.0), edges)
    low = np.minimum.reduceat(np.where(finite, y, np.inf), edges)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), edges)
    some = counts > 0
    mean = np.divide(sums, counts, out=np.full(len(edges), np.nan), where=some)
    centres = np.add.reduceat(np.asarray(x, dtype=np.float64), edges) / np.diff(np.append(edges, n))
    centres[0], centres[-1] = x[0], x[-1]
    return Thinned(centres, mean, np.where(some, low, np.nan), np.where(some, high, np.nan), per_bucket)
