"""The figure of the calibration: how often cells are right, by damage, and what monitors would have named instead."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from altgrad.report.charts.figures import figure
from altgrad.report.charts.rows import IntervalRow, interval_chart
from altgrad.report.pages.page import render_page
from altgrad.report.theme import BASELINE, Style
from benchmarks.autopsy_calibration.score import (
    Rate,
    Record,
    answered,
    baseline_rates,
    is_null,
    of_damage,
    rate,
    right,
)


def chart(records: Sequence[Record]) -> Markup:
    """Shares with Clopper-Pearson intervals: the autopsy by damage, and the baselines on the same faults."""
    faults = [record for record in records if not is_null(record)]
    own, other = Style(3), Style(BASELINE)
    rows = [_row("autopsy, all that it answered", rate([r for r in faults if answered(r)], right), own)]
    for name, some in of_damage(faults):
        rows.append(_row(f"  {name} nats", rate([r for r in some if answered(r)], right), own))
    rows += [_row(name, whole, other) for name, (whole, _) in baseline_rates(faults).items()]
    title = "Share of verdicts that name the right cells"
    description = (
        "An autopsy, by the damage that the fault does, and monitors asked for the guilty cell of the same runs."
    )
    drawn = interval_chart(
        rows, title=title, description=description, x_label="percent right", reference=95.0, reference_label="95%"
    )
    return figure(title, drawn, "Intervals are Clopper and Pearson's, 95%.")


def _row(name: str, found: Rate, style: Style) -> IntervalRow:
    low, high = found.interval
    share = None if found.share is None else 100 * found.share
    return IntervalRow(name, share, 100 * low, 100 * high, style, f"{found.right}/{found.of}")


def page(records: Sequence[Record]) -> str:
    """The figure as a page that opens offline."""
    return render_page(
        "figures.html.j2",
        title="What an autopsy's verdict is worth",
        kind="figure",
        headline="What an autopsy's verdict is worth",
        lede=[
            f"Of {len(records)} cases. In colour: the autopsy, all its answers and by the damage that the fault does. In black: what "
            "a monitor's worst cell would have been, on the same faults. Dot and bar: share and 95% interval."
        ],
        figures=[chart(records)],
    )
