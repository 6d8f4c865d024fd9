"""Charts for notebooks, drawn by matplotlib (`pip install altgrad[plot]`): number lines, rounding errors, runs.

Each takes `ax`, a matplotlib Axes to draw on (None: a new figure's), and returns it. Colours are those of the reports:
a format looks the same in both.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from altgrad.analysis.outcome import label_runs
from altgrad.errors import FormatError, OptionError, ReportError
from altgrad.formats.catalog import get_format
from altgrad.formats.scalar import FloatFormat
from altgrad.records.run import Run, read_run
from altgrad.report.theme import BASELINE, LIGHT, LIGHT_SERIES, Style, styles_for

_SAMPLES_PER_BINADE = 256
_MOST_BINADES = 300


def plot_format(fmt: FloatFormat | str, ax: Any = None) -> Any:
    """`plot_formats` of one format."""
    return plot_formats([fmt], ax)


def plot_formats(formats: Sequence[FloatFormat | str], ax: Any = None) -> Any:
    """Where the positive values of each format lie: a row of marks per format on a shared log2 axis.

    Raises:
        FormatError: a block format, or one of too many values to list (more than 18 magnitude bits).
    """
    found = _scalar(formats)
    ax = ax or _axes(7, 0.9 + 0.45 * len(found))
    for row, (fmt, colour) in enumerate(zip(found, _colours(found))):
        values = fmt.magnitudes()
        values = np.log2(values[values > 0])
        ax.vlines(values, row - 0.32, row + 0.32, color=colour, linewidth=0.6)
    ax.set_yticks(range(len(found)), [str(fmt) for fmt in found])
    ax.invert_yaxis()
    _axis_of_magnitudes(ax, "value (a mark each; negative values mirror them)")
    return ax


def plot_error(formats: Sequence[FloatFormat | str] | FloatFormat | str, ax: Any = None, *, scale: float = 1.0) -> Any:
    """Largest relative error |x - quantize(x)| / |x| of rounding to nearest, in every binade of x, at one scale.

    1 is an underflow to zero, and beyond the format's max the error grows with saturation.

    Raises:
        FormatError: as `plot_formats`. OptionError: a scale that is not positive and finite.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise OptionError(f"scale {scale} is not positive and finite")
    found = _scalar([formats] if isinstance(formats, str | FloatFormat) else formats)
    ax = ax or _axes(7, 3.6)
    low = min(math.frexp(fmt.min_subnormal)[1] for fmt in found) - 3
    high = max(math.frexp(fmt.max)[1] for fmt in found) + 1
    low = max(low, high - _MOST_BINADES)
    exponents = np.arange(low, high)
    significands = 1 + np.arange(_SAMPLES_PER_BINADE) / _SAMPLES_PER_BINADE
    x = np.ldexp(significands, exponents[:, None])
    for fmt, style, colour in zip(found, styles_for([str(fmt) for fmt in found]), _colours(found)):
        grid = fmt.magnitudes()
        middles = (grid[1:] + grid[:-1]) / 2
        error = np.abs(x - grid[np.searchsorted(middles, x)]) / x
        ax.plot(
            exponents + 0.5 + math.log2(scale), error.max(axis=1), color=colour, linestyle=_dash(style), label=str(fmt)
        )
    ax.set_yscale("log", base=2)
    ax.set_ylabel("largest relative error")
    ax.legend(frameon=False)
    _axis_of_magnitudes(ax, "magnitude of x")
    return ax


def plot_run(runs: Run | str | Path | Sequence[Run | str | Path], ax: Any = None) -> Any:
    """Losses over steps: training thin, validation with its points; a collapse is marked at its first step.

    Args:
        runs: a run (`read_run`), a run's folder, or several.

    Raises:
        ReportError: a folder that is no run, or a run without a step.
    """
    several = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    read = [run if isinstance(run, Run) else read_run(run) for run in several]
    ax = ax or _axes(7, 4)
    styles = styles_for([run.format for run in read])
    for run, style, outcome in zip(read, styles, label_runs(read)):
        metrics = run.metrics()
        if not len(metrics.train):
            raise ReportError(f"{run.path} holds no step; continue the run, then plot it")
        colour = LIGHT["ink"] if style.slot == BASELINE else LIGHT_SERIES[style.slot]
        ax.plot(metrics.train.steps, metrics.train.values, color=colour, alpha=0.35, linewidth=0.8)
        look: dict[str, Any] = {"color": colour, "linestyle": _dash(style), "marker": "o", "markersize": 3}
        ax.plot(metrics.validation.steps, metrics.validation.values, label=outcome.label, **look)
        onset = (run.verdict or {}).get("onset_step")
        if isinstance(onset, int):
            ax.axvline(onset, color=LIGHT["signal"], linewidth=0.8, linestyle=":")
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats per token")
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(read) > 3 else {}  # many names cover curves
    ax.legend(frameon=False, **beside)
    return ax


def _dash(style: Style) -> Any:
    return (0, tuple(float(n) for n in style.dash.split())) if style.dash else "-"


def _scalar(formats: Sequence[FloatFormat | str]) -> list[FloatFormat]:
    found = [get_format(fmt) for fmt in formats]
    for fmt in found:
        if not isinstance(fmt, FloatFormat):
            raise FormatError(f"{fmt} is a block format; plot its element {fmt.element}")
        fmt.magnitudes()  # refuses what cannot be listed
    return found


def _colours(formats: Sequence[FloatFormat]) -> list[str]:
    styles = styles_for([str(fmt) for fmt in formats])
    return [LIGHT["ink"] if style.slot == BASELINE else LIGHT_SERIES[style.slot] for style in styles]


def _axes(width: float, height: float) -> Any:
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("plots need matplotlib, which is not installed: pip install altgrad[plot]")
    from matplotlib import pyplot

    _, ax = pyplot.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _axis_of_magnitudes(ax: Any, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda exponent, _: f"$2^{{{exponent:.0f}}}$"))
    ax.set_xlabel(label)
