"""Draws the failure report of one collapsed run, as HTML and as Markdown."""

from __future__ import annotations

from altgrad.report.failure_data import (
    FailureData,
    GradientFacts,
    Intervention,
    LayerRow,
    LossAround,
    RunFacts,
    Trend,
    VerdictFacts,
)

__all__ = [
    "FailureData",
    "GradientFacts",
    "Intervention",
    "LayerRow",
    "LossAround",
    "RunFacts",
    "Trend",
    "VerdictFacts",
    "render_failure",
]


def render_failure(data: FailureData) -> tuple[str, str]:
    """(html, markdown): one self-contained page that opens offline, and the same content as Markdown."""
    raise NotImplementedError
