"""The figures of a calibrated set as Markdown: how often the verdicts are right, with intervals, and where they are not.

Definitions, which no rule of the autopsy may be fitted to:

- answered: the verdict is no "inconclusive"; a fault's "no damage" or "not precision" is an answer, and a wrong one;
- right: the set of cells named is one of the acceptable sets, which were written down before the case ran;
- mechanism right: the cells are right, and the mechanism is one of those that the kind of fault has;
- onset right: the step from which the cells were at work is within 5 of the first step with the fault, and the cells are right;
- false alarm: a null for which a cause is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest

from altgrad.autopsy.confidence import STRUCTURES, fitted
from altgrad.autopsy.damage import floor_of
from benchmarks.autopsy_calibration.faults import KINDS

ONSET_WITHIN = 5
DAMAGES = (0.02, 0.05, 0.1, 0.3, 1.0)
"""Nats: lower ends of the classes of damage."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Rate:
    """So many of so many, with the 95% interval of Clopper and Pearson."""

    right: int
    of: int

    @property
    def interval(self) -> tuple[float, float]:
        if not self.of:
            return 0.0, 1.0
        found = binomtest(self.right, self.of).proportion_ci(method="exact")
        return float(found.low), float(found.high)

    @property
    def share(self) -> float | None:
        return self.right / self.of if self.of else None

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right}/{self.of} [{low:.1%}, {high:.1%}]" if self.of else "-"


def rate(records: Sequence[Record], holds: Callable[[Record], bool]) -> Rate:
    """How many of the records something holds of."""
    return Rate(sum(map(holds, records)), len(records))


def is_null(record: Record) -> bool:
    return record["case"]["null"] is not None


def answered(record: Record) -> bool:
    return record["verdict"]["kind"] not in ("inconclusive", "refused")


def right(record: Record) -> bool:
    """Whether the cells are right."""
    found = sorted(record["verdict"]["cells"])
    return record["verdict"]["kind"] == "cause" and any(sorted(one) == found for one in record["case"]["acceptable"])


def mechanism_right(record: Record) -> bool:
    return right(record) and record["verdict"]["mechanism"] in record["case"]["mechanisms"]


def onset_right(record: Record) -> bool:
    onset = record["verdict"]["acts_from"]
    return right(record) and onset is not None and abs(onset - record["case"]["fault"]["onset"] - 1) <= ONSET_WITHIN


def alarm(record: Record) -> bool:
    """Whether a cause is named."""
    return record["verdict"]["kind"] == "cause"


def said(record: Record) -> str:
    """The verdict as the confusion table has it."""
    verdict, case = record["verdict"], record["case"]
    if verdict["kind"] != "cause":
        return verdict["kind"]
    if is_null(record):
        return "cause"
    if right(record):
        return "right"
    named, true = set(verdict["cells"]), set(case["fault"]["cells"])
    if named < true:
        return "a part"
    if named > true:
        return "more"
    return "others and part" if named & true else "others"


SAYS = (
    "right",
    "a part",
    "more",
    "others and part",
    "others",
    "no damage in the window",
    "not precision",
    "inconclusive",
)


def brier(records: Sequence[Record]) -> float | None:
    """Mean squared distance of the stated confidence from 1 (right) or 0, over causes that state one."""
    stated = [r for r in records if alarm(r) and not is_null(r) and r["verdict"]["confidence"] is not None]
    if not stated:
        return None
    return sum((r["verdict"]["confidence"] - right(r)) ** 2 for r in stated) / len(stated)


def evidence(faults: Sequence[Record]) -> list[tuple[float, bool]]:
    """(damage in floors, right) of the causes whose structure the confidence knows."""
    causes = [r for r in faults if alarm(r) and r["verdict"]["structure"] in STRUCTURES]
    return [(r["verdict"]["damage"] / floor_of(r["losses"]["twin"][0]), right(r)) for r in causes]


def held_out(faults: Sequence[Record], parts: int = 5) -> str:
    """Brier score and stated against found, each case judged by classes fitted to the others' parts."""
    cases = evidence(faults)
    told: list[tuple[float, bool]] = []
    for part in range(parts):
        classes = fitted([case for i, case in enumerate(cases) if i % parts != part])
        for damage, was_right in cases[part::parts]:
            alike = [one for one in classes if damage >= one.damage]
            if alike:
                told.append((alike[-1].chance, was_right))
    if not told:
        return "-"
    score = sum((stated - was_right) ** 2 for stated, was_right in told) / len(told)
    stated, found = (sum(values) / len(told) for values in zip(*told, strict=True))
    return f"Brier {score:.3f}, stated {stated:.1%}, found {found:.1%}, {len(told)} cases"


