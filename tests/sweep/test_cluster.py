"""The Ray executor on a real Ray, started on this machine for these tests with two CPUs and two workers."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from altgrad.errors import SweepError
from altgrad.sweep.cluster import RayExecutor
from altgrad.sweep.job import Outcome
from tests.sweep.fakes import fake_job

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with two CPU slots; its workers find this repository as the tests do."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    root = str(Path(__file__).parents[2])
    ray.init(
        num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="error",
        object_store_memory=80 << 20, _node_ip_address="127.0.0.1", runtime_env={"env_vars": {"PYTHONPATH": root}},
    )  # fmt: skip
    yield
    with warnings.catch_warnings():  # Ray leaves process objects behind that complain when they are collected
        warnings.simplefilter("ignore")
        ray.shutdown()
        gc.collect()


@pytest.mark.filterwarnings("ignore")  # Ray's own warnings are not this project's
def test_runs_survive_the_death_of_run_and_worker(cluster: None, tmp_path: Path) -> None:
    kinds = ("ok", "sigkill", "parent", "segfault")
    jobs = [fake_job(tmp_path, kind) for kind in kinds]
    events: list[tuple[str, str]] = []
    outcomes = RayExecutor().run(jobs, lambda e: events.append((e.kind, e.job.name)) if e else None)
    assert {kind: outcomes[job.name].status for kind, job in zip(kinds, jobs)} == {
        "ok": "done", "sigkill": "done", "parent": "done", "segfault": "failed",
    }  # fmt: skip
    attempts = {kind: (job.folder / "attempts").read_text() for kind, job in zip(kinds, jobs)}
    assert attempts == {"ok": "x", "sigkill": "xx", "parent": "xx", "segfault": "xx"}
    assert events.count(("started", jobs[0].name)) == 1
    assert ("failed", jobs[3].name) in events
    assert not list(tmp_path.glob(".sweep-*"))


@pytest.mark.filterwarnings("ignore")
def test_results_are_fetched_where_no_folder_is_shared(cluster: None, tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path, "ok", seed=seed, threads=2) for seed in range(2)]
    outcomes = RayExecutor(shared=False, jobs=1).run(jobs)
    for job in jobs:
        outcome = outcomes[job.name]
        assert isinstance(outcome, Outcome)
        assert outcome.result is not None
        assert outcome.result["environment"]["OMP_NUM_THREADS"] == "2"
        assert {"metrics.jsonl", "result.json", "log.txt"} <= {path.name for path in job.folder.iterdir()}
        assert (job.folder / "attempts").read_text() == "x"


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_no_node_can_hold_is_refused(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"no node of the cluster has 64 CPUs and 0 GPUs.*largest has 2 CPUs"):
        RayExecutor().run([fake_job(tmp_path, "ok", threads=64)])
