"""The tables of the study report: ranking, failure modes, formats by layer type, optimizers, and every run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from altgrad.analysis.comparison_report import relative_link
from altgrad.analysis.layers import PASSES, mean_history, run_means, sqnr_by_type, worst_loss
from altgrad.analysis.ranking import Contender, Ranked, certainly_better
from altgrad.analysis.statistics import Comparison, estimate, holm, paired
from altgrad.analysis.study import OPTIMIZER, RunSummary, Setting, Study
from altgrad.analysis.study_figures import interval_words, seeds_short, styles_of
from altgrad.records.folders import pack_of
from altgrad.records.metrics import OPERANDS
from altgrad.report.charts.glyphs import bit_strip, line_sample
from altgrad.report.charts.svg import el
from altgrad.report.numbers import count, difference, duration, loss, number, percent, plural
from altgrad.report.tables import Column, Table, TableCell
from altgrad.report.text import role_words
from altgrad.report.verdicts import past_tense

STANDARD_OPTIMIZERS = frozenset({"adamw", "adam", "sgd", "lion", "signsgd"})
"""Move weights by real distances; every other optimizer of AltGrad knows the grid."""

ALARMING = 0.5
"""A pass that loses at least this share of its numbers in some layer is named as a failure mode."""


def _seeds(seeds: Sequence[Hashable]) -> TableCell:
    return TableCell(seeds_short(seeds), tone="nowrap")


def _open_with(r: Ranked) -> str:
    others = r.unresolved_with
    return f"with {others[0]}" if len(others) == 1 else f"with {len(others)} others"


def _place_text(r: Ranked) -> str:
    return f"{r.place} with {r.unresolved_words()}" if r.unresolved_with and r.best is not None else r.place


def _p_text(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _key(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def ranking_table(study: Study, ranked: Sequence[Ranked]) -> Table:
    """Every setting with its place, loss, difference from the baseline, and what that rests on."""
    styles = styles_of(study.settings)
    formats = {s.label: s.format for s in study.settings}
    columns = [
        Column("Setting"),
        Column("Rank"),
        Column("Final loss", True, "mean over seeds; validation loss where it was measured"),
        Column("vs FP32", True, "mean of the paired differences over seeds"),
        Column("95% interval", note="of the paired difference"),
        Column("Effect (g)", True, "Hedges' g of the paired differences"),
        Column("p (Holm)", True, "paired t-test, corrected over all settings"),
        Column("Collapsed", True),
        Column("n (seeds)"),
    ]
    rows = []
    for i, r in enumerate(ranked):
        style = styles[r.name]
        name = el(
            "span", line_sample(style), el("span", r.name), bit_strip(formats[r.name]), class_=f"run-name {style.css}"
        )
        place = Markup("{}{}").format(
            r.place,
            el("small", _open_with(r), title=r.unresolved_words(40))
            if r.unresolved_with and r.best is not None
            else "",
        )
        gap = r.against_baseline
        mean = r.estimate.mean if r.estimate else None
        rows.append(
            [
                TableCell(r.name, name, r.name),
                TableCell(_place_text(r), place, i, "" if r.best is not None else "bad"),
                TableCell(loss(mean), sort=_key(mean)),
                TableCell(
                    difference(gap.difference.mean) if gap else "–", sort=_key(gap.difference.mean) if gap else None
                ),
                TableCell(interval_words(gap.difference if gap else None), tone="nowrap"),
                TableCell(number(gap.effect, 2) if gap else "–", sort=_key(gap.effect) if gap else None),
                TableCell(_p_text(r.p_adjusted), sort=_key(r.p_adjusted)),
                TableCell(f"{r.collapsed} of {r.runs}", sort=r.collapsed, tone="bad" if r.collapsed else ""),
                _seeds(gap.difference.seeds if gap else r.estimate.seeds) if r.estimate else str(r.runs),
            ]
        )
    return Table(columns, rows, filterable=len(rows) > 12)


def failure_modes_table(study: Study) -> Table | None:
    """Per setting, where in the pass numbers are lost: the worst layer of forward, gradient and update."""
    columns = [
        Column("Setting"),
        *(Column(f"{name.capitalize()}: worst layer") for name in PASSES),
        Column("Fails in"),
        Column("Runs"),
    ]
    rows: list[list[TableCell | str]] = []
    for setting in study.quantized:
        runs = [run for run in setting.runs if run.layers]
        if not runs:
            continue
        history = mean_history([run.layers for run in runs])
        cells: list[TableCell | str] = [setting.label]
        failing = []
        for where in PASSES:
            worst = worst_loss(history, where)
            if worst is None:
                cells.append(TableCell("not measured", tone="quiet"))
                continue
            rate, statistic, role, layer = worst
            bad = rate >= ALARMING
            failing += [where] if bad else []
            detail = f"{statistic} of {role_words(role)}, {layer}"
            html = Markup("{}{}").format(percent(rate), el("small", detail))
            cells.append(TableCell(f"{percent(rate)} ({detail})", html, rate, "bad" if bad else ""))
        cells.append(" and ".join(failing) or "none")
        cells.append(_seeds(sorted({run.seed for run in runs}, key=str)))
        rows.append(cells)
    return Table(columns, rows, filterable=len(rows) > 12) if rows else None


def sweet_spot_table(study: Study) -> Table | None:
    """Per layer type and role: the format whose tensors have the highest signal-to-quantization-noise ratio."""
    scores: dict[tuple[str, str], dict[str, dict[Hashable, float]]] = {}
    for setting in study.quantized:
        for run in setting.runs:
            if run.shifts:  # measured in more than one format
                continue
            for role in OPERANDS:
                for kind, value in sqnr_by_type(run.layers, role).items():
                    scores.setdefault((kind, role), {}).setdefault(setting.format, {})[run.path.name] = value
    rows: list[list[TableCell | str]] = []
    for (kind, role), by_format in scores.items():
        contenders = [Contender(name, values, 0, len(values)) for name, values in by_format.items()]
        means = {name: estimate(list(values.values())) for name, values in by_format.items()}
        order = sorted(means, key=lambda name: -means[name].mean)
        if len(order) < 2:
            continue
        better = certainly_better(contenders, means)  # "better" is lower there: here it is the worse SQNR
        open_with = [name for name in order[1:] if (name, order[0]) not in better]
        best = order[0] if not open_with else f"unresolved: {', '.join([order[0], *open_with[:3]])}"
        top, second = means[order[0]], means[order[1]]
        rows.append(
            [
                kind,
                role_words(role),
                best,
                TableCell(f"{number(top.mean, 3)} dB", sort=top.mean),
                f"{order[1]}, {number(second.mean, 3)} dB",
                TableCell(str(top.n), sort=top.n),
            ]
        )
    columns = [
        Column("Layer type"),
        Column("Role"),
        Column("Format"),
        Column("SQNR", True),
        Column("Next"),
        Column("Runs (n)", True),
    ]
    return Table(columns, rows, filterable=len(rows) > 20) if rows else None


def optimizer_table(study: Study) -> Table | None:
    """Grid-aware optimizers against the standard ones: paired differences where all other settings are equal."""
    if OPTIMIZER not in study.axes:
        return None
    found: list[tuple[Setting, Setting, Comparison]] = []
    for aware in study.quantized:
        if str(aware.values[OPTIMIZER]) in STANDARD_OPTIMIZERS:
            continue
        rest = {axis: value for axis, value in aware.values.items() if axis != OPTIMIZER}
        for standard in study.quantized:
            same = all(standard.values[axis] == value for axis, value in rest.items())
            if same and str(standard.values[OPTIMIZER]) in STANDARD_OPTIMIZERS:
                compared = paired(aware.contender.losses, standard.contender.losses)
                if compared is not None:
                    found.append((aware, standard, compared))
    if not found:
        return None
    tested = [c.p for _, _, c in found if c.p is not None]
    adjusted = iter(holm(tested))
    rows = []
    for aware, standard, compared in found:
        p = next(adjusted) if compared.p is not None else None
        d = compared.difference
        verdict = (
            "unresolved"
            if p is None or p >= 0.05 or d.mean == 0
            else "grid-aware lower"
            if d.mean < 0
            else "standard lower"
        )
        rows.append(
            [
                aware.label,
                standard.label,
                TableCell(difference(d.mean), sort=_key(d.mean)),
                TableCell(interval_words(d), tone="nowrap"),
                TableCell(number(compared.effect, 2), sort=_key(compared.effect)),
                TableCell(_p_text(p), sort=_key(p)),
                verdict,
                _seeds(d.seeds),
            ]
        )
    columns = [
        Column("Grid-aware"),
        Column("Standard"),
        Column("Difference", True),
        Column("95% interval"),
        Column("Effect (g)", True),
        Column("p (Holm)", True),
        Column("Says"),
        Column("n (seeds)"),
    ]
    return Table(columns, rows, filterable=len(rows) > 12)


def runs_table(study: Study, folder: Path) -> Table:
    """Every run, linked to its folder's report (or its folder) and to its failure report."""
    columns = [
        Column("Run"),
        Column("Setting"),
        Column("Seed", True),
        Column("Validation loss", True),
        Column("Training loss", True),
        Column("Steps", True),
        Column("Verdict"),
        Column("Stall", True),
        Column("Time", True),
        Column("Reports"),
    ]
    rows = []
    for setting in study.settings:
        baseline = None if setting.is_baseline else study.baseline_of(setting)
        of_seed = {run.seed: run for run in baseline.runs} if baseline else {}
        rows += [_run_row(run, setting, run.verdict_beside(of_seed.get(run.seed)), folder) for run in setting.runs]
    return Table(columns, rows, filterable=True)


