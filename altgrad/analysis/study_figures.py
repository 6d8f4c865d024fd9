"""The figures of the study report: ranking with intervals, loss bands, heat maps, failure timeline, layers over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
from markupsafe import Markup

from altgrad.analysis.layers import LayerHistory, forward_order, mean_history, nan_mean, panel
from altgrad.analysis.ranking import Ranked
from altgrad.analysis.statistics import Estimate, NoiseFloor
from altgrad.analysis.study import CURVE_BUCKETS, FORMAT, OPTIMIZER, RunSummary, Setting, Study, axis_words
from altgrad.records.metrics import FRACTION, Metric, drawn_names, find_metric
from altgrad.report.charts.figures import figure, line_figure
from altgrad.report.charts.heat import Cell, Ramp, heat_strips, heat_table, ramp_legend
from altgrad.report.charts.lines import Mark, Series
from altgrad.report.charts.rows import IntervalRow, TimelineRow, interval_chart, timeline_chart
from altgrad.report.charts.svg import el
from altgrad.report.numbers import count, difference, in_unit, listing, loss, number, plural
from altgrad.report.text import role_words, told_apart
from altgrad.report.theme import Style, styles_for
from altgrad.report.verdicts import past_tense

MOST_CURVES = 12
MOST_RANKED = 60
MOST_LAYERED = 8
MOST_LAYERS = 48


def seeds_text(seeds: Sequence[Hashable]) -> str:
    """ "n = 5, seeds 0 to 4", or the seeds one by one when they do not follow one another."""
    if not seeds:
        return "n = 0"
    numbers = sorted(s for s in seeds if isinstance(s, int))
    if len(numbers) != len(seeds):
        return f"n = {len(seeds)}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"n = {len(numbers)}, seeds {numbers[0]} to {numbers[-1]}"
    shown = [str(s) for s in numbers[:8]] + (["..."] if len(numbers) > 8 else [])
    return f"n = {len(numbers)}, seed{'s' if len(numbers) > 1 else ''} {', '.join(shown)}"


def seeds_short(seeds: Sequence[Hashable]) -> str:
    """ "5 (0 to 4)": n and its seeds, for a table cell."""
    text = seeds_text(seeds).removeprefix("n = ")
    n, _, which = text.partition(", seed")
    return f"{n} ({which.lstrip('s ')})" if which else n


def styles_of(settings: Sequence[Setting]) -> dict[str, Style]:
    return dict(zip((s.label for s in settings), styles_for([s.format for s in settings]), strict=True))


def ranking_figure(study: Study, ranked: Sequence[Ranked], floor: NoiseFloor | None) -> Markup | None:
    """Final loss against the baseline (or itself, without one), one row per setting, best first."""
    styles = styles_of(study.settings)
    against = any(r.against_baseline for r in ranked)
    rows = []
    seeds: set[Hashable] = set()
    for r in ranked[:MOST_RANKED]:
        found = r.against_baseline.difference if r.against_baseline else None if against else r.estimate
        if found is None or r.best is None:
            continue
        seeds |= set(found.seeds)
        text = f"{difference(found.mean) if against else loss(found.mean)}, rank {r.place}"
        rows.append(IntervalRow(r.name, found.mean, found.low, found.high, styles[r.name], text))
    if not rows:
        return None
    caption = (
        f"Dots: mean over seeds ({seeds_text(sorted(seeds, key=str))} in all). Bars: {_method(ranked)}. "
        "Ranks come from paired tests between settings, corrected for many comparisons (Holm, 5%); "
        "unresolved means that the seeds at hand cannot tell the settings apart."
    )
    if floor and against:
        caption += f" Grey: one standard deviation of the FP32 runs over seeds ({number(floor.sd, 2)} nats, {seeds_text(floor.seeds)})."
    chart = interval_chart(
        rows,
        title="Final loss of each setting",
        description="; ".join(f"{row.name}: {row.text}" for row in rows[:20]),
        x_label="final validation loss minus FP32's of the same seed, nats" if against else "final loss, nats",
        reference=0.0 if against else None,
        reference_band=(-floor.sd, floor.sd) if floor and against else None,
        reference_label="FP32" if against else "",
    )
    return figure("Final loss against FP32" if against else "Final loss", chart, caption)


def _method(ranked: Sequence[Ranked]) -> str:
    used = {
        e.method
        for r in ranked
        if r.best is not None and (e := r.against_baseline.difference if r.against_baseline else r.estimate)
    }
    named = [m for m in ("Student's t", "BCa bootstrap") if m in used]
    return f"95% intervals by {listing(named)}" if named else "none, as there is one seed"


def band_figure(study: Study, ranked: Sequence[Ranked]) -> Markup | None:
    """Mean loss over seeds with the range from the lowest to the highest seed, for the settings that matter most."""
    order = [s for s in study.settings if s.is_baseline] + [_by_label(study, r.name) for r in ranked]
    shown = _chosen(order)
    styles = styles_of(study.settings)
    series: list[Series] = []
    marks = []
    evaluated = any(len(run.validation) for s in shown for run in s.runs)
    x_train = (np.arange(CURVE_BUCKETS) + 0.5) * study.max_steps / CURVE_BUCKETS
    for setting in shown:
        style = styles[setting.label]
        runs = [run for run in setting.runs if run.finished] or list(setting.runs)
        if evaluated:
            steps, rows = aligned_validation(runs)
            if len(steps):
                series.append(_band(setting.label, steps, rows, style, "validation", faint=False))
        rows = np.stack([run.train for run in runs]).astype(np.float64)
        series.append(_band(setting.label, x_train, rows, style, "train", faint=evaluated))
        onsets = [run.onset for run in runs if run.onset is not None]
        if onsets:
            verb = past_tense(Counter(run.kind for run in runs if run.collapsed).most_common(1)[0][0])
            words = f"{setting.label} {verb}, step {count(min(onsets))}" + (" on" if len(onsets) > 1 else "")
            marks.append(Mark(min(onsets), words, None, setting.label))
    if not series:
        return None
    left_out = len(study.settings) - len(shown)
    caption = [
        f"Lines: mean over seeds ({seeds_text(study.seeds)}); bands: lowest to highest seed.",
        "A line ends where the first of its runs ends.",
    ]
    if left_out:
        caption.append(
            f"Shown are the baseline, the best of each format and the best overall; {plural(left_out, 'setting')} left out."
        )
    top = _top(shown)
    return line_figure(
        series,
        title="Loss over training",
        description=f"Mean loss with bands over seeds for {listing([s.label for s in shown])}.",
        caption=" ".join(caption),
        y_label="cross-entropy, nats per token",
        marks=sorted(marks, key=lambda m: m.x)[:6],
        height=440,
        y_top=top,
        formats={s.label: s.format for s in shown},
    )


def _chosen(order: Sequence[Setting]) -> list[Setting]:
    """At most `MOST_CURVES`: the baselines first, then the best of each format, then the best of the rest."""
    seen: set[str] = set()
    first = [s for s in order if s.format not in seen and not seen.add(s.format)]  # type: ignore[func-returns-value]
    rest = [s for s in order if s not in first]
    return (first + rest)[:MOST_CURVES]


def _band(label: str, x: np.ndarray, rows: np.ndarray, style: Style, role: str, *, faint: bool) -> Series:
    """Mean and range over runs, cut where the first run ends."""
    measured = ~np.isnan(rows)
    ends = [int(np.flatnonzero(m)[-1]) for m in measured if m.any()]
    stop = min(ends) + 1 if ends else 0
    x, rows = np.asarray(x[:stop], dtype=np.float64), rows[:, :stop]
    some = ~np.isnan(rows).all(axis=0)
    low = np.where(some, np.nanmin(np.where(some, rows, 0.0), axis=0), np.nan) if stop else np.empty(0)
    high = np.where(some, np.nanmax(np.where(some, rows, 0.0), axis=0), np.nan) if stop else np.empty(0)
    several = len(rows) > 1
    return Series(
        label,
        x,
        nan_mean(rows),
        style,
        role,
        low if several else None,
        high if several else None,
        show_band=several and not faint,
        faint=faint,
        dots=not faint and len(x) <= 40 and not several,
    )


def aligned_validation(runs: Sequence[RunSummary], most: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """(steps, losses [runs, steps]) over the union of the runs' evaluation steps; NaN where a run has none."""
    steps = np.unique(np.concatenate([run.validation.steps for run in runs])) if runs else np.empty(0, np.int32)
    if len(steps) > most:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))]
    rows = np.full((len(runs), len(steps)), np.nan)
    for row, run in zip(rows, runs, strict=True):
        _, at, mine = np.intersect1d(steps, run.validation.steps, return_indices=True)
        row[at] = run.validation.values[mine]
    rows[~np.isfinite(rows)] = np.nan
    return steps, rows


