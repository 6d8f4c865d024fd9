"""Advice: what each format would do to each operand, the recipe that follows under a budget, and how wrong it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from altgrad.advise.choose import TIE_DB, Budget, Choice, Option, bits_of, choose
from altgrad.advise.sensitivity import Attribution, attribute, damage_of, everywhere, exact_gradient, recipe_from
from altgrad.advise.stall import freeze_step, stall_error, stall_over
from altgrad.advise.trace import Tell, Trace
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import get_format
from altgrad.formats.spectrum import STORAGES, Prediction
from altgrad.loop.loop import Loop
from altgrad.monitor.sources import plain_name, watch_operands
from altgrad.nn import Recipe, StorageSpec
from altgrad.quantization import amax_scale, quantize_with_stats
from altgrad.report.notebook import notebook_table
from altgrad.report.numbers import plural

LAST = 3
"""Measured steps at a trace's end that predictions rest on; the first ones show weights that have not learned yet."""
STALL_LIMIT = 0.5
"""Nearest storage that would lose more than half of the updates is advised to round stochastically."""


@dataclass(frozen=True)
class Row:
    """What a format does to one operand.

    damage: predicted relative squared error across the gradient with this operand alone low; None without sensitivity.
    refused: why nothing is predicted.
    """

    layer: str
    role: str
    format: str
    bits: float
    prediction: Prediction | None
    damage: float | None = None
    refused: str | None = None

    @property
    def limit(self) -> str:
        """What limits the format here."""
        return self.refused or (self.prediction.limit if self.prediction is not None else "")


