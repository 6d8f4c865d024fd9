"""One row for one metric: what it is called, of which tensors it is measured, in which unit, and where it is shown.

Everything that lists metrics ranges over these rows: the monitor's schedule and summary, the trends and tables of a
failure report, the heat maps and CSV columns of a study, the table in the docs. A record holds a metric under its name;
a name without a row (of an older or a foreign record) is still read, as a plain number.

    OVERFLOW = Metric("overflow", group="operands", over_layers=max, says="finite elements beyond the largest value")

To add one: a function of a step's tensors and a row, handed to `altgrad.monitor.add_metric`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from altgrad.errors import OptionError
from altgrad.report.numbers import Unit
from altgrad.report.text import SYMBOLS

FRACTION, DECIBEL, NUMBER, COUNT, SECONDS, FLAG = (
    Unit.FRACTION,
    Unit.DECIBEL,
    Unit.NUMBER,
    Unit.COUNT,
    Unit.SECONDS,
    Unit.FLAG,
)

OPERANDS = ("input", "weight", "grad_output")
"""Roles of what a layer's GEMMs multiply."""
PARAMETERS = ("weight", "gradient", "update")
"""Roles of a parameter's step."""
RUN = ("run",)
"""The whole model: a field of the step records."""

RECORD_KEYS = frozenset({"kind", "step", "layer", "role", "format"})
"""Fields of a monitor record that say of what it is; the others are metrics."""


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value; NaN and inf pass through."""
    return sum(values) / len(values)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: its key in the records.
        group: what the schedule turns on and off together; metrics of a group come out of one computation.
        roles: of which tensors it is measured: some of `OPERANDS`, some of `PARAMETERS`, or `RUN`.
        unit: how it prints.
        over_layers: what stands for several layers, `max` or `mean`; None: nothing does.
        needs_grid: it says something only of a tensor with a grid other than its dtype's own.
        says: one line for the docs.
        title: its heading; "" makes one of the name.
        lost: it is a share of numbers lost (to overflow, underflow or rounding), 1 being all.
        heads: role -> heading in the monitor's summary; roles that are left out are not shown there.
        drawn: a study draws it per layer over time.
        tabled: a failure report has a column for it in the table of layers.
    """

    name: str
    group: str
    roles: tuple[str, ...] = OPERANDS
    unit: Unit = FRACTION
    over_layers: Callable[[Sequence[float]], float] | None = max
    needs_grid: bool = True
    says: str = ""
    title: str = ""
    lost: bool = False
    heads: Mapping[str, str] = field(default_factory=dict, hash=False)
    drawn: bool = False
    tabled: bool = False

    @property
    def heading(self) -> str:
        """Its title, or its name in words."""
        return self.title or self.name.replace("_", " ").capitalize()

    @property
    def of_operands(self) -> bool:
        """Whether it is measured where an operand is quantized (and not on a parameter's step)."""
        return self.group == "operands"


def _operand(name: str, **facts) -> Metric:
    return Metric(name, "operands", OPERANDS, **facts)


def _update(name: str, group: str, **facts) -> Metric:
    return Metric(name, group, ("update",), **facts)


def _gradient(name: str, group: str, **facts) -> Metric:
    return Metric(name, group, ("gradient",), **{"needs_grid": False, "over_layers": mean, **facts})


def _weight(name: str, group: str, **facts) -> Metric:
    return Metric(name, group, ("weight",), **{"over_layers": mean, **facts})


def _of_run(name: str, **facts) -> Metric:
    return Metric(name, "step", RUN, over_layers=None, needs_grid=False, **facts)