def _top(shown: Sequence[Setting]) -> float | None:
    with np.errstate(invalid="ignore"):
        firsts = [float(r.train[np.isfinite(r.train)][0]) for s in shown for r in s.runs if np.isfinite(r.train).any()]
        peaks = [float(np.nanmax(r.train)) for s in shown for r in s.runs if np.isfinite(r.train).any()]
    return 1.12 * max(firsts) if firsts and max(peaks) > 1.4 * max(firsts) else None


def heat_figures(study: Study, ranked: Sequence[Ranked]) -> list[Markup]:
    """Format x optimizer (or the next axis), one table per combination of the further axes."""
    others = [axis for axis in study.axes if axis != FORMAT]
    if not others:
        return []
    column_axis = OPTIMIZER if OPTIMIZER in others else others[0]
    further = [axis for axis in others if axis != column_axis]
    by_label = {r.name: r for r in ranked}
    formats = list(dict.fromkeys(s.format for s in study.quantized))
    columns = list(dict.fromkeys(s.values[column_axis] for s in study.quantized))
    combinations = list(dict.fromkeys(tuple(s.values[a] for a in further) for s in study.quantized))
    standing = [r.best for r in ranked if r.best is not None]
    figures = []
    for combination in combinations[:6]:
        place = {
            (s.format, s.values[column_axis]): s
            for s in study.quantized
            if tuple(s.values[a] for a in further) == combination
        }
        rows = [f for f in formats if any((f, c) in place for c in columns)]
        cells = [[_heat_cell(place.get((f, c)), by_label) for c in columns] for f in rows]
        named = listing([axis_words(a, v, named=True) for a, v in zip(further, combination, strict=True)])
        heads = [axis_words(column_axis, c) for c in columns]
        caption = named[:1].upper() + named[1:]
        figures.append(heat_table(rows, heads, cells, caption=caption, corner="format", among=standing))
    return figures


