"""Writes the study report: many runs on one page that answers the question with error bars, and its data as tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from altgrad.analysis.ranking import Ranked, rank
from altgrad.analysis.statistics import NoiseFloor, noise_floor
from altgrad.analysis.study import FORMAT, OPTIMIZER, STORAGE, Study, axis_name, load_study
from altgrad.analysis.study_figures import (
    band_figure,
    heat_figures,
    heat_words,
    layer_sections,
    ranking_figure,
    seeds_text,
    timeline_figure,
)
from altgrad.analysis.study_tables import (
    collapse_words,
    failure_modes_table,
    optimizer_table,
    ranking_table,
    run_records,
    runs_table,
    setting_records,
    sweet_spot_table,
)
from altgrad.errors import ReportError
from altgrad.records.files import write_text
from altgrad.records.folders import page_path
from altgrad.report.numbers import count, difference, listing, number, plural
from altgrad.report.pages.page import render_markdown, render_page
from altgrad.report.text import for_spreadsheet

_AXIS_NAMES = {FORMAT: "format", OPTIMIZER: "optimizer", STORAGE: "weight storage"}


def write_study(
    source: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    title: str | None = None,
    force: bool = False,
) -> Path:
    """Report on all runs at or below a folder (or on the run folders given one by one); returns the page's path.

    `out` names the page (.html) or a folder for it; by default it is study.html in the folder of the runs. Beside the
    page go the same as Markdown, and `<name>-runs` and `<name>-settings` as CSV, and as Parquet where pyarrow is
    installed. Raises ReportError for no runs and for runs that are no fair comparison, unless `force`, which marks the
    page instead.
    """
    study = load_study(source, force=force)
    page = Path(out) if out is not None else page_path(study.folder, "study.html")
    if page.suffix.lower() not in (".html", ".htm"):
        if page.suffix:
            raise ReportError(f"the report's path {page} does not end in .html; name the page, or a folder for it")
        page = page / "study.html"
    ranked = rank_study(study)
    page.parent.mkdir(parents=True, exist_ok=True)
    exported = export(study, ranked, page)
    content = study_content(study, ranked, page.resolve().parent, title=title, exported=exported)
    write_text(page.with_suffix(".md"), render_markdown("study.md.j2", **content))
    write_text(page, render_page("study.html.j2", **content))
    return page


def rank_study(study: Study) -> list[Ranked]:
    """The quantized settings ranked together, each compared with its own baseline."""
    ranked: dict[str, Ranked] = {}
    contenders = [setting.contender for setting in study.quantized]
    places = rank(contenders)
    by_baseline: dict[str | None, list] = {}
    for setting in study.quantized:
        baseline = study.baseline_of(setting)
        by_baseline.setdefault(baseline.label if baseline else None, []).append((setting, baseline))
    compared: dict[str, Ranked] = {}
    for members in by_baseline.values():
        baseline = members[0][1]
        group = rank([s.contender for s, _ in members], baseline.contender if baseline else None)
        compared |= {r.name: r for r in group}
    p_values = _corrected_together(compared)
    for r in places:
        own = compared[r.name]
        ranked[r.name] = Ranked(
            r.name,
            r.estimate,
            own.against_baseline,
            p_values.get(r.name),
            r.best,
            r.worst,
            r.unresolved_with,
            r.collapsed,
            r.runs,
        )
    return list(ranked.values())


def _corrected_together(compared: Mapping[str, Ranked]) -> dict[str, float]:
    from altgrad.analysis.statistics import holm

    raw = {
        name: r.against_baseline.p
        for name, r in compared.items()
        if r.best is not None and r.against_baseline and r.against_baseline.p is not None
    }
    return dict(zip(raw, holm(list(raw.values())), strict=True))


def study_headline(study: Study, ranked: Sequence[Ranked]) -> str:
    """What the study says, as far as its seeds can tell."""
    standing = [r for r in ranked if r.best is not None]
    standing = [r for r in standing if r.estimate and r.estimate.n > 1] or standing  # one seed ranks nothing
    parts = []
    if standing:
        first = standing[0]
        tied = [r.name for r in standing if r.best == 1 and r is not first]
        gap = first.against_baseline.difference.mean if first.against_baseline else None
        away = f", {difference(gap)} from FP32" if gap is not None else ""
        if first.estimate and first.estimate.n < 2:
            parts.append(f"{first.name} ended lowest{away}, with one seed, which ranks nothing")
        elif len(standing) == 1:
            alone = len(ranked) > 1 and all(r.best is None for r in ranked if r is not first)
            parts.append(f"{first.name} {'alone did not collapse' if alone else 'did not collapse'}{away}")
        elif not tied:
            parts.append(f"{first.name} is best{away}")
        elif len(tied) < 4:
            parts.append(
                f"{listing([first.name, *tied])} lead; {plural(first.estimate.n if first.estimate else 0, 'seed')} cannot tell them apart"
            )
        else:
            parts.append(f"{first.name} has the lowest mean{away}, unresolved from {len(tied)} others")
    fallen = collapse_words(study)
    if fallen:
        parts.append(
            listing(fallen)
            if len(fallen) <= 2
            else f"{plural(sum(r.collapsed for r in ranked), 'run')} of {plural(len(fallen), 'setting')} collapsed"
        )
    return "; ".join(parts) + "." if parts else f"{plural(len(study.runs), 'run')} without a result yet."


def study_content(
    study: Study, ranked: Sequence[Ranked], folder: Path, *, title: str | None, exported: Sequence[str]
) -> dict[str, Any]:
    """Everything the templates show."""
    said = study_headline(study, ranked)
    baselines = [s for s in study.settings if s.is_baseline]
    floor = noise_floor(baselines[0].contender.losses) if baselines else None
    heats = heat_figures(study, ranked)
    layers = layer_sections(study, ranked)
    modes, spots, optimizers = failure_modes_table(study), sweet_spot_table(study), optimizer_table(study)
    timeline = timeline_figure(study)
    contents = [
        ("ranking", "Ranking"),
        ("curves", "Loss curves"),
        ("map", "Map") if heats else None,
        ("failures", "Failures") if timeline or modes else None,
        ("optimizers", "Optimizers") if optimizers else None,
        ("layers", "Layers") if layers or spots else None,
        ("runs", "Every run"),
    ]
    axes = [_AXIS_NAMES.get(axis, axis_name(axis)) for axis in study.axes]
    return {
        "title": title or f"AltGrad: {said}",
        "kind": "study",
        "headline": title or said,
        "facts": [
            plural(len(study.runs), "run"),
            plural(len(study.settings), "setting"),
            seeds_text(study.seeds),
            f"{count(study.max_steps)} steps",
        ],
        "lede": ([said] if title else []) + [_lede(axes, study.unsaid, floor)],
        "warnings": list(study.warnings),
        "remarks": list(study.remarks),
        "contents": [entry for entry in contents if entry],
        "ranking_figure": ranking_figure(study, ranked, floor),
        "ranking": ranking_table(study, ranked),
        "ranking_notes": _notes(ranked),
        "band_figure": band_figure(study, ranked),
        "heats": heats,
        "heats_say": heat_words(ranked),
        "timeline": timeline,
        "collapses": collapse_words(study),
        "modes": modes,
        "optimizers": optimizers,
        "layers": layers,
        "spots": spots,
        "runs": runs_table(study, folder),
        "exported": list(exported),
        "footer": "Written by AltGrad from the run folders; this page is one file and opens offline.",
    }


def _lede(axes: Sequence[str], unsaid: Sequence[str], floor: NoiseFloor | None) -> str:
    said = f"Settings differ in {listing(list(axes))}."
    if unsaid:
        said += f" Where a name does not say: {listing(list(unsaid))}."
    if floor:
        said += (
            f" Noise floor: FP32's final loss has a standard deviation of {number(floor.sd, 2)} nats over seeds "
            f"(95% interval {number(floor.low, 2)} to {number(floor.high, 2)}, {seeds_text(floor.seeds)})."
        )
    else:
        said += " Fewer than two FP32 runs: the noise floor is not known."
    return said


def _notes(ranked: Sequence[Ranked]) -> list[str]:
    methods = {r.against_baseline.difference.method for r in ranked if r.against_baseline}
    notes = ["Differences are paired: each run minus the FP32 run of the same seed, which sees the same batches."]
    if "Student's t" in methods:
        notes.append(
            "With fewer than 20 seeds the interval is Student's t of the paired differences: the bootstrap's would be too narrow. "
            "The bootstrap's is in the exported table of settings."
        )
    if any(r.collapsed for r in ranked):
        notes.append(
            "Settings of which a run collapsed are not ranked: the mean of the runs that reached the last step would reward collapsing. Where it is given, it is over those runs."
        )
    return notes


def export(study: Study, ranked: Sequence[Ranked], page: Path) -> list[str]:
    """Write the runs and the settings as CSV, and as Parquet where pyarrow is installed; returns the files' names."""
    written = []
    for name, records in (("runs", run_records(study)), ("settings", setting_records(study, ranked))):
        path = page.with_name(f"{page.stem}-{name}.csv")
        write_text(path, csv_text(records))
        written.append(path.name)
        if parquet := write_parquet(path.with_suffix(".parquet"), records):
            written.append(parquet.name)
    return written


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV, columns in order of first appearance; None is an empty field, and no text is a formula."""
    out = io.StringIO()
    columns = list(dict.fromkeys(key for record in records for key in record))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([for_spreadsheet(column) for column in columns])
    writer.writerows([for_spreadsheet(record.get(column)) for column in columns] for record in records)
    return out.getvalue()


def write_parquet(path: Path, records: Sequence[Mapping[str, Any]]) -> Path | None:
    """Records as Parquet; None, and nothing written, without pyarrow or without records."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return None
    if not records:
        return None
    columns = list(dict.fromkeys(key for record in records for key in record))
    table = pa.table({column: _typed([record.get(column) for record in records], pa) for column in columns})
    aside = path.with_name(f".{path.name}.aside")
    pq.write_table(table, aside)
    aside.replace(path)
    return path


def _typed(values: list[Any], pa: Any) -> Any:
    """One column; values of mixed kinds become text."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float} and float in kinds:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    return pa.array(values if len(kinds) <= 1 else [None if v is None else str(v) for v in values])
