"""Raw sums and counts become named metrics: vectors in, records out, on the host, all layers at once.

A record is a flat dict {"kind": "monitor", "step", "layer", "role", metric: value, ...}. A metric that was not
measured (nothing attempted, no gradient, a grid without range) has no key. Rates are fractions of the elements, stall of
the attempted updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from altgrad.diagnostics.fields import FIELD
from altgrad.records.metrics import Metric, metrics

Record = dict[str, Any]


def update_statistics(raw: np.ndarray, of_histograms: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Named metrics of measured parameters; their rows are in `altgrad.records.metrics`.

    Args:
        raw: float64 [parameters, len(UPDATE_FIELDS)].
        of_histograms: [parameters, 2], the predicted stall and the half steps of each, NaN where unknown.

    Returns:
        role -> name -> values [parameters].
    """
    v = {name: raw[:, i] for name, i in FIELD.items()}
    finite = v["count"] - v["w_nonfinite"]
    with np.errstate(all="ignore"):
        pairs = v["pairs"]
        s_mean, g_mean = v["pair_s_sum"] / pairs, v["pair_g_sum"] / pairs
        s_var = np.maximum(v["pair_s_sum_sq"] / pairs - s_mean**2, 0)
        g_var = np.maximum(v["pair_g_sum_sq"] / pairs - g_mean**2, 0)
        varies = (v["pair_s_max"] > v["pair_s_min"]) & (v["pair_g_max"] > v["pair_g_min"])
        correlation = (v["pair_gs_sum"] / pairs - s_mean * g_mean) / np.sqrt(s_var * g_var)
        error_mean = v["error_sum"] / finite
        measured_gradient = np.where(v["g_count"] > 0, 1.0, np.nan)
        finite_gradient = np.where(v["g_nonfinite"] < v["g_count"], 1.0, np.nan)  # all-NaN gradients have no norm
        return {
            "weight": {
                "l2": np.sqrt(v["w_sum_sq"]),
                "linf": v["w_amax"],
                "zero_frac": v["w_zero"] / v["count"],
                "nonfinite_frac": v["w_nonfinite"] / v["count"],
                "stiffness_mean": v["s_sum"] / v["s_count"],
                "grid_error_mean": error_mean,
                "grid_error_std": np.sqrt(np.maximum(v["error_sum_sq"] / finite - error_mean**2, 0)),
                "grid_error_max": np.where(finite > 0, v["error_max"], np.nan),
                "on_grid_frac": v["on_grid"] / finite,
            },
            "gradient": {
                "l2": np.sqrt(v["g_sum_sq"]) * finite_gradient,
                "linf": v["g_amax"] * finite_gradient,
                "elements": v["g_count"] * measured_gradient,
                "zero_frac": v["g_zero"] / v["g_count"],
                "near_zero_frac": v["g_near_zero"] / v["g_count"],
                "nonfinite_frac": v["g_nonfinite"] / v["g_count"],
                "grad_stiff_correlation": np.where(varies, np.clip(correlation, -1, 1), np.nan),
                "grad_stiff_ratio_mean": v["ratio_sum"] / pairs,
                "grad_below_stiffness_frac": v["below"] / pairs,
                "dead_outputs": v["dead_rows"],
                "dead_inputs": v["dead_columns"],
            },
            "update": {
                "l2": np.sqrt(v["u_sum_sq"]),
                "linf": v["u_amax"],
                "attempted": v["attempted"],
                "attempted_frac": v["attempted"] / v["count"],
                "flips": v["flips"],
                "flip_rate": v["flips"] / v["moves"],
                "stall": v["stalled"] / v["attempted"],
                "predicted_stall": of_histograms[:, 0],
                "half_steps": of_histograms[:, 1],
                "ulp_mean": v["ulp_sum"] / v["moves"],
                "ulp_median": v["ulp_median"],
                "ulp_max": np.where(v["moves"] > 0, v["ulp_max"], np.nan),
                "ulp_zero_frac": 1 - v["moved"] / v["moves"],
                "steps_mean": v["steps_sum"] / v["moves"],
                "steps_median": v["steps_median"],
                "steps_max": np.where(v["moves"] > 0, v["steps_max"], np.nan),
            },
        }


