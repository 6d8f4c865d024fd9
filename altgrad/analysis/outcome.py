"""How a run ended, in numbers and in words, by itself and beside its baseline; and short names that tell runs apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from altgrad.records.run import Metrics, Run, as_number
from altgrad.report.numbers import count, duration, loss, percent
from altgrad.report.verdicts import (
    BEHIND,
    ON_PAR,
    ending,
    evidence_words,
    grade,
    past_tense,
    remarks_beside,
    remarks_in_words,
)

MONITORED_STEPS = 48
"""Monitored steps of a run that its report reads, evenly thinned."""


@dataclass(frozen=True)
class Outcome:
    """A run, its label in this report, its records, and the unquantized run to compare it with."""

    run: Run
    label: str
    baseline: Outcome | None = None

    @cached_property
    def metrics(self) -> Metrics:
        return self.run.metrics(monitor_steps=MONITORED_STEPS)

    @property
    def collapsed(self) -> bool:
        return self.run.status == "collapsed" or bool(self.run.verdict)

    @property
    def kind(self) -> str | None:
        """Kind of collapse (`altgrad.report.verdicts`); None without one."""
        return str((self.run.verdict or {}).get("kind") or "collapse") if self.collapsed else None

    @property
    def onset(self) -> int | None:
        verdict = self.run.verdict or {}
        step = as_number(verdict.get("onset_step"))
        step = as_number(verdict.get("detected_step")) if step is None else step
        return None if step is None else int(step)

    @property
    def shifted_to(self) -> str | None:
        """The format in force at the collapse, when an emergency shift before it had left the run's own."""
        found = None
        for item in self.run.result.get("interventions") or []:
            if isinstance(item, dict) and item.get("kind") == "shift" and isinstance(item.get("detail"), dict):
                step = as_number(item.get("step"))
                if step is not None and self.onset is not None and step < self.onset:
                    found = item["detail"].get("to_format")
        return found

    @property
    def steps(self) -> int | None:
        steps = self.run.number("steps")
        return int(steps) if steps is not None else self.metrics.last_step

    def final(self, kind: str) -> float | None:
        """Final "val_loss" or "loss": as recorded in the result, else the last one in the metrics."""
        recorded = self.run.number(f"final_{kind}")
        if recorded is not None:
            return recorded
        curve = self.metrics.validation if kind == "val_loss" else self.metrics.train
        return float(curve.values[-1]) if len(curve) else None

    def best(self, kind: str) -> float | None:
        recorded = self.run.number(f"best_{kind}")
        if recorded is not None:
            return recorded
        curve = self.metrics.validation if kind == "val_loss" else self.metrics.train
        finite = curve.values[np.isfinite(curve.values)]
        return float(finite.min()) if len(finite) else None

    @property
    def judged_on(self) -> str:
        """ "val_loss", or "loss" where this run or its baseline has no validation: what they are compared by."""
        known = (self, self.baseline) if self.baseline else (self,)
        return "val_loss" if all(one.final("val_loss") is not None for one in known) else "loss"

    @property
    def gap(self) -> float | None:
        """Final loss minus the baseline's; None without a baseline or without losses."""
        if self.baseline is None:
            return None
        mine, theirs = self.final(self.judged_on), self.baseline.final(self.judged_on)
        return None if mine is None or theirs is None else mine - theirs

    @property
    def grade(self) -> str | None:
        """How a completed run did beside its baseline (`altgrad.report.verdicts.grade`); None where that is not known."""
        if self.collapsed or self.run.status != "completed" or self.baseline is None or self.gap is None:
            return None
        metrics = self.baseline.metrics
        curve = metrics.validation if self.judged_on == "val_loss" else metrics.train
        theirs = self.baseline.final(self.judged_on)
        return None if theirs is None or not len(curve) else grade(self.gap, float(curve.values[0]) - theirs)

    @property
    def short_verdict(self) -> str:
        """The verdict for a table cell."""
        status = "collapsed" if self.collapsed else self.run.status
        return ending(status, self.run.verdict, self.run.remarks, self.grade)

    @property
    def said(self) -> str:
        """The verdict as a sentence."""
        of = f" of {count(self.run.max_steps)}" if self.run.max_steps else ""
        if self.collapsed:
            verb = past_tense(self.kind)
            at = f" at step {count(self.onset)}{of}" if self.onset is not None else ""
            at += f", after the shift to {self.shifted_to}" if self.shifted_to else ""
            detected = as_number((self.run.verdict or {}).get("detected_step"))
            seen = f"; detected at step {count(detected)}" if detected is not None and detected != self.onset else ""
            return f"{verb[:1].upper()}{verb[1:]}{at}{seen}."
        if self.run.status == "completed":
            how = {None: "", ON_PAR: f", {ON_PAR} with FP32", BEHIND: f", {BEHIND} FP32"}.get(
                self.grade, f", {self.grade}"
            )
            remarks = remarks_beside(self.run.remarks, self.grade)
            but = f"; {remarks_in_words(remarks)}" if remarks else ""
            return f"Completed {count(self.steps)} steps{how}{but}."
        if self.run.status == "interrupted":
            return f"Interrupted at step {count(self.steps)}{of}; the same command goes on from there."
        if self.run.status == "failed":
            why = f" ({self.run.crash})" if self.run.crash else ""
            last = f"last step written: {count(self.metrics.last_step)}{of}"
            return f"Its process died{why}; {last}. See log.txt in its folder."
        return f"No result recorded: the last step written is {count(self.metrics.last_step)}{of} (still running, or killed)."

    def evidence(self) -> list[tuple[str, str]]:
        """(term, text) pairs that carry the verdict, or the run's numbers when there is none."""
        pairs: list[tuple[str, str]] = []
        verdict = self.run.verdict or {}
        if self.collapsed:
            value, threshold = as_number(verdict.get("value")), as_number(verdict.get("threshold"))
            if verdict.get("metric"):
                pairs.append(("Evidence", evidence_words(str(verdict["metric"]), value, threshold)))
            if verdict.get("reason"):
                pairs.append(("Reason", str(verdict["reason"])))
            if (at := self.loss_at(self.onset)) is not None:
                pairs.append(("Loss at onset", loss(at)))
            if verdict.get("judged_on"):
                pairs.append(("Judged on", str(verdict["judged_on"])))
        remarks = remarks_beside(self.run.remarks, None)
        pairs += [("Remark", str(remark["reason"])) for remark in remarks if remark.get("reason")]
        if (final := self.final("val_loss")) is not None:
            best = self.best("val_loss")
            pairs.append(("Validation", f"{loss(final)} at the end, {loss(best)} at best"))
        if (final := self.final("loss")) is not None:
            pairs.append(("Training", f"{loss(final)} at the end, {loss(self.best('loss'))} at best"))
        if (stall := self.run.number("stall_rate")) is not None:
            pairs.append(("Stall rate", percent(stall)))
        if self.run.number("wall_s") is not None:
            pairs.append(("Time", duration(self.run.number("wall_s"))))
        return pairs + [("Intervention", text) for text in self.interventions()]

    def interventions(self) -> list[str]:
        """Each kind of intervention with its step, or its number and range of steps."""
        by_kind: dict[str, list[tuple[int, Any]]] = {}
        for item in self.run.result.get("interventions") or []:
            if isinstance(item, dict) and (step := as_number(item.get("step"))) is not None:
                by_kind.setdefault(str(item.get("kind", "intervention")), []).append((int(step), item.get("detail")))
        out = []
        for kind, items in by_kind.items():
            if len(items) <= 3:
                out += [f"{kind} at step {count(s)}{f': {words(d)}' if d else ''}" for s, d in items]
            else:
                out.append(f"{kind}, {count(len(items))} times, steps {count(items[0][0])} to {count(items[-1][0])}")
        return out

    def loss_at(self, step: int | None) -> float | None:
        """The training loss at `step`, or the last finite one before it."""
        if step is None:
            return None
        train = self.metrics.train
        usable = np.isfinite(train.values) & (train.steps <= step)
        return float(train.values[usable][-1]) if usable.any() else None