_ROWS = [
    _operand(
        "overflow",
        says="finite elements beyond the largest value after rounding",
        lost=True,
        heads={role: f"over {short}" for role, short in SYMBOLS.items()},
        drawn=True,
        tabled=True,
    ),
    _operand(
        "underflow",
        over_layers=mean,
        says="nonzero elements that became zero",
        lost=True,
        heads={"grad_output": "under dy"},
        drawn=True,
        tabled=True,
    ),
    _operand(
        "sqnr_db",
        unit=DECIBEL,
        over_layers=mean,
        says="signal to quantization noise, 10 log10(sum x^2 / sum (x - q)^2)",
        title="SQNR",
        heads={role: f"SQNR {short}" for role, short in SYMBOLS.items()},
        drawn=True,
        tabled=True,
    ),
    _operand(
        "amax",
        unit=NUMBER,
        needs_grid=False,
        says="largest magnitude among finite elements",
        title="Largest",
        tabled=True,
    ),
    _operand("nonfinite_frac", needs_grid=False, says="NaN and infinite elements", title="NaN or inf", tabled=True),
    _operand("scale", unit=NUMBER, over_layers=mean, says="the scale, where it is one number"),
    _operand(
        "blocks_saturated",
        says="blocks whose largest element lies beyond the largest value at their scale",
        drawn=True,
        tabled=True,
    ),
    _operand("blocks_flushed", says="blocks that became zeros altogether", drawn=True, tabled=True),
    _operand(
        "block_scale_low", unit=NUMBER, over_layers=min, says="binade of the scale that 1 % of blocks do not exceed"
    ),
    _operand(
        "block_scale_median",
        unit=NUMBER,
        over_layers=mean,
        says="binade of the median block's scale, floor(log2 scale)",
        title="Block scale, log2",
        drawn=True,
        tabled=True,
    ),
    _operand("block_scale_high", unit=NUMBER, says="binade of the scale that 99 % of blocks do not exceed"),
    _update(
        "stall",
        "stall",
        over_layers=mean,
        says="attempted updates after which the code of a stored weight was unchanged",
        lost=True,
        heads={"update": "stall"},
        drawn=True,
        tabled=True,
    ),
    _update(
        "predicted_stall",
        "stall",
        over_layers=mean,
        says="the stall expected before the step, from histograms of weights and of the last updates",
        heads={"update": "pred."},
    ),
    _update(
        "half_steps",
        "stall",
        unit=NUMBER,
        over_layers=mean,
        says="the median update over half the grid's spacing at the median weight; below 1 rounding to nearest loses most",
    ),
    _update(
        "code_unchanged",
        "stall",
        over_layers=mean,
        says="the same as `stall` for a master copy, whose value moved although its code did not",
        heads={"update": "same code"},
    ),
    _update("flip_rate", "stall", over_layers=mean, says="elements whose code changed", heads={"update": "flips"}),
    _update("flips", "stall", unit=COUNT, over_layers=None, says="the same, counted"),
    _update(
        "attempted",
        "stall",
        unit=COUNT,
        over_layers=None,
        needs_grid=False,
        says="elements that the optimizer would change, before storage rounding",
    ),
    _update("attempted_frac", "stall", over_layers=mean, needs_grid=False, says="the same as a fraction"),
    _update(
        "steps_mean",
        "movement",
        unit=NUMBER,
        over_layers=mean,
        says="grid steps that an element moved, mean",
        heads={"update": "steps"},
    ),
    _update(
        "steps_median", "movement", unit=NUMBER, over_layers=mean, says="grid steps, median (exact up to 8, else low)"
    ),
    _update("steps_max", "movement", unit=NUMBER, says="grid steps, largest"),
    _update(
        "ulp_mean", "movement", unit=NUMBER, over_layers=mean, needs_grid=False, says="ULPs of the carrier moved, mean"
    ),
    _update(
        "ulp_median",
        "movement",
        unit=NUMBER,
        over_layers=mean,
        needs_grid=False,
        says="ULPs of the carrier, median (at most a quarter of a binade low)",
    ),
    _update("ulp_max", "movement", unit=NUMBER, needs_grid=False, says="ULPs of the carrier, largest"),
    _update(
        "ulp_zero_frac", "movement", over_layers=mean, needs_grid=False, says="elements whose value did not change"
    ),
    Metric(
        "l2",
        "norms",
        PARAMETERS,
        unit=NUMBER,
        over_layers=mean,
        needs_grid=False,
        says="L2 norm over finite elements",
        heads={"gradient": "|g|"},
    ),
    Metric("linf", "norms", PARAMETERS, unit=NUMBER, needs_grid=False, says="largest magnitude"),
    Metric(
        "zero_frac",
        "sparsity",
        ("weight", "gradient"),
        over_layers=mean,
        needs_grid=False,
        says="exact zeros",
        heads={"gradient": "g=0"},
    ),
    _gradient("near_zero_frac", "sparsity", says="nonzero elements below the near-zero limit (1e-8)"),
    Metric(
        "nonfinite_frac",
        "sparsity",
        ("weight", "gradient"),
        needs_grid=False,
        says="NaN and infinite elements",
        title="NaN or inf",
    ),
    _gradient("elements", "sparsity", unit=COUNT, over_layers=None, says="elements of the gradient"),
    _weight(
        "stiffness_mean",
        "stiffness",
        unit=NUMBER,
        needs_grid=False,
        says="mean of 2^(floor(log2 abs w) - M) over nonzero weights",
    ),
    _weight("grid_error_mean", "alignment", unit=NUMBER, says="distance from the grid, mean"),
    _weight("grid_error_std", "alignment", unit=NUMBER, says="distance from the grid, standard deviation"),
    _weight("grid_error_max", "alignment", unit=NUMBER, over_layers=max, says="distance from the grid, largest"),
    _weight("on_grid_frac", "alignment", says="weights that are grid values"),
    _gradient(
        "grad_stiff_correlation", "correlation", unit=NUMBER, says="Pearson correlation of abs gradient and stiffness"
    ),
    _gradient("grad_stiff_ratio_mean", "correlation", unit=NUMBER, says="mean of abs gradient / stiffness"),
    _gradient(
        "grad_below_stiffness_frac",
        "correlation",
        says="gradients below the stiffness of their weight",
        heads={"gradient": "g<S"},
    ),
    _gradient("dead_outputs", "units", says="rows of the weight without any gradient"),
    _gradient("dead_inputs", "units", says="columns of the weight without any gradient"),
    _weight(
        "effective_rank",
        "rank",
        unit=NUMBER,
        needs_grid=False,
        says="exp of the entropy of the normalized singular values",
        heads={"weight": "rank"},
        tabled=True,
    ),
    _weight("stable_rank", "rank", unit=NUMBER, needs_grid=False, says="||W||_F^2 / ||W||_2^2"),
    _weight(
        "rank_collapsed", "rank", unit=FLAG, over_layers=None, needs_grid=False, says="the effective rank fell too far"
    ),
    _weight("rank_seconds", "rank", unit=SECONDS, over_layers=None, needs_grid=False, says="what measuring it cost"),
    _gradient(
        "reference_snr_db",
        "reference",
        unit=DECIBEL,
        says="signal to noise against the gradient of an FP32 pass",
        heads={"gradient": "g SNR"},
    ),
    _gradient("reference_cosine", "reference", unit=NUMBER, says="cosine of both gradients"),
    _gradient(
        "noise_ratio",
        "reference",
        unit=NUMBER,
        over_layers=min,
        says="norm of the FP32 gradient over that of the quantization noise; training is said to stall below sqrt(3)",
        title="Gradient over noise",
        heads={"gradient": "g/noise"},
        drawn=True,
        tabled=True,
    ),
    _gradient(
        "batch_noise_scale",
        "reference",
        unit=NUMBER,
        says="micro-batches whose mean gradient is as much noise as signal; needs two in a step",
    ),
    _gradient("reference_seconds", "reference", unit=SECONDS, over_layers=None, says="what measuring it cost"),
    _weight(
        "oscillation",
        "oscillation",
        unit=NUMBER,
        says="way of the quantized weight over its master's since the last record; about 1 where it travels (arXiv:2502.20853)",
        heads={"weight": "R"},
        drawn=True,
        tabled=True,
    ),
    _weight("oscillating", "oscillation", says="elements for which that is above 16", drawn=True),
    _weight(
        "code_flips", "oscillation", says="elements whose quantized value changes in a step, mean since the last record"
    ),
    _of_run("loss", unit=NUMBER, says="training loss, nats per token"),
    _of_run("grad_norm", unit=NUMBER, says="L2 norm of all gradients before clipping", title="Gradient norm"),
    _of_run("stall_rate", says="stalled / attempted updates of all stored weights", lost=True),
    _of_run("flip_rate", says="stored weights whose code changed"),
    _of_run("overflow_rate", says="largest overflow over layers and roles", lost=True),
]


