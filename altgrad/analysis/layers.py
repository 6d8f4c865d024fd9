"""Per layer and role over time: what the monitor recorded, reduced to a few buckets and averaged over runs.

Also what follows from it: where in the pass a setting loses its numbers (forward, gradient, update), and which format
suits which type of layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from altgrad.records.metrics import drawn_names, find_metric, metrics
from altgrad.records.run import as_number

BUCKETS = 24

LayerHistory = Mapping[tuple[str, str, str], np.ndarray]
"""(metric, role, layer) -> float32 [BUCKETS], NaN where nothing was measured."""


def layer_history(records: Sequence[Mapping[str, Any]], max_steps: int) -> LayerHistory:
    """Means per bucket of steps of the metrics that a study draws. Between two measurements the earlier one holds."""
    names = drawn_names()
    sums: dict[tuple[str, str, str], tuple[list[float], list[int]]] = {}
    for record in records:
        layer, role = str(record.get("layer")), str(record.get("role"))
        bucket = min(BUCKETS - 1, max(int(record["step"]) - 1, 0) * BUCKETS // max_steps)
        for name in names:
            value = as_number(record.get(name))
            if value is not None and math.isfinite(value):
                key = name, role, layer
                if key not in sums:
                    sums[key] = [0.0] * BUCKETS, [0] * BUCKETS
                total, n = sums[key]
                total[bucket] += value
                n[bucket] += 1
    return {key: _held(np.array(total) / _or_nan(n)).astype(np.float32) for key, (total, n) in sums.items()}


def _or_nan(n: list[int]) -> np.ndarray:
    counts = np.array(n, dtype=np.float64)
    counts[counts == 0] = np.nan
    return counts


def _held(values: np.ndarray) -> np.ndarray:
    """Gaps between measured buckets take the value before them; what lies outside the first and last stays NaN."""
    known = np.flatnonzero(~np.isnan(values))
    held = values.copy()
    for start, stop in pairwise(known):
        held[start:stop] = values[start]
    return held


def mean_history(histories: Sequence[LayerHistory]) -> LayerHistory:
    """Mean over runs, bucket by bucket, of the runs that measured it."""
    keys = dict.fromkeys(key for history in histories for key in history)
    return {key: nan_mean(np.stack([h[key] for h in histories if key in h])) for key in keys}


def nan_mean(rows: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the values that are not NaN, without a warning where there are none."""
    known = ~np.isnan(rows)
    n = known.sum(axis=0)
    total = np.where(known, rows, 0).sum(axis=0)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def forward_order(history: LayerHistory) -> list[str]:
    """All layers, in the order of the forward pass as far as it shows: the backward pass records them in reverse."""
    places = {"input": 0, "weight": 1, "grad_output": 3}
    by_role = sorted(history, key=lambda key: places.get(key[1], 2))
    return list(dict.fromkeys(layer for _, _, layer in by_role))


def panel(history: LayerHistory, metric: str, role: str, order: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(layers, values [layers, BUCKETS]) of one metric and role, layers in `order`."""
    rows = [(layer, history[key]) for layer in order if (key := (metric, role, layer)) in history]
    return [layer for layer, _ in rows], np.stack([v for _, v in rows]) if rows else np.empty((0, BUCKETS))


PASSES = {"forward": ("input", "weight"), "gradient": ("grad_output",), "update": ("update", "weight")}
"""Where a number can be lost -> roles that show it. The update's losses are those of parameters, not of operands."""


def worst_loss(history: LayerHistory, where: str) -> tuple[float, str, str, str] | None:
    """(rate, metric, role, layer) of the largest loss in a pass, each averaged over the run; None if unmeasured."""
    lost = {row.name for row in metrics() if row.lost and row.of_operands is (where != "update")}
    found = [
        (float(np.nanmean(values)), name, role, layer)
        for (name, role, layer), values in history.items()
        if name in lost and role in PASSES[where] and not np.isnan(values).all()
    ]
    return max(found, default=None)


def run_means(history: LayerHistory) -> dict[str, float]:
    """Column name -> one number for the run of each metric and role: the mean over the run, over layers as its row says.

    Such as `layers_overflow_grad_output`: of each layer's mean overflow the largest.
    """
    by_column: dict[tuple[str, str], list[float]] = {}
    for (name, role, _), values in history.items():
        if not np.isnan(values).all():
            by_column.setdefault((name, role), []).append(float(np.nanmean(values)))
    found = {}
    for (name, role), values in by_column.items():
        row = find_metric(name)
        if row is not None and row.over_layers is not None:
            found[f"layers_{name}_{role}"] = float(row.over_layers(values))
    return found


def layer_type(layer: str) -> str:
    """Names of like layers made equal: "blocks.3.attn.qkv" -> "blocks.*.attn.qkv"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", layer)


def sqnr_by_type(history: LayerHistory, role: str) -> dict[str, float]:
    """Layer type -> mean SQNR in dB of its tensors in `role`, over layers and steps."""
    by_type: dict[str, list[float]] = {}
    for (name, r, layer), values in history.items():
        if name == "sqnr_db" and r == role and not np.isnan(values).all():
            by_type.setdefault(layer_type(layer), []).append(float(np.nanmean(values)))
    return {name: float(np.mean(values)) for name, values in by_type.items()}