def _run_row(run: RunSummary, setting: Setting, verdict: str, folder: Path) -> list[TableCell | str]:
    row = run.row
    own, packed = run.path / "report.html", pack_of(run.path)
    target = relative_link(packed[0] if packed else own if own.is_file() else run.path, folder)
    links = [(relative_link(page, folder), "failure report") for page in run.failure_reports[:2]]
    name = el("a", run.path.name, href=target)
    steps = (
        count(row["steps"])
        if row["steps"] == row["max_steps"]
        else f"{count(row['steps'])} of {count(row['max_steps'])}"
    )
    html = Markup(" ").join(el("a", text, href=href) for href, text in links) if links else None
    return [
        TableCell(run.path.name, name, run.path.name),
        setting.label,
        TableCell(str(run.seed), sort=run.seed if isinstance(run.seed, int) else None),
        TableCell(loss(row["final_val_loss"]), sort=_key(row["final_val_loss"])),
        TableCell(loss(row["final_loss"]), sort=_key(row["final_loss"])),
        TableCell(steps, sort=_key(row["steps"])),
        TableCell(verdict, tone="bad" if run.collapsed else "" if run.finished else "quiet"),
        TableCell(percent(row["stall_rate"]), sort=_key(row["stall_rate"])),
        TableCell(duration(row["wall_s"]), sort=_key(row["wall_s"])),
        TableCell(", ".join(text for _, text in links) or "–", html),
    ]