def heat_words(ranked: Sequence[Ranked]) -> str:
    """How the heat maps are read."""
    what = "Final loss minus FP32's of the same seed" if any(r.against_baseline for r in ranked) else "Final loss"
    return (
        f"{what}, mean over seeds, with half the width of its 95% interval. The stronger the shade, the more settings are "
        "better than it beyond chance, so that what the seeds cannot tell apart looks alike; in red: how many runs collapsed."
    )


def _heat_cell(setting: Setting | None, ranked: Mapping[str, Ranked]) -> Cell:
    if setting is None:
        return Cell(None, "not run")
    r = ranked[setting.label]
    found = r.against_baseline.difference if r.against_baseline else r.estimate
    if r.collapsed:
        kinds = Counter(past_tense(run.kind) for run in setting.runs if run.collapsed)
        return Cell(None, f"{kinds.most_common(1)[0][0]} {r.collapsed}/{r.runs}", failed=True)
    if found is None:
        return Cell(None, "no result")
    spread = (
        f"± {number((found.high - found.low) / 2, 2)}, " if found.low is not None and found.high is not None else ""
    )
    return Cell(r.best, difference(found.mean) if r.against_baseline else loss(found.mean), f"{spread}n = {found.n}")


def timeline_figure(study: Study) -> Markup | None:
    """When the collapses began; None when nothing collapsed and nothing was shifted."""
    styles = styles_of(study.settings)
    rows = []
    for setting in study.settings:
        collapses = [(r.onset, _told(r)) for r in setting.runs if r.onset is not None]
        shifts = [step for run in setting.runs for step in run.shifts]
        if collapses or shifts:
            kinds = Counter(past_tense(run.kind) for run in setting.runs if run.collapsed)
            words = listing([f"{n} of {len(setting.runs)} {kind}" for kind, n in kinds.items()]) or plural(
                len(shifts), "shift"
            )
            rows.append((min([c[0] for c in collapses] or [study.max_steps]), setting, collapses, shifts, words))
    if not rows:
        return None
    rows.sort(key=lambda row: row[0])
    chart = timeline_chart(
        [
            TimelineRow(s.label, styles[s.label], collapses, shifts, words)
            for _, s, collapses, shifts, words in rows[:MOST_RANKED]
        ],
        last_step=study.max_steps,
        title="Failure timeline",
        description="; ".join(f"{s.label}: {words}" for _, s, _, _, words in rows[:20]),
    )
    runs = [run for _, s, _, _, _ in rows for run in s.runs]
    caption = f"Cross: the step at which a run's collapse began. Ring: an emergency shift of the format. {plural(len(runs), 'run')}, {seeds_text(sorted({r.seed for r in runs}, key=str))}."
    return figure("When runs failed", chart, caption)


