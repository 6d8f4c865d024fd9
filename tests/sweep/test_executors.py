"""The two executors, local processes that really die and a Ray cluster."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from altgrad.errors import SweepError
from altgrad.records.lock import RunLock, is_locked
from altgrad.sweep.cluster import RayExecutor, _make_run, _unpack
from altgrad.sweep.job import Outcome, State, position, state_of
from altgrad.sweep.local import LocalExecutor, threads_per_run
from tests.sweep.fakes import fake_job, wait_until


def test_every_kind_of_death_is_recorded_and_harms_no_other_run(tmp_path: Path) -> None:
    kinds = ("ok", "sigkill", "segfault", "memory", "usage", "silent")
    jobs = [fake_job(tmp_path, kind) for kind in kinds]
    events: list[tuple[str, str]] = []
    outcomes = LocalExecutor(jobs=2).run(jobs, lambda e: events.append((e.kind, e.job.name)) if e else None)

    status = {kind: outcomes[job.name].status for kind, job in zip(kinds, jobs)}
    assert status == {
        "ok": "done", "sigkill": "done", "segfault": "failed", "memory": "failed", "usage": "failed", "silent": "failed",
    }  # fmt: skip
    attempts = {kind: (job.folder / "attempts").read_text() for kind, job in zip(kinds, jobs)}
    assert attempts == {"ok": "x", "sigkill": "xx", "segfault": "xx", "memory": "xx", "usage": "x", "silent": "xx"}

    crashes = {kind: _crashes(job.folder) for kind, job in zip(kinds, jobs) if kind != "ok"}
    assert not (jobs[0].folder / "crashes.json").exists()
    assert crashes["sigkill"]["state"] == "recovered"
    assert [c["exit_code"] for c in crashes["sigkill"]["crashes"]] == [-signal.SIGKILL]
    assert [c["exit_code"] for c in crashes["segfault"]["crashes"]] == [-signal.SIGSEGV] * 2
    assert "SIGSEGV" in crashes["segfault"]["crashes"][0]["reason"]
    assert crashes["segfault"]["crashes"][0]["step"] == 2
    assert any("MemoryError" in line for line in crashes["memory"]["crashes"][1]["log_tail"])
    assert "does not divide" in crashes["usage"]["crashes"][0]["log_tail"][-1]
    assert crashes["silent"]["crashes"][0]["reason"] == "ended without a result"
    assert events.count(("crashed", jobs[2].name)) == 2
    assert ("failed", jobs[2].name) in events
    assert [state_of(job.folder) for job in jobs[:3]] == [State.DONE, State.DONE, State.FAILED]


def test_a_failed_run_is_tried_again_by_the_next_sweep_and_its_record_grows(tmp_path: Path) -> None:
    job = fake_job(tmp_path, "segfault")
    for _ in range(2):
        assert LocalExecutor(retries=0).run([job])[job.name].status == "failed"
    assert len(_crashes(job.folder)["crashes"]) == 2


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    job = fake_job(tmp_path, "ok")
    LocalExecutor().run([job])
    outcome = LocalExecutor().run([job])[job.name]
    assert outcome.by_another
    assert outcome.result is not None
    assert outcome.result["status"] == "completed"
    assert (job.folder / "attempts").read_text() == "x"


def test_cores_are_divided_and_runs_get_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altgrad.sweep.local.available_cores", lambda: 7)
    assert [threads_per_run(n) for n in (1, 2, 3, 7, 20)] == [7, 3, 2, 1, 1]
    job = fake_job(tmp_path, "ok", threads=3)
    result = LocalExecutor().run([job])[job.name].result
    assert result is not None
    assert result["environment"]["OMP_NUM_THREADS"] == "3"


def test_runs_at_a_time_never_share_a_device(tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path, "ok", seed=seed, gpus=1, steps=10) for seed in range(5)]
    held: set[str] = set()
    together = 0
    guard = threading.Lock()
    device: dict[str, str] = {}

    def observe(event) -> None:
        nonlocal together
        if event is None:
            return
        with guard:
            name = event.job.environment["CUDA_VISIBLE_DEVICES"]
            if event.kind == "started":
                assert name not in held
                held.add(name)
                device[event.job.name] = name
                together = max(together, len(held))
            elif event.kind == "done":
                held.remove(name)

    outcomes = LocalExecutor(jobs=5, devices=["0", "3"]).run(jobs, observe)
    seen = {name: outcome.result["environment"]["CUDA_VISIBLE_DEVICES"] for name, outcome in outcomes.items()}
    assert seen == device
    assert set(seen.values()) == {"0", "3"}
    assert together == 2


def test_a_run_that_needs_devices_where_there_are_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"needs 1 GPU\(s\) and there are 0 device slots.*--devices"):
        LocalExecutor().run([fake_job(tmp_path, "ok", gpus=1)])
    with pytest.raises(SweepError, match="at least 1"):
        LocalExecutor(jobs=0)


def test_interrupting_ends_runs_in_order_and_the_same_command_goes_on(tmp_path: Path) -> None:
    job = fake_job(tmp_path, "held", steps=20)
    waiting = [fake_job(tmp_path, "ok", seed=9)]
    timer = threading.Thread(
        target=lambda: (wait_until(lambda: position(job.folder).step == 3), os.kill(os.getpid(), signal.SIGINT))
    )
    timer.start()
    outcomes = LocalExecutor(jobs=1).run([job, *waiting])
    timer.join()
    assert {o.status for o in outcomes.values()} == {"stopped"}
    assert position(job.folder).step == 3
    assert (job.folder / "checkpoint").read_text() == "3"
    assert not is_locked(job.folder)
    assert not (job.folder / "crashes.json").exists()
    assert not waiting[0].folder.exists()
    assert state_of(job.folder) is State.PARTIAL

    outcomes = LocalExecutor(jobs=1).run([fake_job(tmp_path, "held", steps=20), *waiting])
    assert {o.status for o in outcomes.values()} == {"done"}
    steps = [json.loads(line)["step"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))


def test_two_sweeps_on_one_folder_share_the_work(tmp_path: Path) -> None:
    """Two processes, the same twelve runs, at once: every run is made exactly once and both end with all of them."""
    script = (
        "import sys; from pathlib import Path; from tests.sweep.fakes import fake_job\n"
        "from altgrad.sweep.local import LocalExecutor\n"
        "jobs = [fake_job(Path(sys.argv[1]), 'ok', seed=s, steps=20) for s in range(12)]\n"
        "outcomes = LocalExecutor(jobs=2, poll_s=0.1).run(jobs)\n"
        "print(sum(o.status == 'done' for o in outcomes.values()), sum(o.by_another for o in outcomes.values()))\n"
    )
    sweeps = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [sweep.communicate(timeout=200)[0].split() for sweep in sweeps]
    assert [done for done, _ in printed] == ["12", "12"]
    assert sum(int(others) for _, others in printed) == 12
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 12
    assert {(folder / "attempts").read_text() for folder in folders} == {"x"}


def test_runs_of_a_killed_sweep_keep_their_folder_and_are_not_started_twice(tmp_path: Path) -> None:
    """kill -9 of the sweep itself: its run goes on, holding the lock; the next sweep waits for it."""
    script = (
        "import sys; from pathlib import Path; from tests.sweep.fakes import fake_job\n"
        "from altgrad.sweep.local import LocalExecutor\n"
        "LocalExecutor().run([fake_job(Path(sys.argv[1]), 'held')])\n"
    )
    job = fake_job(tmp_path, "held")
    sweep = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    wait_until(lambda: position(job.folder).step == 3)
    sweep.kill()
    sweep.wait()
    assert is_locked(job.folder)
    assert RunLock.try_acquire(job.folder) is None
    events: list[str] = []

    def observe(event) -> None:
        if event is not None:
            events.append(event.kind)
            if event.kind == "waiting":
                (job.folder / "go").touch()

    outcome = LocalExecutor(poll_s=0.05).run([job], observe)[job.name]
    assert events == ["started", "waiting", "done"]
    assert outcome.by_another
    assert (job.folder / "attempts").read_text() == "x"


def test_an_orphan_that_shall_die_with_its_parent_does(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("PR_SET_PDEATHSIG is Linux's")
    script = (
        "import sys; from pathlib import Path; from tests.sweep.fakes import fake_job\n"
        "from altgrad.sweep.worker import execute\n"
        "execute(fake_job(Path(sys.argv[1]), 'held'), dies_with_parent=True)\n"
    )
    job = fake_job(tmp_path, "held")
    worker = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    wait_until(lambda: position(job.folder).step == 3)
    worker.kill()
    worker.wait()
    wait_until(lambda: not is_locked(job.folder), seconds=60)  # it would hold it for two minutes
    assert position(job.folder).step == 3


def test_positions_are_read_from_the_end_and_past_a_torn_line(tmp_path: Path) -> None:
    assert position(tmp_path).step == 0
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"kind": "step", "step": n, "loss": "nan" if n == 7 else 1.0, "tokens_per_s": 5})
        for n in range(1, 8)
    ]
    lines += [json.dumps({"kind": "monitor", "step": 7, "layer": "x" * 40_000})]
    metrics.write_text("\n".join(lines) + '\n{"kind": "step", "step": 8, "lo')
    start = time.process_time()
    found = position(tmp_path)
    assert (found.step, found.tokens_per_s) == (7, 5.0)
    assert found.loss is not None
    assert found.loss != found.loss
    assert time.process_time() - start < 1


def _crashes(folder: Path) -> dict:
    return json.loads((folder / "crashes.json").read_text())


os.environ |= {  # before Ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # it would put a token into the home directory
    "RAY_raylet_start_wait_time_s": "120",  # a busy machine is slow, not broken
}
import ray  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with two CPU slots; its workers find this repository as the tests do."""
    root = str(Path(__file__).parents[2])
    with warnings.catch_warnings():  # Ray leaves process objects behind that complain when they are collected
        warnings.simplefilter("ignore")
        ray.init(
            "local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="error",
            object_store_memory=80 << 20, _node_ip_address="127.0.0.1", runtime_env={"env_vars": {"PYTHONPATH": root}},
        )  # fmt: skip
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
    jobs = [fake_job(tmp_path, "held"), fake_job(tmp_path, "ok")]
    timer = threading.Thread(
        target=lambda: (wait_until(lambda: position(jobs[0].folder).step == 3), os.kill(os.getpid(), signal.SIGINT))
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
    job = fake_job(tmp_path, "held")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
        future = pool.submit(_make_run, job, str(marker), None, 1)
        wait_until(lambda: position(job.folder).step == 3)
        marker.unlink()
        outcome, archive = future.result(timeout=100)
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