def metrics() -> tuple[Metric, ...]:
    """All rows, those that were added last."""
    return tuple(_ROWS)


def find_metric(name: str, role: str | None = None) -> Metric | None:
    """The row of a metric per layer of that name (measured of `role`, where one is given, which may be "run").

    None for a name without a row. One with rows in several groups has the same unit, title and way over layers in all.
    """
    of = (lambda row: row.roles != RUN) if role is None else (lambda row: role in row.roles)
    return next((row for row in _ROWS if row.name == name and of(row)), None)


def groups(rows: Iterable[Metric] | None = None) -> tuple[str, ...]:
    """The groups that a schedule knows, in the order of their rows."""
    chosen = _ROWS if rows is None else rows
    return tuple(dict.fromkeys(row.group for row in chosen if row.roles != RUN))


def drawn_names() -> tuple[str, ...]:
    """Names of the metrics that a study draws per layer."""
    return tuple(dict.fromkeys(row.name for row in _ROWS if row.drawn))


def register(row: Metric) -> Metric:
    """Add a row; `altgrad.monitor.add_metric` does so for a metric with a function of its own.

    Raises:
        OptionError: the name is no plain name or belongs to a record's own fields, there is a row of that name, the
            roles are not some of one kind, or a heading is for a role that is not measured.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", row.name) or row.name in RECORD_KEYS:
        raise OptionError(
            f"metric name {row.name!r} is not a plain name such as 'kurtosis', or is a record's own field"
        )
    if any(row.name == other.name for other in _ROWS):
        raise OptionError(f"there is a metric {row.name!r} already; choose another name")
    kinds = [kind for kind in (OPERANDS, PARAMETERS, RUN) if row.roles and set(row.roles) <= set(kind)]
    if not kinds:
        raise OptionError(f"metric {row.name}: roles {row.roles} are not some of {OPERANDS}, of {PARAMETERS} or {RUN}")
    if strange := sorted(set(row.heads) - set(row.roles)):
        raise OptionError(f"metric {row.name}: a heading for {strange[0]!r}, which is not among its roles {row.roles}")
    if row.tabled and not row.of_operands and len(row.roles) != 1:
        raise OptionError(f"metric {row.name}: a table has one column for it; measure it of one role, not {row.roles}")
    _ROWS.append(row)
    return row


def unregister(name: str) -> None:
    """Take an added row out again; nothing happens without one."""
    _ROWS[:] = [row for row in _ROWS if row.name != name or row in _BUILT_IN]


_BUILT_IN = tuple(_ROWS)


def markdown_table() -> str:
    """Every metric per group as a Markdown table, as the docs have it."""
    lines = ["| group | metric | of | unit | what it is |", "|---|---|---|---|---|"]
    for row in _ROWS:
        if row.roles != RUN:
            cells = (f"`{row.group}`", f"`{row.name}`", ", ".join(row.roles), str(row.unit) or "-", row.says)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