@dataclass(frozen=True)
class Watched:
    """One measured parameter of one step.

    Args:
        layer: its module's name (the parameter's full name where it is not the weight).
        due: groups to record.
        format: the grid that it was measured on; None: the carrier's own.
        stored: it lives on that grid, so that an update without a new code is a stall. Otherwise (a float32 master copy
            quantized at use) it is called `code_unchanged`.
        shape: of a matrix, to make its dead outputs (rows) and inputs (columns) fractions.
    """

    layer: str
    due: frozenset[str]
    format: str | None = None
    stored: bool = False
    shape: tuple[int, ...] = ()


def update_records(
    step: int, watched: Sequence[Watched], raw: np.ndarray, of_histograms: np.ndarray, added: Sequence[Metric] = ()
) -> list[Record]:
    """One record per parameter and role of what was due; `raw` and `of_histograms` as for `update_statistics`.

    `added`: rows of metrics whose values stand in further columns of `raw`.
    """
    rows_by_key = {(role, row.name): row for row in metrics() if not row.of_operands for role in row.roles}
    named = update_statistics(raw, of_histograms)
    for i, row in enumerate(added):
        rows_by_key |= {(role, row.name): row for role in row.roles}
        for role in row.roles:
            named[role][row.name] = raw[:, len(FIELD) + i]
    records: list[Record] = []
    for role, values_by_name in named.items():
        columns = [(name, values.tolist()) for name, values in values_by_name.items()]
        tables: dict[tuple, tuple[list[str], list[tuple]]] = {}  # names and rows of parameters that are told alike
        for i, one in enumerate(watched):
            alike = one.due, one.stored, one.format is None
            if alike not in tables:
                told = [
                    (name, values)
                    for name, values in ((_told_as(name, one), values) for name, values in columns)
                    if (row := rows_by_key[role, name]).group in one.due
                    and (one.format is not None or not row.needs_grid)
                ]
                rows = list(zip(*(values for _, values in told), strict=True))
                tables[alike] = [name for name, _ in told], rows or [()] * len(watched)
            names, rows = tables[alike]
            found = {name: value for name, value in zip(names, rows[i], strict=True) if value == value}
            for name, size in zip(("dead_outputs", "dead_inputs"), one.shape, strict=False):
                if name in found and size:
                    found[name] /= size
            if found:
                record: Record = {"kind": "monitor", "step": step, "layer": one.layer, "role": role}
                if one.format is not None and role != "gradient":
                    record["format"] = one.format
                records.append(record | found)
    return records


def _told_as(name: str, one: Watched) -> str:
    """The name under which a record has a metric."""
    return "code_unchanged" if name == "stall" and not one.stored else name


def operand_records(
    step: int, slots: Iterable[tuple[str, str, str]], raw: np.ndarray, blocks: Mapping[int, np.ndarray] | None = None
) -> list[Record]:
    """One record per operand (layer, role, format).

    Args:
        raw: float64 [operands, 8]: the fields of `QuantStats`, summed over the step's micro-batches (amax: largest), and
            the last scale (NaN for several). NaN counts: the operand was not quantized.
        blocks: of operands in block formats, by their index, what `measure_blocks` counted.
    """
    records = []
    for index, ((layer, role, fmt), row) in enumerate(zip(slots, raw.tolist(), strict=True)):
        amax, count, overflow, underflow, nonfinite, sse, sum_sq, scale = row
        record: Record = {"kind": "monitor", "step": step, "layer": layer, "role": role, "format": fmt}
        if count:
            record["nonfinite_frac"] = nonfinite / count
            if overflow == overflow and (nonfinite < count or overflow):  # of NaN alone nothing over- or underflows
                record |= {"overflow": overflow / count, "underflow": underflow / count}
            if nonfinite < count:
                record["amax"] = amax
        if sum_sq > 0:
            record["sqnr_db"] = 10 * math.log10(sum_sq / sse) if sse > 0 else math.inf
        if scale == scale:
            record["scale"] = scale
        records.append(record if not blocks or index not in blocks else record | block_metrics(blocks[index]))
    return records


def block_metrics(vector: np.ndarray) -> Record:
    """Named metrics of what `measure_blocks` counted; none where no block was counted."""
    count, saturated, flushed = vector[:3].tolist()
    if not count:
        return {}
    found: Record = {"blocks_saturated": saturated / count, "blocks_flushed": flushed / count}
    below = np.cumsum(vector[3:])
    if below[-1]:
        for name, share in (("block_scale_low", 0.01), ("block_scale_median", 0.5), ("block_scale_high", 0.99)):
            found[name] = float(np.searchsorted(below, share * below[-1]) - 127)
    return found
