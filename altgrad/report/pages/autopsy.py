"""Draws the page of an autopsy from its verdict.json: one offline HTML file, and the same as Markdown.

Words are fixed: a set of cells *caused* the damage (its rescue closes most of the gap, and it does most of it alone),
*contributed*, is *exonerated* (with the reason), or is *inconclusive*. No share stands without its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from altgrad.report.charts.figures import line_figure
from altgrad.report.charts.lines import Mark, Series, thin
from altgrad.report.charts.rows import IntervalRow, interval_chart
from altgrad.report.charts.svg import breakable, el
from altgrad.report.numbers import count, duration, loss, number, percent, plural
from altgrad.report.pages.page import render_markdown, render_page
from altgrad.report.tables import Column, Table, TableCell
from altgrad.report.text import shortened
from altgrad.report.theme import Style
from altgrad.report.verdicts import CAUSED, CONTRIBUTED

Data = Mapping[str, Any]

_LEVELS = {
    "phenomenon": "that there is, or is no, damage",
    "bound": "when it began",
    "boundary": "which roles it needs",
    "cause": "which cells caused it",
    "repair": "what would have saved the run",
}
_NOT_CELLS = "what else than precision it was"
_ROLE_NAMES = {
    "forward.input": "x, forward",
    "forward.weight": "w, forward",
    "input_grad.grad_output": "dy, input gradient",
    "input_grad.weight": "w, input gradient",
    "weight_grad.grad_output": "dy, weight gradient",
    "weight_grad.input": "x, weight gradient",
    "storage": "stored weight",
    "norm_weight": "norm weight",
}


def render_autopsy(data: Data) -> tuple[str, str]:
    """(html, markdown) of a verdict.

    Args:
        data: `altgrad.autopsy.Verdict.as_dict()` with, where known, "losses" ({"run": [...], "twin": [...]} by step),
            "places" ({cell: [layer, gemm, role]}), "run" (facts: run_id, seed, formats), "command", "saving" (a recipe's
            text).
    """
    content = {
        "title": f"AltGrad: {data['sentence']}",
        "kind": "autopsy",
        "headline": _headline(data),
        "facts": _facts(data),
        "lede": [data["sentence"]] if data["sentence"] != _headline(data) else [],
        "remarks": _remarks(data),
        "numbers": _numbers(data),
        "sets": _set_table(data),
        "interventions": _intervention_table(data),
        "gates": list(data.get("gates", ())),
        "saving": data.get("saving"),
        "saves": _saves(data),
        "command": data.get("command"),
        "footer": "Written by AltGrad. Every share is measured by forks of the replayed run, against its float32 twin on the "
        "same batches.",
    }
    html = render_page(
        "autopsy.html.j2",
        **content,
        strip=_strip(data),
        ladder=_ladder(data),
        bars=_bars(data),
        cell_map=_cell_map(data),
    )
    return html, render_markdown("autopsy.md.j2", **content, cell_map=_map_table(data))


# -- words ----------------------------------------------------------------------------------------------------------


def _headline(data: Data) -> str:
    if data["kind"] != "cause":
        return data["sentence"].split(":")[0].rstrip(".") + "."
    return f"{_who(data['cells'])} caused it: {data['mechanism']}."


def _who(cells: Sequence[str]) -> str:
    """Two cells by name, more of them by what they share."""
    if len(cells) <= 2:
        return " and ".join(cells)
    endings = {cell.split(".")[-1] for cell in cells}
    layers = {_layer(cell) for cell in cells}
    where = next(iter(layers)) if len(layers) == 1 else plural(len(layers), "layer")
    role = f"The {next(iter(endings))}" if len(endings) == 1 else f"{len(cells)} cells"
    return f"{role} of {where}"


def _layer(cell: str) -> str:
    return cell.removesuffix(".storage") if cell.endswith(".storage") else ".".join(cell.split(".")[:-2])


def _set_name(cells: Sequence[str]) -> str:
    """A set by its one cell, or by how many of which layer it has."""
    layers = {_layer(cell) for cell in cells}
    if len(cells) == 1:
        return cells[0]
    return f"{plural(len(cells), 'cell')} of {next(iter(layers)) if len(layers) == 1 else plural(len(layers), 'layer')}"


def _facts(data: Data) -> list[str]:
    run = data.get("run") or {}
    facts = [str(run[key]) for key in ("run_id", "formats") if run.get(key) is not None]
    facts += [f"seed {run['seed']}"] if run.get("seed") is not None else []
    return [*facts, plural(data["forks"], "fork"), duration(data["seconds"])]


def _remarks(data: Data) -> list[str]:
    level = data.get("level")
    says = _NOT_CELLS if level == "cause" and data["kind"] == "not precision" else _LEVELS.get(str(level))
    remarks = [f"Level reached: {level} ({says})."] if says else []
    if data["kind"] == "cause":
        sure = data.get("confidence")
        remarks.append(
            "Confidence: not calibrated for a case like this."
            if sure is None
            else f"Confidence: {percent(sure)}, by calibrated cases of like damage and structure."
        )
    return remarks


def _numbers(data: Data) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []

    def add(name: str, value: Any, text: str) -> None:
        if value is not None:
            pairs.append((name, text))

    window = data.get("window")
    add("Onset", data.get("onset"), f"step {data.get('onset')}")
    add("At work since", data.get("acts_from"), f"step {data.get('acts_from')}")
    given = data.get("recovery")
    late = f"{plural(given, 'step')} of float32 no longer save the run" if given else "float32 no longer saves the run"
    add("Point of no return", data.get("no_return"), f"after step {data.get('no_return')}; {late}")
    add("Verdict of the run", data.get("symptom"), f"step {data.get('symptom')}")
    if window is not None:
        pairs.append(("Compared over", f"steps {window[0] + 1} to {window[1]}"))
    damage, noise = data.get("damage"), data.get("noise")
    if damage is not None:
        scatter = f"; single draws scatter by {number(noise, 2)}" if noise is not None else ""
        pairs.append(("Damage", f"{loss(damage)} nats above the float32 twin{scatter}"))
    reached = data.get("over_run")
    add("Over the whole run", reached, f"the rescue closes {share_text(reached)} of the gap")
    add("It began with", data.get("first") or None, ", ".join(data.get("first") or ()))
    add("Structure", data.get("structure"), _STRUCTURES.get(str(data.get("structure")), ""))
    return pairs


_STRUCTURES = {
    "single": "one cell",
    "redundant": "redundant: each set does the damage alone, so no single rescue shows it",
    "interacting": "interacting: only together do they do damage",
    "cumulative": "cumulative: each set does a part",
    "spread": "spread: all layers of these roles share it",
}


def share_text(share: Data | None) -> str:
    """A share with its interval, as in "97% [93%, 101%]"."""
    if share is None:
        return "not measured"
    return f"{percent(share['value'])} [{percent(share['low'])}, {percent(share['high'])}]"


def word_for(rescue: Data | None, alone: Data | None) -> str:
    """Caused, contributed, exonerated or inconclusive, by the intervals of both directions."""
    known = [share for share in (rescue, alone) if share is not None]
    if not known:
        return "inconclusive"
    if len(known) == 2 and all(share["value"] >= CAUSED for share in known):
        return "caused"
    if any(share["low"] >= CONTRIBUTED for share in known):
        return "contributed"
    return "exonerated" if all(share["high"] < CONTRIBUTED for share in known) else "inconclusive"


# -- tables -----------------------------------------------------------------------------------------------------------


def _sets(data: Data) -> list[tuple[str, Data]]:
    rows: list[tuple[str, Data]] = []
    if data.get("rescue") is not None:
        rows.append(
            (
                "all found",
                {
                    "cells": data["cells"],
                    "rescue": data["rescue"],
                    "alone": data.get("alone_over_run") or data.get("alone"),
                },
            )
        )
    rows += [(f"set {i + 1}", one) for i, one in enumerate(data.get("groups", ()))]
    rows += [("layer" if len(one["cells"]) > 1 else "cell", one) for one in data.get("members", ())]
    rows += [("placebo", one) for one in data.get("placebos", ())]
    return rows


def _set_table(data: Data) -> Table | None:
    rows = [
        [
            _set_cell(kind, one),
            _word(kind, one),
            share_text(one.get("rescue")),
            share_text(one.get("alone")),
        ]
        for kind, one in _sets(data)
    ]
    columns = [
        Column("Set, and its cells"),
        Column("Found"),
        Column("Rescue closes", True),
        Column("Alone does", True),
    ]
    return Table(columns, rows, caption="Every set of cells that was rescued", sortable=False) if rows else None


def _set_cell(kind: str, one: Data) -> TableCell:
    cells = ", ".join(one["cells"]) if len(one["cells"]) <= 4 else _set_name(one["cells"])
    return TableCell(f"{kind}: {cells}", Markup("{}{}").format(kind, el("small", breakable(cells))))


def _word(kind: str, one: Data) -> str:
    return "control" if kind == "placebo" else word_for(one.get("rescue"), one.get("alone"))


def _intervention_table(data: Data) -> Table | None:
    rows = [
        [
            one["says"],
            _closed_cell(one),
            TableCell(
                "none"
                if not one["cost_bits"]
                else f"{one['cost_bits']:g} bit{'s' if one['cost_bits'] != 1 else ''} a value",
                sort=one["cost_bits"],
            ),
        ]
        for one in _interventions(data)
    ]
    columns = [Column("On the cells found"), Column("Gap closed", True), Column("Storage it adds", True)]
    return Table(columns, rows, caption="Every change of the cells found", sortable=len(rows) > 3) if rows else None


def _closed_cell(one: Data) -> TableCell:
    if one["closed"]:
        return TableCell(share_text(one["closed"]), sort=_value(one))
    why = one["refused"] or "not made"
    return TableCell(why, el("span", why, class_="reason"))


def _interventions(data: Data) -> list[Data]:
    """Those that closed most first, and those that could not be made last."""
    return sorted(data.get("interventions", ()), key=lambda one: -math.inf if (v := _value(one)) is None else v)[::-1]


def _value(one: Data) -> float | None:
    return one["closed"]["value"] if one.get("closed") else None


def _saves(data: Data) -> list[str]:
    saving = [one for one in data.get("interventions", ()) if (_value(one) or 0.0) >= 0.6]
    saving.sort(key=lambda one: (one["cost_bits"] or 0.0, -(_value(one) or 0.0)))
    return [
        f"{one['says']} closes {share_text(one['closed'])}"
        + (f" and adds {plural(one['cost_bits'], 'bit')} a value" if one["cost_bits"] else " and adds no storage")
        for one in saving
    ]


# -- charts -------------------------------------------------------------------------------------------------------------


def _strip(data: Data) -> Markup | None:
    losses = data.get("losses") or {}
    if not losses.get("run"):
        return None
    marks = [
        Mark(data[key], f"{name}, step {count(data[key])}", calm=calm)
        for key, name, calm in (
            ("onset", "onset", False),
            ("no_return", "no return", False),
            ("symptom", "verdict", True),
        )
        if data.get(key)
    ]
    series = []
    for key, name, style in (("twin", "float32 twin", Style(-1)), ("run", "this run", Style(7))):
        values = np.array([np.nan if v is None else v for v in losses.get(key) or ()], dtype=np.float64)
        if len(values):
            t = thin(np.arange(1, len(values) + 1, dtype=np.float64), values, 300)
            low, high = (t.low, t.high) if t.per_bucket > 1 else (None, None)
            series.append(Series(name, t.x, t.mean, style, "", low, high))
    noise = data.get("noise")
    band = (
        f" One draw of the rounding moves the mean over the window by {number(noise, 2)} nats."
        if noise is not None
        else ""
    )
    return line_figure(
        series,
        title="Loss beside the float32 twin",
        description="Training loss of the run and of its float32 twin on the same batches, with onset, point of no return "
        "and the run's own verdict.",
        caption=f"Both see the same batches.{band}",
        y_label="training loss, nats per token",
        marks=marks,
        height=320,
    )


_LONGEST_NAME = 50
"""Characters beside a chart; the table below it has whole names."""


def _ladder(data: Data) -> Markup | None:
    rows = []
    for kind, one in _sets(data):
        share = one.get("rescue")
        if share is None:
            continue
        label = _set_name(one["cells"])
        name = {"all found": f"rescue {label}", "placebo": f"placebo: {label}"}.get(kind, f"{kind}: {label}")
        style = Style(3) if kind == "placebo" else Style(7)
        rows.append(
            IntervalRow(
                shortened(name, _LONGEST_NAME), share["value"], share["low"], share["high"], style, share_text(share)
            )
        )
    if not rows:
        return None
    return _shares(
        rows, "What rescue closes", "Share of the gap to the float32 twin that float32 in these cells closes.", data
    )


def _bars(data: Data) -> Markup | None:
    rows = [
        IntervalRow(
            one["says"],
            one["closed"]["value"],
            one["closed"]["low"],
            one["closed"]["high"],
            Style(1),
            share_text(one["closed"]),
        )
        for one in _interventions(data)
        if one.get("closed")
    ]
    if not rows:
        return None
    return _shares(
        rows, "What would have saved it", "Share of the gap that each change of the cells found closes.", data
    )


def _shares(rows: Sequence[IntervalRow], title: str, description: str, data: Data) -> Markup:
    noise, damage = data.get("noise"), data.get("damage")
    spread = 200 * noise / damage if noise is not None and damage else None
    drawn = interval_chart(
        [replace(row, **{end: _in_percent(getattr(row, end)) for end in ("estimate", "low", "high")}) for row in rows],
        title=title,
        description=description,
        x_label="percent of the gap closed",
        reference=0.0,
        reference_band=None if spread is None else (-spread, spread),
        reference_label="no effect",
    )
    grey = "" if spread is None else " Grey: what two standard deviations of a single draw of the rounding make."
    return Markup("{}{}").format(drawn, el("p", f"{description} Bars: 95% intervals.{grey}", class_="note"))


def _in_percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


# -- the map -------------------------------------------------------------------------------------------------------------


def _map(data: Data) -> tuple[list[str], list[str], dict[tuple[str, str], tuple[str, Data | None]]]:
    """(layers, roles, {(layer, role): (word, effect)}): every cell has a word, or none where nothing was asked of any."""
    places = data.get("places") or {}
    if not data.get("roles"):
        return [], [], {}
    single = {one["cells"][0]: one for _, one in _sets(data) if len(one["cells"]) == 1}
    guilty = set(data.get("cells", ()))
    layers = list(dict.fromkeys(place[0] for place in places.values()))
    roles = list(dict.fromkeys(_role(place) for place in places.values()))
    cells = {}
    for text, place in places.items():
        effect = single.get(text)
        if text in guilty:
            word = "caused" if data["kind"] == "cause" else "contributed"
        elif data["kind"] == "cause":
            word = "exonerated"
        else:
            word = word_for(effect.get("rescue"), effect.get("alone")) if effect else "inconclusive"
        cells[place[0], _role(place)] = (word, effect)
    return layers, roles, cells


def _role(place: Sequence[str]) -> str:
    _, gemm, role = place
    return _ROLE_NAMES.get(f"{gemm}.{role}", _ROLE_NAMES.get(role, f"{role}, {gemm}"))


_WHY_INNOCENT = "with the cause in float32 all these stayed low, and less than a quarter of the damage was left"


def _cell_map(data: Data) -> Markup | None:
    """Layers by roles as a table of buttons, one tab stop for all: arrows move, Enter reads, and a row for whole roles."""
    layers, roles, cells = _map(data)
    if not cells:
        return None
    head = el("tr", el("th", "layer", scope="col"), *(el("th", role, scope="col") for role in roles))
    whole = _whole_roles(data)
    body = [_map_row("all layers", roles, {role: whole[role] for role in roles if role in whole})] if whole else []
    for layer in layers:
        body.append(_map_row(layer, roles, {role: cells[layer, role] for role in roles if (layer, role) in cells}))
    legend = [el("span", el("i", class_=word), _LEGEND[word]) for word in _LEGEND if word in _words(cells, whole)]
    table = el("table", el("thead", head), el("tbody", *body), class_="cell-map")
    return el(
        "div",
        el("p", _MAP_SAYS, class_="note"),
        el("p", *legend, class_="map-legend"),
        el("div", table, class_="table-scroll", role="region", aria_label="Cells by layer and role"),
        el("p", _MAP_HINT, class_="map-reading", aria_live="polite"),
        class_="map",
    )


_MAP_SAYS = "In a cell, the share of the gap that its rescue alone closes; below it, the share of the damage that it does alone."
_MAP_HINT = "Choose a cell to read what is known of it; arrow keys move."
_LEGEND = {
    "caused": "caused",
    "contributed": "contributed",
    "inconclusive": "inconclusive",
    "exonerated": f"exonerated: {_WHY_INNOCENT}",
}


def _words(*groups: Mapping[Any, tuple[str, Data | None]]) -> set[str]:
    return {word for group in groups for word, _ in group.values()}


def _whole_roles(data: Data) -> dict[str, tuple[str, Data | None]]:
    """{role: (word, effect)} of each role in all layers, from the role screen."""
    places = data.get("places") or {}
    found: dict[str, tuple[str, Data | None]] = {}
    for one in data.get("roles", ()):
        if one["cells"] and one["cells"][0] in places:
            found[_role(places[one["cells"][0]])] = word_for(one.get("rescue"), one.get("alone")), one
    return found


def _map_row(name: str, roles: Sequence[str], cells: Mapping[str, tuple[str, Data | None]]) -> Markup:
    line = [el("th", breakable(name), scope="row")]
    for role in roles:
        if role not in cells:
            line.append(el("td", class_="cell absent"))
            continue
        word, effect = cells[role]
        rescue, alone = (None, None) if effect is None else (effect.get("rescue"), effect.get("alone"))
        shown = [] if rescue is None else [el("b", percent(rescue["value"]))]
        shown += [] if alone is None else [el("small", percent(alone["value"]))]
        said = f"{name}, {role}: {word}"
        if shown:
            said += f"; rescue closes {share_text(rescue)}, alone does {share_text(alone)}"
        elif word == "exonerated":
            said += f"; {_WHY_INNOCENT}"
        button = el("button", *(shown or [el("b", "·")]), type="button", aria_label=said)
        line.append(el("td", button, class_=f"cell {word}", data_layer=name, data_role=role, title=said))
    return el("tr", *line, class_="whole" if name == "all layers" else None)


def _map_table(data: Data) -> Table | None:
    layers, roles, cells = _map(data)
    if not cells:
        return None
    rows = [[layer, *(cells.get((layer, role), ("", None))[0] for role in roles)] for layer in layers]
    return Table([Column("Layer"), *(Column(role) for role in roles)], rows)
