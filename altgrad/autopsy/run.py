"""The autopsy of a run folder: the run is rebuilt from its config and replayed, which must give its recorded losses.

The findings are written to `<run>/autopsy/`: verdict.json, autopsy.html, autopsy.md, and forks.jsonl, from which an
interrupted autopsy goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from altgrad.autopsy.fork import LOW, TWIN
from altgrad.autopsy.forks import Forks, Told, read_log
from altgrad.autopsy.investigate import investigate
from altgrad.autopsy.loop import TrainerLoop
from altgrad.autopsy.oracle import LoopOracle, Tell, first_other
from altgrad.autopsy.search import Settings
from altgrad.autopsy.verdict import Verdict
from altgrad.errors import ConfigError, ReportError
from altgrad.quantization import NUMERICS_VERSION
from altgrad.records.files import write_json, write_text
from altgrad.records.run import Run
from altgrad.records.schema import as_number
from altgrad.report.pages.autopsy import render_autopsy
from altgrad.training.config.loading import load_config
from altgrad.training.trainer import Trainer

FOLDER = "autopsy"


@dataclass(frozen=True)
class Plan:
    """What an autopsy of a run will cost, before it starts."""

    run_dir: Path
    steps: int
    cells: int
    forks: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.steps} steps twice (the run again, and its float32 twin), then up to {self.forks} forks over "
            f"{self.cells} cells: about {self.seconds / 60:.0f} min"
        )


def autopsy(
    run_dir: str | Path,
    *,
    budget: int = 120,
    twin: str | Path | None = None,
    settings: Settings | None = None,
    tell: Tell | None = None,
    told: Callable[[Told], None] | None = None,
) -> Verdict:
    """Why the run in a folder went wrong; writes the page and the verdict beside it.

    Args:
        run_dir: of a run that `altgrad run` made from a config.
        budget: forks that may be run; those of an earlier, interrupted autopsy are not run again.
        twin: folder of a float32 run of the same seed and data; its recorded losses must be those of the replayed twin.
        tell, told: progress of the two trajectories, and of the forks.

    Raises:
        ReportError: the folder is no run, or lacks what a replay needs.
        ConfigError: the run cannot be replayed here: several ranks, other versions, data or a model given in Python, or
            losses that differ from the recorded ones (with the first step).
    """
    folder = Path(run_dir)
    trainer, recorded, result = rebuild(folder)
    steps = len(recorded)
    out = folder / FOLDER
    out.mkdir(exist_ok=True)
    oracle = LoopOracle(TrainerLoop(trainer), steps, seed=trainer.config.seed, tell=tell)
    other = first_other(recorded, oracle.history(LOW))
    if other is not None:
        raise ConfigError(
            f"the replay differs from the recorded run at step {other + 1} (loss {oracle.history(LOW)[other]!r}, recorded "
            f"{recorded[other]!r}): it ran on another machine, or its data changed; run it again here first"
        )
    if twin is not None:
        _check_twin(Path(twin), oracle)
    forks = Forks(oracle, budget=budget, log=out / "forks.jsonl", tell=told)
    start = max(c for c in oracle.captures(LOW) if c <= steps // 2)
    symptom = (result.get("verdict") or {}).get("detected_step")
    verdict = investigate(forks, symptom=symptom, prior=oracle.prior(start), settings=settings)
    write(folder, verdict, oracle, result)
    return verdict


def plan(run_dir: str | Path, budget: int = 120) -> Plan:
    """What an autopsy of the run will cost, from the run's own pace.

    Raises:
        ReportError, ConfigError: as `autopsy`.
    """
    folder = Path(run_dir)
    trainer, recorded, result = rebuild(folder)
    loop = TrainerLoop(trainer)
    pace = (result.get("wall_s") or 0.0) / max(1, len(recorded))
    known = len(read_log(folder / FOLDER / "forks.jsonl"))
    left = max(0, budget - known)
    return Plan(folder, len(recorded), len(loop.recipe.cells(loop.model)), left, pace * (2 * len(recorded) + 40 * left))


def fork_run(
    run_dir: str | Path, step: int, steps: int, choose: Callable[[list], frozenset]
) -> tuple[int, list[float], list[float], frozenset]:
    """Fork a run at the last step at or before `step` with the chosen cells in float32.

    Returns:
        (step forked from, the run's own losses, the fork's losses, the cells).
    """
    folder = Path(run_dir)
    trainer, recorded, _ = rebuild(folder)
    if not 0 <= step <= len(recorded):
        raise ConfigError(f"step {step} is not in this run of {len(recorded)} steps")
    loop = TrainerLoop(trainer)
    cells = list(loop.recipe.cells(loop.model))
    rescued = choose(cells)
    own = [loop.advance() for _ in range(step)]
    other = first_other(recorded, own)
    if other is not None:
        raise ConfigError(f"the replay differs from the recorded run at step {other + 1}; run it again here first")
    loop.put(loop.recipe.only(frozenset(cells) - rescued, loop.model))
    return step, recorded, [loop.advance() for _ in range(steps)], rescued


def _check_twin(folder: Path, oracle: LoopOracle) -> None:
    losses = recorded_losses(folder)
    other = first_other(losses, oracle.history(TWIN))
    if other is not None:
        raise ConfigError(
            f"{folder} is not the float32 twin: its loss of step {other + 1} is {losses[other]!r}, the twin's is "
            f"{oracle.history(TWIN)[other]!r}; leave --twin out, or give a float32 run of the same seed, data and steps"
        )


def rebuild(folder: Path) -> tuple[Trainer, list[float], Mapping[str, Any]]:
    """(trainer at the initial state, recorded losses of steps 1, 2, ..., result) of a run folder."""
    for name in ("config.yaml", "metrics.jsonl", "env.json"):
        if not (folder / name).is_file():
            raise ReportError(f"{folder} has no {name}; give the folder of a run, such as runs/e4m3-s42-1a2b3c4d")
    run = Run(folder)
    check_versions(folder, run.environment, run.result)
    config = load_config(folder / "config.yaml")
    threads = run.environment.get("threads")
    if not isinstance(threads, int) or threads < 1:
        raise ReportError(f"{folder}: env.json says {threads!r} threads; it is damaged, so the run cannot be replayed")
    torch.set_num_threads(threads)
    trainer = Trainer(config.model_copy(update={"monitor": config.monitor.model_copy(update={"enabled": False})}))
    losses = recorded_losses(folder)
    if len(losses) < 10:
        raise ConfigError(f"{folder} records {len(losses)} steps; an autopsy needs at least 10")
    return trainer, losses, run.result


def recorded_losses(folder: Path) -> list[float]:
    """Training losses of steps 1, 2, ... of a run folder, up to the first that is missing; NaN where not finite."""
    recorded = {record["step"]: as_number(record["loss"]) for record in Run(folder).records("step")}
    losses = []
    while len(losses) + 1 in recorded:
        loss = recorded[len(losses) + 1]
        losses.append(math.nan if loss is None or not math.isfinite(loss) else loss)
    return losses


def check_versions(folder: Path, environment: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Refuse a run whose replay here could not have its bits.

    Raises:
        ConfigError: it ran on several ranks, or under another torch or numerics version.
    """
    if environment.get("processes"):
        raise ConfigError(f"{folder} ran on {environment['processes']} ranks; an autopsy replays runs of one")
    versions = (
        ("torch", environment.get("torch"), version("torch")),
        ("numerics version", result.get("numerics_version"), NUMERICS_VERSION),
    )
    for name, then, now in versions:
        if then is not None and then != now:
            raise ConfigError(
                f"{folder} ran with {name} {then}, this is {now}: a replay would differ; run it again here"
            )


