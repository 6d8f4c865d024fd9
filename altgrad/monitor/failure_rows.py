"""What the failure report's tables are made of: the rows of `altgrad.records.metrics`, filled from a run's records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from altgrad.diagnostics.fields import NEAR_ZERO
from altgrad.records.metrics import OPERANDS, RECORD_KEYS, RUN, find_metric, mean, metrics
from altgrad.records.run import as_number
from altgrad.report.pages.failure import GradientFacts, LayerColumn, LayerRow, Trend

Record = Mapping[str, Any]
TREND_STEPS = 50
"""Steps that the trends and their charts show: as many as the freeze verdict looks back over."""

_OVER_LAYERS = {max: "largest", min: "smallest"}
_SPARSITY = ("zero_frac", "near_zero_frac", "nonfinite_frac")


def gradient_facts(records: Iterable[Record], near_zero: float = NEAR_ZERO) -> GradientFacts | None:
    """Sparsity over the gradient elements of all parameters of one step, measured with that threshold."""
    found = [r for r in records if r["role"] == "gradient" and r.get("elements")]
    elements = sum(r["elements"] for r in found)
    if not elements:
        return None
    total = {name: sum(r[name] * r["elements"] for r in found) / elements for name in _SPARSITY}
    return GradientFacts(
        step=found[0]["step"],
        zero_frac=total["zero_frac"],
        near_zero_frac=total["zero_frac"] + total["near_zero_frac"],
        near_zero_threshold=near_zero,
        nonfinite_frac=total["nonfinite_frac"],
        elements=int(elements),
    )


def layer_rows(records: Iterable[Record]) -> list[LayerRow]:
    """The tabled metrics of each operand; those of a layer's parameter stand in its weight's row.

    An operand has a row where a share of numbers lost was measured, or where it was not finite.
    """
    tabled = [row for row in metrics() if row.tabled]
    rows: dict[tuple[str, str], dict[str, float | None]] = {}
    of_parameters: dict[str, dict[str, float | None]] = {}
    for record in records:
        layer, role = record["layer"], record["role"]
        if role in OPERANDS:
            rows.setdefault((layer, role), {})
        for row in tabled:
            if role in row.roles and row.name in record:
                found = rows.setdefault((layer, role), {}) if row.of_operands else of_parameters.setdefault(layer, {})
                found[row.name] = as_number(record[row.name])
    places = {layer: i for i, layer in enumerate(dict.fromkeys(layer for layer, _ in rows))}
    lost = {row.name for row in tabled if row.lost}
    found = []
    for (layer, role), values in sorted(rows.items(), key=lambda row: (places[row[0][0]], OPERANDS.index(row[0][1]))):
        values |= of_parameters.get(layer, {}) if role == "weight" else {}
        if lost & set(values) or values.get("nonfinite_frac"):
            found.append(LayerRow(layer, role, values))
    return found


def layer_columns(rows: Sequence[LayerRow]) -> list[LayerColumn]:
    """The table's columns: every share of numbers lost, and what else was measured."""
    measured = {name for row in rows for name in row.values}
    tabled = [row for row in metrics() if row.tabled and (row.lost or row.name in measured)]
    tabled.sort(key=lambda row: not row.lost)
    return [LayerColumn(row.name, row.heading, row.unit, row.lost) for row in tabled]


def trends(steps: Mapping[int, Record], monitored: Sequence[Record]) -> list[Trend]:
    """The last steps of every metric: of the whole model, and of each role over its layers.

    What stands for several layers says the metric's row; a name without one (of an older or foreign record) is averaged.
    """
    recent = list(steps.values())[-TREND_STEPS:]
    found = []
    for row in metrics():
        points = [(r["step"], as_number(r.get(row.name))) for r in recent] if row.roles == RUN else []
        points = [(step, value) for step, value in points if value is not None]
        if len(points) > 1:
            found.append(
                Trend(row.name, [s for s, _ in points], [v for _, v in points], unit=row.unit, title=row.heading)
            )
    if not steps:
        return found
    first = list(steps)[-1] - TREND_STEPS
    over_layers: dict[tuple[str, str], dict[int, list[float]]] = {}
    for record in monitored:
        if record["step"] <= first:
            continue
        for name, raw in record.items():
            value = as_number(raw) if name not in RECORD_KEYS else None
            if value is not None:
                over_layers.setdefault((record["role"], name), {}).setdefault(record["step"], []).append(value)
    for (role, name), by_step in over_layers.items():
        row = find_metric(name)
        pick = mean if row is None else row.over_layers
        if pick is not None and len(by_step) > 1:
            of = f"({_OVER_LAYERS.get(pick, 'mean')} of layers)"
            told = {} if row is None else {"unit": row.unit, "title": f"{row.heading} {of}"}
            found.append(Trend(f"{name} {of}", list(by_step), [pick(v) for v in by_step.values()], role=role, **told))
    return found
