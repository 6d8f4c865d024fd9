"""The autopsy of a run folder: the run is rebuilt from its config and replayed, which must give its recorded losses.

The findings are written to `<run>/autopsy/`: verdict.json, autopsy.html, autopsy.md, and forks.jsonl, from which an
interrupted autopsy goes on.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from altgrad.autopsy.findings import write_findings
from altgrad.autopsy.folder import rebuild, recorded_losses
from altgrad.autopsy.fork import LOW, TWIN, Fork
from altgrad.autopsy.forks import Forks, Told, read_log
from altgrad.autopsy.investigate import investigate
from altgrad.autopsy.loop import RunLoop
from altgrad.autopsy.oracle import CAPTURES, LoopOracle, Tell, cells_of, first_other, first_unrepeated, put_low
from altgrad.autopsy.plan import Plan, measure
from altgrad.autopsy.search import Settings, expected_forks, kinds_of
from altgrad.autopsy.verdict import Verdict
from altgrad.autopsy.workers import Executor, OfRun, check_jobs, side_by_side
from altgrad.errors import ConfigError, ReportError
from altgrad.records.lock import RunLock
from altgrad.records.run import read_run
from altgrad.records.verify import verify_run
from altgrad.report.numbers import plural

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
        ReportError: the folder is no run, is damaged, or lacks what a replay needs; so of the twin's.
        RunBusyError: another process is at it.
        ConfigError: the run cannot be replayed here: several ranks, other versions, data or a model given in Python, or
            losses that differ from the recorded ones (with the first step, and the first tensor that differs between two
            replays, if the loop does not repeat itself).
    """
    folder = Path(run_dir)
    check_jobs(jobs)
    trainer, recorded, result = rebuild(folder)
    beside = None if twin is None else _losses_of_twin(Path(twin), len(recorded))
    out = folder / FOLDER
    with RunLock.acquire(out, "look there for what it found"):
        oracle = LoopOracle(RunLoop(trainer), len(recorded), seed=trainer.config.seed, tell=tell)
        other = first_other(recorded, oracle.history(LOW))
        if other is not None:
            _refuse(oracle, recorded, other)
        if beside is not None and (other := first_other(beside, oracle.history(TWIN))) is not None:
            raise ConfigError(
                f"{twin} is not the float32 twin: its loss of step {other + 1} is {beside[other]!r}, the twin's is "
                f"{oracle.history(TWIN)[other]!r}; leave --twin out, or give a float32 run of the same seed, data and steps"
            )
        symptom = (result.get("verdict") or {}).get("detected_step")
        with side_by_side(oracle, OfRun(str(folder.resolve())), jobs, executor, out) as asked:
            forks = Forks(asked, budget=budget, log=out / "forks.jsonl", tell=told)
            verdict = investigate(forks, symptom=symptom, prior=oracle.prior, settings=settings)
        facts = {"run_id": result.get("run_id", folder.name), "seed": result.get("seed")}
        write_findings(out, verdict, oracle, facts, shlex.join(["altgrad", "autopsy", str(folder)]))
    return verdict


def plan(
    run_dir: str | Path,
    budget: int = 120,
    *,
    twin: str | Path | None = None,
    jobs: int = 1,
    settings: Settings | None = None,
) -> Plan:
    """What an autopsy of the run will cost, from the pace of a few steps of it on this machine.

    Raises:
        ReportError, ConfigError: as `autopsy`.
    """
    folder, settings = Path(run_dir), settings or Settings()
    trainer, recorded, _ = rebuild(folder)
    if twin is not None:
        _losses_of_twin(Path(twin), len(recorded))
    loop = RunLoop(trainer)
    cells = list(cells_of(loop))
    return Plan(
        folder,
        len(recorded),
        cells=len(cells),
        kinds=len(kinds_of(cells)),
        expected=expected_forks(cells, CAPTURES, settings),
        known=len(read_log(folder / FOLDER / "forks.jsonl")),
        budget=budget,
        pace=measure(loop),
        jobs=jobs,
        longest=settings.longest,
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
    if steps < 1:
        raise ConfigError(f"{steps} steps show nothing; take at least 1")
    if not 0 <= step <= len(recorded):
        raise ConfigError(f"step {step} is not in this run of {len(recorded)} steps")
    loop = RunLoop(trainer)
    specs = cells_of(loop)
    rescued = choose(list(specs))
    own = [loop.advance() for _ in range(step)]
    other = first_other(recorded, own)
    if other is not None:
        raise ConfigError(f"the replay differs from the recorded run at step {other + 1}; run it again here first")
    put_low(loop, {cell: spec for cell, spec in specs.items() if cell not in rescued})
    return step, recorded, [loop.advance() for _ in range(steps)], rescued


def _refuse(oracle: LoopOracle, recorded: list[float], other: int) -> NoReturn:
    """Say why the replay has another loss at index `other`: the loop does not repeat itself, or the run was another."""
    replayed = oracle.history(LOW)
    differs = first_unrepeated(oracle.loop, oracle.state(Fork(frozenset())), other + 1)
    why = (
        "it ran on another machine, or its data changed; run it again here first"
        if differs is None
        else f"the run does not repeat itself: {differs} differs when the same {plural(other + 1, 'step')} are taken twice; "
        "whatever was changed in its loop must draw from (seed, step)"
    )
    raise ConfigError(
        f"the replay differs from the recorded run at step {other + 1} (loss {replayed[other]!r}, recorded "
        f"{recorded[other]!r}): {why}"
    )


def _losses_of_twin(folder: Path, steps: int) -> list[float]:
    """What a twin's folder records.

    Raises:
        ReportError: it is no run, or damaged. ConfigError: it has fewer steps than the run.
    """
    if problems := verify_run(read_run(folder).path, checkpoints=False).problems:
        raise ReportError(f"the twin {folder} is damaged ({'; '.join(problems)}); leave --twin out")
    losses = recorded_losses(folder)
    if len(losses) < steps:
        raise ConfigError(
            f"{folder} records {len(losses)} steps, the run has {steps}; bring it to its end, or leave --twin out"
        )
    return losses
