"""The autopsy of a run folder: the run is rebuilt from its config and replayed, which must give its recorded losses.

The findings are written to `<run>/autopsy/`: verdict.json, autopsy.html, autopsy.md, and forks.jsonl, from which an
interrupted autopsy goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from altgrad.autopsy.fork import LOW, TWIN
from altgrad.autopsy.findings import write_findings
from altgrad.autopsy.forks import Forks, Told, read_log
from altgrad.autopsy.investigate import investigate
from altgrad.autopsy.loop import TrainerLoop
from altgrad.autopsy.oracle import CAPTURES, LoopOracle, Tell, cells_of, first_other, put_low
from altgrad.autopsy.plan import Plan, measure
from altgrad.autopsy.search import Settings, expected_forks
from altgrad.autopsy.verdict import Verdict
from altgrad.autopsy.workers import Executor, Workers, processes
from altgrad.errors import ConfigError, OptionError, ReportError
from altgrad.quantization import NUMERICS_VERSION
from altgrad.records.run import Run
from altgrad.records.schema import as_number
from altgrad.training.config.loading import load_config
from altgrad.training.trainer import Trainer

FOLDER = "autopsy"


def autopsy(
    run_dir: str | Path,
    *,
    budget: int = 120,
    twin: str | Path | None = None,
    settings: Settings | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
    tell: Tell | None = None,
    told: Callable[[Told], None] | None = None,
) -> Verdict:
    """Why the run in a folder went wrong; writes the page and the verdict beside it.

    Args:
        run_dir: of a run that `altgrad run` made from a config.
        budget: forks that may be run; those of an earlier, interrupted autopsy are not run again.
        twin: folder of a float32 run of the same seed and data; its recorded losses must be those of the replayed twin.
        jobs: forks at a time; more than 1 run in processes of this machine, with the run's own number of threads each.
        executor: runs the forks in place of those processes; its workers must see the run's folder under the same path.
        tell, told: progress of the two trajectories, and of the forks.

    Raises:
        ReportError: the folder is no run, or lacks what a replay needs.
        ConfigError: the run cannot be replayed here: several ranks, other versions, data or a model given in Python, or
            losses that differ from the recorded ones (with the first step).
    """
    folder = Path(run_dir)
    if jobs < 1:
        raise OptionError(f"{jobs} jobs run nothing; use at least 1")
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
    symptom = (result.get("verdict") or {}).get("detected_step")
    with nullcontext(executor) if executor is not None or jobs == 1 else processes(jobs) as hands:
        asked = oracle if hands is None else Workers(oracle, folder, hands, jobs, out)
        try:
            forks = Forks(asked, budget=budget, log=out / "forks.jsonl", tell=told)
            verdict = investigate(forks, symptom=symptom, prior=oracle.prior, settings=settings)
        finally:
            if isinstance(asked, Workers):
                asked.close()
    facts = {"run_id": result.get("run_id", folder.name), "seed": result.get("seed")}
    write_findings(out, verdict, oracle, facts, f"altgrad autopsy {folder}")
    return verdict


def plan(run_dir: str | Path, budget: int = 120, *, jobs: int = 1, settings: Settings | None = None) -> Plan:
    """What an autopsy of the run will cost, from the pace of a few steps of it on this machine.

    Raises:
        ReportError, ConfigError: as `autopsy`.
    """
    folder = Path(run_dir)
    trainer, recorded, _ = rebuild(folder)
    loop = TrainerLoop(trainer)
    cells = list(cells_of(loop))
    known = len(read_log(folder / FOLDER / "forks.jsonl"))
    expected = sum(expected_forks(cells, CAPTURES, settings or Settings()).values())
    return Plan(
        folder, len(recorded), len(cells), max(0, expected - known), max(0, budget - known), measure(loop), jobs
    )


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
    specs = cells_of(loop)
    rescued = choose(list(specs))
    own = [loop.advance() for _ in range(step)]
    other = first_other(recorded, own)
    if other is not None:
        raise ConfigError(f"the replay differs from the recorded run at step {other + 1}; run it again here first")
    put_low(loop, {cell: spec for cell, spec in specs.items() if cell not in rescued})
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
    torch.set_num_threads(threads_of(folder))
    trainer = Trainer(config.model_copy(update={"monitor": config.monitor.model_copy(update={"enabled": False})}))
    losses = recorded_losses(folder)
    if len(losses) < 10:
        raise ConfigError(f"{folder} records {len(losses)} steps; an autopsy needs at least 10")
    return trainer, losses, run.result


def threads_of(folder: Path) -> int:
    """CPU threads that the run had, which a replay needs for the same bits.

    Raises:
        ReportError: env.json does not say.
    """
    threads = Run(folder).environment.get("threads")
    if isinstance(threads, int) and threads >= 1:
        return threads
    raise ReportError(f"{folder}: env.json says {threads!r} threads; it is damaged, so the run cannot be replayed")


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
