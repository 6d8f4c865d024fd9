"""What a record says as plain data, for pages and tables: the claim, its verdict, findings and trials."""

from __future__ import annotations

import math
from typing import Any

from altgrad.reproduce.claim import MOST_SEEDS
from altgrad.reproduce.run import Record


def data_of(record: Record, command: str = "") -> dict[str, Any]:
    """The record as plain data, for pages and tables."""
    claim, verdict = record.claim, record.verdict
    findings = [
        {
            "quantity": finding.criterion.quantity,
            "says": finding.criterion.says,
            "low": _finite(finding.criterion.low),
            "high": _finite(finding.criterion.high),
            "outcome": finding.outcome,
            "needed": finding.needed,
            "most": MOST_SEEDS,
            "nonfinite": finding.nonfinite,
            "mean": finding.estimate.mean if finding.estimate else None,
            "interval": [finding.estimate.low, finding.estimate.high] if finding.estimate else [None, None],
            "n": finding.estimate.n if finding.estimate else 0,
            "values": [values.get(finding.criterion.quantity) for values in record.by_seed.values()],
        }
        for finding in verdict.findings
    ]
    return {
        "name": claim.name,
        "number": claim.number,
        "paper": claim.paper,
        "url": claim.url,
        "statement": claim.statement,
        "secondary": claim.secondary,
        "watch": claim.watch,
        "needs": claim.needs,
        "protocol": claim.protocol.says if claim.protocol else "",
        "seeds": list(record.by_seed),
        "planned": claim.protocol.seeds if claim.protocol else 0,
        "verdict": verdict.kind,
        "quick": record.quick,
        "moved": record.moved,
        "seconds": record.seconds,
        "minutes": record.minutes,
        "measured": record.measured,
        "rates": dict(record.rates),
        "findings": findings,
        "trials": [{"arm": t.arm, "seed": t.seed, "rate": t.rate, "values": dict(t.values)} for t in record.trials],
        "command": command,
    }


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None
