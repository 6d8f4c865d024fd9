"""The last measurements as a table that a person can read: one line per layer, the worst cases named below it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

# column title, role, statistic, format
_COLUMNS = (
    ("over in", "input", "overflow", "%"),
    ("over w", "weight", "overflow", "%"),
    ("over dY", "grad_output", "overflow", "%"),
    ("under dY", "grad_output", "underflow", "%"),
    ("SQNR in", "input", "sqnr_db", "dB"),
    ("SQNR w", "weight", "sqnr_db", "dB"),
    ("SQNR dY", "grad_output", "sqnr_db", "dB"),
    ("stall", "update", "stall", "%"),
    ("pred.", "update", "predicted_stall", "%"),
    ("same code", "update", "code_unchanged", "%"),
    ("flips", "update", "flip_rate", "%"),
    ("steps", "update", "steps_mean", "g"),
    ("|g|", "gradient", "l2", "g"),
    ("g=0", "gradient", "zero_frac", "%"),
    ("g<S", "gradient", "grad_below_stiffness_frac", "%"),
    ("rank", "weight", "effective_rank", "1"),
    ("g SNR", "gradient", "reference_snr_db", "dB"),
)


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
    from rich.console import Console
    from rich.table import Table

    layers = list(dict.fromkeys(layer for layer, _ in latest))
    if not layers:
        return "monitor: nothing measured yet"
    columns = [c for c in _COLUMNS if any(_get(latest, layer, c) is not None for layer in layers)]
    step = max(record["step"] for record in latest.values())
    shown = layers
    if len(layers) > rows:
        kept = set(sorted(layers, key=lambda layer: -_trouble(latest, layer))[:rows])
        shown = [layer for layer in layers if layer in kept]
    table = Table(title=f"monitor, last measurements up to step {step}", box=None, pad_edge=False, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for title, *_ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for layer in shown:
        table.add_row(layer, *(_text(_get(latest, layer, column), column[3]) for column in columns))
    out = io.StringIO()
    needed = max(len(layer) for layer in shown) + sum(max(9, len(c[0])) + 2 for c in columns) + 4
    Console(file=out, width=width or max(needed, 60), force_terminal=False, color_system=None).print(table)
    lines = [line.rstrip() for line in out.getvalue().rstrip().splitlines()]
    if len(shown) < len(layers):
        lines.append(f"({len(layers) - len(shown)} layers with less overflow and stall not shown)")
    lines += _worst(latest)
    if len(warnings) > 5:
        lines.append(f"({len(warnings) - 5} earlier warnings)")
    lines += [f"warning: {text}" for text in warnings[-5:]]
    return "\n".join(lines)


def _worst(latest: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """The largest overflow, underflow and stall, by name."""
    lines = []
    for statistic in ("overflow", "underflow", "stall"):
        found = [(r[statistic], layer, role) for (layer, role), r in latest.items() if r.get(statistic)]
        if found:
            value, layer, role = max(found)
            where = layer if role == "update" else f"{layer} ({role})"
            lines.append(f"largest {statistic}: {_text(value, '%')} at {where}")
    bad = [layer for (layer, role), r in latest.items() if role == "gradient" and r.get("nonfinite_frac")]
    if bad:
        worst = max(latest[layer, "gradient"]["nonfinite_frac"] for layer in bad)
        lines.append(f"non-finite gradients in {len(bad)} layers, up to {_text(worst, '%')} of the elements")
    return lines


def _trouble(latest: Mapping[tuple[str, str], Mapping[str, Any]], layer: str) -> float:
    roles = ("input", "weight", "grad_output", "update")
    return sum(latest.get((layer, role), {}).get(name) or 0.0 for role in roles for name in ("overflow", "stall"))


def _get(latest: Mapping[tuple[str, str], Mapping[str, Any]], layer: str, column: tuple[str, str, str, str]) -> Any:
    return latest.get((layer, column[1]), {}).get(column[2])


def _text(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if unit == "%":
        percent = 100 * value
        return "0" if percent == 0 else f"{percent:.2g}%" if percent < 1 else f"{percent:.1f}%"
    if unit == "dB":
        return f"{value:.1f} dB"
    return f"{value:.1f}" if unit == "1" else f"{value:.3g}"
