"""Writes what an autopsy found: verdict.json, autopsy.html and autopsy.md, in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from altgrad.autopsy.fork import LOW, TWIN
from altgrad.autopsy.moments import MomentCell
from altgrad.autopsy.oracle import LoopOracle
from altgrad.autopsy.verdict import Verdict
from altgrad.nn.recipe.cells import Cell
from altgrad.records.files import write_json, write_text
from altgrad.records.schema import jsonable
from altgrad.report.pages.autopsy import render_autopsy


def write_findings(
    out: Path, verdict: Verdict, oracle: LoopOracle, facts: Mapping[str, Any], command: str | None
) -> dict[str, Any]:
    """Write the findings into the folder `out`, which exists; returns what verdict.json holds.

    Args:
        facts: of the run, such as its run_id and seed.
        command: what repeats the autopsy; None where no command does.
    """
    losses = {"run": oracle.history(LOW), "twin": oracle.history(TWIN)}
    data: dict[str, Any] = {
        **verdict.as_dict(),
        "losses": {name: [v if v == v else None for v in values] for name, values in losses.items()},
        "places": {str(cell): [cell.layer, cell.gemm, cell.role] for cell in oracle.cells},
        "run": {**facts, "formats": oracle.loop.recipe.text},
        "command": command,
        "saving": saving_recipe(verdict, oracle),
    }
    write_json(out / "verdict.json", jsonable(data))
    html, markdown = render_autopsy(data)
    write_text(out / "autopsy.html", html)
    write_text(out / "autopsy.md", markdown)
    return data


def saving_recipe(verdict: Verdict, oracle: LoopOracle) -> str | None:
    """The recipe with the cells found in float32, as text that a config takes; None without a cause."""
    if not verdict.cells:
        return None
    guilty = [cell for cell in oracle.cells if str(cell) in verdict.cells]
    text = oracle.loop.recipe.rescue([cell for cell in guilty if isinstance(cell, Cell)], oracle.loop.model).text
    moments = [cell.role for cell in guilty if isinstance(cell, MomentCell)]
    return text + (f"\nand {' and '.join(moments)} in float32 (the optimizer's moment_format)" if moments else "")