def words(detail: Any) -> str:
    """A free-form detail (text, or an object) as text."""
    if isinstance(detail, dict):
        if "from_format" in detail and "to_format" in detail:
            because = f", because of {detail['reason']}" if detail.get("reason") else ""
            return f"{detail['from_format']} to {detail['to_format']}{because}"
        return ", ".join(f"{key} {value}" for key, value in detail.items())
    return str(detail)


_DISTINCTIONS: Sequence[Callable[[Run], str]] = (
    lambda run: run.storage or "",
    lambda run: f"{own.replace('_', ' ')} storage" if (own := run.storage_rounding) else "",
    lambda run: run.optimizer or "",
    lambda run: (run.rounding or "").replace("_", " "),
    lambda run: (
        f"lr {run.config['optimizer']['lr']:g}"
        if isinstance(run.config.get("optimizer"), dict) and isinstance(run.config["optimizer"].get("lr"), int | float)
        else ""
    ),
    lambda run: f"seed {run.seed}" if run.seed is not None else "",
    lambda run: run.name,
    lambda run: run.path.name,
    lambda run: str(run.path),
)


def label_runs(runs: Sequence[Run]) -> list[Outcome]:
    """Each run labelled by its format and by as much more as tells it from the others."""
    labels = [run.format for run in runs]
    for distinction in _DISTINCTIONS:
        shared = Counter(labels)
        if max(shared.values(), default=0) <= 1:
            break
        extra = [distinction(run) for run in runs]
        varied = {
            label: len({e for e, other in zip(extra, labels, strict=True) if other == label}) > 1 for label in shared
        }
        labels = [
            f"{label} {more}" if more and varied[label] else label for label, more in zip(labels, extra, strict=True)
        ]
    alone = [Outcome(run, label) for run, label in zip(runs, labels, strict=True)]
    return [one if (baseline := baseline_of(one, alone)) is None else replace(one, baseline=baseline) for one in alone]


def baseline_of(outcome: Outcome, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The unquantized run to compare with: of the same seed if there is one, else the only one there is."""
    if outcome.run.is_baseline:
        return None
    baselines = [other for other in outcomes if other.run.is_baseline]
    same_seed = [other for other in baselines if other.run.seed == outcome.run.seed]
    same = [other for other in same_seed if other.run.optimizer == outcome.run.optimizer]
    return (same or same_seed or (baselines if len(baselines) == 1 else [None]))[0]
