"""What a sweep would do: every run of a matrix with its content-named folder and the state that the folder is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad.errors import SweepError
from altgrad.records.lock import is_locked
from altgrad.records.run import is_run
from altgrad.sweep.job import Job, State, state_of
from altgrad.sweep.keys import plain
from altgrad.sweep.matrix import Matrix
from altgrad.training.config.experiment import ExperimentConfig
from altgrad.training.config.loading import dump_config
from altgrad.training.data import Corpus, load_corpus
from altgrad.training.run.folder import plan_run
from altgrad.training.trainer import check_setups


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: its config, its folder, and the state of the folder when the plan was made."""

    config: ExperimentConfig
    choices: Mapping[str, Any]
    folder: Path
    state: State

    @property
    def name(self) -> str:
        return self.folder.name

    def job(self, threads: int = 1, gpus: int | None = None) -> Job:
        """The job that makes this run. `gpus` None: one where the config's device is CUDA without a number."""
        needed = int(self.config.device == "cuda") if gpus is None else gpus
        return Job(self.name, str(self.folder.parent), dump_config(self.config), self.config.max_steps, threads, needed)


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep, in the order in which they are started."""

    runs: Sequence[PlannedRun]

    def count(self) -> Counter[State]:
        """How many runs are in each state."""
        return Counter(run.state for run in self.runs)

    @property
    def missing(self) -> list[PlannedRun]:
        """The runs that are not done (those that another process is making included)."""
        return [run for run in self.runs if run.state is not State.DONE]


def make_plan(matrix: Matrix, out: str | Path) -> Plan:
    """The runs of `matrix` under the folder `out`. Reads the corpora, to name the runs by their content, and sets up every
    kind of run that is missing, so that what none of its processes could do is refused here.

    Raises:
        SweepError, ConfigError, RecipeError: see `Matrix.expand` and `altgrad.training.trainer.check_setups`.
        DataError: a corpus is missing or unfit.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise SweepError(f"{out} is a file; choose a folder for the runs with --out")
    if out.is_dir() and is_run(out):
        raise SweepError(f"{out} is the folder of one run; choose a folder for the runs with --out")
    corpora: dict[str, Corpus] = {}
    runs = []
    for variant in matrix.expand(runs_dir=str(out)):
        config = variant.config
        source = f"{config.data.model_dump_json()} {config.model.vocab_size}"
        if source not in corpora:
            corpora[source] = load_corpus(config.data, config.model.vocab_size)
        folder = plan_run(config, corpora[source]).path
        runs.append(PlannedRun(config, variant.choices, folder, state_of(folder, is_locked(folder))))
    plan = Plan(runs)
    check_setups((f"{matrix.origin}: {plain(run.choices)}", run.config) for run in plan.missing)
    return plan
