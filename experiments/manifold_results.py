"""What the study of updates by grid steps measured, as tables and one figure: `python -m experiments.manifold_results`.

`experiments.manifold` writes `manifold.json` (the study, every tuning run, every final run); the tables and the figure
are functions of that file alone, so the committed one prints what docs/findings/manifold.md tells.

    python -m experiments.manifold_results                                   # the committed results
    python -m experiments.manifold_results runs/manifold/manifold.json --figure figure.html
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from altgrad.analysis.statistics import Comparison, Estimate, estimate, holm, paired
from altgrad.optim.grid import position
from altgrad.quantization.parameter_grid import declared_grid
from altgrad.records.folders import read_bytes
from altgrad.records.run import Run
from altgrad.report.charts.figures import figure
from altgrad.report.charts.rows import IntervalRow, interval_chart
from altgrad.report.pages.page import render_page
from altgrad.report.theme import BASELINE, Style, styles_for
from altgrad.training import Trainer, load_config
from altgrad.training.run.checkpoint import load_checkpoint

COMMITTED = Path(__file__).parent / "results" / "manifold.tar.xz" / "manifold.json"
STOCHASTIC = "adamw_stochastic"
"""The arm that grid-aware ones are compared with beside the control: what is left to gain once rounding is unbiased."""
GRID_AWARE = ("manifold_update", "grid_optim", "lns_madam")
"""Arms whose updates are counted in grid steps: drawn in the format's colour."""

DIVERGED = 12.0
"""Nats per byte from which a run counts as diverged: twice the loss of guessing. Such runs are counted, not averaged."""

Study = dict[str, Any]
Record = dict[str, Any]


# -- from run folders ---------------------------------------------------------------------------------------------


def final_loss(run: Run) -> float:
    """Validation loss at the end; inf where it is not finite or missing."""
    value = run.number("final_val_loss")
    return float("inf") if value is None or value != value else value


def run_record(run: Run, arm: str, *, movement: bool) -> Record:
    """The numbers of one run; with `movement` also those that need its checkpoints and monitor records."""
    return {
        "format": run.format,
        "arm": arm,
        "seed": run.seed,
        "lr": float(run.config["optimizer"]["lr"]),
        "val_loss": final_loss(run),
        "stall_rate": run.number("stall_rate"),
        **(movement_numbers(run) if movement else {}),
    }


def movement_numbers(run: Run) -> Record:
    """How far the weights on the grid went, in grid steps, means over weights.

    Returns:
        path: sum over steps of the grid steps moved; net: grid steps between the first weight and the last, on the last
        grid; state_bytes: optimizer state per trained parameter. path and net are None without grid storage.
    """
    trainer = Trainer(load_config(run.path / "config.yaml"))
    checkpoints = run.path / "checkpoints"
    weights = {n: p for n, p in trainer.model.named_parameters() if declared_grid(p) is not None}
    trainer.restore(load_checkpoint(checkpoints / "step-00000000").state["trainer"])
    first = {n: p.detach().clone() for n, p in weights.items()}
    trainer.restore(load_checkpoint(checkpoints / f"step-{run.result['steps']:08d}").state["trainer"])
    parameters = sum(p.numel() for p in trainer.parameters)
    numbers = {"state_bytes": run.result["details"]["optimizer_state_bytes"] / parameters, "path": None, "net": None}
    if not weights:
        return numbers
    moved = torch.cat([_net(first[n], p).flatten() for n, p in weights.items()])
    sizes = {n.rpartition(".")[0]: p.numel() for n, p in weights.items()}
    total = 0.0
    for record in run.metrics(monitor_steps=None, columns=()).monitor:
        if record["role"] == "update" and record["layer"] in sizes:
            total += record.get("steps_mean", 0.0) * sizes[record["layer"]]
    return {**numbers, "path": total / sum(sizes.values()), "net": moved.mean().item()}