def write(folder: Path, verdict: Verdict, oracle: LoopOracle, result: Mapping[str, Any]) -> Path:
    """Write verdict.json, autopsy.html and autopsy.md into `<folder>/autopsy`; returns the page's path."""
    out = folder / FOLDER
    data: dict[str, Any] = {
        **verdict.as_dict(),
        "losses": {"run": oracle.history(LOW), "twin": oracle.history(TWIN)},
        "places": {str(cell): [cell.layer, cell.gemm, cell.role] for cell in oracle.cells},
        "run": {
            "run_id": result.get("run_id", folder.name),
            "seed": result.get("seed"),
            "formats": oracle.loop.recipe.text,
        },
        "command": f"altgrad autopsy {folder}",
        "saving": saving_recipe(verdict, oracle),
    }
    data["losses"] = {k: [v if v == v else None for v in values] for k, values in data["losses"].items()}
    write_json(out / "verdict.json", data)
    html, markdown = render_autopsy(data)
    write_text(out / "autopsy.html", html)
    write_text(out / "autopsy.md", markdown)
    return out / "autopsy.html"


def saving_recipe(verdict: Verdict, oracle: LoopOracle) -> str | None:
    """The recipe with the cells found in float32, as text that a config takes; None without a cause."""
    if not verdict.cells:
        return None
    guilty = frozenset(cell for cell in oracle.cells if str(cell) in verdict.cells)
    return oracle.loop.recipe.rescue(guilty, oracle.loop.model).text
