"""Writes the comparison report: the outcome of one or several runs on one page, and the same as Markdown."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from altgrad.analysis.comparability import circumstances, require_comparable
from altgrad.analysis.comparison import IGNORED_KEYS, headline, split_facts, table_row, twins
from altgrad.analysis.comparison_figures import gap_figure, loss_figure, rug_figure, stall_figure
from altgrad.analysis.outcome import Outcome, label_runs
from altgrad.analysis.remedies import cause_of, is_damaged, remedy_of
from altgrad.analysis.trouble_figures import trouble_figures, under_the_loss
from altgrad.errors import ReportError
from altgrad.records.files import write_text
from altgrad.records.run import read_run
from altgrad.report.charts.glyphs import bit_strip, line_sample
from altgrad.report.charts.svg import el
from altgrad.report.numbers import count, difference, duration, listing, loss, percent, plural
from altgrad.report.pages.page import render_markdown, render_page
from altgrad.report.tables import Column, Table, TableCell
from altgrad.report.theme import Style, styles_for
from altgrad.report.verdicts import GRADES

MOST_COLUMNS = 8
"""With more runs than this, differing facts are listed by value instead of one column per run."""

_ENVIRONMENT_FIRST = ("altgrad", "numerics_version", "commit", "torch", "numpy", "numba", "python", "device", "threads")
_ENVIRONMENT_HIDDEN = frozenset({"format"})


def write_report(
    run_dirs: str | Path | Sequence[str | Path], out_path: str | Path, *, title: str | None = None, force: bool = False
) -> Path:
    """Write the report of one run (a path) or several (a sequence) to `out_path` (HTML) and beside it as Markdown; returns
    `out_path`.

    The page is one file without outside references. Files appear whole or not at all. A run given twice counts once.
    Raises ReportError for no runs, for what is no run folder, and for runs of different corpora or code versions unless
    `force`, which marks the page instead.
    """
    out_path = Path(out_path)
    given = [run_dirs] if isinstance(run_dirs, str | Path) else run_dirs
    paths = list(dict.fromkeys(Path(path).resolve() for path in given))
    if not paths:
        raise ReportError("no runs to report on; give at least one run folder, such as runs/e3m4_uniform-s42-1a2b3c4d")
    if out_path.suffix.lower() not in (".html", ".htm"):
        raise ReportError(
            f"the report's path {out_path} does not end in .html; name the page, its Markdown goes beside it"
        )
    runs = sorted(map(read_run, paths), key=lambda run: not run.is_baseline)  # what all are compared with stands first
    outcomes = label_runs(runs)
    content = report_content(outcomes, out_path.resolve().parent, title=title, force=force)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_text(out_path.with_suffix(".md"), render_markdown("comparison.md.j2", **content))
    write_text(out_path, render_page("comparison.html.j2", **content))
    return out_path


def report_content(outcomes: Sequence[Outcome], folder: Path, *, title: str | None, force: bool) -> dict[str, Any]:
    """Everything the templates show. `folder` is where the report will lie: links are relative to it."""
    runs = [outcome.run for outcome in outcomes]
    warnings = require_comparable(runs, force=force)
    styles = styles_for([run.format for run in runs])
    same = twins(outcomes)
    said = headline(outcomes)
    differing, shared = split_facts([run.config for run in runs], IGNORED_KEYS)
    return {
        "title": title or f"AltGrad: {said}",
        "kind": "run" if len(outcomes) == 1 else "comparison",
        "facts": _facts(outcomes),
        "headline": title or said,
        "lede": ([said] if title else []) + _lede(outcomes, same),
        "warnings": warnings,
        "remarks": circumstances(runs) + _damage(outcomes),
        "loss_figure": loss_figure(outcomes, styles, same),
        "under_the_loss": under_the_loss(outcomes, styles),
        "gap_figure": gap_figure(outcomes, styles),
        "troubles": trouble_figures(outcomes, same),
        "stall_figure": stall_figure(outcomes, styles),
        "rug_figure": rug_figure(outcomes, styles),
        "results": results_table(outcomes, styles),
        "result_notes": _result_notes(outcomes),
        "verdicts": [_verdict(o, s, folder, outcomes) for o, s in zip(outcomes, styles, strict=True)],
        "differences": _differences_table(outcomes, differing) if differing else None,
        "shared": _shared_table(shared),
        "shared_summary": f"The {plural(len(shared), 'setting')} {'of this run' if len(runs) == 1 else 'that all runs share'}",
        "environment": _environment_table(outcomes),
        "footer": "Written by AltGrad from the run folders; this page is one file and opens offline.",
    }


def results_table(outcomes: Sequence[Outcome], styles: Sequence[Style]) -> Table:
    columns = [
        Column("Run"),
        Column("Verdict"),
        Column("vs FP32", True, "final validation loss minus that of the unquantized run of the same seed"),
        Column("Stall", True, "share of attempted weight updates that changed no code"),
        Column("Validation loss", True, "at the last evaluation; the best one below it"),
        Column("Training loss", True, "of the last step; the best one below it"),
        Column("Steps", True),
        Column("Time", True),
    ]
    rows = []
    for outcome, style in zip(outcomes, styles, strict=True):
        row = table_row(outcome)
        name = el(
            "span",
            line_sample(style),
            el("span", outcome.label),
            bit_strip(outcome.run.format),
            class_=f"run-name {style.css}",
        )
        gap = row["against_baseline"]
        rows.append(
            [
                TableCell(outcome.label, name, outcome.label),
                TableCell(row["verdict"], tone="bad" if outcome.collapsed else ""),
                TableCell("baseline", tone="quiet")
                if outcome.run.is_baseline
                else TableCell(difference(gap), sort=_key(gap)),
                TableCell(percent(row["stall_rate"]), sort=_key(row["stall_rate"])),
                _loss_cell(row["final_val_loss"], row["best_val_loss"]),
                _loss_cell(row["final_loss"], row["best_loss"]),
                TableCell(_steps(row["steps"], row["max_steps"]), sort=_key(row["steps"])),
                TableCell(duration(row["wall_s"]), sort=_key(row["wall_s"])),
            ]
        )
    return Table(columns, rows, groups=[o.label for o in outcomes])


def _loss_cell(final: float | None, best: float | None) -> TableCell:
    if final is None:
        return TableCell(loss(None))
    text = f"{loss(final)} (best {loss(best)})" if best is not None else loss(final)
    html = Markup("{}{}").format(loss(final), el("small", f"best {loss(best)}") if best is not None else "")
    return TableCell(text, html, _key(final))


def _key(value: float | None) -> float | None:
    """Sort key: what is not a finite number sorts last."""
    return value if value is not None and value == value and abs(value) != float("inf") else None


def _steps(steps: int | None, most: int | None) -> str:
    return count(steps) if most is None or steps == most else f"{count(steps)} of {count(most)}"


def _facts(outcomes: Sequence[Outcome]) -> list[str]:
    runs = [o.run for o in outcomes]
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    steps = {run.max_steps for run in runs if run.max_steps}
    sources = {
        str(section.get("source"))
        for run in runs
        if isinstance(section := run.config.get("data"), Mapping) and section.get("source")
    }
    facts = [plural(len(runs), "run")] if len(runs) > 1 else [runs[0].run_id]
    if seeds:
        facts.append(
            f"seed{'s' if len(seeds) > 1 else ''} {listing([str(s) for s in seeds[:6]])}"
            + (" ..." if len(seeds) > 6 else "")
        )
    if len(steps) == 1:
        facts.append(f"{count(next(iter(steps)))} steps")
    if len(sources) == 1:
        facts.append(f"corpus {next(iter(sources))}")
    return facts


def _lede(outcomes: Sequence[Outcome], same: Mapping[str, str]) -> list[str]:
    sentences = [
        f"{label} has the same training loss as {other} at every recorded step, to the last bit."
        for label, other in same.items()
    ]
    if len(outcomes) > 1:
        seeds: dict[tuple, set] = {}
        for outcome in outcomes:
            run = outcome.run
            seeds.setdefault((run.format, run.storage, run.optimizer, run.rounding), set()).add(run.seed)
        if all(len(s) == 1 for s in seeds.values()):
            sentences.append(
                "One seed per setting: how much of a small difference is chance cannot be told from this page. "
                "A sweep over seeds, reported as a study, gives intervals."
            )
    return [" ".join(sentences)] if sentences else []


def _result_notes(outcomes: Sequence[Outcome]) -> list[str]:
    notes = []
    if any(o.grade for o in outcomes):
        notes.append(GRADES)
    if any(o.baseline for o in outcomes):
        notes.append(
            "vs FP32: final validation loss minus that of the unquantized run of the same seed (training loss where there is no validation)."
        )
    storages = {o.run.storage for o in outcomes if not o.run.is_baseline}
    if any(o.run.number("stall_rate") is not None for o in outcomes):
        where = f" Weight storage: {listing(sorted(str(s) for s in storages if s))}." if storages - {None} else ""
        notes.append(
            f"Stall: share of attempted, nonzero weight updates after which the stored code was unchanged.{where}"
        )
    return notes


def _verdict(outcome: Outcome, style: Style, folder: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    cause, remedy = cause_of(outcome.run), remedy_of(outcome, outcomes)
    damaged = is_damaged(outcome)
    return {
        "cause": cause,
        "cause_page": relative_link(cause.page, folder) if cause and cause.page.is_file() else None,
        "find_cause": f"altgrad autopsy {outcome.run.path}" if damaged and cause is None else None,
        "remedy": remedy,
        "remedy_gap": None if remedy is None else difference(remedy.saved.gap),
        "label": outcome.label,
        "css": style.css,
        "sample": line_sample(style),
        "bits": bit_strip(outcome.run.format),
        "collapsed": outcome.collapsed,
        "said": outcome.said,
        "evidence": outcome.evidence(),
        "failure_reports": [(relative_link(page, folder), page.stem) for page in outcome.run.failure_reports],
    }


def relative_link(target: Path, folder: Path) -> str:
    """A link from a page in `folder` to `target`, as a quoted relative URL."""
    return quote(Path(os.path.relpath(target.resolve(), folder)).as_posix())


def _damage(outcomes: Sequence[Outcome]) -> list[str]:
    found = []
    for outcome in outcomes:
        if outcome.metrics.damage:
            found.append(f"{outcome.label}: {outcome.metrics.damage.said()}.")
        found += [
            f"{outcome.label}: {problem}." for problem in outcome.run.problems if problem != "result.json is missing"
        ]
    return found


def _differences_table(outcomes: Sequence[Outcome], differing: Mapping[str, Sequence[Any]]) -> Table:
    reference = next((i for i, o in enumerate(outcomes) if o.run.is_baseline), 0)
    if len(outcomes) > MOST_COLUMNS:
        rows = [[key, _by_value(values)] for key, values in differing.items()]
        return Table([Column("Setting"), Column("Values")], rows, "Settings that differ between runs", sortable=False)
    rows = [
        [
            key,
            *(TableCell(_setting(v), tone="changed" if v != values[reference] else "") for v in values),
        ]
        for key, values in differing.items()
    ]
    caption = f"Settings that differ; marked where they differ from {outcomes[reference].label}"
    return Table([Column("Setting"), *(Column(o.label) for o in outcomes)], rows, caption, sortable=False)


def _shared_table(shared: Mapping[str, Any]) -> Table:
    rows = [[key, _setting(value)] for key, value in shared.items()]
    return Table([Column("Setting"), Column("Value")], rows, sortable=False)


def _environment_table(outcomes: Sequence[Outcome]) -> Table:
    sources = [{k: v for k, v in o.run.environment.items() if k not in _ENVIRONMENT_HIDDEN} for o in outcomes]
    differing, shared = split_facts(sources)
    merged = {key: [_setting(shared[key])] for key in shared} | {
        k: [_setting(v) for v in vs] for k, vs in differing.items()
    }
    order = sorted(merged, key=lambda key: _ENVIRONMENT_FIRST.index(key) if key in _ENVIRONMENT_FIRST else 99)
    rows: list[list[TableCell | str]] = []
    for key in order:
        values = merged[key]
        same = len(values) == 1
        rows.append(
            [key, values[0] if same else TableCell(_by_value(values, [o.label for o in outcomes]), tone="changed")]
        )
    return Table([Column("Fact"), Column("Value")], rows, sortable=False)


def _by_value(values: Sequence[Any], names: Sequence[str] | None = None) -> str:
    """ "a (3 runs), b (1 run)", or with `names`: "a (E3M4, E5M2), b (FP32)"."""
    groups: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(_setting(value), []).append(i)
    few = names is not None and len(values) <= MOST_COLUMNS
    return ", ".join(
        f"{value} ({', '.join(names[i] for i in who) if few and names else plural(len(who), 'run')})"
        for value, who in groups.items()
    )


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
