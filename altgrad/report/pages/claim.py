"""Draws the page of a tried claim from its data: the verdict, every criterion with its interval, the trials, the command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from altgrad.report.charts.figures import figure
from altgrad.report.charts.rows import IntervalRow, interval_chart
from altgrad.report.numbers import MISSING, count, duration, number, plural
from altgrad.report.pages.page import render_page
from altgrad.report.tables import Column, Table, TableCell
from altgrad.report.theme import BASELINE, Style

Data = Mapping[str, Any]
OUTCOMES = {"holds": "holds", "fails": "fails", "open": "open", "told": ""}
"""How what became of a criterion is written; one without bounds decides nothing."""


DRAWN = "Rings: seeds; dot and bar: mean and 95% interval; line or grey: what the mean must meet."


def headline(data: Data) -> str:
    """The verdict in a line."""
    text = seeds_of(data)
    seeds = f" ({text} seed{'' if text == '1' else 's'})" if data["seeds"] else ""
    return f"{data['verdict'].capitalize()}{seeds}."


def seeds_of(data: Data) -> str:
    """How many seeds, and of how many where the protocol has more: the verdict of a trial that is not over."""
    made, planned = len(data["seeds"]), data["planned"]
    return f"{made} of {planned}" if 0 < made < planned and not data["quick"] else str(made)


def sentence(data: Data) -> str:
    """What the verdict rests on, what would settle what is open, and whether the criteria are those from before the run."""
    if not data["seeds"]:
        return data["needs"] or "No trial has been made."
    if data["quick"]:
        return "This was a small part of every trial, to see that it runs; leave out --quick for a verdict."
    parts = []
    of = {outcome: [f for f in data["findings"] if f["outcome"] == outcome] for outcome in OUTCOMES}
    decisive = sum(len(of[outcome]) for outcome in ("holds", "fails", "open"))
    parts.append(
        f"{len(of['holds'])} of {plural(decisive, 'criterion', 'criteria')} {'holds' if decisive == 1 else 'hold'}."
    )
    if of["fails"]:
        parts.append(
            "Failed: " + "; ".join(f"{f['says']} is {interval(f)}, not {bounds(f)}" for f in of["fails"]) + "."
        )
    parts += [f"Open: {f['says']}; {power(f)}." for f in of["open"]]
    if data["moved"]:
        parts.append("The criteria are not those that stood when the first trial was made.")
    return " ".join(parts)


def power(finding: Data) -> str:
    """What would settle an open criterion."""
    if finding["nonfinite"]:
        return f"{plural(finding['nonfinite'], 'value')} not finite"
    if finding["n"] < 2:
        return "two seeds or more give an interval"
    if finding["needed"] is None:
        return f"at this mean and spread more than {count(finding['most'])} seeds would be needed"
    return f"at this mean and spread about {count(finding['needed'])} seeds would settle it"


def interval(finding: Data) -> str:
    """Mean and 95% interval."""
    low, high = finding["interval"]
    if finding["mean"] is None:
        return MISSING
    if low is None or low == high:
        return number(finding["mean"])
    return f"{number(finding['mean'])} [{number(low)}, {number(high)}]"


def bounds(finding: Data) -> str:
    """What the mean must be."""
    low, high = finding["low"], finding["high"]
    if low is None and high is None:
        return ""
    if low is None or high is None:
        return f"at most {number(high)}" if low is None else f"at least {number(low)}"
    return f"{number(low)}" if low == high else f"{number(low)} to {number(high)}"


def render_claim(data: Data) -> str:
    """The page; `data` as `altgrad.reproduce.data.data_of` makes it."""
    source = f"arXiv:{data['paper']}" if data["url"] else data["paper"]
    second = " Figures in it are from a reading of the paper by others." if data["secondary"] else ""
    return render_page(
        "claim.html.j2",
        title=f"AltGrad: {data['name']}",
        kind="claim",
        headline=headline(data),
        facts=[source, plural(len(data["trials"]), "trial"), duration(data["seconds"])],
        lede=[data["statement"] + second],
        warnings=[sentence(data)] if data["quick"] or data["moved"] else [],
        says=sentence(data),
        criteria=criteria_table(data),
        charts=[_chart(finding) for finding in data["findings"] if finding["mean"] is not None],
        charts_say=DRAWN,
        protocol=data["protocol"],
        watch=data["watch"],
        rates="; ".join(f"{arm}: {number(rate)}" for arm, rate in data["rates"].items()),
        trials=trial_table(data),
        command=data["command"],
        footer="Written by AltGrad. Intervals are of the mean over seeds at 95%; criteria were written before the run.",
    )


def criteria_table(data: Data) -> Table:
    """One row for each quantity."""
    tones = {"fails": "bad", "open": "changed"}
    rows: list[list[TableCell | str]] = [
        [
            finding["says"],
            TableCell(OUTCOMES[finding["outcome"]] or "–", tone=tones.get(finding["outcome"], "")),
            TableCell(interval(finding), sort=finding["mean"]),
            bounds(finding) or "–",
        ]
        for finding in data["findings"]
    ]
    return Table(
        [Column("Measured"), Column("Criterion"), Column("Mean [95%]", True), Column("Must be")], rows, sortable=False
    )


def trial_table(data: Data) -> Table:
    """Every trial with its values."""
    rows: list[list[TableCell | str]] = [
        [
            trial["arm"] + (f" at {number(trial['rate'])}" if trial["rate"] is not None else ""),
            TableCell(str(trial["seed"]), sort=trial["seed"]),
            ", ".join(f"{name} {number(value)}" for name, value in trial["values"].items()),
        ]
        for trial in data["trials"]
    ]
    return Table([Column("Arm"), Column("Seed", True), Column("Values")], rows)


def _chart(finding: Data) -> Markup:
    low, high = finding["interval"]
    edges = [bound for bound in (finding["low"], finding["high"]) if bound is not None]
    band = (edges[0], edges[1]) if len(edges) == 2 and edges[0] < edges[1] else None
    row = IntervalRow(
        "",
        finding["mean"],
        low,
        high,
        Style(0 if edges else BASELINE),
        interval(finding),
        finding["values"],
    )
    drawn = interval_chart(
        [row],
        title=finding["says"],
        description=DRAWN,
        x_label="",
        reference=edges[0] if len(edges) == 1 or (edges and band is None) else None,
        reference_band=band,
    )
    return figure(finding["says"], drawn)