def _told(run: RunSummary) -> str:
    return f"seed {run.seed}: {past_tense(run.kind)} at step {run.onset}"


def layer_sections(study: Study, ranked: Sequence[Ranked]) -> list[dict]:
    """Per setting (the best of each format, and every one that collapsed first): its heat maps over time."""
    order = sorted(study.quantized, key=lambda s: not s.contender.collapsed)
    measured = [s for s in order if any(run.layers for run in s.runs)]
    histories = {
        s.label: mean_history([run.layers for run in s.runs if run.layers]) for s in _chosen(measured)[:MOST_LAYERED]
    }
    ramps = {name: _ramp(histories.values(), name) for name in drawn_names()}
    sections = []
    for setting in _chosen(measured)[:MOST_LAYERED]:
        runs = [run for run in setting.runs if run.layers]
        panels, beside = _panels(histories[setting.label], ramps, study.max_steps)
        if panels or beside:
            note = seeds_text(sorted({r.seed for r in runs}, key=str))
            sections.append({"label": setting.label, "note": note, "panels": panels, "beside": beside})
    return sections


def _ramp(histories, name: str) -> Ramp:
    """From 0 for a fraction, else from the smallest value, to the largest."""
    values = [v for h in histories for (metric, _, _), v in h.items() if metric == name]
    finite = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.empty(0)
    if not len(finite):
        return Ramp(0.0, 1.0)
    low = 0.0 if _row(name).unit is FRACTION else float(finite.min())
    high = float(finite.max())
    return Ramp(low, high if high > low else low + 1.0)


def _row(name: str) -> Metric:
    found = find_metric(name)
    assert found is not None
    return found


def _panels(history: LayerHistory, ramps: Mapping[str, Ramp], max_steps: int) -> tuple[list[list[Markup]], list[str]]:
    """One row of panels per metric, one panel per role; and what they leave out, in words."""
    roles = list(dict.fromkeys(role for _, role, _ in history))
    order = forward_order(history)
    names, start = told_apart(order)
    short = dict(zip(order, names, strict=True))
    panels: dict[str, list[Markup]] = {}
    still, most = [], 0
    for name, role in product(ramps, roles):
        layers, values = panel(history, name, role, order)
        if not len(layers):
            continue
        ramp, row = ramps[name], _row(name)
        show = partial(in_unit, unit=row.unit)
        least, greatest = float(np.nanmin(values)), float(np.nanmax(values))
        if least == greatest:
            still.append(f"{row.heading} of {role_words(role)} {show(least)}")
            continue
        most = max(most, len(layers))
        strips = heat_strips(
            [short[layer] for layer in layers[:MOST_LAYERS]],
            values[:MOST_LAYERS],
            ramp=ramp,
            title=f"{row.heading} of {role_words(role)}",
            description=f"{_sentence(row)}, per layer over training; largest in "
            f"{layers[int(np.argmax(nan_mean(values.T)))]}.",
            x_ends=("step 1", f"step {count(max_steps)}"),
            words=show,
            in_full=layers[:MOST_LAYERS],
        )
        head = el(
            "div",
            el("h4", f"{row.heading}, {role_words(role)}"),
            ramp_legend(show(ramp.lo), show(ramp.hi)),
            class_="cellhead",
        )
        panels.setdefault(name, []).append(el("div", head, strips, class_="multiple"))
    beside = [f'A leading "…" in a layer\'s name stands for "{start}".'] if panels and start else []
    beside += [f"Of one value in every layer and step: {', '.join(still)}."] if still else []
    beside += [f"Drawn are the first {MOST_LAYERS} of {most} layers."] if most > MOST_LAYERS else []
    return list(panels.values()), beside


def _sentence(row: Metric) -> str:
    """What the metric is, as the beginning of a sentence."""
    said = row.says or row.name.replace("_", " ")
    return said[0].upper() + said[1:]


def _by_label(study: Study, label: str) -> Setting:
    return next(s for s in study.settings if s.label == label)


def interval_words(found: Estimate | None) -> str:
    """ "[low, high]" of an estimate, or why there is none."""
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return "one seed"
    return f"[{difference(found.low)}, {difference(found.high)}]"
