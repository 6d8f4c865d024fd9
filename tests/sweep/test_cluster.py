"""The Ray executor on a real Ray, started on this machine for these tests with two CPUs and two workers."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from altgrad.errors import SweepError
from altgrad.sweep.cluster import RayExecutor, _make_run, _unpack
from altgrad.sweep.job import Outcome, position
from altgrad.training.run.lock import is_locked
from tests.sweep.fakes import fake_job, wait_until

os.environ |= {  # before Ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # it would put a token into the home directory
    "RAY_raylet_start_wait_time_s": "120",  # a busy machine is slow, not broken
}
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with two CPU slots; its workers find this repository as the tests do."""
    root = str(Path(__file__).parents[2])
    with warnings.catch_warnings():  # Ray leaves process objects behind that complain when they are collected
        warnings.simplefilter("ignore")
        try:
            ray.init(
                "local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="error",
                object_store_memory=80 << 20, _node_ip_address="127.0.0.1", runtime_env={"env_vars": {"PYTHONPATH": root}},
            )  # fmt: skip
        except Exception as error:
            gc.collect()
            if "timed out during startup" not in str(error):
                raise
            pytest.skip(f"this machine is too busy to start Ray: {error}")
    yield
    with warnings.catch_warnings():
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


@pytest.mark.filterwarnings("ignore")
def test_interrupting_ends_the_tasks_runs_in_order(cluster: None, tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path, "slow", steps=4000, environment={"FAKE_STEP_S": "0.05"}), fake_job(tmp_path, "ok")]
    timer = threading.Thread(
        target=lambda: (wait_until(lambda: position(jobs[0].folder).step >= 3), os.kill(os.getpid(), signal.SIGINT))
    )
    timer.start()
    outcomes = RayExecutor(jobs=1).run(jobs)
    timer.join()
    assert {outcome.status for outcome in outcomes.values()} == {"stopped"}
    wait_until(lambda: not is_locked(jobs[0].folder))
    assert (jobs[0].folder / "checkpoint").read_text() == str(position(jobs[0].folder).step)
    assert not jobs[1].folder.exists()


def test_an_address_where_nobody_listens_is_refused_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SweepError, match=r"nothing listens at '127.0.0.1:.*ray start --head"):
            RayExecutor(address)._connect(ray, [fake_job(tmp_path, "ok")])


def test_a_task_ends_its_run_in_order_when_the_sweep_s_marker_goes(tmp_path: Path) -> None:
    """What a worker does, without a worker; with SIGINT blocked, as Ray's workers have it."""
    marker = tmp_path / ".sweep-test"
    marker.touch()
    job = fake_job(tmp_path, "slow", steps=4000, environment={"FAKE_STEP_S": "0.02"})
    with ThreadPoolExecutor(1) as pool:
        pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
        future = pool.submit(_make_run, job, str(marker), None, 1)
        wait_until(lambda: position(job.folder).step >= 3)
        marker.unlink()
        outcome, archive = future.result(timeout=30)
    assert (outcome.status, archive) == ("stopped", None)
    assert (job.folder / "checkpoint").read_text() == str(position(job.folder).step)


def test_without_the_marker_a_run_is_made_aside_and_packed(tmp_path: Path) -> None:
    job = fake_job(tmp_path / "not_here", "ok")
    outcome, archive = _make_run(job, str(tmp_path / "not_here" / ".sweep-test"), None, 1)
    assert outcome.status == "done"
    assert not job.folder.exists()
    assert archive is not None
    _unpack(archive, job.folder)
    assert {"metrics.jsonl", "result.json", "log.txt"} <= {path.name for path in job.folder.iterdir()}
