"""Writes the failure report of a collapsed run: gathers what was measured and recorded.

The data come from the run folder (metrics, environment) and, where the collapsed state could be measured once more, from
the monitor's records of that. `altgrad.report.pages.failure` draws them.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from altgrad.diagnostics.fields import NEAR_ZERO
from altgrad.monitor.failure_rows import TREND_STEPS, gradient_facts, layer_columns, layer_rows, trends
from altgrad.records.files import write_json, write_text
from altgrad.records.metrics import RUN, metrics
from altgrad.records.run import FAILURE_REPORTS, Run
from altgrad.records.schema import as_number, jsonable
from altgrad.report.numbers import in_unit
from altgrad.report.pages.failure import (
    FailureData,
    Intervention,
    LossAround,
    RunFacts,
    VerdictFacts,
    render_failure,
)

Record = Mapping[str, Any]


def write_failure_report(
    *,
    run_dir: Path,
    checkpoint_dir: Path,
    result: Record,
    config: Mapping[str, Any],
    command: str | None,
    last_good: Path | None,
    collapsed: Path | None,
    records: Sequence[Record] = (),
) -> Path:
    """Write `<checkpoint_dir>/failure_reports/step-<detected>-<kind>.html`, `.md`, and `.json`, which holds the data of
    both (the fields of `FailureData`); returns the HTML's path.

    Args:
        run_dir: with metrics.jsonl and env.json, as far as they exist.
        result: the run's result (the schema of result.json), with a verdict.
        config: the resolved configuration.
        command: what reproduces the run; None for a run of a model, data or loss that were handed over in Python.
        last_good, collapsed: checkpoints of the last finite state before the onset and of the collapsed state.
        records: monitor records of the collapsed state, of a step that was then undone.
    """
    run = Run(run_dir)
    data = gather(
        metrics=run.records(),
        environment=run.environment or None,
        result=result,
        config=config,
        command=command,
        last_good=last_good,
        collapsed=collapsed,
        records=records,
    )
    folder = Path(checkpoint_dir) / FAILURE_REPORTS
    if command is not None and (config.get("formats") or config.get("recipe") or config.get("fp8_format")) not in (
        None,
        "FP32",
    ):
        page = os.path.relpath(run_dir / "autopsy" / "autopsy.html", folder)
        data = replace(data, explain=shlex.join(["altgrad", "autopsy", str(run_dir)]), explained_at=page)
    html, markdown = render_failure(data)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"step-{data.verdict.detected_step or 0:06d}-{data.verdict.kind}"
    write_json(folder / f"{stem}.json", jsonable(asdict(data)))
    write_text(folder / f"{stem}.md", markdown)
    write_text(folder / f"{stem}.html", html)
    return folder / f"{stem}.html"


def gather(
    *,
    metrics: Sequence[Record],
    environment: Mapping[str, Any] | None,
    result: Record,
    config: Mapping[str, Any],
    command: str | None,
    last_good: Path | None,
    collapsed: Path | None,
    records: Sequence[Record] = (),
) -> FailureData:
    """Everything measured of a collapse; a field that was not is None."""
    verdict = result["verdict"]
    steps = _last_by_step(m for m in metrics if m["kind"] == "step")
    monitored = [m for m in metrics if m["kind"] == "monitor"]
    last = list(records) or _last_step_only(monitored)
    notes = []
    if records:
        notes.append(
            f"The tables per layer were measured on one more step from the run's last state (step {records[0]['step']}), "
            "which was then undone."
        )
    if command is None:
        notes.append("The run was given its model, data or loss in Python: no command repeats it, the same call does.")
    if not monitored:
        notes.append(
            "The monitor was off (monitor.enabled): the diagnostics per layer have no trend over the last steps."
        )
    events = [m for m in metrics if m["kind"] == "event"]
    gradient = gradient_facts(last, config.get("monitor", {}).get("near_zero", NEAR_ZERO))
    if gradient is not None and gradient.all_nonfinite:
        notes.append("Every gradient element is NaN or infinite: no sparsity, norm or update follows from them.")
    updates = [r for r in last if r["role"] == "update" and "flips" in r and r.get("attempted")]
    layers = layer_rows(last)
    columns = layer_columns(layers)
    return FailureData(
        run=RunFacts(
            name=result["name"],
            run_id=result["run_id"],
            seed=result.get("seed"),
            format=result.get("format"),
            storage=result.get("storage"),
            rounding=result.get("rounding"),
            step=result.get("steps"),
            max_steps=result.get("max_steps"),
        ),
        verdict=VerdictFacts(
            kind=verdict["kind"],
            onset_step=verdict.get("onset_step"),
            detected_step=verdict.get("detected_step"),
            metric=verdict.get("metric"),
            value=as_number(verdict.get("value")),
            threshold=as_number(verdict.get("threshold")),
            reason=verdict.get("reason"),
            judged_on=verdict.get("judged_on"),
            evidence=_evidence(steps, verdict),
        ),
        loss=loss_around(steps, verdict.get("onset_step")),
        loss_steps=list(steps) or None,
        loss_values=[_loss(s) for s in steps.values()] or None,
        gradient=gradient,
        zero_update_layers=[r["layer"] for r in updates if r["flips"] == 0] if updates else None,
        layers_measured=len(updates) or None,
        layers=layers or None,
        layer_columns=columns,
        layers_step=last[0]["step"] if last else None,
        trends=trends(steps, monitored) or None,
        interventions=interventions(events, steps),
        checkpoint_good=_checkpoint(last_good),
        checkpoint_collapsed=_checkpoint(collapsed),
        reproduce=command,
        environment=environment and {k: v for k, v in environment.items() if not isinstance(v, dict | list)},
        config=_flat(config),
        notes=notes,
    )


def loss_around(steps: Mapping[int, Record], onset: int | None) -> LossAround | None:
    """Loss at the step before the onset, at it, at the last step, and the best finite one."""
    if not steps or onset is None:
        return None
    losses = {step: _loss(record) for step, record in steps.items()}
    before = [step for step in losses if step < onset]
    finite = [(loss, step) for step, loss in losses.items() if math.isfinite(loss)]
    at = lambda step: (step, losses[step]) if step in losses else None  # noqa: E731
    best = min(finite) if finite else None
    return LossAround(
        before=at(before[-1]) if before else None,
        at=at(onset),
        after=at(list(losses)[-1]),
        best=(best[1], best[0]) if best else None,
    )


def interventions(events: Sequence[Record], steps: Mapping[int, Record]) -> list[Intervention]:
    """Clips, shifts and skipped steps with what they changed; runs of the same kind are one line."""
    found: list[Intervention] = []
    groups: list[list[Record]] = []
    for event in events:
        if event.get("event") not in ("clip", "shift", "skip_nonfinite"):
            continue
        if groups and groups[-1][-1]["event"] == event["event"] != "shift":
            groups[-1].append(event)
        else:
            groups.append([event])
    for group in groups:
        first, last = group[0], group[-1]
        if first["event"] == "shift":
            detail = f"{first['from_format']} to {first['to_format']}, because of {first['reason']}"
            if first.get("rewound_to") is not None:
                detail += f"; weights from step {first['rewound_to']}"
            effect = _effect(first["step"], steps)
            found.append(Intervention(first["step"], "shift", detail, effect, to_format=first["to_format"]))
            continue
        span = f"{len(group)} steps, {first['step']} to {last['step']}" if len(group) > 1 else "one step"
        if first["event"] == "clip":
            norms = [n for n in (as_number(e.get("grad_norm")) for e in group) if n is not None]
            limit = as_number(last.get("clip_threshold"))
            effect = (
                f"gradient norm {max(norms):.3g} at most, cut to {limit:.3g}" if norms and limit is not None else None
            )
            found.append(Intervention(first["step"], "clip", span, effect))
        else:
            found.append(Intervention(first["step"], "step skipped", span, "non-finite: nothing was applied"))
    return found


def _effect(step: int, steps: Mapping[int, Record]) -> str | None:
    """Loss and stall rate before and after a shift, as far as they were measured."""
    before = [r for s, r in steps.items() if step - 10 <= s <= step]
    after = [r for s, r in steps.items() if step < s <= step + TREND_STEPS]
    parts = []
    for name, text in (("loss", "loss"), ("stall_rate", "stall rate")):
        values = [
            [v for v in (as_number(r.get(name)) for r in side) if v is not None and math.isfinite(v)]
            for side in (before, after)
        ]
        if values[0] and values[1]:
            parts.append(f"{text} {values[0][-1]:.4g} before, {values[1][-1]:.4g} at step {after[-1]['step']}")
    return "; ".join(parts) or None


def _evidence(steps: Mapping[int, Record], verdict: Record) -> list[tuple[str, str]]:
    onset, detected = verdict.get("onset_step"), verdict.get("detected_step")
    if onset is None or detected is None:
        return []
    stretch = [r for s, r in steps.items() if onset <= s <= detected]
    pairs = []
    skipped = sum(1 for r in stretch if not r.get("finite", True))
    if skipped:
        pairs.append(("Non-finite steps", f"{skipped} of {len(stretch)}"))
    for row in metrics():
        if row.roles != RUN or row.name == "loss":
            continue
        values = [v for v in (as_number(r.get(row.name)) for r in stretch) if v is not None and math.isfinite(v)]
        if values:
            low, high = (in_unit(value, row.unit) for value in (min(values), max(values)))
            pairs.append((f"{row.heading}, onset to detection", low if low == high else f"{low} to {high}"))
    return pairs


def _last_by_step(records: Iterable[Record]) -> dict[int, Record]:
    """One record per step, the last one where a resumed run wrote two; ascending."""
    by_step = {r["step"]: r for r in records}
    return {step: by_step[step] for step in sorted(by_step)}


def _last_step_only(monitored: Sequence[Record]) -> list[Record]:
    newest = max((r["step"] for r in monitored if r["role"] == "gradient"), default=None)
    return [r for r in monitored if r["step"] == newest]


def _loss(record: Record) -> float:
    loss = as_number(record["loss"])
    return math.nan if loss is None else loss


def _checkpoint(path: Path | None) -> tuple[str, int | None] | None:
    if path is None:
        return None
    digits = path.name.rsplit("-", 1)[-1]
    return str(path), int(digits) if digits.isdigit() else None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            flat[prefix + key] = value
    return flat