def _net(first: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    grid = declared_grid(parameter)
    assert grid is not None
    return (position(parameter.detach(), grid) - position(first, grid)).abs()


# -- tables -------------------------------------------------------------------------------------------------------


class Results:
    """A study's results: `manifold.json`, read."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.study: Study = data["study"]
        self.tuning: list[Record] = data["tuning"]
        self.runs: list[Record] = data["runs"]
        self._by_cell: dict[tuple[str, str], list[Record]] = {}
        for record in self.runs:
            self._by_cell.setdefault((record["arm"], record["format"]), []).append(record)

    @staticmethod
    def read(path: Path) -> Results:
        """From a file; infinite losses are stored as JSON's Infinity."""
        return Results(json.loads(read_bytes(path)))

    @property
    def formats(self) -> list[str]:
        return [f for f in self.study["formats"] if any(f == cell[1] for cell in self._by_cell)]

    def arms(self, fmt: str) -> list[str]:
        """Arms that ran for a format, in the study's order."""
        return [a for a in self.study["arms"] if (a, fmt) in self._by_cell]

    def of(self, arm: str, fmt: str, quantity: str) -> dict[int, float]:
        """seed -> quantity, for the runs that have it and did not diverge."""
        sound = (r for r in self._by_cell.get((arm, fmt), []) if r["val_loss"] < DIVERGED)
        return {r["seed"]: r[quantity] for r in sound if r.get(quantity) is not None}

    def count(self, arm: str, fmt: str) -> str:
        """How many runs a mean is over, and how many diverged."""
        sound, all_runs = len(self.of(arm, fmt, "val_loss")), len(self._by_cell[arm, fmt])
        return f"n={sound}" if sound == all_runs else f"n={sound}, {all_runs - sound} diverged"

    def mean(self, arm: str, fmt: str, quantity: str) -> Estimate | None:
        """Mean over seeds with its 95% interval."""
        values = self.of(arm, fmt, quantity)
        return estimate(list(values.values()), list(values)) if values else None

    def compare(self, arm: str, reference: str, fmt: str, *, without_tuning_seed: bool = False) -> Comparison | None:
        """Final validation loss of an arm minus the reference's, paired by seed."""
        left_out = self.study["seeds"][0] if without_tuning_seed else None
        a, b = ({s: v for s, v in self.of(x, fmt, "val_loss").items() if s != left_out} for x in (arm, reference))
        return paired(a, b)

    def adjusted(self, reference: str) -> dict[tuple[str, str], float]:
        """Holm's p of every comparison with the reference, over all formats and arms at once; master weights left out."""
        found = {
            (arm, fmt): c.p
            for fmt in self.formats
            for arm in self.arms(fmt)
            if arm != reference
            and self.study["arms"][arm].get("weight_storage") is None
            and (c := self.compare(arm, reference, fmt)) is not None
            and c.p is not None
        }
        return dict(zip(found, holm(list(found.values())), strict=True))

    def rate(self, arm: str, fmt: str) -> float:
        """The learning rate that the cell's runs were made with."""
        return self._by_cell[arm, fmt][0]["lr"]

    def at_edge(self, arm: str, fmt: str) -> bool:
        """Whether the chosen learning rate is the least or the greatest of those tried."""
        rates = [r["lr"] for r in self.tuning if (r["arm"], r["format"]) == (arm, fmt)]
        return bool(rates) and self.rate(arm, fmt) in (min(rates), max(rates))


def _difference(found: Comparison | None) -> str:
    if found is None:
        return "-"
    d = found.difference
    return f"{d.mean:+.3f}" if d.low is None or d.high is None else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def _number(value: float | Estimate | None, digits: int) -> str:
    value = value.mean if isinstance(value, Estimate) else value
    return "-" if value is None else f"{value:.{digits}f}"


def main_table(results: Results) -> str:
    """Markdown: every cell's loss, its paired differences to both references, movement and state."""
    control = results.study["control"]
    corrected = {reference: results.adjusted(reference) for reference in (control, STOCHASTIC)}

    def against(reference: str, arm: str, fmt: str) -> str:
        if arm == reference:
            return "0"
        p = corrected[reference].get((arm, fmt))
        return _difference(results.compare(arm, reference, fmt)) + ("*" if p is not None and p < 0.05 else "")

    lines = [
        f"| format | arm | lr | val loss | minus {control} [95%] | minus {STOCHASTIC} [95%] | stall | path | net | state B |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for fmt in results.formats:
        for arm in results.arms(fmt):
            rate = f"{results.rate(arm, fmt):g}{' (edge)' if results.at_edge(arm, fmt) else ''}"
            cells = [
                fmt,
                arm,
                rate,
                f"{_number(results.mean(arm, fmt, 'val_loss'), 3)} ({results.count(arm, fmt)})",
                against(control, arm, fmt),
                against(STOCHASTIC, arm, fmt),
                _number(results.mean(arm, fmt, "stall_rate"), 3),
                _number(results.mean(arm, fmt, "path"), 1),
                _number(results.mean(arm, fmt, "net"), 1),
                _number(results.mean(arm, fmt, "state_bytes"), 1),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seed_table(results: Results) -> str:
    """Markdown: the comparison with stochastic AdamW once more, without the seed that learning rates were tuned on."""
    lines = ["| format | arm | all seeds | without the tuning seed |", "|---|---|---|---|"]
    for fmt in results.formats:
        for arm in results.arms(fmt):
            if arm != STOCHASTIC:
                both = (results.compare(arm, STOCHASTIC, fmt, without_tuning_seed=w) for w in (False, True))
                lines.append(f"| {fmt} | {arm} | " + " | ".join(map(_difference, both)) + " |")
    return "\n".join(lines)


def tuning_table(results: Results) -> str:
    """Markdown: validation loss of every tuning run, and what a finer choice of rates would gain by estimate."""
    lines = ["| format | arm | lr: val loss | left to gain |", "|---|---|---|---|"]
    cells: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in results.tuning:
        cells[record["format"], record["arm"]].append(record)
    for (fmt, arm), records in cells.items():
        records.sort(key=lambda r: r["lr"])
        tried = ", ".join(f"{r['lr']:g}: {r['val_loss']:.3f}" for r in records)
        lines.append(f"| {fmt} | {arm} | {tried} | {_number(left_to_gain([r['val_loss'] for r in records]), 3)} |")
    return "\n".join(lines)


def left_to_gain(losses: list[float]) -> float | None:
    """Least loss minus the vertex of the parabola through it and its two neighbours, for evenly spaced log rates.

    None where the least loss is at an edge.
    """
    best = min(range(len(losses)), key=losses.__getitem__)
    if best in (0, len(losses) - 1):
        return None
    left, middle, right = losses[best - 1 : best + 2]
    return (left - right) ** 2 / (8 * (left - 2 * middle + right))


# -- figure -------------------------------------------------------------------------------------------------------


def format_chart(results: Results, fmt: str) -> Markup:
    """Final loss of every arm on one format: each seed, the mean, its interval; the line is stochastic AdamW."""
    arms = [a for a in results.arms(fmt) if results.of(a, fmt, "val_loss")]
    rows = []
    for arm in arms:
        found = results.mean(arm, fmt, "val_loss")
        assert found is not None
        text = "" if arm == STOCHASTIC else _difference(results.compare(arm, STOCHASTIC, fmt))
        if "diverged" in (count := results.count(arm, fmt)):
            text += f" ({count})"
        points = tuple(results.of(arm, fmt, "val_loss").values())
        style = styles_for([fmt])[0] if arm in GRID_AWARE else Style(BASELINE)
        rows.append(IntervalRow(arm, found.mean, found.low, found.high, style, text, points))
    reference = results.mean(STOCHASTIC, fmt, "val_loss")
    return figure(
        fmt,
        interval_chart(
            rows,
            title=f"Final validation loss on {fmt}",
            description=f"Every arm with all seeds; the line is {STOCHASTIC}.",
            x_label="validation loss, nats per token",
            reference=None if reference is None else reference.mean,
        ),
    )


def figure_page(results: Results) -> str:
    """One HTML page: a chart per format on top of each other, and what the marks mean."""
    return render_page(
        "figures.html.j2",
        title="Who gains from updates by grid steps?",
        kind="figure",
        headline="Who gains from updates by grid steps?",
        lede=[
            "In colour: optimizers that step along the grid. Small dots: seeds; large dot and bar: mean and 95% interval. "
            "Vertical line: AdamW with stochastic storage; at the right the difference to it, paired by seed."
        ],
        figures=[format_chart(results, fmt) for fmt in results.formats],
    )


def main() -> None:
    """Print the tables, and write the figure where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "results", nargs="?", type=Path, default=COMMITTED, help="a study's manifold.json, in a folder or a pack"
    )
    parser.add_argument("--figure", type=Path, help="HTML page to write")
    arguments = parser.parse_args()
    results = Results.read(arguments.results)
    print(main_table(results))
    print("\n* p < 0.05 after Holm's correction over all cells\n")
    print(seed_table(results) + "\n")
    print(tuning_table(results))
    if arguments.figure:
        arguments.figure.write_text(figure_page(results))


if __name__ == "__main__":
    main()
