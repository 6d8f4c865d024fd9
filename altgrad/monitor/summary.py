"""The last measurements as a table that a person can read: one line per layer, the worst cases named below it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from altgrad.records.metrics import DECIBEL, FRACTION, RUN, Metric, metrics
from altgrad.report.numbers import Unit, listing, plural
from altgrad.report.text import role_words


def _columns() -> list[tuple[str, str, Metric]]:
    """(heading, role, metric) of every metric that the summary shows, in the order of the rows."""
    return [(head, role, row) for row in metrics() for role, head in row.heads.items()]


def summary_table(
    latest: Mapping[tuple[str, str], Mapping[str, Any]],
    warnings: Sequence[str],
    *,
    rows: int = 40,
    width: int | None = None,
) -> str:
    """Plain text.

    Args:
        latest: the last record of each (layer, role).
        warnings: lines to print below.
        rows: layers shown; those with the most overflow and stall first among what is cut.
        width: characters per line; None: as wide as the table needs.
    """
    from rich.table import Table

    from altgrad.report.console import Terminal

    layers = list(dict.fromkeys(layer for layer, _ in latest))
    if not layers:
        return "monitor: nothing measured yet"
    columns = [c for c in _columns() if any(_get(latest, layer, c) is not None for layer in layers)]
    step = max(record["step"] for record in latest.values())
    shown = layers
    if len(layers) > rows:
        trouble = _trouble(latest)
        kept = set(sorted(layers, key=lambda layer: -trouble[layer])[:rows])
        shown = [layer for layer in layers if layer in kept]
    table = Table(title=f"monitor, last measurements up to step {step}", box=None, pad_edge=False, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in shown:
        table.add_row(layer, *(_text(_get(latest, layer, column), column[2].unit) for column in columns))
    out = io.StringIO()
    needed = max(len(layer) for layer in shown) + sum(max(9, len(c[0])) + 2 for c in columns) + 4
    Terminal(file=out, width=width or max(needed, 60), force_terminal=False, color_system=None).print(table)
    lines = [line.rstrip() for line in out.getvalue().rstrip().splitlines()]
    if len(shown) < len(layers):
        lines.append(f"({plural(len(layers) - len(shown), 'layer')} with less {listing(_lost())} not shown)")
    lines += _worst(latest)
    if len(warnings) > 5:
        lines.append(f"({plural(len(warnings) - 5, 'earlier warning')})")
    lines += [f"warning: {text}" for text in warnings[-5:]]
    return "\n".join(lines)


def _lost() -> list[str]:
    """Names of the shares of numbers lost, per layer."""
    return [row.name for row in metrics() if row.lost and row.roles != RUN]


def _worst(latest: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """The largest share of numbers lost, of each kind, by name of its layer."""
    lines = []
    for name in _lost():
        found = [(r[name], layer, role) for (layer, role), r in latest.items() if r.get(name)]
        if found:
            value, layer, role = max(found)
            where = layer if role == "update" else f"{layer} ({role_words(role)})"
            lines.append(f"largest {name}: {_text(value, FRACTION)} at {where}")
    bad = [layer for (layer, role), r in latest.items() if role == "gradient" and r.get("nonfinite_frac")]
    if bad:
        worst = max(latest[layer, "gradient"]["nonfinite_frac"] for layer in bad)
        lines.append(
            f"non-finite gradients in {plural(len(bad), 'layer')}, up to {_text(worst, FRACTION)} of the elements"
        )
    return lines


def _trouble(latest: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, float]:
    """Layer -> the sum of all that it loses."""
    total: dict[str, float] = {}
    for (layer, _), record in latest.items():
        total[layer] = total.get(layer, 0.0) + sum(record.get(name) or 0.0 for name in _lost())
    return total


def _get(latest: Mapping[tuple[str, str], Mapping[str, Any]], layer: str, column: tuple[str, str, Metric]) -> Any:
    _, role, row = column
    return latest.get((layer, role), {}).get(row.name)


def _text(value: float | None, unit: Unit) -> str:
    """Short: a table has many columns. A rate that is not zero never prints as zero."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if unit is FRACTION:
        percent = 100 * value
        return "0" if percent == 0 else f"{percent:.2g}%" if percent < 1 else f"{percent:.1f}%"
    return f"{value:.1f} dB" if unit is DECIBEL else f"{value:.3g}"