def run_records(study: Study) -> list[dict[str, Any]]:
    """Every run as a flat record, for CSV and Parquet: its table row, its setting, the values of the study's axes, and
    what its layers came to, per metric and role."""
    records = []
    for setting in study.settings:
        for run in setting.runs:
            axes = {axis: value for axis, value in setting.values.items() if axis not in run.row}
            records.append(
                {
                    "setting": setting.label,
                    **run.row,
                    **axes,
                    **run_means(run.layers),
                    "label": setting.label,
                    "folder": str(run.path),
                }
            )
    for record in records:
        record.pop("label")
        record.pop("against_baseline")  # is filled below, against the same seed of the setting's baseline
    _add_differences(study, records)
    return records


def _add_differences(study: Study, records: list[dict[str, Any]]) -> None:
    i = 0
    for setting in study.settings:
        baseline = study.baseline_of(setting)
        losses: Mapping = baseline.contender.losses if baseline and not setting.is_baseline else {}
        for run in setting.runs:
            known = run.final is not None and run.seed in losses
            records[i]["against_baseline"] = run.final - losses[run.seed] if known else None  # type: ignore[operator]
            i += 1


def setting_records(study: Study, ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    """Every ranked setting as a flat record with its statistics."""
    settings = {s.label: s for s in study.settings}
    records = []
    for r in ranked:
        gap = r.against_baseline
        d = gap.difference if gap else None
        boot = (d.bootstrap or (None, None)) if d else (None, None)
        records.append(
            {
                "setting": r.name,
                **settings[r.name].values,
                "rank_best": r.best,
                "rank_worst": r.worst,
                "unresolved_with": "; ".join(r.unresolved_with),
                "n": r.estimate.n if r.estimate else 0,
                "seeds": " ".join(map(str, r.estimate.seeds)) if r.estimate else "",
                "final_loss": r.estimate.mean if r.estimate else None,
                "sd": r.estimate.sd if r.estimate else None,
                "difference": d.mean if d else None,
                "low": d.low if d else None,
                "high": d.high if d else None,
                "method": d.method if d else None,
                "bootstrap_low": boot[0],
                "bootstrap_high": boot[1],
                "effect": gap.effect if gap else None,
                "p_holm": r.p_adjusted,
                "collapsed": r.collapsed,
                "runs": r.runs,
            }
        )
    return records


def collapse_words(study: Study) -> list[str]:
    """ "3 of 5 E7M0 grid froze", one per setting and kind."""
    out = []
    for setting in study.settings:
        kinds: dict[str, int] = {}
        ended = [run for run in setting.runs if run.finished or run.collapsed]
        for run in ended:
            if run.collapsed:
                verb = past_tense(run.kind)
                kinds[verb] = kinds.get(verb, 0) + 1
        out += [f"{setting.label} {verb} in {n} of {plural(len(ended), 'run')}" for verb, n in kinds.items()]
    return out