def of_damage(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Faults by class of damage."""
    classes = []
    for low, high in zip(DAMAGES, (*DAMAGES[1:], float("inf")), strict=True):
        members = [r for r in records if low <= r["case"]["damage"] < high]
        classes.append((f"{low:g} to {high:g}" if high < 100 else f"{low:g} and more", members))
    return classes


def headline(faults: Sequence[Record], nulls: Sequence[Record]) -> list[tuple[str, str, str]]:
    """(figure, value, goal)."""
    answers = [r for r in faults if answered(r)]
    named = [r for r in faults if alarm(r)]
    score = brier(faults)
    return [
        ("cells right, of those answered", str(rate(answers, right)), "99 of 100"),
        ("answered", str(rate(faults, answered)), "85 of 100"),
        ("cells right, of those for which a cause is named", str(rate(named, right)), ""),
        ("at least one guilty cell named", str(rate(faults, touches)), ""),
        ("mechanism and cells right, of all faults", str(rate(faults, mechanism_right)), "90 of 100"),
        (
            "mechanism right, of those with the right cells",
            str(rate([r for r in faults if right(r)], mechanism_right)),
            "",
        ),
        ("onset and cells right, of all faults", str(rate(faults, onset_right)), "90 of 100"),
        ("onset right, of those with the right cells", str(rate([r for r in faults if right(r)], onset_right)), ""),
        ("false alarms, of nulls", str(rate(nulls, alarm)), "0 of 59"),
        ("Brier score of the stated confidence", "-" if score is None else f"{score:.3f}", "below 0.05"),
    ]


def touches(record: Record) -> bool:
    """Whether a cell that has the fault is among those named."""
    return bool(set(record["verdict"]["cells"]) & set(record["case"]["fault"]["cells"]))


def baseline_rates(faults: Sequence[Record]) -> dict[str, tuple[Rate, Rate]]:
    """Baseline -> (its one cell is an acceptable answer, its one cell has the fault); those that name layers, by layer."""
    names = sorted({name for r in faults for name in r["baselines"]})
    found = {}
    for name in names:
        layers = name.endswith("(layer only)")

        def whole(r: Record, name: str = name, layers: bool = layers) -> bool:
            told = r["baselines"].get(name)
            if layers:
                return {told} == {layer_of(c) for c in r["case"]["fault"]["cells"]}
            return told is not None and any(list(one) == [told] for one in r["case"]["acceptable"])

        def touched(r: Record, name: str = name, layers: bool = layers) -> bool:
            cells = r["case"]["fault"]["cells"]
            return r["baselines"].get(name) in ([layer_of(c) for c in cells] if layers else cells)

        found[name] = (rate(faults, whole), rate(faults, touched))
    return found


def layer_of(cell: str) -> str:
    parts = cell.split(".")
    return ".".join(parts[:-1] if parts[-1] == "storage" else parts[:-2])


def misses(faults: Sequence[Record], nulls: Sequence[Record]) -> list[str]:
    """One paragraph for each wrong answer, with what its replays said."""
    lines = []
    for r in [*(f for f in faults if answered(f) and not right(f)), *(n for n in nulls if alarm(n))]:
        case, v = r["case"], r["verdict"]
        fault = case["fault"]
        what = case["null"] or (
            f"{fault['kind']}, rung {fault['rung']}, in {' and '.join(fault['cells'])} ({fault['width']}) from step "
            f"{fault['onset'] + 1}, {case['damage']:.3f} nats"
        )
        alone = ", ".join(f"{cell} {nats:.2f}" for cell, nats in case["alone"].items())
        lines.append(f"- **{case['name']}**: {what}{f'; alone {alone}' if alone else ''}. Said: {v['sentence']}")
        evidence = []
        if v["damage"] is not None:
            evidence.append(
                f"{v['damage']:.3f} nats in steps {v['window'] and [v['window'][0] + 1, v['window'][1]]}, noise {v['noise'] or 0:.4f}"
            )
        for name in ("rescue", "alone", "over_run"):
            if v[name]:
                evidence.append(f"{name} {v[name]['value']:.0%} [{v[name]['low']:.0%}, {v[name]['high']:.0%}]")
        evidence += [_effect(e) for e in (*v["groups"], *v["members"])]
        top = sorted(v["roles"], key=lambda e: -max(e["rescue"]["value"], e["alone"]["value"]))[:3]
        evidence += [f"role {_effect(e)}" for e in top]
        if evidence:
            lines.append(f"  Replays: {'; '.join(evidence)}.")
    return lines


def _effect(effect: dict[str, Any]) -> str:
    cells = effect["cells"]
    who = cells[0] if len(cells) == 1 else f"{cells[0]} and {len(cells) - 1} more"
    shares = [f"{name} {effect[name]['value']:.0%}" for name in ("rescue", "alone") if effect[name]]
    return f"{who}: {', '.join(shares)}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table."""
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]


