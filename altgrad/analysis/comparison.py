"""Compares runs with their baseline: the result table, the headline, how configurations differ, the table beside a pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from altgrad.analysis.outcome import Outcome, label_runs
from altgrad.records.run import Run, read_run
from altgrad.report.numbers import count, difference, listing, loss, percent, plural
from altgrad.report.tables import Column, Table, table_markdown
from altgrad.report.text import for_markdown
from altgrad.report.verdicts import BARELY_LEARNED, BEHIND, ON_PAR, past_tense

IGNORED_KEYS = frozenset({"name", "runs_dir", "checkpoint_dir", "trackers", "device", "threads"})
"""Configuration keys that do not change what is computed."""


def comparison_table(run_dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """One row per run, in the order given: who it is, how it ended, its losses, and its distance from the baseline."""
    outcomes = label_runs([read_run(path) for path in run_dirs])
    return [table_row(outcome) for outcome in outcomes]


def table_row(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    return {
        "run_id": run.run_id,
        "label": outcome.label,
        "name": run.name,
        "format": run.format,
        "storage": run.storage,
        "rounding": run.rounding,
        "optimizer": run.optimizer,
        "seed": run.seed,
        "status": run.status,
        "verdict": outcome.short_verdict,
        "onset_step": outcome.onset if outcome.collapsed else None,
        "final_loss": outcome.final("loss"),
        "best_loss": outcome.best("loss"),
        "best_step": run.number("best_step"),
        "final_val_loss": outcome.final("val_loss"),
        "best_val_loss": outcome.best("val_loss"),
        "against_baseline": outcome.gap,
        "steps": outcome.steps,
        "max_steps": run.max_steps,
        "stall_rate": run.number("stall_rate"),
        "wall_s": run.number("wall_s"),
        "tokens_per_s": run.number("tokens_per_s"),
    }


def headline(outcomes: Sequence[Outcome]) -> str:
    """One sentence that says how it came out: who was on par with FP32, who fell behind and how far, what collapsed."""
    if len(outcomes) == 1:
        return _headline_of_one(outcomes[0])
    if clause := _closest_of_the_collapsed(outcomes):
        return clause
    parts = _graded(outcomes) or _lowest(outcomes)
    parts += _collapse_clauses(outcomes)
    unfinished = [o.label for o in outcomes if not o.run.finished]
    if unfinished:
        parts.append(f"{listing(unfinished[:4])} {'has' if len(unfinished) == 1 else 'have'} no result yet")
    interrupted = [o.label for o in outcomes if o.run.status == INTERRUPTED]
    if interrupted:
        parts.append(f"{listing(interrupted[:4])} {'was' if len(interrupted) == 1 else 'were'} interrupted")
    if not parts:
        parts.append(f"{count(len(outcomes))} runs, none of which collapsed")
    return "; ".join(parts) + "."


INTERRUPTED = "interrupted"
_AS_GRADED = {
    ON_PAR: "ended on par with FP32",
    BEHIND: "ended behind",
    BARELY_LEARNED: "barely learned",
    None: "ended",
}
_MOST_NAMED = 4


def _ended(outcome: Outcome) -> bool:
    """Whether a run took all of its steps."""
    return not outcome.collapsed and outcome.run.finished and outcome.run.status != INTERRUPTED


def _graded(outcomes: Sequence[Outcome]) -> list[str]:
    """ "E3M4 ended on par with FP32 (+0.094); E5M2 and E1M6 ended behind (+0.230 to +0.654)", one clause per grade."""
    groups: dict[str | None, list[tuple[float, Outcome]]] = {}
    for o in outcomes:
        if _ended(o) and o.gap is not None and np.isfinite(o.gap):
            groups.setdefault(o.grade, []).append((o.gap, o))
    clauses = []
    for graded, verb in _AS_GRADED.items():
        found = sorted(groups.get(graded, ()), key=lambda pair: pair[0])
        if not found:
            continue
        names = [o.label for _, o in found]
        who = listing(names) if len(names) <= _MOST_NAMED else f"{len(names)} runs"
        away = dict.fromkeys(difference(gap) for gap in (found[0][0], found[-1][0]))
        unit = "" if clauses else " nats" if found[0][1].judged_on == "val_loss" else " nats of training loss"
        from_it = "" if graded else " from FP32"
        clauses.append(f"{who} {verb} ({' to '.join(away)}{unit}{from_it})")
    return clauses


def _lowest(outcomes: Sequence[Outcome]) -> list[str]:
    """Without a baseline: which ended lowest."""
    standing = [o for o in outcomes if _ended(o) and not o.run.is_baseline]
    kind = "val_loss" if all(o.final("val_loss") is not None for o in standing) else "loss"
    known = [(value, o) for o in standing if (value := o.final(kind)) is not None and np.isfinite(value)]
    if len(standing) < 2 or not known:
        return []
    value, best = min(known, key=lambda pair: pair[0])
    return [f"{best.label} ended lowest, at {'validation' if kind == 'val_loss' else 'training'} loss {loss(value)}"]


def _headline_of_one(outcome: Outcome) -> str:
    final, kind = outcome.final("val_loss"), "validation"
    if final is None:
        final, kind = outcome.final("loss"), "training"
    said = outcome.said.rstrip(".")
    said = f"{outcome.label} {said[:1].lower()}{said[1:]}" if outcome.run.finished else f"{outcome.label}: {said}"
    return f"{said}; {kind} loss {loss(final)}." if final is not None and np.isfinite(final) else f"{said}."


def _closest_of_the_collapsed(outcomes: Sequence[Outcome]) -> str | None:
    """When every quantized run collapsed: which came closest to the baseline all the same."""
    quantized = [o for o in outcomes if not o.run.is_baseline]
    fallen = [o for o in quantized if o.collapsed]
    known = [(g, o) for o in fallen if (g := o.gap) is not None and np.isfinite(g)]
    if len(fallen) < max(2, len(quantized)) or not known:
        return None
    gap, best = min(known, key=lambda pair: pair[0])
    verbs = {past_tense(o.kind) for o in fallen}
    verb = verbs.pop() if len(verbs) == 1 else "collapsed"
    said = f"All {len(fallen)} quantized runs {verb}; {best.label} came closest to FP32, {difference(gap)}"
    return f"{said}, and {past_tense(best.kind)} at step {count(best.onset)}." if best.onset else f"{said}."


def _collapse_clauses(outcomes: Sequence[Outcome]) -> list[str]:
    """ "E7M0 froze at step 150", or several runs of one kind together."""
    by_kind: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.collapsed:
            by_kind.setdefault(outcome.kind or "", []).append(outcome)
    clauses = []
    for kind, group in by_kind.items():
        verb = past_tense(kind)
        if len(group) <= 3:
            named = [f"{o.label} at step {count(o.onset)}" if o.onset is not None else o.label for o in group]
            onsets = {o.onset for o in group}
            if len(group) > 1 and len(onsets) == 1 and None not in onsets:
                clauses.append(f"{listing([o.label for o in group])} {verb} at step {count(onsets.pop())}")
            elif len(group) == 1 and group[0].onset is not None:
                shifted = f", shifted to {group[0].shifted_to}," if group[0].shifted_to else ""
                clauses.append(f"{group[0].label}{shifted} {verb} at step {count(group[0].onset)}")
            else:
                clauses.append(f"{listing(named)} {verb}")
        else:
            clauses.append(f"{len(group)} runs {verb}")
    return clauses


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration -> dotted keys, as the command line spells them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def split_facts(sources: Sequence[Mapping[str, Any]], ignored: frozenset[str] = frozenset()) -> tuple[dict, dict]:
    """(differing, shared) facts by dotted key; a differing fact maps to its value per source, in order."""
    flats = [{k: v for k, v in flatten(source).items() if k.split(".")[0] not in ignored} for source in sources]
    differing: dict[str, list[Any]] = {}
    shared: dict[str, Any] = {}
    for key in dict.fromkeys(key for flat in flats for key in flat):
        values = [flat.get(key) for flat in flats]
        if all(value == values[0] for value in values):
            shared[key] = values[0]
        else:
            differing[key] = values
    return differing, shared


def twins(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """label -> label of an earlier run whose training losses are identical at every recorded step."""
    found: dict[str, str] = {}
    seen: dict[bytes, str] = {}
    for outcome in outcomes:
        train = outcome.metrics.train
        if len(train) < 2:
            continue
        key = train.steps.tobytes() + train.values.tobytes()
        if key in seen:
            found[outcome.label] = seen[key]
        else:
            seen[key] = outcome.label
    return found


_COLUMNS = (
    *(Column("run"), Column("seed", True), Column("format"), Column("storage"), Column("optimizer")),
    *(Column("steps", True), Column("final val loss", True), Column("best val loss", True), Column("stall", True)),
    Column("verdict"),
)


def record_table(runs: Sequence[Path], root: Path, title: str) -> str:
    """A page of one table, one row per run; runs go by their names below `root`."""
    rows = []
    for path in sorted(runs):
        run = Run(path)
        row = table_row(Outcome(run, run.format))
        losses = [loss(row[name]) for name in ("final_val_loss", "best_val_loss")]
        facts = [run.format, run.storage or "-", run.optimizer or "-", count(row["steps"])]
        seed = "-" if run.seed is None else str(run.seed)
        rows.append(
            [path.relative_to(root).as_posix(), seed, *facts, *losses, percent(row["stall_rate"]), row["verdict"]]
        )
    note = "Losses are validation losses in nats per token; stall: attempted weight updates that changed no code."
    return f"# {for_markdown(title)}\n\n{plural(len(rows), 'run')}. {note}\n\n{table_markdown(Table(_COLUMNS, rows))}\n"