@dataclass
class Advice:
    """The result of `advise`.

    recipe: for `quantize_model` and `altgrad run`. choice: formats by (layer, role), with ties.
    gradient_snr_db: predicted for the whole recipe at the trace's end; measured_snr_db: the same, measured on the next
    batch. errors: of the predictions, as measured. everywhere: by format, the relative squared
    error across the mean gradient with that format for every operand (`sensitivity.everywhere`). stalls: by format,
    storage and layer ("" for all): predicted mean over the schedule, and the step from which 95% are lost. unknown:
    what the source cannot tell.
    """

    recipe: Recipe
    choice: Choice
    rows: list[Row]
    budget: Budget
    source: str = "trace"
    gradient_snr_db: float | None = None
    measured_snr_db: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    everywhere: dict[str, float] = field(default_factory=dict)
    stalls: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    left_high: dict[str, str] = field(default_factory=dict)
    verified: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def _short(self) -> str:
        snr = "" if self.gradient_snr_db is None else f", gradients at {self.gradient_snr_db:.1f} dB"
        return f"{plural(len(self.choice.formats), 'operand')}, {self.choice.bits:.3g} bits a value{snr}"

    def __repr__(self) -> str:
        return f"Advice({self._short})"

    def _repr_html_(self) -> str:
        chosen = self.choice.formats.items()
        rows = [(layer, role, fmt, ", ".join(self.choice.ties.get((layer, role), ()))) for (layer, role), fmt in chosen]
        return notebook_table(f"Advice: {self._short}", rows, ("layer", "operand", "format", "as good"))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the page and for advice.json."""

        def number(x: float | None) -> float | None:
            return None if x is None or not math.isfinite(x) else float(f"{x:.6g}")

        rows = [
            {
                "layer": r.layer,
                "role": r.role,
                "format": r.format,
                "bits": r.bits,
                "sqnr_db": None if r.prediction is None else number(r.prediction.sqnr_db),
                "overflow": None if r.prediction is None else number(r.prediction.overflow),
                "underflow": None if r.prediction is None else number(r.prediction.underflow),
                "damage": number(r.damage),
                "limit": r.limit,
                "chosen": self.choice.formats.get((r.layer, r.role)) == r.format,
                "tie": r.format in self.choice.ties.get((r.layer, r.role), ()),
            }
            for r in self.rows
        ]
        return {
            "source": self.source,
            "facts": self.facts,
            "budget": dict(vars(self.budget)),
            "bits": number(self.choice.bits),
            "recipe": self.recipe.to_dict(),
            "recipe_text": self.recipe.text,
            "gradient_snr_db": number(self.gradient_snr_db),
            "measured_snr_db": number(self.measured_snr_db),
            "errors": {name: number(value) for name, value in self.errors.items()},
            "rows": rows,
            "everywhere": {name: number(value) for name, value in self.everywhere.items()},
            "stalls": self.stalls,
            "unknown": self.unknown,
            "left_high": self.left_high,
            "verified": self.verified,
            "seconds": {name: number(value) for name, value in self.seconds.items()},
        }


def rows_of(
    trace: Trace, formats: Sequence[str], attribution: Attribution | None = None, tell: Tell | None = None
) -> list[Row]:
    """Every operand in every format."""
    rows: list[Row] = []
    for i, (layer, role) in enumerate(trace.cells):
        for fmt in formats:
            refused = trace.refusal(layer, role, fmt)
            found = None if refused else trace.predict(layer, role, fmt, LAST)
            damage = None
            if attribution is not None and found is not None:
                damage = attribution.cells[layer, role].damage(fmt, found.noise)
            rows.append(Row(layer, role, fmt, bits_of(fmt), found, damage, refused))
        if tell is not None:
            tell("predictions", i + 1, len(trace.cells))
    return rows


def options_from(rows: Sequence[Row]) -> dict[tuple[str, str], list[Option]]:
    """What each operand offers; without sensitivity its damage is its noise."""
    found: dict[tuple[str, str], list[Option]] = {}
    for row in rows:
        if row.prediction is not None:
            damage = row.damage if row.damage is not None else row.prediction.noise
            found.setdefault((row.layer, row.role), []).append(Option(row.format, row.bits, damage))
    return found


def advise_trace(
    trace: Trace,
    budget: Budget | None = None,
    *,
    loop: Loop | None = None,
    attribution: Attribution | None = None,
    tell: Tell | None = None,
) -> Advice:
    """Advice from a trace; with the loop that it was taken of, also sensitivity and the predictions' own error.

    Args:
        loop: standing where the trace ended; it is left there.
        attribution: known already, such as that of an earlier budget.
    """
    budget = budget or Budget()
    if loop is not None and attribution is None:
        attribution = attribute(loop, trace, budget.formats, tell=tell)
    formats = tuple(dict.fromkeys((*budget.formats, budget.high)))
    rows = rows_of(trace, formats, attribution, tell)
    values = {cell: trace.values(*cell) for cell in trace.cells}
    errors: dict[str, float] = {}
    whole: dict[str, float] = {}
    if loop is not None:
        errors["sqnr_db"] = sqnr_error(loop, trace, budget.formats)
        whole = everywhere(loop, trace, budget.formats, tell=tell)
    if attribution is not None:
        errors["completeness"] = attribution.completeness
    scalars = [name for name in budget.formats if not isinstance(get_format(name), BlockFormat)]
    for name, error in stall_error(trace, scalars).items():
        errors[f"stall_{name}"] = error
    tie_db = max(TIE_DB, 2 * errors.get("sqnr_db", 0.0))
    choice = choose(options_from(rows), values, budget, tie_db)
    storage = _storages(trace, choice, budget)
    recipe = recipe_from(choice.formats, trace, storage)
    advice = Advice(recipe, choice, rows, budget, errors=errors, left_high=dict(trace.untraced))
    advice.errors["tie_db"] = tie_db
    advice.stalls = stall_rows(trace, scalars)
    advice.everywhere = whole
    if attribution is None:
        advice.unknown.append("which operands matter most: every operand counts alike without a loop to ask")
    else:
        advice.gradient_snr_db = expected_snr(choice.damage, attribution.completeness)
    if loop is not None:
        advice.measured_snr_db = gradient_snr(loop, recipe)
    advice.facts = {"layers": len(trace.layers), "steps": len(trace.losses), "measured": len(trace.steps)}
    advice.seconds["trace"] = trace.seconds
    return advice


def _storages(trace: Trace, choice: Choice, budget: Budget) -> dict[str, StorageSpec]:
    """Grid storage by layer, rounded stochastically where nearest would lose most updates; tied layers alike."""
    if budget.storage == "master":
        return {}
    found: dict[str, StorageSpec] = {}
    for name, one in trace.layers.items():
        fmt = choice.formats.get((one.shares, "weight"))
        if fmt is None or get_format(fmt).emax >= 127:
            continue
        choice.formats[name, "weight"] = fmt
        lost = float(np.nanmean(stall_over(trace, [name], fmt, "nearest"))) if one.shares in trace.updates else 0.0
        found[name] = StorageSpec(fmt, rounding="stochastic" if lost > STALL_LIMIT else "nearest_even")  # type: ignore[arg-type]
    return found


def stall_rows(trace: Trace, formats: Sequence[str], threshold: float = 0.95) -> list[dict[str, Any]]:
    """Predicted stall over the schedule (without one: over the trace), all layers together."""
    if not trace.updates:
        return []
    rows = []
    for fmt in formats:
        for storage in STORAGES:
            curve = stall_over(trace, list(trace.layers), fmt, storage)
            if np.isnan(curve).all():
                continue
            step = freeze_step(curve, threshold) if trace.schedule else None
            rows.append(
                {
                    "format": fmt,
                    "storage": storage,
                    "mean": float(curve.mean()),
                    "end": float(curve[-1]),
                    "freezes_at": step,
                    "steps": len(trace.schedule),
                }
            )
    return rows


def expected_snr(damage: float, completeness: float) -> float | None:
    """Signal to noise of the gradient from the operands' damages, which add up as far as measured; None without damage."""
    whole = damage * (completeness if math.isfinite(completeness) and completeness > 0 else 1.0)
    return -10 * math.log10(whole) if whole > 0 else None


def gradient_snr(loop: Loop, recipe: Recipe) -> float:
    """-10 log10 of the recipe's damage (`sensitivity`) on the loop's next batch; inf where it does none."""
    error = damage_of(loop, recipe, exact_gradient(loop))
    return math.inf if error == 0 else -10 * math.log10(error)


def sqnr_error(loop: Loop, trace: Trace, formats: Sequence[str]) -> float:
    """Mean absolute error in dB of the trace's SQNR against direct quantization of the next batch's operands."""
    errors: list[float] = []

    def take(name: str, role: str, x: Any) -> None:
        layer = plain_name(name)
        for fmt in formats:
            if (layer, role) not in trace.operands or trace.refusal(layer, role, fmt):
                continue
            form = get_format(fmt)
            if isinstance(form, BlockFormat):
                stats = quantize_with_stats(x, form, pad=True)[1]
            else:
                scale = 1.0 if form.emax >= 127 else amax_scale(x, form)
                stats = quantize_with_stats(x, form, scale, overflow="saturate", clamp=True)[1]
            difference = float(stats.sqnr_db) - trace.predict(layer, role, fmt, LAST).sqnr_db
            if math.isfinite(difference):
                errors.append(abs(difference))

    hooks = watch_operands(loop.model, take)
    try:
        loop.gradient()
    finally:
        for hook in hooks:
            hook.remove()
    return float(np.mean(errors)) if errors else math.nan