def report(records: Sequence[Record]) -> str:
    """Every figure of the records."""
    faults, nulls = [r for r in records if not is_null(r)], [r for r in records if is_null(r)]
    lines = [
        f"{len(faults)} faults, {len(nulls)} nulls; rules {', '.join(sorted({r['rules'] for r in records}))}, "
        f"commits {', '.join(sorted({str(r['commit'])[:12] for r in records}))}",
        "",
    ]
    lines += table(("figure", "value", "goal"), headline(faults, nulls))
    lines += ["", "### By damage (nats)", ""]
    lines += table(
        ("damage", "faults", "answered", "cells right, of answered", "mechanism right", "onset right"),
        [
            (
                name,
                len(some),
                rate(some, answered),
                rate([r for r in some if answered(r)], right),
                rate(some, mechanism_right),
                rate(some, onset_right),
            )
            for name, some in of_damage(faults)
        ],
    )
    lines += ["", "### What was said, by kind of fault", ""]
    lines += table(("fault", "cases", *SAYS), _confusion(faults, lambda r: r["case"]["fault"]["kind"], list(KINDS)))
    lines += table(
        ("width", "cases", *SAYS),
        _confusion(faults, lambda r: r["case"]["fault"]["width"], ["single", "tensor", "pair"]),
    )
    lines += ["", "### Mechanisms, of faults with the right cells", ""]
    good = [r for r in faults if right(r)]
    words = sorted({str(r["verdict"]["mechanism"]) for r in good})
    rows = []
    for kind in KINDS:
        counts = Counter(str(r["verdict"]["mechanism"]) for r in good if r["case"]["fault"]["kind"] == kind)
        if counts:
            rows.append((f"{kind} ({', '.join(KINDS[kind].mechanisms)})", *(counts.get(w) or "" for w in words)))
    lines += table(("fault (counted as right)", *words), rows)
    lines += ["", "### Nulls", ""]
    kinds = sorted({r["case"]["null"] for r in nulls})
    words = sorted({said(r) for r in nulls})
    lines += table(
        ("null", "cases", *words),
        [
            (
                k,
                sum(r["case"]["null"] == k for r in nulls),
                *(sum(said(r) == w and r["case"]["null"] == k for r in nulls) or "" for w in words),
            )
            for k in kinds
        ],
    )
    lines += ["", "### Baselines on the same faults", ""]
    rows: list[tuple[Any, ...]] = [("autopsy", rate(faults, right), rate(faults, touches))]
    rows += [(name, *rates) for name, rates in baseline_rates(faults).items()]
    rows.append(
        (
            "a cell at random, expected",
            f"{sum(len([s for s in r['case']['acceptable'] if len(s) == 1]) for r in faults) / 30:.1f}",
            f"{sum(len(r['case']['fault']['cells']) for r in faults) / 30:.1f}",
        )
    )
    lines += table(("names by", "an acceptable answer", "a cell with the fault"), rows)
    lines += ["", "### Wrong answers", "", *misses(faults, nulls)]
    silent = [r for r in faults if not answered(r)]
    lines += [
        "",
        "### Not answered",
        "",
        *(
            f"- {r['case']['name']}: {r['case']['fault']['kind']} in {' and '.join(r['case']['fault']['cells'])}, {r['case']['damage']:.3f} nats: {r['verdict']['sentence']}"
            for r in silent
        ),
    ]
    cpu = [sum(r["cpu_s"].values()) for r in records]
    lines += [
        "",
        f"CPU seconds a case: {sum(cpu) / max(1, len(cpu)):.1f}, in all {sum(cpu) / 60:.0f} minutes; forks of an autopsy that names a cause: {_median([r['verdict']['forks'] for r in faults if alarm(r)])} (median).",
    ]
    return "\n".join(lines)


def _median(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2] if values else 0


def _confusion(faults: Sequence[Record], of: Callable[[Record], str], names: Sequence[str]) -> list[tuple[Any, ...]]:
    rows = []
    for name in names:
        some = [r for r in faults if of(r) == name]
        if some:
            counts = Counter(map(said, some))
            rows.append((name, len(some), *(counts.get(word) or "" for word in SAYS)))
    return rows
