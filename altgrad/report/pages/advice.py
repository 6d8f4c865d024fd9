"""Draws the page of an advice from its advice.json: layer x role x format, what limits each, the recipe, and its own error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from altgrad.report.charts.heat import Cell, heat_table
from altgrad.report.numbers import count, difference, duration, listing, number, percent, plural
from altgrad.report.pages.page import render_page
from altgrad.report.tables import Column, Table, TableCell
from altgrad.report.text import SYMBOLS, role_words

Data = Mapping[str, Any]
_STORAGES = {
    "nearest": "on the grid, nearest",
    "stochastic": "on the grid, stochastic",
    "master": "float32, quantized at use",
}


def render_advice(data: Data) -> str:
    """The page.

    Args:
        data: `altgrad.advise.Advice.as_dict()`, with "command" and "name" where known.
    """
    verified = data.get("verified")
    name = data.get("name") or data["facts"].get("from") or "a model"
    return render_page(
        "advice.html.j2",
        title=f"AltGrad: formats for {name}",
        kind="advice",
        headline=headline(data),
        facts=_facts(data),
        lede=[sentence(data)],
        numbers=_numbers(data),
        layers=layer_table(data),
        recipe=data["recipe_text"],
        map=_map(data),
        map_says=_MAP_SAYS,
        whole=whole_table(data),
        whole_says=_WHOLE_SAYS,
        stalls=stall_table(data),
        stall_says=_stall_says(data),
        forks=fork_table(verified) if verified else None,
        forks_say=_forks_say(verified) if verified else "",
        own=own_errors(data),
        unknown=data["unknown"],
        high=_high_table(data),
        command=data.get("command"),
        footer="Written by AltGrad. Signal to noise of tensors is predicted from spectra; no loss is promised.",
    )


def headline(data: Data) -> str:
    """What most operands get, and how many layers stay high."""
    chosen: dict[str, int] = {}
    for row in data["rows"]:
        if row["chosen"]:
            chosen[row["format"]] = chosen.get(row["format"], 0) + 1
    ranked = sorted(chosen, key=lambda fmt: -chosen[fmt])
    text = listing([f"{fmt} for {chosen[fmt]}" for fmt in ranked[:3]])
    rest = sum(chosen[fmt] for fmt in ranked[3:])
    what = "operands" if data["source"] == "trace" else "weights"
    return f"{text}{f', others for {rest}' if rest else ''} of {sum(chosen.values())} {what}."


def sentence(data: Data) -> str:
    """The budget, and what the recipe does to the gradient."""
    budget, bits = data["budget"], data["bits"]
    limits = [f"at most {plural(budget['bits'], 'bit')}"] if budget["bits"] is not None else []
    if budget["high_layers"] is not None:
        limits.append(f"at most {plural(budget['high_layers'], 'layer')} high")
    within = f" ({', '.join(limits)})" if limits else ""
    text = f"{plural(bits, 'bit')} a value on average{within}."
    if data["gradient_snr_db"] is not None:
        text += f" The gradient keeps its direction with a signal to noise of {number(data['gradient_snr_db'], 3)} dB as predicted"
        if data["measured_snr_db"] is not None:
            text += f", {number(data['measured_snr_db'], 3)} dB as measured on the next batch"
        text += "."
    if data["source"] == "weights":
        text += " This rests on weights alone."
    return text


def _facts(data: Data) -> list[str]:
    facts = data["facts"]
    shown = [plural(facts["layers"], "layer")] if "layers" in facts else []
    if "weights" in facts:
        shown.append(f"{count(facts['weights'])} weights")
    if "steps" in facts:
        shown.append(f"{plural(facts['steps'], 'float32 step')}, {facts['measured']} measured")
    return [*shown, duration(sum(v for v in data["seconds"].values() if v))]


def _numbers(data: Data) -> list[tuple[str, str]]:
    budget = data["budget"]
    allowed = f"{budget['hardware']}: " if budget["hardware"] else ""
    pairs = [("Formats allowed", f"{allowed}{', '.join(budget['formats'])}; {budget['high']} for what stays high")]
    pairs += [
        ("Weights", "float32, quantized at use" if budget["storage"] == "master" else "stored on their format's grid")
    ]
    if (tied := sum(row["tie"] for row in data["rows"])) > 0:
        pairs.append(
            (
                "Ties",
                f"{plural(tied, 'other format')} as good as the one chosen for no more bits, within {number(data['errors'].get('tie_db', 0.5), 2)} dB",
            )
        )
    for name, seconds in data["seconds"].items():
        pairs.append((name.capitalize(), duration(seconds)))
    return pairs


def layer_table(data: Data) -> Table:
    """One row for each layer: the format of each operand, with its ties."""
    by_layer: dict[str, dict[str, Data]] = {}
    ties: dict[tuple[str, str], list[str]] = {}
    for row in data["rows"]:
        if row["chosen"]:
            by_layer.setdefault(row["layer"], {})[row["role"]] = row
        if row["tie"]:
            ties.setdefault((row["layer"], row["role"]), []).append(row["format"])
    rows: list[list[TableCell | str]] = []
    for layer, roles in by_layer.items():
        cells: list[TableCell | str] = [layer]
        for role in SYMBOLS:
            if role not in roles:
                cells.append(TableCell("–" if data["source"] == "trace" else "float32", tone="quiet"))
                continue
            alike = ties.get((layer, role))
            cells.append(roles[role]["format"] + (f" (= {', '.join(alike)})" if alike else ""))
        rows.append(cells)
    heads = ("Layer", *(role_words(role).capitalize() for role in SYMBOLS))
    return Table([Column(head) for head in heads], rows, caption="Formats by layer; = marks ties")


def _map(data: Data) -> Markup:
    formats = list(dict.fromkeys(row["format"] for row in data["rows"]))
    lines: dict[tuple[str, str], dict[str, Data]] = {}
    for row in data["rows"]:
        lines.setdefault((row["layer"], row["role"]), {})[row["format"]] = row
    cells = [[_map_cell(line.get(fmt)) for fmt in formats] for line in lines.values()]
    names = [f"{layer} {SYMBOLS[role]}" for layer, role in lines]
    return heat_table(names, formats, cells, caption="Signal to noise in dB by operand and format", corner="Operand")


_SHADE_DB = 3.0  # half a bit of resolution


def _map_cell(row: Data | None) -> Cell:
    if row is None:
        return Cell(None, "–")
    if row["sqnr_db"] is None and row["limit"] not in ("exact", "resolution"):
        return Cell(None, "–", note=row["limit"])
    marks = ["chosen"] if row["chosen"] else ["tie"] if row["tie"] else []
    if row["limit"] not in ("resolution", "exact"):
        marks.append(row["limit"])
    if row["limit"] == "exact":
        return Cell(200.0, "exact", note=", ".join(marks), chosen=row["chosen"])
    if row["sqnr_db"] is None:
        return Cell(None, "–", note=", ".join(marks), chosen=row["chosen"])
    shade = _SHADE_DB * math.floor(row["sqnr_db"] / _SHADE_DB)
    return Cell(shade, f"{row['sqnr_db']:.1f}", note=", ".join(marks), chosen=row["chosen"])


_MAP_SAYS = (
    "Each number is the tensor's signal to noise ratio in dB under its own current scale. Resolution limits a format where "
    "nothing else is named; “range below” means that most of the error is in values that become zero, “range above” in "
    "values beyond the largest. Shades change every 3 dB, half a bit; what was chosen is framed."
)


_WHOLE_SAYS = (
    "The whole model in one format, as measured: the signal to noise of the direction of the gradient's mean over the next eight batches. What "
    "differs from batch to batch hardly counts in it, as in training; what counts is bias, such as that of many small values "
    "that all become zero."
)


def _ranked(data: Data) -> list[tuple[str, TableCell]]:
    ranked = sorted(data["everywhere"].items(), key=lambda one: (one[1] is None, one[1]))
    return [(fmt, _snr(error)) for fmt, error in ranked]


def whole_table(data: Data) -> Table | None:
    """Each format for every operand, the best first."""
    rows: list[list[TableCell | str]] = [list(one) for one in _ranked(data)]
    return Table([Column("Format"), Column("Gradient's SNR in dB", True)], rows) if rows else None


def whole_line(data: Data) -> str:
    """The same in a line for a terminal; empty where nothing was measured."""
    told = ", ".join(f"{fmt} {snr.text}" for fmt, snr in _ranked(data))
    return f"Whole model in one format, dB of the mean gradient's direction: {told}." if told else ""


def _snr(error: float | None) -> TableCell:
    if error is None or error >= 1e6:
        return TableCell("not finite", tone="bad")
    if error == 0:
        return TableCell("exact", sort=999.0)
    snr = -10 * math.log10(error)
    return TableCell(f"{snr:.1f}", sort=snr)


def stall_table(data: Data) -> Table | None:
    """Predicted stall by format and storage."""
    if not data["stalls"]:
        return None
    rows: list[list[TableCell | str]] = []
    for one in data["stalls"]:
        at = one["freezes_at"]
        rows.append(
            [
                one["format"],
                _STORAGES[one["storage"]],
                TableCell(percent(one["mean"]), sort=one["mean"]),
                TableCell(percent(one["end"]), sort=one["end"]),
                TableCell("never" if at is None else f"step {at}", sort=at, tone="" if at is None else "bad"),
            ]
        )
    heads = ("Weights in", "stored", "Lost on average", "At the end", "95% lost from")
    return Table([Column(head, i > 1) for i, head in enumerate(heads)], rows)


def _stall_says(data: Data) -> str:
    steps = data["stalls"][0]["steps"] if data["stalls"] else 0
    over = f"over the {steps} steps of the planned schedule" if steps else "at the steps that were traced"
    return f"An update is lost where the weight's code does not change. Averages are {over}, all layers together."


def fork_table(verified: Data) -> Table:
    """Loss above float32 of the recipe and its neighbours."""
    rows: list[list[TableCell | str]] = []
    for name, gap in verified["gaps"].items():
        error = verified["errors"].get(name)
        text = "not finite" if gap is None else f"{difference(gap)} ± {number(error, 2)}"
        kept = name == (verified["corrected_to"] or "advised")
        rows.append([name, TableCell(text, sort=gap), "kept" if kept else ""])
    return Table([Column("Recipe"), Column("Loss above float32", True), Column("")], rows, sortable=False)


def _forks_say(verified: Data) -> str:
    text = (
        f"{verified['steps']} steps each from {verified['starts']} states on the same batches as float32, whose loss is "
        f"{number(verified['float32_loss'])}; ± is a standard error over the states."
    )
    if verified["corrected_to"]:
        return f"{text} The recipe was corrected to {verified['corrected_to']!r}, which was better beyond chance."
    return f"{text} No neighbour was better beyond chance."


def own_errors(data: Data) -> list[str]:
    """What was measured of the predictions themselves, in sentences."""
    errors = data["errors"]
    lines = []
    if errors.get("sqnr_db") is not None:
        lines.append(
            f"Signal to noise against direct quantization of the next batch: off by {number(errors['sqnr_db'], 2)} dB on average."
        )
    for storage, where in _STORAGES.items():
        if (error := errors.get(f"stall_{storage}")) is not None:
            lines.append(
                f"Stall ({where}) from spectra against the exact one, coordinate by coordinate: off by {number(100 * error, 2)} points."
            )
    if (whole := errors.get("completeness")) is not None:
        lines.append(
            f"All operands low together did {number(whole, 2)} times the damage predicted for each alone, added up: 1 where errors are independent."
        )
    return lines or ["Nothing was measured: without training steps there is nothing to hold the predictions against."]


def _high_table(data: Data) -> Table | None:
    rows = [[name, reason] for name, reason in data["left_high"].items()]
    return Table([Column("Place"), Column("Why")], rows) if rows else None
